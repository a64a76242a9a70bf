"""Attention and rotation that leave the heads where they are."""

from __future__ import annotations

import pytest
from graphopt_passes import heads

from tests.rewriting import check

IN = "float[B,S,2,4] q, float[B,L,2,4] k, float[B,L,2,4] v"
TURN = "a = Transpose<perm=[0,2,1,3]>(q) b = Transpose<perm=[0,2,1,3]>(k) c = Transpose<perm=[0,2,1,3]>(v)"
SHAPES = "<int64[3] flat = {0,0,8}, int64[4] apart = {0,0,2,4}>"


def _check(before: str, after: str | None = None, **options: object) -> None:
    check(heads.RULES, before, after, tolerance=1e-5, opset=23, **options)  # type: ignore[arg-type]


def test_heads_stay_in_place() -> None:
    _check(
        f"g ({IN}) => (float[B,S,2,4] y) {{ {TURN} o = Attention<scale=0.5>(a, b, c)"
        " y = Transpose<perm=[0,2,1,3]>(o) }",
        f"g ({IN}) => (float[B,S,2,4] y) {SHAPES} {{ a = Reshape(q, flat) b = Reshape(k, flat)"
        " c = Reshape(v, flat) o = Attention<scale=0.5, q_num_heads=2, kv_num_heads=2>(a, b, c)"
        " y = Reshape(o, apart) }",
    )


def test_heads_that_were_divided_are_taken_whole_again() -> None:
    """Grouped, with a mask: [B, S, H D] goes in as it was before it was divided."""
    io = "(float[B,S,16] q, float[B,S,8] k, float[B,S,8] v, float[S,S] m) => (float[B,S,4,4] y)"
    shapes = "<int64[4] four = {0,0,4,4}, int64[4] apart = {0,0,2,4}>"
    _check(
        f"g {io} {shapes} {{ q4 = Reshape(q, four) k4 = Reshape(k, apart) v4 = Reshape(v, apart)"
        " a = Transpose<perm=[0,2,1,3]>(q4) b = Transpose<perm=[0,2,1,3]>(k4)"
        " c = Transpose<perm=[0,2,1,3]>(v4) o = Attention(a, b, c, m) y = Transpose<perm=[0,2,1,3]>(o) }",
        f"g {io} {shapes} {{ o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v, m) y = Reshape(o, four) }}",
    )


@pytest.mark.parametrize(
    ("body", "missed"),
    [
        # values that come with their heads in front, as out of a cache
        (
            "a = Transpose<perm=[0,2,1,3]>(q) b = Transpose<perm=[0,2,1,3]>(k) o = Attention(a, b, w)"
            " y = Transpose<perm=[0,2,1,3]>(o)",
            "do not all come from",
        ),
        (
            "a = Transpose<perm=[0,2,1,3]>(q) b = Transpose<perm=[0,2,1,3]>(k)"
            " c = Transpose<perm=[0,2,1,3]>(v) o, pk, pv = Attention(a, b, c, , w, w) y = Transpose<perm=[0,2,1,3]>(o)",
            "past or present",
        ),
        (
            "a = Transpose<perm=[0,2,1,3]>(q) b = Transpose<perm=[0,2,1,3]>(k)"
            " c = Transpose<perm=[0,2,1,3]>(v) o = Attention(a, b, c) y = Transpose<perm=[0,2,3,1]>(o)",
            "",
        ),
    ],
)
def test_heads_that_stay_in_front(body: str, missed: str) -> None:
    _check(
        "g (float[1,3,2,4] q, float[1,3,2,4] k, float[1,3,2,4] v) => (float[a,b,c,d] y)"
        f" <float[1,2,3,4] w> {{ {body} }}",
        missed=missed,
    )


def test_heads_of_unknown_number_stay_in_front() -> None:
    io = IN.replace(",2,4]", ",H,4]")
    _check(
        f"g ({io}) => (float[B,S,H,4] y) {{ {TURN} o = Attention(a, b, c) y = Transpose<perm=[0,2,1,3]>(o) }}",
        missed="do not all come from",
    )


def test_a_target_that_gains_nothing_keeps_heads_in_front() -> None:
    _check(
        f"g ({IN}) => (float[B,S,2,4] y) {{ {TURN} o = Attention(a, b, c) y = Transpose<perm=[0,2,1,3]>(o) }}",
        target="portable",
    )


