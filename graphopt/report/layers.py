"""The plan of a result layer by layer: in which numbers each product is computed, and how its weights are kept."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.ir import operators, scopes, values

_PRODUCTS = frozenset(
    (
        "Attention",
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "DynamicQuantizeMatMul",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "GRU",
        "Gemm",
        "LSTM",
        "MatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "NhwcFusedConv",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "RNN",
    )
)
_INTEGERS = frozenset(name for name in _PRODUCTS if "Q" in name or "Integer" in name)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One product of the result.

    Attributes:
        name: the value that it computes.
        operator: its operator.
        arithmetic: what is multiplied, in words: float32, float16, int8 x int8, float32 x int4.
        weight: dtype and shape of its weight as stored; "" without one.
        scales: of a quantised weight: one, or one a channel or block; "" for none.
        bytes: of the weight as stored.
    """

    name: str
    operator: str
    arithmetic: str
    weight: str
    scales: str
    bytes: int


def layers(model: ir.Model) -> tuple[Layer, ...]:
    """Every convolution, matrix product, attention and recurrent cell, in the order of the file."""
    return tuple(
        _layer(node)
        for scope in scopes.all_graphs(model)
        for node in scope.graph
        if node.op_type in _PRODUCTS and node.domain in ("", operators.MICROSOFT)
    )


def _layer(node: ir.Node) -> Layer:
    inputs = [value for value in node.inputs if value is not None]
    held = [(value, _stored(value)) for value in inputs[:4]]
    weights = [(value, tensor) for value, tensor in held if tensor is not None and tensor.size > 1]
    value, tensor = max(weights, key=lambda pair: pair[1].size, default=(None, None))
    activation = next((v for v in inputs[:2] if v is not value), None)
    name = node.outputs[0].name or ""
    if tensor is None or value is None:
        return Layer(name, node.op_type, _product(node, _kind(activation), ""), "", "", 0)
    stored = tensor.dtype.name.lower()
    scales = _scales(value, node)
    size = values.size_bytes(tensor)
    shown = f"{stored}[{','.join(str(dim) for dim in tensor.shape)}]"
    right = stored if scales else _kind(value)
    return Layer(name, node.op_type, _product(node, _kind(activation), right), shown, scales, size)


def _stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The constant behind a value, seen through its dequantisation."""
    tensor = values.constant(value)
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "DequantizeLinear":
        return values.constant(producer.inputs[0])
    return tensor


def _kind(value: ir.Value | None) -> str:
    """The dtype that a value is computed in: of the codes, where it was just dequantised."""
    if value is None:
        return ""
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        codes = producer.inputs[0]
        held = values.constant(codes)
        dtype = held.dtype if held is not None else None if codes is None else codes.dtype
        return "int8" if dtype is None else dtype.name.lower()
    tensor = values.constant(value)
    dtype = tensor.dtype if tensor is not None else value.dtype
    return "" if dtype is None else dtype.name.lower()


def _product(node: ir.Node, left: str, right: str) -> str:
    if node.op_type in _INTEGERS and left.startswith("float"):
        left = "int8"  # quantised on the way in
    if not left or not right or left == right:
        return left or right
    return f"{left} x {right}"


def _scales(value: ir.Value, node: ir.Node) -> str:
    producer = value.producer()
    if node.op_type == "MatMulNBits":
        return f"one a block of {operators.attribute(node, 'block_size', 0)}"
    if producer is not None and producer.op_type == "DequantizeLinear":
        scale = values.constant(producer.inputs[1])
    elif node.op_type in _INTEGERS:
        place = list(node.inputs).index(value) + 1
        scale = values.constant(node.inputs[place]) if place < len(node.inputs) else None
    else:
        return ""
    if scale is None:
        return "computed"
    block = operators.attribute(producer, "block_size", 0) if producer is not None else 0
    if block:
        return f"one a block of {block}"
    return "one" if scale.size == 1 else f"{scale.size}, one a channel"
