"""ir.Model -> ModelProto, as pieces to stream.

Fields come in the order of their numbers and maps sorted: the same model gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import onnx
import onnx_ir as ir

from graphopt.ir import notes
from graphopt.ir.message import Location, Message, Placement, Role, inline
from graphopt.ir.sparse import CooTensor
from graphopt.ir.type_proto import says_something, write_type, write_value_info
from graphopt.ir.wire import blob, packed_field

_Content: TypeAlias = Any  # of an attribute: as many types as AttributeProto has fields
_Fields: TypeAlias = list[tuple[int, Message]]
_Stray = TypeVar("_Stray", onnx.ValueInfoProto, onnx.TensorAnnotation)


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
        notes.write_props(tail, model.metadata_props)
        for data in model.meta.get(notes.TRAINING_INFO, ()):
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
            self._model.ir_version >= notes.FUNCTION_VALUE_INFO_IR
            or notes.OWN_VALUE_INFO in function.graph.meta
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
        notes.write_props(tail, function.metadata_props)
        if self._own_value_info(function):
            tail.value_info.extend(write_value_info(value) for value in _function_values(function))
            tail.value_info.extend(
                _stray(function.graph, notes.STRAY_VALUE_INFO, onnx.ValueInfoProto)
            )
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
        tensors = {
            v.name or "": t for v in graph.initializers.values() if (t := v.const_value) is not None
        }
        for name, tensor in tensors.items():
            if not isinstance(tensor, CooTensor):
                message.add(5, self._tensor(tensor, Role.INITIALIZER, name))
        message.write(_serialized(_described_values(graph, extra)))
        for name, tensor in tensors.items():
            if isinstance(tensor, CooTensor):
                message.add(15, self._sparse(tensor, name))
        tail = onnx.GraphProto()
        notes.write_props(tail, graph.metadata_props)
        message.write(_serialized(tail))
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
        notes.write_props(tail, node.metadata_props)
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
        self, kind: ir.AttributeType, value: _Content
    ) -> tuple[ir.AttributeType, _Fields]:
        """The type in the file and the fields of an attribute that holds tensors or graphs."""
        if kind == ir.AttributeType.GRAPH:
            return kind, [(6, self._graph(value))]
        if kind == ir.AttributeType.GRAPHS:
            return kind, [(11, self._graph(graph)) for graph in value]
        if isinstance(value, CooTensor):
            return ir.AttributeType.SPARSE_TENSOR, [(22, self._sparse(value, value.name))]
        if kind == ir.AttributeType.SPARSE_TENSORS:
            return kind, [(23, self._sparse(tensor, tensor.name)) for tensor in value]
        tensors, number = ([value], 5) if kind == ir.AttributeType.TENSOR else (value, 10)
        return kind, [(number, self._tensor(t, Role.ATTRIBUTE, t.name)) for t in tensors]

    def _sparse(self, tensor: CooTensor, name: str | None) -> Message:
        message = Message()
        message.add(1, self._tensor(tensor.values, Role.SPARSE_PART, name))
        message.add(2, self._indices(tensor))
        message.write(_serialized(onnx.SparseTensorProto(dims=_dims(tensor))))
        return message

    def _indices(self, tensor: CooTensor) -> Message:
        indices = tensor.indices
        if not tensor.packed or indices.dtype != ir.DataType.INT64 or not indices.size:
            return self._tensor(indices, Role.SPARSE_PART, indices.name)
        head = onnx.TensorProto(dims=_dims(indices), data_type=indices.dtype.value)
        tail = onnx.TensorProto()
        if indices.name:
            tail.name = indices.name
        if indices.doc_string:
            tail.doc_string = indices.doc_string
        notes.write_props(tail, indices.metadata_props)
        numbers = packed_field(indices.numpy().reshape(-1))
        return Message(_serialized(head), blob(7, numbers), _serialized(tail))

    def _tensor(self, tensor: ir.TensorProtocol, role: Role, name: str | None) -> Message:
        head = onnx.TensorProto(dims=_dims(tensor), data_type=tensor.dtype.value)
        tail = onnx.TensorProto()
        if name:
            head.name = name
        if tensor.doc_string:
            tail.doc_string = tensor.doc_string
        notes.write_props(tail, tensor.metadata_props)
        if tensor.dtype == ir.DataType.STRING:
            head.string_data.extend(_strings(tensor))
            return Message(_serialized(head), _serialized(tail))
        if tensor.dtype == ir.DataType.UNDEFINED:
            head.ClearField("data_type")
            return Message(_serialized(head), _serialized(tail))
        message = Message(_serialized(head))
        location = self._place(tensor, role)
        if location is None:
            message.payload(9, tensor)
        else:
            _point_to(tail, location, tensor.nbytes)
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


def _fill(proto: onnx.AttributeProto, kind: ir.AttributeType, value: _Content) -> None:
    if kind == ir.AttributeType.STRING:
        proto.s = _encoded(value)
    elif kind == ir.AttributeType.STRINGS:
        proto.strings.extend(_encoded(text) for text in value)
    elif kind == ir.AttributeType.TYPE_PROTO:
        proto.tp.SetInParent()
        write_type(proto.tp, value)
    elif kind == ir.AttributeType.TYPE_PROTOS:
        for known in value:
            write_type(proto.type_protos.add(), known)
    elif kind in (ir.AttributeType.INT, ir.AttributeType.FLOAT):
        setattr(proto, _PLAIN[kind], value)
    else:
        getattr(proto, _PLAIN[kind]).extend(value)


def _point_to(proto: onnx.TensorProto, location: Location, length: int) -> None:
    proto.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location.file, "offset": location.offset, "length": length}
    for key, value in entries.items():
        proto.external_data.add(key=key, value=str(value))


def _encoded(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8")


def _dims(tensor: ir.TensorProtocol) -> list[int]:
    return list(tensor.shape.numpy())


def _strings(tensor: ir.TensorProtocol) -> list[bytes]:
    if isinstance(tensor, ir.StringTensor):
        return list(tensor.string_data())
    return [_encoded(text) for text in tensor.numpy().reshape(-1).tolist()]


def _carrier(node: ir.Node, name: str, attribute: ir.Attr) -> str:
    """The name of an attribute in the file: a sparse constant returns to where ONNX keeps it."""
    sparse = (
        node.op_type == "Constant" and not node.domain and isinstance(attribute.value, CooTensor)
    )
    return "sparse_value" if sparse and name == "value" else name


def _undefaulted(attribute: ir.Attr) -> bool:
    return attribute.value is None and not attribute.is_ref()


def _function_values(function: ir.Function) -> list[ir.Value]:
    values = [*function.inputs, *(output for node in function for output in node.outputs)]
    return [value for value in values if says_something(value)]


def _described_values(graph: ir.Graph, extra: Iterable[onnx.ValueInfoProto]) -> onnx.GraphProto:
    """The fields of a graph that say something of its values."""
    proto = onnx.GraphProto(doc_string=graph.doc_string)
    proto.input.extend(write_value_info(value) for value in graph.inputs)
    proto.output.extend(write_value_info(value) for value in graph.outputs)
    proto.value_info.extend(write_value_info(value) for value in _described(graph))
    proto.value_info.extend(_stray(graph, notes.STRAY_VALUE_INFO, onnx.ValueInfoProto))
    proto.value_info.extend(extra)
    for value in _values(graph):
        if notes.QUANTIZATION in value.meta:
            annotation = proto.quantization_annotation.add(tensor_name=value.name)
            for key, name in sorted(value.meta[notes.QUANTIZATION].items()):
                annotation.quant_parameter_tensor_names.add(key=key, value=name)
    proto.quantization_annotation.extend(
        _stray(graph, notes.STRAY_ANNOTATIONS, onnx.TensorAnnotation)
    )
    return proto


def _described(graph: ir.Graph) -> list[ir.Value]:
    """The values that get a value_info: not inputs and outputs, nor what would only repeat a tensor."""
    initializers = [
        value
        for value in graph.initializers.values()
        if not value.is_graph_input()
        and not value.is_graph_output()
        and (notes.DECLARED in value.meta or value.doc_string or value.metadata_props)
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


def _stray(graph: ir.Graph, key: str, kind: type[_Stray]) -> list[_Stray]:
    """What the file said of names that the graph lacked; left out where such a name has come up since."""
    kept = graph.meta.get(key, ())
    if not kept:
        return []
    names = {value.name for value in _values(graph)}
    protos = [kind.FromString(data) for data in kept]
    return [
        p
        for p in protos
        if (p.name if isinstance(p, onnx.ValueInfoProto) else p.tensor_name) not in names
    ]


def _opsets(proto: onnx.ModelProto | onnx.FunctionProto, opsets: Mapping[str, int]) -> None:
    for domain, version in opsets.items():
        proto.opset_import.add(domain=domain, version=version)


def _serialized(proto: Any) -> bytes:  # noqa: ANN401 - any message
    return bytes(proto.SerializeToString(deterministic=True))
