"""Folding of per-channel arithmetic into convolutions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import conv

from tests.rewriting import apply, check, parse

BN = "float[4] ga, float[4] be, float[4] me, float[4] va"


def test_batchnorm_into_conv_without_bias() -> None:
    check(
        conv.RULES,
        before=f"g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, {BN}>"
        "{ k = Conv(x, w)  y = BatchNormalization(k, ga, be, me, va) }",
        after="g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, float[4] b> { y = Conv(x, w, b) }",
    )


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15])
def test_batchnorm_into_grouped_conv_with_bias(opset: int) -> None:
    check(
        conv.RULES,
        before=f"g (float[N,4,8,8] x) => (float[N,4,6,6] y) <float[4,2,3,3] w, float[4] b, {BN}>"
        "{ k = Conv<group=2>(x, w, b)  y = BatchNormalization<epsilon=0.01>(k, ga, be, me, va) }",
        after="g (float[N,4,8,8] x) => (float[N,4,6,6] y) <float[4,2,3,3] w, float[4] b>"
        "{ y = Conv<group=2>(x, w, b) }",
        opset=opset,
    )


@pytest.mark.parametrize(("groups", "weight"), [(1, "4,4,3,3"), (2, "4,2,3,3"), (4, "4,1,3,3")])
def test_batchnorm_into_conv_transpose(groups: int, weight: str) -> None:
    check(
        conv.RULES,
        before=f"g (float[2,4,5,5] x) => (float[2,4,11,11] y) <float[{weight}] w, float[4] b, {BN}>"
        f"{{ k = ConvTranspose<group={groups}, strides=[2,2]>(x, w, b)  y = BatchNormalization(k, ga, be, me, va) }}",
        after=f"g (float[2,4,5,5] x) => (float[2,4,11,11] y) <float[{weight}] w, float[4] b>"
        f"{{ y = ConvTranspose<group={groups}, strides=[2,2]>(x, w, b) }}",
    )


def test_batchnorm_into_conv_transpose_of_one_input_channel_group() -> None:
    """Groups of unequal numbers of inputs and outputs tell a wrong reshape from the right one."""
    bn = BN.replace("[4]", "[6]")
    check(
        conv.RULES,
        before=f"g (float[1,4,5] x) => (float[1,6,7] y) <float[4,3,3] w, {bn}>"
        "{ k = ConvTranspose<group=2>(x, w)  y = BatchNormalization(k, ga, be, me, va) }",
        after="g (float[1,4,5] x) => (float[1,6,7] y) <float[4,3,3] w, float[6] b>"
        "{ y = ConvTranspose<group=2>(x, w, b) }",
    )


def test_batchnorm_in_training_mode_stays() -> None:
    check(
        conv.RULES,
        before=f"g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, {BN}>"
        "{ k = Conv(x, w)  y, m, v = BatchNormalization<training_mode=1>(k, ga, be, me, va) }",
        missed="training mode",
        opset=15,
    )


def _runs_only_after(before: str, opset: int, reason: str) -> None:
    """A case that ONNX Runtime refuses: only the structure and the remark are looked at."""
    model = ir.from_proto(parse(before, opset=opset))
    ctx = apply(conv.RULES, model)
    assert not ctx.rewrites
    assert any(reason in remark.reason for remark in ctx.remarks), ctx.remarks


def test_batchnorm_before_opset_7_needs_is_test() -> None:
    text = (
        "g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, " + BN + ">"
        "{ k = Conv(x, w)  y = BatchNormalization(k, ga, be, me, va) }"
    )
    _runs_only_after(text, 6, "is_test")
    model = ir.from_proto(parse(text.replace("tion(k", "tion<is_test=1>(k"), opset=6))
    assert apply(conv.RULES, model).rewrites


def test_batchnorm_of_each_position_stays() -> None:
    _runs_only_after(
        "g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, " + BN + ">"
        "{ k = Conv(x, w)  y = BatchNormalization<spatial=0>(k, ga, be, me, va) }",
        7,
        "spatial",
    )


def test_statistics_in_use_mean_training() -> None:
    _runs_only_after(
        "g (float[2,3,8,8] x) => (float[2,4,6,6] y, float[4] m) <float[4,3,3,3] w, " + BN + ">"
        "{ k = Conv(x, w)  y, m, v, s, t = BatchNormalization(k, ga, be, me, va) }",
        9,
        "statistics",
    )


def test_conv_with_another_use_stays() -> None:
    check(
        conv.RULES,
        before=f"g (float[2,3,8,8] x) => (float[2,4,6,6] y, float[2,4,6,6] z) <float[4,3,3,3] w, {BN}>"
        "{ k = Conv(x, w)  y = BatchNormalization(k, ga, be, me, va)  z = Relu(k) }",
        missed="other uses",
    )


def test_conv_that_is_a_graph_output_stays() -> None:
    check(
        conv.RULES,
        before=f"g (float[2,3,8,8] x) => (float[2,4,6,6] y, float[2,4,6,6] k) <float[4,3,3,3] w, {BN}>"
        "{ k = Conv(x, w)  y = BatchNormalization(k, ga, be, me, va) }",
        missed="graph output",
    )


def test_overridable_weight_stays() -> None:
    check(
        conv.RULES,
        before="g (float[1,1,3,3] x, float[1,1,1,1] w = {2.0}) => (float[1,1,3,3] y) <float[1,1,1,1] s = {3.0}>"
        "{ k = Conv(x, w)  y = Mul(k, s) }",
        missed="not a constant",
    )


def test_quantised_weight_stays() -> None:
    check(
        conv.RULES,
        before="g (float[1,1,3,3] x) => (float[1,1,3,3] y)"
        "<int8[1,1,1,1] q = {2}, float ws = {0.5}, int8 zp = {0}, float[1,1,1,1] s = {3.0}>"
        "{ w = DequantizeLinear(q, ws, zp)  k = Conv(x, w)  y = Mul(k, s) }",
        missed="quantised",
    )


def test_tied_weight_with_another_use_stays() -> None:
    check(
        conv.RULES,
        before="g (float[1,64,8,8] x, float[1,64,8,8] x2) => (float[1,64,8,8] y, float[1,64,8,8] z)"
        "<float[64,64,1,1] w, float[64,1,1] s>"
        "{ k = Conv(x, w)  y = Mul(k, s)  z = Conv(x2, w) }",
        missed="2 uses",
    )


def test_tied_weight_folds_where_both_uses_fold_alike() -> None:
    bn = BN.replace("[4]", "[64]")
    check(
        conv.RULES,
        before=f"g (float[1,64,8,8] x, float[1,64,8,8] x2) => (float[1,64,8,8] y, float[1,64,8,8] z)"
        f"<float[64,64,1,1] w, {bn}>"
        "{ k = Conv(x, w)  y = BatchNormalization(k, ga, be, me, va)"
        "  l = Conv(x2, w) z = BatchNormalization(l, ga, be, me, va) }",
        after="g (float[1,64,8,8] x, float[1,64,8,8] x2) => (float[1,64,8,8] y, float[1,64,8,8] z)"
        "<float[64,64,1,1] w, float[64] b> { y = Conv(x, w, b)  z = Conv(x2, w, b) }",
        tolerance=1e-5,
    )


def test_overflowing_fold_stays() -> None:
    model = ir.from_proto(
        parse(
            "g (float16[1,1,3,3] x) => (float16[1,1,3,3] y) <float16[1,1,1,1] w, float16[1] s>"
            "{ k = Conv(x, w)  y = Mul(k, s) }"
        )
    )
    for name in ("w", "s"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.full(value.shape.numpy(), 60000.0, np.float16))  # type: ignore[union-attr]
    ctx = apply(conv.RULES, model)
    assert not ctx.rewrites
    assert any("not finite" in remark.reason for remark in ctx.remarks)


@pytest.mark.parametrize(
    "constant", ["float s", "float[1] s", "float[4,1,1] s", "float[1,4,1,1] s"]
)
@pytest.mark.parametrize(
    "operator", ["Add(k, s)", "Add(s, k)", "Sub(k, s)", "Mul(s, k)", "Div(k, s)", "Sub(s, k)"]
)
def test_arithmetic_after_conv(constant: str, operator: str) -> None:
    bias = "" if operator[:3] in ("Mul", "Div") else ", b"
    check(
        conv.RULES,
        before=f"g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, {constant}>"
        f"{{ k = Conv(x, w)  y = {operator} }}",
        after="g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, float[4] b>"
        f"{{ y = Conv(x, w{bias}) }}",
    )


@pytest.mark.parametrize(
    "constant",
    ["float[6] s", "float[1,1,6] s", "float[2,1,1,1] s", "float[1,1,1,1,1] s", "float[4] s"],
)
@pytest.mark.parametrize("operator", ["Add", "Mul"])
def test_arithmetic_that_is_not_per_channel_stays(constant: str, operator: str) -> None:
    shape = "2,4,4,4" if constant == "float[4] s" else "2,4,6,6"
    shape = "1,2,4,6,6" if constant.count("1") == 5 else shape
    weight = "4,3,5,5" if constant == "float[4] s" else "4,3,3,3"
    check(
        conv.RULES,
        before=f"g (float[2,3,8,8] x) => (float[{shape}] y) <float[{weight}] w, {constant}>"
        f"{{ k = Conv(x, w)  y = {operator}(k, s) }}",
        missed="per channel",
    )


def test_arithmetic_that_adds_channels_stays() -> None:
    check(
        conv.RULES,
        before="g (float[2,3,8,8] x) => (float[2,5,6,6] y) <float[1,3,3,3] w, float[5,1,1] s>"
        "{ k = Conv(x, w)  y = Mul(k, s) }",
        missed="per channel",
    )


def test_constant_over_conv_stays() -> None:
    check(
        conv.RULES,
        before="g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, float[4,1,1] s>"
        "{ k = Conv(x, w)  y = Div(s, k) }",
    )


def test_addend_with_computed_weight() -> None:
    check(
        conv.RULES,
        before="g (float[2,3,8,8] x, float[4,3,3,3] w) => (float[2,4,6,6] y) <float[4,1,1] s>"
        "{ k = Conv(x, w)  y = Add(k, s) }",
        after="g (float[2,3,8,8] x, float[4,3,3,3] w) => (float[2,4,6,6] y) <float[4] s>"
        "{ y = Conv(x, w, s) }",
    )


@pytest.mark.parametrize("operator", ["Mul(x, s)", "Div(x, s)"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_scale_before_conv(operator: str, op_type: str) -> None:
    weight, out = ("6,2,3,3", "2,6,8,8") if op_type == "Conv" else ("4,3,3,3", "2,6,8,8")
    check(
        conv.RULES,
        before=f"g (float[2,4,8,8] x) => (float[{out}] y) <float[{weight}] w, float[4,1,1] s>"
        f"{{ k = {operator}  y = {op_type}<group=2, pads=[1,1,1,1]>(k, w) }}",
        after=f"g (float[2,4,8,8] x) => (float[{out}] y) <float[{weight}] w>"
        f"{{ y = {op_type}<group=2, pads=[1,1,1,1]>(x, w) }}",
    )


@pytest.mark.parametrize("operator", ["Add(s, x)", "Sub(x, s)"])
def test_shift_before_unpadded_conv(operator: str) -> None:
    check(
        conv.RULES,
        before="g (float[2,4,8,8] x) => (float[2,6,6,6] y) <float[6,2,3,3] w, float[1,4,1,1] s>"
        f"{{ k = {operator}  y = Conv<group=2>(k, w) }}",
        after="g (float[2,4,8,8] x) => (float[2,6,6,6] y) <float[6,2,3,3] w, float[6] b>"
        "{ y = Conv<group=2>(x, w, b) }",
    )


def test_shift_before_padded_conv_stays() -> None:
    check(
        conv.RULES,
        before="g (float[2,4,8,8] x) => (float[2,6,8,8] y) <float[6,4,3,3] w, float s>"
        "{ k = Add(x, s)  y = Conv<pads=[1,1,1,1]>(k, w) }",
        missed="padding",
    )


def test_arithmetic_before_conv_that_broadens_stays() -> None:
    check(
        conv.RULES,
        before="g (float[2,1,8,8] x) => (float[2,6,6,6] y) <float[6,4,3,3] w, float[4,1,1] s>"
        "{ k = Mul(x, s)  y = Conv(k, w) }",
        missed="broaden",
    )


def test_batchnorm_before_conv() -> None:
    check(
        conv.RULES,
        before=f"g (float[2,4,8,8] x) => (float[2,6,8,8] y) <float[6,4,1,1] w, float[6] b, {BN}>"
        "{ k = BatchNormalization(x, ga, be, me, va)  y = Conv(k, w, b) }",
        after="g (float[2,4,8,8] x) => (float[2,6,8,8] y) <float[6,4,1,1] w, float[6] b> { y = Conv(x, w, b) }",
    )


def test_batchnorm_before_padded_conv_stays() -> None:
    check(
        conv.RULES,
        before=f"g (float[2,4,8,8] x) => (float[2,6,8,8] y) <float[6,4,3,3] w, {BN}>"
        "{ k = BatchNormalization(x, ga, be, me, va)  y = Conv<pads=[1,1,1,1]>(k, w) }",
        missed="padding",
    )


def test_zero_bias_goes() -> None:
    check(
        conv.RULES,
        before="g (float[2,1,8,8] x) => (float[2,2,8,8] y) <float[2,1,1,1] w, float[2] b = {0.0, 0.0}>"
        "{ y = Conv(x, w, b) }",
        after="g (float[2,1,8,8] x) => (float[2,2,8,8] y) <float[2,1,1,1] w> { y = Conv(x, w) }",
    )


def test_zero_bias_beside_quantised_weight_stays() -> None:
    check(
        conv.RULES,
        before="g (float[1,1,3,3] x) => (float[1,1,3,3] y)"
        "<int8[1,1,1,1] q = {2}, float ws = {0.5}, int8 zp = {0}, float[1] b = {0.0}>"
        "{ w = DequantizeLinear(q, ws, zp)  y = Conv(x, w, b) }",
    )


def test_fold_inside_a_branch() -> None:
    check(
        conv.RULES,
        before="g (bool c, float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w, float[2,1,1] s>"
        "{ y = If(c) <then_branch = t () => (float[1,2,4,4] a) { k = Conv(x, w)  a = Mul(k, s) },"
        " else_branch = e () => (float[1,2,4,4] b) { b = Relu(x) }> }",
        after="g (bool c, float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w>"
        "{ y = If(c) <then_branch = t () => (float[1,2,4,4] a) { a = Conv(x, w) },"
        " else_branch = e () => (float[1,2,4,4] b) { b = Relu(x) }> }",
        feeds=[{"c": np.asarray(c), "x": np.ones((1, 2, 4, 4), np.float32)} for c in (False, True)],
    )


def test_match_across_a_branch_stays() -> None:
    check(
        conv.RULES,
        before="g (bool c, float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w, float[2,1,1] s>"
        "{ k = Conv(x, w)"
        "  y = If(c) <then_branch = t () => (float[1,2,4,4] a) { a = Mul(k, s) },"
        " else_branch = e () => (float[1,2,4,4] b) { b = Relu(x) }> }",
        missed="subgraph boundary",
        feeds=[{"c": np.asarray(True), "x": np.ones((1, 2, 4, 4), np.float32)}],
    )


def test_addend_of_unknown_channels_stays() -> None:
    check(
        conv.RULES,
        before="""g (float[1,3,8,8] x, float[K,3,3,3] v) => (float[1,K,6,6] y) <float c = {0.5}> {
            w = Neg(v)  k = Conv(x, w)  y = Add(k, c) }""",
        missed="the number of output channels is unknown",
        feeds=[{"x": np.ones((1, 3, 8, 8), np.float32), "v": np.ones((4, 3, 3, 3), np.float32)}],
    )


def test_minuend_along_an_image_stays() -> None:
    check(
        conv.RULES,
        before="""g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, float[6] c> {
            k = Conv(x, w)  y = Sub(c, k) }""",
        missed="the minuend is not one number per channel",
    )


def test_factor_along_an_image_before_conv_stays() -> None:
    check(
        conv.RULES,
        before="""g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, float[8] c> {
            s = Mul(x, c)  y = Conv(s, w) }""",
        missed="the constant is not one number per channel",
    )


@pytest.mark.parametrize(
    "other",
    [
        "z = BatchNormalization(l, ga, be, me, v2)",
        "z = Relu(l)",
        "n = BatchNormalization(l, ga, be, me, va)  z = Add(n, l)",
    ],
    ids=["constants", "operator", "uses"],
)
def test_tied_weight_stays_where_the_other_use_folds_otherwise(other: str) -> None:
    bn = BN.replace("[4]", "[64]")
    check(
        conv.RULES,
        before=f"g (float[1,64,8,8] x, float[1,64,8,8] x2) => (float[1,64,8,8] y, float[1,64,8,8] z)"
        f"<float[64,64,1,1] w, {bn}, float[64] v2>"
        f"{{ k = Conv(x, w)  y = BatchNormalization(k, ga, be, me, va)  l = Conv(x2, w)  {other} }}",
        missed="uses",
    )
