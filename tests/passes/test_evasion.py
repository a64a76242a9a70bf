"""Residual additions that the runtime must not fuse."""

from __future__ import annotations

import pytest
from graphopt_passes import algebra, evasion

from tests.rewriting import check

G = "g (float[B,S,4] x, float[B,S,4] z) => (float[B,S,4] y) <float[4] s, float[4] b>"


def test_addition_before_layer_norm_becomes_a_sum() -> None:
    check(
        evasion.RULES,
        f"{G} {{ a = Add(x, z) y = LayerNormalization(a, s, b) }}",
        f"{G} {{ a = Sum(x, z) y = LayerNormalization(a, s, b) }}",
    )


def test_residual_stream_goes_on() -> None:
    check(
        evasion.RULES,
        f"{G} {{ a = Add(x, z) n = LayerNormalization(a, s, b) y = Add(n, a) }}",
        f"{G} {{ a = Sum(x, z) n = LayerNormalization(a, s, b) y = Add(n, a) }}",
    )


@pytest.mark.parametrize(
    "body",
    ["a = Add(x, z) y = RMSNormalization(a, s)", "a = Add(s, b) y = LayerNormalization(x, a)"],
)
def test_additions_elsewhere_stay(body: str) -> None:
    check(evasion.RULES, f"{G} {{ {body} }}", opset=23)


@pytest.mark.parametrize("target", ["tensorrt", "cuda", "portable"])
def test_other_targets_keep_add(target: str) -> None:
    before = f"{G} {{ a = Add(x, z) y = LayerNormalization(a, s, b) }}"
    check(evasion.RULES, before, target=target)
    summed = before.replace("Add", "Sum")
    check(algebra.RULES, summed, before, target=target)


def test_sum_is_not_spelled_back() -> None:
    check(algebra.RULES, f"{G} {{ a = Sum(x, z) y = LayerNormalization(a, s, b) }}")


PRELU = "g (float[N,64,32] x) => (float[N,64,32] y)"


def test_prelu_is_spelled_out_where_its_kernel_is_slow() -> None:
    check(
        evasion.RULES,
        f"{PRELU} <float[64,1] a> {{ y = PRelu(x, a) }}",
        f"{PRELU} <float[64,1] a, float z = {{0.0}}> {{ m = Min(x, z) p = Relu(x) t = Mul(m, a) y = Add(p, t) }}",
    )
    check(evasion.RULES, f"{PRELU} <float[64,1] a> {{ y = PRelu(x, a) }}", target="cuda")


def test_small_or_computed_prelu_stays() -> None:
    small = PRELU.replace("[N,64,32]", "[2,64,32]")
    check(evasion.RULES, f"{small} <float[64,1] a> {{ y = PRelu(x, a) }}")
    check(
        evasion.RULES,
        "g (float[N,64,32] x, float[64,1] a) => (float[N,64,32] y) { y = PRelu(x, a) }",
    )
