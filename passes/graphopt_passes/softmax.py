"""Softmax and its logarithm, put together again from exponentials and sums.

    Before:  e = Exp(x - ReduceMax(x)); y = e / ReduceSum(e)
    After:   y = Softmax(x)

Changes numerics: reordered.  Softmax subtracts the maximum, so that it stays finite also where exp(x) alone overflows.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import given_axes

OPSETS = (7, 10_000)

x = Var()
largest = Op("ReduceMax", x, ...)
exponential = Op("Exp", Either(Op("Sub", x, largest), x))
total = Op("ReduceSum", exponential, ...)
by_division = Op("Div", exponential, total)
by_reciprocal = Op("Mul", exponential, Either(Op("Reciprocal", total), Op("Div", Lit(1.0), total)))


@rule(by_division, opset=OPSETS)
def fuse_softmax(m: Match, g: Builder) -> ir.Value | None:
    """`exp(x - max x) / sum(exp(x - max x))` -> `Softmax(x)`, with or without the maximum.  Source: Softmax-1, -13."""
    return _softmax(m, g, "Softmax")


@rule(by_reciprocal, opset=OPSETS)
def fuse_softmax_of_reciprocal(m: Match, g: Builder) -> ir.Value | None:
    """`exp(x - max x) * (1 / sum(…))` -> `Softmax(x)`, with or without the maximum.  Source: Softmax-1, -13."""
    return _softmax(m, g, "Softmax")


def _softmax(m: Match, g: Builder, op_type: str) -> ir.Value | None:
    axis = _axis(m, m[total])
    if axis is None or (m.has(largest) and _axis(m, m[largest]) != axis):
        return None
    return g.op(op_type, m[x], axis=axis)


def _axis(m: Match, node: ir.Node) -> int | None:
    """The one axis that a reduction keeps as a 1, as Softmax takes it at this opset.

    Source: ReduceSum-1 (attribute), -13 (input), ReduceMax-18 (input).

    Raises:
        Skip: the target has no Softmax over that axis that pays.
    """
    rank = len(m.known_dims(x))
    axes = given_axes(m, node, 13 if node.op_type == "ReduceSum" else 18)
    if axes is None or len(axes) != 1 or not m.attr(node, "keepdims", 1):
        return None
    axis = axes[0] % rank
    if axis == rank - 1:
        return -1
    if m.opset() < 13:
        raise Skip("before opset 13 Softmax flattens all axes from its own on", node)
    if not m.emits("Softmax", dtype=m.dtype(x), form="inner-axis"):
        raise Skip("over another axis than the last, the target runs the parts faster", node)
    return axis


z = Either(Op("Sub", x, largest), x)
log_total = Op("ReduceSum", Op("Exp", z), ...)
by_logarithm = Op("Sub", z, Op("Log", log_total))


@rule(by_logarithm, opset=OPSETS)
def fuse_decomposed_log_softmax(m: Match, g: Builder) -> ir.Value | None:
    """`z - log(sum(exp(z)))` -> `LogSoftmax(x)`, z = x - max x or x.  Source: LogSoftmax-1, -13."""
    axis = _axis(m, m[log_total])
    if axis is None or (m.has(largest) and _axis(m, m[largest]) != axis):
        return None
    return g.op("LogSoftmax", m[x], axis=axis)


log_sum_exp = Op("ReduceLogSumExp", x, ...)
by_log_sum_exp = Op("Sub", x, log_sum_exp)


@rule(by_log_sum_exp, opset=OPSETS)
def fuse_log_sum_exp(m: Match, g: Builder) -> ir.Value | None:
    """`x - ReduceLogSumExp(x)` -> `LogSoftmax(x)`.  Source: ReduceLogSumExp-1, -18, LogSoftmax-13."""
    axis = _axis(m, m[log_sum_exp])
    return None if axis is None else g.op("LogSoftmax", m[x], axis=axis)


RULES: tuple[Rule, ...] = (
    fuse_softmax,
    fuse_softmax_of_reciprocal,
    fuse_decomposed_log_softmax,
    fuse_log_sum_exp,
)
