"""Bias, scale, transposition and batch normalisation folded into matrix products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import gemm

from tests.rewriting import apply, check, parse

MS = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>\n'
X = "g (float[M,4] x) => (float[M,6] y) "


def _check(before: str, after: str | None = None, **options: object) -> None:
    check(gemm.RULES, before, after, tolerance=1e-5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "c", ["float[6] c", "float[1,6] c", "float[1,1] c", "float[1] c", "float c"]
)
@pytest.mark.parametrize("order", ["p, c", "c, p"])
def test_matmul_and_add(c: str, order: str) -> None:
    _check(
        f"{X} <float[4,6] w, {c}> {{ p = MatMul(x, w) y = Add({order}) }}",
        f"{X} <float[4,6] w, {c}> {{ y = Gemm(x, w, c) }}",
    )


def test_matmul_of_two_inputs_and_add() -> None:
    _check(
        "g (float[M,K] x, float[K,N] w, float[M,1] c) => (float[M,N] y) { p = MatMul(x, w) y = Add(p, c) }",
        "g (float[M,K] x, float[K,N] w, float[M,1] c) => (float[M,N] y) { y = Gemm(x, w, c) }",
    )


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_product_and_add(sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    feed = {"x": np.ones((m, k), np.float32), "w": np.ones((k, n), np.float32)}
    _check(
        "g (float[M,K] x, float[K,N] w, float[M,1] c) => (float[M,N] y) { p = MatMul(x, w) y = Add(p, c) }",
        "g (float[M,K] x, float[K,N] w, float[M,1] c) => (float[M,N] y) { y = Gemm(x, w, c) }",
        feeds=[{**feed, "c": np.ones((m, 1), np.float32)}],
    )


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("g (float[M,4] x) => (float[2,M,6] y) <float[4,6] w, float[2,1,6] c>", "broaden"),
        ("g (float[1,4] x) => (float[3,6] y) <float[4,6] w, float[3,6] c>", "broaden"),
        ("g (float[M,4] x, float[P,6] c) => (float[Q,6] y) <float[4,6] w>", "broaden"),
        ("g (float[M,4] x) => (float[M,3] y) <float[4,1] w, float[3] c>", "broaden"),
        ("g (float[B,M,4] x) => (float[B,M,6] y) <float[4,6] w, float[6] c>", ""),
        ("g (float[4] x) => (float[6] y) <float[4,6] w, float[6] c>", ""),
        ("g (int32[M,4] x) => (int32[M,6] y) <int32[4,6] w, int32[6] c>", ""),
    ],
)
def test_matmul_and_add_that_gemm_cannot_do_stays(graph: str, reason: str) -> None:
    _check(f"{graph} {{ p = MatMul(x, w) y = Add(p, c) }}", missed=reason)


def test_matmul_of_quantised_weight_stays() -> None:
    _check(
        f"{X} <int8[4,6] q, float s = {{0.5}}, int8 z = {{0}}, float[6] c>"
        "{ w = DequantizeLinear(q, s, z) p = MatMul(x, w) y = Add(p, c) }",
        missed="quantised",
    )


def test_half_gemm_is_for_targets_that_run_it() -> None:
    text = "g (float16[M,4] x) => (float16[M,6] y) <float16[4,6] w, float16[6] c> { p = MatMul(x, w) y = Add(p, c) }"
    _check(text, feeds=[])
    for target, count in (("cpu", 2), ("cuda", 1)):
        model = ir.from_proto(parse(text))
        apply(gemm.RULES, model, target=target)
        assert len(model.graph) == count


def test_addend_of_gemm() -> None:
    _check(
        f"{X} <float[4,6] w, float[6] c> {{ p = Gemm<alpha=2.0, beta=3.0>(x, w) y = Add(p, c) }}",
        f"{X} <float[4,6] w, float[6] c> {{ y = Gemm<alpha=2.0>(x, w, c) }}",
    )
    _check(
        f"{X} <float[4,6] w, float[6] b, float[1,1] c> {{ p = Gemm<beta=3.0>(x, w, b) y = Add(p, c) }}",
        f"{X} <float[4,6] w, float[1,6] c> {{ y = Gemm(x, w, c) }}",
    )


def test_computed_second_addend_stays() -> None:
    _check(
        "g (float[M,4] x, float[6] c, float[6] b) => (float[M,6] y) <float[4,6] w>"
        "{ p = Gemm(x, w, b) y = Add(p, c) }",
        missed="not a constant",
    )


def test_addend_of_integer_gemm_stays() -> None:
    text = "g (int32[M,4] x) => (int32[M,6] y) <int32[4,6] w, int32[6] c> { p = Gemm(x, w) y = Add(p, c) }"
    _check(text, missed="INT32", feeds=[])


@pytest.mark.parametrize("flag", [0, 1])
def test_transpose_before_gemm(flag: int) -> None:
    shape = "6,4" if flag == 0 else "4,6"
    _check(
        f"{X} <float[{shape}] w> {{ t = Transpose(w) y = Gemm<transB={flag}>(x, t) }}",
        f"{X} <float[{shape}] w> {{ y = Gemm<transB={1 - flag}>(x, w) }}",
    )
    _check(
        "g (float[4,M] x) => (float[M,6] y) <float[4,6] w> { t = Transpose<perm=[1,0]>(x) y = Gemm(t, w) }",
        "g (float[4,M] x) => (float[M,6] y) <float[4,6] w> { y = Gemm<transA=1>(x, w) }",
    )


def test_identity_transpose_before_gemm_stays() -> None:
    _check(
        "g (float[4,4] x) => (float[4,4] y, float[4,4] z) <float[4,4] w>"
        "{ t = Transpose<perm=[0,1]>(x) z = Gemm(t, w) s = Transpose<perm=[0,1]>(x) y = Gemm(w, s) }",
    )


def test_transpose_behind_gemm() -> None:
    head = "g (float[4,M] x, float[6,4] z) => (float[6,M] y)"
    _check(
        f"{head} {{ p = Gemm<transA=1, transB=1, alpha=3.0>(x, z) y = Transpose(p) }}",
        f"{head} {{ y = Gemm<alpha=3.0, transA=0, transB=0>(z, x) }}",
    )


@pytest.mark.parametrize(
    ("inputs", "held", "body"),
    [
        (
            "float[M,4] x",
            "<float[4,6] w>",
            "p = Gemm(x, w) y = Transpose(p)",
        ),  # a weight is packed on the right
        ("float[M,4] x, float[4,6] w, float[6] c", "", "p = Gemm(x, w, c) y = Transpose(p)"),
    ],
)
def test_transpose_behind_other_gemm_stays(inputs: str, held: str, body: str) -> None:
    _check(f"g ({inputs}) => (float[6,M] y) {held} {{ {body} }}")


def test_transpose_before_matmul() -> None:
    _check(
        f"{X} <float[6,4] w> {{ t = Transpose(w) y = MatMul(x, t) }}",
        f"{X} <float[6,4] w> {{ y = Gemm<transB=1>(x, w) }}",
    )
    _check(
        "g (float[4,M] x) => (float[M,6] y) <float[4,6] w> { t = Transpose(x) y = MatMul(t, w) }",
        "g (float[4,M] x) => (float[M,6] y) <float[4,6] w> { y = Gemm<transA=1>(x, w) }",
    )


def test_transpose_before_matmul_of_higher_rank_stays() -> None:
    _check(
        "g (float[B,M,4] x) => (float[B,M,6] y) <float[6,4] w> { t = Transpose(w) y = MatMul(x, t) }"
    )


def test_transposed_tied_weight() -> None:
    """The embedding that is also the output layer: its transposed copy would double the file."""
    text = (
        "g (int64[B,S] i) => (float[B,S,64] y) <float[64,32] w>"
        "{ x = Gather(w, i) t = Transpose(w) y = MatMul(x, t) }"
    )
    _check(
        text,
        MS + "g (int64[B,S] i) => (float[B,S,64] y) <float[64,32] w>"
        "{ x = Gather(w, i) y = com.microsoft.FusedMatMul<transB=1>(x, w) }",
    )
    _check(text, target="portable", missed="transposed")


def test_scale_of_gemm() -> None:
    _check(
        f"{X} <float[4,6] w, float[6] b, float s = {{0.5}}> {{ p = Gemm<alpha=3.0>(x, w, b) y = Mul(p, s) }}",
        f"{X} <float[4,6] w, float[6] b> {{ y = Gemm<alpha=1.5, beta=0.5>(x, w, b) }}",
    )
    _check(
        f"{X} <float[6,4] w, float[6] b, float[1,6] s> {{ p = Gemm<transB=1>(x, w, b) y = Div(p, s) }}",
        f"{X} <float[6,4] w, float[6] b> {{ y = Gemm<transB=1>(x, w, b) }}",
    )
    _check(
        f"{X} <float[4,6] w, float[6] s> {{ p = Gemm(x, w) y = Mul(p, s) }}",
        f"{X} <float[4,6] w> {{ y = Gemm(x, w) }}",
    )


@pytest.mark.parametrize("s", ["float[3,1] s", "float[1,1,6] s"])
def test_scale_of_gemm_that_is_not_per_column_stays(s: str) -> None:
    out = "1,3,6" if "1,1" in s else "3,6"
    _check(
        f"g (float[3,4] x) => (float[{out}] y) <float[4,6] w, {s}> {{ p = Gemm(x, w) y = Mul(p, s) }}",
        missed="per column",
    )


@pytest.mark.parametrize("s", ["float[6] s", "float s", "float[1,1,6] s"])
@pytest.mark.parametrize("op", ["Mul(p, s)", "Mul(s, p)", "Div(p, s)"])
def test_scale_of_matmul(s: str, op: str) -> None:
    shape = "B,M"
    _check(
        f"g (float[{shape},4] x) => (float[{shape},6] y) <float[4,6] w, {s}> {{ p = MatMul(x, w) y = {op} }}",
        f"g (float[{shape},4] x) => (float[{shape},6] y) <float[4,6] w> {{ y = MatMul(x, w) }}",
    )


def test_scale_of_integer_matmul_stays() -> None:
    _check(
        "g (int32[M,4] x) => (int32[M,6] y) <int32[4,6] w, int32 s> { p = MatMul(x, w) y = Mul(p, s) }",
        missed="INT32",
    )


def test_scale_of_tied_weight_stays() -> None:
    _check(
        "g (float[M,64] x, float[M,64] x2) => (float[M,64] y, float[M,64] z) <float[64,64] w, float s>"
        "{ p = MatMul(x, w) y = Mul(p, s) z = MatMul(x2, w) }",
        missed="2 uses",
    )


def test_scale_of_computed_weight_stays() -> None:
    _check(
        "g (float[M,4] x, float[4,6] w) => (float[M,6] y) <float s> { p = MatMul(x, w) y = Mul(p, s) }",
        missed="not a constant",
    )


@pytest.mark.parametrize("op", ["Mul(x, s)", "Div(x, s)"])
def test_scale_before_matmul(op: str) -> None:
    _check(
        f"g (float[B,M,4] x) => (float[B,M,6] y) <float[4,6] w, float[4] s> {{ p = {op} y = MatMul(p, w) }}",
        "g (float[B,M,4] x) => (float[B,M,6] y) <float[4,6] w> { y = MatMul(x, w) }",
    )


def test_scale_before_several_products() -> None:
    g = "g (float[B,M,4] x) => (float[B,M,6] y, float[B,M,5] z) <float[4,6] w, float[4,5] v"
    _check(
        g + ", float[4] s> { p = Mul(x, s) y = MatMul(p, w) z = MatMul(p, v) }",
        g + "> { y = MatMul(x, w) z = MatMul(x, v) }",
    )


def test_scale_before_a_product_and_something_else_stays() -> None:
    _check(
        "g (float[B,M,4] x) => (float[B,M,6] y, float[B,M,4] z) <float[4,6] w, float[4] s>"
        "{ p = Mul(x, s) y = MatMul(p, w) z = Relu(p) }",
        missed="used elsewhere",
    )


def test_scale_before_matmul_that_broadens_stays() -> None:
    _check(
        "g (float[M,1] x) => (float[M,6] y) <float[4,6] w, float[4] s> { p = Mul(x, s) y = MatMul(p, w) }"
    )
    _check(
        "g (float[M,4] x) => (float[2,M,6] y) <float[4,6] w, float[2,1,4] s> { p = Mul(x, s) y = MatMul(p, w) }",
        missed="per column",
    )


BN = "float[6] ga, float[6] be, float[6] me, float[6] va"


@pytest.mark.parametrize("opset", [9, 14, 15])
def test_batchnorm_into_gemm(opset: int) -> None:
    tail = "y = BatchNormalization(p, ga, be, me, va)"
    _check(
        f"{X} <float[6,4] w, float[6] b, {BN}> {{ p = Gemm<transB=1, beta=2.0>(x, w, b) {tail} }}",
        f"{X} <float[6,4] w, float[6] b> {{ y = Gemm<transB=1>(x, w, b) }}",
        opset=opset,
    )
    _check(
        f"{X} <float[4,6] w, {BN}> {{ p = MatMul(x, w) {tail} }}",
        f"{X} <float[4,6] w, float[6] b> {{ y = Gemm(x, w, b) }}",
        opset=opset,
    )


def test_batchnorm_of_rank_3_or_in_training_stays() -> None:
    _check(
        f"g (float[N,6,4] x) => (float[N,6,5] y) <float[4,5] w, {BN}>"
        "{ p = MatMul(x, w) y = BatchNormalization(p, ga, be, me, va) }",
        missed="not the columns",
    )
    _check(
        f"{X} <float[4,6] w, {BN}>"
        "{ p = Gemm(x, w) y, m, v = BatchNormalization<training_mode=1>(p, ga, be, me, va) }",
        missed="training",
        dims=(3, 4),
    )


def test_chain_of_constant_products() -> None:
    _check(
        "g (float[B,M,4] x) => (float[B,M,5] y) <float[4,8] w, float[8,5] v> { p = MatMul(x, w) y = MatMul(p, v) }",
        "g (float[B,M,4] x) => (float[B,M,5] y) <float[4,5] w> { y = MatMul(x, w) }",
    )


def test_low_rank_factors_stay() -> None:
    _check(
        "g (float[M,8] x) => (float[M,8] y) <float[8,2] w, float[2,8] v> { p = MatMul(x, w) y = MatMul(p, v) }",
        missed="larger",
    )


@pytest.mark.parametrize("x", ["B,M,4", "A,B,M,4"])
def test_weight_of_rank_3(x: str) -> None:
    out = x.replace("4", "6")
    _check(
        f"g (float[{x}] x) => (float[{out}] y) <float[1,4,6] w> {{ y = MatMul(x, w) }}",
        f"g (float[{x}] x) => (float[{out}] y) <float[4,6] w> {{ y = MatMul(x, w) }}",
    )


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[M,4] x) => (float[1,M,6] y) <float[1,4,6] w>",
        "g (float[2,M,4] x) => (float[2,M,6] y) <float[2,4,6] w>",
    ],
)
def test_batch_of_weights_stays(graph: str) -> None:
    _check(f"{graph} {{ y = MatMul(x, w) }}")


SHAPES = "int64[2] f = {-1,4}, int64[3] s = {2,-1,6}"


@pytest.mark.parametrize("bias", ["", ", b"])
def test_reshapes_around_a_product(bias: str) -> None:
    more = ", float[6] b" if bias else ""
    _check(
        f"g (float[2,M,4] x) => (float[2,M,6] y) <float[6,4] w, {SHAPES}{more}>"
        f"{{ r = Reshape(x, f) p = Gemm<transB=1>(r, w{bias}) y = Reshape(p, s) }}",
        f"g (float[2,M,4] x) => (float[2,M,6] y) <float[4,6] w{more}>"
        + ("{ p = MatMul(x, w) y = Add(p, b) }" if bias else "{ y = MatMul(x, w) }"),
    )


def test_reshapes_around_matmul() -> None:
    _check(
        f"g (float[2,M,4] x) => (float[2,M,6] y) <float[4,6] w, {SHAPES}>"
        "{ r = Reshape(x, f) p = MatMul(r, w) y = Reshape(p, s) }",
        "g (float[2,M,4] x) => (float[2,M,6] y) <float[4,6] w> { y = MatMul(x, w) }",
    )


@pytest.mark.parametrize(
    ("reshape", "product", "out", "shape"),
    [
        ("{-1,4}", "Gemm(r, w)", "4,3,6", "{4,3,6}"),
        ("{-1,2}", "Gemm(r, w2)", "2,6,12", "{2,6,12}"),
        ("{-1,4}", "Gemm<alpha=2.0>(r, w)", "2,6,6", "{2,6,6}"),
        ("{-1,4}", "Gemm<beta=2.0>(r, w, b)", "2,6,6", "{2,6,6}"),
        ("{12,4}", "Gemm(r, w, bb)", "2,6,6", "{2,6,6}"),
    ],
)
def test_reshapes_that_do_something_stay(reshape: str, product: str, out: str, shape: str) -> None:
    _check(
        f"g (float[2,6,4] x) => (float[{out}] y)"
        f"<float[4,6] w, float[2,6] w2, float[6] b, float[12,6] bb, int64[2] f = {reshape}, int64[3] s = {shape}>"
        f"{{ r = Reshape(x, f) p = {product} y = Reshape(p, s) }}",
    )


def test_zero_addend() -> None:
    _check(
        f"{X} <float[4,6] w, float[1] c = {{0.0}}> {{ y = Gemm(x, w, c) }}",
        f"{X} <float[4,6] w> {{ y = Gemm(x, w) }}",
    )
    _check(
        f"{X} <float[4,6] w, float[1] c> {{ y = Gemm<beta=0.0>(x, w, c) }}",
        f"{X} <float[4,6] w> {{ y = Gemm(x, w) }}",
    )
    _check(f"{X} <float[4,6] w, float[1] c = {{0.0}}> {{ y = Gemm(x, w, c) }}", opset=10)
    _check(f"{X} <float[4,6] w, float[1] c> {{ y = Gemm(x, w, c) }}")


def test_heads_beside_each_other_enter_a_product_of_rows() -> None:
    """[S, B, H, D] as [S B, H D] and back: only the heads need a view."""
    io = "g (float[5,3,2,4] x) => (float[5,3,6] y)"
    held = "float[8,6] w, float[6] b"
    _check(
        f"{io} <int64[2] flat = {{15, 8}}, int64[3] back = {{5, 3, 6}}, {held}> {{"
        " r = Reshape(x, flat) p = Gemm(r, w, b) y = Reshape(p, back) }",
        f"{io} <int64[3] rows = {{0, 0, 8}}, {held}> {{ r = Reshape(x, rows) p = MatMul(r, w) y = Add(p, b) }}",
    )


def test_rows_of_other_axes_stay() -> None:
    _check(
        "g (float[5,3,2,4] x) => (float[3,5,6] y) <int64[2] flat = {15, 8}, int64[3] back = {3, 5, 6},"
        " float[8,6] w, float[6] b> { r = Reshape(x, flat) p = Gemm(r, w, b) y = Reshape(p, back) }"
    )
