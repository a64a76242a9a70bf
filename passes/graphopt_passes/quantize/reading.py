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


def is_turned(node: ir.Node) -> bool:
    """Whether the weight of a matrix product stands with a row an output channel."""
    turns = node.op_type in ("Gemm", "FusedMatMul")
    return turns and bool(operators.attribute(node, "transB", 0))


def columns_of(node: ir.Node) -> int:
    """Output channels of a matrix product."""
    return shape_of(node)[0 if is_turned(node) else 1]


def bias_of(node: ir.Node) -> np.ndarray | None:
    """What a product adds to each channel, in float64; None where that is nothing, or no constant vector."""
    array = values.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if array is None or addend_of(node) is not None:
        return None
    beta = operators.attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    return array.reshape(-1).astype(np.float64) * beta


def addend_of(node: ir.Node) -> ir.Value | None:
    """What a Gemm adds that no integer kernel takes for a bias: it is computed, or not one number a channel."""
    value = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    tensor = None if value is None else values.constant(value)
    if tensor is None or tensor.size != columns_of(node):
        return value
    along = tuple(tensor.shape.numpy())[-1:]  # a column of as many numbers is none a channel
    return None if along in ((), (tensor.size,)) else value


def rows_of(node: ir.Node) -> tuple[np.ndarray, int, int]:
    """The weight times alpha with one row an output channel, the axis of the channels, and how many there are.

    The axis is that of the weight as a MatMul, Gemm or Conv is written, which a FusedMatMul becomes.
    """
    array = values.array(node.inputs[1])
    assert array is not None
    if node.op_type == "Conv":
        return array.reshape(array.shape[0], -1), 0, array.shape[0]
    alpha = operators.attribute(node, "alpha", 1.0) if node.op_type != "MatMul" else 1.0
    rows = array if is_turned(node) else array.T
    rows = rows if alpha == 1 else (rows * np.float64(alpha)).astype(array.dtype)
    return rows, 0 if node.op_type == "Gemm" and is_turned(node) else 1, rows.shape[0]


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
