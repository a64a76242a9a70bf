"""ModelProto -> ir.Model, losing nothing.

onnx_ir's own deserialiser drops sparse initializers, training info, value_info and quantisation annotations of names it does not
know, and opaque types; it refuses `Constant(sparse_value)` and maps; it invents values for undefined names (onnx-ir 1.1). What its
classes cannot hold is kept in `meta`, under the keys of this module, for `encode` to write back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir.tensor_proto import TensorReader
from graphopt.ir.type_proto import DECLARED, read_type, read_value_info

TRAINING_INFO = "graphopt.training_info"  # Model.meta: tuple of serialised TrainingInfoProto
STRAY_VALUE_INFO = "graphopt.stray_value_info"  # Graph.meta: serialised ValueInfoProto of names that the graph lacks
STRAY_ANNOTATIONS = "graphopt.stray_annotations"  # Graph.meta: serialised TensorAnnotation of names that the graph lacks
OWN_VALUE_INFO = "graphopt.own_value_info"  # Graph.meta of a function: its value_info stood in the function, not the main graph
QUANTIZATION = "quant_parameter_tensor_names"  # Value.meta: the key that onnx_ir uses for the annotation of a value

MAX_GRAPH_DEPTH = 32  # three messages a level: protobuf readers stop at 100
FUNCTION_VALUE_INFO_IR = (
    10  # before, exporters put it into the main graph, as `domain::function/value`
)

_A = onnx.AttributeProto
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
    """The names of one graph while it is read."""

    values: dict[str, ir.Value] = dataclasses.field(default_factory=dict)
    pending: set[str] = dataclasses.field(default_factory=set)
    unsorted: bool = False

    def define(self, name: str, value: ir.Value, place: _Place, what: str) -> None:
        if name in self.values:
            raise ModelError(
                f"{place}: the value {name!r} is defined twice, the second time as {what}; every value needs a name of its "
                "own, rename one"
            )
        self.values[name] = value


def decode_model(proto: onnx.ModelProto, reader: TensorReader, origin: str) -> ir.Model:
    """The model that `proto` describes.

    Raises:
        ModelError: the model is not valid ONNX: undefined or doubly defined values, cycles, contradicting tensors.
    """
    if not proto.HasField("graph"):
        raise ModelError(
            f"{origin}: holds no ONNX graph; the file is empty or of another format, export it again"
        )
    return _Decoder(reader, origin, proto).model()


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
        graph.opset_imports.update(_opsets(proto.opset_import))
        functions = [self._function(function) for function in proto.functions]
        model = ir.Model(
            graph,
            ir_version=proto.ir_version,
            producer_name=_text(proto, "producer_name"),
            producer_version=_text(proto, "producer_version"),
            domain=_text(proto, "domain"),
            model_version=proto.model_version if proto.HasField("model_version") else None,
            doc_string=_text(proto, "doc_string"),
            functions=functions,
            metadata_props=_props(proto),
            device_configurations=tuple(self._devices.values()),
        )
        if len(model.functions) != len(functions):
            names = [":".join(function.identifier()) for function in functions]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ModelError(
                f"{self._origin}: functions {twice} are defined twice; remove or rename one"
            )
        if proto.training_info:
            model.meta[TRAINING_INFO] = tuple(self._training(info) for info in proto.training_info)
        if proto.ir_version < FUNCTION_VALUE_INFO_IR:
            _claim_function_value_info(model)
        return model

    def _training(self, info: onnx.TrainingInfoProto) -> bytes:
        """Checked like any graph, kept as it stands: no pass looks into it."""
        for part in ("initialization", "algorithm"):
            graph = getattr(info, part)
            if _has_external_data(graph):
                raise ModelError(
                    f"{self._origin}, training info, {part}: external data are not supported there; store them in the model"
                )
        return bytes(info.SerializeToString(deterministic=True))

    def _function(self, proto: onnx.FunctionProto) -> ir.Function:
        domain = _domain(proto.domain)
        place = _Place(f"{self._origin}, function {domain}:{proto.name}")
        scope = _Scope()
        inputs = [ir.Value(name=name) for name in proto.input]
        for value in inputs:
            assert value.name is not None
            scope.define(value.name, value, place, "an input")
        nodes = self._nodes(proto.node, (scope,), place)
        graph = ir.Graph(
            inputs,
            [self._function_output(name, scope, place) for name in proto.output],
            nodes=nodes,
            doc_string=_text(proto, "doc_string"),
            opset_imports=_opsets(proto.opset_import),
            metadata_props=_props(proto),
        )
        self._notes(graph, scope, proto.value_info, ())
        if proto.value_info:
            graph.meta[OWN_VALUE_INFO] = True
        _sort(graph, scope, place)
        attributes = [self._attribute(a, (), place) for a in proto.attribute_proto]
        attributes += [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in proto.attribute]
        return ir.Function(domain, proto.name, proto.overload, graph=graph, attributes=attributes)

    @staticmethod
    def _function_output(name: str, scope: _Scope, place: _Place) -> ir.Value:
        if name not in scope.values:
            raise ModelError(
                f"{place}: the output {name!r} is made by no node of the function; the model is invalid"
            )
        return scope.values[name]

    def _graph(self, proto: onnx.GraphProto, outer: tuple[_Scope, ...], label: str) -> ir.Graph:
        place = _Place(label)
        if len(outer) >= MAX_GRAPH_DEPTH:
            raise ModelError(
                f"{place}: graphs nest more than {MAX_GRAPH_DEPTH} deep, which no ONNX reader accepts; flatten the model"
            )
        scope = _Scope()
        inputs = []
        for info in proto.input:
            value = ir.Value(name=info.name)
            scope.define(info.name, value, place, "an input")
            read_value_info(info, value)
            inputs.append(value)
        initializers = self._initializers(proto, scope, place)
        nodes = self._nodes(proto.node, (*outer, scope), place)
        declared = {info.name for info in proto.value_info}
        for value in initializers:
            value.meta.update({DECLARED: True} if value.name in declared else {})
        outputs = [self._output(info.name, outer, scope, nodes, place) for info in proto.output]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            doc_string=_text(proto, "doc_string"),
            name=_text(proto, "name"),
            metadata_props=_props(proto),
        )
        self._notes(graph, scope, proto.value_info, proto.quantization_annotation)
        for info, value in zip(proto.output, outputs, strict=True):
            if not value.is_graph_input():
                read_value_info(info, value)
        _sort(graph, scope, place)
        return graph

    def _initializers(self, proto: onnx.GraphProto, scope: _Scope, place: _Place) -> list[ir.Value]:
        where = str(place)
        tensors: list[ir.TensorProtocol] = [
            self._reader.tensor(t, where) for t in proto.initializer
        ]
        tensors += [self._reader.sparse_tensor(t, where) for t in proto.sparse_initializer]
        inputs = dict(scope.values)
        values = []
        for tensor in tensors:
            if not tensor.name:
                raise ModelError(
                    f"{place}: an initializer of shape {tensor.shape} has no name; name or remove it"
                )
            value = inputs.pop(tensor.name, None)
            if value is None:
                value = ir.Value(
                    name=tensor.name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape.numpy()),
                )
                scope.define(tensor.name, value, place, "an initializer")
            value.const_value = tensor
            values.append(value)
        return values

    def _nodes(
        self, protos: Sequence[onnx.NodeProto], scopes: tuple[_Scope, ...], place: _Place
    ) -> list[ir.Node]:
        # All outputs are declared first: a subgraph, or a node out of order, may use what a later node makes.
        scope = scopes[-1]
        for proto in protos:
            for name in proto.output:
                if name:
                    scope.define(name, ir.Value(name=name), place._replace(node=proto), "an output")
                    scope.pending.add(name)
        return [self._node(proto, scopes, place._replace(node=proto)) for proto in protos]

    def _node(self, proto: onnx.NodeProto, scopes: tuple[_Scope, ...], place: _Place) -> ir.Node:
        scope = scopes[-1]
        attributes: dict[str, ir.Attr] = {}
        for attribute_proto in proto.attribute:
            attribute = self._attribute(attribute_proto, scopes, place)
            if attribute.name in attributes:
                raise ModelError(
                    f"{place}: the attribute {attribute.name!r} is given twice; remove one"
                )
            attributes[attribute.name] = attribute
        node = ir.Node(
            proto.domain,
            proto.op_type,
            [_lookup(name, scopes, place) if name else None for name in proto.input],
            list(_in_memory(proto, attributes).values()),
            overload=proto.overload,
            outputs=[scope.values[name] if name else ir.Value(name="") for name in proto.output],
            name=proto.name,
            doc_string=_text(proto, "doc_string"),
            metadata_props=_props(proto),
        )
        if configurations := getattr(proto, "device_configurations", ()):
            node.device_configurations = tuple(self._device(c, scopes) for c in configurations)
        scope.pending.difference_update(proto.output)
        return node

    def _device(
        self, proto: onnx.NodeDeviceConfigurationProto, scopes: tuple[_Scope, ...]
    ) -> ir.NodeDeviceConfiguration:
        values: dict[str, ir.Value] = {}
        for scope in scopes:
            values |= scope.values
        device = ir.serde.deserialize_node_device_configuration(proto, values)
        known = self._devices.get(proto.configuration_id)
        return dataclasses.replace(device, configuration=known) if known is not None else device

    def _output(
        self,
        name: str,
        outer: tuple[_Scope, ...],
        scope: _Scope,
        nodes: list[ir.Node],
        place: _Place,
    ) -> ir.Value:
        if name in scope.values:
            return scope.values[name]
        if not any(name in s.values for s in outer):
            raise ModelError(
                f"{place}: the output {name!r} is made by no node and is neither input nor initializer; the model is invalid"
            )
        # A branch that returns a value of the graph around it: runtimes want a node that makes it, and so does the IR.
        value = ir.Value(name=name)
        nodes.append(
            ir.Node("", "Identity", [_lookup(name, outer, place)], outputs=[value], name="")
        )
        scope.values[name] = value
        return value

    def _notes(
        self,
        graph: ir.Graph,
        scope: _Scope,
        infos: Iterable[onnx.ValueInfoProto],
        annotations: Iterable[onnx.TensorAnnotation],
    ) -> None:
        stray_infos, stray_annotations = [], []
        for info in infos:
            value = scope.values.get(info.name)
            if value is None:
                stray_infos.append(info.SerializeToString(deterministic=True))
            elif value.const_value is None and not (
                value.is_graph_input() and value.type is not None
            ):
                read_value_info(info, value)
            elif (
                not value.is_graph_input()
            ):  # an initializer: its tensor knows dtype and shape better
                value.doc_string = info.doc_string or None
                value.metadata_props.update({p.key: p.value for p in info.metadata_props})
        for annotation in annotations:
            value = scope.values.get(annotation.tensor_name)
            if value is None:
                stray_annotations.append(annotation.SerializeToString(deterministic=True))
            else:
                value.meta[QUANTIZATION] = {
                    p.key: p.value for p in annotation.quant_parameter_tensor_names
                }
        graph.meta.update({STRAY_VALUE_INFO: tuple(stray_infos)} if stray_infos else {})
        graph.meta.update(
            {STRAY_ANNOTATIONS: tuple(stray_annotations)} if stray_annotations else {}
        )

    def _attribute(
        self, proto: onnx.AttributeProto, scopes: tuple[_Scope, ...], place: _Place
    ) -> ir.Attr:
        kind = ir.AttributeType(proto.type or _implied_type(proto))
        doc_string = _text(proto, "doc_string")
        if proto.ref_attr_name:
            return ir.RefAttr(proto.name, proto.ref_attr_name, kind, doc_string=doc_string)
        if kind == ir.AttributeType.UNDEFINED:
            return ir.Attr(proto.name, kind, None, doc_string=doc_string)
        content = getattr(proto, _FIELDS[kind.value])
        return ir.Attr(
            proto.name,
            kind,
            self._content(kind, content, scopes, place, proto.name),
            doc_string=doc_string,
        )

    def _content(
        self,
        kind: ir.AttributeType,
        content: Any,
        scopes: tuple[_Scope, ...],
        place: _Place,
        name: str,
    ) -> Any:
        where = f"{place}, attribute {name!r}" if kind in _COMPOSITE else ""
        match kind:
            case ir.AttributeType.STRING:
                return _string(content)
            case ir.AttributeType.STRINGS:
                return [_string(text) for text in content]
            case ir.AttributeType.TENSOR:
                return self._reader.tensor(content, where)
            case ir.AttributeType.TENSORS:
                return [self._reader.tensor(tensor, where) for tensor in content]
            case ir.AttributeType.SPARSE_TENSOR:
                return self._reader.sparse_tensor(content, where)
            case ir.AttributeType.SPARSE_TENSORS:
                return tuple(self._reader.sparse_tensor(tensor, where) for tensor in content)
            case ir.AttributeType.GRAPH:
                return self._graph(content, scopes, where)
            case ir.AttributeType.GRAPHS:
                return [
                    self._graph(graph, scopes, f"{where}[{i}]") for i, graph in enumerate(content)
                ]
            case ir.AttributeType.TYPE_PROTO:
                return read_type(content)
            case ir.AttributeType.TYPE_PROTOS:
                return [read_type(type_proto) for type_proto in content]
            case _:
                return content


_COMPOSITE = frozenset(
    {
        ir.AttributeType.TENSOR,
        ir.AttributeType.TENSORS,
        ir.AttributeType.SPARSE_TENSOR,
        ir.AttributeType.SPARSE_TENSORS,
        ir.AttributeType.GRAPH,
        ir.AttributeType.GRAPHS,
    }
)


def _in_memory(proto: onnx.NodeProto, attributes: dict[str, ir.Attr]) -> dict[str, ir.Attr]:
    """`Constant(sparse_value)` as `Constant(value)`, so that every pass reads it as the dense constant it is."""
    sparse = attributes.get("sparse_value")
    if proto.op_type != "Constant" or _domain(proto.domain) or sparse is None or sparse.is_ref():
        return attributes
    others = {name: attribute for name, attribute in attributes.items() if name != "sparse_value"}
    return {**others, "value": ir.AttrTensor("value", sparse.value, doc_string=sparse.doc_string)}


def _lookup(name: str, scopes: tuple[_Scope, ...], place: _Place) -> ir.Value:
    for scope in reversed(scopes):
        if name in scope.values:
            scope.unsorted = scope.unsorted or name in scope.pending
            return scope.values[name]
    raise ModelError(
        f"{place}: the input {name!r} is no graph input, initializer or output of any node in reach; the model is invalid, "
        "export it again"
    )


def _sort(graph: ir.Graph, scope: _Scope, place: _Place) -> None:
    if not scope.unsorted:
        return
    try:
        graph.sort()
    except ValueError as error:
        raise ModelError(
            f"{place}: nodes feed one another in a circle: {_cycle(graph)}; the model is invalid"
        ) from error


def _cycle(graph: ir.Graph) -> str:
    """The nodes of one cycle (those of subgraphs count for the node that holds them)."""
    feeds = {node: _feeds(node) for node in graph}
    while free := [node for node, sources in feeds.items() if not any(s in feeds for s in sources)]:
        for node in free:
            del feeds[node]
    path: list[ir.Node] = []
    node = next(iter(feeds))
    while node not in path:
        path.append(node)
        node = next(source for source in feeds[node] if source in feeds)
    names = [f"{n.op_type} {n.name or n.outputs[0].name!r}" for n in path[path.index(node) :]]
    return " <- ".join([*names, names[0]])


def _feeds(node: ir.Node) -> list[ir.Node]:
    inner = [
        n
        for attribute in node.attributes.values()
        for g in _graphs(attribute)
        for n in g.all_nodes()
    ]
    values = [value for n in (node, *inner) for value in n.inputs if value is not None]
    return [producer for value in values if (producer := value.producer()) is not None]


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
        return (attribute.as_graph(),)
    if attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
        return attribute.as_graphs()
    return ()


def _claim_function_value_info(model: ir.Model) -> None:
    """Gives functions of IR < 10 models the value_info that the main graph holds for them."""
    values = {
        f"{function.domain}::{function.name}/{value.name}": value
        for function in model.functions.values()
        if not function.overload
        for value in (*function.inputs, *(output for node in function for output in node.outputs))
    }
    left = []
    for data in model.graph.meta.get(STRAY_VALUE_INFO, ()):
        info = onnx.ValueInfoProto.FromString(data)
        if info.name in values:
            read_value_info(info, values[info.name])
        else:
            left.append(data)
    if STRAY_VALUE_INFO in model.graph.meta:
        model.graph.meta[STRAY_VALUE_INFO] = tuple(left)


def _implied_type(proto: onnx.AttributeProto) -> int:
    """The type of an attribute that does not state it, as IR version 1 allowed: that of the one field in use."""
    used = [
        kind
        for kind, field in _FIELDS.items()
        if any(f.name == field for f, _ in proto.ListFields())
    ]
    return used[0] if len(used) == 1 else _A.UNDEFINED


def _has_external_data(graph: onnx.GraphProto) -> bool:
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute)]
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors)


def _opsets(protos: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(proto.domain): proto.version for proto in protos}


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _text(proto: Any, field: str) -> str | None:
    return getattr(proto, field) if proto.HasField(field) else None


def _props(proto: Any) -> dict[str, str] | None:
    return {p.key: p.value for p in proto.metadata_props} or None


def _string(data: bytes) -> str | bytes:
    """Text, or the bytes where an exporter stored something else."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data
