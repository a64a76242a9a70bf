"""NumPy kernels for the operators whose result is exact and cheap: data movement and integers.

They serve two masters: folding (arrays of numbers) and shape inference (arrays of `Dim` objects,
for which the kernels that only move elements work unchanged). A kernel returns None where it does
not know the result to the last bit; the caller then asks a runtime. A malformed node makes it raise
one of `REFUSALS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir

Array: TypeAlias = np.ndarray[Any, Any]
Inputs: TypeAlias = Sequence[Array | None]
Results: TypeAlias = Sequence[Array] | None
T = TypeVar("T")

REFUSALS = (ValueError, IndexError, TypeError, KeyError, OverflowError, AttributeError)
"""What a kernel raises when node and inputs do not fit together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """A node as its kernel sees it.

    Attributes:
        node: the node.
        version: the opset at which its domain is imported.
        bindings: what the call gives the parameters of the function that the node lies in.
    """

    node: ir.Node
    version: int
    bindings: Mapping[str, ir.Attr] = dataclasses.field(default_factory=dict)

    def attr(self, name: str, default: T) -> T:
        """The value of an attribute, parameters of the function resolved, or the default.

        Raises:
            ValueError: the attribute is a parameter without a value.
        """
        held = self.held(name)
        return default if held is None else held.value

    def held(self, name: str) -> ir.Attr | None:
        """The attribute itself, parameters of the function resolved, or None.

        Raises:
            ValueError: the attribute is a parameter without a value.
        """
        held = self.node.attributes.get(name)
        if held is None or held.ref_attr_name is None:
            return held
        bound = self.bindings.get(held.ref_attr_name)
        if bound is not None and bound.type == ir.AttributeType.UNDEFINED:
            return None  # a parameter that the call leaves out: as if the attribute were absent
        if bound is None and self.bindings is UNBOUND:
            raise ValueError(f"attribute {name} has no value outside a call")
        return bound


UNBOUND: Mapping[str, ir.Attr] = {}
"""The bindings of a function body that no call is known for."""

Kernel: TypeAlias = Callable[[Operation, Inputs], Results]


def kernel(node: ir.Node) -> Kernel | None:
    """The kernel of an operator of the default domain, or None."""
    return None if node.domain else KERNELS.get(node.op_type)


def movement(node: ir.Node) -> Kernel | None:
    """The kernel of an operator that only moves the elements of its inputs, or None."""
    return None if node.domain else MOVEMENT.get(node.op_type)


def run(chosen: Kernel, operation: Operation, inputs: Inputs) -> Results:
    """Runs a kernel; None where it does not know the exact result.

    Raises:
        ValueError, IndexError, TypeError, KeyError, OverflowError, AttributeError: the node is
        malformed.
    """
    with np.errstate(all="ignore"):
        return chosen(operation, inputs)


def axes_of(op: Operation, inputs: Inputs, since: int) -> tuple[int, ...] | None:
    """The axes given as attribute before an opset, as input 1 from it on; None where absent."""
    if op.version < since:
        given = op.held("axes")
        return None if given is None else given.as_ints()
    if len(inputs) < 2 or inputs[1] is None:
        return None
    return tuple(int(axis) for axis in inputs[1].reshape(-1))


def _need(array: Array | None) -> Array:
    """A required input.

    Raises:
        ValueError: it is absent.
    """
    if array is None:
        raise ValueError("a required input is absent")
    return array


def _identity(_op: Operation, inputs: Inputs) -> Results:
    return [_need(inputs[0])]


def _reshape(op: Operation, inputs: Inputs) -> Results:
    data = _need(inputs[0])
    wanted = op.attr("shape", ()) if op.version < 5 else tuple(map(int, _need(inputs[1])))
    if not op.attr("allowzero", 0):
        wanted = tuple(data.shape[i] if size == 0 else size for i, size in enumerate(wanted))
    return [data.reshape(wanted)]


def _squeeze(op: Operation, inputs: Inputs) -> Results:
    axes = axes_of(op, inputs, 13)
    data = _need(inputs[0])
    return [np.squeeze(data, axis=axes)]


