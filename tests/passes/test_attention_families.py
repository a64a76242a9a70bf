"""Attention as whole families of models write it: masks of their own making between scores and Softmax."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import attention

import graphopt
from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run

QKV = "float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
KT = "t = Transpose<perm=[0,1,3,2]>(k)"
SOFT = "p = Softmax(z) y = MatMul(p, v)"
LOWEST = "-3.4028234663852886e38"


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _fused(proto: onnx.ModelProto, *, rules: object = attention.RULES) -> ir.Model:
    model = ir.from_proto(proto)
    apply(rules, model)  # type: ignore[arg-type]
    assert "Attention" in _kinds(model)
    return model


@pytest.mark.parametrize("low", [LOWEST, "-inf", "-1e9"])
@pytest.mark.parametrize("order", ["c, low, a", "c, a, low"])
def test_choice_for_all_queries_alike(order: str, low: str) -> None:
    """[B, 1, 1, L], as XLM and DistilBERT mask padding; also where nothing of a row is left."""
    proto = parse(
        f"g ({QKV}, bool[B,1,1,L] c) => (float[B,2,S,4] y) <float low = {{{low}}}>"
        f" {{ {KT} a = MatMul(q, t) z = Where({order}) {SOFT} }}",
        opset=23,
    )
    made = ir.to_proto(_fused(proto))
    feed = make_feeds(proto, 0, dim=4)
    feed["q"] = np.concatenate([feed["q"], -feed["q"]], axis=2)  # more queries than keys
    for row in ([True] * 4, [False] * 4, [True, False, False, True]):
        feed["c"][0] = row
        np.testing.assert_allclose(run(made, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)


def test_choice_that_broadens_the_scores_stays() -> None:
    check(
        attention.RULES,
        "g (float[B,2,1,4] q, float[B,2,1,4] k, float[B,2,L,4] v, bool[B,1,1,L] c) => (float[B,2,1,4] y)"
        f" <float low = {{-inf}}> {{ {KT} a = MatMul(q, t) z = Where(c, a, low) {SOFT} }}",
        opset=23,
        missed="does not end in [S, L]",
    )


TABLE = "float[2,1,6] table = {0,-1,-2,-3,-4,-5,0,-2,-4,-6,-8,-10}"
INTS = "int64[1] six = {6}, int64[1] far = {9223372036854775807}, int64[1] two = {2}"
BEHIND = "n = Shape<start=2, end=3>(k) f = Sub(six, n) b = Slice(table, f, far, two)"


def test_bias_cut_from_the_end_of_a_table() -> None:
    """`table[:, :, 6 - L:]`, as of ALiBi: of unknown size, but as many as keys where the product takes them."""
    proto = parse(
        f"g ({QKV}, bool[B,1,S,L] c) => (float[B,2,S,4] y) <{TABLE}, {INTS}, float low = {{{LOWEST}}}>"
        f" {{ {BEHIND} {KT} a = MatMul(q, t) m = Where(c, b, low) z = Add(a, m) {SOFT} }}",
        opset=23,
    )
    made = ir.to_proto(_fused(proto))
    for size in (1, 3, 6):
        feed = make_feeds(proto, size, dim=size)
        compare(run(proto, feed), run(made, feed), Numerics.REORDERED, 1e-5)
        feed["c"][:] = False
        compare(run(proto, feed), run(made, feed), Numerics.REORDERED, 1e-5)


def test_bias_of_another_length_than_keys_and_values_stays() -> None:
    """Keys and values of sizes that nothing says are one: the mask may broaden the scores."""
    check(
        attention.RULES,
        "g (float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,M,4] v, bool[B,1,S,L] c) => (float[B,2,S,4] y)"
        f" <{TABLE}, {INTS}, float low = {{{LOWEST}}}>"
        f" {{ {BEHIND} {KT} a = MatMul(q, t) m = Where(c, b, low) z = Add(a, m) {SOFT} }}",
        opset=23,
        missed="does not end in [S, L]",
    )


@pytest.mark.parametrize(
    ("bias", "fuses"),
    [("i = Cast<to=1>(d) b = Mul(slopes, i)", True), ("b = Mul(slopes, f)", False)],
)
def test_bias_of_slopes_and_places(bias: str, fuses: bool) -> None:
    """As of BLOOM: an integer times a constant of each head is finite, whatever it is; a number from outside is not."""
    proto = parse(
        f"g ({QKV}, int64[B,1,1,L] d, float[B,1,1,L] f, bool[B,1,S,L] c) => (float[B,2,S,4] y)"
        f" <float[2,1,1] slopes = {{0.5, 0.25}}, float zero = {{0.0}}, float low = {{{LOWEST}}}>"
        f" {{ {bias} w = Where(c, zero, low) m = Add(b, w) {KT} a = MatMul(q, t) z = Add(a, m) {SOFT} }}",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    assert ("Attention" in _kinds(model)) == fuses
    feed = make_feeds(proto, 0, dim=4)
    feed["d"] = np.arange(16).reshape(4, 1, 1, 4) - 3
    feed["c"][:, :, 1] = False
    compare(run(proto, feed), run(ir.to_proto(model), feed), Numerics.REORDERED, 1e-5)


@pytest.mark.parametrize(("floor", "fuses"), [("low", True), ("f", False)])
def test_mask_that_is_limited_from_below(floor: str, fuses: bool) -> None:
    """Of no row is everything -infinity then; two unknown numbers of every head say nothing."""
    proto = parse(
        f"g ({QKV}, float[B,2,S,L] f, bool[B,2,S,L] c) => (float[B,2,S,4] y)"
        f" <float zero = {{0.0}}, float low = {{{LOWEST}}}, float none = {{-inf}}>"
        f" {{ w = Where(c, zero, none) m = Max(w, {floor}) {KT} a = MatMul(q, t) z = Add(a, m) {SOFT} }}",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    assert ("Attention" in _kinds(model)) == fuses
    feed = make_feeds(proto, 0, dim=4)
    feed["c"][:, :, 1] = False
    compare(run(proto, feed), run(ir.to_proto(model), feed), Numerics.REORDERED, 1e-5)


def test_choice_of_a_number_that_scores_fall_below() -> None:
    """-1e4 instead of scores: keys that come later outweigh all that a query sees where its scores are lower still.

    No rounding: in float64 it is so, too.  Attention cannot say it, so verification leaves the fusion out.
    """
    shape = "float[1,1,4,64]"
    proto = parse(
        f"g ({shape} q, {shape} k, {shape} v) => ({shape} y) <float low = {{-1e4}},"
        " bool[4,4] c = {1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}>"
        f" {{ {KT} a = MatMul(q, t) z = Where(c, a, low) {SOFT} }}",
        opset=23,
    )
    feed = {name: np.ones((1, 1, 4, 64), np.float32) for name in "qkv"}
    feed["q"][:], feed["v"][..., 1:, :] = -200.0, 2.0
    fused = ir.to_proto(_fused(proto))
    scores = feed["q"].astype(np.float64) @ feed["k"].astype(np.float64).swapaxes(2, 3)
    seen = np.tril(np.ones((4, 4), bool))
    for made, hidden, first in ((proto, -1e4, 2.0), (fused, -np.inf, 1.0)):
        held = np.where(seen, scores, hidden)
        shares = np.exp(held - held.max(-1, keepdims=True))
        exact = shares / shares.sum(-1, keepdims=True) @ feed["v"].astype(np.float64)
        np.testing.assert_allclose(run(made, feed)[0], exact, rtol=1e-5)
        assert exact[0, 0, 0, 0] == first
    result = graphopt.optimize(proto, target="cpu")
    assert result.report.verification.passed
    assert "fuse-attention" in {each.rule for each in result.report.rolled_back}
    assert "Attention" not in _kinds(result.model)


OPEN = (
    "g (float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,{v},4] v, {mask} m) => (float[B,2,S,4] y)"
    " <float low = {{-1e9}}> {{ {kt} a = MatMul(q, t) z = {score} p = Softmax(z) y = MatMul(p, v) }}"
)


@pytest.mark.parametrize(
    "mask", ["float[B,1,S,X]", "float[S,X]", "float[B,1,1,X]", "bool[1,1,1,X]"]
)
def test_mask_of_as_many_keys_as_nobody_says(mask: str) -> None:
    """As torch.export names the sizes of each input apart: it may be one for all keys."""
    score = "Where(m, a, low)" if mask.startswith("bool") else "Add(a, m)"
    proto = parse(OPEN.format(v="L", mask=mask, kt=KT, score=score), opset=23)
    made = ir.to_proto(_fused(proto))
    for keys in (4, 1):
        feed = make_feeds(proto, keys, dim=4)
        feed["m"] = feed["m"][..., :keys]
        np.testing.assert_allclose(run(made, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5)
    feed = make_feeds(proto, 2, dim=4)
    feed["m"] = feed["m"][..., :3]
    with pytest.raises(Exception, match=r"[Bb]roadcast|xpand"):  # as the original refuses it
        run(made, feed)


@pytest.mark.parametrize(("mask", "v"), [("float[B,1,R,X]", "L"), ("float[B,1,S,X]", "M")])
def test_mask_of_unknown_rows_or_of_other_values_stays(mask: str, v: str) -> None:
    check(
        attention.RULES,
        OPEN.format(v=v, mask=mask, kt=KT, score="Add(a, m)"),
        opset=23,
        missed="does not end in [S, L]",
    )


HEADS = "g (float[1,2,3,4] q, float[1,2,4,5] k, float[1,2,5,4] v) => (float[{0},2,3,4] y)"


@pytest.mark.parametrize(
    ("held", "body", "after"),
    [
        ("float[2,1,1] c", "a = MatMul(q, k) z = Mul(a, c)", "<scale=1.0>(r, t, v)"),
        ("float[1,2,1,1] c", "a = MatMul(q, k) z = Div(a, c)", "<scale=1.0>(r, t, v)"),
        ("float[2,1,1] c", "b = Mul(q, c) z = MatMul(b, k)", "<scale=1.0>(r, t, v)"),
        ("float[4] c, float h = {0.5}", "b = Mul(q, c) a = MatMul(b, k) z = Mul(a, h)", "<scale=0.5>(r, t, v)"),
        ("float[2,1,1] c, float[2,3,5] m", "a = MatMul(q, k) b = Mul(a, c) z = Add(b, m)", "<scale=1.0>(r, t, v, m)"),
    ],
    ids=["scores", "divided", "queries", "features", "masked"],
)  # fmt: skip
def test_scale_of_each_head(held: str, body: str, after: str) -> None:
    """As Swin 2 and XCiT scale cosines: the queries are scaled, which are no more than the scores."""
    kind = "Div" if "Div" in body else "Mul"
    check(
        attention.RULES,
        f"{HEADS.format(1)} <{held}> {{ {body} p = Softmax(z) y = MatMul(p, v) }}",
        f"{HEADS.format(1)} <{held.replace(', float h = {0.5}', '')}> {{ "
        f" t = Transpose<perm=[0,1,3,2]>(k) r = {kind}(q, c) y = Attention{after} }}",
        opset=23,
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("held", "body"),
    [
        ("float[2,3,1] c", "a = MatMul(q, k) z = Mul(a, c)"),
        ("float[5] c", "a = MatMul(q, k) z = Mul(a, c)"),
        ("float[2,1,1] c", "d = Mul(k, c) z = MatMul(q, d)"),
        ("float[2,2,1,1] c", "a = MatMul(q, k) z = Mul(a, c)"),
    ],
    ids=["query", "key", "keys", "images"],
)
def test_scale_of_something_else_stays(held: str, body: str) -> None:
    batch = 2 if "2,2,1,1" in held else 1
    check(
        attention.RULES,
        f"{HEADS.format(batch)} <{held}> {{ {body} p = Softmax(z) y = MatMul(p, v) }}",
        opset=23,
    )


def test_scale_that_is_no_number_stays() -> None:
    proto = parse(
        f"{HEADS.format(1)} <float[2,1,1] c = {{1.0, inf}}> {{ a = MatMul(q, k) z = Mul(a, c) p = Softmax(z)"
        " y = MatMul(p, v) }",
        opset=23,
    )
    assert not apply(attention.RULES, ir.from_proto(proto)).rewrites
