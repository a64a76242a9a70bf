"""Limits before quantisation."""

from __future__ import annotations

import numpy as np
import pytest
from graphopt_passes import quantized

from tests.rewriting import check

WIDE = {"x": np.linspace(-40, 60, 8, dtype=np.float32).reshape(2, 4)}


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
