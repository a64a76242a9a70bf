"""PixelShuffle, its inverse, and the Focus layer."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes.layout import FAR, RULES

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run


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


@pytest.mark.parametrize(
    ("target", "fuses"), [("cuda", True), ("tensorrt", True), ("cpu", False), ("portable", False)]
)
def test_halves_where_the_target_has_a_kernel(target: str, fuses: bool) -> None:
    head = "g (float16[1,12,4,5] x) => (float16[1,3,8,10] y)"
    check(
        RULES,
        before=f"""{head} <int64[6] m = {{1, 3, 2, 2, 4, 5}}, int64[4] o = {{1, 3, 8, 10}}>
            {{ r = Reshape(x, m)  t = Transpose<perm = [0, 1, 4, 2, 5, 3]>(r)  y = Reshape(t, o) }}""",
        after=f'{head} {{ y = DepthToSpace<blocksize = 2, mode = "CRD">(x) }}' if fuses else None,
        target=target,
        missed="" if fuses else "no DepthToSpace for FLOAT16",
        feeds=(),  # no kernel for halves on a CPU
    )


def test_space_to_depth() -> None:
    head = "g (float[N,3,8,10] x) => (float[N,12,4,5] y)"
    check(
        RULES,
        before=f"""{head} <int64[6] m = {{-1, 3, 4, 2, 5, 2}}, int64[4] o = {{-1, 12, 4, 5}}>
            {{ r = Reshape(x, m)  t = Transpose<perm = [0, 3, 5, 1, 2, 4]>(r)  y = Reshape(t, o) }}""",
        after=f"{head} {{ y = SpaceToDepth<blocksize = 2>(x) }}",
    )


def test_unshuffle_is_reordered() -> None:
    """PixelUnshuffle: channels are outermost."""
    head = "g (float[1,3,8,10] x) => (float[1,12,4,5] y)"
    check(
        RULES,
        before=f"""{head} <int64[6] m = {{1, 3, 4, 2, 5, 2}}, int64[4] o = {{1, 12, 4, 5}}>
            {{ r = Reshape(x, m)  t = Transpose<perm = [0, 1, 3, 5, 2, 4]>(r)  y = Reshape(t, o) }}""",
        after=f"""{head} <int64[12] i = {{0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11}}>
            {{ s = SpaceToDepth<blocksize = 2>(x)  y = Gather<axis = 1>(s, i) }}""",
    )


def test_unshuffle_of_one_channel_is_space_to_depth() -> None:
    head = "g (float[N,1,8,10] x) => (float[N,4,4,5] y)"
    check(
        RULES,
        before=f"""{head} <int64[6] m = {{-1, 1, 4, 2, 5, 2}}, int64[4] o = {{-1, 4, 4, 5}}>
            {{ r = Reshape(x, m)  t = Transpose<perm = [0, 1, 3, 5, 2, 4]>(r)  y = Reshape(t, o) }}""",
        after=f"{head} {{ y = SpaceToDepth<blocksize = 2>(x) }}",
    )


def test_unshuffle_of_unknown_sizes_axis_by_axis() -> None:
    """As torch exports PixelUnshuffle with dynamic axes; odd sizes are refused before and after."""
    held = (
        "int64[1] three = {3}, int64[5] m = {0, 0, -1, 2, 0}, int64[6] k = {0, 0, 0, 0, -1, 2},"
        " int64[6] o = {0, -1, 1, 1, 0, 0}, int64[2] e = {2, 3}"
    )
    text = f"""g (float[N,2,H,W] x) => (float[N,8,I,J] y) <{held}>
        {{ u = Unsqueeze(x, three)  r = Reshape(u, m)  s = Reshape(r, k)
           t = Transpose<perm = [0, 1, 3, 5, 2, 4]>(s)  w = Reshape(t, o)  y = Squeeze(w, e) }}"""
    model = ir.from_proto(parse(text))
    apply(RULES, model)
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["SpaceToDepth", "Gather"]
    feeds = make_feeds(parse(text), 0, dim=4)
    compare(run(parse(text), feeds), run(ir.to_proto(model), feeds), Numerics.EXACT, 0)


MEASURED = """g (float[N,2,H,W] x) => (float[N,8,I,J] y)
    <int64[1] any = {{-1}}, int64[1] two = {{2}}, int64[1] eight = {{8}}, int64[1] c = {{2}}>
    {{ n = Shape<start = 0, end = 1>(x)  h = Shape<start = 2, end = 3>(x)  w = Shape<start = 3>(x)
       i = Div(h, two)  j = Div(w, two)  m = Concat<axis = 0>(any, c, i, two, j, two)  r = Reshape(x, m)
       t = Transpose<perm = [0, 1, 3, 5, 2, 4]>(r)  o = Concat<axis = 0>({first}, eight, i, j)  v = Reshape(t, o)
       z = {use}(v)  k = Shape<start = 1>({of})  p = Concat<axis = 0>({batch}, k)
       y = Reshape<allowzero = 1>(t, p) }}"""


def test_unshuffle_whose_view_is_measured() -> None:
    """As torch.export writes PixelUnshuffle with dynamic axes: sizes are halved, and the batch is stated."""
    text = MEASURED.format(first="any", use="Identity", of="z", batch="n")
    text = text.replace("z = Identity(v)  ", "").replace("(z)", "(v)")
    model = ir.from_proto(parse(text))
    apply(RULES, model)
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["SpaceToDepth", "Gather"]
    for size in (4, 6):
        feeds = make_feeds(parse(text), 0, dim=size)
        compare(run(parse(text), feeds), run(ir.to_proto(model), feeds), Numerics.EXACT, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": "any"},  # rows may be lost, and others be made of them
        {"use": "Relu", "of": "v"},  # the view itself is used
    ],
)
def test_unshuffle_whose_view_is_used_or_not_stated_stays(changes: dict[str, str]) -> None:
    text = MEASURED.format(
        **{"first": "any", "use": "Identity", "of": "z", "batch": "n", **changes}
    )
    text = text.replace("=> (float[N,8,I,J] y)", "=> (float[N,8,I,J] y, float[M,8,P,Q] z)")
    if "use" not in changes:
        text = text.replace("z = Identity(v)", "z = Identity(x)").replace("(z)", "(v)")
        text = text.replace("float[M,8,P,Q] z", "float[N,2,H,W] z")
    model = ir.from_proto(parse(text))
    apply(RULES, model)
    assert "SpaceToDepth" not in [n.op_type for n in model.graph]


def test_unshuffle_of_other_blocks_stays() -> None:
    check(
        RULES,
        before="""g (float[1,3,8,9] x) => (float[1,18,4,3] y)
            <int64[6] m = {1, 3, 4, 2, 3, 3}, int64[4] o = {1, 18, 4, 3}>
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
