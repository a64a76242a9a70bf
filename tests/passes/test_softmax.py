"""Softmax and LogSoftmax out of their parts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import softmax

from tests.rewriting import apply, check, parse, run

AXES = "int64[1] a = {-1}"


@pytest.mark.parametrize("tail", ["Div(e, s)", "Mul(r, e)", "Mul(e, q)"])
@pytest.mark.parametrize("head", ["z = Sub(x, h)", "z = Identity(x)"])
def test_softmax_out_of_parts(head: str, tail: str) -> None:
    inner = "z" if "Sub" in head else "x"
    body = f"h = ReduceMax(x, a)  {head}  e = Exp({inner})  s = ReduceSum(e, a)"
    extra = {"D": "", "r": "r = Reciprocal(s)", "e": "q = Div(one, s)"}[
        tail[4] if tail[0] == "M" else "D"
    ]
    check(
        softmax.RULES,
        before=f"g (float[N,4,5] x) => (float[N,4,5] y) <{AXES}, float one = {{1.0}}>"
        f"{{ {body} {extra} y = {tail} }}",
        after="g (float[N,4,5] x) => (float[N,4,5] y) { y = Softmax<axis=-1>(x) }",
    )


def test_softmax_over_an_inner_axis() -> None:
    text = (
        "g (float[N,4,5] x) => (float[N,4,5] y)"
        "{ h = ReduceMax<axes=[1]>(x)  z = Sub(x, h)  e = Exp(z)  s = ReduceSum(e, a)  y = Div(e, s) }"
    ).replace("{ h", "<int64[1] a = {1}> { h")
    check(
        softmax.RULES,
        before=text,
        after="g (float[N,4,5] x) => (float[N,4,5] y) { y = Softmax<axis=1>(x) }",
        opset=17,
        target="portable",
    )
    check(softmax.RULES, before=text, opset=17, missed="faster")


def test_inner_axis_before_opset_13_stays() -> None:
    check(
        softmax.RULES,
        before="g (float[N,4,5] x) => (float[N,4,5] y)"
        "{ e = Exp(x)  s = ReduceSum<axes=[1]>(e)  y = Div(e, s) }",
        missed="flattens",
        opset=12,
    )


def test_last_axis_before_opset_13() -> None:
    check(
        softmax.RULES,
        before="g (float[N,4,5] x) => (float[N,4,5] y)"
        "{ e = Exp(x)  s = ReduceSum<axes=[2]>(e)  y = Div(e, s) }",
        after="g (float[N,4,5] x) => (float[N,4,5] y) { y = Softmax<axis=-1>(x) }",
        opset=12,
    )


@pytest.mark.parametrize(
    "body",
    [
        "e = Exp(x)  s = ReduceSum<keepdims=0>(e, a)  y = Div(e, s)",
        "e = Exp(x)  s = ReduceSum(e, two)  y = Div(e, s)",
        "e = Exp(x)  s = ReduceSum(e)  y = Div(e, s)",
        "h = ReduceMax(x, b)  z = Sub(x, h)  e = Exp(z)  s = ReduceSum(e, a)  y = Div(e, s)",
        "e = Exp(x)  s = ReduceSum(e, a)  y = Div(s, e)",
    ],
)
def test_other_sums_stay(body: str) -> None:
    check(
        softmax.RULES,
        before="g (float[5,5] x) => (float[5,5] y) <int64[1] a = {-1}, int64[1] b = {0}, int64[2] two = {0,1}>"
        f"{{ {body} }}",
    )


def test_fully_masked_and_infinite_rows_are_as_before() -> None:
    rows = [
        [-np.inf] * 4,
        [0, -np.inf, 1, 2],
        [np.nan, 0, 1, 2],
        [np.inf, 0, 1, 2],
        [1e38, 0, 1, -1e38],
    ]
    text = (
        "g (float[N,4] x) => (float[N,4] y) <int64[1] a = {-1}>"
        "{ h = ReduceMax(x, a)  z = Sub(x, h)  e = Exp(z)  s = ReduceSum(e, a)  y = Div(e, s) }"
    )
    feed = {"x": np.array(rows, np.float32)}
    proto = parse(text)
    model = ir.from_proto(proto)
    assert len(apply(softmax.RULES, model).rewrites) == 1
    np.testing.assert_allclose(run(ir.to_proto(model), feed)[0], run(proto, feed)[0], rtol=1e-6)


@pytest.mark.parametrize("head", ["h = ReduceMax(x, a) z = Sub(x, h)", ""])
def test_log_softmax_out_of_parts(head: str) -> None:
    z = "z" if head else "x"
    check(
        softmax.RULES,
        before=f"g (float[N,4,5] x) => (float[N,4,5] y) <{AXES}>"
        f"{{ {head} e = Exp({z})  s = ReduceSum(e, a)  l = Log(s)  y = Sub({z}, l) }}",
        after="g (float[N,4,5] x) => (float[N,4,5] y) { y = LogSoftmax<axis=-1>(x) }",
    )


def test_log_sum_exp() -> None:
    check(
        softmax.RULES,
        before=f"g (float[N,4,5] x) => (float[N,4,5] y) <{AXES}>"
        "{ l = ReduceLogSumExp(x, a)  y = Sub(x, l) }",
        after="g (float[N,4,5] x) => (float[N,4,5] y) { y = LogSoftmax<axis=-1>(x) }",
    )


def test_log_sum_exp_without_kept_axis_stays() -> None:
    check(
        softmax.RULES,
        before=f"g (float[5,5] x) => (float[5,5] y) <{AXES}>"
        "{ l = ReduceLogSumExp<keepdims=0>(x, a)  y = Sub(x, l) }",
    )
