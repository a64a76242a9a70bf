"""Dims: canonical forms, bounds, and agreement with plain integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.shapes import Dim, Kind, broadcast, ceildiv, maximum, minimum, product, truncdiv

N, M, K = (Dim.named(name) for name in "nmk")
E = Dim.named("e", Kind.ELEMENT)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (4 * N // 4, N),
        ((N + M) * (N - M), N * N - M * M),
        ((N - N % 4) // 4, N // 4),
        ((N + 3) // 4 * 4, N + (4 - N % 4) % 4),
        (((N + 1) // 2 + 1) // 2, (N + 3) // 4),
        ((N + M) * 64 // (N + M), Dim.of(64)),
        ((N * M + K) // N, M + K // N),
        (N * M * 6 // (M * 4), N * 3 // 2),
        (maximum((N, 0)), N),
        (maximum((N, M, N + 1)), maximum((N + 1, M))),
        (minimum((N, N + K)), N),
        (broadcast(N, 1), N),
        (broadcast(N, 3), Dim.of(3)),
        (broadcast(broadcast(N, M), K), broadcast(M, broadcast(K, N))),
        (broadcast(broadcast(maximum((N - 1, 0)) + 1, minimum((N, 64))), N), N),
        (broadcast(maximum((N, 1)), N), N),
        (truncdiv(2 * E - 4, 2), E - 2),
        (truncdiv(-N, 2), -(N // 2)),
        (product((N, 2, M)), 2 * M * N),
        (Dim.of(7) - 7, Dim.of(0)),
    ],
)
def test_equal_in_canonical_form(left: Dim, right: Dim) -> None:
    assert left == right
    assert hash(left) == hash(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (N, M),
        (N // 2 * 2, N),
        (truncdiv(E, 2), E // 2),
        (broadcast(N, M), N),
        (maximum((N, M)), N),
        (broadcast(maximum((N, 2)), N), N),
        (broadcast(minimum((N, 1)), N), N),
    ],
)
def test_not_known_equal(left: Dim, right: Dim) -> None:
    assert left != right


def test_static_dims_are_integers() -> None:
    assert Dim.of(3) == 3
    assert hash(Dim.of(3)) == hash(3)
    assert int(Dim.of(5000) - 4998) == 2
    assert Dim.of(3).value == 3
    with pytest.raises(ValueError, match="n \\+ 1 is not a known integer"):
        int(N + 1)


def test_symbol_names_the_users_dim_alone() -> None:
    assert N.symbol == "n"
    assert (N + 0).symbol == "n"
    assert (N + 1).symbol is None
    assert Dim.named("?1", Kind.AXIS).symbol is None
    assert (N * M).is_named()
    assert not (N * E).is_named()


def test_bounds_and_differences() -> None:
    assert (N + 1).differs(0)
    assert not N.differs(0)
    assert (N % 4).upper == 3
    assert ((N + 3) // 4 * 4 - N).lower == 0
    assert (N + M).at_least(M)
    assert E.lower is None
    assert Dim.named("f", Kind.FLAG).upper == 1


def test_text_is_independent_of_the_order_of_terms() -> None:
    assert str(M * N + 2 * K - 1) == str(2 * K - 1 + N * M) == "2*k + m*n - 1"
    assert str(maximum((M, N))) == "max(m, n)"


def test_products_beyond_reason_stay_products() -> None:
    big = N + M + K + E + 1
    large = big * big * big
    assert (large * large).evaluate({"n": 1, "m": 1, "k": 1, "e": 1}) == 5**6


Tree: TypeAlias = tuple[str, "Tree | str | int", "Tree | str | int"] | str | int

LEAVES: st.SearchStrategy[Tree] = st.sampled_from(["n", "m", "e"]) | st.integers(-6, 12)
OPERATIONS = ("+", "-", "*", "//", "%", "/", "max", "min", "ceil")
TREES: st.SearchStrategy[Tree] = st.recursive(
    LEAVES, lambda inner: st.tuples(st.sampled_from(OPERATIONS), inner, inner), max_leaves=6
)

SYMBOLIC: Mapping[str, Callable[[Dim, Dim], Dim]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "/": truncdiv,
    "max": lambda a, b: maximum((a, b)),
    "min": lambda a, b: minimum((a, b)),
    "ceil": ceildiv,
}
PLAIN: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a - b * (a // b),
    "/": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "max": max,
    "min": min,
    "ceil": lambda a, b: -(-a // b),
}


def symbolic(tree: Tree) -> Dim:
    if isinstance(tree, tuple):
        return SYMBOLIC[tree[0]](symbolic(tree[1]), symbolic(tree[2]))
    return Dim.of(tree) if isinstance(tree, int) else {"n": N, "m": M, "e": E}[tree]


def plain(tree: Tree, at: Mapping[str, int]) -> int:
    """The value at given sizes.

    Raises:
        ZeroDivisionError: a divisor is 0, or negative where only positive ones are promised.
    """
    if not isinstance(tree, tuple):
        return tree if isinstance(tree, int) else at[tree]
    a, b = plain(tree[1], at), plain(tree[2], at)
    if tree[0] in ("//", "%", "/", "ceil") and (b == 0 or (tree[0] == "ceil" and b < 0)):
        raise ZeroDivisionError
    return PLAIN[tree[0]](a, b)


@settings(max_examples=300, deadline=None)
@given(TREES, st.integers(0, 9), st.integers(0, 9), st.integers(-9, 9))
def test_arithmetic_agrees_with_integers(tree: Tree, n: int, m: int, e: int) -> None:
    at = {"n": n, "m": m, "e": e}
    dim = symbolic(tree)
    try:
        expected = plain(tree, at)
    except ZeroDivisionError:
        return
    assert dim.evaluate(at) in (expected, None)
    assert (dim.lower if dim.lower is not None else -math.inf) <= expected
    assert (dim.upper if dim.upper is not None else math.inf) >= expected


def test_evaluate_needs_every_symbol() -> None:
    assert (N + M).evaluate({"n": 1}) is None
    assert (N // M).evaluate({"n": 1, "m": 0}) is None
