"""Expand and ConstantOfShape next to what broadcasts by itself."""

from __future__ import annotations

import pytest
from graphopt_passes.broadcasts import RULES

from tests.rewriting import check


@pytest.mark.parametrize("expression", ["Add(e, z)", "Sub(z, e)", "Pow(e, z)"])
def test_expand_covered_by_the_other_operand_goes(expression: str) -> None:
    head = "g (float[N,1] x, float[N,4] z, int64[2] s) => (float[N,4] y)"
    check(
        RULES,
        before=f"{head} <int64[2] k = {{1, 4}}> {{ e = Expand(x, k)  y = {expression} }}",
        after=f"{head} {{ y = {expression.replace('e', 'x')} }}",
        feeds=None if "Pow" not in expression else [],
    )


def test_expand_covered_in_where_goes() -> None:
    head = "g (bool[1,S] m, float[B,S] x, float v) => (float[B,S] y)"
    check(
        RULES,
        before=f"{head} {{ s = Shape(x)  c = Expand(m, s)  w = Expand(v, s)  y = Where(c, w, x) }}",
        after=f"{head} {{ y = Where(m, v, x) }}",
    )


def test_expand_that_adds_a_dim_stays() -> None:
    check(
        RULES,
        before="""g (float[N,1] x, float[N,1] z) => (float[N,4] y) <int64[2] k = {1, 4}>
            { e = Expand(x, k)  y = Add(e, z) }""",
    )


def test_of_two_expands_to_the_same_dims_one_stays() -> None:
    check(
        RULES,
        before="""g (float[4,1] x, float[4,1] z) => (float[4,3] y) <int64[2] k = {1, 3}>
            { e = Expand(x, k)  f = Expand(z, k)  y = Add(e, f) }""",
        after="""g (float[4,1] x, float[4,1] z) => (float[4,3] y) <int64[2] k = {1, 3}>
            { f = Expand(z, k)  y = Add(x, f) }""",
    )


def test_filled_operand_becomes_a_number() -> None:
    check(
        RULES,
        before="""g (float[A,B] x) => (float[A,B] y)
            { s = Shape(x)  f = ConstantOfShape<value = float[1] {2.5}>(s)  y = Mul(x, f) }""",
        after="g (float[A,B] x) => (float[A,B] y) <float f = {2.5}> { y = Mul(x, f) }",
    )


def test_filled_operand_of_other_dims_stays() -> None:
    check(
        RULES,
        before="""g (float[B] x, int64[2] s) => (float[P,Q] y)
            { f = ConstantOfShape<value = float[1] {2.5}>(s)  y = Mul(x, f) }""",
        feeds=[],
    )


def test_expands_join() -> None:
    check(
        RULES,
        before="""g (float[1,1] x) => (float[2,3] y) <int64[2] k = {2, 1}, int64[2] l = {2, 3}>
            { e = Expand(x, k)  y = Expand(e, l) }""",
        after="g (float[1,1] x) => (float[2,3] y) <int64[2] l = {2, 3}> { y = Expand(x, l) }",
    )


def test_expands_of_other_axes_stay() -> None:
    check(
        RULES,
        before="""g (float[1,1] x) => (float[2,3] y) <int64[2] k = {2, 1}, int64[2] l = {1, 3}>
            { e = Expand(x, k)  y = Expand(e, l) }""",
    )


def test_expanded_fill_takes_the_outer_shape() -> None:
    check(
        RULES,
        before="""g (float[A,B] x) => (float[A,B] y) <int64[1] k = {1}>
            { s = Shape(x)  f = ConstantOfShape<value = float[1] {2.5}>(k)  y = Expand(f, s) }""",
        after="""g (float[A,B] x) => (float[A,B] y)
            { s = Shape(x)  y = ConstantOfShape<value = float[1] {2.5}>(s) }""",
    )


def test_computed_expand_becomes_constant_where_dims_are_known() -> None:
    check(
        RULES,
        before="""g (float[N,1,4] x) => (float[N,3,4] y) <int64[1] i = {0}, int64[2] k = {3, 4}>
            { s = Shape(x)  n = Gather(s, i)  t = Concat<axis = 0>(n, k)  y = Expand(x, t) }""",
        after="g (float[N,1,4] x) => (float[N,3,4] y) <int64[3] t = {1, 3, 4}> { y = Expand(x, t) }",
    )


def test_computed_expand_to_an_unknown_dim_stays() -> None:
    check(
        RULES,
        before="g (float[1,4] x, float[N,4] z) => (float[N,4] y) { s = Shape(z)  y = Expand(x, s) }",
    )


def test_cast_of_a_fill_is_a_fill() -> None:
    check(
        RULES,
        before="""g (int64[2] s) => (float[P,Q] y)
            { f = ConstantOfShape<value = int64[1] {3}>(s)  y = Cast<to = 1>(f) }""",
        after="g (int64[2] s) => (float[P,Q] y) { y = ConstantOfShape<value = float[1] {3.0}>(s) }",
    )


@pytest.mark.parametrize(("number", "to"), [("float[1] {2.5}", 7), ("int64[1] {300}", 2)])
def test_cast_that_changes_the_number_stays(number: str, to: int) -> None:
    dtype = {7: "int64", 2: "uint8"}[to]
    check(
        RULES,
        before=f"g (int64[2] s) => ({dtype}[P,Q] y)"
        f"{{ f = ConstantOfShape<value = {number}>(s)  y = Cast<to = {to}>(f) }}",
    )
