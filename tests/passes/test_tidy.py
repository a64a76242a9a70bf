"""No-ops: when a node passes its input on unchanged, and when it only seems to."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes import PIPELINES, tidy

from tests.rewriting import apply, check, parse

X = "g (float[2,3] x) => (float[2,3] y) "
DYNAMIC = "g (float[N,3] x) => (float[N,3] y) "


def no_op(body: str, *, header: str = X, opset: int = 18) -> None:
    """`h = Neg(x)  {body: t from h}  y = Neg(t)` loses the node that makes t."""
    check(
        tidy.RULES,
        header + "{ h = Neg(x) " + body + " y = Neg(t) }",
        header.split(" <", maxsplit=1)[0] + " { h = Neg(x)  y = Neg(h) }",
        opset=opset,
    )


def stays(body: str, *, header: str = X, opset: int = 18, missed: str = "") -> None:
    check(
        tidy.RULES,
        header + "{ h = Neg(x) " + body + " y = Neg(t) }",
        opset=opset,
        missed=missed,
    )


@pytest.mark.parametrize(
    "body",
    [
        "t = Identity(h)",
        "t = Dropout(h)",
        "t, m = Dropout(h)",
        "t = Cast<to = 1>(h)",
        "t = CastLike(h, x)",
        "t = Concat<axis = 1>(h)",
        "t = Sum(h)",
        "t = Max(h)",
        "t = Min(h)",
        "t = Mean(h)",
        "t = Split<axis = 1, num_outputs = 1>(h)",
        "t = Flatten(h)",
        "t = Transpose<perm = [0, 1]>(h)",
        "s = Constant<value_ints = [2, 3]>() t = Reshape(h, s)",
        "s = Constant<value_ints = [0, -1]>() t = Reshape(h, s)",
        "s = Constant<value_ints = [1, 1]>() t = Expand(h, s)",
        "s = Constant<value_ints = [3]>() t = Expand(h, s)",
        "s = Constant<value_ints = [1, 1]>() t = Tile(h, s)",
        "s = Constant<value_ints = [0, 0, 0, 0]>() t = Pad(h, s)",
        's = Constant<value_ints = [0, 0, 0, 0]>() t = Pad<mode = "reflect">(h, s)',
        "a = Constant<value_ints = [0]>() b = Constant<value_ints = [9]>() t = Slice(h, a, b)",
        "a = Constant<value_ints = [-2]>() b = Constant<value_ints = [2]>() t = Slice(h, a, b)",
        "a = Constant<value_ints = [0]>() b = Constant<value_ints = [3]>() c = Constant<value_ints = [-1]>()"
        " one = Constant<value_ints = [1]>() t = Slice(h, a, b, c, one)",
        "i = Constant<value_ints = [0, 1, 2]>() t = Gather<axis = 1>(h, i)",
        "i = Constant<value_ints = [0, 1, 2]>() t = Gather<axis = -1>(h, i)",
        "i = Constant<value = int64[2,1] {0, 1}>() t = ScatterND(x, i, h)",
        "c = Constant<value = bool[1] {1}>() t = Where(c, h, x)",
        "c = Constant<value = bool[1] {0}>() t = Where(c, x, h)",
        "c = Constant<value = bool[2,1] {0, 1}>() t = Where(c, h, h)",
    ],
)
def test_no_op_goes(body: str) -> None:
    no_op(body)


@pytest.mark.parametrize(
    ("body", "result", "missed"),
    [
        ("u = Cast<to = 10>(h) t = Cast<to = 1>(u)", "2,3", ""),
        ("t = Concat<axis = 0>(h, h)", "4,3", ""),
        ("t, u = Split<axis = 1, num_outputs = 2>(h)", "2,2", ""),
        ("t = Flatten<axis = 0>(h)", "1,6", ""),
        ("t = Transpose(h)", "3,2", ""),
        ("s = Constant<value_ints = [3, 2]>() t = Reshape(h, s)", "3,2", ""),
        ("s = Constant<value_ints = [1, 2, 3]>() t = Expand(h, s)", "1,2,3", ""),
        ("s = Constant<value_ints = [1, 2]>() t = Tile(h, s)", "2,6", ""),
        ("s = Constant<value_ints = [0, -1, 0, 1]>() t = Pad(h, s)", "2,3", ""),
        ("a = Constant<value_ints = [1]>() b = Constant<value_ints = [9]>() t = Slice(h, a, b)", "1,3", ""),
        ("i = Constant<value_ints = [0, 2, 1]>() t = Gather<axis = 1>(h, i)", "2,3", ""),
        ("i = Constant<value_ints = [0, 1]>() t = Gather<axis = 1>(h, i)", "2,2", ""),
        ("i = Constant<value = int64[1,3] {0, 1, 2}>() t = Gather<axis = 1>(h, i)", "2,1,3", ""),
        ("i = Constant<value = int64[2,1] {1, 0}>() t = ScatterND(x, i, h)", "2,3", ""),
        ('i = Constant<value = int64[2,1] {0, 1}>() t = ScatterND<reduction = "add">(x, i, h)', "2,3", ""),
        ("c = Constant<value = bool[2,1] {0, 1}>() t = Where(c, x, h)", "2,3", ""),
        ("c = Constant<value = bool[2,2,1] {1, 1, 1, 1}>() t = Where(c, h, x)", "2,2,3", "broadcast"),
    ],
)  # fmt: skip
def test_what_changes_the_tensor_stays(body: str, result: str, missed: str) -> None:
    stays(body, header=f"g (float[2,3] x) => (float[{result}] y) ", missed=missed)


def test_training_dropout_stays() -> None:
    check(
        tidy.RULES,
        X
        + "{ r = Constant<value_float = 0.5>() m = Constant<value = bool {1}>() y = Dropout(x, r, m) }",
        missed="training",
        feeds=[],
    )


def test_reversed_slice_of_all_stays() -> None:
    stays(
        "a = Constant<value_ints = [-1]>() b = Constant<value_ints = [-9]>() c = Constant<value_ints = [1]>()"
        " s = Constant<value_ints = [-1]>() t = Slice(h, a, b, c, s)"
    )


def test_dropout_with_ratio_zero_goes_even_in_training() -> None:
    no_op("r = Constant<value_float = 0.0>() m = Constant<value = bool {1}>() t = Dropout(h, r, m)")


def test_used_mask_becomes_all_true() -> None:
    check(
        tidy.RULES,
        "g (float[N,3] x) => (float[N,3] y, bool[N,3] m) { h = Neg(x) t, m = Dropout(h) y = Neg(t) }",
        "g (float[N,3] x) => (float[N,3] y, bool[N,3] m) { h = Neg(x) s = Shape(h)"
        " m = ConstantOfShape<value = bool[1] {1}>(s) y = Neg(h) }",
    )


def test_used_mask_of_old_dropout_stays() -> None:
    check(
        tidy.RULES,
        "g (float[2,3] x) => (float[2,3] y, bool[2,3] m) { h = Neg(x) t, m = Dropout(h) y = Neg(t) }",
        opset=10,
        missed="mask",
    )


@pytest.mark.parametrize("opset", [7, 9, 10])
def test_old_dropout_goes(opset: int) -> None:
    no_op("t = Dropout<ratio = 0.3>(h)", opset=opset)


def test_dynamic_dims_are_compared_by_name() -> None:
    no_op("s = Shape(x) t = Reshape(h, s)", header=DYNAMIC)
    no_op("s = Shape(x) t = Expand(h, s)", header=DYNAMIC)


def test_reshape_to_another_symbol_stays() -> None:
    check(
        tidy.RULES,
        "g (float[N,M] x, float[M,N] z) => (float[M,N] y) { h = Neg(x) s = Shape(z) t = Reshape(h, s) y = Neg(t) }",
        dims=(3,),
    )


def test_slice_to_the_end_of_a_dynamic_dim_goes() -> None:
    no_op(
        "a = Constant<value_ints = [0]>() b = Constant<value_ints = [9223372036854775807]>() t = Slice(h, a, b)",
        header=DYNAMIC,
    )
    no_op(
        "a = Constant<value_ints = [0]>() t = Slice(h, a, b, a)".replace(
            "t =", "s = Shape<start = 0, end = 1>(x) b = Identity(s) t ="
        ),
        header=DYNAMIC,
    )


def test_slice_of_dynamic_dim_to_a_number_stays() -> None:
    check(
        tidy.RULES,
        "g (float[N] x) => (float[M] y) { a = Constant<value_ints = [0]>() b = Constant<value_ints = [2]>() h = Neg(x)"
        " t = Slice(h, a, b) y = Neg(t) }",
    )


@pytest.mark.parametrize("opset", [9])
def test_old_spellings_with_attributes(opset: int) -> None:
    no_op("t = Slice<starts = [0, 0], ends = [2, 99]>(h)", opset=opset)
    no_op("t = Pad<pads = [0, 0, 0, 0]>(h)", opset=opset)


def test_transpose_of_unit_axes_goes() -> None:
    check(
        tidy.RULES,
        "g (float[1,1,5] x) => (float[1,1,5] y) { h = Neg(x) t = Transpose<perm = [1, 0, 2]>(h) y = Neg(t) }",
        "g (float[1,1,5] x) => (float[1,1,5] y) { h = Neg(x) y = Neg(h) }",
    )


def test_transpose_that_moves_a_unit_axis_stays() -> None:
    check(
        tidy.RULES,
        "g (float[1,5] x) => (float[5,1] y) { h = Neg(x) t = Transpose(h) y = Neg(t) }",
    )


def test_transpose_of_unknown_rank_by_identity_goes() -> None:
    check(
        tidy.RULES,
        "g (float[2,3] x, int64[2] s) => (float[A,B] y)"
        " { h = Reshape(x, s) t = Transpose<perm = [0, 1]>(h) y = Neg(t) }",
        "g (float[2,3] x, int64[2] s) => (float[A,B] y) { h = Reshape(x, s) y = Neg(h) }",
        feeds=[],
    )


IMAGE = "g (float[1,2,4,4] x) => (float[1,2,4,4] y) "


@pytest.mark.parametrize(
    "body",
    [
        "s = Constant<value_floats = [1.0, 1.0, 1.0, 1.0]>() t = Resize(h, , s)",
        's = Constant<value_floats = [1.0, 1.0, 1.0, 1.0]>() t = Resize<mode = "linear">(h, , s)',
        's = Constant<value_ints = [1, 2, 4, 4]>() t = Resize<mode = "cubic">(h, , , s)',
    ],
)
def test_resize_to_the_same_size_goes(body: str) -> None:
    no_op(body, header=IMAGE)


def test_resize_in_old_spellings_goes() -> None:
    scales = "s = Constant<value = float[4] {1.0, 1.0, 1.0, 1.0}>()"
    no_op(f"{scales} t = Upsample(h, s)", header=IMAGE, opset=9)
    no_op(f"{scales} t = Resize(h, s)", header=IMAGE, opset=10)
    no_op("t = Upsample<scales = [1.0, 1.0, 1.0, 1.0]>(h)", header=IMAGE, opset=7)


@pytest.mark.parametrize(
    "body",
    [
        "s = Constant<value_floats = [1.0, 1.0, 1.5, 1.1]>() t = Resize(h, , s)",
        's = Constant<value_ints = [1, 2, 4, 4]>() '
        'r = Constant<value_floats = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]>()'
        ' t = Resize<coordinate_transformation_mode = "tf_crop_and_resize", mode = "linear">(h, r, , s)',
    ],
)  # fmt: skip
def test_resize_that_resamples_stays(body: str) -> None:
    stays(body, header="g (float[1,2,4,4] x) => (float[A,B,C,D] y) ")


def test_gather_of_a_range_over_a_dynamic_axis_goes() -> None:
    check(
        tidy.RULES,
        """g (float[N,3] x) => (float[N,3] y) <int64 zero = {0}, int64 one = {1}>
        { h = Neg(x) s = Shape<end = 1>(x) n = Squeeze(s) r = Range(zero, n, one) t = Gather(h, r) y = Neg(t) }""",
        "g (float[N,3] x) => (float[N,3] y) { h = Neg(x) y = Neg(h) }",
    )


def test_gather_of_a_range_of_another_size_stays() -> None:
    check(
        tidy.RULES,
        """g (float[N,3] x, float[M] z) => (float[M,3] y) <int64 zero = {0}, int64 one = {1}>
        { h = Neg(x) s = Shape(z) n = Squeeze(s) r = Range(zero, n, one) t = Gather(h, r) y = Neg(t) }""",
    )


def test_cast_like_becomes_cast() -> None:
    check(
        tidy.RULES,
        "g (float[N] x, int64[M] z) => (int64[N] y) { y = CastLike(x, z) }",
        "g (float[N] x, int64[M] z) => (int64[N] y) { y = Cast<to = 7>(x) }",
        feeds=[],
    )


def test_cast_like_keeps_saturate() -> None:
    check(
        tidy.RULES,
        "g (float[N] x, float8e4m3fn[M] z) => (float[N] y) { t = CastLike<saturate = 0>(x, z) y = Cast<to = 1>(t) }",
        "g (float[N] x, float8e4m3fn[M] z) => (float[N] y) { t = Cast<saturate = 0, to = 17>(x) y = Cast<to = 1>(t) }",
        opset=19,
        feeds=[],
    )


def test_identity_between_input_and_output_stays_and_nothing_is_said() -> None:
    ctx = check(tidy.RULES, "g (float[N] x) => (float[N] y) { y = Identity(x) }")
    assert not ctx.remarks


def test_identity_of_an_output_stays() -> None:
    check(
        tidy.RULES,
        "g (float[N] x) => (float[N] t, float[N] y) { t = Neg(x) y = Identity(t) }",
        missed="producer of its own",
    )


def test_identity_before_an_output_hands_over_the_name() -> None:
    check(
        tidy.RULES,
        "g (float[N] x) => (float[N] y) { t = Neg(x) y = Identity(t) }",
        "g (float[N] x) => (float[N] y) { y = Neg(x) }",
    )


def test_identity_of_an_initializer_goes() -> None:
    check(
        tidy.RULES,
        "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { t = Identity(w) y = Add(x, t) }",
        "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { y = Add(x, w) }",
    )


def test_identities_in_branches() -> None:
    check(
        tidy.RULES,
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] p) { q = Neg(x) p = Identity(q) },
                       else_branch = e () => (float[2] r) { r = Identity(x) }> }""",
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] p) { p = Neg(x) },
                       else_branch = e () => (float[2] r) { r = Identity(x) }> }""",
    )


def test_identity_of_a_loop_condition_stays() -> None:
    check(
        tidy.RULES,
        """g (int64 n, bool c, float[2] x) => (float[2] y) {
            y = Loop(n, c, x) <body = b (int64 i, bool ci, float[2] v) => (bool co, float[2] w)
                { co = Identity(ci) w = Add(v, x) }> }""",
    )


@pytest.mark.parametrize(
    ("opset", "body", "left"),
    [
        (6, "t = Dropout<is_test = 1>(h)", ["Neg", "Neg"]),
        (6, "t = Dropout(h)", ["Neg", "Dropout", "Neg"]),
        (5, 't = Cast<to = "FLOAT">(h)', ["Neg", "Neg"]),
        (5, 't = Cast<to = "DOUBLE">(h)', ["Neg", "Cast", "Neg"]),
    ],
)
def test_old_spellings_are_read(opset: int, body: str, left: list[str]) -> None:
    """Dropout-1 and -6 drop unless told otherwise, Cast-1 names the type; no runtime here has them."""
    model = ir.from_proto(parse(X + "{ h = Neg(x) " + body + " y = Neg(t) }", opset=opset))
    apply(tidy.RULES, model)
    assert [node.op_type for node in model.graph] == left


def test_what_is_no_permutation_is_left_to_the_runtime() -> None:
    for perm in ("[0, 7]", "[0, 0]"):
        text = (
            X.replace("float[2,3] y", "float[N,M] y")
            + f"{{ t = Transpose<perm = {perm}>(x) y = Transpose<perm = {perm}>(t) }}"
        )
        steps = (*PIPELINES["cpu", "fp32"],)
        model = ir.from_proto(parse(text))
        apply(steps, model)
        assert [node.op_type for node in model.graph] == ["Transpose", "Transpose"]
