"""Reductions: chains, kept and dropped axes, axes of size one, softmax of one element."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Skip, Var, exact, rule
from graphopt_passes.constants import from_front, given_axes

x = Var()

_EXACT_KINDS = "ReduceMax|ReduceMin"
_ROUNDED_KINDS = "ReduceSum|ReduceMean|ReduceProd|ReduceL1|ReduceL2|ReduceLogSumExp"
_KINDS = f"{_EXACT_KINDS}|{_ROUNDED_KINDS}|ReduceSumSquare|ReduceLogSum"
_FIRST_AXES_INPUT = {"ReduceSum": 13}
_SMALL = 4096  # elements: a constant answer larger than this is not worth its bytes


def _since(node: ir.Node) -> int:
    """The opset at which the axes of a reduction became an input."""
    return _FIRST_AXES_INPUT.get(node.op_type, 18)


def _axes(m: Match, node: ir.Node, rank: int) -> tuple[int, ...]:
    """The axes that a reduction reduces, from the front, in order; none where it is a no-op by its attribute."""
    axes = given_axes(m, node, _since(node))
    if not axes:
        return () if m.attr(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return from_front(axes, rank)


def _reduce(
    m: Match, g: Builder, kind: str, data: ir.Value, axes: tuple[int, ...], *, keepdims: bool
) -> ir.Value:
    """A reduction in the spelling of the model's opset."""
    if m.opset() < _FIRST_AXES_INPUT.get(kind, 18):
        return g.op(kind, data, axes=axes, keepdims=int(keepdims))
    return g.op(kind, data, g.ints(axes, name="axes"), keepdims=int(keepdims))


def _keeps(m: Match, node: ir.Node) -> bool:
    return bool(m.attr(node, "keepdims", 1))


# --- a reduction of a reduction

_first = Op(f"{_EXACT_KINDS}|{_ROUNDED_KINDS}", x, ...)
extremes = Op(_EXACT_KINDS, _first, ...)
sums = Op(_ROUNDED_KINDS, _first, ...)


def _join(m: Match, g: Builder, second: Op) -> ir.Value | None:
    inner, outer = m[_first], m[second]
    if inner.op_type != outer.op_type:
        return None
    rank = len(m.known_dims(x))
    first = _axes(m, inner, rank)
    kept_inside, kept_outside = _keeps(m, inner), _keeps(m, outer)
    left = [axis for axis in range(rank) if kept_inside or axis not in first]
    second_axes = tuple(left[axis] for axis in _axes(m, outer, len(left)))
    if not first or not second_axes:
        return None
    if kept_inside != kept_outside and not (kept_inside and set(first) <= set(second_axes)):
        return None  # some reduced axes would be kept and others dropped
    union = tuple(sorted({*first, *second_axes}))
    return _reduce(m, g, inner.op_type, m[x], union, keepdims=kept_outside)


@exact(extremes)
def join_extreme_reductions(m: Match, g: Builder) -> ir.Value | None:
    """`ReduceMax(ReduceMax(x, A), B)` -> `ReduceMax(x, A + B)`; likewise ReduceMin.

    Source: ONNX ReduceMax-1, -13 (axes as attribute), -18 (as input).
    """
    return _join(m, g, extremes)


@rule(sums)
def join_reductions(m: Match, g: Builder) -> ir.Value | None:
    """`Reduce(Reduce(x, A), B)` -> `Reduce(x, A + B)` for Sum, Mean, Prod, L1, L2, LogSumExp, each of its own kind.

    All groups of a mean have the same size, so the mean of means is the mean.  Source: ONNX ReduceSum-1, -13 (axes
    as input), ReduceMean-18.
    """
    return _join(m, g, sums)


# --- axes kept or dropped afterwards

_reduced = Op(_KINDS, x, ...)
_picked = Op("ArgMax|ArgMin", x)
view_of_reduction = Op("Squeeze|Unsqueeze|Reshape|Flatten", _reduced, ...)
view_of_arg = Op("Squeeze|Unsqueeze|Reshape|Flatten", _picked, ...)


