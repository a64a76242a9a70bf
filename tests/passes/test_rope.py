"""Rotary embeddings out of their parts, in every spelling of the halves and of the angles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import rope

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run

X = "float[B,2,S,4] x"
HALVES = {
    "slices": "a = Slice(x, zero, two, three) b = Slice(x, two, far, three)",
    "steps": "a = Slice(x, zero, two, last, one) b = Slice(x, two, far, last, one)",
    "split": "a, b = Split<axis=-1>(x, sizes)",
}
INTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] last = {-1}, "
    "int64[1] far = {9223372036854775807}, int64[2] sizes = {2, 2}"
)
TURN = "n = Neg(b) r = Concat<axis=-1>(n, a) p = Mul(x, c) q = Mul(r, s) y = Add(p, q)"
ANGLES = "t = Concat<axis=-1>(h, h) c = Cos(t) s = Sin(t)"


def _check(before: str, after: str | None = None, **options: object) -> None:
    check(rope.RULES, before, after, opset=23, tolerance=1e-5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
def test_rotate_half_by_computed_angles(halves: str) -> None:
    _check(
        f"g ({X}, float[B,1,S,2] h) => (float[B,2,S,4] y) <{INTS}> {{ {ANGLES} {halves} {TURN} }}",
        f"g ({X}, float[B,1,S,2] h) => (float[B,2,S,4] y) <int64[1] one = {{1}}> {{"
        " c = Cos(h) d = Squeeze(c, one) s = Sin(h) e = Squeeze(s, one) y = RotaryEmbedding(x, d, e) }",
    )


def test_angles_without_batch_are_repeated() -> None:
    """The operator does not broadcast over the batch."""
    _check(
        f"g ({X}, float[S,2] h) => (float[B,2,S,4] y) <{INTS}> {{ {ANGLES} {HALVES['split']} {TURN} }}",
        f"g ({X}, float[S,2] h) => (float[B,2,S,4] y) <int64[1] zero = {{0}}, int64[2] ones = {{1, 1}}> {{"
        " c = Cos(h) d = Unsqueeze(c, zero) b1 = Shape<start=0, end=1>(x) w1 = Concat<axis=0>(b1, ones)"
        " dd = Expand(d, w1) s = Sin(h) e = Unsqueeze(s, zero) b2 = Shape<start=0, end=1>(x)"
        " w2 = Concat<axis=0>(b2, ones) ee = Expand(e, w2) y = RotaryEmbedding(x, dd, ee) }",
    )


TABLE = "float[3,4] table = {0.1, 0.2, 0.1, 0.2, 0.3, 0.4, 0.3, 0.4, 0.5, 0.6, 0.5, 0.6}"
HALF = "float[3,2] half = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6}"


def test_angles_out_of_a_table() -> None:
    """A cached table, gathered by position, scaled and lifted over the heads."""
    body = (
        "t = Gather(table, i) k = Unsqueeze(t, one) c = Mul(k, scale) s = Unsqueeze(t, one)"
        f" {HALVES['split']} {TURN}"
    )
    after = (
        "t = Gather(half, i) k = Unsqueeze(t, one) c = Mul(k, scale) d = Squeeze(c, one)"
        " u = Gather(half, i) s = Unsqueeze(u, one) e = Squeeze(s, one) y = RotaryEmbedding(x, d, e)"
    )
    _check(
        f"g ({X}, int64[B,S] i) => (float[B,2,S,4] y) <{INTS}, float scale, {TABLE}> {{ {body} }}",
        f"g ({X}, int64[B,S] i) => (float[B,2,S,4] y) <int64[1] one = {{1}}, float scale, {HALF}> {{ {after} }}",
    )


def test_rotated_halves() -> None:
    """The spelling by halves, as of GPT-NeoX in JAX: one angle for each pair from the start."""
    body = (
        "k = Mul(a, c) l = Mul(b, s) m = Sub(k, l) n = Mul(b, c) o = Mul(a, s) p = Add(n, o)"
        " y = Concat<axis=-1>(m, p)"
    )
    angles = "float[B,1,S,2] c, float[B,1,S,2] s"
    _check(
        f"g ({X}, {angles}) => (float[B,2,S,4] y) <{INTS}> {{ {HALVES['slices']} {body} }}",
        f"g ({X}, {angles}) => (float[B,2,S,4] y) <int64[1] one = {{1}}> {{"
        " d = Squeeze(c, one) e = Squeeze(s, one) y = RotaryEmbedding(x, d, e) }",
    )


PARTIAL = "g (float[B,2,S,6] x, float[B,S,2] c, float[B,S,2] s) => (float[B,2,S,6] y)"


def test_partial_rotation() -> None:
    _check(
        f"{PARTIAL} <int64[1] zero = {{0}}, int64[1] four = {{4}}, int64[1] far = {{99}}, int64[1] last = {{3}}> {{"
        " h = Slice(x, zero, four, last) t = Slice(x, four, far, last) r = RotaryEmbedding(h, c, s)"
        " y = Concat<axis=-1>(r, t) }",
        f"{PARTIAL} {{ y = RotaryEmbedding<rotary_embedding_dim=4>(x, c, s) }}",
    )


def test_partial_rotation_with_a_gap_stays() -> None:
    graph = PARTIAL.replace("float[B,2,S,6] y", "float[B,2,S,5] y")
    _check(
        f"{graph} <int64[1] zero = {{0}}, int64[1] four = {{4}}, int64[1] five = {{5}}, int64[1] far = {{99}},"
        " int64[1] last = {3}> {"
        " h = Slice(x, zero, four, last) t = Slice(x, five, far, last) r = RotaryEmbedding(h, c, s)"
        " y = Concat<axis=-1>(r, t) }"
    )


@pytest.mark.parametrize(
    ("angles", "parameter", "missed"),
    [
        ("c = Cos(h) s = Sin(h)", "float[B,1,S,4] h", "copies of the angles"),
        (
            "t = Concat<axis=-1>(h, g1) c = Cos(t) s = Sin(t)",
            "float[B,1,S,2] h",
            "copies of the angles",
        ),
        (ANGLES, "float[B,2,S,2] h", "one per position"),
        (ANGLES, "float[B,1,1,2] h", "one per position"),
    ],
)
def test_other_angles_stay(angles: str, parameter: str, missed: str) -> None:
    extra = ", float[B,1,S,2] g1" if "g1" in angles else ""
    _check(
        f"g ({X}, {parameter}{extra}) => (float[B,2,S,4] y) <{INTS}> {{ {angles} {HALVES['split']} {TURN} }}",
        missed=missed,
    )


@pytest.mark.parametrize(
    "halves",
    [
        "b, a = Split<axis=-1>(x, sizes)",
        "a, b = Split<axis=-1>(x, uneven)",
        "a = Slice(x, zero, two, three) b = Slice(x, one, three, three)",
    ],
)
def test_other_halves_stay(halves: str) -> None:
    _check(
        f"g ({X}, float[B,1,S,2] h) => (float[B,2,S,4] y) <{INTS}, int64[2] uneven = {{1, 3}}> {{"
        f" {ANGLES} {halves} {TURN} }}",
    )


def test_target_without_the_operator() -> None:
    _check(
        f"g ({X}, float[B,1,S,2] h) => (float[B,2,S,4] y) <{INTS}> {{ {ANGLES} {HALVES['split']} {TURN} }}",
        target="portable",
        missed="no RotaryEmbedding",
    )


TABLE4 = "float[1,3,4] c4, float[1,3,4] s4"
PAIR_TABLE = (
    "float[3,4] c = {0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.6, 0.6},"
    " float[3,4] s = {0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1}"
)
PAIR_CACHES = "float[1,3,2] c = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6}, float[1,3,2] s = {0.6, 0.5, 0.4, 0.3, 0.2, 0.1}"
MORE = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] step = {2}, int64[1] last = {-1}, int64[1] far = {99},"
    " int64[4] whole = {1, 2, 3, 4}, int64[5] pairs = {1, 2, 3, 2, 2}, int64 first = {0}, int64 second = {1},"
    " int64[2] ones = {1, 1}"
)
NEIGHBOURS = {
    "steps": "a = Slice(x, zero, far, last, step) b = Slice(x, one, far, last, step)",
    "gathers": "v = Reshape(x, pairs) a = Gather<axis=-1>(v, first) b = Gather<axis=-1>(v, second)",
    "split": "v = Reshape(x, pairs) d, e = Split<axis=-1>(v, ones) a = Squeeze(d, last) b = Squeeze(e, last)",
}
WOVEN = "j = Unsqueeze({0}, last) k = Unsqueeze({1}, last) l = Concat<axis=-1>(j, k) {2} = Reshape(l, whole)"
PRODUCTS = (
    "ac = Mul(a, c) bs = Mul(b, s) lo = Sub(ac, bs) as = Mul(s, a) bc = Mul(c, b) hi = Add(as, bc)"
)


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_rotated_neighbours(pair: str) -> None:
    """Pairs of neighbours, rotated and woven again: GPT-NeoX's other form, LLaMA's own code."""
    _check(
        f"g (float[1,2,3,4] x, float[3,2] c, float[3,2] s) => (float[1,2,3,4] y) <{MORE}> {{ {pair} {PRODUCTS}"
        f" {WOVEN.format('lo', 'hi', 'y')} }}",
        "g (float[1,2,3,4] x, float[3,2] c, float[3,2] s) => (float[1,2,3,4] y) <int64[1] zero = {0}> {"
        " d = Unsqueeze(c, zero) e = Unsqueeze(s, zero) y = RotaryEmbedding<interleaved=1>(x, d, e) }",
    )


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_rotate_every_two(pair: str) -> None:
    """GPT-J's form, its angles a table in which each stands twice."""
    turn = f"n = Neg(b) {WOVEN.format('n', 'a', 'r')} p = Mul(c, x) q = Mul(r, s) y = Add(p, q)"
    _check(
        f"g (float[1,2,3,4] x) => (float[1,2,3,4] y) <{MORE}, {PAIR_TABLE}> {{ {pair} {turn} }}",
        "g (float[1,2,3,4] x) => (float[1,2,3,4] y) <float[3,2] c = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6},"
        " float[3,2] s = {0.6, 0.5, 0.4, 0.3, 0.2, 0.1}, int64[1] zero = {0}> {"
        " d = Unsqueeze(c, zero) e = Unsqueeze(s, zero) y = RotaryEmbedding<interleaved=1>(x, d, e) }",
    )


