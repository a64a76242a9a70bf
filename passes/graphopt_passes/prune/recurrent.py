"""The weights of recurrent operators as layers: what multiplies the input, and what multiplies the hidden state."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.build import Names
from graphopt_passes.prune.layers import FLOATS, Array, Layer, Wide, Window, why_dense

RECURRENT = ("GRU", "LSTM", "RNN")


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrent(Layer):
    """A weight of a GRU, an LSTM or an RNN: W [directions, gates * hidden, inputs] or R, its last axis hidden states.

    All directions read the same input, each its own hidden states.  Those are taken to be what the operator returns:
    of a GRU, `linear_before_reset` decides whether the candidate's gate reads just them, or less of them.
    """

    hidden: bool = False
    """Whether this is R."""

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The weight without an axis of directions: that of a matrix product, or of a convolution in groups."""
        held = super().tensor
        _, _, columns = held.shape.numpy()
        ends = (columns, 1) if self.hidden else (columns,)
        return ir.Tensor(held.numpy().reshape(-1, *ends), held.dtype, name=held.name)

    def stored(self, matrix: Wide) -> Array:
        """A matrix in the form of the stored weight."""
        return super().stored(matrix).reshape(super().tensor.shape.numpy())

    @property
    def partner(self) -> ir.Value | None:
        """None: what a gate makes is no summand."""
        return None

    @property
    def is_hidden(self) -> bool:
        """Whether it multiplies what its own node has made before."""
        return self.hidden

    def seen(self, array: Array) -> Array:
        """Hidden states [time, directions, batch, hidden] as [N, directions * hidden, 1]; inputs as they are."""
        if not self.hidden:
            return array
        time, directions, batch, size = array.shape
        return np.moveaxis(array, 1, 2).reshape(time * batch, directions * size, 1)


def find_recurrent(graph: ir.Graph, dense: str = "") -> list[Layer]:
    """The weights of the recurrent operators of a graph; those that shall stay dense say why.

    Source: GRU, LSTM and RNN from opset 7 on, batches on the second axis (layout 0).

    Args:
        graph: sorted.
        dense: names of weights that the user wants dense, as a regular expression.
    """
    found: list[Layer] = []
    for node in graph:
        if node.op_type not in RECURRENT or node.domain or len(node.inputs) < 3:
            continue
        if int(operators.attribute(node, "layout", 0)):
            continue
        for hidden in (False, True):
            layer = _recurrent(node, hidden=hidden)
            if layer is not None:
                found.append(_told(layer, dense))
    return found


def _recurrent(node: ir.Node, *, hidden: bool) -> Recurrent | None:
    weight = node.inputs[2 if hidden else 1]
    source = node.outputs[0] if hidden else node.inputs[0]
    tensor = values.constant(weight)
    if weight is None or source is None or tensor is None or not weight.is_initializer():
        return None
    if tensor.dtype not in FLOATS or not tensor.size or values.is_constant(source):
        return None
    directions = tensor.shape.numpy()[0]
    window = Window((1,), (1,), (1,), (0, 0), "NOTSET", directions) if hidden else None
    return Recurrent(node, source, weight, None, window, False, hidden=hidden)


def _told(layer: Layer, dense: str) -> Layer:
    """The layer, with the reason why it stays dense."""
    reason, bound = why_dense(layer, dense)
    return dataclasses.replace(layer, dense=reason, is_bound=bound)


@contextlib.contextmanager
def hidden_states(model: ir.Model) -> Iterator[None]:
    """Has recurrent operators return all hidden states meanwhile, where they return the last alone.

    What multiplies hidden states is fitted to them.
    """
    names = Names.of(model)
    named = [
        node.outputs[0]
        for node in model.graph
        if node.op_type in RECURRENT and not node.domain and not node.outputs[0].name
    ]
    before = [(value, value.name, value.type) for value in named]
    for value in named:
        node = value.producer()
        assert node is not None
        value.name = names.fresh(f"{node.name or node.op_type}_hidden")
        source = node.inputs[0]
        value.type = None if source is None else source.type
    try:
        yield
    finally:
        for value, name, kind in before:
            value.name, value.type = name, kind