ROTARY = "float[1,3,8] x, float[1,3,2,4] k, float[1,3,2,4] v"
ANGLES = "float[1,3,2] cos, float[1,3,2] sin, int64[4] apart = {0,0,2,4}"


def test_rotation_before_attention_leaves_heads_in_place() -> None:
    rest = "b = Transpose<perm=[0,2,1,3]>(k) c = Transpose<perm=[0,2,1,3]>(v)"
    _check(
        f"g ({ROTARY}) => (float[1,3,2,4] y) <{ANGLES}> {{ x4 = Reshape(x, apart)"
        f" a = Transpose<perm=[0,2,1,3]>(x4) r = RotaryEmbedding(a, cos, sin) {rest}"
        " o = Attention(r, b, c) y = Transpose<perm=[0,2,1,3]>(o) }",
        f"g ({ROTARY}) => (float[1,3,2,4] y) <{ANGLES}, int64[3] flat = {{0,0,8}}> {{"
        " r = RotaryEmbedding<num_heads=2>(x, cos, sin) b = Reshape(k, flat) c = Reshape(v, flat)"
        " o = Attention<q_num_heads=2, kv_num_heads=2>(r, b, c) y = Reshape(o, apart) }",
    )


@pytest.mark.parametrize(
    "tail",
    [
        "y = Identity(r)",
        "c = Transpose<perm=[0,2,1,3]>(v) y = Attention(r, c, c)",
        "c = Transpose<perm=[0,2,1,3]>(v) o = Attention(r, w, c) y = Transpose<perm=[0,2,1,3]>(o)",
        "c = Transpose<perm=[0,2,1,3]>(v) o = Attention(c, c, r) y = Transpose<perm=[0,2,1,3]>(o)",
    ],
)
def test_rotation_that_goes_elsewhere_keeps_heads_in_front(tail: str) -> None:
    _check(
        f"g ({ROTARY}) => (float[a,b,c,d] y) <{ANGLES}, float[1,2,3,4] w> {{ x4 = Reshape(x, apart)"
        f" a = Transpose<perm=[0,2,1,3]>(x4) r = RotaryEmbedding(a, cos, sin) {tail} }}"
    )


PACKED = "(float[2,3,24] x) => (float[2,3,2,4] y)"


@pytest.mark.parametrize("index", ["1", "-2"])
def test_a_part_of_a_packed_product_is_a_slice(index: str) -> None:
    io = "g (float[5,2,12] x) => (float[5,2,4] y)"
    _check(
        f"{io} <int64[5] five = {{1, 5, 2, 3, 4}}, int64 i = {{{index}}}, int64[1] z = {{3}}> {{"
        " r = Reshape(x, five) t = Transpose<perm=[3,1,2,0,4]>(r) s = Squeeze(t, z) y = Gather<axis=0>(s, i) }",
        f"{io} <int64[1] a = {{4}}, int64[1] b = {{8}}, int64[1] c = {{2}}> {{ y = Slice(x, a, b, c) }}",
    )


def test_a_part_of_a_product_that_is_divided_in_two_steps() -> None:
    _check(
        "g (float[S,B,12] x) => (float[S,B,4] y) <int64[4] four = {0, 0, 3, 4}, int64 i = {2}, int64[1] z = {3},"
        " int64[1] f = {0}> { r = Reshape(x, four) u = Unsqueeze(r, f) t = Transpose<perm=[3,1,2,0,4]>(u)"
        " s = Squeeze(t, z) y = Gather<axis=0>(s, i) }",
        "g (float[S,B,12] x) => (float[S,B,4] y) <int64[1] a = {8}, int64[1] b = {12}, int64[1] c = {2}>"
        " { y = Slice(x, a, b, c) }",
    )


FIVE = "r = Reshape(x, five) t = Transpose<perm=[3,1,2,0,4]>(r) s = Squeeze(t, z)"


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (FIVE.replace("3,1,2,0,4", "3,2,1,0,4") + " y = Gather<axis=0>(s, i)", "2,2,4"),
        (FIVE + " y = Gather<axis=0>(s, list)", "1,2,2,4"),
        (FIVE.replace("3,1,2,0,4", "1,3,2,0,4") + " y = Gather<axis=1>(s, i)", "2,2,4"),
        (
            "r = Reshape(x, mixed) t = Transpose<perm=[2,0,1,3]>(r) y = Gather<axis=0>(t, i)",
            "2,4,2",
        ),
    ],
)
def test_other_parts_stay(body: str, shape: str) -> None:
    _check(
        f"g (float[2,2,12] x) => (float[{shape}] y) <int64[5] five = {{1, 2, 2, 3, 4}}, int64[1] z = {{3}},"
        f" int64[4] mixed = {{2, 4, 3, 2}}, int64 i = {{1}}, int64[1] list = {{1}}> {{ {body} }}"
    )


