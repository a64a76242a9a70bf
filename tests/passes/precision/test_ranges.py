"""Ranges that keep nodes in float32: units of inputs, growth, infinities, cancellation, factors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.precision.ranges import MANY, samples
from graphopt_passes.precision.units import units

from graphopt.rewrite import Calibration, Context, Options
from graphopt.runtime.session import Session
from graphopt.targets import get_target
from tests.passes.precision.casting import Array, cast, error, halves, normal, reasons
from tests.rewriting import parse


def test_inputs_are_tried_in_the_units_that_constants_tell() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w>"
        "{ t = Tanh(x) d = Div(x, k) s = Add(d, t) y = MatMul(s, w) }"
    )
    model, ctx, proto = cast(text, constants={"k": np.array(5e4, np.float32)})
    assert "|x| reaches" in reasons(ctx)["d"]
    assert "MatMul" in halves(model)
    assert error(model, proto, {"x": normal(4, 16, scale=5e4)}) < 0.01


@pytest.mark.parametrize(
    ("operator", "constant", "expected"),
    [
        ("Div(x, k)", 255.0, {"x": 255.0}),
        ("Mul(x, k)", 1 / 64, {"x": 64.0}),
        ("Sub(x, k)", 128.0, {"x": 128.0}),
        ("Add(x, k)", 1e-6, {}),
        ("Mul(x, k)", 300.0, {}),
        ("Add(x, k)", -1e9, {}),
        ("Div(k, x)", 255.0, {}),
        ("Tanh(x)", 255.0, {}),
    ],
)
def test_the_unit_of_an_input(operator: str, constant: float, expected: dict[str, float]) -> None:
    proto = parse(f"g (float[4,16] x) => (float[4,16] y) {{ v = Identity(x) y = {operator} }}")
    tensor = ir.tensor(np.array(constant, np.float32), name="k")
    proto.graph.initializer.append(ir.to_proto(tensor))
    assert units(ir.from_proto(proto)) == expected


@pytest.mark.parametrize(
    ("text", "weights", "expected"),
    [
        ("h = MatMul(x, w) y = Mul(h, k)", np.full((16, 16), 0.25, np.float32), {"x": 1e5}),
        ("h = MatMul(x, w) y = Mul(h, k)", normal(16, 16, scale=1e3), {}),
        ("h = MatMul(x, w) y = Add(h, k)", normal(16, 16, scale=0.25), {}),
        ("a = MatMul(x, w) h = MatMul(a, w) y = Mul(h, k)", normal(16, 16, scale=0.25), {}),
        ("h = Mul(x, x) y = MatMul(h, w)", normal(16, 16, scale=1e-6), {}),
        ("h = MatMul(x, w) y = Mul(h, k)", np.zeros((16, 16), np.float32), {}),
        ("y = BatchNormalization(x, s, s, s, v)", normal(1), {"x": 300.0}),
    ],
)
def test_constants_behind_a_layer_tell_the_unit_too(
    text: str, weights: Array, expected: dict[str, float]
) -> None:
    proto = parse(f"g (float[16,16] x) => (float[16,16] y) {{ {text} }}")
    held = {"w": weights, "k": np.array(1e-5), "s": np.ones(16), "v": np.full(16, 9e4)}
    for name, array in held.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array.astype(np.float32), name=name)))
    found = units(ir.from_proto(proto))
    assert found == pytest.approx(expected, rel=1e-3)


def test_sums_and_squares_may_grow_beyond_what_generated_inputs_show() -> None:
    text = (
        "g (float[4,64] x) => (float[4,64] y) {"
        " h = MatMul(x, w) q = Mul(h, h) m = ReduceMean(q, axis) r = Sqrt(m) d = Div(h, r) y = MatMul(d, w) }"
    )
    constants: dict[str, Array] = {"w": normal(64, 64, scale=0.1), "axis": np.array([-1])}
    model, ctx, proto = cast(text, constants=constants)
    assert "grows fast" in reasons(ctx)["q"]
    assert halves(model)[0] == "MatMul"
    assert error(model, proto, {"x": normal(4, 64, scale=100)}) < 0.01
    real = Options(calibration=Calibration([{"x": normal(4, 64)}]))
    _, ctx, _ = cast(text, constants=constants, options=real)
    assert "q" not in reasons(ctx)


def test_what_float32_does_not_hold_a_half_does_not() -> None:
    text = (
        "g (float[4,16] x) => (float[4,1] y) {"
        " h = MatMul(x, w) e = Exp(h) s = ReduceSum(e, axis) y = Log(s) }"
    )
    constants: dict[str, Array] = {"w": normal(16, 16, scale=2), "axis": np.array([-1])}
    _, ctx, _ = cast(text, constants=constants)
    assert "|s| reaches inf" in reasons(ctx)["y"]


def test_numbers_that_cancel_stay_float32() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w>"
        "{ h = MatMul(x, w) a = Add(h, k) b = Sub(a, k) c = Add(b, h) y = MatMul(c, w) }"
    )
    samples = [{"x": np.full((4, 16), 1 / 16, np.float32)}]
    constants = {"k": np.array(3e4, np.float32)}
    options = Options(calibration=Calibration(samples))
    _, ctx, _ = cast(text, constants=constants, options=options)
    assert "cancellation: numbers up to 3e+04 leave 1" in reasons(ctx)["b"]
    assert "cancellation" not in reasons(ctx)["a"]


def test_factors_of_gemm_that_a_half_does_not_hold_are_folded() -> None:
    text = "g (float[4,16] x) => (float[4,16] y) { y = Gemm<alpha=1e7, beta=1e-9>(x, w, b) }"
    constants: dict[str, Array] = {"w": normal(16, 16, scale=1e-7), "b": normal(16, scale=1e9)}
    model, _, proto = cast(text, constants=constants)
    assert halves(model) == ["Gemm"]
    assert error(model, proto, {"x": normal(4, 16)}) < 0.01


def test_factors_that_cannot_be_folded_keep_float32() -> None:
    text = "g (float[4,16] x, float[16,8] w) => (float[4,8] y) { y = Gemm<alpha=1e7>(x, w) }"
    _, ctx, _ = cast(text)
    assert "the factor alpha" in reasons(ctx)["y"]


@pytest.mark.parametrize(("width", "cheap"), [(16, True), (2048, False)])
def test_models_that_are_cheap_to_run_get_further_draws(width: int, cheap: bool) -> None:
    proto = parse(f"g (float[4,{width}] x) => (float[4,{width}] y) {{ y = MatMul(x, w) }}")
    weight = np.zeros((width, width), np.float32)
    proto.graph.initializer.append(ir.to_proto(ir.tensor(weight, name="w")))
    model = ir.from_proto(proto)
    feeds, usual, _ = samples(
        model, Session(proto.SerializeToString()), Context(model, get_target("cuda"))
    )
    draws = [feed for feed in usual if not any(feed is each for each in feeds)]
    assert len(draws) == (MANY if cheap else 0)
    assert len({feed["x"].tobytes() for feed in draws}) == len(draws)
