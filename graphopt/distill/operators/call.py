"""One node while it is interpreted: its inputs, its attributes, and how operators are looked up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Tensor: TypeAlias = Any
"""A torch.Tensor: torch is an extra, so that its types are not known where it is absent."""

Operator: TypeAlias = "Callable[[Call], Any]"


@dataclasses.dataclass(frozen=True)
class Call:
    """What an operator is given.

    Attributes:
        inputs: one each, None where an optional one is left out.
        attributes: as Python values; tensors as NumPy arrays.
        opset: of the domain of the node.
        outputs: how many the node has.
    """

    inputs: tuple[Tensor | None, ...]
    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def at(self, index: int) -> Tensor | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.inputs[0]

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401  attributes have any type
        """An attribute, or `default`."""
        return self.attributes.get(name, default)

    def ints(self, index: int, name: str) -> list[int] | None:
        """Whole numbers that are an input from some opset on, and an attribute before; None where neither is."""
        given = self.at(index)
        if given is not None:
            return [int(each) for each in given.reshape(-1).tolist()]
        stated: Sequence[int] | None = self.attributes.get(name)
        return None if stated is None else [int(each) for each in stated]
