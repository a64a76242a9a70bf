"""Casts of models in ONNX text, and what tests ask about the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from graphopt_passes import PREPARE
from graphopt_passes.precision import CastToHalf

from graphopt.ir.check import violations
from graphopt.ir.model_file import model_to_bytes
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Context, Gate, Options
from graphopt.runtime.emulate import emulate
from graphopt.runtime.session import Session
from graphopt.targets import get_target
from tests.rewriting import parse

Array = np.ndarray[Any, Any]


def cast(
    text: str,
    *,
    precision: Any = "fp16",
    target: str = "cuda",
    opset: int = 18,
    options: Options | None = None,
    gate: Gate | None = None,
    constants: dict[str, Array] | None = None,
) -> tuple[ir.Model, Context, onnx.ModelProto]:
    """The model cast, valid, with the inputs and outputs that it had; the run; the original."""
    proto = parse(text, opset=opset)
    for name, array in (constants or {}).items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(proto)
    ctx = Context(model, get_target(target), options or Options(), gate or Gate())
    run_pipeline(model, (*PREPARE, CastToHalf(precision)), ctx)
    assert not list(violations(model))
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    assert made.graph.input == proto.graph.input
    assert made.graph.output == proto.graph.output
    return model, ctx, proto


def halves(model: ir.Model) -> list[str]:
    """Operators of the main graph that give halves, casts aside."""
    kinds = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return [n.op_type for n in model.graph if n.op_type != "Cast" and n.outputs[0].dtype in kinds]


def casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


def reasons(ctx: Context) -> dict[str, str]:
    return {r.node: r.reason for r in ctx.remarks if r.rule == "float32"}


def error(model: ir.Model, proto: onnx.ModelProto, feeds: dict[str, Array]) -> float:
    """Greatest difference over the RMS, in true half precision; non-finite elements must agree."""
    reference = Session(proto.SerializeToString()).run(feeds)
    got = Session(model_to_bytes(emulate(model))).run(feeds)
    worst = 0.0
    for name, expected in reference.items():
        finite = np.isfinite(expected)
        assert np.array_equal(finite, np.isfinite(got[name]))
        scale = np.sqrt(np.mean(np.square(expected[finite], dtype=np.float64)))
        worst = max(worst, float(np.abs(expected - got[name])[finite].max() / scale))
    return worst


def normal(*shape: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
