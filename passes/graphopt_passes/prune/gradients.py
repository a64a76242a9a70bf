"""Gradients of a model's outputs with respect to its values, node by node from the back.  NumPy only.

The forward run is ONNX Runtime's; each rule takes what a node read and made, and the gradients of what it made.  What a
rule returns is as long as the inputs of its node: None for what gets no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators
from graphopt_passes.prune.layers import Array

Grads: TypeAlias = "list[Array | None]"


@dataclasses.dataclass(frozen=True)
class Call:
    """One node as it ran.

    Attributes:
        node: which.
        inputs: arrays; None where an optional input is absent.
        outputs: arrays; None where nobody reads the output.
        grads: of the outputs; None where nothing depends on one.
    """

    node: ir.Node
    inputs: Sequence[Array | None]
    outputs: Sequence[Array | None]
    grads: Sequence[Array | None]

    @property
    def grad(self) -> Array:
        """Of the first output."""
        assert self.grads[0] is not None
        return self.grads[0]

    @property
    def made(self) -> Array:
        """The first output."""
        assert self.outputs[0] is not None
        return self.outputs[0]

    def read(self, index: int) -> Array:
        """An input that is there."""
        found = self.inputs[index]
        assert found is not None
        return found

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def attribute(self, name: str, default: Any) -> Any:  # noqa: ANN401  as the attribute is
        """The value of an attribute."""
        return operators.attribute(self.node, name, default)

    def first(self, grad: Array) -> Grads:
        """A gradient for the first input alone."""
        return [grad, *[None] * (len(self.inputs) - 1)]


Rule: TypeAlias = Callable[[Call], Grads]


def key(node: ir.Node) -> str:
    """The name of an operator among the rules."""
    return f"{node.domain}:{node.op_type}" if node.domain else node.op_type


def backward(
    nodes: Sequence[ir.Node],
    values: Mapping[str, Array],
    wanted: Mapping[str, Array],
    rules: Mapping[str, Rule],
) -> dict[str, Array]:
    """The gradients of a sum over outputs, by name of value.

    Args:
        nodes: those through which gradients run, in the order of the graph.
        values: what they read and made.
        wanted: the gradients of the outputs.
        rules: by operator.
    """
    found = {name: np.asarray(grad) for name, grad in wanted.items()}
    for node in reversed(nodes):
        grads = [found.get(v.name or "") for v in node.outputs]
        if all(grad is None for grad in grads):
            continue
        inputs = [None if v is None else values.get(v.name or "") for v in node.inputs]
        outputs = [values.get(v.name or "") for v in node.outputs]
        given = rules[key(node)](Call(node, inputs, outputs, grads))
        for value, grad in zip(node.inputs, given, strict=True):
            if value is not None and grad is not None and value.name:
                before = found.get(value.name)
                found[value.name] = grad if before is None else before + grad
    return found


def reduced(grad: Array, shape: Sequence[int]) -> Array:
    """The gradient of what was broadcast: summed over the axes along which it was repeated."""
    extra = grad.ndim - len(shape)
    axes = [*range(extra)]
    axes += [extra + i for i, n in enumerate(shape) if n == 1 and grad.shape[extra + i] != 1]
    return np.asarray(grad.sum(tuple(axes), keepdims=True) if axes else grad).reshape(shape)
