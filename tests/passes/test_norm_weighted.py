"""Normalisations whose scale comes before the root, as an expression read from left to right puts it."""

from __future__ import annotations

import pytest
from graphopt_passes import norm

from tests.rewriting import check


@pytest.mark.parametrize(
    "tail",
    ["n = Mul(d, w) y = Div(n, s)", "n = Mul(w, d) i = Reciprocal(s) y = Mul(n, i)"],
    ids=["quotient", "product"],
)
def test_scale_of_the_centred_value(tail: str) -> None:
    """As `w * (x - mean) / sqrt(var + eps) + b` is read from left to right."""
    check(
        norm.RULES,
        "g (float[B,S,8] x) => (float[B,S,8] y) <float[8] w, float e = {1e-5}, float two = {2.0}>"
        "{ m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Pow(d, two) v = ReduceMean<axes=[-1]>(q)"
        f" l = Add(v, e) s = Sqrt(l) {tail} }}",
        "g (float[B,S,8] x) => (float[B,S,8] y) <float[8] w>"
        "{ y = LayerNormalization<axis=-1, epsilon=0.00001>(x, w) }",
        opset=17,
    )


def test_scale_before_the_product_with_the_inverse_root() -> None:
    check(
        norm.RULES,
        "g (float[B,S,8] x) => (float[B,S,8] y) <float[8] w, float e = {1e-5}, int64[1] last = {-1}>"
        "{ q = Mul(x, x) v = ReduceMean(q, last) l = Add(v, e) s = Sqrt(l) i = Reciprocal(s)"
        " n = Mul(x, w) y = Mul(n, i) }",
        "g (float[B,S,8] x) => (float[B,S,8] y) <float[8] w>"
        "{ y = RMSNormalization<axis=-1, epsilon=0.00001>(x, w) }",
        opset=23,
    )


def test_scaled_centred_value_with_another_use_stays() -> None:
    check(
        norm.RULES,
        "g (float[B,S,8] x) => (float[B,S,8] y, float[B,S,8] n) <float[8] w, float e = {1e-5}>"
        "{ m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q)"
        " l = Add(v, e) s = Sqrt(l) n = Mul(d, w) y = Div(n, s) }",
        opset=17,
    )


DISTRIBUTED = (
    "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q)"
    " l = Add(v, e) s = Sqrt(l) r = Reciprocal(s) i = Mul(r, w) a = Mul(x, i) c = Mul(m, i)"
    " o = Sub(b, c) y = Add(a, o)"
)


@pytest.mark.parametrize("shape", ["8", "1,1,8"])
def test_scale_and_shift_of_the_value_and_of_its_mean(shape: str) -> None:
    """As Keras' LayerNormalization comes out of tf2onnx."""
    check(
        norm.RULES,
        f"g (float[B,S,8] x) => (float[B,S,8] y) <float[{shape}] w, float[{shape}] b, float e = {{1e-5}}>"
        f"{{ {DISTRIBUTED} }}",
        "g (float[B,S,8] x) => (float[B,S,8] y) <float[8] w, float[8] b>"
        "{ y = LayerNormalization<axis=-1, epsilon=0.00001>(x, w, b) }",
        opset=17,
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (("c = Mul(m, i)", "c = Mul(m, r)"), ""),  # the mean is scaled otherwise
        (("d = Sub(x, m)", "k = ReduceMean<axes=[1]>(x) d = Sub(x, k)"), ""),
        (("v = ReduceMean<axes=[-1]>(q)", "v = ReduceMean<axes=[1]>(q)"), ""),
    ],
)
def test_other_sums_of_scaled_values_stay(change: tuple[str, str], missed: str) -> None:
    check(
        norm.RULES,
        "g (float[B,8,8] x) => (float[B,8,8] y) <float[8] w, float[8] b, float e = {1e-5}>"
        f"{{ {DISTRIBUTED.replace(*change)} }}",
        missed=missed,
        opset=17,
    )
