"""Normalisations in half precision whose variance alone is computed in float32, as torch.export writes them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes import norm

from graphopt.numerics import Numerics
from tests.rewriting import apply, compare, make_feeds, parse, run

TEXT = (
    "g (float16[N,3,8] x) => (float16[N,3,8] y) <float16 e = {168}, int64[1] last = {-1}>"
    " { m = ReduceMean(x, last) d = Sub(x, m) w = Cast<to=1>(x) n = ReduceMean(w, last) c = Sub(w, n)"
    " q = Mul(c, c) v = ReduceMean(q, last) h = Cast<to=10>(v) l = Add(h, e) r = Sqrt(l)"
    " i = Reciprocal(r) y = Mul(d, i) }"
)


@pytest.mark.parametrize("tail", ["i = Reciprocal(r) y = Mul(d, i)", "y = Div(d, r)"])
def test_variance_in_float32_of_halves(tail: str) -> None:
    proto = parse(TEXT.replace("i = Reciprocal(r) y = Mul(d, i)", tail), opset=18)
    model = ir.from_proto(proto)
    apply(norm.RULES, model)
    assert [n.op_type for n in model.graph] == ["LayerNormalization"]
    assert model.graph.node(0).inputs[0].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
    assert not apply(norm.RULES, model).rewrites
    feeds = make_feeds(proto, 0, dim=4)
    compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.REORDERED, 5e-3)


@pytest.mark.parametrize(
    "change",
    [
        ("n = ReduceMean(w, last)", "o = Relu(w) n = ReduceMean(o, last)"),  # another mean
        ("w = Cast<to=1>(x)", "a = Abs(x) w = Cast<to=1>(a)"),  # of another value
        ("n = ReduceMean(w, last)", "n = ReduceMean(w, two)"),  # over another axis
    ],
)
def test_other_variances_stay(change: tuple[str, str]) -> None:
    text = TEXT.replace(*change).replace("last = {-1}>", "last = {-1}, int64[1] two = {1}>")
    model = ir.from_proto(parse(text, opset=18))
    assert not apply(norm.RULES, model).rewrites