@pytest.mark.parametrize(
    "angles",
    [
        "t = Gather<axis=-1>(h, twice)",
        "u = Unsqueeze(h, last) w = Tile(u, times) t = Reshape(w, angle)",
        "u = Unsqueeze(h, last) w = Expand(u, wide) t = Reshape(w, angle)",
        "u = Unsqueeze(h, last) w = Concat<axis=-1>(u, u) t = Reshape(w, angle)",
    ],
)
def test_rotate_every_two_by_computed_angles(angles: str) -> None:
    turn = f"n = Neg(b) {WOVEN.format('n', 'a', 'r')} p = Mul(x, c) q = Mul(r, s) y = Add(p, q)"
    held = (
        "int64[4] twice = {0, 0, 1, 1}, int64[3] times = {1, 1, 2}, int64[3] wide = {3, 2, 2},"
        " int64[2] angle = {3, 4}"
    )
    _check(
        f"g (float[1,2,3,4] x, float[3,2] h) => (float[1,2,3,4] y) <{MORE}, {held}> {{ {angles} c = Cos(t)"
        f" s = Sin(t) {NEIGHBOURS['steps']} {turn} }}",
        "g (float[1,2,3,4] x, float[3,2] h) => (float[1,2,3,4] y) <int64[1] zero = {0}> { c = Cos(h)"
        " d = Unsqueeze(c, zero) s = Sin(h) e = Unsqueeze(s, zero)"
        " y = RotaryEmbedding<interleaved=1>(x, d, e) }",
    )