def _unsqueeze(op: Operation, inputs: Inputs) -> Results:
    axes = axes_of(op, inputs, 13)
    if axes is None:
        raise ValueError("axes are required")
    return [np.expand_dims(_need(inputs[0]), axes)]


def _flatten(op: Operation, inputs: Inputs) -> Results:
    data = _need(inputs[0])
    axis = op.attr("axis", 1)
    axis += data.ndim if axis < 0 else 0
    rows = int(np.prod(data.shape[:axis], dtype=np.int64))
    return [data.reshape(rows, int(np.prod(data.shape[axis:], dtype=np.int64)))]


def _transpose(op: Operation, inputs: Inputs) -> Results:
    return [np.transpose(_need(inputs[0]), op.attr("perm", None))]


def _concat(op: Operation, inputs: Inputs) -> Results:
    return [np.concatenate([_need(array) for array in inputs], axis=op.attr("axis", 1))]


def _gather(op: Operation, inputs: Inputs) -> Results:
    data, indices = _need(inputs[0]), _need(inputs[1])
    return [np.asarray(np.take(data, indices.astype(np.int64), axis=op.attr("axis", 0)))]


def _gather_elements(op: Operation, inputs: Inputs) -> Results:
    indices = _need(inputs[1]).astype(np.int64)
    return [np.take_along_axis(_need(inputs[0]), indices, axis=op.attr("axis", 0))]


def _gather_nd(op: Operation, inputs: Inputs) -> Results:
    if op.attr("batch_dims", 0):
        return None
    indices = _need(inputs[1]).astype(np.int64)
    return [np.asarray(_need(inputs[0])[tuple(np.moveaxis(indices, -1, 0))])]


def _slice(op: Operation, inputs: Inputs) -> Results:
    data = _need(inputs[0])
    where = [slice(None)] * data.ndim
    for axis, start, end, step in _slices(op, inputs):
        if step == 0:
            raise ValueError("the step of a slice is 0")
        where[axis] = slice(*_slice_bounds(data.shape[axis], start, end, step), step)
    return [data[tuple(where)]]


def _slices(op: Operation, inputs: Inputs) -> list[tuple[int, int, int, int]]:
    """(axis, start, end, step) of each axis that a Slice cuts."""
    if op.version < 10:
        starts: tuple[int, ...] = op.attr("starts", ())
        ends: tuple[int, ...] = op.attr("ends", ())
        given = op.attr("axes", tuple(range(len(starts))))
        return [(a, s, e, 1) for a, s, e in zip(given, starts, ends, strict=True)]
    columns = [None if i >= len(inputs) else inputs[i] for i in range(1, 5)]
    first, last = _need(columns[0]).tolist(), _need(columns[1]).tolist()
    axes = range(len(first)) if columns[2] is None else columns[2].tolist()
    steps = [1] * len(first) if columns[3] is None else columns[3].tolist()
    return list(zip(axes, first, last, steps, strict=True))


def _slice_bounds(size: int, start: int, end: int, step: int) -> tuple[int, int | None]:
    """Bounds of ONNX as bounds of Python: they are clamped, and end -1 means before the first."""
    start += size if start < 0 else 0
    end += size if end < 0 else 0
    if step > 0:
        return max(start, 0), max(end, 0)
    end = max(end, -1)
    if start < 0:
        return 0, 0
    return min(start, size - 1) if size else 0, None if end == -1 else end


