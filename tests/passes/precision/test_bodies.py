"""Ranges inside If, Loop and Scan: what bodies were seen to compute, turn by turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.precision.bodies import MAX_TURNS, Bodies, wanted_of

from graphopt.ir.shapes import Shapes
from tests.rewriting import parse

X = np.arange(4, dtype=np.float32)


def seen(text: str, known: dict[str, Any]) -> dict[str, list[Any]]:
    """Every value inside bodies, by name, a list of turns."""
    model = ir.from_proto(parse(text))
    Shapes(model)
    found: dict[str, list[Any]] = {}
    for turn in Bodies(model).turns(model.graph, known):
        for name, array in turn.values.items():
            found.setdefault(name, []).append(array)
    return found


LOOP = (
    "g (float[4] x, int64 n, bool c) => (float[4] y) <float[4] k>"
    "{ y = Loop(n, c, x) <body = l (int64 i, bool p, float[4] s) => (bool o, float[4] t)"
    "  { o = Identity(p) u = Add(s, s) t = Identity(u) }> }"
)


def test_a_loop_is_followed_turn_by_turn() -> None:
    found = seen(LOOP, {"x": X, "n": np.array(3), "c": np.array(True)})
    assert [float(array[1]) for array in found["u"]] == [2, 4, 8]


def test_a_loop_that_takes_too_long_tells_nothing() -> None:
    assert seen(LOOP, {"x": X, "n": np.array(MAX_TURNS + 1), "c": np.array(True)}) == {}


def test_a_condition_ends_a_loop() -> None:
    text = LOOP.replace("o = Identity(p)", "h = Constant<value_int=1>() o = Less(i, h)")
    assert len(seen(text, {"x": X, "n": np.array(9), "c": np.array(True)})["u"]) == 2
    assert seen(text, {"x": X, "n": np.array(9), "c": np.array(False)}) == {}


def test_both_branches_are_seen_with_what_they_capture() -> None:
    text = (
        "g (float[4] x, bool c) => (float[4] y) <float[4] k>"
        "{ h = Add(x, x) y = If(c) <then_branch = t () => (float[4] a) { a = Mul(h, h) },"
        "  else_branch = e () => (float[4] b) { b = Sub(h, k) }> }"
    )
    model = ir.from_proto(parse(text))
    assert wanted_of(model.graph) == ("c", "h")
    found = seen(text, {"x": X, "c": np.array(True), "h": X})
    assert float(found["a"][0][3]) == 9
    assert "b" in found


def test_bodies_in_bodies_see_through() -> None:
    text = (
        "g (float[4] x, bool c) => (float[4] y)"
        "{ y = If(c) <then_branch = t () => (float[4] a) { m = Neg(x) a = If(c) <"
        "    then_branch = u () => (float[4] p) { p = Mul(m, x) },"
        "    else_branch = v () => (float[4] q) { q = Identity(m) }> },"
        "  else_branch = e () => (float[4] b) { b = Identity(x) }> }"
    )
    found = seen(text, {"x": X, "c": np.array(True)})
    assert float(found["p"][0][3]) == -9


@pytest.mark.parametrize(("direction", "expected"), [(0, [1, 3, 6]), (1, [3, 5, 6])])
def test_a_scan_takes_slices_in_its_direction(direction: int, expected: list[float]) -> None:
    text = (
        "g (float[3] x, float z) => (float l, float[3] y)"
        f"{{ l, y = Scan<num_scan_inputs=1, scan_input_directions=[{direction}],"
        " body = b (float a, float e) => (float o, float r) { o = Add(a, e) r = Identity(o) }>(z, x) }"
    )
    known = {"x": np.array([1, 2, 3], np.float32), "z": np.array(0, np.float32)}
    assert [float(array) for array in seen(text, known)["o"]] == expected


def test_what_nobody_knows_is_left_out() -> None:
    assert seen(LOOP, {"n": np.array(3), "c": np.array(True)}) == {}
