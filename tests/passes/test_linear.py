"""Constants that reach a weight through views, transposes and other products."""

from __future__ import annotations

import pytest
from graphopt_passes import linear

from tests.rewriting import check

HEADS = "int64[4] s = {0,0,2,3}"


def _check(before: str, after: str | None = None, **options: object) -> None:
    check(linear.RULES, before, after, tolerance=1e-5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["Mul(t, f)", "Mul(f, t)", "Div(t, f)"])
def test_scale_of_queries(op: str) -> None:
    g = "g (float[B,S,4] x) => (float[B,2,S,3] y) "
    _check(
        g + f"<float[4,6] w, float[6] b, {HEADS}, float f = {{0.3}}>"
        "{ p = MatMul(x, w) q = Add(b, p) r = Reshape(q, s) t = Transpose<perm=[0,2,1,3]>(r)"
        f" y = {op} }}",
        g + f"<float[4,6] w, float[6] b, {HEADS}>"
        "{ p = MatMul(x, w) q = Add(p, b) r = Reshape(q, s) y = Transpose<perm=[0,2,1,3]>(r) }",
    )


def test_scale_of_scores() -> None:
    g = "g (float[B,S,4] x, float[B,2,3,S] k) => (float[B,2,S,S] y) "
    _check(
        g + f"<float[4,6] w, {HEADS}, float[1] f = {{0.3}}>"
        "{ p = MatMul(x, w) r = Reshape(p, s) t = Transpose<perm=[0,2,1,3]>(r) a = MatMul(t, k) y = Mul(a, f) }",
        g + f"<float[4,6] w, {HEADS}>"
        "{ p = MatMul(x, w) r = Reshape(p, s) t = Transpose<perm=[0,2,1,3]>(r) y = MatMul(t, k) }",
    )


def test_scale_of_gemm_through_a_view() -> None:
    g = "g (float[6,4] x) => (float[2,3,6] y) <int64[3] s = {2,3,6}, float[4,6] w, float[6] b"
    _check(
        g + ", float f> { p = Gemm<alpha=2.0>(x, w, b) r = Reshape(p, s) y = Mul(r, f) }",
        g + "> { p = Gemm<alpha=2.0>(x, w, b) y = Reshape(p, s) }",
    )


@pytest.mark.parametrize(
    ("inputs", "consts", "body"),
    [
        ("", "float[3] f", "p = MatMul(x, w) r = Reshape(p, s) y = Mul(r, f)"),
        (
            "",
            "float f, float[2,3] c",
            "p = MatMul(x, w) r = Reshape(p, s) q = Add(r, c) y = Mul(q, f)",
        ),
        ("", "float f", "p = MatMul(x, w) r = Reshape(p, s) q = Relu(r) y = Mul(q, f)"),
        ("", "float f = {0.0}", "p = MatMul(x, w) r = Reshape(p, s) y = Div(r, f)"),
        ("", "float f", "p = MatMul(x, w) r = Reshape(p, s) y = Div(f, r)"),
        (
            ", float[6] b",
            "float f",
            "p = MatMul(x, w) q = Add(p, b) r = Reshape(q, s) y = Mul(r, f)",
        ),
    ],
)
def test_what_does_not_commute_stays(inputs: str, consts: str, body: str) -> None:
    _check(
        f"g (float[B,S,4] x{inputs}) => (float[B,S,2,3] y) <float[4,6] w, {HEADS}, {consts}> {{ {body} }}",
        feeds=[] if "0.0" in consts else None,
    )


def test_path_with_another_use_stays() -> None:
    _check(
        f"g (float[B,S,4] x) => (float[B,S,2,3] y, float[B,S,6] z) <float[4,6] w, {HEADS}, float f>"
        "{ p = MatMul(x, w) r = Reshape(p, s) y = Mul(r, f) z = Relu(p) }"
    )


def test_scale_of_a_tied_weight_stays() -> None:
    _check(
        "g (float[B,64] x) => (float[B,8,8] y, float[B,64] z)"
        "<float[64,64] w, int64[3] s = {0,8,8}, float f>"
        "{ p = MatMul(x, w) r = Reshape(p, s) y = Mul(r, f) z = MatMul(x, w) }",
        missed="2 uses",
    )


def test_computed_addend_of_gemm_stays() -> None:
    _check(
        "g (float[6,4] x, float[6] b) => (float[2,3,6] y) <int64[3] s = {2,3,6}, float[4,6] w, float f>"
        "{ p = Gemm(x, w, b) r = Reshape(p, s) y = Mul(r, f) }",
        missed="computed",
    )


