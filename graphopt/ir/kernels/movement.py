"""Kernels that only move elements: they work on arrays of numbers, strings and dims alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from graphopt.ir.kernels.operation import Array, Inputs, Kernel, Operation, Results, axes_of, need

FAR = 2**31 - 1
"""From here on an end stands for the end of the axis."""


def _identity(_op: Operation, inputs: Inputs) -> Results:
    return [need(inputs[0])]


def _reshape(op: Operation, inputs: Inputs) -> Results:
    data = need(inputs[0])
    wanted = op.attr("shape", ()) if op.version < 5 else tuple(map(int, need(inputs[1])))
    if not op.attr("allowzero", 0):
        wanted = tuple(data.shape[i] if size == 0 else size for i, size in enumerate(wanted))
    return [data.reshape(wanted)]


def _squeeze(op: Operation, inputs: Inputs) -> Results:
    axes = axes_of(op, inputs, 13)
    data = need(inputs[0])
    return [np.squeeze(data, axis=axes)]


def _unsqueeze(op: Operation, inputs: Inputs) -> Results:
    axes = axes_of(op, inputs, 13)
    if axes is None:
        raise ValueError("axes are required")
    return [np.expand_dims(need(inputs[0]), axes)]


def _flatten(op: Operation, inputs: Inputs) -> Results:
    data = need(inputs[0])
    axis = op.attr("axis", 1)
    axis += data.ndim if axis < 0 else 0
    rows = int(np.prod(data.shape[:axis], dtype=np.int64))
    return [data.reshape(rows, int(np.prod(data.shape[axis:], dtype=np.int64)))]


def _transpose(op: Operation, inputs: Inputs) -> Results:
    return [np.transpose(need(inputs[0]), op.attr("perm", None))]


def _concat(op: Operation, inputs: Inputs) -> Results:
    return [np.concatenate([need(array) for array in inputs], axis=op.attr("axis", 1))]


def _gather(op: Operation, inputs: Inputs) -> Results:
    data, indices = need(inputs[0]), need(inputs[1])
    return [np.asarray(np.take(data, indices.astype(np.int64), axis=op.attr("axis", 0)))]


def _gather_elements(op: Operation, inputs: Inputs) -> Results:
    data = need(inputs[0])
    return [data[_places(op, data, need(inputs[1]))]]


def _places(op: Operation, data: Array, indices: Array) -> tuple[Array, ...]:
    """Where GatherElements reads and ScatterElements writes: at `indices` along the axis, else at its own place.

    NumPy's `take_along_axis` is no help: it stretches an axis of one, where ONNX reads but the first element.

    Raises:
        ValueError: the ranks differ.
    """
    if indices.ndim != data.ndim:
        raise ValueError(f"indices of rank {indices.ndim} into rank {data.ndim}")
    places: list[Array] = list(np.indices(indices.shape, sparse=True))
    places[op.attr("axis", 0)] = indices.astype(np.int64)
    return tuple(places)


def _gather_nd(op: Operation, inputs: Inputs) -> Results:
    if op.attr("batch_dims", 0):
        return None
    indices = need(inputs[1]).astype(np.int64)
    return [np.asarray(need(inputs[0])[tuple(np.moveaxis(indices, -1, 0))])]


def _slice(op: Operation, inputs: Inputs) -> Results:
    data = need(inputs[0])
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
    first, last = need(columns[0]).tolist(), need(columns[1]).tolist()
    axes = range(len(first)) if columns[2] is None else columns[2].tolist()
    steps = [1] * len(first) if columns[3] is None else columns[3].tolist()
    return list(zip(axes, first, last, steps, strict=True))


def _slice_bounds(size: int, start: int, end: int, step: int) -> tuple[int, int | None]:
    """Bounds of ONNX as bounds of Python: they are clamped, and end -1 means before the first.

    Backwards, a start before the first element is the first element, in ONNX (Slice-10) unlike in NumPy.

    Raises:
        ValueError: a backward slice ends at "the end": nothing by the standard, everything to ONNX Runtime 1.31.
    """
    if step < 0 and end >= FAR:
        raise ValueError("a backward slice to the end is not well-defined")
    start += size if start < 0 else 0
    end += size if end < 0 else 0
    if step > 0:
        return max(start, 0), max(end, 0)
    end = max(end, -1)
    return max(min(start, size - 1), 0), None if end == -1 else end


def _split(op: Operation, inputs: Inputs) -> Results:
    data, axis = need(inputs[0]), op.attr("axis", 0)
    sizes = op.attr("split", None)
    if op.version >= 13 and len(inputs) > 1 and inputs[1] is not None:
        sizes = tuple(map(int, inputs[1]))
    if sizes is None:
        count = len(op.node.outputs)
        each = -(-data.shape[axis] // count)
        sizes = (each,) * (count - 1) + (data.shape[axis] - each * (count - 1),)
        if count > 1 and sizes[-1] < 1:  # the runtime refuses it: folding would hide that
            raise ValueError(f"{data.shape[axis]} elements are too few for {count} outputs")
    if sum(sizes) != data.shape[axis] or min(sizes) < 0 or len(sizes) != len(op.node.outputs):
        raise ValueError(f"cannot split {data.shape[axis]} into {sizes}")
    return np.split(data, np.cumsum(sizes)[:-1], axis=axis)


def _expand(_op: Operation, inputs: Inputs) -> Results:
    data = need(inputs[0])
    wanted = tuple(map(int, need(inputs[1])))
    return [np.broadcast_to(data, np.broadcast_shapes(data.shape, wanted))]


def _tile(op: Operation, inputs: Inputs) -> Results:
    if op.version < 6:
        return None
    return [np.tile(need(inputs[0]), tuple(map(int, need(inputs[1]))))]


def _where(_op: Operation, inputs: Inputs) -> Results:
    return [np.where(need(inputs[0]), need(inputs[1]), need(inputs[2]))]


def _scatter_nd(op: Operation, inputs: Inputs) -> Results:
    if op.attr("reduction", "none") != "none":
        return None
    data = need(inputs[0]).copy()
    data[tuple(np.moveaxis(need(inputs[1]).astype(np.int64), -1, 0))] = need(inputs[2])
    return [data]


def _scatter_elements(op: Operation, inputs: Inputs) -> Results:
    if op.attr("reduction", "none") != "none":
        return None
    data = need(inputs[0]).copy()
    data[_places(op, data, need(inputs[1]))] = need(inputs[2])
    return [data]


def _pad(op: Operation, inputs: Inputs) -> Results:
    data = need(inputs[0])
    modes = {"constant": "constant", "edge": "edge", "reflect": "reflect"}
    mode = modes.get(op.attr("mode", "constant"))
    if mode is None or op.version < 11:
        return None
    pads = list(map(int, need(inputs[1])))
    axes = range(data.ndim) if len(inputs) < 4 or inputs[3] is None else inputs[3].tolist()
    widths = [(0, 0)] * data.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(pads) // 2])
    if any(width < 0 for pair in widths for width in pair) or (
        mode != "constant" and not data.size
    ):
        return None
    if mode == "reflect" and any(
        max(pair) >= size for pair, size in zip(widths, data.shape, strict=True) if any(pair)
    ):
        return None  # the runtime refuses to reflect more than there is; NumPy goes to and fro
    if mode != "constant":
        return [np.pad(data, widths, mode=mode)]  # type: ignore[call-overload]
    fill = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros((), data.dtype)
    return [np.pad(data, widths, constant_values=fill.reshape(()))]


def _trilu(op: Operation, inputs: Inputs) -> Results:
    data = need(inputs[0])
    k = int(inputs[1].reshape(())) if len(inputs) > 1 and inputs[1] is not None else 0
    rows, columns = data.shape[-2:]
    offset = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    keep = offset >= k if op.attr("upper", 1) else offset <= k
    return [np.where(keep, data, np.zeros((), data.dtype))]


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