@pytest.mark.parametrize(
    "change",
    [
        ("0.1, 0.1, 0.2", "0.1, 0.7, 0.2"),  # neighbours with different angles
        ("x, one, far, last, step", "x, zero, far, last, step"),  # the same elements twice
        ("l = Concat<axis=-1>(j, k)", "l = Concat<axis=-1>(k, j)"),  # woven the other way
        ("n = Neg(b)", "n = Relu(b)"),
    ],
)
def test_other_neighbours_stay(change: tuple[str, str]) -> None:
    turn = f"n = Neg(b) {WOVEN.format('n', 'a', 'r')} p = Mul(x, c) q = Mul(r, s) y = Add(p, q)"
    text = (
        f"g (float[1,2,3,4] x) => (float[1,2,3,4] y) <{MORE}, {PAIR_TABLE}> {{ {NEIGHBOURS['steps']}"
        f" {turn} }}"
    )
    _check(text.replace(*change))


def test_heads_beside_each_other() -> None:
    """[B, S, H, D] goes in as [B, S, H D]."""
    _check(
        "g (float[B,3,2,4] x, float[3,1,2] h) => (float[B,3,2,4] y)"
        f" <{INTS}> {{ {ANGLES} {HALVES['split']} {TURN} }}",
        "g (float[B,3,2,4] x, float[3,1,2] h) => (float[B,3,2,4] y) <int64[1] one = {1}, int64[1] zero = {0},"
        " int64[2] ones = {1, 1}, int64[3] flat = {0, 0, 8}, int64[4] apart = {0, 0, 2, 4}> {"
        " c = Cos(h) c1 = Squeeze(c, one) c2 = Unsqueeze(c1, zero) b1 = Shape<start=0, end=1>(x)"
        " w1 = Concat<axis=0>(b1, ones) d = Expand(c2, w1)"
        " s = Sin(h) s1 = Squeeze(s, one) s2 = Unsqueeze(s1, zero) b2 = Shape<start=0, end=1>(x)"
        " w2 = Concat<axis=0>(b2, ones) e = Expand(s2, w2)"
        " f = Reshape(x, flat) r = RotaryEmbedding<num_heads=2>(f, d, e) y = Reshape(r, apart) }",
    )


