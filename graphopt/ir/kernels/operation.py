"""What a kernel sees of a node, and what kernels are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir

Array: TypeAlias = np.ndarray[Any, Any]
Inputs: TypeAlias = Sequence[Array | None]
Results: TypeAlias = Sequence[Array] | None
T = TypeVar("T")


class Operation(NamedTuple):
    """A node as its kernel sees it.

    Attributes:
        node: the node.
        version: the opset at which its domain is imported.
        bindings: what the call gives the parameters of the function that the node lies in.
    """

    node: ir.Node
    version: int
    bindings: Mapping[str, ir.Attr] = MappingProxyType({})

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


def axes_of(op: Operation, inputs: Inputs, since: int) -> tuple[int, ...] | None:
    """The axes given as attribute before an opset, as input 1 from it on; None where absent."""
    if op.version < since:
        given = op.held("axes")
        return None if given is None else given.as_ints()
    if len(inputs) < 2 or inputs[1] is None:
        return None
    return tuple(int(axis) for axis in inputs[1].reshape(-1))


def need(array: Array | None) -> Array:
    """A required input.

    Raises:
        ValueError: it is absent.
    """
    if array is None:
        raise ValueError("a required input is absent")
    return array
