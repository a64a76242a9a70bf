"""Pads folded into windows, and auto_pad spelled out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import padding

from tests.rewriting import apply, check, make_feeds, parse, run

PADS = "int64[8] p = {0,0,1,2,0,0,3,4}"


def test_pad_into_conv() -> None:
    check(
        padding.RULES,
        before=f"g (float[N,2,6,6] x) => (float[N,3,10,12] y) <float[3,2,3,3] w, {PADS}>"
        "{ k = Pad(x, p)  y = Conv<pads=[1,1,1,1]>(k, w) }",
        after="g (float[N,2,6,6] x) => (float[N,3,10,12] y) <float[3,2,3,3] w>"
        "{ y = Conv<pads=[2,3,4,5]>(x, w) }",
    )


def test_pad_with_axes_into_valid_conv() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x) => (float[1,3,6,4] y)"
        "<float[3,2,3,3] w, int64[2] p = {1,1}, int64[1] a = {-2}, float zero = {0.0}>"
        '{ k = Pad(x, p, zero, a)  y = Conv<auto_pad="VALID">(k, w) }',
        after="g (float[1,2,6,6] x) => (float[1,3,6,4] y) <float[3,2,3,3] w>"
        "{ y = Conv<pads=[1,0,1,0]>(x, w) }",
    )


def test_pad_given_as_attributes() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x) => (float[1,3,6,6] y) <float[3,2,3,3] w>"
        "{ k = Pad<pads=[0,0,1,1,0,0,1,1]>(x)  y = Conv(k, w) }",
        after="g (float[1,2,6,6] x) => (float[1,3,6,6] y) <float[3,2,3,3] w>"
        "{ y = Conv<pads=[1,1,1,1]>(x, w) }",
        opset=9,
    )


@pytest.mark.parametrize(
    ("pad", "consts", "shape", "reason"),
    [
        ('Pad<mode="reflect">(x, p)', PADS, "3,8,10", "constant padding"),
        ("Pad(x, p)", "int64[8] p = {0,0,-1,0,0,0,0,0}", "3,3,4", "negative"),
        ("Pad(x, p)", "int64[8] p = {1,0,1,1,0,0,1,1}", "3,6,6", "batch"),
        (
            "Pad(x, p, v)",
            "int64[8] p = {0,0,1,1,0,0,1,1}, float v = {1.0}",
            "3,6,6",
            "another value",
        ),
    ],
)
def test_pad_that_conv_cannot_do_stays(pad: str, consts: str, shape: str, reason: str) -> None:
    batch = 2 if "{1,0" in consts else 1
    check(
        padding.RULES,
        before=f"g (float[1,2,6,6] x) => (float[{batch},{shape}] y) <float[3,2,3,3] w, {consts}>"
        f"{{ k = {pad}  y = Conv(k, w) }}",
        missed=reason,
    )


def test_computed_padding_stays() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x, int64[8] p) => (float[A,3,B,C] y) <float[3,2,3,3] w>"
        "{ k = Pad(x, p)  y = Conv(k, w) }",
        missed="not constant",
        feeds=[{"x": np.ones((1, 2, 6, 6), np.float32), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}],
    )


def test_pad_before_same_padding_stays() -> None:
    check(
        padding.RULES,
        before=f"g (float[1,2,H,W] x) => (float[1,3,P,Q] y) <float[3,2,3,3] w, {PADS}>"
        '{ k = Pad(x, p)  y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(k, w) }',
        missed="auto_pad",
    )


@pytest.mark.parametrize(("zero", "value", "folds"), [("3", "3", True), ("3", "0", False)])
def test_pad_into_integer_conv(zero: str, value: str, *, folds: bool) -> None:
    consts = (
        f"uint8[3,2,3,3] w, uint8 z = {{{zero}}}, uint8 v = {{{value}}},"
        "int64[8] p = {0,0,1,1,0,0,1,1}"
    )
    check(
        padding.RULES,
        before=f"g (uint8[1,2,6,6] x) => (int32[1,3,6,6] y) <{consts}>"
        "{ k = Pad(x, p, v)  y = ConvInteger(k, w, z) }",
        after=f"g (uint8[1,2,6,6] x) => (int32[1,3,6,6] y) <{consts}>"
        "{ y = ConvInteger<pads=[1,1,1,1]>(x, w, z) }"
        if folds
        else None,
        missed="" if folds else "another value",
    )


def test_pad_into_average_pool() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x) => (float[1,2,6,6] y) <int64[8] p = {0,0,1,1,0,0,1,1}>"
        "{ k = Pad(x, p)  y = AveragePool<kernel_shape=[3,3]>(k) }",
        after="g (float[1,2,6,6] x) => (float[1,2,6,6] y)"
        "{ y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x) }",
    )


@pytest.mark.parametrize(
    ("attributes", "value", "size", "reason"),
    [
        ("kernel_shape=[3,3], pads=[1,1,1,1]", 0, 8, "out of the count"),
        ("kernel_shape=[3,3], strides=[2,2], ceil_mode=1", 0, 4, "ceil_mode"),
        ("kernel_shape=[1,1]", 0, 8, "altogether"),
        ("kernel_shape=[3,3]", 1, 6, "not zero"),
    ],
)
def test_average_pool_that_counts_otherwise_stays(
    attributes: str, value: int, size: int, reason: str
) -> None:
    check(
        padding.RULES,
        before=f"g (float[1,2,6,6] x) => (float[1,2,{size},{size}] y)"
        f"<int64[8] p = {{0,0,1,1,0,0,1,1}}, float v = {{{value}.0}}>"
        f"{{ k = Pad(x, p, v)  y = AveragePool<{attributes}>(k) }}",
        missed=reason,
    )


def test_padding_of_a_computed_value_stays() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x, float v) => (float[1,2,6,6] y) <int64[8] p = {0,0,1,1,0,0,1,1}>"
        "{ k = Pad(x, p, v)  y = MaxPool<kernel_shape=[3,3]>(k) }",
        missed="not constant",
    )


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min])
def test_pad_with_the_lowest_number_into_max_pool(value: float) -> None:
    proto = parse(
        "g (float[1,2,6,6] x) => (float[1,2,6,6] y) <int64[8] p = {0,0,1,1,0,0,1,1}, float v>"
        "{ k = Pad(x, p, v)  y = MaxPool<kernel_shape=[3,3]>(k) }"
    )
    infinity = onnx.numpy_helper.from_array(np.asarray(value, np.float32), "v")
    next(t for t in proto.graph.initializer if t.name == "v").CopyFrom(infinity)
    model = ir.from_proto(proto)
    assert len(apply(padding.RULES, model).rewrites) == 1
    feed = make_feeds(proto, 0)
    np.testing.assert_array_equal(run(ir.to_proto(model), feed)[0], run(proto, feed)[0])


def test_zero_pad_of_what_is_never_negative_into_max_pool() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x) => (float[1,2,6,6] y) <int64[8] p = {0,0,1,1,0,0,1,1}>"
        "{ r = Relu(x) k = Pad(r, p)  y = MaxPool<kernel_shape=[3,3]>(k) }",
        after="g (float[1,2,6,6] x) => (float[1,2,6,6] y)"
        "{ r = Relu(x)  y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r) }",
    )


def test_zero_pad_into_max_pool_of_anything_stays() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x) => (float[1,2,6,6] y) <int64[8] p = {0,0,1,1,0,0,1,1}>"
        "{ k = Pad(x, p)  y = MaxPool<kernel_shape=[3,3]>(k) }",
        missed="could be the maximum",
    )


def test_lowest_pad_into_integer_max_pool() -> None:
    check(
        padding.RULES,
        before="g (int8[1,2,6,6] x) => (int8[1,2,6,6] y)"
        "<int64[8] p = {0,0,1,1,0,0,1,1}, int8 v = {-128}>"
        "{ k = Pad(x, p, v)  y = MaxPool<kernel_shape=[3,3]>(k) }",
        after="g (int8[1,2,6,6] x) => (int8[1,2,6,6] y)"
        "{ y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) }",
    )


def test_max_pool_with_indices_stays() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,6,6] x) => (float[1,2,6,6] y, int64[1,2,6,6] i)"
        "<int64[8] p = {0,0,1,1,0,0,1,1}>"
        "{ r = Relu(x) k = Pad(r, p)  y, i = MaxPool<kernel_shape=[3,3]>(k) }",
        missed="indices",
    )


@pytest.mark.parametrize(
    ("mode", "stride", "size", "pads"),
    [
        ("SAME_UPPER", 1, "N", ", pads=[0,1,1,1]"),
        ("SAME_LOWER", 1, "N", ", pads=[1,1,0,1]"),
        ("SAME_UPPER", 2, "7", ", pads=[0,1,1,1]"),
        ("SAME_UPPER", 2, "6", ", pads=[0,0,0,1]"),
        ("VALID", 2, "N", ""),
    ],
)
def test_auto_pad_of_conv(mode: str, stride: int, size: str, pads: str) -> None:
    strides = f"strides=[{stride},{stride}]"
    check(
        padding.RULES,
        before=f"g (float[1,2,{size},{size}] x) => (float[1,3,P,Q] y) <float[3,2,2,3] w>"
        f'{{ y = Conv<auto_pad="{mode}", {strides}>(x, w) }}',
        after=f"g (float[1,2,{size},{size}] x) => (float[1,3,P,Q] y) <float[3,2,2,3] w>"
        f"{{ y = Conv<{strides}{pads}>(x, w) }}",
        dims=(5, 8),
    )


def test_auto_pad_of_pool_leaves_padding_out_of_the_count() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,N,N] x) => (float[1,2,N,N] y)"
        '{ y = AveragePool<auto_pad="SAME_UPPER", kernel_shape=[3,3]>(x) }',
        after="g (float[1,2,N,N] x) => (float[1,2,N,N] y)"
        "{ y = AveragePool<pads=[1,1,1,1], kernel_shape=[3,3]>(x) }",
        dims=(5, 8),
    )


def test_auto_pad_with_stride_over_an_unknown_size_stays() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,N,N] x) => (float[1,3,P,Q] y) <float[3,2,3,3] w>"
        '{ y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) }',
        missed="unknown size",
        dims=(5, 8),
    )


def test_auto_pad_of_computed_weight_stays() -> None:
    check(
        padding.RULES,
        before="g (float[1,2,5,5] x, float[3,2,K,K] w) => (float[1,3,P,Q] y)"
        '{ y = Conv<auto_pad="SAME_UPPER">(x, w) }',
        missed="kernel's size",
        dims=(3, 2),
    )
