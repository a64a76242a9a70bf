"""What inference knows of a value: type, dimensions, and the elements of small tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir.shapes.dim import Dim, DimLike

Array: TypeAlias = np.ndarray[Any, Any]
Dims: TypeAlias = tuple[Dim, ...]

MAX_ELEMENTS = 64
"""Tensors with more elements than this are weights or tables, not shapes: their contents are not followed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """A float element known as the quotient of a dim and a positive integer.

    It stands for exact arithmetic: true in float32 while the dim is below 2**23, which every real
    dimension is, for the operations that inference follows.
    """

    number: Dim
    by: int


Element: TypeAlias = Dim | Ratio | float


class SymbolicData:
    """The elements of a small tensor: dims for integers and booleans (0 or 1), ratios or numbers for floats.

    Immutable; equal when dtype, shape and every element are.
    """

    __slots__ = ("_hash", "_static", "array", "dtype")

    def __init__(self, array: Array, dtype: ir.DataType) -> None:
        self.array = array
        self.dtype = dtype
        self._hash: int | None = None
        self._static: bool | None = None

    @staticmethod
    def of(elements: Iterable[DimLike | Ratio | float], dtype: ir.DataType) -> SymbolicData:
        """The data of a one-dimensional tensor."""
        held = [Dim.of(e) if isinstance(e, int) else e for e in elements]
        return SymbolicData(object_array(held, (len(held),)), dtype)

    @staticmethod
    def of_array(array: Array, dtype: ir.DataType) -> SymbolicData:
        """The data of an array of numbers, or of an object array of elements (integers allowed)."""
        integral = dtype in INTEGRAL
        flat = array.reshape(-1).tolist()
        held = [
            e if isinstance(e, Dim | Ratio) else Dim.of(int(e)) if integral else float(e)
            for e in flat
        ]
        return SymbolicData(object_array(held, array.shape), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.array.shape)

    @property
    def elements(self) -> tuple[Element, ...]:
        """The elements in row-major order."""
        return tuple(self.array.reshape(-1).tolist())

    @property
    def dims(self) -> Dims | None:
        """The elements as dims, or None for floats."""
        held = self.elements
        return held if all(isinstance(e, Dim) for e in held) else None  # type: ignore[return-value]

    @property
    def is_static(self) -> bool:
        """Whether every element is a known number."""
        if self._static is None:
            self._static = all(
                e.is_static if isinstance(e, Dim) else isinstance(e, float) for e in self.elements
            )
        return self._static

    def static(self) -> Array | None:
        """The elements as an array of the tensor's dtype, or None where one is not a known number."""
        if not self.is_static:
            return None
        numbers = [int(e) if isinstance(e, Dim) else e for e in self.elements]
        return np.array(numbers, dtype=self.dtype.numpy()).reshape(self.shape)

    def item(self) -> Element | None:
        """The only element, or None where there are several."""
        return self.elements[0] if self.array.size == 1 else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SymbolicData):
            return NotImplemented
        if self is other:
            return True
        same = self.dtype == other.dtype and self.shape == other.shape
        return same and self.elements == other.elements

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.dtype, self.shape, self.elements))
        return self._hash

    def __repr__(self) -> str:
        return f"SymbolicData({self.array.tolist()}, {self.dtype.name})"


class Facts(NamedTuple):
    """What is known of one value; None where it is not.

    Attributes:
        type: tensor, sequence or optional type with its element type.
        dims: the dimensions; of a sequence or optional, those that all its tensors have.
        data: the elements of a small tensor.
    """

    type: ir.TypeProtocol | None = None
    dims: Dims | None = None
    data: SymbolicData | None = None

    @property
    def dtype(self) -> ir.DataType | None:
        """The element type, or None."""
        return None if self.type is None else self.type.dtype

    @property
    def is_tensor(self) -> bool:
        """Whether the value is known to be a dense tensor."""
        return isinstance(self.type, ir.TensorType)


UNKNOWN = Facts()


def tensor(
    dtype: ir.DataType | None, dims: Iterable[DimLike] | None, data: SymbolicData | None = None
) -> Facts:
    """The facts of a dense tensor."""
    shape = None if dims is None else tuple(map(Dim.of, dims))
    return Facts(None if dtype is None else tensor_type(dtype), shape, data)


def of_data(data: SymbolicData) -> Facts:
    """The facts of a tensor whose elements are known."""
    return Facts(tensor_type(data.dtype), tuple(map(Dim.of, data.shape)), data)


@functools.lru_cache(maxsize=64)
def tensor_type(dtype: ir.DataType) -> ir.TensorType:
    """The type of a dense tensor; one object per dtype, for comparison only (types are mutable)."""
    return ir.TensorType(dtype)


def of_tensor(held: ir.TensorProtocol) -> Facts:
    """The facts of a constant; the elements only of a small one."""
    dims = tuple(Dim.of(size) for size in held.shape.numpy())
    return Facts(tensor_type(held.dtype), dims, _small_data(held))


def _small_data(held: ir.TensorProtocol) -> SymbolicData | None:
    """The elements of a constant that may matter to a shape, or None."""
    if held.size > MAX_ELEMENTS or held.dtype not in FOLLOWED:
        return None
    return SymbolicData.of_array(held.numpy(), held.dtype)


def object_array(elements: list[Any], shape: tuple[int, ...]) -> Array:
    """An object array of elements."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


INTEGRAL = frozenset({dtype for dtype in ir.DataType if dtype.is_integer()} | {ir.DataType.BOOL})
"""The element types whose elements are dims."""

FOLLOWED = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
    }
)
"""The element types that shape arithmetic is written in."""
