"""Operators that a size, a missing bound or an equal operand leaves with nothing to do, and pairs that undo each other.

What traced models are left with once their dims are static: pools over one element, sums along one, a tensor taken
apart and put together again, indices of indices.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule

FAR = 2**31 - 1
SCALES = (1e-30, 1e30)
"""Between these, 16 bits times a scale and back are far from the ends of float32."""

x = Var()

_pool = Op("AveragePool|MaxPool", x)


@rule(_pool)
def drop_pool_of_one(m: Match, _g: Builder) -> ir.Value | None:
    """AveragePool(x), MaxPool(x) -> x with windows of one element, one step apart.

    Not EXACT: averages lose the sign of zero, maxima of -inf or NaN are what the kernel starts from.
    Source: ONNX AveragePool-1 .. 22, MaxPool-1 .. 22.
    """
    node = m[_pool]
    ones = all(set(m.attr(node, name) or (1,)) == {1} for name in ("kernel_shape", "strides"))
    return m[x] if ones and not any(m.attr(node, "pads") or ()) else None


_global = Op("GlobalAveragePool|GlobalMaxPool", x)


@rule(_global)
def drop_global_pool_of_one(m: Match, _g: Builder) -> ir.Value | None:
    """GlobalAveragePool(x), GlobalMaxPool(x) -> x, x: [N, C, 1, …].  Not EXACT, as `drop_pool_of_one`.

    Source: ONNX GlobalAveragePool-1 .. 22, GlobalMaxPool-1 .. 22.
    """
    dims = m.dims(x)
    return m[x] if dims is not None and all(dim == 1 for dim in dims[2:]) else None


_axis = Var(const=True)
_cumsum = Op("CumSum", x, _axis)


@exact(_cumsum)
def drop_sum_along_one(m: Match, _g: Builder) -> ir.Value | None:
    """CumSum(x, axis) -> x along an axis of size 1, not exclusive.

    Source: ONNX CumSum-11 .. 14.
    """
    dims, axis = m.dims(x), values.scalar(m[_axis])
    if dims is None or axis is None or not -len(dims) <= axis < len(dims):
        return None
    return m[x] if dims[int(axis)] == 1 and not m.attr(_cumsum, "exclusive", 0) else None


_clip = Op("Clip", x, ...)


@exact(_clip)
def drop_clip_without_bounds(m: Match, _g: Builder) -> ir.Value | None:
    """Clip(x) -> x for integers.  Floats keep it: without bounds it makes the infinities finite.

    Source: ONNX Clip-12 .. 13.
    """
    dtype = m.dtype(x)
    bare = not any(m[_clip].inputs[1:])
    return m[x] if bare and dtype is not None and dtype.is_integer() else None


_twins = Op("Max|Min|And|Or|BitwiseAnd|BitwiseOr", x, ...)


@exact(_twins)
def drop_operation_on_equals(m: Match, _g: Builder) -> ir.Value | None:
    """Max(x, x), Min(x, x), And(x, x), Or(x, x), BitwiseAnd(x, x), BitwiseOr(x, x) -> x.

    Source: ONNX Max-1 .. 13, Min-1 .. 13, And-1 .. 7, Or-1 .. 7, BitwiseAnd-18, BitwiseOr-18.
    """
    return m[x] if all(value is m[x] for value in m[_twins].inputs) else None


_concat = Op("Concat", x, ..., fed_by="Split")
_concat_of_slices = Op("Concat", ..., fed_by="Slice")


@exact(_concat)
def join_split(m: Match, _g: Builder) -> ir.Value | None:
    """Concat(Split(x)) -> x with every piece, in order, along the axis of the Split.

    Source: ONNX Split-1 .. 18, Concat-4 .. 13.
    """
    split = m[x].producer()
    if split is None or split.op_type != "Split" or split.domain:
        return None
    whole = split.inputs[0]
    dims = None if whole is None else m.dims(whole)
    pieces = m[_concat].inputs
    if whole is None or dims is None or list(pieces) != list(split.outputs):
        return None
    along = m.attr(split, "axis", 0) % len(dims), m.attr(_concat, "axis", 1) % len(dims)
    return whole if along[0] == along[1] else None


@exact(_concat_of_slices)
def join_slices(m: Match, _g: Builder) -> ir.Value | None:
    """Concat(x[..:a], x[a:b], x[b:..]) -> x, sliced along the axis of the Concat in steps of 1.

    Source: ONNX Slice-10 .. 13, Concat-4 .. 13.
    """
    slices = [_slice_of(value) for value in m[_concat_of_slices].inputs]
    whole = slices[0][0] if slices and slices[0] is not None else None
    dims = None if whole is None else m.dims(whole)
    if whole is None or dims is None:
        return None
    axis, at = m.attr(_concat_of_slices, "axis", 1) % len(dims), 0
    for each in slices:
        if each is None or each[0] is not whole or each[1] % len(dims) != axis or each[2] != at:
            return None
        at = each[3]
    size = dims[axis]
    return whole if at >= FAR or (size.is_static and at >= int(size)) else None


def _slice_of(value: ir.Value | None) -> tuple[ir.Value, int, int, int] | None:
    """What is sliced, along which one axis, from where, to where; None for another kind of slice."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Slice" or node.domain or len(node.inputs) < 4:
        return None
    given = [values.array(each) for each in node.inputs[1:]]
    if node.inputs[0] is None or any(each is None or each.size != 1 for each in given):
        return None
    start, end, axis, *step = (int(each.reshape(())) for each in given if each is not None)
    if step not in ([], [1]) or not 0 <= start < end:
        return None
    return node.inputs[0], axis, start, end