@exact(view_of_reduction)
def keep_or_drop_axes_in_reduction(m: Match, g: Builder) -> ir.Value | None:
    """`Unsqueeze(ReduceX(x, A, keepdims=0), A)` -> `ReduceX(x, A, keepdims=1)`, and back with Squeeze or any view.

    Source: ONNX ReduceMean-13 (axes as attribute), -18 (as input), Squeeze-11, -13.
    """
    node, dims = m[_reduced], m.known_dims(x)
    axes = _axes(m, node, len(dims))
    keep = not _keeps(m, node)
    wanted = tuple(1 if i in axes else d for i, d in enumerate(dims) if keep or i not in axes)
    if not axes or m.dims(view_of_reduction) != wanted:
        return None
    return _reduce(m, g, node.op_type, m[x], axes, keepdims=keep)


@exact(view_of_arg)
def keep_or_drop_axis_in_arg(m: Match, g: Builder) -> ir.Value | None:
    """`Squeeze(ArgMax(x, a, keepdims=1), a)` -> `ArgMax(x, a, keepdims=0)`, and back with Unsqueeze; ArgMin alike.

    Source: ONNX ArgMax-1, Squeeze-11, -13.
    """
    node, dims = m[_picked], m.known_dims(x)
    axis, keep = m.attr(node, "axis", 0) % max(1, len(dims)), not _keeps(m, node)
    wanted = tuple(1 if i == axis else d for i, d in enumerate(dims) if keep or i != axis)
    if m.dims(view_of_arg) != wanted:
        return None
    return g.op(node.op_type, m[x], like=node, keepdims=int(keep))


# --- nothing to reduce

idle_extreme = Op(_EXACT_KINDS, x, ...)
idle_sum = Op("ReduceSum|ReduceMean|ReduceProd", x, ...)


def _drop_idle(m: Match, g: Builder, root: Op) -> ir.Value | None:
    node, dims = m[root], m.dims(x)
    if dims is None:
        return None
    axes = _axes(m, node, len(dims))
    if any(dims[axis] != 1 for axis in axes):
        return None
    if _keeps(m, node) or not axes:
        return m[x]
    if m.opset() < 13:
        return g.op("Squeeze", m[x], axes=axes)
    return g.op("Squeeze", m[x], g.ints(axes, name="axes"))


@exact(idle_extreme)
def drop_extreme_over_axes_of_size_one(m: Match, g: Builder) -> ir.Value | None:
    """`ReduceMax(x, A)` -> `x` or `Squeeze(x, A)` where the axes A have size 1; likewise ReduceMin.

    Source: ONNX ReduceMax-1, -18.
    """
    return _drop_idle(m, g, idle_extreme)


@rule(idle_sum)
def drop_sum_over_axes_of_size_one(m: Match, g: Builder) -> ir.Value | None:
    """`ReduceSum(x, A)` -> `x` or `Squeeze(x, A)` where the axes A have size 1; likewise Mean and Prod.

    May differ in the sign of a zero only (`0.0 + -0.0`).  Source: ONNX ReduceSum-1, -13, ReduceMean-18.
    """
    return _drop_idle(m, g, idle_sum)


# --- softmax

flat_softmax = Op("Softmax|LogSoftmax", x)


@rule(flat_softmax)
def replace_softmax_over_one_element(m: Match, g: Builder) -> ir.Value | None:
    """`Softmax(x)` -> 1, `LogSoftmax(x)` -> 0 where the axis has size 1 and the shape is small and static.

    Differs for NaN and infinities, which give NaN.  Source: ONNX Softmax-1 (flattens from `axis` on), -13.
    """
    dims, dtype = m.dims(x), m.dtype(x)
    if dims is None or dtype is None:
        return None
    axis = m.attr(flat_softmax, "axis", -1 if m.opset() >= 13 else 1)
    if not -len(dims) <= axis < max(1, len(dims)):
        return None
    group = dims[axis:] if m.opset() < 13 else (dims[axis] if dims else 1,)
    if any(d != 1 for d in group):
        return None
    if not all(d.is_static for d in dims) or math.prod(map(int, dims)) > _SMALL:
        raise Skip("the answer is 1 everywhere, but its shape is not small and static", m[x])
    number = 1 if m[flat_softmax].op_type == "Softmax" else 0
    filled = np.full(tuple(map(int, dims)), number, dtype.numpy())
    return g.op("Constant", value=ir.tensor(filled))


RULES = (
    join_extreme_reductions,
    join_reductions,
    keep_or_drop_axes_in_reduction,
    keep_or_drop_axis_in_arg,
    drop_extreme_over_axes_of_size_one,
    drop_sum_over_axes_of_size_one,
    replace_softmax_over_one_element,
)
