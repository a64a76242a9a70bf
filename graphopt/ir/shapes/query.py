"""What a shape rule may ask about its node, and the type of the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import onnx_ir as ir

from graphopt.ir import kernels
from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim
from graphopt.ir.shapes.facts import UNKNOWN, Array, Dims, Facts, SymbolicData

T = TypeVar("T")


class Query(NamedTuple):
    """A node with the facts of its inputs.

    Attributes:
        operation: the node, its opset and the values of function parameters.
        inputs: the facts of each input; None where the input is absent.
        fresh: gives the symbol that stands for the size of an axis of an output, the same each
        time.
    """

    operation: kernels.Operation
    inputs: tuple[Facts | None, ...]
    fresh: Callable[[int, int], Dim]

    @property
    def node(self) -> ir.Node:
        """The node itself."""
        return self.operation.node

    @property
    def version(self) -> int:
        """The opset at which the node's domain is imported."""
        return self.operation.version

    def has(self, index: int) -> bool:
        """Whether an input is present."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def facts(self, index: int) -> Facts:
        """The facts of an input; nothing where it is absent."""
        return (self.inputs[index] if index < len(self.inputs) else None) or UNKNOWN

    def dims(self, index: int) -> Dims | None:
        """The dimensions of an input, or None."""
        return self.facts(index).dims

    def dtype(self, index: int) -> ir.DataType | None:
        """The element type of an input, or None."""
        return self.facts(index).dtype

    def data(self, index: int) -> SymbolicData | None:
        """The elements of a small input, or None."""
        return self.facts(index).data

    def elements(self, index: int) -> Dims | None:
        """The elements of a small integer input as dims, or None."""
        data = self.facts(index).data
        return None if data is None else data.dims

    def static(self, index: int) -> Array | None:
        """The elements of an input that is known entirely, or None."""
        data = self.facts(index).data
        return None if data is None else data.static()

    def ints(self, index: int) -> tuple[int, ...] | None:
        """The elements of an integer input that is known entirely, or None."""
        array = self.static(index)
        return None if array is None else tuple(int(e) for e in array.reshape(-1))

    def attr(self, name: str, default: T) -> T:
        """The value of an attribute, or the default."""
        return self.operation.attr(name, default)

    def axis(self, name: str, default: int, rank: int) -> int:
        """An axis attribute as an index that is not negative.

        Raises:
            ValueError: the axis lies outside the rank.
        """
        return normalised(self.operation.attr(name, default), rank)

    def unknown_dims(self, rank: int, output: int = 0) -> Dims:
        """Dimensions of which only the rank is known."""
        return tuple(self.fresh(output, axis) for axis in range(rank))

    def same(self, index: int = 0, dtype: ir.DataType | None = None) -> Facts:
        """The facts of a tensor with the dimensions of an input, and its type or another."""
        given = self.facts(index)
        return facts.tensor(dtype or given.dtype, given.dims)


def normalised(axis: int, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        ValueError: the axis lies outside the rank.
    """
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} lies outside a tensor of rank {rank}")
    return axis + rank if axis < 0 else axis


def axes_given(query: Query, since: int) -> tuple[bool, tuple[int, ...] | None]:
    """Whether the axes are known, and the axes (None where the node gives none).

    They are an attribute before opset `since`, and input 1 from it on.
    """
    if query.version < since:
        held = query.operation.held("axes")
        return True, None if held is None else held.as_ints()
    if not query.has(1):
        return True, None
    found = query.ints(1)
    return found is not None, found


Rule: TypeAlias = Callable[[Query], Sequence[Facts] | None]
Rules: TypeAlias = Mapping[str, Rule]
