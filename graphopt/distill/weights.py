"""What of a student is trained: its float weights, and its integer ones that are dequantised, with zeros kept.

NumPy only: the torch side of it is in `train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values

Array: TypeAlias = npt.NDArray[Any]

HUGE = 1e4
"""A constant with such numbers is a mask, not a weight."""

# Operator -> inputs that may be trained; None for any.
_TRAINED: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "Add": (0, 1),
    "Sum": tuple(range(16)),
    "Mul": (0, 1),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3, 4),
    "SkipSimplifiedLayerNormalization": (2, 3),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "BatchNormalization": (1, 2),
    "PRelu": (1,),
    "Gather": (0,),
    "BiasGelu": (1,),
    "FastGelu": (1,),
    "FusedConv": (1, 2),
    "MultiHeadAttention": (3,),
    "RNN": (1, 2, 3),
    "GRU": (1, 2, 3),
    "LSTM": (1, 2, 3),
}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32)


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """How whole numbers stand for weights.

    Attributes:
        scale: one number, or one a slice along `axis`.
        zero: zero points of the same shape.
        axis: of the slices.
        low: least whole number.
        high: greatest.
    """

    scale: Array
    zero: Array
    axis: int
    low: int
    high: int

    def along(self, rank: int) -> tuple[Array, Array]:
        """Scale and zero point in the shape in which they meet the weights."""
        if self.scale.size == 1:
            return self.scale.reshape(()), self.zero.reshape(())
        shape = [-1 if axis == self.axis % rank else 1 for axis in range(rank)]
        return self.scale.reshape(shape), self.zero.reshape(shape)

    def numbers(self, stored: Array) -> Array:
        """What whole numbers stand for."""
        scale, zero = self.along(stored.ndim)
        return np.asarray((stored.astype(np.float64) - zero) * scale)

    def stored(self, numbers: Array) -> Array:
        """The nearest whole numbers."""
        scale, zero = self.along(numbers.ndim)
        return np.asarray(np.clip(np.rint(numbers / scale) + zero, self.low, self.high))


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One initializer that is trained.

    Attributes:
        value: which.
        start: its numbers.
        mask: False where a number stays zero; None where all are free.
        grid: of whole numbers; None for a float.
    """

    value: ir.Value
    start: Array
    mask: npt.NDArray[np.bool_] | None
    grid: Grid | None

    @property
    def name(self) -> str:
        """Of the initializer."""
        return self.value.name or ""

    def store(self, numbers: Array) -> None:
        """Puts trained numbers into the model, zeros as +0.0."""
        tensor = self.value.const_value
        assert tensor is not None
        kept = numbers if self.mask is None else np.where(self.mask, numbers, 0.0)
        kept = kept + 0.0 if self.grid is None else self.grid.stored(kept)
        self.value.const_value = ir.Tensor(
            kept.astype(tensor.dtype.numpy()), tensor.dtype, name=self.name
        )


def find_weights(graph: ir.Graph) -> list[Weight]:
    """The initializers of a graph that can be trained, in its order.

    A weight is what multiplies, shifts, scales or embeds; what states bounds, scales of a grid, statistics of a batch
    or a mask stays as it is.  Zeros of matrices stay zero, wherever they come from.
    """
    found = []
    for value in graph.initializers.values():
        tensor = values.constant(value)
        if tensor is None or tensor.size < 2 or value.is_graph_output():
            continue
        if tensor.dtype in _FLOATS and _is_weight(value):
            found.append(_weight(value, tensor.numpy().astype(np.float64), None))
        elif tensor.dtype in _INTEGERS and (grid := _grid(value, tensor)) is not None:
            found.append(_weight(value, grid.numbers(tensor.numpy()), grid))
    return [
        each for each in found if np.isfinite(each.start).all() and np.abs(each.start).max() < HUGE
    ]


def _weight(value: ir.Value, start: Array, grid: Grid | None) -> Weight:
    zero = start == 0
    masked = start.ndim > 1 and bool(zero.any())
    return Weight(value, start, ~zero if masked else None, grid)


def _is_weight(value: ir.Value) -> bool:
    uses: Sequence[tuple[ir.Node, int]] = tuple(value.uses())
    return bool(uses) and all(index in _TRAINED.get(node.op_type, ()) for node, index in uses)


def _grid(value: ir.Value, tensor: ir.TensorProtocol) -> Grid | None:
    """The grid of an integer weight that one DequantizeLinear reads, with constant scales along one axis at most."""
    uses = tuple(value.uses())
    if len(uses) != 1 or uses[0][0].op_type != "DequantizeLinear" or uses[0][1] != 0:
        return None
    node = uses[0][0]
    scale = values.array(node.inputs[1])
    zero = values.array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.int64)
    if scale is None or zero is None or scale.ndim > 1:
        return None
    limits = np.iinfo(tensor.dtype.numpy())
    axis = node.attributes.get("axis")
    wide = zero.astype(np.float64)
    if wide.size == 1:
        wide = np.full(scale.shape, wide.reshape(()))
    at = 1 if axis is None else axis.as_int()
    return Grid(scale.astype(np.float64), wide, at, int(limits.min), int(limits.max))
