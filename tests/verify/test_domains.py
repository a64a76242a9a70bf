"""Where numbers of inputs may lie: what consumers can take, and where they expect them."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.verify.domains import PIXELS, Domain, decides_sizes, input_domains

HEAD = '<ir_version: 10, opset_import: ["" : 17]>'


def parsed(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEAD + text))


def domain(body: str, constants: str = "") -> Domain:
    return input_domains(parsed(f"g (float[2,3] x) => (float[2,3] y) {constants} {{ {body} }}"))[
        "x"
    ]


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        ("y = Sqrt(x)", 0, np.inf),
        ("y = Log(x)", 0, np.inf),
        ("y = Acos(x)", -1, 1),
        ("y = Acosh(x)", 1, np.inf),
        ("o = Sub(one, x) y = Log(o)", -np.inf, 1),
        ("o = Mul(x, two) y = Asin(o)", -0.5, 0.5),
        ("y = Pow(x, half)", 0, np.inf),
        ("y = Pow(x, two)", -np.inf, np.inf),
        ("m = Max(x, one) y = Log(m)", -np.inf, np.inf),
        ("y = Relu(x)", -np.inf, np.inf),
    ],
)
def test_what_an_operator_can_take(body: str, low: float, high: float) -> None:
    found = domain(body, "<float one = {1}, float two = {2}, float half = {0.5}>")
    assert (found.low, found.high) == (low, high)
    assert found.limited == (low > -np.inf or high < np.inf)


@pytest.mark.parametrize(
    ("body", "usual"),
    [
        ("y = Div(x, c)", PIXELS),
        ("y = Mul(x, d)", PIXELS),
        ("y = Sub(x, m)", PIXELS),
        ("y = Mul(x, one)", None),
        ("y = Sub(x, one)", None),
        ("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", (0.0, 127.5)),
        ("y = Clip(x, one, nine)", (-1.0, 11.0)),
        ("y = Clip(x, one)", None),
    ],
)
def test_where_an_operator_expects_numbers(body: str, usual: tuple[float, float] | None) -> None:
    constants = (
        "<float c = {255}, float d = {0.004}, float[3] m = {123, 117, 104}, float one = {1}, float nine = {9},"
        " float s = {0.5}, uint8 z = {0}>"
    )
    assert domain(body, constants).usual == usual


def test_numbers_are_placed_within_the_domain() -> None:
    normal = np.linspace(-4, 4, 101)
    both = Domain(2, 6).place(normal, 30.0)
    assert both.min() == 2
    assert both.max() == 6
    assert Domain(low=1).place(normal, 1.0).min() == 1
    assert Domain(high=1).place(normal, 1.0).max() == 1
    np.testing.assert_array_equal(Domain().place(normal, 2.0), 2 * normal)


def test_what_becomes_a_size_is_known() -> None:
    text = """g (int64 n, int64 k, float[4] x) => (float[m] y, int64 z)
              { a = Abs(n) r = Unsqueeze(a, zero) y = Expand(x, r) z = Neg(k) }"""
    model = parsed(text.replace("int64 z)", "int64 z) <int64[1] zero = {0}>"))
    assert decides_sizes(model) == {"n"}
