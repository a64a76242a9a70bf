"""Nodes that pass a tensor on unchanged: each rule says when, and puts the input where the output was.

All rules here are exact.  A graph output keeps a producer of its own, so a no-op between a graph input and a graph
output stays; so does one at the end of a branch or loop body that passes on a value from outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule

FAR = 2**31 - 1
"""Exporters write INT32_MAX or INT64_MAX for "to the end"."""

x = Var()

_identity = Op("Identity", x)


@exact(_identity)
def drop_identity(m: Match, _g: Builder) -> ir.Value:
    """Identity(x) -> x.

    Source: ONNX Identity-1 (tensors), -14 (sequences), -16 (optionals).
    """
    return m[x]


_dropout = Op("Dropout", x, ...)


@exact(_dropout)
def drop_dropout(m: Match, g: Builder) -> ir.Value | Sequence[ir.Value]:
    """Dropout(x, ratio, training_mode) -> x, and its mask, where somebody reads it, -> all true.

    In inference (opset 6: is_test; 7 to 11: always; 12 on: training_mode absent or false), or with ratio 0.
    Source: ONNX Dropout-1 .. 22.
    """
    node = m[_dropout]
    if not _keeps_everything(m, node):
        raise Skip("may run in training mode", node)
    if len(node.outputs) < 2 or not _is_used(node.outputs[1]):
        return m[x]
    if m.opset() < 12:
        raise Skip("the mask of inference is not specified before opset 12", node)
    mask = g.op("ConstantOfShape", g.op("Shape", m[x]), value=ir.tensor(np.array([True])))
    return m[x], mask


def _keeps_everything(m: Match, node: ir.Node) -> bool:
    if m.opset() < 7:
        return bool(m.attr(node, "is_test", 0))
    if m.opset() < 12:
        return True
    ratio, mode = (*node.inputs[1:], None, None)[:2]
    in_inference = mode is None or values.scalar(mode) in (False, 0)
    return in_inference or (ratio is not None and values.scalar(ratio) == 0)


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


_cast = Op("Cast", x)


@exact(_cast)
def drop_cast(m: Match, _g: Builder) -> ir.Value | None:
    """Cast(x, to) -> x where x is of that type already.

    Source: ONNX Cast-1 .. 25.
    """
    return m[x] if m.dtype(x) == _cast_target(m) else None


def _cast_target(m: Match) -> ir.DataType | None:
    to = m.attr(_cast, "to")
    if isinstance(to, str):  # Cast-1 names the type
        return ir.DataType.__members__.get(to)
    return None if to is None else ir.DataType(to)


_like = Var()
_cast_like = Op("CastLike", x, _like)


@exact(_cast_like)
def turn_cast_like_into_cast(m: Match, g: Builder) -> ir.Value | None:
    """CastLike(x, like) -> Cast(x, to = element type of like).

    Source: ONNX CastLike-15 .. 25; its attributes are those of Cast.
    """
    dtype = m.dtype(_like)
    return None if dtype is None else g.op("Cast", m[x], like=m[_cast_like], to=int(dtype))


_single = Op("Concat|Sum|Max|Min|Mean", x)


@exact(_single)
def drop_operation_on_one_tensor(m: Match, _g: Builder) -> ir.Value:
    """Concat(x), Sum(x), Max(x), Min(x), Mean(x) -> x.

    Source: ONNX Concat-1 .. 13, Sum-1 .. 13, Max-1 .. 13, Min-1 .. 13, Mean-1 .. 13.
    """
    return m[x]


_split = Op("Split", x, ...)


@exact(_split)
def drop_split_into_one(m: Match, _g: Builder) -> ir.Value | None:
    """Split(x) with one output -> x.

    Source: ONNX Split-1 .. 18.
    """
    return m[x] if len(m[_split].outputs) == 1 else None


_view = Op("Reshape|Flatten|Squeeze|Unsqueeze|Expand|Tile", x, ...)


@exact(_view)
def drop_view_of_same_dims(m: Match, _g: Builder) -> ir.Value | None:
    """Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile of x -> x where every dim is proven to stay.

    They all keep the order of the elements that they keep, so equal dims mean equal tensors.
    Source: ONNX Reshape-1 .. 25, Flatten-1 .. 25, Squeeze-1 .. 25, Unsqueeze-1 .. 25, Expand-8 .. 13, Tile-6 .. 13.
    """
    if m.opset() < 6 and m[_view].op_type == "Tile":
        return None
    return m[x] if _same_dims(m, _view) else None


def _same_dims(m: Match, root: Op) -> bool:
    """Whether the root has the dims of x, each proven equal."""
    before, after = m.dims(x), m.dims(root)
    return before is not None and before == after


_transpose = Op("Transpose", x)


@exact(_transpose)
def drop_transpose(m: Match, _g: Builder) -> ir.Value | None:
    """Transpose(x) -> x where perm leaves every axis in place, or moves only axes of size 1 past one another.

    Source: ONNX Transpose-1 .. 25.
    """
    perm = m.attr(_transpose, "perm")
    if perm is not None and tuple(perm) == tuple(range(len(perm))):
        return m[x]
    dims = m.dims(x)
    if dims is None:
        return None
    order = tuple(range(len(dims)))[::-1] if perm is None else tuple(perm)
    if sorted(order) != list(range(len(dims))):
        return None  # not a permutation: the runtime will say so
    moved = [axis for axis in order if dims[axis] != 1]
    return m[x] if moved == sorted(moved) and dims == tuple(dims[i] for i in order) else None


_pad = Op("Pad", x, ...)


@exact(_pad)
def drop_pad(m: Match, _g: Builder) -> ir.Value | None:
    """Pad(x, pads = 0) -> x, in every mode.

    Source: ONNX Pad-1 (paddings), -2 (pads), -11 .. 25 (pads as input).
    """
    node = m[_pad]
    attribute = "pads" if m.opset() >= 2 else "paddings"
    pads = _ints(m, node.inputs[1]) if m.opset() >= 11 else m.attr(node, attribute)
    return m[x] if pads is not None and not any(pads) else None


_slice = Op("Slice", x, ...)


@exact(_slice)
def drop_slice(m: Match, _g: Builder) -> ir.Value | None:
    """Slice(x, starts, ends, axes, steps) -> x where no axis loses an element or runs backwards.

    Source: ONNX Slice-1 (attributes), -10 .. 13 (inputs).
    """
    node = m[_slice]
    forward = m.opset() < 10 or _is_forward(m, node)
    if not forward:
        return None
    return m[x] if _same_dims(m, _slice) or _starts_and_ends_outside(m, node) else None


def _is_forward(m: Match, node: ir.Node) -> bool:
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    found = (1,) if steps is None else _ints(m, steps)
    return found is not None and all(step > 0 for step in found)


def _starts_and_ends_outside(m: Match, node: ir.Node) -> bool:
    """Whether every range is [0:infinity:1]: whole at any size, even of unknown rank."""
    if m.opset() < 10:
        starts, ends = m.attr(node, "starts"), m.attr(node, "ends")
        steps: Sequence[int] | None = (1,)
    else:
        starts, ends = (_ints(m, value) for value in node.inputs[1:3])
        given = node.inputs[4] if len(node.inputs) > 4 else None
        steps = (1,) if given is None else _ints(m, given)
    if starts is None or ends is None or steps is None:
        return False
    return not any(starts) and all(end >= FAR for end in ends) and set(steps) <= {1}


def _ints(m: Match, value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of a small integer tensor if all are known."""
    if value is None:
        return None
    data = m.data(value)
    dims = None if data is None else data.dims
    if dims is None or not all(dim.is_static for dim in dims):
        return None
    return tuple(int(dim) for dim in dims)


