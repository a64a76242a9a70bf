"""Transposes that cancel across the operators between them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.transposes import CancelTransposes

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, parse

PASS = (CancelTransposes(),)
TO, BACK = "Transpose<perm = [0, 2, 3, 1]>", "Transpose<perm = [0, 3, 1, 2]>"
HEAD = "g (float[N,3,4,5] a, float[N,3,4,5] b) => (float[N,3,4,5] y)"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"p = {TO}(a)  r = Relu(p)  y = {BACK}(r)", "y = Relu(a)"),
        (
            f"p = {TO}(a)  q = {TO}(b)  s = Add(p, q)  r = Relu(s)  t = {BACK}(r)  y = Neg(t)",
            "s = Add(a, b)  r = Relu(s)  y = Neg(r)",
        ),
        (
            f"p = {TO}(a)  s = Mul(p, c)  u = Add(s, one)  t = {BACK}(u)  y = Neg(t)",
            "s = Mul(a, k)  u = Add(s, one)  y = Neg(u)",
        ),
        (
            f"p = {TO}(a)  q = {TO}(b)  s = Concat<axis = 3>(p, q)  t = {BACK}(s)  y = ReduceMax(t, one1)",
            "s = Concat<axis = 1>(a, b)  y = ReduceMax(s, one1)",
        ),
        (
            f"p = {TO}(a)  q = {TO}(b)  w = Greater(p, q)  s = Where(w, p, q)  t = {BACK}(s)  y = Neg(t)",
            "w = Greater(a, b)  s = Where(w, a, b)  y = Neg(s)",
        ),
        (
            f"p = {TO}(a)  s = Softmax<axis = -1>(p)  t = {BACK}(s)  y = Neg(t)",
            "s = Softmax<axis = 1>(a)  y = Neg(s)",
        ),
        (
            f"p = {TO}(a)  s = ReduceMean(p, hw)  m = Sub(p, s)  t = {BACK}(m)  y = Neg(t)",
            "s = ReduceMean(a, nc)  m = Sub(a, s)  y = Neg(m)",
        ),
    ],
)
def test_transposes_cancel(before: str, after: str) -> None:
    constants = (
        """float one = {1.0}, int64[1] one1 = {1}, int64[2] hw = {1, 2}, int64[2] nc = {2, 3}"""
    )
    dims = "N,1,4,5" if "ReduceMax" in before else "N,3,4,5"
    head = HEAD.replace("float[N,3,4,5] y", f"float[{dims}] y")
    check(
        PASS,
        before=f"{head} <{constants}, float[3] c> {{ {before} }}",
        after=f"{head} <{constants}, float[1,3,1,1] k> {{ {after} }}",
        tolerance=1e-5,
    )


def test_most_operands_decide() -> None:
    """Three Transposes become one, for the operand that had none."""
    head = "g (float[N,3,4,5] a, float[N,3,4,5] b, float[N,4,5,3] z) => (float[N,4,5,3] y)"
    check(
        PASS,
        before=f"{head} {{ p = {TO}(a)  q = {TO}(b)  s = Add(p, q)  t = Add(s, z)  y = Neg(t) }}",
        after=f"{head} {{ s = Add(a, b)  p = {TO}(s)  t = Add(p, z)  y = Neg(t) }}",
    )


def test_graph_output_in_the_old_layout_gets_a_transpose() -> None:
    head = "g (float[N,3,4,5] a, float[N,3,4,5] b) => (float[N,4,5,3] s, float[N,3,4,5] y)"
    check(
        PASS,
        before=f"{head} {{ p = {TO}(a)  q = {TO}(b)  s = Add(p, q)  t = {BACK}(s)  y = Neg(t) }}",
        after=f"{head} {{ u = Add(a, b)  s = {TO}(u)  y = Neg(u) }}",
    )


def test_split_moves_its_axis() -> None:
    head = "g (float[N,4,2,2] a) => (float[N,2,2,2] y, float[N,2,2,2] z)"
    check(
        PASS,
        before=f"""{head} {{ p = {TO}(a)  s, t = Split<axis = 3, num_outputs = 2>(p)  u = {BACK}(s)  v = {BACK}(t)
            y = Neg(u)  z = Abs(v) }}""",
        after=f"{head} {{ s, t = Split<axis = 1, num_outputs = 2>(a)  y = Neg(s)  z = Abs(t) }}",
    )


def test_reduction_moves_its_axes_by_attribute() -> None:
    head = "g (float[N,3,4,5] a) => (float[N,3,1,1] y)"
    ctx = check(
        PASS,
        before=f"{head} {{ p = {TO}(a)  s = ReduceMean<axes = [1, 2]>(p)  t = {BACK}(s)  y = Neg(t) }}",
        after=f"{head} {{ s = ReduceMean<axes = [2, 3]>(a)  y = Neg(s) }}",
        opset=13,
        tolerance=1e-5,
    )
    assert ctx.numerics is Numerics.REORDERED


@pytest.mark.parametrize(
    "body",
    [
        f"p = {TO}(a)  r = Relu(p)  y = Neg(r)",  # nothing to gain
        f"p = {TO}(a)  s = Add(p, z)  y = Neg(s)",  # one goes, one comes
        f"p = {TO}(a)  s = ReduceMean<axes = [1], keepdims = 0>(p)  y = Unsqueeze<axes = [1]>(s)",
        f"p = {TO}(a)  s = Softmax<axis = 1>(p)  t = {BACK}(s)  y = Neg(t)",  # flattens before opset 13
    ],
)
def test_nothing_is_won(body: str) -> None:
    dims = "P,Q,R,S"
    head = HEAD.replace("=> (float[N,3,4,5] y)", f"=> (float[{dims}] y)").replace(
        "b)", "b, float[N,4,5,3] z)"
    )
    check(PASS, before=f"{head} {{ {body} }}", opset=11)


def test_large_shared_constant_stays() -> None:
    head = "g (float[N,32,8,8] a) => (float[N,32,8,8] y, float[1,8,8,32] z)"
    check(
        PASS,
        before=f"{head} <float[1,8,8,32] c> {{ p = {TO}(a)  s = Mul(p, c)  t = {BACK}(s)  y = Neg(t)  z = Neg(c) }}",
    )


def test_works_in_a_subgraph() -> None:
    before = f"p = {TO}(a)  r = Relu(p)  t = {BACK}(r)  u = Neg(t)"
    graph = """g (bool c, float[2,3,4,5] a) => (float[2,3,4,5] y) {{
        y = If (c) <then_branch = f () => (float[2,3,4,5] u) {{ {} }},
                    else_branch = h () => (float[2,3,4,5] v) {{ v = Abs(a) }}> }}"""
    feeds = [{"c": np.asarray(c), "a": np.ones((2, 3, 4, 5), np.float32)} for c in (True, False)]
    check(
        PASS,
        before=graph.format(before),
        after=graph.format("r = Relu(a)  u = Neg(r)"),
        feeds=feeds,
    )


def test_permutation_that_is_its_own_inverse() -> None:
    """The last Transpose both undoes the first and would feed the region: it goes, once."""
    head = "g (float[4,4] a) => (float[4,4] y)"
    flip = "Transpose<perm = [1, 0]>"
    check(
        PASS,
        before=f"{head} {{ p = {flip}(a)  r = Relu(p)  q = {flip}(r)  s = Sub(q, r)  y = Neg(s) }}",
    )
    check(
        PASS,
        before=f"{head} {{ p = {flip}(a)  r = Relu(p)  q = {flip}(r)  s = Sub(q, a)  y = Neg(s) }}",
        after=f"{head} {{ r = Relu(a)  s = Sub(r, a)  y = Neg(s) }}",
    )


def test_a_permutation_of_another_type_is_none() -> None:
    text = f'{HEAD} {{ p = Transpose<perm = "0231">(a)  r = Relu(p)  y = {BACK}(r) }}'
    ctx = apply(PASS, ir.from_proto(parse(text)))
    assert not ctx.rewrites


SPATIAL = {
    "Slice": (
        "s = Slice(p, z1, far, h1)",
        "s = Slice(a, z1, far, h2)",
        "int64[1] z1 = {1}, int64[1] far = {9}, int64[1] h1 = {1}, int64[1] h2 = {2}",
        "3,3,5",
    ),
    "Slice of negative axes": (
        "s = Slice(p, z1, far, h1)",
        "s = Slice(a, z1, far, h2)",
        "int64[1] z1 = {1}, int64[1] far = {9}, int64[1] h1 = {-1}, int64[1] h2 = {1}",
        "2,4,5",
    ),
    "Pad": (
        "s = Pad(p, w1)",
        "s = Pad(a, w2)",
        "int64[8] w1 = {0,1,2,0, 0,3,4,0}, int64[8] w2 = {0,0,1,2, 0,0,3,4}",
        "3,8,11",
    ),
    "Pad of axes": (
        "s = Pad(p, w1, one, h1)",
        "s = Pad(a, w1, one, h2)",
        "int64[4] w1 = {1,2,3,4}, float one = {1}, int64[2] h1 = {1,2}, int64[2] h2 = {2,3}",
        "3,8,11",
    ),
    "Resize by scales": (
        's = Resize<mode="nearest">(p, , w1)',
        's = Resize<mode="nearest">(a, , w2)',
        "float[4] w1 = {1,2,3,1}, float[4] w2 = {1,1,2,3}",
        "3,8,15",
    ),
    "Resize of axes": (
        's = Resize<mode="nearest", axes=[1,2]>(p, , , w1)',
        's = Resize<mode="nearest", axes=[2,3]>(a, , , w1)',
        "int64[2] w1 = {8,10}",
        "3,8,10",
    ),
    "MatMul": (
        "s = MatMul(p, w1)",
        "s = MatMul(a, w1)",
        "float[5,5] w1",
        "3,4,5",
    ),
}


@pytest.mark.parametrize("name", list(SPATIAL))
def test_operators_that_name_their_axes(name: str) -> None:
    before, after, held, dims = SPATIAL[name]
    to, back = (TO, BACK) if name != "MatMul" else ("Transpose<perm = [0, 2, 1, 3]>",) * 2
    head = f"g (float[2,3,4,5] a) => (float[2,{dims}] y)"
    check(
        PASS,
        before=f"{head} <{held}> {{ p = {to}(a)  {before}  t = {back}(s)  y = Neg(t) }}",
        after=f"{head} <{held}> {{ {after}  y = Neg(s) }}",
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("given", "body", "dims"),
    [
        ("int64[8] w", "s = Pad(p, w)", "P,Q,R"),  # pads from outside
        ("int64[1] w", "s = Slice(p, z, f, w)", "P,Q,R"),  # axes from outside
        ("float[4] w", 's = Resize<mode="nearest">(p, , w)', "P,Q,R"),
        ("float[4] w", "s = Slice(p, z, f)", "3,4,5"),  # axes by their number
        ("float[3,3] w", "s = MatMul(p, w)", "3,4,5"),  # a matrix from outside, and its axis moves
    ],
)
def test_what_is_not_known_stays(given: str, body: str, dims: str) -> None:
    model = ir.from_proto(
        parse(
            f"g (float[2,3,4,5] a, {given}) => (float[2,{dims}] y) <int64[1] z = {{0}}, int64[1] f = {{2}}>"
            f" {{ p = {TO}(a)  {body}  t = {BACK}(s)  y = Neg(t) }}"
        )
    )
    assert not apply(PASS, model).rewrites