def test_no_heads() -> None:
    _check(
        f"g (float[1,S,4] x, float[1,S,2] h) => (float[1,S,4] y) <{INTS}> {{ {ANGLES} {HALVES['split']} {TURN} }}",
        "g (float[1,S,4] x, float[1,S,2] h) => (float[1,S,4] y) { c = Cos(h) s = Sin(h)"
        " y = RotaryEmbedding<num_heads=1>(x, c, s) }",
    )


def test_halves_cut_out_of_the_whole() -> None:
    """Part of the head is rotated, and its halves are cut out of the whole head."""
    ints = "int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] far = {99}, int64[1] last = {3}"
    _check(
        f"g (float[1,2,S,6] x, float[1,S,2] h) => (float[1,2,S,6] y) <{ints}> {{ t = Concat<axis=-1>(h, h)"
        " c = Cos(t) s = Sin(t) u = Slice(x, zero, four, last) a = Slice(x, zero, two, last)"
        " b = Slice(x, two, four, last) n = Neg(b) r = Concat<axis=-1>(n, a) p = Mul(u, c) q = Mul(r, s)"
        " z = Add(p, q) w = Slice(x, four, far, last) y = Concat<axis=-1>(z, w) }",
        "g (float[1,2,S,6] x, float[1,S,2] h) => (float[1,2,S,6] y) { c = Cos(h) s = Sin(h)"
        " y = RotaryEmbedding<rotary_embedding_dim=4>(x, c, s) }",
    )


def test_partial_rotation_by_split() -> None:
    _check(
        f"{PARTIAL} <int64[2] sizes = {{4, 2}}> {{ h, t = Split<axis=-1>(x, sizes) r = RotaryEmbedding(h, c, s)"
        " y = Concat<axis=-1>(r, t) }",
        f"{PARTIAL} {{ y = RotaryEmbedding<rotary_embedding_dim=4>(x, c, s) }}",
    )


BESIDE = "g (float[B,S,2,6] x, float[B,S,2] c, float[B,S,2] s) => (float[B,S,2,6] y)"
FLAT = "int64[3] flat = {0, 0, 8}, int64[4] apart = {0, 0, 2, 4}"


