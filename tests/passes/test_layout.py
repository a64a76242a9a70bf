"""PixelShuffle, its inverse, and the Focus layer."""

from __future__ import annotations

import pytest
from graphopt_passes.layout import FAR, RULES

from tests.rewriting import check


@pytest.mark.parametrize(
    ("mode", "middle", "perm"),
    [
        ("CRD", "-1, 3, 2, 2, 4, 5", "0, 1, 4, 2, 5, 3"),
        ("DCR", "-1, 2, 2, 3, 4, 5", "0, 3, 4, 1, 5, 2"),
    ],
)
def test_pixel_shuffle_is_depth_to_space(mode: str, middle: str, perm: str) -> None:
    head = "g (float[N,12,4,5] x) => (float[N,3,8,10] y)"
    check(
        RULES,
        before=f"""{head} <int64[6] m = {{{middle}}}, int64[4] o = {{-1, 3, 8, 10}}>
            {{ r = Reshape(x, m)  t = Transpose<perm = [{perm}]>(r)  y = Reshape(t, o) }}""",
        after=f'{head} {{ y = DepthToSpace<blocksize = 2, mode = "{mode}">(x) }}',
    )


@pytest.mark.parametrize(
    ("middle", "perm", "out"),
    [
        ("-1, 3, 2, 2, 4, 5", "0, 1, 4, 3, 5, 2", "-1, 3, 8, 10"),  # rows and columns change places
        ("-1, 3, 2, 2, 4, 5", "0, 1, 4, 2, 5, 3", "-1, 6, 8, 5"),  # joined differently
        ("-1, 3, 4, 1, 4, 5", "0, 1, 4, 2, 5, 3", "-1, 3, 16, 5"),  # no square block
        ("-1, 3, 1, 1, 8, 10", "0, 1, 4, 2, 5, 3", "-1, 3, 8, 10"),  # block of one pixel
    ],
)
def test_other_rearrangements_stay(middle: str, perm: str, out: str) -> None:
    dims = "N,3,8,10" if ", 1, 1," in middle else "N,12,4,5"
    check(
        RULES,
        before=f"""g (float[{dims}] x) => (float[P,Q,R,S] y) <int64[6] m = {{{middle}}}, int64[4] o = {{{out}}}>
            {{ r = Reshape(x, m)  t = Transpose<perm = [{perm}]>(r)  y = Reshape(t, o) }}""",
    )


def test_shared_middle_stays() -> None:
    check(
        RULES,
        before="""g (float[1,12,4,5] x) => (float[1,3,8,10] y, float[1,3,2,2,4,5] r)
            <int64[6] m = {1, 3, 2, 2, 4, 5}, int64[4] o = {1, 3, 8, 10}>
            { r = Reshape(x, m)  t = Transpose<perm = [0, 1, 4, 2, 5, 3]>(r)  y = Reshape(t, o) }""",
        missed="graph output",
    )


def test_type_without_kernel_stays() -> None:
    check(
        RULES,
        before="""g (int64[1,12,4,5] x) => (int64[1,3,8,10] y)
            <int64[6] m = {1, 3, 2, 2, 4, 5}, int64[4] o = {1, 3, 8, 10}>
            { r = Reshape(x, m)  t = Transpose<perm = [0, 1, 4, 2, 5, 3]>(r)  y = Reshape(t, o) }""",
    )


def test_space_to_depth() -> None:
    head = "g (float[N,3,8,10] x) => (float[N,12,4,5] y)"
    check(
        RULES,
        before=f"""{head} <int64[6] m = {{-1, 3, 4, 2, 5, 2}}, int64[4] o = {{-1, 12, 4, 5}}>
            {{ r = Reshape(x, m)  t = Transpose<perm = [0, 3, 5, 1, 2, 4]>(r)  y = Reshape(t, o) }}""",
        after=f"{head} {{ y = SpaceToDepth<blocksize = 2>(x) }}",
    )


def test_unshuffle_with_channels_outermost_stays() -> None:
    check(
        RULES,
        before="""g (float[1,3,8,10] x) => (float[1,12,4,5] y)
            <int64[6] m = {1, 3, 4, 2, 5, 2}, int64[4] o = {1, 12, 4, 5}>
            { r = Reshape(x, m)  t = Transpose<perm = [0, 1, 3, 5, 2, 4]>(r)  y = Reshape(t, o) }""",
    )


SLICES = """<int64[2] s00 = {0, 0}, int64[2] s01 = {0, 1}, int64[2] s10 = {1, 0}, int64[2] s11 = {1, 1},
    int64[2] e = {2147483647, 2147483647}, int64[2] ax = {2, 3}, int64[2] st = {2, 2}>"""


def _focus(*starts: str) -> str:
    made = "  ".join(f"p{n} = Slice(x, s{start}, e, ax, st)" for n, start in enumerate(starts))
    return f"{made}  y = Concat<axis = 1>(p0, p1, p2, p3)"


def test_focus_in_row_order_is_space_to_depth() -> None:
    assert FAR == 2147483647
    head = f"g (float[N,2,6,4] x) => (float[N,8,3,2] y) {SLICES}"
    check(
        RULES,
        before=f"{head} {{ {_focus('00', '01', '10', '11')} }}",
        after=f"{head} {{ y = SpaceToDepth<blocksize = 2>(x) }}",
    )


def test_focus_in_column_order_is_reordered() -> None:
    head = f"g (float[N,2,6,4] x) => (float[N,8,3,2] y) {SLICES[:-1]}, int64[8] i = {{0, 1, 4, 5, 2, 3, 6, 7}}>"
    check(
        RULES,
        before=f"{head} {{ {_focus('00', '10', '01', '11')} }}",
        after=f"{head} {{ t = SpaceToDepth<blocksize = 2>(x)  y = Gather<axis = 1>(t, i) }}",
    )


def test_focus_that_repeats_a_block_stays() -> None:
    head = f"g (float[N,2,6,4] x) => (float[N,8,3,2] y) {SLICES}"
    check(RULES, before=f"{head} {{ {_focus('00', '10', '10', '11')} }}")
