"""The .ort form of a model, for builds of ONNX Runtime with few operators, and the list of those operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from graphopt.errors import TargetError
from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import all_graphs

ORT_FILE = "model.ort"
"""Two runs give the same bytes where `ort_writer` can have fixed addresses."""

SECONDS = 1800


def write_ort(model: Path, folder: Path) -> bool:
    """Writes `model.ort` and `required_operators.config` into `folder`; returns whether another run gives these bytes.

    The runtime's BASIC rewrites are in the file, and none that depend on the machine.

    Raises:
        TargetError: the installed ONNX Runtime cannot write the format.
    """
    reproducible = _convert(model, folder / ORT_FILE, "ORT")
    plain = folder / ".operators.onnx"
    _convert(model, plain, "ONNX")
    lines = required_operators(plain)
    plain.unlink()
    (folder / "required_operators.config").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return reproducible


def required_operators(model: Path) -> list[str]:
    """`domain;opset;Op,Op`, one line a domain, as `--include_ops_by_config` of ONNX Runtime's build takes it."""
    graph = load_model(model)
    used: dict[str, set[str]] = {}
    for scope in all_graphs(graph):
        for node in scope.graph:
            used.setdefault(node.domain or "ai.onnx", set()).add(node.op_type)
    imports = {domain or "ai.onnx": version for domain, version in graph.opset_imports.items()}
    return [
        f"{domain};{imports.get(domain, 1)};{','.join(sorted(names))}"
        for domain, names in sorted(used.items())
    ]


def _convert(model: Path, output: Path, form: str) -> bool:
    near = os.path.relpath(model, output.parent)  # a path of its own length would move memory about
    line = [sys.executable, "-P", "-m", "graphopt.emit.ort_writer", near, output.name, form]
    ran = subprocess.run(  # noqa: S603  our own module
        line, capture_output=True, text=True, check=False, timeout=SECONDS, cwd=output.parent
    )
    told = json.loads(ran.stdout) if ran.returncode == 0 else {"fault": ran.stderr.strip()[-300:]}
    if told["fault"] or not output.is_file():
        raise TargetError(
            f"ONNX Runtime cannot write {output.name}: {told['fault']}; leave out --with ort"
        )
    return bool(told["reproducible"])
