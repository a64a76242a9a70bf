"""A normal form of ModelProto: two models have the same one exactly when they say the same."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import numpy_helper

_MAPS = ("StringStringEntryProto", "OperatorSetIdProto", "ValueInfoProto", "TensorAnnotation")
_OPTIONAL = (
    "data_location",
    "doc_string",
    "name",
    "domain",
    "overload",
    "producer_name",
    "producer_version",
    "model_version",
    "denotation",
)
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_KINDS = {"f": 1, "i": 2, "s": 3, "t": 4, "g": 5, "floats": 6, "ints": 7, "strings": 8}


def normalized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Dense data as raw_data, maps and nodes sorted, defaults and repetitions left out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _message(copy)
    return copy


def _message(message: Any) -> None:
    _before(message)
    for field, value in message.ListFields():
        if field.name == "domain" and value == "ai.onnx":
            message.domain = ""
        elif field.type == field.TYPE_MESSAGE:
            for child in value if field.is_repeated else [value]:
                _message(child)
            positional = isinstance(message, onnx.GraphProto) and field.name in ("input", "output")
            if field.is_repeated and field.message_type.name in _MAPS and not positional:
                value.sort(key=_bytes)
    _after(message)


def _before(message: Any) -> None:
    if isinstance(message, onnx.TensorProto):
        _tensor(message)
    elif isinstance(message, onnx.AttributeProto) and not message.type:
        _attribute(message)
    elif isinstance(message, onnx.SparseTensorProto) and not message.HasField("indices"):
        message.indices.CopyFrom(onnx.TensorProto(data_type=7, dims=[0], raw_data=b""))


def _after(message: Any) -> None:
    if isinstance(message, onnx.ValueInfoProto) and not message.type.ListFields():
        message.ClearField("type")
    elif isinstance(message, onnx.GraphProto):
        _graph(message)
    elif isinstance(message, onnx.ModelProto):
        _opsets(message)
    for field, value in message.ListFields():
        if field.name in _OPTIONAL and not field.is_repeated and not value:
            message.ClearField(field.name)


def _graph(graph: onnx.GraphProto) -> None:
    # Names say what feeds what: the order of nodes and initializers says nothing.
    for repeated in (graph.node, graph.initializer):
        repeated.sort(key=_bytes)
    infos = {info.name: info for info in graph.value_info}
    for output in graph.output:
        if not output.HasField("type") and output.name in infos:
            output.CopyFrom(infos[output.name])
    named = {value.name for value in (*graph.input, *graph.output)}
    kept = [i for i in graph.value_info if i.name not in named and len(i.ListFields()) > 1]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _opsets(model: onnx.ModelProto) -> None:
    """Of two imports of a domain the last counts."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    del model.opset_import[:]
    for domain, version in sorted(versions.items()):
        model.opset_import.add(domain=domain, version=version)


def _attribute(attribute: onnx.AttributeProto) -> None:
    used = [_KINDS[field.name] for field, _ in attribute.ListFields() if field.name in _KINDS]
    if len(used) == 1:
        attribute.type = used[0]  # type: ignore[assignment]


def _tensor(tensor: onnx.TensorProto) -> None:
    opaque = tensor.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED)
    if opaque or tensor.HasField("raw_data") or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    raw = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
    for field in _TYPED:
        tensor.ClearField(field)
    tensor.raw_data = raw


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))
