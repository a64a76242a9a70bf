"""ir.Model -> the bytes of a .onnx file, as pieces: the weights are named in it, and read only when the piece is written.

A message's length stands before it, so sizes are computed first, from dims and dtypes; then everything can be streamed. Fields are in
the order of their numbers and maps are sorted: the same model gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import onnx
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir.decode import (
    FUNCTION_VALUE_INFO_IR,
    OWN_VALUE_INFO,
    QUANTIZATION,
    STRAY_ANNOTATIONS,
    STRAY_VALUE_INFO,
    TRAINING_INFO,
)
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.sparse import CooTensor
from graphopt.ir.type_proto import DECLARED, says_something, write_type, write_value_info
from graphopt.ir.wire import blob, tag, varint

Piece = bytes | ir.TensorProtocol


class Message:
    """A protobuf message in the making: serialised pieces, and tensors whose bytes follow when it is written."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces: list[Piece] = list(pieces)
        self.size = sum(map(len, pieces))

    def write(self, data: bytes) -> None:
        """Appends serialised fields."""
        self.pieces.append(data)
        self.size += len(data)

    def add(self, number: int, child: Message) -> None:
        """Appends a field that holds a message."""
        self.write(tag(number) + varint(child.size))
        self.pieces += child.pieces
        self.size += child.size

    def payload(self, number: int, tensor: ir.TensorProtocol) -> None:
        """Appends a field that holds the bytes of a tensor."""
        self.write(tag(number) + varint(tensor.nbytes))
        self.pieces.append(tensor)
        self.size += tensor.nbytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes, in order, at most one tensor in memory at a time."""
        for piece in self.pieces:
            yield from (piece,) if isinstance(piece, bytes) else tensor_chunks(piece)


def tensor_chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor in the form of `raw_data`.

    Raises:
        ModelError: they are not as many as dtype and shape say.
    """
    written = 0
    for chunk in tensor.chunks() if isinstance(tensor, MappedTensor) else (tensor.tobytes(),):
        written += len(chunk)
        yield chunk
    if written != tensor.nbytes:
        raise ModelError(
            f"tensor {tensor.name!r} of {tensor.dtype} {tensor.shape} has {written} bytes, not {tensor.nbytes}; make its "
            "data fit its shape"
        )