@pytest.mark.parametrize(("a", "b"), [("Mul(q, s)", "Mul(s, k)"), ("Div(q, s)", "Div(k, s)")])
def test_scales_of_both_factors(a: str, b: str) -> None:
    g = "g (float[B,S,4] q, float[B,4,L] k) => (float[B,S,L] y) "
    _check(
        g + f"<float s = {{0.5}}> {{ c = {a} d = {b} y = MatMul(c, d) }}",
        g + "<float s> { c = Mul(q, s) y = MatMul(c, k) }",
    )


@pytest.mark.parametrize(
    ("s", "body"),
    [
        ("float[4,1] s", "c = Mul(q, r) d = Mul(k, s) y = MatMul(c, d)"),
        ("float[1,1,1] s", "c = Mul(q, s) d = Mul(k, r) y = MatMul(c, d)"),
        ("float s", "c = Div(s, q) d = Mul(k, s) y = MatMul(c, d)"),
        ("float s = {0.0}", "c = Mul(q, s) d = Mul(k, s) y = MatMul(c, d)"),
    ],
)
def test_scales_that_do_not_merge_stay(s: str, body: str) -> None:
    out = "1,3,5" if "1,1,1" in s else "3,5"
    _check(f"g (float[3,4] q, float[4,5] k) => (float[{out}] y) <{s}, float r> {{ {body} }}")


def test_scales_of_integers_stay() -> None:
    _check(
        "g (int32[3,4] q, int32[4,5] k) => (int32[3,5] y) <int32 s = {3}>"
        "{ c = Mul(q, s) d = Mul(k, s) y = MatMul(c, d) }"
    )


def test_shift_before_product() -> None:
    g = "g (float[B,S,4] x) => (float[B,S,6] y) <float[4,6] w, float[6] b"
    _check(
        g + ", float[4] t> { q = Add(x, t) p = MatMul(q, w) y = Add(p, b) }",
        g + "> { p = MatMul(x, w) y = Add(p, b) }",
    )


def test_shift_before_gemm() -> None:
    g = "g (float[M,4] x) => (float[M,6] y) "
    _check(
        g + "<float[6,4] w, float[6] b, float[4] t>"
        "{ q = Add(x, t) y = Gemm<transB=1, alpha=2.0, beta=3.0>(q, w, b) }",
        g + "<float[6,4] w, float[6] b> { y = Gemm<transB=1, alpha=2.0>(x, w, b) }",
    )
    _check(
        g + "<float[4,6] w, float t> { q = Add(x, t) y = Gemm(q, w) }",
        g + "<float[4,6] w, float[6] b> { y = Gemm(x, w, b) }",
    )


@pytest.mark.parametrize("op", ["Mul(x, t)", "Div(x, t)"])
@pytest.mark.parametrize(("flag", "shape"), [(0, "4,6"), (1, "6,4")])
def test_scale_before_gemm(op: str, flag: int, shape: str) -> None:
    g = f"g (float[M,4] x) => (float[M,6] y) <float[{shape}] w, float[6] b"
    _check(
        g + f", float[4] t> {{ q = {op} y = Gemm<transB={flag}>(q, w, b) }}",
        g + f"> {{ y = Gemm<transB={flag}>(x, w, b) }}",
    )


def test_shift_before_several_products() -> None:
    g = "g (float[B,S,4] x) => (float[B,S,6] y, float[B,S,2] z) <float[4,6] w, float[6] b, float[4,2] v, float[2] c"
    _check(
        g + ", float[4] t>"
        "{ q = Sub(x, t) p = MatMul(q, w) y = Add(p, b) o = MatMul(q, v) z = Add(o, c) }",
        g + "> { p = MatMul(x, w) y = Add(p, b) o = MatMul(x, v) z = Add(o, c) }",
    )


def test_shift_with_another_use_stays() -> None:
    _check(
        "g (float[B,S,4] x) => (float[B,S,6] y, float[B,S,4] z) <float[4,6] w, float[6] b, float[4] t>"
        "{ q = Add(x, t) p = MatMul(q, w) y = Add(p, b) z = Relu(q) }"
    )


@pytest.mark.parametrize(
    ("x", "t", "tail"),
    [
        ("M,1", "4", "p = MatMul(q, w) y = Add(p, b)"),
        ("3,4", "3,1", "p = MatMul(q, w) y = Add(p, b)"),
        ("3,4", "4", "p = MatMul(q, w) y = Add(p, c)"),
        ("3,4", "4", "p = MatMul(q, v) y = Add(p, b)"),
        ("M,1", "4", "y = Gemm(q, w)"),
        ("3,4", "3,1", "y = Gemm(q, w)"),
        ("3,4", "4", "y = Gemm(q, v)"),
        ("3,4", "4", "y = Gemm(q, w, d)"),
        ("4,3", "3", "y = Gemm<transA=1>(q, w)"),
    ],
)
def test_shift_that_is_not_per_row_stays(x: str, t: str, tail: str) -> None:
    m = "M" if x.startswith("M") else "3"
    _check(
        f"g (float[{x}] x, float[4,6] v, float[6] d) => (float[{m},6] y)"
        f"<float[4,6] w, float[6] b, float[3,1] c, float[{t}] t> {{ q = Add(x, t) {tail} }}"
    )