_inner, _outer = Var(const=True), Var(const=True)
_gathered = Op("Gather", x, _inner)
_twice = Op("Gather", _gathered, _outer)


@exact(_twice)
def compose_gathers(m: Match, g: Builder) -> ir.Value | None:
    """Gather(Gather(x, i, axis), j, axis) -> Gather(x, i[j], axis); i: [K], constant, j constant.

    Source: ONNX Gather-1 .. 13.
    """
    first, second = m.array(_inner), m.array(_outer)
    dims = m.dims(x)
    if dims is None or first.ndim != 1:
        return None
    axes = [m.attr(each, "axis", 0) % len(dims) for each in (_gathered, _twice)]
    if axes[0] != axes[1]:
        return None
    if second.size and not (-len(first) <= second.min() and second.max() < len(first)):
        raise Skip("an index is out of range", m[_outer])
    composed = np.asarray(first[second], first.dtype)
    return g.op("Gather", m[x], g.const(composed, name="indices"), like=m[_twice])


_chosen = Var(const=True)
_compress = Op("Compress", x, _chosen)


@exact(_compress)
def turn_compress_into_gather(m: Match, g: Builder) -> ir.Value | None:
    """Compress(x, c, axis) -> Gather(x, where c), or x where c holds throughout; c: [n], constant.

    Source: ONNX Compress-9 .. 11.
    """
    axis = m.attr(_compress, "axis")
    dims, chosen = m.dims(x), m.array(_chosen)
    if axis is None or dims is None or not -len(dims) <= axis < len(dims):
        return None
    size = dims[axis]
    if not size.is_static or len(chosen) > int(size):
        raise Skip("the axis may be shorter than the condition", m[x])
    if len(chosen) == int(size) and chosen.all():
        return m[x]
    places = np.flatnonzero(chosen).astype(np.int64)
    return g.op("Gather", m[x], g.const(places, name="indices"), axis=axis)


_softmax = Op("Softmax|LogSoftmax", x)
_argmax = Op("ArgMax", _softmax)


@rule(_argmax)
def drop_softmax_before_argmax(m: Match, g: Builder) -> ir.Value | None:
    """ArgMax(Softmax(x)), ArgMax(LogSoftmax(x)) -> ArgMax(x) along the same axis.

    Not EXACT: where rounding made the largest equal to the next, the largest now wins.
    Source: ONNX Softmax-1 .. 13 (before 13 over all axes from one on), LogSoftmax likewise, ArgMax-1 .. 13.
    """
    dims = m.dims(x)
    if dims is None:
        return None
    before = m.attr(_softmax, "axis", -1 if m.opset() >= 13 else 1) % len(dims)
    after = m.attr(_argmax, "axis", 0) % len(dims)
    flattened = m.opset() < 13 and before != len(dims) - 1
    if before != after or flattened:
        return None
    return g.op("ArgMax", m[x], like=m[_argmax])


_scale1, _scale2 = Var(const=True), Var(const=True)
_zero1, _zero2 = Var(optional=True), Var(optional=True)
_dequantized = Op("DequantizeLinear", x, _scale1, _zero1, shared=True)
_requantized = Op("QuantizeLinear", _dequantized, _scale2, _zero2)


@exact(_requantized)
def cancel_requantization(m: Match, _g: Builder) -> ir.Value | None:
    """QuantizeLinear(DequantizeLinear(x, s, z), s, z) -> x for integers of at most 16 bits and float32 scales.

    Then `x s / s` is nearer to x than to any other integer: it rounds back to it.
    Source: ONNX QuantizeLinear-10 .. 25, DequantizeLinear-10 .. 25.
    """
    dtype, scale = m.dtype(x), m.array(_scale1)
    narrow = dtype is not None and dtype.is_integer() and dtype.bitwidth <= 16
    if not narrow or scale.dtype != np.float32 or m.dtype(_requantized) != dtype:
        return None
    same = _equal(m[_scale1], m[_scale2]) and _equal(m.get(_zero1), m.get(_zero2))
    if not same or not bool(((scale > SCALES[0]) & (scale < SCALES[1])).all()):
        return None
    attributes = (("axis", 1), ("block_size", 0))
    nodes = m[_dequantized], m[_requantized]
    if scale.size > 1 and any(len({m.attr(n, k, d) for n in nodes}) > 1 for k, d in attributes):
        return None
    return m[x]


def _equal(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is other:
        return True
    a, b = values.array(one), values.array(other)
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)


_shape = Op("Shape|Size", x)


@exact(_shape)
def take_shape_ahead(m: Match, g: Builder) -> ir.Value | None:
    """Shape(Cast(x)) -> Shape(x), and so for every elementwise operator of which nothing but the shape is read.

    Source: ONNX Shape-1 .. 25, Size-1 .. 25.
    """
    node = m[x].producer()
    if node is None or not operators.is_elementwise_unary(node) or m[x].is_graph_output():
        return None
    ahead = node.inputs[0]
    if ahead is None or any(u.node.op_type not in ("Shape", "Size") for u in m[x].uses()):
        return None
    return g.op(m[_shape].op_type, ahead, like=m[_shape])


RULES: tuple[Rule, ...] = (
    drop_pool_of_one,
    drop_global_pool_of_one,
    drop_sum_along_one,
    drop_clip_without_bounds,
    drop_operation_on_equals,
    join_split,
    join_slices,
    compose_gathers,
    turn_compress_into_gather,
    drop_softmax_before_argmax,
    cancel_requantization,
    take_shape_ahead,
)
