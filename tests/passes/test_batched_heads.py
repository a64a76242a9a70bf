"""Heads that count as rows of the batch, in products of three axes, taken out of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import attention, batched_heads, biases

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run

QKV = "float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
SHAPES = (
    "b = Shape<start=0, end=1>(q) s = Shape<start=2, end=3>(q) l = Shape<start=2, end=3>(k)"
    " rows = Mul(b, two) qs = Concat<axis=0>(rows, s, four) ks = Concat<axis=0>(rows, l, four)"
    " heads = Concat<axis=0>(b, two, s, l) merged = Concat<axis=0>(rows, s, l)"
)
INTS = "int64[1] two = {2}, int64[1] four = {4}, float c = {0.5}"
SCORES = "q3 = Reshape(q, qs) k3 = Reshape(k, ks) t = Transpose<perm=[0,2,1]>(k3) a = MatMul(q3, t)"
WEIGHTS = "p = Softmax(z) p3 = Reshape(p, merged) v3 = Reshape(v, ks) y = MatMul(p3, v3)"
LATE = "z3 = Reshape(z, merged) p3 = Softmax(z3) v3 = Reshape(v, ks) y = MatMul(p3, v3)"


def _text(middle: str, end: str = WEIGHTS, more: str = "", held: str = "") -> str:
    return (
        f"g ({QKV}{more}) => (float[R,S,4] y) <{INTS}{held}> {{ {SHAPES} {SCORES} {middle} {end} }}"
    )


def _ranks(model: ir.Model) -> list[int]:
    """How many axes the results of products have."""
    return [len(node.outputs[0].shape or ()) for node in model.graph if node.op_type == "MatMul"]


def _apart(text: str, *, target: str = "cpu") -> tuple[onnx.ModelProto, ir.Model]:
    proto = parse(text)
    model = ir.from_proto(proto)
    apply(batched_heads.RULES, model, target=target)
    got = ir.to_proto(model)
    onnx.checker.check_model(got, full_check=True)
    for size in (3, 1):
        feed = make_feeds(proto, size, dim=size)
        if "b3" in feed:
            feed["b3"] = np.repeat(feed["b3"][:1], 2 * size, axis=0)
        compare(run(proto, feed), run(got, feed), Numerics.EXACT, 0.0)
    return proto, model


@pytest.mark.parametrize("end", [WEIGHTS, LATE, LATE.replace("Softmax(z3)", "Softmax<axis=2>(z3)")])
@pytest.mark.parametrize(
    "middle",
    [
        "z = Reshape(a, heads)",
        "i = Mul(a, c) z = Reshape(i, heads)",
        "i = Div(a, c) z = Reshape(i, heads)",
    ],
)
def test_products_of_heads_have_four_axes(middle: str, end: str) -> None:
    """As of XGLM, which views the scores for the mask, and as of BLOOM, which views the weights."""
    _, model = _apart(_text(middle, end))
    assert _ranks(model) == [4, 4]


def test_what_is_added_to_rows_of_heads_is_parted() -> None:
    """As `baddbmm` adds the bias of BLOOM; then masks are joined, and it is attention."""
    text = _text(
        "i = Mul(a, c) j = Add(i, b3) h = Reshape(j, heads) z = Add(h, m)",
        more=", float[R,1,L] b3, float[S,L] m",
    )
    text = text.replace(SHAPES, f"{SHAPES} r3 = Concat<axis=0>(rows, one, l) bb = Reshape(b3, r3)")
    text = text.replace("Add(i, b3)", "Add(i, bb)").replace(
        "<int64[1] two", "<int64[1] one = {1}, int64[1] two"
    )
    _, model = _apart(text)
    assert _ranks(model) == [4, 4]
    model = ir.from_proto(ir.to_proto(model))
    apply((*biases.RULES, *batched_heads.RULES), model)
    sums = [node for node in model.graph if node.op_type == "Add"]
    assert all(v.producer() is None or v.producer().op_type != "Add" for v in sums[0].inputs if v)  # type: ignore[union-attr]


def test_weights_that_are_cast_are_apart() -> None:
    """Softmax in float32 of halves, cast back before the product."""
    end = (
        "z3 = Reshape(z, merged) f = Cast<to=1>(z3) w = Softmax(f) p3 = Cast<to=10>(w)"
        " v3 = Reshape(v, ks) y = MatMul(p3, v3)"
    )
    text = _text("z = Reshape(a, heads)", end).replace("float[", "float16[")
    model = ir.from_proto(parse(text.replace("float c = {0.5}", "float c = {0.5}")))
    apply(batched_heads.RULES, model)
    assert _ranks(model) == [4, 4]


@pytest.mark.parametrize(
    ("change", "ranks"),
    [
        (("p = Softmax(z)", "p = Relu(z)"), [4, 3]),
        (("i = Mul(a, c)", "i = Mul(a, cs)"), [3, 4]),
        (("i = Mul(a, c)", "i = Div(c, a)"), [3, 4]),
        (("i = Mul(a, c)", "i = Add(a, c)"), [3, 4]),
    ],
)
def test_other_products_keep_three_axes(change: tuple[str, str], ranks: list[int]) -> None:
    text = _text("i = Mul(a, c) z = Reshape(i, heads)", held=", float[1,1,1] cs = {0.5}")
    model = ir.from_proto(parse(text.replace(*change)))
    apply(batched_heads.RULES, model)
    assert _ranks(model) == ranks


def test_softmax_over_queries_keeps_three_axes() -> None:
    model = ir.from_proto(
        parse(_text("z = Reshape(a, heads)", LATE.replace("Softmax", "Softmax<axis=1>")))
    )
    apply(batched_heads.RULES, model)
    assert _ranks(model) == [4, 3]


def test_views_that_are_none_of_heads_stay() -> None:
    """Rows of the batch that never were heads."""
    check(
        batched_heads.RULES,
        "g (float[6,S,4] q, float[6,4,L] k) => (float[3,2,S,L] y) <int64[4] heads = {3, 2, 0, -1},"
        " int64[3] whole = {6, -1, 4}> { a = MatMul(q, k) n = Shape<start=1, end=2>(q) l = Shape<start=2, end=3>(k)"
        " three = Constant<value_ints=[3, 2]>() s = Concat<axis=0>(three, n, l) y = Reshape(a, s) }",
    )


def test_portable_models_keep_three_axes() -> None:
    _, model = _apart(_text("z = Reshape(a, heads)", LATE), target="portable")
    assert _ranks(model) == [4, 3]


def test_attention_comes_of_it() -> None:
    text = _text("h = Reshape(a, heads) z = Add(h, m)", LATE, more=", float[B,1,S,L] m")
    model = ir.from_proto(parse(text, opset=23))
    apply((*batched_heads.RULES, *attention.RULES), model)
    assert "Attention" in [node.op_type for node in model.graph]
