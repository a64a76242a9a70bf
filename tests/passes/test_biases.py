"""What is added to scores before a Softmax: joined, and taken out of the view of windows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import biases

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run

QKV = "float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
KT = "t = Transpose<perm=[0,1,3,2]>(k)"
TWICE = f"{KT} a = MatMul(q, t) z = Add(a, m) x = Add(z, n) p = Softmax(x) y = MatMul(p, v)"
ONCE = f"{KT} a = MatMul(q, t) w = Add(m, n) z = Add(a, w) p = Softmax(z) y = MatMul(p, v)"


@pytest.mark.parametrize("opset", [14, 23])
def test_two_masks_become_one(opset: int) -> None:
    """Also below the opset of Attention, so that lift-opset sees it."""
    io = f"g ({QKV}, float[1,2,S,L] m, float[B,1,S,L] n) => (float[B,2,S,4] y)"
    check(biases.RULES, f"{io} {{ {TWICE} }}", f"{io} {{ {ONCE} }}", opset=opset, tolerance=1e-5)


@pytest.mark.parametrize(
    ("inputs", "body", "target"),
    [
        # scores of relative positions, which are computed of the queries
        (", float[B,2,4,L] r, float[S,L] n", f"m = MatMul(q, r) {TWICE}", "cpu"),
        (", float[S,L] m, float[S,L] n", TWICE.replace("Softmax", "LogSoftmax"), "cpu"),
        (", float[S,L] m, float[S,L] n", TWICE, "portable"),
    ],
)
def test_two_masks_stay(inputs: str, body: str, target: str) -> None:
    check(
        biases.RULES,
        f"g ({QKV}{inputs}) => (float[B,2,S,4] y) {{ {body} }}",
        opset=23,
        target=target,
    )


def _windows(batch: str, mask: str, opset: int = 17) -> ir.Model:
    return ir.from_proto(parse(_text(batch, mask), opset=opset))


def _text(batch: str, mask: str) -> str:
    scores = f"float[{batch},2,5,4] q, float[{batch},2,4,5] k, {mask} m"
    return (
        f"g ({scores}) => (float[{batch},2,5,5] y)"
        " <int64[5] five = {-1,3,2,5,5}, int64[4] four = {-1,2,5,5}> { a = MatMul(q, k)"
        " r = Reshape(a, five) z = Add(r, m) s = Reshape(z, four) y = Softmax(s) }"
    )


@pytest.mark.parametrize(
    ("batch", "mask", "kinds"),
    [
        ("3", "float[1,3,1,5,5]", ["MatMul", "Squeeze", "Add", "Softmax"]),
        ("6", "float[3,1,5,5]", ["MatMul", "Tile", "Add", "Softmax"]),
        ("6", "float[1,3,2,5,5]", ["MatMul", "Squeeze", "Tile", "Add", "Softmax"]),
        ("N", "float[3,1,5,5]", ["MatMul", "Shape", "Slice", "Div", "Concat", "Tile", "Add", "Softmax"]),
    ],
)  # fmt: skip
def test_mask_of_windows(batch: str, mask: str, kinds: list[str]) -> None:
    model = _windows(batch, mask)
    apply(biases.RULES, model)
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == kinds
    proto = parse(_text(batch, mask), opset=17)
    feeds = make_feeds(proto, 0, dim=6)
    compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.REORDERED, 1e-6)


@pytest.mark.parametrize(
    ("batch", "mask", "change"),
    [
        ("6", "float[2,3,1,5,5]", ("", "")),  # another mask for each image
        ("6", "float[1,3,1,1,5]", ("", "")),
        ("6", "float[5,5]", ("", "")),
        ("6", "float[1,3,1,5,5]", ("Softmax", "Relu")),
        ("6", "float[1,3,1,5,5]", ("four = {-1,2,5,5}", "four = {2,-1,5,5}")),
    ],
)
def test_other_masks_of_views_stay(batch: str, mask: str, change: tuple[str, str]) -> None:
    text = _text(batch, mask).replace(*change) if change[0] else _text(batch, mask)
    text = (
        text.replace("=> (float[6,2,5,5] y)", "=> (float[2,6,5,5] y)") if "{2,-1" in text else text
    )
    check(biases.RULES, text, opset=17)


def test_portable_models_of_unknown_batch_stay() -> None:
    check(biases.RULES, _text("N", "float[3,1,5,5]"), opset=17, target="portable", dims=(6, 3))


def _choice(choose: str, low: str, dtype: str = "float", tail: str = "p = Softmax(w)") -> str:
    io = f"g ({QKV}, bool[1,1,S,L] c, float[B,1,1,L] b) => (float[B,2,S,4] y)".replace(
        "float", dtype
    )
    return (
        f"{io} <{dtype} low = {{{low}}}, {dtype} scale = {{{'0.5' if dtype == 'float' else '14336'}}}> {{ {KT}"
        f" m = MatMul(q, t) a = Mul(m, scale) z = {choose} w = Add(z, b) {tail} y = MatMul(p, v) }}"
    )


@pytest.mark.parametrize(
    ("choose", "joined"),
    [("Where(c, a, low)", "Where(c, zero, low)"), ("Where(c, low, a)", "Where(c, low, zero)")],
)
@pytest.mark.parametrize("low", ["-3.4028234663852886e38", "-inf"])
def test_choice_and_mask_become_one_mask(choose: str, joined: str, low: str) -> None:
    """As of GPT-2: rows that both hide are what they were."""
    before = _choice(choose, low)
    after = before.replace(
        f"z = {choose} w = Add(z, b)", f"h = {joined} n = Add(h, b) w = Add(a, n)"
    )
    after = after.replace("> {", ", float zero = {0.0}> {", 1)
    rng, feeds = np.random.default_rng(0), []
    for hidden in (-1e4, -3.4028234663852886e38, *([] if low == "-inf" else [-np.inf])):
        feed = make_feeds(parse(before), 0, dim=5)
        feed["c"] = rng.random((1, 1, 5, 5)) < 0.5
        feed["c"][..., 0, 1:], feed["c"][..., 0] = False, True
        feed["b"][:] = np.where(np.arange(5) < 2, np.float32(hidden), np.float32(0))
        feeds.append(feed)
    check(biases.RULES, before, after, feeds=feeds, tolerance=1e-5)


@pytest.mark.parametrize(
    ("body", "missed"),
    [
        (_choice("Where(c, a, low)", "-1e4"), "would mix"),  # scores count beside it
        (_choice("Where(c, a, low)", "64511", "float16"), "would mix"),
        (_choice("Where(c, b, low)", "-inf").replace("Add(z, b)", "Add(z, a)"), ""),
        (_choice("Where(c, a, low)", "-inf", tail="p = Relu(w)"), ""),
        (
            _choice("Where(c, a, low)", "-inf").replace("float[B,1,1,L] b", "float[B,1,1,M] b"),
            "known",
        ),
    ],
)
def test_choice_and_mask_stay(body: str, missed: str) -> None:
    check(biases.RULES, body, missed=missed, tolerance=1e-2)


def test_choice_and_mask_of_half_precision_join_where_nothing_is_left() -> None:
    model = ir.from_proto(parse(_choice("Where(c, a, low)", "64512", "float16")))
    apply(biases.RULES, model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.index("Where") < kinds.index("Softmax")
    where = next(node for node in model.graph if node.op_type == "Where")
    assert [user.op_type for user, _ in where.outputs[0].uses()] == ["Add"]
    assert all(v.producer() is None or v.producer().op_type != "Mul" for v in where.inputs if v)  # type: ignore[union-attr]


SCALED = f"g ({QKV}, float[B,1,S,L] m) => (float[B,2,S,4] y) <float c = {{2.5}}>"
SOFT = "p = Softmax(w) y = MatMul(p, v)"


@pytest.mark.parametrize("kind", ["Div", "Mul"])
def test_scale_goes_before_the_mask(kind: str) -> None:
    """As of CodeGen; the mask is scaled for all heads at once, and a number that is chosen for good."""
    check(
        biases.RULES,
        f"{SCALED} {{ {KT} a = MatMul(q, t) z = Add(a, m) w = {kind}(z, c) {SOFT} }}",
        f"{SCALED} {{ {KT} a = MatMul(q, t) s = {kind}(a, c) n = {kind}(m, c) w = Add(s, n) {SOFT} }}",
        tolerance=1e-5,
    )
    choice = SCALED.replace("float[B,1,S,L] m", "bool[B,1,S,L] m")
    held = choice.replace("{2.5}>", "{2.5}, float low = {-1e9}>")
    for order, scaled in (("a, low", "s, n"), ("low, a", "n, s")):
        check(
            biases.RULES,
            f"{held} {{ {KT} a = MatMul(q, t) z = Where(m, {order}) w = {kind}(z, c) {SOFT} }}",
            f"{held} {{ {KT} a = MatMul(q, t) s = {kind}(a, c) n = {kind}(low, c) w = Where(m, {scaled}) {SOFT} }}",
            tolerance=1e-5,
        )


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (("{2.5}", "{-2.5}"), ""),
        (("Div(z, c)", "Div(c, z)"), ""),
        (("Softmax(w)", "Relu(w)"), ""),
        (("Add(a, m)", "Add(m, m)"), ""),
    ],
)
def test_other_scales_of_masked_scores_stay(change: tuple[str, str], missed: str) -> None:
    body = f"{SCALED} {{ {KT} a = MatMul(q, t) z = Add(a, m) w = Div(z, c) {SOFT} }}"
    changed = body.replace(*change)
    if "Add(m, m)" in changed:  # no product at all
        changed = changed.replace("[B,1,S,L] m", "[B,2,S,L] m").replace(
            f"{KT} a = MatMul(q, t) ", ""
        )
    check(biases.RULES, changed, missed=missed, dims=(3,), tolerance=1e-4)


CHOSEN = (
    f"g ({QKV}, bool[B,1,S,L] c, float[2,1,L] b) => (float[B,2,S,4] y) <float low = {{LOW}}>"
    f" {{ {KT} a = MatMul(q, t) CHOOSE {SOFT} }}"
)


@pytest.mark.parametrize("low", ["-3.4028234663852886e38", "-inf"])
@pytest.mark.parametrize(
    ("choose", "joined"),
    [
        ("z = Add(a, b) w = Where(c, z, low)", "n = Where(c, b, low) w = Add(a, n)"),
        ("z = Add(a, b) w = Where(c, low, z)", "n = Where(c, low, b) w = Add(a, n)"),
    ],
)
def test_bias_and_choice_become_one_mask(choose: str, joined: str, low: str) -> None:
    """As of MPT, also where nothing is left of a row."""
    before = CHOSEN.replace("LOW", low).replace("CHOOSE", choose)
    feed = make_feeds(parse(before), 0, dim=4)
    feed["c"][:, :, 1] = True
    feed["c"][:, :, 2] = low == "-inf"  # else nothing, or everything, is left
    feed["c"][:, :, 0] = np.arange(4) < 2
    feed["c"][:, :, 3] = np.arange(4) == 1
    if low == "-inf":
        feed["c"][:, :, 1:3] = np.arange(4) > 1
    after = before.replace(choose, joined)
    check(biases.RULES, before, after, feeds=[feed], tolerance=1e-5)


@pytest.mark.parametrize(
    ("low", "change", "missed"),
    [
        ("-1e4", ("", ""), "would mix"),
        ("-inf", ("Softmax", "Relu"), ""),
        ("-inf", ("Add(a, b)", "Add(b, b)"), ""),
    ],
)
def test_bias_and_choice_stay(low: str, change: tuple[str, str], missed: str) -> None:
    text = CHOSEN.replace("LOW", low).replace("CHOOSE", "z = Add(a, b) w = Where(c, z, low)")
    ctx = apply(biases.RULES, ir.from_proto(parse(text.replace(*change))))
    assert not ctx.rewrites
    assert not missed or any(missed in remark.reason for remark in ctx.remarks)


LIMITED = (
    f"g ({QKV}, bool[B,1,S,L] c) => (float[B,2,S,4] y) <float low = {{LOW}}, float zero = {{0.0}}>"
    f" {{ {KT} a = MatMul(q, t) m = Where(c, zero, low) z = Add(a, m) w = LIMIT {SOFT} }}"
)


@pytest.mark.parametrize(
    ("limit", "made"), [("Max(z, low)", "Max(m, low)"), ("Max(low, z)", "Max(m, low)")]
)
def test_limit_of_masked_scores_is_one_of_the_mask(limit: str, made: str) -> None:
    """As of OPT and XGLM; a row without keys stays even."""
    text = LIMITED.replace("LOW", "-3.4028234663852886e38")
    before = text.replace("LIMIT", limit)
    after = text.replace("z = Add(a, m) w = LIMIT", f"n = {made} w = Add(a, n)")
    feed = make_feeds(parse(before), 0, dim=4)
    feed["c"][:, :, 1], feed["c"][:, :, 0] = False, True
    check(biases.RULES, before, after, feeds=[feed, make_feeds(parse(before), 1)], tolerance=1e-5)


@pytest.mark.parametrize(
    ("low", "change", "missed"),
    [
        ("-1e4", ("", ""), "not so low"),
        ("-3e38", ("Softmax", "Relu"), ""),
        ("-3e38", ("Add(a, m)", "Add(m, m)"), ""),
        ("-3e38", ("Max(z, low)", "Max(z, low, low)"), ""),
    ],
)
def test_other_limits_stay(low: str, change: tuple[str, str], missed: str) -> None:
    text = LIMITED.replace("LOW", low).replace("LIMIT", "Max(z, low)")
    ctx = apply(biases.RULES, ir.from_proto(parse(text.replace(*change))))
    assert not ctx.rewrites
    assert not missed or any(missed in remark.reason for remark in ctx.remarks)


LARGE = "g (float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v, float[B,2,S,L] m) => (float[B,2,S,4] y)"


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_scale_goes_before_a_bias_as_large_as_the_scores(target: str) -> None:
    """That of the scores goes into attention, so that no more is scaled than before; without attention, more would."""
    head = f"{LARGE} <float c = {{2.5}}> {{ {KT} a = MatMul(q, t)"
    before = f"{head} z = Add(a, m) w = Div(z, c) {SOFT} }}"
    after = (
        f"{head} s = Div(a, c) n = Div(m, c) w = Add(s, n) {SOFT} }}" if target == "cpu" else None
    )
    missed = "" if after else "as large as the scores"
    check(biases.RULES, before, after, target=target, missed=missed, tolerance=1e-5)


def test_scale_goes_before_a_choice_and_a_bias() -> None:
    """As Conformers scale the sum of two products, and then mask it."""
    head = (
        f"{LARGE.replace(') =>', ', bool[B,1,1,L] c) =>')} <float s = {{2.5}}, float inf = {{-inf}}>"
        f" {{ {KT} a = MatMul(q, t)"
    )
    check(
        biases.RULES,
        f"{head} z = Add(a, m) x = Div(z, s) w = Where(c, inf, x) {SOFT} }}",
        f"{head} x = Div(a, s) n = Div(m, s) o = Where(c, inf, n) w = Add(x, o) {SOFT} }}",
        tolerance=1e-5,
    )


RELATIVE = (
    "g (float[B,2,3,4] q, float[B,2,4,3] k, float[B,2,3,4] u, float[B,2,4,5] r, float[B,2,3,4] v, bool[B,1,1,3] c)"
    " => (float[B,2,3,4] y) <float inf = {-inf}, int64[1] one = {1}, int64[1] four = {4}, int64[1] last = {3}>"
    " { a = MatMul(q, k) d = MatMul(u, r) b = Slice(d, one, four, last)"
)


@pytest.mark.parametrize("order", ["a, b", "b, a"])
def test_scores_of_relative_positions_are_a_bias(order: str) -> None:
    """Both are products; the one whose elements were moved about is not that of queries and keys."""
    check(
        biases.RULES,
        f"{RELATIVE} z = Add({order}) w = Where(c, inf, z) {SOFT} }}",
        f"{RELATIVE} o = Where(c, inf, b) w = Add(a, o) {SOFT} }}",
        tolerance=1e-5,
    )


def test_two_products_alike_stay() -> None:
    check(
        biases.RULES,
        f"{RELATIVE} e = MatMul(u, k) z = Add(a, e) w = Where(c, inf, z) {SOFT} }}".replace(
            "d = MatMul(u, r) b = Slice(d, one, four, last)", ""
        ),
        tolerance=1e-5,
    )


AGAIN = f"g ({QKV}, bool[B,1,S,L] c) => (float[B,2,S,4] y) <float zero = {{0.0}}, float low = {{@}}> {{ {KT}"
TAIL = "p = Softmax(w) o = Where(c, zero, p) y = MatMul(o, v) }"


def test_masked_twice() -> None:
    """As NeMo masks scores with -1e4, and weights with zero: the first may be -infinity."""
    proto = parse(f"{AGAIN.replace('@', '-1e4')} a = MatMul(q, t) w = Where(c, low, a) {TAIL}")
    feeds = make_feeds(proto, 0)
    feeds["c"][0, 0, 0] = True
    check(
        biases.RULES,
        f"{AGAIN.replace('@', '-1e4')} a = MatMul(q, t) w = Where(c, low, a) {TAIL}",
        f"{AGAIN.replace('@', '-inf')} a = MatMul(q, t) w = Where(c, low, a) {TAIL}",
        feeds=[feeds],
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("low", "tail", "target"),
    [
        ("-100.0", TAIL, "cpu"),
        ("-1e4", TAIL, "portable"),
        ("-1e4", TAIL.replace("Softmax(w)", "Softmax<axis=2>(w)"), "cpu"),
        ("-1e4", TAIL.replace("o = Where(c, zero, p)", "d = Not(c) e = Not(d) o = Where(e, zero, p)"), "cpu"),
    ],
    ids=["number", "target", "axis", "condition"],
)  # fmt: skip
def test_masked_twice_stays(low: str, tail: str, target: str) -> None:
    text = f"{AGAIN.replace('@', low)} a = MatMul(q, t) w = Where(c, low, a) {tail}"
    check(biases.RULES, text, target=target, tolerance=1e-5)


GRID = (
    "g (float[B,6,4] q, float[B,4,6] k, float[B,2,3,2,1] r, float[B,2,3,1,3] c) => (float[B,6,6] y)"
)
VIEWS = "int64[5] grid = {-1,2,3,2,3}, int64[3] flat = {-1,6,6}"


@pytest.mark.parametrize("order", ["r c", "c r"])
def test_biases_of_rows_and_columns(order: str) -> None:
    """As Segment Anything adds them to a view of the scores."""
    a, b = order.split()
    check(
        biases.RULES,
        f"{GRID} <{VIEWS}> {{ s = MatMul(q, k) v = Reshape(s, grid) d = Add(v, {a}) e = Add(d, {b})"
        " z = Reshape(e, flat) y = Softmax(z) }",
        f"{GRID} <int64[3] flat = {{-1,6,6}}> {{ s = MatMul(q, k) o = Add({a}, {b}) w = Reshape(o, flat)"
        " z = Add(s, w) y = Softmax(z) }",
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("change", "target", "missed"),
    [
        (("float[B,2,3,1,3] c", "float[B,1,3,1,3] c"), "cpu", ""),
        (("float[B,2,3,2,1] r, float[B,2,3,1,3] c", "float[B,2,3,2,1] r, float[B,2,3,1,1] c"), "cpu", "every score"),
        (("y = Softmax(z)", "y = Relu(z)"), "cpu", ""),
        (("MatMul(q, k)", "Relu(x)"), "cpu", ""),
        (("d", "d"), "portable", ""),
    ],
    ids=["broadcast", "missing", "no softmax", "no product", "target"],
)  # fmt: skip
def test_other_biases_of_a_view(change: tuple[str, str], target: str, missed: str) -> None:
    text = (
        f"{GRID.replace(') =>', ', float[B,6,6] x) =>')} <{VIEWS}> {{ s = MatMul(q, k) v = Reshape(s, grid)"
        " d = Add(v, r) e = Add(d, c) z = Reshape(e, flat) y = Softmax(z) }"
    ).replace(*change)
    ctx = apply(biases.RULES, ir.from_proto(parse(text)), target=target)
    assert bool(ctx.rewrites) is (change[1].startswith("float[B,1,3"))
    assert not missed or any(missed in remark.reason for remark in ctx.remarks)
