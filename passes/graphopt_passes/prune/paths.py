"""What lies between the layer that makes a channel and the layer that reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt_passes.prune.channels import column_axis, row_axis
from graphopt_passes.prune.labels import Labels
from graphopt_passes.prune.layers import Layer, Wide

_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "Identity", "Dropout", "Abs"})
_PLACES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
_POOLS = frozenset({"MaxPool", "GlobalMaxPool", "GlobalAveragePool"})


@dataclasses.dataclass(frozen=True)
class Path:
    """The nodes from a layer to another, each with one input that is no constant, in order.

    Attributes:
        nodes: only those that the module knows.
    """

    nodes: tuple[ir.Node, ...]

    @property
    def is_homogeneous(self) -> bool:
        """Whether f(a x) = a f(x) for a > 0 all along."""
        return all(node.op_type in _HOMOGENEOUS | _PLACES | _POOLS for node in self.nodes)

    def levels(self, start: Wide) -> Wide | None:
        """What constant channels become on the way; None where a node is not known to keep them constant."""
        level = start
        for node in self.nodes:
            if node.op_type in _PLACES | _POOLS:
                continue
            made = _level(node, level)
            if made is None:
                return None
            level = made
        return level


def _level(node: ir.Node, level: Wide) -> Wide | None:
    if node.op_type in ("Identity", "Dropout"):
        return level
    if node.op_type == "Relu":
        return np.maximum(level, 0)
    if node.op_type == "Abs":
        return np.abs(level)
    if node.op_type == "LeakyRelu":
        attribute = node.attributes.get("alpha")
        alpha = 0.01 if attribute is None else attribute.as_float()
        return np.where(level < 0, alpha * level, level)
    if not level.any() and node.op_type in _ZERO_STAYS:
        return level
    return None


_ZERO_STAYS = frozenset(
    {"Gelu", "FastGelu", "QuickGelu", "Erf", "Tanh", "Neg", "Sin", "HardSwish", "Swish", "Mish"}
)


def path_to(maker: Layer, reader: Layer) -> Path | None:
    """The one way from a layer to another; None where there are others, or nodes that are not known."""
    nodes: list[ir.Node] = []
    value: ir.Value | None = reader.source
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node is maker.node:
            return Path(tuple(reversed(nodes)))
        source = _through(node, maker)
        if source is None:
            return None
        if not _is_bias(node, maker):
            nodes.append(node)
        value = source
    return None


def _through(node: ir.Node, maker: Layer) -> ir.Value | None:
    """The one input of a known node that is no constant."""
    if node.domain not in ("", "com.microsoft"):
        return None
    if _is_bias(node, maker):
        return next(v for v in node.inputs if v is not None and v is not maker.bias)
    if node.op_type not in _HOMOGENEOUS | _PLACES | _POOLS | _ZERO_STAYS:
        return None
    rest = [value for value in node.inputs[1:] if value is not None]
    return node.inputs[0] if all(values.is_constant(value) for value in rest) else None


def _is_bias(node: ir.Node, maker: Layer) -> bool:
    """Whether a node adds the bias of the layer, which counts as part of it."""
    return node.op_type == "Add" and maker.bias is not None and maker.bias in node.inputs


def contracted(graph: ir.Graph, labels: Labels) -> frozenset[int]:
    """Classes over which two activations are multiplied and summed: a weight does not tell whether they are read."""
    found: set[int] = set()
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or any(
            values.is_constant(v) for v in node.inputs[:2]
        ):
            continue
        for value in node.inputs[:2]:
            for axis in (-1, -2):
                found.update(_classes(labels, value, axis))
    return frozenset(found)


def _classes(labels: Labels, value: ir.Value | None, axis: int) -> Sequence[int]:
    axes = None if value is None else labels.axes.get(value)
    if value is None or axes is None or len(axes) < -axis:
        return ()
    found = labels.classes(value, axis)
    return () if found is None else found.tolist()


def tables(layers: Sequence[Layer], labels: Labels) -> frozenset[int]:
    """Classes along an axis of a constant that is neither the matrix of a layer nor one number a channel.

    What such a constant does with a channel is not known here: a transposed convolution, a table of embeddings.
    """
    known = {layer.weight: {row_axis(layer), column_axis(layer)} for layer in layers}
    found: set[int] = set()
    for value, axes in labels.axes.items():
        tensor = values.constant(value)
        if tensor is None or value in known or sum(d > 1 for d in tensor.shape.numpy()) < 2:
            continue
        for axis in range(len(axes)):
            found.update(_classes(labels, value, axis))
    return frozenset(found)
