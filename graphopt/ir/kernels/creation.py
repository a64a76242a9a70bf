"""Kernels that make tensors out of shapes, ranges and positions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.ir.kernels.operation import Inputs, Kernel, Operation, Results, need


def _shape(op: Operation, inputs: Inputs) -> Results:
    shape = np.array(need(inputs[0]).shape, dtype=np.int64)
    return [shape[slice(*shape_range(op, shape.size))]]


def shape_range(op: Operation, rank: int) -> tuple[int, int]:
    """First and last axis (exclusive) that a Shape operator reports."""
    start, end = op.attr("start", 0), op.attr("end", rank)
    start, end = (limit + rank if limit < 0 else limit for limit in (start, end))
    start, end = (min(max(limit, 0), rank) for limit in (start, end))
    return start, max(start, end)


def _size(_op: Operation, inputs: Inputs) -> Results:
    return [np.array(need(inputs[0]).size, dtype=np.int64)]


def _constant_of_shape(op: Operation, inputs: Inputs) -> Results:
    value: ir.TensorProtocol | None = op.attr("value", None)
    fill = np.zeros((), np.float32) if value is None else value.numpy().reshape(())
    # A view with strides 0: a constant of ones of any size costs nothing until it is written.
    return [np.broadcast_to(fill, tuple(map(int, need(inputs[0]))))]


def _range(_op: Operation, inputs: Inputs) -> Results:
    start, limit, delta = (need(array).reshape(()) for array in inputs)
    if start.dtype.kind not in "iu":
        return None
    return [np.arange(int(start), int(limit), int(delta), dtype=start.dtype)]


def _one_hot(op: Operation, inputs: Inputs) -> Results:
    indices, depth, pair = (need(array) for array in inputs)
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
    data = need(inputs[0])
    return (
        [np.array(np.nonzero(data), dtype=np.int64).reshape(data.ndim, -1)] if data.ndim else None
    )


def _cumsum(op: Operation, inputs: Inputs) -> Results:
    data, axis = need(inputs[0]), int(need(inputs[1]).reshape(()))
    if data.dtype.kind not in "iu" or op.attr("exclusive", 0):
        return None
    if op.attr("reverse", 0):
        return [np.flip(np.cumsum(np.flip(data, axis), axis=axis, dtype=data.dtype), axis)]
    return [np.cumsum(data, axis=axis, dtype=data.dtype)]


CREATION: Mapping[str, Kernel] = {
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "OneHot": _one_hot,
    "NonZero": _nonzero,
    "CumSum": _cumsum,
}
