"""Slice, Split, Concat, Gather in chains."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.slices import FAR, RULES, Part, join_parts

from tests.rewriting import apply, check, parse


@pytest.mark.parametrize("size", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("known", [True, False])
def test_joined_parts_take_what_both_take(size: int, known: bool) -> None:
    data = np.arange(size)
    joined = 0
    ends = (FAR, 0, 1, 4, 7, -1, -3)
    parts = [Part(a, b, s) for a in (0, 2, -4) for b in ends for s in (1, 2, -1)]
    for first in parts:
        for second in parts:
            part = join_parts(first, second, size if known else None)
            if part is None:
                continue
            joined += 1
            expected = data[first.start : first.end : first.step]
            expected = expected[second.start : second.end : second.step]
            np.testing.assert_array_equal(data[part.start : part.end : part.step], expected)
    assert joined > 10


INTS = """<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4},
    int64[1] five = {5}, int64[1] six = {6}, int64[1] last = {-1}, int64[1] far = {9223372036854775807},
    int64[2] a01 = {0, 1}, int64[2] s12 = {1, 2}, int64[2] e44 = {4, 4}>"""


@pytest.mark.parametrize(
    ("before", "after", "dims"),
    [
        (
            "t = Slice(x, one, four, zero)  y = Slice(t, two, four, one)",
            "y = Slice(x, s12, e44, a01)",
            "A,B",
        ),
        (
            "t = Slice(x, one, five, one)  y = Slice(t, one, three, one)",
            "y = Slice(x, two, four, one)",
            "N,2",
        ),
        (
            "t = Slice(x, one, far, zero)  y = Slice(t, two, far, zero)",
            "y = Slice(x, three, far, zero)",
            "M,6",
        ),
        ("t = Slice(x, one, four)  y = Slice(t, one, far)", "y = Slice(x, two, four, zero)", "M,6"),
    ],
)
def test_slices_join(before: str, after: str, dims: str) -> None:
    head = f"g (float[N,6] x) => (float[{dims}] y) {INTS}"
    check(RULES, before=f"{head} {{ {before} }}", after=f"{head} {{ {after} }}", dims=(7, 5))


def test_slices_join_by_attribute() -> None:
    check(
        RULES,
        before="""g (float[6,6] x) => (float[3,2] y)
            { t = Slice<starts = [1], ends = [4]>(x)  y = Slice<starts = [2], ends = [4], axes = [1]>(t) }""",
        after="""g (float[6,6] x) => (float[3,2] y)
            { y = Slice<starts = [1, 2], ends = [4, 4], axes = [0, 1]>(x) }""",
        opset=9,
    )


def test_slices_of_an_axis_of_unknown_size_may_stay() -> None:
    check(
        RULES,
        before=f"g (float[N] x) => (float[M] y) {INTS}"
        "{ t = Slice(x, one, last, zero)  y = Slice(t, zero, last, zero) }",
        dims=(7, 5),
        missed="whose size is unknown",
    )


def test_slice_at_run_time_stays() -> None:
    check(
        RULES,
        before=f"g (float[6] x, int64[1] s) => (float[M] y) {INTS} {{ t = Slice(x, s, five)  y = Slice(t, one, two) }}",
    )


@pytest.mark.parametrize(
    ("part", "after"),
    [
        ("zero, two", "y = Neg(a)"),
        ("two, five", "y = Neg(b)"),
        ("two, far", "t = Concat<axis = 1>(b, c)  y = Neg(t)"),
        ("three, four", "t = Slice(b, one, two, one)  y = Neg(t)"),
        ("last, far", "t = Slice(c, zero, one, one)  y = Neg(t)"),
        ("one, three", None),
    ],
)
def test_slice_of_concat_takes_operands(part: str, after: str | None) -> None:
    head = f"g (float[N,2] a, float[N,3] b, float[N,1] c) => (float[N,M] y) {INTS}"
    if part.startswith("last"):
        after = "y = Neg(c)"
    check(
        RULES,
        before=f"{head} {{ k = Concat<axis = 1>(a, b, c)  t = Slice(k, {part}, one)  y = Neg(t) }}",
        after=after and f"{head} {{ {after} }}",
    )


def test_slice_of_concat_along_another_axis_stays() -> None:
    check(
        RULES,
        before=f"g (float[4,2] a, float[4,3] b) => (float[2,5] y) {INTS}"
        "{ k = Concat<axis = 1>(a, b)  y = Slice(k, zero, two, zero) }",
    )


def test_split_of_concat_gives_the_operands() -> None:
    check(
        RULES,
        before="""g (float[N,2] a, float[N,3] b) => (float[N,2] y, float[N,3] z) <int64[2] s = {2, 3}>
            { k = Concat<axis = 1>(a, b)  p, q = Split<axis = -1>(k, s)  y = Neg(p)  z = Neg(q) }""",
        after="g (float[N,2] a, float[N,3] b) => (float[N,2] y, float[N,3] z) { y = Neg(a)  z = Neg(b) }",
    )


def test_split_of_concat_elsewhere_stays() -> None:
    check(
        RULES,
        before="""g (float[N,2] a, float[N,3] b) => (float[N,3] y, float[N,2] z) <int64[2] s = {3, 2}>
            { k = Concat<axis = 1>(a, b)  y, z = Split<axis = 1>(k, s) }""",
    )


@pytest.mark.parametrize(("index", "after"), [(1, "y = Gather<axis = 1>(a, i)"), (-1, None)])
def test_gather_from_concat(index: int, after: str | None) -> None:
    head = f"g (float[N,2] a, float[N,3] b) => (float[N] y) <int64 i = {{{index}}}>"
    check(
        RULES,
        before=f"{head} {{ k = Concat<axis = 1>(a, b)  y = Gather<axis = 1>(k, i) }}",
        after=after and f"{head} {{ {after} }}",
    )


def test_gather_from_second_operand_moves_the_index() -> None:
    check(
        RULES,
        before="g (float[N,2] a, float[N,3] b) => (float[N,2] y) <int64[2] i = {4, 2}>"
        "{ k = Concat<axis = 1>(a, b)  y = Gather<axis = 1>(k, i) }",
        after="g (float[N,2] a, float[N,3] b) => (float[N,2] y) <int64[2] i = {2, 0}>"
        "{ y = Gather<axis = 1>(b, i) }",
    )


def test_gather_across_operands_stays() -> None:
    check(
        RULES,
        before="g (float[N,2] a, float[N,3] b) => (float[N,2] y) <int64[2] i = {1, 2}>"
        "{ k = Concat<axis = 1>(a, b)  y = Gather<axis = 1>(k, i) }",
    )


def test_concats_flatten_and_empty_operands_go() -> None:
    check(
        RULES,
        before="""g (float[N,2] a, float[N,3] b, float[N,0] e) => (float[N,7] y)
            { t = Concat<axis = 1>(a, e, b)  y = Concat<axis = -1>(a, t) }""",
        after="g (float[N,2] a, float[N,3] b, float[N,0] e) => (float[N,7] y) { y = Concat<axis = 1>(a, a, b) }",
    )


@pytest.mark.parametrize(
    "body",
    [
        "t = Concat<axis = 0>(a, a)  y = Concat<axis = 1>(t, t)",
        "t = Concat<axis = 1>(a, a)  u = Concat<axis = 1>(t, a)  y = Concat<axis = 1>(u, t)",
    ],
    ids=["another axis", "another use"],
)
def test_concat_of_shared_or_other_concat_stays(body: str) -> None:
    after = None
    if "u =" in body:  # u joins, t is used twice and stays
        after = "t = Concat<axis = 1>(a, a)  y = Concat<axis = 1>(t, a, t)"
    head = "g (float[2,2] a) => (float[P,Q] y)"
    check(RULES, before=f"{head} {{ {body} }}", after=after and f"{head} {{ {after} }}")


def test_all_parts_of_a_split_are_the_whole() -> None:
    check(
        RULES,
        before="""g (float[N,6] x) => (float[N,6] y) <int64[2] s = {2, 4}>
            { p, q = Split<axis = 1>(x, s)  t = Concat<axis = 1>(p, q)  y = Neg(t) }""",
        after="g (float[N,6] x) => (float[N,6] y) { y = Neg(x) }",
    )


def test_neighbouring_slices_join() -> None:
    head = f"g (float[N,6] x, float[N,1] z) => (float[N,5] y) {INTS}"
    check(
        RULES,
        before=f"{head} {{ p = Slice(x, zero, one, one)  q = Slice(x, one, four, one)"
        "  y = Concat<axis = 1>(p, q, z) }",
        after=f"{head} {{ t = Slice(x, zero, four, one)  y = Concat<axis = 1>(t, z) }}",
    )


@pytest.mark.parametrize("order", ["q, p", "p, p"])
def test_parts_out_of_order_stay(order: str) -> None:
    check(
        RULES,
        before=f"""g (float[N,4] x) => (float[N,4] y)
            {{ p, q = Split<axis = 1, num_outputs = 2>(x)  z = Neg(p)  y = Concat<axis = 1>({order}, z) }}""".replace(
            "float[N,4] y", "float[N,6] y"
        ),
        after=None
        if order == "q, p"
        else f"""g (float[N,4] x) => (float[N,6] y) {INTS}
            {{ p = Slice(x, zero, two, one)  z = Neg(p)  y = Concat<axis = 1>(p, p, z) }}""",
    )


@pytest.mark.parametrize(
    ("before", "after", "dims"),
    [
        (
            "t = Gather<axis = 1>(x, i)  y = Unsqueeze(t, one)",
            "y = Gather<axis = 1>(x, two)",
            "N,1",
        ),
        ("t = Gather<axis = 1>(x, two)  y = Squeeze(t, one)", "y = Gather<axis = 1>(x, i)", "N"),
        ("t = Slice(x, two, three, one)  y = Squeeze(t, last)", "y = Gather<axis = 1>(x, i)", "N"),
        ("t = Slice(x, last, far, one)  y = Squeeze(t, one)", "y = Gather<axis = 1>(x, j)", "N"),
        ("t = Gather<axis = 1>(x, i)  y = Unsqueeze(t, zero)", None, "1,N"),
        ("t = Slice(x, two, four, one)  y = Unsqueeze(t, one)", None, "N,1,2"),
    ],
)
def test_element_with_or_without_its_axis(before: str, after: str | None, dims: str) -> None:
    head = f"g (float[N,6] x) => (float[{dims}] y) {INTS[:-1]}, int64 i = {{2}}, int64 j = {{-1}}>"
    check(RULES, before=f"{head} {{ {before} }}", after=after and f"{head} {{ {after} }}")


@pytest.mark.parametrize(("output", "ends"), [("p", "zero, two"), ("q", "two, far")])
def test_split_with_one_used_output_is_a_slice(output: str, ends: str) -> None:
    head = f"g (float[N,6] x) => (float[N,M] y) {INTS[:-1]}, int64[2] s = {{2, 4}}>"
    ends = ends.replace("far", "far32")
    check(
        RULES,
        before=f"{head} {{ p, q = Split<axis = 1>(x, s)  y = Neg({output}) }}",
        after=f"{head[:-1]}, int64[1] far32 = {{{FAR}}}> {{ t = Slice(x, {ends}, one)  y = Neg(t) }}",
    )


def test_split_with_two_used_outputs_stays() -> None:
    check(
        RULES,
        before="""g (float[N,6] x) => (float[N,2] y, float[N,2] z)
            { y, q, z = Split<axis = 1, num_outputs = 3>(x) }""",
    )


def test_tuples_of_one_index_are_indices() -> None:
    """`x[i]` as torch.export spells it."""
    g = "g (float[5,N] x, int64[B,S] i) => (float[B,S,N] y)"
    check(
        RULES,
        before=f"{g} <int64[1] last = {{-1}}> {{ t = Unsqueeze(i, last)  y = GatherND(x, t) }}",
        after=f"{g} {{ y = Gather<axis = 0>(x, i) }}",
    )


def test_tuples_of_one_index_that_two_tables_share() -> None:
    """As the cosines and sines of rotary embeddings."""
    g = "g (float[5,3] c, float[5,3] s, int64[4] i) => (float[4,3] y, float[4,3] z)"
    check(
        RULES,
        before=f"{g} <int64[1] last = {{-1}}> {{ t = Unsqueeze(i, last)  y = GatherND(c, t)  z = GatherND(s, t) }}",
        after=f"{g} {{ y = Gather<axis = 0>(c, i)  z = Gather<axis = 0>(s, i) }}",
    )


def test_tuples_within_a_batch_stay() -> None:
    check(
        RULES,
        before="""g (float[5,3] x, int64[5,2] i) => (float[5,2] y) <int64[1] last = {-1}>
            { t = Unsqueeze(i, last)  y = GatherND<batch_dims = 1>(x, t) }""",
    )


def test_tuples_of_two_indices_stay() -> None:
    check(RULES, before="g (float[5,3] x, int64[4,2] i) => (float[4] y) { y = GatherND(x, i) }")


@pytest.mark.parametrize(
    ("out", "body"),
    [
        ("1,4", "t = Gather<axis = 1>(x, k)  y = Squeeze(t, z)"),  # another axis than the one cut
        ("1,4", "t = Slice(x, z, o, o)  y = Squeeze(t, z)"),
        ("4", "t = Slice(x, zz, oo, za)  y = Squeeze(t, za)"),  # two axes at once
    ],
)
def test_thin_pieces_that_are_no_element_stay(out: str, body: str) -> None:
    check(
        RULES,
        f"g (float[1,3,4] x) => (float[{out}] y) <int64[1] k = {{0}}, int64[1] z = {{0}}, int64[1] o = {{1}},"
        " int64[2] zz = {0, 0}, int64[2] oo = {1, 1}, int64[2] za = {0, 1}>"
        f" {{ {body} }}",
    )


def test_pieces_of_unknown_rank_stay() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18, "my" : 1]>'
        "g (float[N,4] x) => (float[M,4] y, float[K,4] z) <int64[1] a = {0}, int64[1] b = {1}> {"
        " h = my.Op(x)  c = Concat<axis = 0>(h, h)  y = Slice(c, a, b, a)"
        " p, q = Split<axis = 0, num_outputs = 2>(h)  z = Concat<axis = 0>(p, q) }"
    )
    assert not apply(RULES, ir.from_proto(parse(text))).rewrites
