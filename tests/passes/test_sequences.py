"""Sequences and optionals between two known ends."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import sequences

from tests.rewriting import apply, check, parse

RULES = sequences.RULES


def at(position: int) -> str:
    return f"<int64 p = {{{position}}}>"


@pytest.mark.parametrize(("position", "kept"), [(0, "x"), (1, "z"), (-1, "z"), (-2, "x")])
def test_element_of_construct(position: int, kept: str) -> None:
    check(
        RULES,
        f"g (float[N] x, float[N] z) => (float[N] y) {at(position)} "
        "{ s = SequenceConstruct(x, z) t = SequenceAt(s, p) y = Neg(t) }",
        f"g (float[N] x, float[N] z) => (float[N] y) {{ y = Neg({kept}) }}",
    )


def test_element_outside_of_construct_stays() -> None:
    check(
        RULES,
        f"g (float[N] x) => (float[N] y) {at(1)} {{ s = SequenceConstruct(x) y = SequenceAt(s, p) }}",
        missed="position 1 of a sequence of 1",
        feeds=[],
    )


def test_element_at_unknown_position_stays() -> None:
    check(
        RULES,
        "g (float[N] x, float[N] z, int64 p) => (float[N] y) { s = SequenceConstruct(x, z) y = SequenceAt(s, p) }",
    )


def test_sequence_that_is_an_output_lives_on() -> None:
    check(
        RULES,
        f"g (float[N] x, float[N] z) => (seq(float[N]) s, float[N] y) {at(1)} "
        "{ s = SequenceConstruct(x, z) t = SequenceAt(s, p) y = Neg(t) }",
        "g (float[N] x, float[N] z) => (seq(float[N]) s, float[N] y) { s = SequenceConstruct(x, z) y = Neg(z) }",
    )


def test_length_of_construct() -> None:
    check(
        RULES,
        "g (float[N] x, int64 k) => (int64 y) { s = SequenceConstruct(x, x, x) n = SequenceLength(s) y = Add(n, k) }",
        "g (float[N] x, int64 k) => (int64 y) { n = Constant<value = int64 {3}>() y = Add(n, k) }",
    )


def test_length_that_is_an_output_gets_a_producer() -> None:
    model = ir.from_proto(
        parse("g (float[N] x) => (int64 y) { s = SequenceConstruct(x, x) y = SequenceLength(s) }")
    )
    apply(RULES, model)
    assert [node.op_type for node in model.graph] == ["Constant"]


def test_concat_of_construct() -> None:
    check(
        RULES,
        "g (float[N,2] x, float[M,2] z) => (float[K,2] y)"
        " { s = SequenceConstruct(x, z) y = ConcatFromSequence<axis = 0>(s) }",
        "g (float[N,2] x, float[M,2] z) => (float[K,2] y) { y = Concat<axis = 0>(x, z) }",
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat_along_a_new_axis(axis: int) -> None:
    check(
        RULES,
        "g (float[2] x, float[2] z) => (float[A,B] y) { s = SequenceConstruct(x, z)"
        f" y = ConcatFromSequence<axis = {axis}, new_axis = 1>(s) }}",
        f"g (float[2] x, float[2] z) => (float[A,B] y) <int64[1] a = {{{axis}}}, int64[1] b = {{{axis}}}>"
        f" {{ u = Unsqueeze(x, a) v = Unsqueeze(z, b) y = Concat<axis = {axis}>(u, v) }}",
    )


def test_concat_along_a_new_axis_in_an_old_opset() -> None:
    check(
        RULES,
        "g (float[2] x, float[2] z) => (float[2,2] y) { s = SequenceConstruct(x, z)"
        " y = ConcatFromSequence<axis = 0, new_axis = 1>(s) }",
        "g (float[2] x, float[2] z) => (float[2,2] y)"
        " { u = Unsqueeze<axes = [0]>(x) v = Unsqueeze<axes = [0]>(z) y = Concat<axis = 0>(u, v) }",
        opset=11,
    )


@pytest.mark.parametrize(
    ("edit", "result"),
    [
        ("t = SequenceInsert(s, w)", "x, z, w"),
        ("t = SequenceInsert(s, w, p)", "x, w, z"),
        ("t = SequenceErase(s, p)", "x"),
        ("t = SequenceErase(s)", "x"),
    ],
)
def test_editing_a_construct(edit: str, result: str) -> None:
    header = "g (float[N] x, float[N] z, float[N] w) => (float[M] y) "
    check(
        RULES,
        header
        + f"{at(1)} {{ s = SequenceConstruct(x, z) {edit} y = ConcatFromSequence<axis = 0>(t) }}",
        header + f"{{ y = Concat<axis = 0>({result}) }}",
    )


def test_insert_at_the_very_end_and_outside() -> None:
    header = "g (float[N] x, float[N] w) => (float[M] y) "
    body = "{ s = SequenceConstruct(x) t = SequenceInsert(s, w, p) y = ConcatFromSequence<axis = 0>(t) }"
    check(RULES, header + at(1) + body, header + "{ y = Concat<axis = 0>(x, w) }")
    check(RULES, header + at(2) + body, missed="position 2 of a sequence of 1", feeds=[])


def test_list_built_from_nothing() -> None:
    check(
        RULES,
        "g (float[N] x, float[N] z) => (float[M] y) { e = SequenceEmpty() s = SequenceInsert(e, x)"
        " t = SequenceInsert(s, z) y = ConcatFromSequence<axis = 0>(t) }",
        "g (float[N] x, float[N] z) => (float[M] y) { y = Concat<axis = 0>(x, z) }",
    )


def test_erasing_the_only_element_stays() -> None:
    check(
        RULES,
        "g (float[N] x) => (seq(float[N]) y) { s = SequenceConstruct(x) y = SequenceErase(s) }",
    )


SPLIT = "g (float[4,3] x) => (float[A,B] y) "


def test_pieces_of_a_split() -> None:
    check(
        RULES,
        SPLIT
        + "<int64 n = {2}, int64 p = {1}, int64 q = {0}> { s = SplitToSequence(x, n) a = SequenceAt(s, p)"
        " b = SequenceAt(s, q) y = Sub(a, b) }",
        SPLIT + "<int64[2] n = {2, 2}> { b, a = Split<axis = 0>(x, n) y = Sub(a, b) }",
    )


def test_uneven_pieces() -> None:
    check(
        RULES,
        SPLIT + "<int64 n = {3}, int64 p = {1}> { s = SplitToSequence(x, n) y = SequenceAt(s, p) }",
        SPLIT + "<int64[2] n = {3, 1}> { b, y = Split<axis = 0>(x, n) }",
    )


def test_given_pieces_of_a_dynamic_dim() -> None:
    check(
        RULES,
        "g (float[N,3] x) => (float[A,B] y) <int64[2] n = {1, 2}, int64 p = {1}>"
        " { s = SplitToSequence(x, n) y = SequenceAt(s, p) }",
        "g (float[N,3] x) => (float[A,B] y) <int64[2] n = {1, 2}> { b, y = Split<axis = 0>(x, n) }",
        dims=(3,),
    )


def test_given_pieces_in_an_old_opset() -> None:
    check(
        RULES,
        SPLIT
        + "<int64[2] n = {1, 3}, int64 p = {1}> { s = SplitToSequence(x, n) y = SequenceAt(s, p) }",
        SPLIT + "{ b, y = Split<axis = 0, split = [1, 3]>(x) }",
        opset=11,
    )


def test_rows_without_keepdims() -> None:
    check(
        RULES,
        "g (float[4,3] x) => (float[A] y) <int64 p = {2}>"
        " { s = SplitToSequence<keepdims = 0>(x) y = SequenceAt(s, p) }",
        "g (float[4,3] x) => (float[A] y) <int64 i = {2}> { y = Gather<axis = 0>(x, i) }",
    )


def test_rows_with_keepdims_read_as_a_whole() -> None:
    check(
        RULES,
        "g (float[2,3] x) => (float[A,B] y) { s = SplitToSequence<axis = 1>(x) y = ConcatFromSequence<axis = 0>(s) }",
        "g (float[2,3] x) => (float[A,B] y) <int64[3] n = {1, 1, 1}>"
        " { a, b, c = Split<axis = 1>(x, n) y = Concat<axis = 0>(a, b, c) }",
    )


def test_split_into_one_piece() -> None:
    check(
        RULES,
        SPLIT
        + "<int64 n = {9}, int64 p = {0}> { s = SplitToSequence(x, n) t = SequenceAt(s, p) y = Neg(t) }",
        SPLIT + "{ y = Neg(x) }",
    )


@pytest.mark.parametrize(
    ("split", "missed"),
    [
        ("SplitToSequence(x, n)", "unknown size"),
        ("SplitToSequence<keepdims = 0>(x)", "unknown number"),
    ],
)
def test_split_of_a_dynamic_dim_stays(split: str, missed: str) -> None:
    rank = "float[A,B]" if "n" in split.split("(")[1] else "float[B]"
    check(
        RULES,
        f"g (float[N,3] x) => ({rank} y) <int64 n = {{2}}, int64 p = {{0}}> {{ s = {split} y = SequenceAt(s, p) }}",
        missed=missed,
    )


def test_split_read_at_an_unknown_position_stays() -> None:
    check(
        RULES,
        SPLIT.replace("x)", "x, int64 p)")
        + "<int64 n = {2}> { s = SplitToSequence(x, n) y = SequenceAt(s, p) }",
    )


def test_pieces_that_do_not_add_up_stay() -> None:
    text = (
        SPLIT
        + "<int64[2] n = {1, 2}, int64 p = {1}> { s = SplitToSequence(x, n) y = SequenceAt(s, p) }"
    )
    ctx = apply(RULES, ir.from_proto(parse(text)))
    assert not ctx.rewrites
    assert "do not make up a dim of 4" in ctx.remarks[0].reason


def test_split_into_very_many_stays() -> None:
    check(
        RULES,
        "g (float[999] x) => (float y) <int64 p = {1}> { s = SplitToSequence<keepdims = 0>(x) y = SequenceAt(s, p) }",
        missed="999 tensors",
    )


def test_unpacking_an_optional() -> None:
    check(
        RULES,
        "g (float[N] x) => (float[N] y) { o = Optional(x) t = OptionalGetElement(o) y = Neg(t) }",
        "g (float[N] x) => (float[N] y) { y = Neg(x) }",
    )


def test_get_element_of_a_tensor() -> None:
    check(
        RULES,
        "g (float[N] x) => (float[N] y) { t = OptionalGetElement(x) y = Neg(t) }",
        "g (float[N] x) => (float[N] y) { y = Neg(x) }",
    )


def test_unpacking_an_input_that_is_the_output() -> None:
    check(
        RULES,
        "g (float[N] x) => (float[N] y) { o = Optional(x) y = OptionalGetElement(o) }",
        "g (float[N] x) => (float[N] y) { y = Identity(x) }",
    )


def test_get_element_of_an_optional_input_stays() -> None:
    check(
        RULES,
        "g (optional(float[2]) x) => (float[2] y) { y = OptionalGetElement(x) }",
        feeds=[{"x": np.ones(2, np.float32)}],
    )


@pytest.mark.parametrize(
    ("node", "truth"),
    [
        ("OptionalHasElement(x)", 1),
        ("OptionalHasElement()", 0),
        ("OptionalHasElement(o)", 1),
    ],
)
def test_presence_is_decided(node: str, truth: int) -> None:
    check(
        RULES,
        f"g (float[N] x, bool[N] b) => (bool[N] y) {{ o = Optional(x) t = {node} y = And(t, b) }}",
        f"g (float[N] x, bool[N] b) => (bool[N] y) {{ t = Constant<value = bool {{{truth}}}>() y = And(t, b) }}",
    )


def test_presence_of_an_input_is_not_decided() -> None:
    check(
        RULES,
        "g (optional(float[2]) x) => (bool y) { y = OptionalHasElement(x) }",
        feeds=[{"x": np.ones(2, np.float32)}],
    )


def test_insertion_into_a_very_long_construct_stays() -> None:
    many = ", ".join(["x"] * 256)
    check(
        RULES,
        f"""g (float[2] x, float[2] z) => (seq(float[2]) y) {{
            s = SequenceConstruct({many})  y = SequenceInsert(s, z) }}""",
        missed="a sequence of more than 256 tensors",
    )


def test_split_into_very_many_given_pieces_stays() -> None:
    ones = ", ".join(["1"] * 300)
    check(
        RULES,
        f"""g (float[300] x) => (float[1] y) <int64[300] n = {{{ones}}}, int64 p = {{1}}> {{
            s = SplitToSequence(x, n)  y = SequenceAt(s, p) }}""",
        missed="splits into 300 tensors",
    )


def test_an_absent_element_is_not_taken() -> None:
    """Not valid, and not refused by any reader: the runtime says what is wrong with it."""
    text = (
        "g (float[N] x) => (float[N] y) <int64 i = {1}>"
        "{ s = SequenceConstruct(x, , x)  y = SequenceAt(s, i) }"
    )
    ctx = apply(RULES, ir.from_proto(parse(text)))
    assert not ctx.rewrites
    assert [r.reason for r in ctx.remarks] == ["an element of the sequence is absent"]
