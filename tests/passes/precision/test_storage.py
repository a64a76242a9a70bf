"""Weights stored in half: smaller, casts in front of their readers, within the budget, on the CPU too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.precision import StoreHalf

from graphopt.driver import optimize
from graphopt.ir.model_file import model_to_bytes
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Calibration, Context, Options
from graphopt.runtime.session import Session
from graphopt.targets import get_target
from tests.rewriting import parse

Array = np.ndarray[Any, Any]
TEXT = "g (float[32,32] x) => (float[32,32] y) <float[32,32] v> { a = MatMul(x, w) b = MatMul(a, w) y = MatMul(b, v) }"


def normal(*shape: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)


def stored(
    text: str, constants: dict[str, Array], *, opset: int = 18, budget: str | None = None
) -> tuple[ir.Model, Context, onnx.ModelProto]:
    proto = parse(text, opset=opset)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    model = ir.from_proto(proto)
    samples = Calibration([{"x": normal(32, 32)}])
    ctx = Context(model, get_target("cpu"), Options(budget=budget, calibration=samples))
    run_pipeline(model, (StoreHalf(),), ctx)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, ctx, proto


def kinds(model: ir.Model) -> dict[str, str]:
    return {n: v.dtype.name for n, v in model.graph.initializers.items() if v.dtype is not None}


def test_weights_are_stored_once_and_cast_once() -> None:
    model, _, proto = stored(TEXT, {"w": normal(32, 32, scale=0.2)})
    assert kinds(model) == {"v_float16": "FLOAT16", "w_float16": "FLOAT16"}
    assert [n.op_type for n in model.graph].count("Cast") == 2
    feeds = {"x": normal(32, 32)}
    expected = Session(proto.SerializeToString()).run(feeds)["y"]
    found = Session(model_to_bytes(model)).run(feeds)["y"]
    assert 0 < float(np.abs(expected - found).max()) < 0.01 * float(np.sqrt(np.mean(expected**2)))


def test_weights_that_bodies_of_control_flow_read_are_stored_too() -> None:
    text = (
        "g (float[32,32] x, bool c) => (float[32,32] y) { y = If(c) <then_branch = t () => (float[32,32] p)"
        " { p = MatMul(x, w) }, else_branch = e () => (float[32,32] q) { q = Relu(x) }> }"
    )
    proto = parse(text)
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(normal(32, 32, scale=0.2), "w"),
    )
    model = ir.from_proto(proto)
    feed = {"x": normal(32, 32), "c": np.array(True)}
    ctx = Context(model, get_target("cpu"), Options(calibration=Calibration([feed])))
    run_pipeline(model, (StoreHalf(),), ctx)
    assert kinds(model) == {"w_float16": "FLOAT16"}
    expected = Session(proto.SerializeToString()).run(feed)["y"]
    found = Session(model_to_bytes(model)).run(feed)["y"]
    assert 0 < float(np.abs(expected - found).max()) < 0.01 * float(np.sqrt(np.mean(expected**2)))


def test_what_a_half_does_not_hold_stays() -> None:
    model, ctx, _ = stored(TEXT, {"w": normal(32, 32, scale=1e-8)})
    assert kinds(model) == {"v_float16": "FLOAT16", "w": "FLOAT"}
    assert any("does not hold" in remark.reason for remark in ctx.remarks)


def test_the_budget_decides() -> None:
    model, ctx, _ = stored(TEXT, {"w": normal(32, 32, scale=0.2)}, budget="sqnr>=120")
    assert set(kinds(model).values()) == {"FLOAT"}
    assert any("sensitivity" in remark.reason for remark in ctx.remarks)


def test_small_weights_and_overridable_defaults_stay() -> None:
    text = "g (float[32,32] x, float[32,32] w) => (float[32,4] y) <float[32,4] v> { a = MatMul(x, w) y = MatMul(a, v) }"
    model, _, _ = stored(text, {"w": normal(32, 32)})
    assert set(kinds(model).values()) == {"FLOAT"}


def test_old_opsets_have_no_cast_from_half() -> None:
    text = "g (float[4,32] x) => (float[4,32] y) { y = Mul(x, w) }"
    proto = parse(text.replace("Mul(x, w)", "Relu(x)"), opset=5)
    model = ir.from_proto(proto)
    ctx = Context(model, get_target("cpu"))
    assert not StoreHalf().run(model, ctx)
    assert "opset 6" in ctx.remarks[0].reason


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt", "portable"])
def test_every_target_takes_it(target: str) -> None:
    proto = parse(
        TEXT.replace("b = MatMul(a, w)", "t = Tanh(a) b = MatMul(t, w)").replace(
            "MatMul(b, v)", "Add(b, v)"
        )
    )
    weight = normal(32, 32, scale=0.2)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    made = optimize(proto, target=target, precision="fp16-weights")
    assert made.report.verification.passed
    assert made.report.output.parameter_bytes == made.report.input.parameter_bytes // 2
