"""Filling up of channels with zeros, to the number that a runtime's blocked layout wants.

    Before:  h = Relu(Conv(x, W1 [30, C, 3, 3]))   y = Conv(h, W2 [M, 30, 3, 3])
    After:   h = Relu(Conv(x, W1 [32, C, 3, 3]))   y = Conv(h, W2 [M, 32, 3, 3])

Changes numerics: reordered; zeros are added to each sum, by another kernel.  An infinite x times a zero weight is NaN,
which a further product then spreads: where the original overflows, more of the result is NaN.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt.targets import Channels
from graphopt_passes.constants import refuse_tied

REACH = 4
"""How many operators may lie between two convolutions."""

CHANNELWISE = frozenset(
    {
        "AveragePool",
        "Clip",
        "Elu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "MaxPool",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Tanh",
    }
)
"""Operators that keep channels apart, and make of a channel of zeros one of finite numbers."""

x, w = Var(), Var(const=True)
conv = Op("Conv", x, w, ...)


def filled_up(channels: int, wanted: Channels) -> int:
    """How many channels `channels` are filled up to; as many as they are where that does not pay."""
    full = math.ceil(channels / wanted.multiple) * wanted.multiple
    blocks = math.ceil(channels / wanted.block) * wanted.block
    pays = channels > wanted.block and blocks <= wanted.most * channels
    return full if pays else channels


@rule(conv)
def fill_channels(m: Match, g: Builder) -> ir.Value | None:
    """`Conv(f(Conv(x, W1, b1)), W2)` -> the same with channels of zeros between them, to a multiple of 4.

    f: activations and pools that keep channels apart, each used once.  W1 [C, A, h, w] gets rows, W2 [M, C, k, l] gets
    columns of zeros, and C > 16 is such that blocks of 16 are nearly full.  Not with groups, not for other types than
    float32, whose kernels have no blocked layout, and not for a second convolution that does too little (1x1 filters,
    few channels) to make up for the way into the layout and out of it.

    Source: Conv-1, -11, -22; ONNX Runtime 1.31 nchwc_transformer.cc takes a convolution into the blocked layout only
    where its input has a multiple of 4 channels.
    """
    wanted, weight = m.facts.target.channels, values.constant(m[w])
    if wanted is None or weight is None or weight.dtype != ir.DataType.FLOAT:
        return None
    if len(weight.shape) != 4 or m.attr(conv, "group", 1) != 1:
        return None
    outputs, channels, *window = weight.shape.numpy()
    if outputs < wanted.outputs or math.prod(window) < wanted.window:
        return None
    more = filled_up(channels, wanted) - channels
    path = _path(m[x]) if more else None
    if path is None or m.attr(path[-1], "group", 1) != 1:
        return None
    _refuse_other_uses(path, m[conv])
    value = _widened(g, path[-1], more)
    for node in reversed(path[:-1]):
        value = g.op(node.op_type, value, *node.inputs[1:], like=node)
    refuse_tied(m[w])
    columns = np.pad(m.array(w), ((0, 0), (0, more), (0, 0), (0, 0)))
    return g.op("Conv", value, g.const(columns, name="weight"), *m[conv].inputs[2:], like=m[conv])


def _path(value: ir.Value) -> list[ir.Node] | None:
    """The nodes from what makes `value` up to a convolution, which is the last; None where none is in reach."""
    path: list[ir.Node] = []
    node = value.producer()
    while node is not None and not node.domain and len(path) <= REACH:
        path.append(node)
        if node.op_type == "Conv":
            return path
        if node.op_type not in CHANNELWISE or len(node.outputs) > 1 or node.inputs[0] is None:
            return None
        node = node.inputs[0].producer()
    return None


def _refuse_other_uses(path: list[ir.Node], root: ir.Node) -> None:
    """Every value on the way must go to the next node alone, in one graph.

    Raises:
        Skip: one has other uses.
    """
    for node in path:
        value = node.outputs[0]
        if value.is_graph_output() or len(value.uses()) != 1 or node.graph is not root.graph:
            raise Skip(
                f"value {value.name!r}, whose channels would be filled up, has other uses", node
            )


def _widened(g: Builder, node: ir.Node, more: int) -> ir.Value:
    """A convolution with `more` output channels, of zeros.

    Raises:
        Skip: its weight or bias is computed, of another type, or used elsewhere.
    """
    source, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    held, shift = values.array(weight), values.array(bias)
    if held is None or weight is None or (bias is not None and shift is None):
        raise Skip("the convolution before has a computed weight or bias", node)
    refuse_tied(weight)
    rows = g.const(np.pad(held, ((0, more), (0, 0), (0, 0), (0, 0))), name="weight")
    rest = [] if shift is None else [g.const(np.pad(shift, (0, more)), name="bias")]
    return g.op("Conv", source, rows, *rest, like=node)


RULES: tuple[Rule, ...] = (fill_channels,)
