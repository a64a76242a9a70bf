"""Rotary embeddings out of their parts, in every spelling of the halves and of the angles."""

from __future__ import annotations

import pytest
from graphopt_passes import rope

from tests.rewriting import check

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
        ("c = Cos(h) s = Sin(h)", "float[B,1,S,4] h", "halves of the angles"),
        (
            "t = Concat<axis=-1>(h, g1) c = Cos(t) s = Sin(t)",
            "float[B,1,S,2] h",
            "halves of the angles",
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
