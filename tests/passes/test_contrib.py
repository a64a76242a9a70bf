"""Operators of com.microsoft as standard ones: the same numbers, and nothing of that domain left."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import contrib

from graphopt.numerics import Numerics
from graphopt.rewrite import RemarkKind
from tests.rewriting import apply, compare, make_feeds, parse, run

HEAD = '<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
IMAGE = "g (float[1,2,6,6] x) => (float[1,3,4,4] y) <float[3,2,3,3] w, float[3] b> "

SAME = {
    "gelu": ("g (float[2,8] x) => (float[2,8] y) { y = com.microsoft.Gelu(x) }", 18),
    "gelu with an operator": (
        "g (float[2,8] x) => (float[2,8] y) { y = com.microsoft.Gelu(x) }",
        20,
    ),
    "bias gelu": (
        "g (float[2,8] x) => (float[2,8] y) <float[8] b> { y = com.microsoft.BiasGelu(x, b) }",
        18,
    ),
    "fast gelu": (
        "g (float[2,8] x) => (float[2,8] y) <float[8] b> { y = com.microsoft.FastGelu(x, b) }",
        18,
    ),
    "fast gelu without bias": (
        "g (float[2,8] x) => (float[2,8] y) { y = com.microsoft.FastGelu(x) }",
        20,
    ),
    "quick gelu": (
        "g (float[2,8] x) => (float[2,8] y) { y = com.microsoft.QuickGelu<alpha = 1.5>(x) }",
        13,
    ),
    "matmul": (
        "g (float[2,8,3] x) => (float[2,3,5] y) <float[2,5,8] w> "
        "{ y = com.microsoft.FusedMatMul<alpha = 0.5, transA = 1, transB = 1>(x, w) }",
        18,
    ),
    "skip norm": (
        "g (float[2,3,8] x, float[2,3,8] s) => (float[2,3,8] y, float[2,3,8] t) "
        "<float[8] ga, float[8] be, float[8] b> "
        "{ y, m, v, t = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(x, s, ga, be, b) }",
        17,
    ),
    "skip norm alone": (
        "g (float[2,3,8] x, float[2,3,8] s) => (float[2,3,8] y) <float[8] ga> "
        "{ y = com.microsoft.SkipLayerNormalization(x, s, ga) }",
        18,
    ),
    "convolution": (
        IMAGE
        + '{ y = com.microsoft.FusedConv<kernel_shape = [3, 3], activation = "Relu">(x, w, b) }',
        18,
    ),
    "convolution with addend": (
        "g (float[1,2,6,6] x, float[1,3,4,4] z) => (float[1,3,4,4] y) <float[3,2,3,3] w, float[3] b> "
        '{ y = com.microsoft.FusedConv<kernel_shape = [3, 3], activation = "LeakyRelu", '
        "activation_params = [0.5]>(x, w, b, z) }",
        18,
    ),
    "gemm": (
        "g (float[2,8] x) => (float[2,3] y) <float[3,8] w, float[3] b> "
        '{ y = com.microsoft.FusedGemm<transB = 1, activation = "Relu">(x, w, b) }',
        18,
    ),
    "integers": (
        "g (float[2,8] x) => (float[2,8] y) <float s = {0.5}, uint8 z = {3}> "
        "{ q = com.microsoft.QuantizeLinear(x, s, z)  y = com.microsoft.DequantizeLinear(q, s, z) }",
        18,
    ),
}

KEPT = {
    "batch dimensions": (
        "g (float[2,3,8] x) => (y) { y = com.microsoft.FusedMatMul<transBatchA = 1>(x, x) }",
        18,
        "batch dimensions",
    ),
    "a rank that nobody knows": (
        "g (float[2,3] x, int64[K] s) => (y) "
        "{ r = Reshape(x, s)  y = com.microsoft.FusedMatMul<transA = 1>(r, x) }",
        18,
        "unknown rank",
    ),
    "mean of a norm": (
        "g (float[2,3,8] x) => (y, m) <float[8] ga> "
        "{ y, m = com.microsoft.SkipLayerNormalization(x, x, ga) }",
        18,
        "mean or deviation is used",
    ),
    "an unknown activation": (
        IMAGE + '{ y = com.microsoft.FusedConv<activation = "Clip", activation_params = [0.0, 1.0]>'
        "(x, w, b) }",
        18,
        "activation Clip with 2 parameters",
    ),
    "wide integers": (
        "g (float[2] x) => (y) <float s = {0.5}, uint16 z = {3}> "
        "{ y = com.microsoft.QuantizeLinear(x, s, z) }",
        18,
        "other than of 8 bits",
    ),
}


@pytest.mark.parametrize("case", list(SAME))
def test_the_numbers_stay(case: str) -> None:
    text, opset = SAME[case]
    proto = parse(HEAD.format(opset=opset) + text)
    model = ir.from_proto(proto)
    ctx = apply(contrib.RULES, model, target="portable")
    assert ctx.rewrites
    assert not any(node.domain for node in model.graph)
    after = ir.to_proto(model)
    for seed in range(2):
        feed = make_feeds(proto, seed)
        compare(run(proto, feed), run(after, feed), Numerics.REORDERED, 2e-6)
    assert not apply(contrib.RULES, model, target="portable").rewrites


@pytest.mark.parametrize("case", list(SAME))
def test_targets_with_kernels_keep_them(case: str) -> None:
    text, opset = SAME[case]
    model = ir.from_proto(parse(HEAD.format(opset=opset) + text))
    assert not apply(contrib.RULES, model, target="cpu").rewrites


@pytest.mark.parametrize("case", list(KEPT))
def test_what_has_no_standard_form_stays(case: str) -> None:
    text, opset, reason = KEPT[case]
    model = ir.from_proto(parse(HEAD.format(opset=opset) + text))
    ctx = apply(contrib.RULES, model, target="portable")
    assert not ctx.rewrites
    reasons = [r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED]
    assert any(reason in each for each in reasons), reasons


def test_half_precision_stays_half() -> None:
    text = (
        HEAD.format(opset=18)
        + "g (float16[4] x) => (float16[4] y) { y = com.microsoft.QuickGelu(x) }"
    )
    model = ir.from_proto(parse(text))
    apply(contrib.RULES, model, target="portable")
    held = {value.dtype for node in model.graph for value in node.inputs if value is not None}
    assert held <= {ir.DataType.FLOAT16}
    x = np.linspace(-3, 3, 4).astype(np.float16)
    (y,) = run(ir.to_proto(model), {"x": x})
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide / (1 + np.exp(-1.702 * wide)), atol=4e-3)
