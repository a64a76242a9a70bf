"""What rounding moves further than by its own size: steps, coordinates, phases, squares that cancel, exponents."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.rewrite import Calibration, Options
from tests.passes.precision.casting import Array, cast, error, halves, normal, reasons


def held(**numbers: float) -> dict[str, Array]:
    return {name: np.array(number, np.float32) for name, number in numbers.items()}


@pytest.mark.parametrize("operator", ["Floor", "Ceil", "Round"])
def test_what_is_rounded_to_a_step_stays_float32(operator: str) -> None:
    text = (
        f"g (float[4,16] x) => (float[4,16] y) {{ m = Mul(x, k) f = {operator}(m) y = Div(f, k) }}"
    )
    _, ctx, _ = cast(text, constants=held(k=3.0))
    assert "rounded to a step next" in reasons(ctx)["m"]


def test_regions_that_are_looked_up_stay_float32() -> None:
    text = (
        "g (float[1,3,32,32] x, float[5,4] b) => (float[5,4,7,7] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) i = Identity(n) s = Mul(b, k)"
        " y = RoiAlign<output_height=7, output_width=7, sampling_ratio=2, spatial_scale=0.0625>(c, s, i) }"
    )
    constants = held(k=1.5) | {"w": normal(4, 3, 3, 3, scale=0.2), "n": np.zeros(5, np.int64)}
    model, ctx, proto = cast(text, constants=constants)
    assert "coordinates" in reasons(ctx)["s"]
    assert halves(model) == ["Conv"]
    boxes = np.sort(np.abs(normal(5, 4, scale=150)), axis=1)
    assert error(model, proto, {"x": normal(1, 3, 32, 32), "b": boxes}) < 0.01


def test_a_grid_stays_float32_while_the_image_is_half() -> None:
    text = (
        "g (float[1,3,32,32] x, float[1,16,16,2] t) => (float[1,4,16,16] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) d = Mul(t, k) y = GridSample(c, d) }"
    )
    constants = held(k=0.9) | {"w": normal(4, 3, 3, 3, scale=0.2)}
    model, ctx, _ = cast(text, constants=constants, target="portable")
    assert "coordinates" in reasons(ctx)["d"]
    assert halves(model) == ["Conv", "GridSample"]


def test_an_angle_of_an_input_stays_float32() -> None:
    text = (
        "g (float[2] t) => (float[2,16] y) <float[32,16] w> {"
        " u = Unsqueeze(t, a) m = Mul(u, f) s = Sin(m) c = Cos(m) j = Concat<axis=-1>(s, c) y = MatMul(j, w) }"
    )
    constants = {"a": np.array([1]), "f": np.geomspace(1, 1e-4, 16, dtype=np.float32)}
    model, ctx, proto = cast(text, constants=constants)
    assert all("phase" in reasons(ctx)[name] for name in ("m", "s", "c"))
    assert "MatMul" in halves(model)
    assert error(model, proto, {"t": np.array([999, 501], np.float32)}) < 0.01


def test_an_angle_that_layers_make_may_be_half() -> None:
    text = "g (float[4,16] x) => (float[4,16] y) <float[16,16] w> { m = MatMul(x, w) y = Sin(m) }"
    constants = {"w": normal(16, 16, scale=0.05)}
    model, _, _ = cast(text.replace("<float[16,16] w> ", ""), constants=constants)
    assert halves(model) == ["MatMul", "Sin"]


SQUARES = (
    " m = ReduceMean<axes=[-1]>(i) q = Mul(i, i) a = ReduceMean<axes=[-1]>(q) b = Mul(m, m)"
    " v = Sub(a, b) e = Add(v, eps) r = Sqrt(e) y = Div(i, r) }"
)


def test_squares_of_an_input_that_cancel_stay_float32() -> None:
    text = "g (float[4,64] x) => (float[4,64] y) { i = Identity(x)" + SQUARES
    model, ctx, proto = cast(text, precision="bf16", opset=17, constants=held(eps=1e-6))
    assert all("cancellation" in reasons(ctx)[name] for name in ("q", "a", "b", "v"))
    assert error(model, proto, {"x": normal(4, 64) + 30}) < 0.06


def test_squares_of_what_layers_make_are_as_seen() -> None:
    text = "g (float[4,64] x) => (float[4,64] y) { i = MatMul(x, w)" + SQUARES
    constants = held(eps=1e-6) | {"w": normal(64, 64, scale=0.1)}
    _, ctx, _ = cast(text, precision="bf16", opset=17, constants=constants)
    assert not any("cancellation" in reason for reason in reasons(ctx).values())


@pytest.mark.parametrize(
    "text",
    [
        "y = LayerNormalization(i, s)",
        "m = ReduceMean<axes=[-1]>(i) d = Sub(i, m) y = Mul(d, s)",
    ],
)
def test_an_input_is_centred_in_float32(text: str) -> None:
    whole = f"g (float[4,64] x) => (float[4,64] y) {{ i = Mul(x, k) {text} }}"
    constants = held(k=2.0) | {"s": np.ones(64, np.float32)}
    model, ctx, proto = cast(whole, opset=17, constants=constants)
    assert "cancellation" in reasons(ctx)["i"]
    assert error(model, proto, {"x": normal(4, 64, scale=0.1) + 30}) < 0.01
    real = Options(calibration=Calibration([{"x": normal(4, 64)}]))
    _, ctx, _ = cast(whole, opset=17, constants=constants, options=real)
    assert "cancellation" not in "".join(reasons(ctx).values())


@pytest.mark.parametrize(("scale", "stays"), [(40.0, True), (0.5, False)])
def test_large_logits_stay_float32(scale: float, stays: bool) -> None:
    text = "g (float[4,32] x) => (float[4,16] y) { s = MatMul(x, w) y = Softmax<axis=-1>(s) }"
    _, ctx, _ = cast(text, constants={"w": normal(32, 16, scale=scale)})
    assert reasons(ctx).get("s", "").startswith("MatMul: exponent") == stays