BN = "float[4] ga, float[4] be, float[4] me, float[4] va"


def test_batchnorm_between_transposes() -> None:
    g = "g (float[B,S,4] x) => (float[B,S,4] y) "
    _check(
        g + f"<{BN}> {{ t = Transpose<perm=[0,2,1]>(x) n = BatchNormalization(t, ga, be, me, va)"
        " y = Transpose<perm=[0,2,1]>(n) }",
        g + "<float[4] s, float[4] t> { m = Mul(x, s) y = Add(m, t) }",
    )
    g = "g (float[4,B,5] x) => (float[4,B,5] y) "
    _check(
        g + f"<{BN}> {{ t = Transpose<perm=[1,0,2]>(x) n = BatchNormalization(t, ga, be, me, va)"
        " y = Transpose<perm=[1,0,2]>(n) }",
        g + "<float[4,1,1] s, float[4,1,1] t> { m = Mul(x, s) y = Add(m, t) }",
    )


def test_transposes_that_do_not_cancel_stay() -> None:
    _check(
        f"g (float[5,6,4] x) => (float[6,4,5] y) <{BN}>"
        "{ t = Transpose<perm=[0,2,1]>(x) n = BatchNormalization(t, ga, be, me, va)"
        " y = Transpose<perm=[2,1,0]>(n) }"
    )


def test_batchnorm_in_training_between_transposes_stays() -> None:
    _check(
        f"g (float[B,S,4] x) => (float[B,S,4] y) <{BN}>"
        "{ t = Transpose<perm=[0,2,1]>(x) n, m, v = BatchNormalization<training_mode=1>(t, ga, be, me, va)"
        " y = Transpose<perm=[0,2,1]>(n) }",
        missed="training",
        dims=(3, 4),
    )


@pytest.mark.parametrize("scale", ["float[6] f", "float f", "float[1,1,6] f"])
@pytest.mark.parametrize("op", ["Mul(q, f)", "Mul(f, q)", "Div(q, f)"])
def test_scale_after_the_bias(scale: str, op: str) -> None:
    g = "g (float[B,S,4] x) => (float[B,S,6] y) "
    _check(
        g + f"<float[4,6] w, float[6] b, {scale}> {{ p = MatMul(x, w) q = Add(b, p) y = {op} }}",
        g + "<float[4,6] w, float[6] b> { p = MatMul(x, w) y = Add(p, b) }",
    )


@pytest.mark.parametrize(
    ("body", "missed"),
    [
        ("p = MatMul(x, w) q = Add(p, b) y = Mul(q, rows)", "one number per column"),
        (
            "p = MatMul(x, w) q = Add(p, b) y0 = Mul(q, f) z = MatMul(x, w) y = Sub(y0, z)",
            "store it twice",
        ),
        ("p = MatMul(x, w) q = Add(p, x0) y = Mul(q, f)", ""),
        ("p = MatMul(x, w) q = Add(p, b) y0 = Mul(q, f) y = Sub(y0, q)", "other uses"),
    ],
)
def test_scale_after_the_bias_that_stays(body: str, missed: str) -> None:
    g = "g (float[B,3,40] x, float[B,3,60] x0) => (float[B,3,60] y) "
    _check(
        g + f"<float[40,60] w, float[60] b, float[60] f, float[3,1] rows> {{ {body} }}",
        missed=missed,
    )


STATISTICS = "float[6] ga, float[6] be, float[6] me, float[6] va"


@pytest.mark.parametrize("bias", ["p0 = MatMul(x, w) p = Add(p0, b)", "p = MatMul(x, w)"])
def test_batchnorm_of_transposed_columns(bias: str) -> None:
    g = "g (float[B,S,4] x) => (float[B,6,S] y) "
    fused = "q = Mul(p, s) r = Add(q, h)"
    after = bias if "Add" not in bias else "p0 = MatMul(x, w) p = Add(p0, b)"
    both = (
        f"{after} {fused}"
        if "Add" not in bias
        else "p0 = MatMul(x, w) p = Add(p0, b) r = Add(p, h)"
    )
    _check(
        g + f"<float[4,6] w, float[6] b, {STATISTICS}> {{ {bias} t = Transpose<perm=[0,2,1]>(p)"
        " y = BatchNormalization(t, ga, be, me, va) }",
        g + f"<float[4,6] w, float[6] b, float[6] s, float[6] h> {{ {both}"
        " y = Transpose<perm=[0,2,1]>(r) }",
    )


