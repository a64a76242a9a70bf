"""Small models for the tests of the edge, and what it means that one comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

from graphopt.ir.model_file import (
    load_model,
    to_proto,
)
from tests.ir.model_protos import normalized

TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { y = Relu (x) }'


def parse(
    text: str, head: str = '<ir_version: 10, opset_import: ["" : 21, "l" : 1]>'
) -> onnx.ModelProto:
    return onnx.parser.parse_model(head + text)


def round_trip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Through bytes and through the proto, which must come to the same."""
    result = to_proto(load_model(proto.SerializeToString()))
    assert to_proto(load_model(proto)) == result
    return result


def assert_kept(proto: onnx.ModelProto) -> None:
    assert normalized(round_trip(proto)) == normalized(proto)


def attribute(**fields: Any) -> onnx.AttributeProto:
    return onnx.AttributeProto(**fields)


def with_weights(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    proto.graph.initializer.extend(tensors)
    return proto


def weight(source: Any, name: str = "w") -> ir.TensorProtocol:
    tensor = load_model(source).graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def sparse(indices: np.ndarray[Any, Any] | None = None, name: str = "w") -> onnx.SparseTensorProto:
    indices = np.array([1, 2]) if indices is None else indices
    values = numpy_helper.from_array(np.arange(1, len(indices) + 1, dtype=np.float32), name)
    return onnx.SparseTensorProto(
        values=values, indices=numpy_helper.from_array(indices, f"{name}_idx"), dims=[2, 2]
    )
