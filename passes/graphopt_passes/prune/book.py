"""Labels of indices and which of them are the same: union-find while the operators of a graph say what they know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.shapes import Shapes
from graphopt_passes.prune.factors import Unknown

Ids: TypeAlias = npt.NDArray[np.int64]
Axes: TypeAlias = "list[Ids | None]"
"""The labels of a value by axis; None for an axis of extent 1 or of unknown extent, which is never cut."""


class Book:
    """Labels of all values so far, which of them are one class, and which classes stay.

    Attributes:
        shapes: of the model.
        axes: labels of each value.
        frozen: labels of which the classes stay whole.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.axes: dict[ir.Value, Axes] = {}
        self.frozen: list[Ids] = []
        self._parents: list[int] = []
        self._icy: set[int] = set()

    def roots(self) -> Ids:
        """The class of each label."""
        return np.array([self.find(label) for label in range(len(self._parents))], np.int64)

    def new(self, count: int) -> Ids:
        """Fresh labels."""
        begin = len(self._parents)
        self._parents.extend(range(begin, begin + count))
        return np.arange(begin, begin + count)

    def dims(self, value: ir.Value) -> list[int | None]:
        """The extents of a value, None where one is open."""
        tensor = values.constant(value)
        if tensor is not None:
            return list(tensor.shape.numpy())
        dims = self.shapes.dims(value)
        if dims is None:
            raise Unknown
        return [dim.value for dim in dims]

    def fresh(self, value: ir.Value) -> Axes:
        """New labels for all axes of a value."""
        try:
            dims = self.dims(value)
        except Unknown:
            dims = []
        axes: Axes = [self.new(dim) if dim is not None and dim > 1 else None for dim in dims]
        self.axes[value] = axes
        return axes

    def of(self, value: ir.Value) -> Axes:
        """The labels of a value, new ones where it has none."""
        known = self.axes.get(value)
        return self.fresh(value) if known is None else known

    def input(self, node: ir.Node, index: int) -> Axes:
        """The labels of an input.

        Raises:
            Unknown: there is no such input, or nothing is known of how many axes it has.
        """
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            raise Unknown
        axes = self.of(value)
        if not axes:
            self.dims(value)
        return axes

    def find(self, label: int) -> int:
        """The root of a label."""
        root = label
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[label] != root:
            self._parents[label], label = root, self._parents[label]
        return root

    def unify(self, one: Ids | None, other: Ids | None) -> None:
        """Makes the labels of two axes the same, index by index; what cannot be matched is frozen."""
        if one is None or other is None or len(one) != len(other):
            self.freeze([one, other])
            return
        for mine, theirs in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self.find(mine), self.find(theirs)
            if a != b:
                self._parents[max(a, b)] = min(a, b)

    def freeze(self, axes: Iterable[Ids | None]) -> None:
        """Keeps the classes of some axes whole."""
        for ids in axes:
            if ids is not None:
                self.frozen.append(ids)
                self._icy.update(ids.tolist())

    def is_icy(self, ids: Ids) -> bool:
        """Whether labels are known by now to be frozen, one by one."""
        return all(label in self._icy for label in ids.tolist())

    def joined(self, several: Sequence[Axes], rank: int) -> Axes:
        """The labels of a broadcast: axes from the right, equal extents unified."""
        out: Axes = [None] * rank
        for axes in several:
            self.align(axes, out)
        return out

    def align(self, axes: Axes, out: Axes) -> None:
        """Unifies axes with those of a broadcast, from the right."""
        for back in range(1, len(axes) + 1):
            ids = axes[-back]
            if ids is None:
                continue
            if out[-back] is None:
                out[-back] = ids
            else:
                self.unify(out[-back], ids)
