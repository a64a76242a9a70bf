"""What emission reads of products: weights with a row an output channel, and biases that stand behind them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values


def shape_of(node: ir.Node) -> tuple[int, ...]:
    """The sizes of the weight."""
    weight = values.constant(node.inputs[1])
    assert weight is not None
    return tuple(weight.shape.numpy())


def rows_of(node: ir.Node) -> tuple[np.ndarray, int, int]:
    """The weight with one row an output channel, the axis of the channels, and how many there are."""
    array = values.array(node.inputs[1])
    assert array is not None
    if node.op_type == "Conv":
        return array.reshape(array.shape[0], -1), 0, array.shape[0]
    if node.op_type == "Gemm" and operators.attribute(node, "transB", 0):
        return array, 0, array.shape[0]
    return array.T, 1, array.shape[1]


def unrows(codes: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes of `rows_of` in the layout of the weight, whose channels lie on `axis`."""
    return codes.reshape(shape) if axis == 0 else np.ascontiguousarray(codes.T)


def bias_behind(node: ir.Node, size: int) -> tuple[ir.Node, int, np.ndarray] | None:
    """What adds a constant vector to the output of a MatMul, and nothing else reads it: node, operand, vector."""
    output = node.outputs[0]
    uses = tuple(output.uses())
    if output.is_graph_output() or len(uses) != 1 or uses[0].node.graph is not node.graph:
        return None
    user, index = uses[0].node, uses[0].idx
    if (user.domain, user.op_type) == ("", "Add"):
        bias = 1 - index
    elif user.domain == "com.microsoft" and user.op_type in BIASES and index == 0:
        bias = BIASES[user.op_type]
    else:
        return None
    array = values.array(user.inputs[bias]) if len(user.inputs) > bias else None
    if array is None or array.shape != (size,):
        return None
    return user, bias, array.astype(np.float64)


BIASES = {"BiasGelu": 1, "FastGelu": 1, "SkipLayerNormalization": 4}
"""Fused operators that add a vector to their first input: which operand it is."""
