"""Pairs of quantisation, and limits before it."""

from __future__ import annotations

import numpy as np
import pytest
from graphopt_passes import quantized

from tests.rewriting import check

PAIR = "g (uint8[2,4] x) => (uint8[2,4] y) <float s = {0.1}, uint8 z = {7}, float r = {0.2}, uint8 o = {0}>"
WIDE = {"x": np.linspace(-40, 60, 8, dtype=np.float32).reshape(2, 4)}


def test_requantization_goes() -> None:
    every = {"x": np.arange(8, dtype=np.uint8).reshape(2, 4) * 36}
    check(
        quantized.RULES,
        f"{PAIR} {{ d = DequantizeLinear(x, s, z) q = QuantizeLinear(d, s, z) y = Identity(q) }}",
        f"{PAIR} {{ y = Identity(x) }}",
        feeds=[every],
    )


def test_requantization_by_channel_goes() -> None:
    io = "g (int8[3,4] x) => (int8[3,4] y) <float[4] s, int8[4] z = {0,1,-2,3}>"
    check(
        quantized.RULES,
        f"{io} {{ d = DequantizeLinear<axis=1>(x, s, z) q = QuantizeLinear<axis=1>(d, s, z) y = Identity(q) }}",
        f"{io} {{ y = Identity(x) }}",
    )


@pytest.mark.parametrize(
    "body",
    [
        "d = DequantizeLinear(x, s, z) y = QuantizeLinear(d, r, z)",
        "d = DequantizeLinear(x, s, z) y = QuantizeLinear(d, s, o)",
        "d = DequantizeLinear(x, s, z) e = Neg(d) y = QuantizeLinear(e, s, z)",
        "d = DequantizeLinear(x, m, z) y = QuantizeLinear(d, m, z)",
    ],
)
def test_other_pairs_stay(body: str) -> None:
    check(quantized.RULES, f"{PAIR[:-1]}, float m = {{-1.0}}> {{ {body} }}")


def test_pairs_of_other_types_stay() -> None:
    check(
        quantized.RULES,
        "g (uint8[2,4] x) => (int8[2,4] y) <float s = {0.1}, uint8 z = {0}, int8 o = {0}>"
        " { d = DequantizeLinear(x, s, z) y = QuantizeLinear(d, s, o) }",
    )


HELD = "float s = {0.5}, uint8 z = {0}, uint8 o = {9}, float l = {-1}, float h = {200}"
Q = f"g (float[2,4] x) => (uint8[2,4] y) <{HELD}>"


@pytest.mark.parametrize("limit", ["Relu(x)", "Clip(x, l)", "Clip(x, l, h)", "Clip(x, , h)"])
def test_a_limit_that_the_quantisation_has_goes(limit: str) -> None:
    check(
        quantized.RULES,
        f"{Q} {{ r = {limit} y = QuantizeLinear(r, s, z) }}",
        f"{Q} {{ y = QuantizeLinear(x, s, z) }}",
        feeds=[WIDE],
    )


def test_a_limit_by_attributes_goes() -> None:
    check(
        quantized.RULES,
        f"{Q} {{ r = Clip<min=0.0, max=127.5>(x) y = QuantizeLinear(r, s, z) }}",
        f"{Q} {{ y = QuantizeLinear(x, s, z) }}",
        feeds=[WIDE],
        opset=10,
    )


@pytest.mark.parametrize(
    ("limit", "zero", "missed"),
    [
        ("Relu(x)", "o", "tighter"),
        ("Clip(x, l, h)", "o", "tighter"),
        ("Clip(x, z1)", "z", ""),
        ("Clip(x, l, six)", "z", "tighter"),
    ],
)
def test_a_tighter_limit_stays(limit: str, zero: str, missed: str) -> None:
    text = f"{Q[:-1]}, float six = {{6}}> {{ r = {limit} y = QuantizeLinear(r, s, {zero}) }}"
    check(
        quantized.RULES,
        text.replace("(float[2,4] x)", "(float[2,4] x, float z1)"),
        missed=missed,
    )
