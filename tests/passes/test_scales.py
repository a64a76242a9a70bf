"""Scales of normalisations that are computed to be one number."""

from __future__ import annotations

import pytest
from graphopt_passes import scales

from tests.rewriting import check

RMS = (
    "g (float[B,S,4] x) => (float[B,S,4] y) {{ s = Shape<start={start}>(x)"
    " c = ConstantOfShape<value = float[1] {{1.5}}>(s) y = RMSNormalization<axis={axis}, epsilon=1e-6>(x, c) }}"
)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_scale_of_one_number_becomes_constant(start: int) -> None:
    """As torch.export writes RMSNorm without weights: of the shape of x, or of its last axis."""
    check(
        scales.RULES,
        RMS.format(start=start, axis=-1),
        "g (float[B,S,4] x) => (float[B,S,4] y) <float[4] c = {1.5, 1.5, 1.5, 1.5}>"
        " { y = RMSNormalization<axis=-1, epsilon=1e-6>(x, c) }",
        opset=23,
    )


def test_layer_norm_keeps_its_bias() -> None:
    head = "g (float[B,S,4] x) => (float[B,S,4] y)"
    check(
        scales.RULES,
        f"{head} <float[4] b> {{ s = Shape<start=2>(x) c = ConstantOfShape<value = float[1] {{1.0}}>(s)"
        " y = LayerNormalization(x, c, b) }",
        f"{head} <float[4] b, float[4] c = {{1.0, 1.0, 1.0, 1.0}}> {{ y = LayerNormalization(x, c, b) }}",
        opset=17,
    )


@pytest.mark.parametrize(
    ("before", "missed"),
    [
        (RMS.format(start=1, axis=1), "unknown"),  # S numbers, of which nobody knows how many
        (RMS.format(start=0, axis=-1).replace("Shape<start=0>(x)", "Identity(given)").replace(
            "(float[B,S,4] x)", "(float[B,S,4] x, int64[1] given)"), ""),
        (RMS.format(start=0, axis=-1).replace("(x, c)", "(x, r)").replace("y = RMS", "r = Neg(c) y = RMS"), ""),
    ],
)  # fmt: skip
def test_other_scales_stay(before: str, missed: str) -> None:
    check(scales.RULES, before, missed=missed, opset=23, feeds=())
