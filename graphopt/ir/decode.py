"""ModelProto -> ir.Model, losing nothing.

onnx_ir's own deserialiser drops sparse initializers, training info, opaque types, and value_info and
quantisation annotations of names it does not know; it refuses `Constant(sparse_value)` and maps; it
invents values for undefined names (onnx-ir 1.1). What its classes cannot hold is kept in `meta`, under
the keys of `notes`, for `encode` to write back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir import notes
from graphopt.ir.calls import check_calls
from graphopt.ir.order import sort_graph
from graphopt.ir.tensor_proto import TensorReader
from graphopt.ir.type_proto import read_type, read_value_info

MAX_GRAPH_DEPTH = 32  # three messages a level: protobuf readers stop at 100

_A = onnx.AttributeProto
_KIND = ir.AttributeType
_FIELDS: dict[int, str] = {
    _A.FLOAT: "f",
    _A.INT: "i",
    _A.STRING: "s",
    _A.TENSOR: "t",
    _A.GRAPH: "g",
    _A.SPARSE_TENSOR: "sparse_tensor",
    _A.TYPE_PROTO: "tp",
    _A.FLOATS: "floats",
    _A.INTS: "ints",
    _A.STRINGS: "strings",
    _A.TENSORS: "tensors",
    _A.GRAPHS: "graphs",
    _A.SPARSE_TENSORS: "sparse_tensors",
    _A.TYPE_PROTOS: "type_protos",
}


_AS_THEY_ARE = frozenset({_KIND.INT, _KIND.FLOAT, _KIND.INTS, _KIND.FLOATS})

_KINDS: dict[int, ir.AttributeType] = {number: _KIND(number) for number in _FIELDS}
"""The same as calling the enumeration, a fraction of the time."""


def decode_model(proto: onnx.ModelProto, reader: TensorReader, origin: str) -> ir.Model:
    """The model that `proto` describes; `origin` is what messages call it.

    Raises:
        ModelError: the model is not valid ONNX: undefined or doubly defined values, cycles, tensors that
            contradict themselves, names that are not text, functions that call themselves, or more nesting or nodes
            than any reader accepts.
    """
    if not proto.HasField("graph"):
        raise ModelError(
            f"{origin}: holds no ONNX graph; the file is empty or of another format, export it again"
        )
    try:
        return _Decoder(reader, origin, proto).model()
    except UnicodeDecodeError as error:
        raise ModelError(f"{origin}: a name is not UTF-8 ({error}); the file is corrupt") from error
    except RecursionError as error:
        raise ModelError(f"{origin}: types or graphs nest too deeply; flatten the model") from error


class _Place(NamedTuple):
    """Where in the model we are; spelt out only when something is wrong."""

    graph: str
    node: onnx.NodeProto | None = None

    def __str__(self) -> str:
        if self.node is None:
            return self.graph
        label = self.node.name or f"with outputs {list(self.node.output)}"
        return f"{self.graph}, {self.node.op_type} node {label}"


@dataclasses.dataclass
class _Scope:
    """The names of one graph while it is read; `pending` are those of nodes that are still to come.

    `makers` are the nodes that define them, for messages.
    """

    place: _Place
    values: dict[str, ir.Value] = dataclasses.field(default_factory=dict)
    pending: set[str] = dataclasses.field(default_factory=set)
    makers: dict[str, onnx.NodeProto] = dataclasses.field(default_factory=dict)
    unsorted: bool = False

    def define(self, name: str, what: str, maker: onnx.NodeProto | None = None) -> ir.Value:
        if not name or name in self.values:
            raise self._refusal(name, what, maker)
        value = self.values[name] = ir.Value(name=notes.name(name))
        if maker is not None:
            self.makers[name] = maker
        return value

    def _refusal(self, name: str, what: str, maker: onnx.NodeProto | None) -> ModelError:
        """Why a name cannot be defined."""
        place = self.place._replace(node=maker)
        if not name:
            return ModelError(
                f"{place}: {what} has no name, so that nothing can use it; name or remove it"
            )
        return ModelError(
            f"{place}: the value {name!r} is defined twice{self._first(name)}, the second time as "
            f"{what}; which of the two its users mean is not defined: rename one, and the inputs that mean it"
        )

    def _first(self, name: str) -> str:
        """Where a name was defined first, if by a node."""
        maker = self.makers.get(name)
        label = maker and (maker.name or f"with outputs {list(maker.output)}")
        return f", the first time by {maker.op_type} node {label}" if maker is not None else ""

    def sort(self, graph: ir.Graph) -> None:
        if self.unsorted:
            sort_graph(graph, str(self.place))


_Scopes = tuple[_Scope, ...]


class _Decoder:
    def __init__(self, reader: TensorReader, origin: str, proto: onnx.ModelProto) -> None:
        self._reader = reader
        self._origin = origin
        self._proto = proto
        self._devices = {
            config.name: ir.serde.deserialize_model_configuration(config)
            for config in getattr(proto, "configuration", ())
        }

    def model(self) -> ir.Model:
        proto = self._proto
        graph = self._graph(proto.graph, (), f"{self._origin}, main graph")
        graph.opset_imports.update(notes.opsets(proto.opset_import))
        model = ir.Model(
            graph,
            ir_version=proto.ir_version,
            producer_name=notes.text(proto, "producer_name"),
            producer_version=notes.text(proto, "producer_version"),
            domain=notes.text(proto, "domain"),
            model_version=proto.model_version if proto.HasField("model_version") else None,
            doc_string=notes.text(proto, "doc_string"),
            functions=self._functions(proto.functions),
            metadata_props=notes.props(proto),
            device_configurations=tuple(self._devices.values()),
        )
        check_calls(model, self._origin)
        if proto.training_info:
            model.meta[notes.TRAINING_INFO] = tuple(map(self._training, proto.training_info))
        if proto.ir_version < notes.FUNCTION_VALUE_INFO_IR:
            _claim_function_value_info(model)
        return model

    def _training(self, info: onnx.TrainingInfoProto) -> bytes:
        """Kept as it stands: no pass looks into it."""
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(info)):
            raise ModelError(
                f"{self._origin}, training info: refers to external data, which is not supported there; "
                "store its tensors in the model"
            )
        return bytes(info.SerializeToString(deterministic=True))

    def _functions(self, protos: Iterable[onnx.FunctionProto]) -> list[ir.Function]:
        functions = [self._function(proto) for proto in protos]
        names = [":".join(function.identifier()) for function in functions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ModelError(
                f"{self._origin}: functions {twice} are defined twice; remove or rename one"
            )
        return functions

    def _function(self, proto: onnx.FunctionProto) -> ir.Function:
        domain = notes.canonical_domain(notes.name(proto.domain))
        scope = _Scope(_Place(f"{self._origin}, function {domain}:{proto.name}"))
        inputs = [scope.define(name, "an input") for name in proto.input]
        nodes = self._nodes(proto.node, (scope,))
        graph = ir.Graph(
            inputs,
            [self._output(name, (scope,), nodes) for name in proto.output],
            nodes=nodes,
            doc_string=notes.text(proto, "doc_string"),
            opset_imports=notes.opsets(proto.opset_import),
            metadata_props=notes.props(proto),
        )
        _read_value_infos(graph, scope, proto.value_info)
        if proto.value_info:
            graph.meta[notes.OWN_VALUE_INFO] = True
        scope.sort(graph)
        attributes = [self._attribute(a, (), scope.place) for a in proto.attribute_proto]
        attributes += [ir.Attr(notes.name(name), _KIND.UNDEFINED, None) for name in proto.attribute]
        return ir.Function(
            domain,
            notes.name(proto.name),
            notes.name(proto.overload),
            graph=graph,
            attributes=attributes,
        )

    def _graph(self, proto: onnx.GraphProto, outer: _Scopes, label: str) -> ir.Graph:
        if len(outer) >= MAX_GRAPH_DEPTH:
            raise ModelError(
                f"{label}: graphs nest more than {MAX_GRAPH_DEPTH} deep, which no ONNX reader accepts; "
                "flatten the model"
            )
        scope = _Scope(_Place(label))
        inputs = [scope.define(info.name, "an input") for info in proto.input]
        for info, value in zip(proto.input, inputs, strict=True):
            read_value_info(info, value)
        initializers = self._initializers(proto, scope)
        nodes = self._nodes(proto.node, (*outer, scope))
        outputs = [self._output(info.name, (*outer, scope), nodes) for info in proto.output]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            doc_string=notes.text(proto, "doc_string"),
            name=notes.text(proto, "name"),
            metadata_props=notes.props(proto),
        )
        _read_value_infos(graph, scope, proto.value_info)
        _read_annotations(graph, scope, proto.quantization_annotation)
        for info, value in zip(proto.output, outputs, strict=True):
            if not value.is_graph_input():
                read_value_info(info, value)
        scope.sort(graph)
        return graph

    def _initializers(self, proto: onnx.GraphProto, scope: _Scope) -> list[ir.Value]:
        where = str(scope.place)
        tensors = [self._reader.tensor(t, where) for t in proto.initializer]
        tensors += [self._reader.sparse_tensor(t, where) for t in proto.sparse_initializer]
        inputs = dict(scope.values)
        values = []
        for tensor in tensors:
            if not tensor.name or tensor.dtype == ir.DataType.UNDEFINED:
                raise ModelError(
                    f"{where}: the initializer {tensor.name or ''!r} of {tensor.dtype} {tensor.shape} lacks a name or "
                    "a data type; give it one or remove it"
                )
            value = inputs.pop(tensor.name, None)
            if value is None:
                value = scope.define(tensor.name, "an initializer")
                value.type, value.shape = (
                    ir.TensorType(tensor.dtype),
                    ir.Shape(tensor.shape.numpy()),
                )
            value.const_value = tensor
            values.append(value)
        return values

    def _nodes(self, protos: Sequence[onnx.NodeProto], scopes: _Scopes) -> list[ir.Node]:
        # All outputs are declared first: a subgraph, or a node out of order, may use what comes later.
        scope = scopes[-1]
        for proto in protos:
            for name in proto.output:
                if name:
                    scope.define(name, "an output", proto)
                    scope.pending.add(name)
        return [self._node(proto, scopes) for proto in protos]

    def _node(self, proto: onnx.NodeProto, scopes: _Scopes) -> ir.Node:
        scope = scopes[-1]
        known, outputs = scope.values, tuple(proto.output)
        node = ir.Node(
            notes.name(proto.domain),
            notes.name(proto.op_type),
            [_lookup(name, scopes, proto) if name else None for name in proto.input],
            self._attributes(proto, scopes) if proto.attribute else (),
            overload=notes.name(proto.overload),
            outputs=[known[name] if name else ir.Value(name="") for name in outputs],
            name=notes.name(proto.name),
            doc_string=notes.text(proto, "doc_string"),
            metadata_props=notes.props(proto) if proto.metadata_props else None,
        )
        if configurations := getattr(proto, "device_configurations", ()):
            node.device_configurations = tuple(self._device(c, scopes) for c in configurations)
        scope.pending.difference_update(outputs)
        return node

    def _device(
        self, proto: onnx.NodeDeviceConfigurationProto, scopes: _Scopes
    ) -> ir.NodeDeviceConfiguration:
        values = {name: value for scope in scopes for name, value in scope.values.items()}
        device = ir.serde.deserialize_node_device_configuration(proto, values)
        known = self._devices.get(proto.configuration_id)
        return dataclasses.replace(device, configuration=known) if known is not None else device

    @staticmethod
    def _output(name: str, scopes: _Scopes, nodes: list[ir.Node]) -> ir.Value:
        scope = scopes[-1]
        if name in scope.values:
            return scope.values[name]
        if not any(name in outer.values for outer in scopes):
            raise ModelError(
                f"{scope.place}: the output {name!r} is made by no node and is neither input nor initializer; "
                "the model is invalid, export it again"
            )
        # A branch that returns a value of the graph around it: runtimes want a node that makes it, and so
        # does the IR. Under its own name it would hide the value that it copies; outputs of a subgraph are
        # told apart by position.
        value = scope.define(_fresh(f"{name}_returned", scopes), "an output")
        source = _lookup(name, scopes)
        nodes.append(ir.Node("", "Identity", [source], outputs=[value], name=""))
        return value

    def _attributes(self, proto: onnx.NodeProto, scopes: _Scopes) -> list[ir.Attr]:
        place = _Place(scopes[-1].place.graph, proto)
        attributes: dict[str, ir.Attr] = {}
        for attribute_proto in proto.attribute:
            attribute = self._attribute(attribute_proto, scopes, place)
            if attribute_proto.name in attributes:
                raise ModelError(
                    f"{place}: the attribute {attribute.name!r} is given twice; remove one"
                )
            attributes[attribute_proto.name] = attribute
        sparse = attributes.get("sparse_value")
        if sparse is not None and not sparse.is_ref() and _is_constant(proto):
            # So every pass reads it as the constant it is; `encode` knows it by the CooTensor.
            sparse.value.in_node = True
            dense = ir.AttrTensor("value", sparse.value, doc_string=sparse.doc_string)
            attributes["sparse_value"] = dense
        return list(attributes.values())

    def _attribute(self, proto: onnx.AttributeProto, scopes: _Scopes, place: _Place) -> ir.Attr:
        kind = _KINDS.get(proto.type) or ir.AttributeType(proto.type or _implied_type(proto))
        name, doc_string = notes.name(proto.name), notes.text(proto, "doc_string")
        if proto.ref_attr_name:
            return ir.RefAttr(name, notes.name(proto.ref_attr_name), kind, doc_string=doc_string)
        if kind == _KIND.UNDEFINED:
            return ir.Attr(name, kind, None, doc_string=doc_string)
        content = self._content(kind, proto, scopes, place)
        return ir.Attr(name, kind, content, doc_string=doc_string)

    def _content(
        self, kind: ir.AttributeType, proto: onnx.AttributeProto, scopes: _Scopes, place: _Place
    ) -> Any:  # noqa: ANN401 - as many types as AttributeProto has
        content = getattr(proto, _FIELDS[kind.value])
        if kind in _AS_THEY_ARE:
            return content
        if kind == _KIND.STRING:
            return notes.read_string(content)
        if kind == _KIND.STRINGS:
            return [notes.read_string(text) for text in content]
        if kind == _KIND.TYPE_PROTO:
            return read_type(content)
        if kind == _KIND.TYPE_PROTOS:
            return [read_type(type_proto) for type_proto in content]
        where = f"{place}, attribute {proto.name!r}"
        if kind == _KIND.GRAPH:
            return self._graph(content, scopes, where)
        if kind == _KIND.GRAPHS:
            return [self._graph(graph, scopes, f"{where}[{i}]") for i, graph in enumerate(content)]
        sparse = kind in (_KIND.SPARSE_TENSOR, _KIND.SPARSE_TENSORS)
        read = self._reader.sparse_tensor if sparse else self._reader.tensor
        if kind in (_KIND.TENSOR, _KIND.SPARSE_TENSOR):
            return read(content, where)
        return tuple(read(tensor, where) for tensor in content)


def _lookup(name: str, scopes: _Scopes, reader: onnx.NodeProto | None = None) -> ir.Value:
    scope = scopes[-1]
    value = scope.values.get(name)
    if value is None:
        return _lookup_outside(name, scopes, reader)
    if name in scope.pending:
        scope.unsorted = True
    return value


def _lookup_outside(name: str, scopes: _Scopes, reader: onnx.NodeProto | None) -> ir.Value:
    """A value of one of the graphs around the innermost."""
    for scope in reversed(scopes[:-1]):
        if name in scope.values:
            scope.unsorted = scope.unsorted or name in scope.pending
            return scope.values[name]
    place = scopes[-1].place if reader is None else scopes[-1].place._replace(node=reader)
    raise ModelError(
        f"{place}: the input {name!r} is no graph input, initializer or output of any node in reach; "
        "the model is invalid, export it again"
    )


def _fresh(name: str, scopes: _Scopes) -> str:
    taken = {known for scope in scopes for known in scope.values}
    candidates = (f"{name}_{i}" if i else name for i in itertools.count())
    return next(candidate for candidate in candidates if candidate not in taken)


def _is_constant(proto: onnx.NodeProto) -> bool:
    return proto.op_type == "Constant" and not notes.canonical_domain(proto.domain)


def _implied_type(proto: onnx.AttributeProto) -> int:
    """The type of an attribute that does not state it, as IR version 1 allowed: that of the field in use."""
    present = {field.name for field, _ in proto.ListFields()}
    used = [kind for kind, field in _FIELDS.items() if field in present]
    return used[0] if len(used) == 1 else _A.UNDEFINED


def _read_value_infos(graph: ir.Graph, scope: _Scope, infos: Iterable[onnx.ValueInfoProto]) -> None:
    stray = []
    for info in infos:
        value = scope.values.get(info.name)
        if value is None:
            stray.append(info.SerializeToString(deterministic=True))
        elif value.const_value is not None and not value.is_graph_input():
            # Its tensor knows dtype and shape better.
            value.meta[notes.DECLARED] = True
            value.doc_string = notes.prose(info.doc_string) or None
            value.metadata_props.update(notes.props(info) or {})
        elif value.type is None or not value.is_graph_input():
            read_value_info(info, value)
    if stray:
        graph.meta[notes.STRAY_VALUE_INFO] = tuple(stray)


def _read_annotations(
    graph: ir.Graph, scope: _Scope, annotations: Iterable[onnx.TensorAnnotation]
) -> None:
    stray = []
    for annotation in annotations:
        value = scope.values.get(annotation.tensor_name)
        if value is None:
            stray.append(annotation.SerializeToString(deterministic=True))
        else:
            entries = annotation.quant_parameter_tensor_names
            parameters = {notes.name(entry.key): notes.name(entry.value) for entry in entries}
            value.meta[notes.QUANTIZATION] = parameters
    if stray:
        graph.meta[notes.STRAY_ANNOTATIONS] = tuple(stray)


def _claim_function_value_info(model: ir.Model) -> None:
    """Gives functions of IR < 10 models the value_info that the main graph holds for them."""
    values = {
        f"{function.domain}::{function.name}/{value.name}": value
        for function in model.functions.values()
        if not function.overload
        for value in (*function.inputs, *(output for node in function for output in node.outputs))
    }
    left = []
    for data in model.graph.meta.get(notes.STRAY_VALUE_INFO, ()):
        info = onnx.ValueInfoProto.FromString(data)
        if info.name in values:
            read_value_info(info, values[info.name])
        else:
            left.append(data)
    if notes.STRAY_VALUE_INFO in model.graph.meta:
        model.graph.meta[notes.STRAY_VALUE_INFO] = tuple(left)


def _tensors(info: onnx.TrainingInfoProto) -> list[onnx.TensorProto]:
    """Every tensor in a message, however deep."""
    found: list[onnx.TensorProto] = []
    waiting: list[Any] = [info]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.TensorProto):
            found.append(message)
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                waiting.extend(value if field.is_repeated else [value])
    return found