_resize = Op("Resize|Upsample", x, ...)


@exact(_resize)
def drop_resize(m: Match, _g: Builder) -> ir.Value | None:
    """Resize(x, scales = 1) or Resize(x, sizes = dims of x) -> x; Upsample likewise.

    With scale 1 every sampling point is an element, except in the modes that shift it or crop.
    Source: ONNX Upsample-7 .. 9, Resize-10 .. 19; `tf_half_pixel_for_nn` (11, 12) and `tf_crop_and_resize` stay.
    """
    node = m[_resize]
    shifting = ("tf_half_pixel_for_nn", "tf_crop_and_resize")
    if node.op_type == "Resize" and m.opset() >= 11:
        if m.attr(node, "coordinate_transformation_mode", "half_pixel") in shifting:
            return None
        scales, sizes = (*node.inputs[2:], None, None)[:2]
    else:
        scales, sizes = (*node.inputs[1:], None)[0], None
    if scales is None and node.attributes.get("scales") is not None:
        return m[x] if set(m.attr(node, "scales")) == {1.0} else None
    if scales is not None and values.fill(scales) == 1.0:
        return m[x]
    return m[x] if sizes is not None and _same_dims(m, _resize) else None


_index = Var(const=True)
_gather = Op("Gather", x, _index)


