"""Whether a model is valid ONNX, judged by `onnx.checker` without reading its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir as ir

from graphopt.ir.model_file import skeleton_bytes


def check_model(model: ir.Model) -> str | None:
    """What `onnx.checker` (full check) says against `model`, in one line; None when it is valid.

    Large weights are shown to the checker as graph inputs of the same type: it has nothing to say about their data, and
    reading them would cost more than the whole run.
    """
    proto = onnx.ModelProto.FromString(skeleton_bytes(model))
    _present_weights(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    # ValueError: types that onnx does not know, and numbers that its C++ cannot hold.
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
    ) as fault:
        return " ".join(str(fault).split())
    return None


def _present_weights(proto: onnx.ModelProto) -> None:
    """Gives each tensor that the skeleton left out a form that the checker takes."""
    known = {info.name for info in proto.graph.input}
    for graph in _graphs(proto.graph):
        left_out = [tensor for tensor in graph.initializer if _is_left_out(tensor)]
        for tensor in left_out:
            graph.initializer.remove(tensor)
            if tensor.name not in known:  # one that a feed may override is an input already
                info = proto.graph.input.add(name=tensor.name)
                info.type.tensor_type.elem_type = tensor.data_type
                for dim in tensor.dims:
                    info.type.tensor_type.shape.dim.add(dim_value=dim)
    nodes = [node for graph in _graphs(proto.graph) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and _is_left_out(attribute.t):
                _zero(attribute.t)


def _is_left_out(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _zero(tensor: onnx.TensorProto) -> None:
    bits = ir.DataType(tensor.data_type).bitwidth
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.raw_data = bytes(math.ceil(math.prod(tensor.dims) * bits / 8))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)