def _split(op: Operation, inputs: Inputs) -> Results:
    data, axis = _need(inputs[0]), op.attr("axis", 0)
    sizes = op.attr("split", None)
    if op.version >= 13 and len(inputs) > 1 and inputs[1] is not None:
        sizes = tuple(map(int, inputs[1]))
    if sizes is None:
        count = len(op.node.outputs)
        each = -(-data.shape[axis] // count)
        sizes = (each,) * (count - 1) + (data.shape[axis] - each * (count - 1),)
    if sum(sizes) != data.shape[axis] or min(sizes) < 0 or len(sizes) != len(op.node.outputs):
        raise ValueError(f"cannot split {data.shape[axis]} into {sizes}")
    return np.split(data, np.cumsum(sizes)[:-1], axis=axis)


def _expand(_op: Operation, inputs: Inputs) -> Results:
    data = _need(inputs[0])
    wanted = tuple(map(int, _need(inputs[1])))
    return [np.broadcast_to(data, np.broadcast_shapes(data.shape, wanted))]


def _tile(op: Operation, inputs: Inputs) -> Results:
    if op.version < 6:
        return None
    return [np.tile(_need(inputs[0]), tuple(map(int, _need(inputs[1]))))]


def _where(_op: Operation, inputs: Inputs) -> Results:
    return [np.where(_need(inputs[0]), _need(inputs[1]), _need(inputs[2]))]


def _scatter_nd(op: Operation, inputs: Inputs) -> Results:
    if op.attr("reduction", "none") != "none":
        return None
    data = _need(inputs[0]).copy()
    data[tuple(np.moveaxis(_need(inputs[1]).astype(np.int64), -1, 0))] = _need(inputs[2])
    return [data]


def _scatter_elements(op: Operation, inputs: Inputs) -> Results:
    if op.attr("reduction", "none") != "none":
        return None
    data = _need(inputs[0]).copy()
    indices = _need(inputs[1]).astype(np.int64)
    np.put_along_axis(data, indices, _need(inputs[2]), axis=op.attr("axis", 0))
    return [data]


def _pad(op: Operation, inputs: Inputs) -> Results:
    data = _need(inputs[0])
    modes = {"constant": "constant", "edge": "edge", "reflect": "reflect"}
    mode = modes.get(op.attr("mode", "constant"))
    if mode is None or op.version < 11:
        return None
    pads = list(map(int, _need(inputs[1])))
    axes = range(data.ndim) if len(inputs) < 4 or inputs[3] is None else inputs[3].tolist()
    widths = [(0, 0)] * data.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(pads) // 2])
    if any(width < 0 for pair in widths for width in pair) or (
        mode != "constant" and not data.size
    ):
        return None
    if mode != "constant":
        return [np.pad(data, widths, mode=mode)]  # type: ignore[call-overload]
    fill = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros((), data.dtype)
    return [np.pad(data, widths, constant_values=fill.reshape(()))]


def _trilu(op: Operation, inputs: Inputs) -> Results:
    data = _need(inputs[0])
    k = int(inputs[1].reshape(())) if len(inputs) > 1 and inputs[1] is not None else 0
    rows, columns = data.shape[-2:]
    offset = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    keep = offset >= k if op.attr("upper", 1) else offset <= k
    return [np.where(keep, data, np.zeros((), data.dtype))]


def _shape(op: Operation, inputs: Inputs) -> Results:
    shape = np.array(_need(inputs[0]).shape, dtype=np.int64)
    return [shape[slice(*shape_range(op, shape.size))]]


def shape_range(op: Operation, rank: int) -> tuple[int, int]:
    """First and last axis (exclusive) that a Shape operator reports."""
    start, end = op.attr("start", 0), op.attr("end", rank)
    start, end = (limit + rank if limit < 0 else limit for limit in (start, end))
    start, end = (min(max(limit, 0), rank) for limit in (start, end))
    return start, max(start, end)


def _size(_op: Operation, inputs: Inputs) -> Results:
    return [np.array(_need(inputs[0]).size, dtype=np.int64)]


def _constant_of_shape(op: Operation, inputs: Inputs) -> Results:
    value: ir.TensorProtocol | None = op.attr("value", None)
    fill = np.zeros((), np.float32) if value is None else value.numpy().reshape(())
    # A view with strides 0: a constant of ones of any size costs nothing until it is written.
    return [np.broadcast_to(fill, tuple(map(int, _need(inputs[0]))))]


def _range(_op: Operation, inputs: Inputs) -> Results:
    start, limit, delta = (_need(array).reshape(()) for array in inputs)
    if start.dtype.kind not in "iu":
        return None
    return [np.arange(int(start), int(limit), int(delta), dtype=start.dtype)]


def _one_hot(op: Operation, inputs: Inputs) -> Results:
    indices, depth, pair = (_need(array) for array in inputs)
    if indices.dtype.kind not in "iu":
        return None
    size = int(depth.reshape(()))
    axis = op.attr("axis", -1)
    wrapped = np.where(indices < 0, indices + size, indices)
    hot = np.expand_dims(wrapped, axis) == np.arange(size).reshape(
        [-1 if i == axis % (indices.ndim + 1) else 1 for i in range(indices.ndim + 1)]
    )
    return [np.where(hot, pair[1], pair[0])]


def _nonzero(_op: Operation, inputs: Inputs) -> Results:
    data = _need(inputs[0])
    return (
        [np.array(np.nonzero(data), dtype=np.int64).reshape(data.ndim, -1)] if data.ndim else None
    )


def _cumsum(op: Operation, inputs: Inputs) -> Results:
    data, axis = _need(inputs[0]), int(_need(inputs[1]).reshape(()))
    if data.dtype.kind not in "iu" or op.attr("exclusive", 0):
        return None
    if op.attr("reverse", 0):
        return [np.flip(np.cumsum(np.flip(data, axis), axis=axis, dtype=data.dtype), axis)]
    return [np.cumsum(data, axis=axis, dtype=data.dtype)]


def _cast(op: Operation, inputs: Inputs) -> Results:
    return cast(_need(inputs[0]), ir.DataType(op.attr("to", 0)))


def cast(data: Array, to: ir.DataType) -> Results:
    """A cast between plain numbers, where every runtime agrees on the result; else None."""
    if data.dtype.kind not in "biuf" or to in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    target = to.numpy()
    if data.dtype.kind == "f":
        if not np.isfinite(data).all():
            return None  # NaN payloads, and infinities as integers, differ between runtimes
        if target.kind in "iu" and not _fits(data, target):
            return None
    if target.kind in "biuf" or to == ir.DataType.BFLOAT16:
        return [data.astype(target)]
    return None


def _fits(data: Array, target: np.dtype[Any]) -> bool:
    """Whether floats truncate to integers within the range of a type."""
    if not data.size:
        return True
    limits = np.iinfo(target)
    return float(limits.min) <= float(data.min()) and float(data.max()) < float(limits.max)


def _numeric(
    function: Callable[[Array, Array], Array], kinds: str = "iu"
) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a binary operator on native types of the given kinds."""

    def compute(op: Operation, inputs: Inputs) -> Results:
        left, right = _need(inputs[0]), _need(inputs[1])
        if left.dtype != right.dtype or left.dtype.kind not in kinds or not _full(left, kinds):
            return None
        return [np.asarray(function(left, right))] if op.version >= 7 else None

    return compute


def _full(array: Array, kinds: str) -> bool:
    """Whether arithmetic on the type is done in the type: float16 is computed in float32 by some."""
    return "f" not in kinds or array.dtype.kind != "f" or array.dtype.itemsize >= 4


def _divide(op: Operation, inputs: Inputs) -> Results:
    left, right = _need(inputs[0]), _need(inputs[1])
    if left.dtype.kind == "f":
        return _numeric(np.divide, "f")(op, inputs)
    if left.dtype.kind not in "iu" or left.dtype != right.dtype or bool((right == 0).any()):
        return None
    quotient = np.floor_divide(left, right)
    inexact = (np.remainder(left, right) != 0) & ((left < 0) != (right < 0))
    return [(quotient + inexact).astype(left.dtype)]


def _mod(op: Operation, inputs: Inputs) -> Results:
    left, right = _need(inputs[0]), _need(inputs[1])
    if left.dtype.kind not in "iu" or left.dtype != right.dtype or bool((right == 0).any()):
        return None
    return [(np.fmod if op.attr("fmod", 0) else np.remainder)(left, right)]


def _unary(
    function: Callable[[Array], Array], kinds: str
) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a unary operator on native types of the given kinds."""

    def compute(_op: Operation, inputs: Inputs) -> Results:
        data = _need(inputs[0])
        known = data.dtype.kind in kinds and _full(data, kinds)
        return [np.asarray(function(data), dtype=data.dtype)] if known else None

    return compute


def _extreme(function: Callable[[Array, Array], Array]) -> Callable[[Operation, Inputs], Results]:
    """The kernel of Max or Min on integers (runtimes disagree on NaN and signed zeros)."""

    def compute(op: Operation, inputs: Inputs) -> Results:
        result = _need(inputs[0])
        if result.dtype.kind not in "iu" or op.version < 8:
            return None
        for other in inputs[1:]:
            result = function(result, _need(other))
        return [np.asarray(result)]

    return compute


def _reduce(function: Callable[..., Array], since: int) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a reduction of integers; axes become an input at opset `since`."""

    def compute(op: Operation, inputs: Inputs) -> Results:
        data = _need(inputs[0])
        if data.dtype.kind not in "iu" or not data.size:
            return None
        axes = axes_of(op, inputs, since) or None
        if axes is None and op.attr("noop_with_empty_axes", 0):
            return [data]
        found = function(data, axis=axes, keepdims=bool(op.attr("keepdims", 1)))
        return [np.asarray(found, dtype=data.dtype)]

    return compute


def _sum(data: Array, **options: Any) -> Array:  # noqa: ANN401 - passed through to NumPy
    return np.asarray(np.sum(data, dtype=data.dtype, **options))


def _prod(data: Array, **options: Any) -> Array:  # noqa: ANN401
    return np.asarray(np.prod(data, dtype=data.dtype, **options))


def _compare(
    function: Callable[[Array, Array], Array], kinds: str = "iuf"
) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a comparison."""
    return _numeric(function, kinds)


MOVEMENT: Mapping[str, Kernel] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Slice": _slice,
    "Split": _split,
    "Expand": _expand,
    "Tile": _tile,
    "Where": _where,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "Scatter": _scatter_elements,
    "Pad": _pad,
    "Trilu": _trilu,
}

