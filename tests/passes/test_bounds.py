"""Clip, Relu, Max and Min in chains."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes.bounds import RULES

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, parse

HEAD = "g (float[N] x) => (float[N] y)"
CONSTANTS = (
    "<float a = {-1.0}, float z = {0.0}, float b = {2.0}, float c = {-3.0}, float d = {0.5}>"
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("t = Clip(x, a, b)  y = Clip(t, c, d)", "y = Clip(x, a, d)"),
        ("t = Clip(x, a)  y = Clip(t, c, d)", "y = Clip(x, a, d)"),
        ("t = Clip(x, , b)  y = Clip(t, a)", "y = Clip(x, a, b)"),
        ("t = Clip(x)  y = Clip(t, , d)", "y = Clip(x, , d)"),
        ("t = Clip(x, b, a)  y = Clip(t, c, d)", "y = Clip(x, a, a)"),
        ("t = Relu(x)  y = Clip(t, a, b)", "y = Clip(x, z, b)"),
        ("t = Clip(x, a, b)  y = Relu(t)", "y = Clip(x, z, b)"),
        ("t = Clip(x, a)  y = Relu(t)", "y = Clip(x, z)"),
        ("t = Max(x, a)  y = Max(t, b)", "y = Max(x, b)"),
        ("t = Min(x, a)  y = Min(t, b)", "y = Min(x, a)"),
    ],
)
def test_clamps_join(before: str, after: str) -> None:
    ctx = check(
        RULES,
        before=f"{HEAD} {CONSTANTS} {{ {before} }}",
        after=f"{HEAD} {CONSTANTS} {{ {after} }}",
    )
    assert ctx.numerics is Numerics.EXACT


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("t = Max(x, a)  y = Min(t, b)", "y = Clip(x, a, b)"),
        ("t = Max(a, x)  y = Min(b, t)", "y = Clip(x, a, b)"),
        ("t = Max(x, b)  y = Min(t, a)", "y = Clip(x, a, a)"),
        ("t = Min(x, b)  y = Max(t, a)", "y = Clip(x, a, b)"),
        ("y = Max(x, z)", "y = Relu(x)"),
        ("t = Max(x, z)  y = Min(t, b)", "y = Clip(x, z, b)"),
        ("t = Relu(x)  y = Min(t, b)", "y = Clip(x, z, b)"),
        ("t = Min(x, b)  y = Relu(t)", "y = Clip(x, z, b)"),
    ],
)
def test_extremes_become_clamps(before: str, after: str) -> None:
    ctx = check(
        RULES,
        before=f"{HEAD} {CONSTANTS} {{ {before} }}",
        after=f"{HEAD} {CONSTANTS} {{ {after} }}",
    )
    assert ctx.numerics is Numerics.REORDERED


@pytest.mark.parametrize("body", ["t = Relu(x)  y = Min(t, a)", "t = Min(x, a)  y = Relu(t)"])
def test_relu_with_negative_upper_bound_stays(body: str) -> None:
    check(RULES, before=f"{HEAD} {CONSTANTS} {{ {body} }}")


def test_max_of_min_with_crossed_bounds_stays() -> None:
    check(
        RULES,
        before=f"{HEAD} {CONSTANTS} {{ t = Min(x, a)  y = Max(t, b) }}",
        missed="above upper bound",
    )


def test_extremes_that_broaden_stay() -> None:
    check(
        RULES,
        before="g (float[4] x) => (float[2,4] y) <float[2,1] a = {1.0, 1.0}, float b = {2.0}>"
        "{ t = Max(x, a)  y = Min(t, b) }",
    )


def test_extremes_by_vectors_stay() -> None:
    check(
        RULES,
        before="g (float[2] x) => (float[2] y) <float[2] a = {1.0, 3.0}, float b = {2.0}>"
        "{ t = Max(x, a)  y = Min(t, b) }",
    )


def test_computed_bound_stays() -> None:
    check(
        RULES,
        before=f"g (float[N] x, float e) => (float[N] y) {CONSTANTS} {{ t = Clip(x, a, e)  y = Clip(t, c, d) }}",
    )


def test_bound_that_is_no_number_stays() -> None:
    check(
        RULES,
        before="g (float[N] x) => (float[N] y) <float n = {nan}, float a = {1.0}>"
        "{ t = Clip(x, n)  y = Clip(t, a) }",
        missed="not a number",
        feeds=[],
    )


def test_attributes_before_opset_11() -> None:
    check(
        RULES,
        before=f"{HEAD} {{ t = Clip<min = -1.0, max = 6.0>(x)  y = Relu(t) }}",
        after=f"{HEAD} {{ y = Clip<min = 0.0, max = 6.0>(x) }}",
        opset=10,
    )


def test_integers_clip_from_opset_12() -> None:
    snippet = """g (int64[N] x) => (int64[N] y) <int64 a = {0}, int64 b = {5}, int64 c = {3}>"""
    check(
        RULES,
        before=f"{snippet} {{ t = Clip(x, a, b)  y = Clip(t, , c) }}",
        after=f"{snippet} {{ y = Clip(x, a, c) }}",
    )


def test_joined_clip_with_other_use_stays() -> None:
    check(
        RULES,
        before=f"g (float[N] x) => (float[N] y, float[N] t) {CONSTANTS} {{ t = Clip(x, a, b)  y = Clip(t, c, d) }}",
        missed="graph output",
    )


def test_clamps_of_an_unknown_type_stay() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18, "my" : 1]>'
        f"g (float[N] x) => (float[N] y) {CONSTANTS} {{ h = my.Op(x)  t = Clip(h, a, b)  y = Clip(t, c, d) }}"
    )
    ctx = apply(RULES, ir.from_proto(parse(text)))
    assert not ctx.rewrites
    assert "unknown element type" in [r.reason for r in ctx.remarks]


@pytest.mark.parametrize(
    ("kind", "body", "opset"),
    [
        ("float[N]", "t = Min(x, z)  y = Min(t, b)", 18),  # of zeros, the sign is the kernel's own
        ("int64[N]", "y = Max(x, i)", 18),  # Relu is no faster
    ],
)
def test_what_is_no_gain_stays(kind: str, body: str, opset: int) -> None:
    constants = CONSTANTS.replace(">", ", int64 i = {0}>")
    check(RULES, f"g ({kind} x) => ({kind} y) {constants} {{ {body} }}", opset=opset)
