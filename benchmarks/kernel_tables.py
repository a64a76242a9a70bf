"""Writes the packaged kernel tables from the installed ONNX Runtime wheel.

    python benchmarks/kernel_tables.py [FOLDER]

Every provider that the wheel lists gets its table: `onnxruntime` has the one of the CPU, `onnxruntime-gpu` also that
of CUDA, where the CUDA libraries load.  FOLDER is graphopt/targets/tables by default.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import onnxruntime as ort

from graphopt.runtime.installed import installed_kernels
from graphopt.targets.kernels import KernelTable, pack

NAMES = {"CPUExecutionProvider": "ort_cpu", "CUDAExecutionProvider": "ort_cuda"}
LICENCE = "MIT, (c) Microsoft Corporation"
TABLES = Path(__file__).resolve().parents[1] / "graphopt" / "targets" / "tables"


def write(table: KernelTable, folder: Path) -> Path:
    """Writes one table, one operator a line."""
    body = pack(table, LICENCE)
    path = folder / f"{NAMES[table.provider]}.json"
    path.write_text(compact(body), encoding="utf-8")
    return path


def compact(body: dict[str, dict[str, object]]) -> str:
    """JSON with a line for each list of types and each operator, so that a diff of two tables can be read."""
    parts = ['{"header": ' + json.dumps(body["header"])]
    parts.append('"types": [\n' + ",\n".join(json.dumps(names) for names in body["types"]) + "\n]")
    domains = []
    for domain, operators in body["kernels"].items():
        assert isinstance(operators, dict)
        rows = [f"{json.dumps(op)}: {json.dumps(rows)}" for op, rows in operators.items()]
        domains.append(f"{json.dumps(domain)}: {{\n" + ",\n".join(rows) + "\n}")
    parts.append('"kernels": {\n' + ",\n".join(domains) + "\n}}")
    return ",\n".join(parts) + "\n"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TABLES
    for provider in NAMES:
        table = installed_kernels(provider)
        if table is None:
            print(f"{provider}: not in onnxruntime {ort.__version__} as installed here")
            continue
        source = (
            f"onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def() of the PyPI wheel, "
            f"{platform.machine()} {sys.platform}"
        )
        path = write(KernelTable(provider, table.version, source, table.kernels), folder)
        print(f"{provider}: {len(table.kernels)} operators, {path.stat().st_size} bytes, {path}")


if __name__ == "__main__":
    main()