class Role(enum.IntEnum):
    """What a tensor is in the file, in the order in which it may move to external data: fewer tools can read the later ones there."""

    INITIALIZER = 0
    ATTRIBUTE = 1
    SPARSE_PART = 2


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the bytes of a tensor are kept outside the model."""

    file: str
    offset: int


Placement = Callable[[ir.TensorProtocol, Role], Location | None]


def inline(_tensor: ir.TensorProtocol, _role: Role) -> None:
    """The placement that keeps every tensor in the model."""


def encode_model(model: ir.Model, place: Placement = inline) -> Message:
    """The serialised ModelProto of a model, its tensors where `place` says."""
    return _Encoder(model, place).model()


class _Encoder:
    def __init__(self, model: ir.Model, place: Placement) -> None:
        self._model = model
        self._place = place

    def model(self) -> Message:
        model = self._model
        head = onnx.ModelProto(ir_version=model.ir_version)
        for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
            if getattr(model, field):
                setattr(head, field, getattr(model, field))
        tail = onnx.ModelProto()
        _opsets(tail, model.graph.opset_imports)
        _props(tail, model.metadata_props)
        for data in model.meta.get(TRAINING_INFO, ()):
            tail.training_info.append(onnx.TrainingInfoProto.FromString(data))
        message = Message(_serialized(head))
        message.add(7, self._graph(model.graph, self._function_value_info()))
        message.write(_serialized(tail))
        for function in model.functions.values():
            message.add(25, self._function(function))
        devices = [ir.serde.serialize_model_configuration(c) for c in model.device_configurations]
        for device in devices:
            message.write(blob(26, _serialized(device)))
        return message

    def _function_value_info(self) -> list[onnx.ValueInfoProto]:
        """What the main graph holds for functions of models older than the field of their own."""
        return [
            write_value_info(value, f"{function.domain}::{function.name}/{value.name}")
            for function in self._model.functions.values()
            if not self._own_value_info(function)
            for value in _function_values(function)
        ]

    def _own_value_info(self, function: ir.Function) -> bool:
        return (
            self._model.ir_version >= FUNCTION_VALUE_INFO_IR
            or OWN_VALUE_INFO in function.graph.meta
        )

    def _function(self, function: ir.Function) -> Message:
        head = onnx.FunctionProto(name=function.name)
        head.input.extend(value.name or "" for value in function.inputs)
        head.output.extend(value.name or "" for value in function.outputs)
        head.attribute.extend(a.name for a in function.attributes.values() if _undefaulted(a))
        tail = onnx.FunctionProto(domain=function.domain)
        if function.doc_string:
            tail.doc_string = function.doc_string
        if function.overload:
            tail.overload = function.overload
        _opsets(tail, function.opset_imports)
        _props(tail, function.metadata_props)
        if self._own_value_info(function):
            tail.value_info.extend(write_value_info(value) for value in _function_values(function))
            tail.value_info.extend(_stray(function.graph, STRAY_VALUE_INFO, onnx.ValueInfoProto))
        message = Message(_serialized(head))
        for node in function:
            message.add(7, self._node(node))
        message.write(_serialized(tail))
        for attribute in function.attributes.values():
            if not _undefaulted(attribute):
                message.add(11, self._attribute(attribute, attribute.name))
        return message

    def _graph(self, graph: ir.Graph, extra: Iterable[onnx.ValueInfoProto] = ()) -> Message:
        message = Message()
        for node in graph:
            message.add(1, self._node(node))
        message.write(_serialized(onnx.GraphProto(name=graph.name)) if graph.name else b"")
        tensors = [
            (v.name or "", v.const_value)
            for v in graph.initializers.values()
            if v.const_value is not None
        ]
        for name, tensor in tensors:
            if not isinstance(tensor, CooTensor):
                message.add(5, self._tensor(tensor, Role.INITIALIZER, name))
        proto = onnx.GraphProto(doc_string=graph.doc_string)
        proto.input.extend(write_value_info(value) for value in graph.inputs)
        proto.output.extend(write_value_info(value) for value in graph.outputs)
        proto.value_info.extend(write_value_info(value) for value in _described(graph))
        proto.value_info.extend(_stray(graph, STRAY_VALUE_INFO, onnx.ValueInfoProto))
        proto.value_info.extend(extra)
        _annotations(proto, graph)
        message.write(_serialized(proto))
        for name, tensor in tensors:
            if isinstance(tensor, CooTensor):
                message.add(15, self._sparse(tensor, name))
        notes = onnx.GraphProto()
        _props(notes, graph.metadata_props)
        message.write(_serialized(notes))
        return message

    def _node(self, node: ir.Node) -> Message:
        head = onnx.NodeProto(op_type=node.op_type)
        head.input.extend("" if value is None else value.name or "" for value in node.inputs)
        head.output.extend(value.name or "" for value in node.outputs)
        if node.name:
            head.name = node.name
        tail = onnx.NodeProto()
        for field in ("doc_string", "domain", "overload"):
            if getattr(node, field):
                setattr(tail, field, getattr(node, field))
        _props(tail, node.metadata_props)
        for device in node.device_configurations:
            tail.device_configurations.append(ir.serde.serialize_node_device_configuration(device))
        message = Message(_serialized(head))
        for name, attribute in node.attributes.items():
            message.add(5, self._attribute(attribute, _carrier(node, name, attribute)))
        message.write(_serialized(tail))
        return message

    def _attribute(self, attribute: ir.Attr, name: str) -> Message:
        proto = onnx.AttributeProto(name=name)
        kind, value = attribute.type, attribute.value
        parts: list[tuple[int, Message]] = []
        if attribute.is_ref():
            proto.ref_attr_name = attribute.ref_attr_name or ""
        elif value is not None and kind in _PLAIN:
            _fill(proto, kind, value)
        elif value is not None:
            kind, parts = self._composite(kind, value)
        tail = onnx.AttributeProto()
        tail.type = cast(onnx.AttributeProto.AttributeType, kind.value)
        if attribute.doc_string:
            tail.doc_string = attribute.doc_string
        message = Message(_serialized(proto))
        for number, part in parts:
            message.add(number, part)
        message.write(_serialized(tail))
        return message

    def _composite(
        self, kind: ir.AttributeType, value: Any
    ) -> tuple[ir.AttributeType, list[tuple[int, Message]]]:
        """The fields of an attribute that holds tensors or graphs, and its type in the file."""
        match kind:
            case ir.AttributeType.GRAPH:
                return kind, [(6, self._graph(value))]
            case ir.AttributeType.GRAPHS:
                return kind, [(11, self._graph(graph)) for graph in value]
            case ir.AttributeType.TENSOR | ir.AttributeType.SPARSE_TENSOR if isinstance(
                value, CooTensor
            ):
                return ir.AttributeType.SPARSE_TENSOR, [(22, self._sparse(value, value.name))]
            case ir.AttributeType.SPARSE_TENSORS:
                return kind, [(23, self._sparse(tensor, tensor.name)) for tensor in value]
            case ir.AttributeType.TENSOR:
                return kind, [(5, self._tensor(value, Role.ATTRIBUTE, value.name))]
            case _:
                return kind, [
                    (10, self._tensor(tensor, Role.ATTRIBUTE, tensor.name)) for tensor in value
                ]

    def _sparse(self, tensor: CooTensor, name: str | None) -> Message:
        message = Message()
        message.add(1, self._tensor(tensor.values, Role.SPARSE_PART, name))
        message.add(2, self._tensor(tensor.indices, Role.SPARSE_PART, tensor.indices.name))
        message.write(_serialized(onnx.SparseTensorProto(dims=_dims(tensor))))
        return message

    def _tensor(self, tensor: ir.TensorProtocol, role: Role, name: str | None) -> Message:
        head = onnx.TensorProto(dims=_dims(tensor), data_type=tensor.dtype.value)
        tail = onnx.TensorProto()
        if name:
            head.name = name
        if tensor.doc_string:
            tail.doc_string = tensor.doc_string
        _props(tail, tensor.metadata_props)
        if tensor.dtype == ir.DataType.STRING:
            head.string_data.extend(_strings(tensor))
            return Message(_serialized(head), _serialized(tail))
        if tensor.dtype == ir.DataType.UNDEFINED:
            return Message(_serialized(head), _serialized(tail))
        location = self._place(tensor, role)
        message = Message(_serialized(head))
        if location is None:
            message.payload(9, tensor)
        else:
            tail.data_location = onnx.TensorProto.EXTERNAL
            keys = {
                "location": location.file,
                "offset": str(location.offset),
                "length": str(tensor.nbytes),
            }
            for key, text in keys.items():
                tail.external_data.add(key=key, value=text)
        message.write(_serialized(tail))
        return message


_PLAIN = {
    ir.AttributeType.INT: "i",
    ir.AttributeType.FLOAT: "f",
    ir.AttributeType.STRING: "s",
    ir.AttributeType.INTS: "ints",
    ir.AttributeType.FLOATS: "floats",
    ir.AttributeType.STRINGS: "strings",
    ir.AttributeType.TYPE_PROTO: "tp",
    ir.AttributeType.TYPE_PROTOS: "type_protos",
}


def _fill(proto: onnx.AttributeProto, kind: ir.AttributeType, value: Any) -> None:
    match kind:
        case ir.AttributeType.STRING:
            proto.s = _encoded(value)
        case ir.AttributeType.STRINGS:
            proto.strings.extend(_encoded(text) for text in value)
        case ir.AttributeType.TYPE_PROTO:
            proto.tp.SetInParent()
            write_type(proto.tp, value)
        case ir.AttributeType.TYPE_PROTOS:
            for known in value:
                write_type(proto.type_protos.add(), known)
        case ir.AttributeType.INT | ir.AttributeType.FLOAT:
            setattr(proto, _PLAIN[kind], value)
        case _:
            getattr(proto, _PLAIN[kind]).extend(value)


def _encoded(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8")


def _dims(tensor: ir.TensorProtocol) -> list[int]:
    return list(tensor.shape.numpy())


def _strings(tensor: ir.TensorProtocol) -> list[bytes]:
    if isinstance(tensor, ir.StringTensor):
        return list(tensor.string_data())
    return [_encoded(text) for text in tensor.numpy().reshape(-1).tolist()]


def _carrier(node: ir.Node, name: str, attribute: ir.Attr) -> str:
    """The name of an attribute in the file: a sparse constant goes back to the attribute that ONNX has for it."""
    sparse = (
        node.op_type == "Constant" and not node.domain and isinstance(attribute.value, CooTensor)
    )
    return "sparse_value" if sparse and name == "value" else name


def _undefaulted(attribute: ir.Attr) -> bool:
    return attribute.value is None and not attribute.is_ref()


def _function_values(function: ir.Function) -> list[ir.Value]:
    values = [*function.inputs, *(output for node in function for output in node.outputs)]
    return [value for value in values if says_something(value)]


def _described(graph: ir.Graph) -> list[ir.Value]:
    """The values that get a value_info: not inputs and outputs, which have their own, nor what only repeats a tensor."""
    initializers = [
        value
        for value in graph.initializers.values()
        if not value.is_graph_input()
        and not value.is_graph_output()
        and (DECLARED in value.meta or value.doc_string or value.metadata_props)
    ]
    outputs = [output for node in graph for output in node.outputs if not output.is_graph_output()]
    return [value for value in (*initializers, *outputs) if says_something(value)]


def _values(graph: ir.Graph) -> list[ir.Value]:
    """Every value of a graph, once."""
    values = [
        *graph.inputs,
        *graph.initializers.values(),
        *(output for node in graph for output in node.outputs),
    ]
    return list(dict.fromkeys(values))


def _stray(graph: ir.Graph, key: str, proto: Any) -> list[Any]:
    """What the file said about names that the graph did not have; dropped where such a name has come up since."""
    kept = graph.meta.get(key, ())
    if not kept:
        return []
    names = {value.name for value in _values(graph)}
    infos = [proto.FromString(data) for data in kept]
    return [
        i
        for i in infos
        if getattr(i, "name" if key == STRAY_VALUE_INFO else "tensor_name") not in names
    ]


def _annotations(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    for value in _values(graph):
        if QUANTIZATION in value.meta:
            annotation = proto.quantization_annotation.add(tensor_name=value.name)
            parameters = value.meta[QUANTIZATION]
            for key in sorted(parameters):
                annotation.quant_parameter_tensor_names.add(key=key, value=parameters[key])
    proto.quantization_annotation.extend(_stray(graph, STRAY_ANNOTATIONS, onnx.TensorAnnotation))


def _opsets(proto: Any, opsets: dict[str, int]) -> None:
    for domain, version in opsets.items():
        proto.opset_import.add(domain=domain, version=version)


def _props(proto: Any, props: Any) -> None:
    for key in sorted(props):
        proto.metadata_props.add(key=key, value=props[key])


def _serialized(proto: Any) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))
