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
PARTS = "int64[5] sh = {0,0,3,2,4}, int64[1] first = {0}, int64[3] ones = {1,1,1}"
BACK = "o = Attention(q, k, v) y = Transpose<perm=[0,2,1,3]>(o)"


def test_packed_projections_are_split_before_their_heads_are() -> None:
    _check(
        f"g {PACKED} <{PARTS}> {{ r = Reshape(x, sh) t = Transpose<perm=[2,0,3,1,4]>(r)"
        " a, b, c = Split<axis=0>(t, ones) q = Squeeze(a, first) k = Squeeze(b, first) v = Squeeze(c, first)"
        f" {BACK} }}",
        f"g {PACKED} <int64[3] sizes = {{8,8,8}}, int64[4] apart = {{0,0,2,4}}, int64[1] first = {{0}}> {{"
        " p, p2, p3 = Split<axis=2>(x, sizes)"
        " a = Reshape(p, apart) a2 = Transpose<perm=[0,2,1,3]>(a) a3 = Unsqueeze(a2, first)"
        " b = Reshape(p2, apart) b2 = Transpose<perm=[0,2,1,3]>(b) b3 = Unsqueeze(b2, first)"
        " c = Reshape(p3, apart) c2 = Transpose<perm=[0,2,1,3]>(c) c3 = Unsqueeze(c2, first)"
        " q = Squeeze(a3, first) k = Squeeze(b3, first) v = Squeeze(c3, first)"
        f" {BACK} }}",
    )


def test_packed_projections_taken_one_by_one() -> None:
    shape = "int64[4] apart = {0,0,2,4}, int64[3] flat = {0,0,8}, int64[1] two = {2}"
    limits = "int64[1] s0 = {0}, int64[1] s1 = {8}, int64[1] s2 = {16}, int64[1] s3 = {24}"
    numbers = "int64 zero = {0}, int64 one = {1}, int64 last = {-1}"
    _check(
        f"g {PACKED} <{PARTS}, {numbers}> {{ r = Reshape(x, sh) t = Transpose<perm=[2,0,3,1,4]>(r)"
        f" q = Gather<axis=0>(t, zero) k = Gather<axis=0>(t, one) v = Gather<axis=0>(t, last) {BACK} }}",
        f"g {PACKED} <{shape}, {limits}> {{ a = Slice(x, s0, s1, two) b = Slice(x, s1, s2, two)"
        " c = Slice(x, s2, s3, two) o = Attention<q_num_heads=2, kv_num_heads=2>(a, b, c) y = Reshape(o, apart) }",
    )


@pytest.mark.parametrize(
    "body",
    [
        # another order of axes, another use of a part, parts that are no whole
        "r = Reshape(x, sh) t = Transpose<perm=[2,3,0,1,4]>(r) a, b, c = Split<axis=0>(t, ones)"
        " q = Squeeze(a, first) k = Squeeze(b, first) v = Squeeze(c, first) z = Attention(q, k, v)"
        " y = Unsqueeze(z, first)",
        "r = Reshape(x, sh) t = Transpose<perm=[2,0,3,1,4]>(r) a, b, y = Split<axis=0>(t, ones)",
        "r = Reshape(x, sh) t = Transpose<perm=[2,0,3,1,4]>(r) a, b = Split<axis=0>(t, uneven)"
        " q = Squeeze(a, first) z = Attention(q, q, q) y = Unsqueeze(z, first)",
        "r = Reshape(x, sh) t = Transpose<perm=[2,0,3,1,4]>(r) y = Gather<axis=0>(t, first)",
    ],
)
def test_packed_projections_that_stay(body: str) -> None:
    _check(
        f"g (float[2,3,24] x) => (float[a,b,c,d,e] y) <{PARTS}, int64[2] uneven = {{1,2}}> {{ {body} }}"
    )