@pytest.mark.parametrize("pairs", ["", ", interleaved=1"])
def test_partial_rotation_of_heads_beside_each_other(pairs: str) -> None:
    """Of [B, S, H, D], as GPT-J and CodeGen rotate before they move the heads; also out of packed heads."""
    body = (
        f"f = Reshape(h, flat) r = RotaryEmbedding<num_heads=2{pairs}>(f, c, s) u = Reshape(r, apart)"
        " y = Concat<axis=-1>(u, t)"
    )
    held = "int64[3] whole = {0, 0, 12}, int64[4] heads = {0, 0, 2, 6}"
    made = (
        f"w = Reshape(x, whole) r = RotaryEmbedding<num_heads=2{pairs}, rotary_embedding_dim=4>(w, c, s)"
        " y = Reshape(r, heads)"
    )
    _check(
        f"{BESIDE} <{FLAT}, int64[2] sizes = {{4, 2}}> {{ h, t = Split<axis=-1>(x, sizes) {body} }}",
        f"{BESIDE} <{held}> {{ {made} }}",
    )
    packed = BESIDE.replace("2,6] x", "2,9] p")
    ints = "int64[1] zero = {0}, int64[1] four = {4}, int64[1] far = {99}, int64[1] last = {3}"
    cut = "n, x = Split<axis=-1>(p, parts)"
    _check(
        f"{packed} <{FLAT}, {ints}, int64[2] parts = {{3, 6}}> {{ {cut} h = Slice(x, zero, four, last)"
        f" t = Slice(x, four, far, last) {body} }}",
        f"{packed} <{held}, int64[2] parts = {{3, 6}}> {{ {cut} {made} }}",
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("num_heads=2", "num_heads=4"),  # of half the size
        ("(u, t)", "(t, u)"),
        ("int64[4] apart = {0, 0, 2, 4}", "int64[4] apart = {0, 0, 4, 2}"),
    ],
)
def test_other_partial_rotations_stay(before: str, after: str) -> None:
    body = (
        f"{BESIDE} <{FLAT}, int64[2] sizes = {{4, 2}}> {{ h, t = Split<axis=-1>(x, sizes) f = Reshape(h, flat)"
        " r = RotaryEmbedding<num_heads=2>(f, c, s) u = Reshape(r, apart) y = Concat<axis=-1>(u, t) }"
    ).replace(before, after)
    if "apart = {0, 0, 4, 2}" in body:
        body = body.replace("float[B,S,2,6] y", "float[B,S,4,3] y").replace(
            "h, t = Split<axis=-1>(x, sizes)",
            "h, k = Split<axis=-1>(x, sizes) t = Reshape(k, thin)",
        )
        body = body.replace("int64[2] sizes", "int64[4] thin = {0, 0, 4, 1}, int64[2] sizes")
    if "num_heads=4" in body:
        body = body.replace("float[B,S,2] c, float[B,S,2] s", "float[B,S,1] c, float[B,S,1] s")
    _check(body)


CUT = (
    "size = Shape<start=2, end=3>(x) c0 = Slice(table, zero, size, zero) c = Cos(c0) "
    "s0 = Slice(table, zero, size, zero) s = Sin(s0)"
)


def test_angles_cut_out_of_a_table_by_the_length() -> None:
    """Of a table of three, more than three positions have no angles: the product with S positions says S <= 3."""
    proto = parse(
        f"g ({X}) => (float[B,2,S,4] y) <{INTS}, {TABLE}> {{ {CUT} {HALVES['split']} {TURN} }}",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(rope.RULES, model)
    assert "RotaryEmbedding" in [node.op_type for node in model.graph]
    for positions in (1, 2, 3):
        feeds = make_feeds(proto, 0, dim=positions)
        compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.REORDERED, 1e-5)


def test_angles_out_of_a_table_of_one_position_stay() -> None:
    """One angle for any number of positions broadcasts: it is not one per position."""
    _check(
        f"g ({X}) => (float[B,2,S,4] y) <{INTS}, float[1,4] table = {{0.1, 0.2, 0.1, 0.2}}>"
        f" {{ {CUT} {HALVES['split']} {TURN} }}",
        missed="the angles are not one per position and pair",
    )


PART = (
    "h = Slice(x, zero, four, last, one) k = Slice(x, four, far, last, one)"
    " a = Slice(x, zero, {end}, last, step) b = Slice(x, {odd}, {end}, last, step)"
)