IN_BATCH = "float[5,3,8] q, float[7,3,8] k, float[7,3,8] v"


def _in_batch(mask: str = "") -> str:
    parts = " ".join(
        f"{n}p = Reshape({n}, {shape}) {n}t = Transpose<perm=[1,0,2]>({n}p)"
        for n, shape in (("q", "five"), ("k", "seven"), ("v", "seven"))
    )
    return f"{parts} o = Attention<q_num_heads=1, kv_num_heads=1>(qt, kt, vt{mask}) y = Transpose<perm=[1,0,2]>(o)"


HELD = "<int64[3] five = {5, 6, 4}, int64[3] seven = {7, 6, 4}, int64[3] back = {0, 6, 4}"


@pytest.mark.parametrize(
    ("given", "mask"), [("", ""), (", float[5,7] m", ", m"), (", float[1,1,5,7] m", ", m")]
)
def test_heads_that_count_as_rows_of_the_batch(given: str, mask: str) -> None:
    io = f"g ({IN_BATCH}{given}) => (float[5,6,4] y)"
    turned = " ".join(f"{n}t = Transpose<perm=[1,0,2]>({n})" for n in "qkv")
    _check(
        f"{io} {HELD}> {{ {_in_batch(mask)} }}",
        f"{io} {HELD}> {{ {turned} o = Attention<q_num_heads=2, kv_num_heads=2>(qt, kt, vt{mask})"
        " u = Transpose<perm=[1,0,2]>(o) y = Reshape(u, back) }",
    )


def test_heads_with_masks_of_their_own_stay_in_the_batch() -> None:
    _check(
        f"g ({IN_BATCH}, float[6,1,5,7] m) => (float[5,6,4] y) {HELD}> {{ {_in_batch(', m')} }}",
        missed="for each head",
    )


def test_rows_that_are_no_heads_stay() -> None:
    _check(
        "g (float[5,6,4] q, float[7,6,4] k, float[7,6,4] v) => (float[5,6,4] y) {"
        " qt = Transpose<perm=[1,0,2]>(q) kt = Transpose<perm=[1,0,2]>(k) vt = Transpose<perm=[1,0,2]>(v)"
        " o = Attention<q_num_heads=1, kv_num_heads=1>(qt, kt, vt) y = Transpose<perm=[1,0,2]>(o) }"
    )


GROUPED = "float[B,4,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
REPEAT = "{0}1 = Unsqueeze({0}, two) {0}2 = Expand({0}1, five) {0}3 = Reshape({0}2, four)"
SIZES = "int64[1] two = {2}, int64[5] five = {1, 2, 2, 1, 4}, int64[4] four = {0, 4, -1, 4}"


def test_operator_whose_heads_are_repeated() -> None:
    """torch.export at opset 23 writes the operator itself, and repeats the heads before it."""
    body = f"{REPEAT.format('k')} {REPEAT.format('v')}"
    g = f"g ({GROUPED}, float[S,L] m) => (float[B,4,S,4] y)"
    _check(
        f"{g} <{SIZES}> {{ {body} y = Attention<scale=0.5>(q, k3, v3, m) }}",
        f"{g} {{ y = Attention<scale=0.5>(q, k, v, m) }}",
    )
    _check(
        f"{g} <{SIZES}> {{ {REPEAT.format('k')} y = Attention(q, k3, k3, m) }}".replace(
            "y = Attention(q, k3, k3, m)", "y = Attention(q, k3, q, m)"
        ).replace(",L]", ",S]"),
    )


def test_operator_with_a_past_and_repeated_heads_stays() -> None:
    ins = (
        "float[1,4,1,4] q, float[1,2,1,4] k, float[1,2,1,4] v, float[1,4,3,4] pk, float[1,4,3,4] pv"
    )
    body = f"{REPEAT.format('k')} {REPEAT.format('v')}"
    _check(
        f"g ({ins}) => (float[1,4,1,4] y, float[1,4,4,4] nk, float[1,4,4,4] nv) <{SIZES}> {{ {body}"
        " y, nk, nv = Attention(q, k3, v3, , pk, pv) }",
        missed="repeated too",
    )