KERNELS: Mapping[str, Kernel] = {
    **MOVEMENT,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "OneHot": _one_hot,
    "NonZero": _nonzero,
    "CumSum": _cumsum,
    "Cast": _cast,
    "Add": _numeric(np.add, "iuf"),
    "Sub": _numeric(np.subtract, "iuf"),
    "Mul": _numeric(np.multiply, "iuf"),
    "Div": _divide,
    "Mod": _mod,
    "Max": _extreme(np.maximum),
    "Min": _extreme(np.minimum),
    "Neg": _unary(np.negative, "if"),
    "Abs": _unary(np.abs, "iuf"),
    "Sign": _unary(np.sign, "iu"),
    "Floor": _unary(np.floor, "f"),
    "Ceil": _unary(np.ceil, "f"),
    "Round": _unary(np.rint, "f"),
    "Sqrt": _unary(np.sqrt, "f"),
    "Not": _unary(np.logical_not, "b"),
    "And": _numeric(np.logical_and, "b"),
    "Or": _numeric(np.logical_or, "b"),
    "Xor": _numeric(np.logical_xor, "b"),
    "Equal": _compare(np.equal, "biuf"),
    "Less": _compare(np.less),
    "LessOrEqual": _compare(np.less_equal),
    "Greater": _compare(np.greater),
    "GreaterOrEqual": _compare(np.greater_equal),
    "BitwiseAnd": _numeric(np.bitwise_and),
    "BitwiseOr": _numeric(np.bitwise_or),
    "BitwiseXor": _numeric(np.bitwise_xor),
    "BitwiseNot": _unary(np.bitwise_not, "iu"),
    "ReduceSum": _reduce(_sum, 13),
    "ReduceProd": _reduce(_prod, 18),
    "ReduceMax": _reduce(np.max, 18),
    "ReduceMin": _reduce(np.min, 18),
}