def _part(end: str, odd: str, head: str = "h") -> str:
    turn = f"n = Neg(b) {WOVEN.format('n', 'a', 'r').replace('k =', 'kk =').replace('j, k)', 'j, kk)')}"
    held = f"{MORE}, int64[1] four = {{4}}, int64[1] six = {{6}}, {PAIR_TABLE}"
    return (
        f"g (float[1,2,3,6] x) => (float[1,2,3,6] y) <{held}> {{ {PART.format(end=end, odd=odd)} {turn}"
        f" p = Mul({head}, c) q = Mul(r, s) z = Add(p, q) y = Concat<axis=-1>(z, k) }}"
    )


def test_rotate_every_two_of_part_of_a_head() -> None:
    """GPT-J rotates the first elements alone; exporters join the two Slices before the neighbours."""
    _check(
        _part("four", "one"),
        "g (float[1,2,3,6] x) => (float[1,2,3,6] y) <float[3,2] c = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6},"
        " float[3,2] s = {0.6, 0.5, 0.4, 0.3, 0.2, 0.1}, int64[1] zero = {0}> {"
        " d = Unsqueeze(c, zero) e = Unsqueeze(s, zero)"
        " y = RotaryEmbedding<interleaved=1, rotary_embedding_dim=4>(x, d, e) }",
    )


def test_rotate_every_two_of_another_part_stays() -> None:
    """The even elements of the part, and the second to the last but one: no pairs."""
    _check(_part("four", "one").replace("b = Slice(x, one, four", "b = Slice(x, step, six"))


def test_angles_doubled_into_a_view_of_higher_rank() -> None:
    """`repeat_interleave` of torch.export, its unit axes in the same Reshape."""
    turn = f"n = Neg(b) {WOVEN.format('n', 'a', 'r')} p = Mul(x, c) q = Mul(r, s) y = Add(p, q)"
    held = "int64[3] wide = {3, 2, 2}, int64[4] angle = {1, 1, 3, 4}"
    _check(
        f"g (float[1,2,3,4] x, float[3,2] h) => (float[1,2,3,4] y) <{MORE}, {held}> {{ u = Unsqueeze(h, last)"
        f" w = Expand(u, wide) t = Reshape(w, angle) c = Cos(t) s = Sin(t) {NEIGHBOURS['steps']} {turn} }}",
        "g (float[1,2,3,4] x, float[3,2] h) => (float[1,2,3,4] y) <int64[2] two = {0, 1}, int64[1] one = {1}> {"
        " g1 = Unsqueeze(h, two) c = Cos(g1) d = Squeeze(c, one) g2 = Unsqueeze(h, two) s = Sin(g2)"
        " e = Squeeze(s, one) y = RotaryEmbedding<interleaved=1>(x, d, e) }",
    )


@pytest.mark.parametrize(("lift", "fuses"), [("{2, 4}", True), ("{2, 3}", False)])
def test_angles_doubled_with_an_axis_for_the_heads(lift: str, fuses: bool) -> None:
    """`repeat_interleave(s[:, :, None, :], 2, 3)` of GPT-J: one Unsqueeze adds both axes; all twice is no pair."""
    turn = f"n = Neg(b) {WOVEN.format('n', 'a', 'r')} p = Mul(x, c) q = Mul(r, s) y = Add(p, q)"
    more = MORE.replace("int64[4] whole = {1, 2, 3, 4}", "int64[4] whole = {1, 3, 2, 4}")
    held = f"int64[2] lift = {lift}, int64[5] wide = {{1, 3, 1, 2, 2}}, int64[4] angle = {{1, 3, 1, 4}}"
    proto = parse(
        f"g (float[1,3,2,4] x, float[1,3,2] h) => (float[1,3,2,4] y) <{more}, {held}> {{ u = Unsqueeze(h, lift)"
        f" w = Expand(u, wide) t = Reshape(w, angle) c = Cos(t) s = Sin(t) {NEIGHBOURS['steps']} {turn} }}",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(rope.RULES, model)
    assert ("RotaryEmbedding" in [node.op_type for node in model.graph]) == fuses
    feeds = make_feeds(proto, 0)
    compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.REORDERED, 1e-5)


MOVED = (
    "g (float[B,S,3,2,2] x, float[S,2] c, float[S,2] s) => (float[B,3,S,4] y) <"
    + MORE.replace("int64[4] whole = {1, 2, 3, 4}", "int64[4] whole = {0, 0, 0, -1}")
    + "> { v = Transpose<perm=[0,2,1,3,4]>(x) a = Gather<axis=-1>(v, first) b = Gather<axis=-1>(v, second)"
    + f" {PRODUCTS} {WOVEN.format('lo', 'hi', 'y')} }}"
)


