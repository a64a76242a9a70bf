"""Scores blended with a number by a mask of zeros and ones, as a sum with what hides them.

    Before:  z = q kT * b + (1 - b) * -1e4 + a
    After:   z = q kT + (Where(b, 0, low) + a)

As GPT of 2018 and GPT-2 until 2020 hide what comes after a token.  Then it is attention with one mask, which
`fuse-attention` takes: before `lift-opset`.  Changes numerics: reordered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import live_uses
from graphopt_passes.masks import VIEWS

HIDDEN = -(2.0**46)
"""In float32, a number beside which scores below 4e6 vanish, and that vanishes itself beside the lowest numbers."""

LOW = -1e4
"""What hides a score at most."""

HUGE = 1e30
"""A mask that is zero or beyond has no number that would count beside those of the blend."""

MAX_DEPTH = 6

product = Op("Mul", Var(), Var())
blended = Op("Add", product, Var())
blended_less = Op("Sub", product, Var())


@rule(blended, opset=(13, 10_000))
def hide_instead_of_blending(m: Match, g: Builder) -> ir.Value | None:
    """`s * b + (1 - b) * low + a` -> `s + (Where(b, 0, hidden) + a)`, before a Softmax, in float32.

    b: zeros and ones; a: nothing, or zero or beyond 1e30, so that a row which both hide is spread as it was.
    Source: Mul-14, Softmax-13.
    """
    return _hidden(m, g, m[blended], 1.0)


@rule(blended_less, opset=(13, 10_000))
def hide_instead_of_subtracting(m: Match, g: Builder) -> ir.Value | None:
    """As `hide_instead_of_blending`, for `s * b - (1 - b) * high`."""
    return _hidden(m, g, m[blended_less], -1.0)


@dataclasses.dataclass(frozen=True)
class _Blend:
    """Scores, the zeros and ones that keep them, and what is added beside their number, if anything."""

    scores: ir.Value
    flags: ir.Value
    more: ir.Value | None


def _hidden(m: Match, g: Builder, root: ir.Node, sign: float) -> ir.Value | None:
    """Scores and what hides them."""
    users, target = live_uses(root.outputs[0]), m.facts.target
    if not users or any(user.op_type != "Softmax" for user in users):
        return None
    dtype = root.outputs[0].dtype
    if dtype != ir.DataType.FLOAT or not target.emits(
        "Attention", opset=target.opset[1], dtype=dtype
    ):
        return None
    found = _blend(root, sign)
    if found is None or m.dims(found.scores) in (None, m.dims(found.flags)):
        return None
    if found.more is not None and not _is_step(found.more):
        raise Skip("a row that both masks hide would mix them", found.more)
    seen = g.op("Cast", found.flags, to=ir.DataType.BOOL)
    numbers = [g.const(np.asarray(number, np.float32)) for number in (0.0, HIDDEN)]
    hidden = g.op("Where", seen, *numbers)
    return g.op(
        "Add", found.scores, hidden if found.more is None else g.op("Add", hidden, found.more)
    )


def _blend(root: ir.Node, sign: float) -> _Blend | None:
    """The parts of a blend; its operands may stand in either order, but for those of Sub."""
    sides = (root.inputs, root.inputs[::-1]) if sign > 0 else (root.inputs,)
    for kept, rest in sides:
        maker = None if kept is None else kept.producer()
        if maker is None or maker.domain or maker.op_type != "Mul":
            continue
        for scores, flags in (maker.inputs, maker.inputs[::-1]):
            if scores is None or flags is None or not _is_flag(flags):
                continue
            for more, filled in _sums(rest, sign):
                if _fills(filled, flags, sign):
                    return _Blend(scores, flags, more)
    return None


def _sums(value: ir.Value | None, sign: float) -> Iterable[tuple[ir.Value | None, ir.Value | None]]:
    """A value alone, and if it is a sum, each operand beside the other."""
    yield None, value
    node = None if value is None else value.producer()
    if node is not None and not node.domain and node.op_type == "Add" and sign > 0:
        yield node.inputs[0], node.inputs[1]
        yield node.inputs[1], node.inputs[0]


def _fills(value: ir.Value | None, flags: ir.Value, sign: float) -> bool:
    """Whether a value is zero where the flags are one, and hides where they are zero."""
    table, seen = values.array(value), values.array(flags)
    if table is not None and seen is not None and table.shape == seen.shape:
        numbers = table.astype(np.float64) * sign
        return bool(np.all(np.where(seen == 1, numbers == 0, numbers <= LOW)))
    node = None if value is None else value.producer()
    if node is None or node.domain or node.op_type != "Mul":
        return False
    for gap, low in (node.inputs, node.inputs[::-1]):
        number, maker = values.scalar(low), None if gap is None else gap.producer()
        if number is None or sign * number > LOW or maker is None or maker.op_type != "Sub":
            continue
        if values.fill(maker.inputs[0]) == 1 and maker.inputs[1] is flags:
            return True
    return False


def _is_flag(value: ir.Value | None, depth: int = MAX_DEPTH) -> bool:
    """Whether a number is zero or one: of a constant, perhaps cut, or cast from a bool."""
    data, node = values.array(value), None if value is None else value.producer()
    if data is not None:
        return bool(((data == 0) | (data == 1)).all())
    if node is None or node.domain or depth == 0 or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Cast" and node.inputs[0].dtype == ir.DataType.BOOL:
        return True
    return node.op_type in (*VIEWS, "Cast") and _is_flag(node.inputs[0], depth - 1)


def _is_step(value: ir.Value | None, depth: int = MAX_DEPTH) -> bool:
    """Whether a mask is zero or beyond `HUGE`: a choice of such, or an integer times such a number."""
    number, node = values.scalar(value), None if value is None else value.producer()
    if number is not None:
        return number == 0 or abs(float(number)) >= HUGE
    if node is None or node.domain or depth == 0 or not node.inputs:
        return False
    if node.op_type in VIEWS:
        return _is_step(node.inputs[0], depth - 1)
    if node.op_type == "Where":
        return all(_is_step(each, depth - 1) for each in node.inputs[1:])
    if node.op_type != "Mul":
        return False
    for whole, low in (node.inputs, node.inputs[::-1]):
        factor = values.scalar(low)
        if factor is not None and abs(float(factor)) >= HUGE:
            return _is_whole(whole, depth - 1)
    return False


def _is_whole(value: ir.Value | None, depth: int) -> bool:
    """Whether a number has no fraction: cast from an integer or a bool, also of a difference of such."""
    number, node = values.scalar(value), None if value is None else value.producer()
    if number is not None:
        return float(number).is_integer()
    if node is None or node.domain or depth == 0 or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Cast" and node.inputs[0].dtype is not None:
        exact = node.inputs[0].dtype.is_integer() or node.inputs[0].dtype == ir.DataType.BOOL
        return exact or _is_whole(node.inputs[0], depth - 1)
    if node.op_type == "Sub":
        return all(_is_whole(each, depth - 1) for each in node.inputs)
    return node.op_type in VIEWS and _is_whole(node.inputs[0], depth - 1)


RULES: tuple[Rule, ...] = (hide_instead_of_blending, hide_instead_of_subtracting)
