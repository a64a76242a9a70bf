"""Shapes of reductions."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.shapes import facts
from graphopt.ir.shapes.facts import Facts
from graphopt.ir.shapes.query import Query, Rule, Rules, axes_given, normalised


def _reduce(since: int) -> Rule:
    """The rule of a reduction whose axes become an input at opset `since`."""

    def infer(q: Query) -> Sequence[Facts]:
        given = q.facts(0)
        known, axes = axes_given(q, since)
        keep = bool(q.attr("keepdims", 1))
        if given.dims is None:
            return [facts.tensor(given.dtype, () if known and not axes and not keep else None)]
        rank = len(given.dims)
        if not known:
            return [facts.tensor(given.dtype, q.unknown_dims(rank) if keep else None)]
        if not axes and q.attr("noop_with_empty_axes", 0):
            return [facts.tensor(given.dtype, given.dims)]
        gone = {normalised(axis, rank) for axis in axes or range(rank)}
        kept = [
            1 if i in gone else dim for i, dim in enumerate(given.dims) if keep or i not in gone
        ]
        return [facts.tensor(given.dtype, kept)]

    return infer


def _arg(q: Query) -> Sequence[Facts]:
    dims = q.dims(0)
    if dims is None:
        return [facts.tensor(ir.DataType.INT64, None)]
    axis = q.axis("axis", 0, len(dims))
    middle = (1,) if q.attr("keepdims", 1) else ()
    return [facts.tensor(ir.DataType.INT64, (*dims[:axis], *middle, *dims[axis + 1 :]))]


_NAMES = "L1 L2 LogSum LogSumExp Max Mean Min Prod SumSquare"

RULES: Rules = {
    **{f"Reduce{name}": _reduce(18) for name in _NAMES.split()},
    "ReduceSum": _reduce(13),
    "ArgMax": _arg,
    "ArgMin": _arg,
}
