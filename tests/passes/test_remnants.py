"""Operators with nothing to do, and pairs that undo each other."""

from __future__ import annotations

import pytest
from graphopt_passes import remnants

from tests.rewriting import check

RULES = remnants.RULES
IMAGE = "float[2,3,4,4]"


def around(node: str, dtype: str = IMAGE, constants: str = "", out: str = "") -> str:
    held = f"<{constants}>" if constants else ""
    return f"g ({dtype} x) => ({out or dtype} y) {held} {{ a = Neg(x)  {node}  y = Neg(b) }}"


def gone(node: str, dtype: str = IMAGE, constants: str = "", opset: int = 18) -> None:
    """The node goes; what is around it stays."""
    after = f"g ({dtype} x) => ({dtype} y) {{ a = Neg(x)  y = Neg(a) }}"
    check(RULES, around(node, dtype, constants), after, opset=opset)


def stays(
    node: str, dtype: str = IMAGE, constants: str = "", out: str = "", missed: str = ""
) -> None:
    check(RULES, around(node, dtype, constants, out), missed=missed)


@pytest.mark.parametrize("kind", ["AveragePool", "MaxPool"])
def test_pools_over_one_element_go(kind: str) -> None:
    gone(f"b = {kind}<kernel_shape = [1,1], strides = [1,1]>(a)")


@pytest.mark.parametrize(
    ("attributes", "width"),
    [("kernel_shape = [1,2]", 3), ("kernel_shape = [1,1], strides = [1,2]", 2)],
)
def test_other_pools_stay(attributes: str, width: int) -> None:
    stays(f"b = AveragePool<{attributes}>(a)", out=f"float[2,3,4,{width}]")


def test_pool_whose_indices_are_read_stays() -> None:
    check(
        RULES,
        f"g ({IMAGE} x) => ({IMAGE} y, int64[2,3,4,4] i) {{ y, i = MaxPool<kernel_shape = [1,1]>(x) }}",
    )


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pools_of_one_element_go(kind: str) -> None:
    gone(f"b = {kind}(a)", "float[N,3,1,1]")
    stays(f"b = {kind}(a)", "float[N,3,1,2]", out="float[N,3,1,1]")


def test_sum_along_one() -> None:
    gone("b = CumSum(a, k)", "float[3,1]", "int64 k = {1}")
    stays("b = CumSum(a, k)", "float[3,1]", "int64 k = {0}")
    stays("b = CumSum<exclusive = 1>(a, k)", "float[3,1]", "int64 k = {1}")


def test_clip_without_bounds() -> None:
    gone("b = Clip(a)", "int32[3]")
    stays("b = Clip(a)", "float[3]")
    stays("b = Clip(a, k)", "int32[3]", "int32 k = {0}")


@pytest.mark.parametrize("kind", ["Max", "Min"])
def test_extremes_of_equals(kind: str) -> None:
    gone(f"b = {kind}(a, a)", "float[3]")
    gone(f"b = {kind}(a, a, a)", "float[3]")
    stays(f"b = {kind}(a, k)", "float[3]", "float[3] k = {1,2,3}")


@pytest.mark.parametrize("kind", ["And", "Or"])
def test_logic_of_equals(kind: str) -> None:
    text = "g (bool[3] x) => (bool[3] y) {{ a = Not(x)  {}  y = Xor(b, x) }}"
    after = "g (bool[3] x) => (bool[3] y) { a = Not(x)  y = Xor(a, x) }"
    check(RULES, text.format(f"b = {kind}(a, a)"), after)


def test_split_put_together_again() -> None:
    gone(
        "p, q = Split<axis = 1, num_outputs = 3>(a)  b = Concat<axis = 1>(p, q)".replace(
            "p, q", "p, q, r"
        )
    )
    stays("p, q = Split<axis = 2, num_outputs = 2>(a)  b = Concat<axis = 2>(q, p)")
    stays(
        "p, q = Split<axis = 2, num_outputs = 2>(a)  b = Concat<axis = 3>(p, q)",
        out="float[2,3,2,8]",
    )


SLICED = "p = Slice(a, o, m, k)  q = Slice(a, m, e, k)  b = Concat<axis = {axis}>({order})"


@pytest.mark.parametrize("end", ["5", "9223372036854775807"])
def test_slices_put_together_again(end: str) -> None:
    constants = (
        f"int64[1] o = {{0}}, int64[1] m = {{2}}, int64[1] e = {{{end}}}, int64[1] k = {{1}}"
    )
    gone(SLICED.format(axis=1, order="p, q"), "float[3,5]", constants)