def test_batchnorm_of_viewed_columns() -> None:
    _check(
        f"g (float[2,3,4] x) => (float[6,6] y) <float[4,6] w, {STATISTICS}, int64[2] s = {{6,6}}> {{ p = MatMul(x, w)"
        " t = Reshape(p, s) y = BatchNormalization(t, ga, be, me, va) }",
        "g (float[2,3,4] x) => (float[6,6] y) <float[4,6] w, float[6] f, float[6] h, int64[2] s = {6,6}> {"
        " p = MatMul(x, w) q = Mul(p, f) r = Add(q, h) y = Reshape(r, s) }",
    )


@pytest.mark.parametrize(
    ("size", "views", "out"),
    [
        (2, "{1} = Flatten<axis=2>({0})", "6,6"),
        (1, "{1} = Squeeze({0}, first)", "3,6"),
        (2, "u = Unsqueeze({0}, first) {1} = Flatten<axis=3>(u)", "6,6"),
    ],
)
def test_batchnorm_of_columns_viewed_otherwise(size: int, views: str, out: str) -> None:
    """LeViT flattens what a layer makes of each token."""
    head = f"g (float[{size},3,4] x) => (float[{out}] y) <float[4,6] w, int64[1] first = {{0}}"
    _check(
        f"{head}, {STATISTICS}> {{ p = MatMul(x, w) {views.format('p', 't')}"
        " y = BatchNormalization(t, ga, be, me, va) }",
        f"{head}, float[6] f, float[6] h> {{ p = MatMul(x, w) q = Mul(p, f) r = Add(q, h)"
        f" {views.format('r', 'y')} }}",
    )


@pytest.mark.parametrize(
    ("body", "out"),
    [
        (
            "p = MatMul(x, w) t = Transpose<perm=[2,1,0]>(p) y = BatchNormalization(t, ga, be, me, va)",
            "6,6,2",
        ),
        ("p = MatMul(x, w) t = Reshape(p, s) y = BatchNormalization(t, ga, be, me, va)", "2,6,6"),
    ],
)
def test_batchnorm_of_rows_stays(body: str, out: str) -> None:
    _check(
        f"g (float[2,6,4] x) => (float[{out}] y) <float[4,6] w, {STATISTICS}, int64[3] s = {{2,6,6}}> {{ {body} }}"
    )


def test_batchnorm_in_training_mode_stays() -> None:
    _check(
        f"g (float[2,3,4] x) => (float[2,6,3] y) <float[4,6] w, {STATISTICS}> {{ p = MatMul(x, w)"
        " t = Transpose<perm=[0,2,1]>(p) y, rm, rv = BatchNormalization<training_mode=1>(t, ga, be, me, va) }",
        missed="training",
    )


def test_batchnorm_of_columns_viewed_and_transposed() -> None:
    """At opset 8, as ONNX Runtime's own test has it."""
    g = "g (float[2,4] x) => (float[2,6,1,1] y) "
    view = "int64[4] s = {2,1,1,6}"
    check(
        linear.RULES,
        g + f"<float[4,6] w, {STATISTICS}, {view}> {{ p = MatMul(x, w) r = Reshape(p, s)"
        " t = Transpose<perm=[0,3,1,2]>(r) y = BatchNormalization(t, ga, be, me, va) }",
        g
        + f"<float[4,6] w, float[6] f, float[6] h, {view}> {{ p = MatMul(x, w) q = Mul(p, f) o = Add(q, h)"
        " r = Reshape(o, s) y = Transpose<perm=[0,3,1,2]>(r) }",
        opset=9,
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(x, w) r = Reshape(p, s) t = Transpose<perm=[0,3,1,2]>(r) n = BatchNormalization(t, ga, be, me, va)"
        " y = Add(n, t)",
        "p0 = MatMul(x, w) p = Relu(p0) r = Reshape(p, s) t = Transpose<perm=[0,3,1,2]>(r)"
        " y = BatchNormalization(t, ga, be, me, va)",
        "p = MatMul(x, w0) r = Reshape(p, s) t = Transpose<perm=[0,3,1,2]>(r)"
        " y = BatchNormalization(t, ga, be, me, va)",
    ],
)
def test_batchnorm_of_other_views_stays(body: str) -> None:
    _check(
        f"g (float[2,4] x, float[4,6] w0) => (float[2,6,1,1] y) <float[4,6] w, {STATISTICS}, int64[4] s = {{2,1,1,6}}>"
        f" {{ {body} }}"
    )
