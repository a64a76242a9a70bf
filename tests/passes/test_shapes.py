"""Casts, transposes and views in chains; Reshape to what is known."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes.shapes import RULES

from tests.rewriting import apply, check, parse, structure


@pytest.mark.parametrize(
    ("first", "middle", "last"),
    [
        ("float16", 1, "double"),
        ("int32", 7, "float"),
        ("int32", 11, "float"),
        ("uint8", 6, "int64"),
        ("bool", 1, "int64"),
        ("float", 11, "float16"),
        ("int8", 10, "float"),
    ],
)
def test_cast_through_a_wider_type_goes(first: str, middle: int, last: str) -> None:
    code = {"double": 11, "float": 1, "int64": 7, "float16": 10}[last]
    head = f"g ({first}[N] x) => ({last}[N] y)"
    check(
        RULES,
        before=f"{head} {{ t = Cast<to = {middle}>(x)  y = Cast<to = {code}>(t) }}",
        after=f"{head} {{ y = Cast<to = {code}>(x) }}",
    )


def test_cast_there_and_back_goes() -> None:
    check(
        RULES,
        before="g (float16[N] x) => (float16[N] y) { t = Cast<to = 1>(x)  u = Cast<to = 10>(t)  y = Neg(u) }",
        after="g (float16[N] x) => (float16[N] y) { y = Neg(x) }",
    )


@pytest.mark.parametrize(
    ("first", "middle", "last"),
    [
        ("float", 10, "float"),  # half precision loses digits
        ("float", 7, "float"),  # integers lose the fraction
        ("float16", 16, "float"),  # bfloat16 has fewer digits
        ("int64", 11, "float"),  # 2**53 + 1 is no double
        ("float", 11, "int32"),  # out of range, the result depends on the type read
        ("int32", 11, "int8"),  # integers wrap, floats do not
    ],
)
def test_cast_through_a_narrower_type_stays(first: str, middle: int, last: str) -> None:
    code = {"float": 1, "int32": 6, "int8": 3}[last]
    check(
        RULES,
        before=f"g ({first}[N] x) => ({last}[N] y) {{ t = Cast<to = {middle}>(x)  y = Cast<to = {code}>(t) }}",
    )


def test_inner_cast_with_other_use_is_left_beside() -> None:
    head = "g (float16[N] x) => (double[N] y, float[N] t)"
    check(
        RULES,
        before=f"{head} {{ t = Cast<to = 1>(x)  y = Cast<to = 11>(t) }}",
        after=f"{head} {{ t = Cast<to = 1>(x)  y = Cast<to = 11>(x) }}",
    )


def test_transposes_compose() -> None:
    head = "g (float[A,B,C] x) => (float[P,Q,R] y)"
    check(
        RULES,
        before=f"{head} {{ t = Transpose<perm = [1, 2, 0]>(x)  y = Transpose<perm = [0, 2, 1]>(t) }}",
        after=f"{head} {{ y = Transpose<perm = [1, 0, 2]>(x) }}",
    )


def test_transposes_cancel() -> None:
    check(
        RULES,
        before="g (float[A,B] x) => (float[A,B] y) { t = Transpose(x)  u = Transpose(t)  y = Neg(u) }",
        after="g (float[A,B] x) => (float[A,B] y) { y = Neg(x) }",
    )


VIEWS = "<int64[1] a0 = {0}, int64[1] a1 = {1}, int64[1] last = {-1}, int64[2] a01 = {0, 1}>"


@pytest.mark.parametrize(
    ("before", "after", "dims"),
    [
        ("t = Unsqueeze(x, a0)  y = Unsqueeze(t, a1)", "y = Unsqueeze(x, a01)", "1,1,N,4"),
        ("t = Unsqueeze(x, a1)  y = Unsqueeze(t, last)", "y = Unsqueeze(x, p)", "N,1,4,1"),
        ("t = Unsqueeze(x, a0)  u = Squeeze(t, a0)  y = Neg(u)", "y = Neg(x)", "N,4"),
        ("t = Reshape(x, s)  y = Reshape(t, r)", "y = Reshape(x, q)", "N,2,2"),
        ("t = Flatten(x)  y = Unsqueeze(t, a0)", "y = Reshape(x, w)", "1,N,4"),
        ("t = Unsqueeze(x, a1)  u = Transpose<perm = [1, 0, 2]>(t)  y = Reshape(u, r)", "y = Reshape(x, q)", "N,2,2"),
        ("t = Unsqueeze(x, a1)  y = Transpose<perm = [1, 0, 2]>(t)", "y = Reshape(x, w)", "1,N,4"),
    ],
)  # fmt: skip
def test_views_join(before: str, after: str, dims: str) -> None:
    head = f"g (float[N,4] x) => (float[{dims}] y)"
    check(
        RULES,
        before=f"{head} {VIEWS[:-1]}, int64[1] s = {{-1}}, int64[3] r = {{-1, 2, 2}}> {{ {before} }}",
        after=f"{head} <int64[2] p = {{1, 3}}, int64[2] a01 = {{0, 1}}, int64[3] q = {{-1, 2, 2}}, "
        f"int64[3] w = {{1, -1, 4}}> {{ {after} }}",
    )


def test_squeezes_join() -> None:
    check(
        RULES,
        before=f"g (float[1,N,1,4] x) => (float[N,4] y) {VIEWS} {{ t = Squeeze(x, a0)  y = Squeeze(t, a1) }}",
        after="g (float[1,N,1,4] x) => (float[N,4] y) <int64[2] p = {0, 2}> { y = Squeeze(x, p) }",
    )


def test_unsqueezes_join_by_attribute() -> None:
    check(
        RULES,
        before="""g (float[N,4] x) => (float[1,1,N,4] y)
            { t = Unsqueeze<axes = [0]>(x)  y = Unsqueeze<axes = [0]>(t) }""",
        after="g (float[N,4] x) => (float[1,1,N,4] y) { y = Unsqueeze<axes = [0, 1]>(x) }",
        opset=11,
    )


def test_first_view_with_other_use_is_left_beside() -> None:
    head = "g (float[N,4] x) => (float[N,2,2] y, float[M] t)"
    check(
        RULES,
        before=f"{head} <int64[1] s = {{-1}}, int64[3] r = {{-1, 2, 2}}> {{ t = Reshape(x, s)  y = Reshape(t, r) }}",
        after=f"{head} <int64[1] s = {{-1}}, int64[3] r = {{-1, 2, 2}}> {{ t = Reshape(x, s)  y = Reshape(x, r) }}",
    )


def test_views_with_two_unknown_dims_stay() -> None:
    check(
        RULES,
        before="""g (float[A,B,4] x, int64[3] s) => (float[P,Q,R] y) <int64[2] r = {-1, 4}>
            { t = Reshape(x, r)  y = Reshape(t, s) }""",
        feeds=[],
        missed="more than one unknown dim",
    )


def test_reshape_of_unknown_rank_keeps_its_shape() -> None:
    check(
        RULES,
        before="""g (float[A,B] x, int64[K] s) => (float[P] y) <int64[1] r = {-1}>
            { t = Reshape(x, s)  y = Reshape(t, r) }""",
        after="g (float[A,B] x, int64[K] s) => (float[P] y) <int64[1] r = {-1}> { y = Reshape(x, r) }",
        feeds=[],
    )


def test_reshape_that_copies_a_dim_of_an_unknown_shape_stays() -> None:
    check(
        RULES,
        before="""g (float[A,B] x, int64[K] s) => (float[P,Q] y) <int64[2] r = {0, -1}>
            { t = Reshape(x, s)  y = Reshape(t, r) }""",
        feeds=[],
    )


def test_transpose_that_moves_elements_stays() -> None:
    check(
        RULES,
        before="""g (float[N,4] x) => (float[M] y) <int64[1] r = {-1}>
            { t = Transpose<perm = [1, 0]>(x)  y = Reshape(t, r) }""",
    )


def test_computed_reshape_of_last_dim_becomes_constant() -> None:
    """The dims [d0, d1, 4, d2/4] of x: [d0, d1, 256]."""
    constants = "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}>"
    check(
        RULES,
        before=f"""g (float[B,S,256] x) => (float[B,S,4,64] y) {constants} {{
            s = Shape(x)  b = Gather(s, zero)  n = Gather(s, one)  d = Gather(s, two)  q = Div(d, four)
            r = Concat<axis = 0>(b, n, four, q)  y = Reshape(x, r) }}""",
        after="g (float[B,S,256] x) => (float[B,S,4,64] y) <int64[4] r = {0, 0, 4, 64}> { y = Reshape(x, r) }",
    )


def test_computed_reshape_with_one_moved_dim_becomes_constant() -> None:
    check(
        RULES,
        before="""g (float[B,2,S,8] x) => (float[B,S,16] y) <int64[1] r = {16}, int64[1] i0 = {0}, int64[1] i2 = {2}> {
            t = Transpose<perm = [0, 2, 1, 3]>(x)  s = Shape(x)  b = Gather(s, i0)  n = Gather(s, i2)
            c = Concat<axis = 0>(b, n, r)  y = Reshape(t, c) }""",
        after="""g (float[B,2,S,8] x) => (float[B,S,16] y) <int64[3] r = {0, 0, 16}> {
            t = Transpose<perm = [0, 2, 1, 3]>(x)  y = Reshape(t, r) }""",
    )


def test_computed_reshape_with_two_moved_dims_stays() -> None:
    check(
        RULES,
        before="""g (float[A,B] x) => (float[B,A] y) <int64[2] i = {1, 0}>
            { s = Shape(x)  r = Gather(s, i)  y = Reshape(x, r) }""",
        missed="more than one unknown dim",
    )


def test_reshape_to_an_empty_tensor_stays() -> None:
    check(
        RULES,
        before="""g (float[0,N] x) => (float[P,Q] y) <int64[1] i = {1}, int64[1] z = {0}>
            { s = Shape(x)  n = Gather(s, i)  r = Concat<axis = 0>(n, z)  y = Reshape<allowzero = 1>(x, r) }""",
    )


def test_transpose_of_joined_dims_is_a_transpose_of_all() -> None:
    """The transposed key of torch.export: heads and batch joined around a matrix transpose."""
    head = "g (float[B,4,S,8] x) => (float[B,4,8,S] y)"
    check(
        RULES,
        before=f"""{head} <int64[1] lead = {{-1}}, int64[1] c8 = {{8}}, int64[1] c4 = {{4}}, int64[1] i2 = {{2}}> {{
            s = Shape(x)  n = Gather(s, i2)  p = Concat<axis = 0>(lead, n, c8)  q = Concat<axis = 0>(lead, c4, c8, n)
            r = Reshape(x, p)  t = Transpose<perm = [0, 2, 1]>(r)  y = Reshape(t, q) }}""",
        after=f"{head} {{ y = Transpose<perm = [0, 1, 3, 2]>(x) }}",
    )


@pytest.mark.parametrize(
    ("middle", "perm", "out"),
    [("6, 4", "1, 0", "4, 3, 2"), ("3, 8", "1, 0", "4, 2, 3"), ("2, 12", "1, 0", "3, 4, 2")],
)
def test_transpose_of_dims_joined_otherwise(middle: str, perm: str, out: str) -> None:
    """Dims that are parted otherwise than they were joined are parted before they move; x: [2, 3, 4]."""
    head = f"g (float[2,3,4] x) => (float[{out}] y)"
    before = f"""{head} <int64[2] m = {{{middle}}}, int64[3] o = {{{out}}}>
        {{ r = Reshape(x, m)  t = Transpose<perm = [{perm}]>(r)  y = Reshape(t, o) }}"""
    parted, moved = {"6, 4": ("3, 2, 4", "2, 0, 1"), "3, 8": ("3, 4, 2", "1, 2, 0")}.get(
        middle, ("", "1, 2, 0")
    )
    view, source = ("r = Reshape(x, m)", "r") if parted else ("", "x")
    held = f"<int64[3] m = {{{parted}}}>" if parted else ""
    check(
        RULES,
        before=before,
        after=f"{head} {held} {{ {view} y = Transpose<perm = [{moved}]>({source}) }}",
    )


def test_reshape_of_a_wrongly_declared_output_stays() -> None:
    """The file says [N, 5]; shape inference cannot see the contradiction until the shape is a constant."""
    text = """g (float[N,4] x) => (float[N,5] y) <int64[1] c = {0}, int64[1] d = {4}> {
        s = Shape(x)  n = Gather(s, c)  r = Concat<axis = 0>(n, d)  y = Reshape(x, r) }"""
    model = ir.from_proto(parse(text))
    before = structure(model)
    ctx = apply(RULES, model)
    assert structure(model) == before
    assert any("is wrong" in remark.reason for remark in ctx.remarks)


@pytest.mark.parametrize("last", ["2,3,5,4", "2,3,5,2,2"])
def test_axes_are_parted_before_they_move(last: str) -> None:
    """Two views meet, and one is left."""
    count = last.count(",") + 1
    perm = "1,2,0,3" if count == 4 else "1,2,0,3,4"
    apart = "5,2,3,4" if count == 4 else "5,2,3,2,2"
    check(
        RULES,
        f"g (float[5,24] x) => (float[{last}] y) <int64[3] a = {{5,6,4}}, int64[{count}] b = {{{last}}}> {{"
        " r = Reshape(x, a) t = Transpose<perm=[1,0,2]>(r) y = Reshape(t, b) }",
        f"g (float[5,24] x) => (float[{last}] y) <int64[{count}] a = {{{apart}}}> {{"
        f" r = Reshape(x, a) y = Transpose<perm=[{perm}]>(r) }}",
    )


@pytest.mark.parametrize(
    "body",
    [
        "r = Reshape(x, a) t = Transpose<perm=[1,0,2]>(r) y = Reshape(t, joined)",  # axes become one
        "r = Relu(x3) t = Transpose<perm=[1,0,2]>(r) y = Reshape(t, b)",  # no view to meet
    ],
)
def test_other_views_of_a_transpose_stay(body: str) -> None:
    shape = "30,4" if "joined" in body else "2,3,5,4"
    check(
        RULES,
        f"g (float[5,24] x, float[5,6,4] x3) => (float[{shape}] y) <int64[3] a = {{5,6,4}},"
        f" int64[2] joined = {{30,4}}, int64[4] b = {{2,3,5,4}}> {{ {body} }}",
    )