@pytest.mark.parametrize(
    ("start", "end", "order", "out"),
    [
        (0, 4, "p, q", "float[3,4]"),
        (1, 5, "p, q", "float[3,4]"),
        (0, 5, "q, p", "float[3,5]"),
        (0, 5, "p, q, q", "float[3,8]"),
    ],
)
def test_slices_that_leave_out_or_reorder_stay(start: int, end: int, order: str, out: str) -> None:
    constants = (
        f"int64[1] o = {{{start}}}, int64[1] m = {{2}}, int64[1] e = {{{end}}}, int64[1] k = {{1}}"
    )
    stays(SLICED.format(axis=1, order=order), "float[3,5]", constants, out)


def test_indices_of_indices() -> None:
    text = "g (float[3,5] x) => (float[3,2] y) <{}> {{ {} }}"
    check(
        RULES,
        text.format(
            "int64[3] i = {4,-3,1}, int64[2] j = {2,-2}",
            "a = Gather<axis = 1>(x, i)  y = Gather<axis = -1>(a, j)",
        ),
        text.format("int64[2] k = {1,-3}", "y = Gather<axis = -1>(x, k)"),
    )


def test_indices_along_another_axis_stay() -> None:
    check(
        RULES,
        "g (float[3,5] x) => (float[2,3] y) <int64[3] i = {4,3,1}, int64[2] j = {2,1}>"
        " { a = Gather<axis = 1>(x, i)  y = Gather<axis = 0>(a, j) }",
    )


def test_compress_by_a_constant() -> None:
    text = "g (float[3,4] x) => (float[3,2] y) <{}> {{ y = {} }}"
    check(
        RULES,
        text.format("bool[3] c = {0,1,1}", "Compress<axis = 1>(x, c)"),
        text.format("int64[2] i = {1,2}", "Gather<axis = 1>(x, i)"),
    )
    gone("b = Compress<axis = 1>(a, c)", "float[2,3]", "bool[3] c = {1,1,1}")


def test_compress_of_an_unknown_axis_stays() -> None:
    check(
        RULES,
        "g (float[3,N] x) => (float[3,M] y) <bool[1] c = {1}> { y = Compress<axis = 1>(x, c) }",
        missed="shorter than the condition",
    )
    check(RULES, "g (float[3] x) => (float[M] y) <bool[1] c = {1}> { y = Compress(x, c) }")


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [11, 18])
def test_index_of_the_most_probable(kind: str, opset: int) -> None:
    text = "g (float[3,5] x) => (int64[3,1] y) {{ {} }}"
    check(
        RULES,
        text.format(f"a = {kind}<axis = 1>(x)  y = ArgMax<axis = -1>(a)"),
        text.format("y = ArgMax<axis = -1>(x)"),
        opset=opset,
    )


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        (
            "g (float[3,5] x) => (int64[1,5] y) { a = Softmax<axis = 1>(x)  y = ArgMax<axis = 0>(a) }",
            18,
        ),
        (
            "g (float[3,5,2] x) => (int64[3,1,2] y) { a = Softmax<axis = 1>(x)  y = ArgMax<axis = 1>(a) }",
            11,
        ),
        (
            "g (float[3,5] x) => (int64[3,1] y) { a = Softmax<axis = 1>(x)  y = ArgMin<axis = 1>(a) }",
            18,
        ),
    ],
    ids=["other axis", "over several axes", "least"],
)
def test_index_of_something_else_stays(text: str, opset: int) -> None:
    check(RULES, text, opset=opset)


def requantized(second: str, constants: str = "") -> str:
    return (
        "g (uint8[3] x) => (float[3] y, float[3] d) <float s = {0.1}, uint8 z = {3}"
        f" {constants}> {{ d = DequantizeLinear(x, s, z)  {second}  y = DequantizeLinear(q, s, z) }}"
    )


def test_requantization() -> None:
    check(
        RULES,
        requantized("q = QuantizeLinear(d, s, z)"),
        "g (uint8[3] x) => (float[3] y, float[3] d) <float s = {0.1}, uint8 z = {3}>"
        " { d = DequantizeLinear(x, s, z)  y = DequantizeLinear(x, s, z) }",
    )


@pytest.mark.parametrize(
    ("second", "constants"),
    [
        ("q = QuantizeLinear(d, t, z)", ", float t = {0.2}"),
        ("q = QuantizeLinear(d, s, w)", ", uint8 w = {4}"),
    ],
    ids=["scale", "zero point"],
)
def test_requantization_to_something_else_stays(second: str, constants: str) -> None:
    check(RULES, requantized(second, constants))


def test_shape_of_what_only_its_shape_is_read_of() -> None:
    text = "g (float[A,B] x) => (int64[2] y) {{ {} }}"
    check(
        RULES,
        text.format("a = Cast<to = 10>(x)  b = Exp(a)  y = Shape(b)"),
        text.format("y = Shape(x)"),
    )


def test_shape_of_what_is_read_otherwise_stays() -> None:
    check(RULES, "g (float[A,B] x) => (int64[2] y, float[A,B] a) { a = Exp(x)  y = Shape(a) }")
