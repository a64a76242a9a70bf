"""The .ort form of a model, for builds of ONNX Runtime with few operators, and the list of those operators."""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import TargetError
from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import all_graphs
from graphopt.runtime import onnxruntime_api

ORT_FILE = "model.ort"
"""Its bytes cannot be promised: ONNX Runtime 1.31 writes tables in an order that differs from run to run."""


def write_ort(model: Path, folder: Path) -> None:
    """Writes `model.ort` and `required_operators.config` into `folder`.

    The runtime's BASIC rewrites are in the file, and none that depend on the machine.

    Raises:
        TargetError: the installed ONNX Runtime cannot write the format.
    """
    _convert(model, folder / ORT_FILE, "ORT")
    plain = folder / ".operators.onnx"
    _convert(model, plain, "ONNX")
    lines = required_operators(plain)
    plain.unlink()
    (folder / "required_operators.config").write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def _convert(model: Path, output: Path, form: str) -> None:
    ort = onnxruntime_api.runtime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(output)
    options.add_session_config_entry("session.save_model_format", form)
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except onnxruntime_api.errors() as error:
        raise TargetError(
            f"ONNX Runtime cannot write {output.name}: {' '.join(str(error).split())[:300]}; leave out --with ort"
        ) from error