@exact(_gather)
def drop_gather_of_everything(m: Match, _g: Builder) -> ir.Value | None:
    """Gather(x, [0, 1, …, n-1], axis) -> x where n is the size of the axis.

    Source: ONNX Gather-1 .. 13.
    """
    dims = m.dims(x)
    axis = m.attr(_gather, "axis", 0)
    if dims is None or not -len(dims) <= axis < len(dims):
        return None
    return m[x] if _counts_up(m[_index], dims[axis], rank=1) else None


def _counts_up(index: ir.Value, size: Dim, *, rank: int) -> bool:
    """Whether a constant holds 0, 1, …, size - 1 along its first axis, the others being of size 1."""
    tensor = values.constant(index)
    if tensor is None or not size.is_static:
        return False
    if tuple(tensor.shape.numpy()) != (int(size), *[1] * (rank - 1)):
        return False
    return bool((tensor.numpy().reshape(-1) == np.arange(int(size))).all())


_limit, _zero, _one = Var(), Var(const=True), Var(const=True)
_range = Op("Range", _zero, _limit, _one, shared=True)
_gather_range = Op("Gather", x, _range)


@exact(_gather_range, benefit=2)
def drop_gather_of_range(m: Match, _g: Builder) -> ir.Value | None:
    """Gather(x, Range(0, n, 1), axis) -> x where n is proven to be the size of the axis.

    Source: ONNX Gather-1 .. 13, Range-11.
    """
    dims, limit = m.dims(x), m.data(_limit)
    axis = m.attr(_gather_range, "axis", 0)
    if dims is None or limit is None or not -len(dims) <= axis < len(dims):
        return None
    from_zero_by_one = values.scalar(m[_zero]) == 0 and values.scalar(m[_one]) == 1
    return m[x] if from_zero_by_one and limit.item() == dims[axis] else None


_updates = Var()
_scatter = Op("ScatterND", x, _index, _updates)


@exact(_scatter)
def replace_scatter_of_everything(m: Match, _g: Builder) -> ir.Value | None:
    """ScatterND(x, [[0], [1], …, [n-1]], updates) -> updates where n is the first dim of x.

    Source: ONNX ScatterND-11 .. 18, reduction none.
    """
    dims = m.dims(x)
    if not dims or m.attr(_scatter, "reduction", "none") != "none" or m.dims(_updates) != dims:
        return None
    return m[_updates] if _counts_up(m[_index], dims[0], rank=2) else None


_condition, _a, _b = Var(), Var(), Var()
_where = Op("Where", _condition, _a, _b)


@rule(_where)
def drop_decided_where(m: Match, _g: Builder) -> ir.Value | None:
    """Where(true, a, b) -> a, Where(false, a, b) -> b, Where(c, a, a) -> a; without broadcasting.

    Not EXACT: the kernel of ONNX Runtime 1.31 adds the two masked operands, and so turns -0.0 into 0.0.
    Source: ONNX Where-9 .. 16.
    """
    if m[_a] is m[_b]:
        chosen = m[_a]
    else:
        decided = values.fill(m[_condition])
        if decided is None:
            return None
        chosen = m[_a] if decided else m[_b]
    dims, result = m.dims(chosen), m.dims(_where)
    if dims is None or dims != result:
        raise Skip("the chosen operand may have to be broadcast", chosen)
    return chosen


RULES: tuple[Rule, ...] = (
    drop_identity,
    drop_dropout,
    drop_cast,
    turn_cast_like_into_cast,
    drop_operation_on_one_tensor,
    drop_split_into_one,
    drop_view_of_same_dims,
    drop_transpose,
    drop_pad,
    drop_slice,
    drop_resize,
    drop_gather_of_everything,
    drop_gather_of_range,
    replace_scatter_of_everything,
    drop_decided_where,
)
