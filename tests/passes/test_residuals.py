"""Sums in the operator that they feed, for the target whose kernels gain by it."""

from __future__ import annotations

import pytest
from graphopt_passes import residuals

from tests.rewriting import check

MS = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
G = "g (float[B,S,4] x, float[B,S,4] z) => (float[B,S,4] y) <float[4] s, float[4] b>"


def _check(before: str, after: str | None = None, opset: int = 23, **options: object) -> None:
    known = {"target": "cuda", **options}
    header = MS.format(opset=opset) if "com.microsoft" in before else ""
    result = None if after is None else MS.format(opset=opset) + after
    check(residuals.RULES, header + before, result, opset=opset, tolerance=1e-5, **known)  # type: ignore[arg-type]


def test_skip_layer_norm() -> None:
    _check(
        f"{G} {{ a = Add(x, z) y = LayerNormalization(a, s, b) }}",
        f"{G} {{ y = com.microsoft.SkipLayerNormalization<epsilon=0.00001>(x, z, s, b) }}",
    )


def test_skip_rms_norm() -> None:
    _check(
        f"{G} {{ a = Add(x, z) y = RMSNormalization(a, s) }}",
        f"{G} {{ y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.00001>(x, z, s) }}",
    )


@pytest.mark.parametrize("target", ["cpu", "tensorrt", "portable"])
def test_other_targets(target: str) -> None:
    _check(f"{G} {{ a = Add(x, z) y = LayerNormalization(a, s, b) }}", target=target)


def test_sum_that_goes_on_stays() -> None:
    _check(
        f"{G} {{ a = Add(x, z) n = LayerNormalization(a, s, b) y = Add(n, a) }}",
        missed="other uses",
    )


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[2,3,4] x, float[3,4] z) => (float[2,3,4] y) <float[4] s, float[4] b>"
        " { a = Add(x, z) y = LayerNormalization(a, s, b) }",
        "g (float[2,3,4] x, float[2,3,4] z) => (float[2,3,4] y) <float[3,4] s, float[3,4] b>"
        " { a = Add(x, z) y = LayerNormalization<axis=1>(a, s, b) }",
    ],
)
def test_other_shapes_stay(graph: str) -> None:
    _check(graph, missed="not both")


B = "g (float[B,S,4] x) => (float[B,S,4] y) <float[4] b>"


@pytest.mark.parametrize("operands", ["x, b", "b, x"])
@pytest.mark.parametrize("gelu", ["Gelu", "com.microsoft.Gelu"])
def test_bias_gelu(operands: str, gelu: str) -> None:
    _check(
        f"{B} {{ a = Add({operands}) y = {gelu}(a) }}",
        f"{B} {{ y = com.microsoft.BiasGelu(x, b) }}",
    )


def test_other_gelus_stay() -> None:
    _check(f'{B} {{ a = Add(x, b) y = Gelu<approximate="tanh">(a) }}')
    _check(f"{B} {{ a = Add(x, x) y = Gelu(a) }}")
    _check(f"{B} {{ a = Add(x, b) y = Gelu(a) }}", target="cpu")