def test_neighbours_of_heads_that_were_moved_in_pairs() -> None:
    """The view of neighbours made before the heads were moved: the heads are joined again first."""
    _check(
        MOVED,
        "g (float[B,S,3,2,2] x, float[S,2] c, float[S,2] s) => (float[B,3,S,4] y)"
        " <int64[4] joined = {0, 0, 0, 4}, int64[1] zero = {0}, int64[2] ones = {1, 1}> {"
        " f = Reshape(x, joined) t = Transpose<perm=[0,2,1,3]>(f) d = Unsqueeze(c, zero)"
        " n = Shape<start=0, end=1>(t) m = Concat<axis=0>(n, ones) e = Expand(d, m)"
        " h = Unsqueeze(s, zero) n2 = Shape<start=0, end=1>(t) m2 = Concat<axis=0>(n2, ones)"
        " i = Expand(h, m2) y = RotaryEmbedding<interleaved=1>(t, e, i) }",
    )


@pytest.mark.parametrize(
    "change",
    [
        ("Gather<axis=-1>(v, second)", "Gather<axis=-1>(v, first)"),
        ("b = Gather<axis=-1>(v", "w = Neg(v) b = Gather<axis=-1>(w"),  # of another value
        ("[0,2,1,3,4]", "[0,2,1,4,3]"),  # the pairs are no neighbours
        ("v = Transpose<perm=[0,2,1,3,4]>(x)", "w = Identity(x) u = Transpose<perm=[0,2,1,3,4]>(w) v = Relu(u)"),
    ],
)  # fmt: skip
def test_other_moved_neighbours_stay(change: tuple[str, str]) -> None:
    _check(MOVED.replace(*change))


BESIDE_CLASS_TOKEN = (
    "g (float[B,2,5,4] x, float[1,4,2] half) => (float[B,2,4,4] y) <int64[1] one = {{1}}, int64[1] two = {{2}},"
    " int64[1] far = {{9223372036854775807}}, int64[2] odd = {{{odd}}}, int64[2] even = {{{even}}},"
    " int64[2] ends = {{{ends}}}, int64[2] axes = {{2, 3}}, int64[2] by = {{1, 2}}, int64[1] last = {{-1}},"
    " int64[4] whole = {{0, 0, 0, 4}}, int64[4] twice = {{0, 0, 1, 1}}>"
    " {{ c = Cos(half) s = Sin(half) f = Gather<axis=-1>(c, twice) g1 = Gather<axis=-1>(s, twice)"
    " r = Slice(x, one, far, two, one) m = Mul(r, f) o = Slice(x, odd, ends, axes, by) n = Neg(o)"
    " e = Slice(x, even, ends, axes, by) u = Unsqueeze(n, last) v = Unsqueeze(e, last) k = Concat<axis=-1>(u, v)"
    " w = Reshape(k, whole) z = Mul(w, g1) y = Add(m, z) }}"
)


@pytest.mark.parametrize(
    ("odd", "even", "ends", "fuses"),
    [
        ("1, 1", "1, 0", "9223372036854775807, 9223372036854775807", True),
        ("1, 1", "1, 0", "5, 4", True),
        ("0, 1", "0, 0", "4, 4", False),
        ("1, 0", "1, 1", "5, 4", False),
    ],
    ids=["open", "closed", "other tokens", "swapped"],
)
def test_every_other_element_beside_a_class_token(
    odd: str, even: str, ends: str, fuses: bool
) -> None:
    """As EVA rotates all tokens but the first: both Slices, of tokens and of elements, are one."""
    proto = parse(BESIDE_CLASS_TOKEN.format(odd=odd, even=even, ends=ends), opset=23)
    model = ir.from_proto(proto)
    apply(rope.RULES, model)
    assert ("RotaryEmbedding" in {node.op_type for node in model.graph}) is fuses
    feeds = make_feeds(proto, 0)
    np.testing.assert_allclose(
        run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0], rtol=1e-4, atol=1e-5
    )
