"""The way back from graphsurgeon: a graph that a script changed becomes a model again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.util import misc

from graphopt.errors import ModelError
from graphopt.ir import operators, scopes
from graphopt.ir.surgeon_values import PLAIN, Description, data_type, shared_source, tensor_of

_DEFAULT_IR_VERSION = 10


def from_surgeon(graph: gs.Graph, *, like: ir.Model | None = None) -> ir.Model:
    """The model that a graphsurgeon graph describes, its nodes in order.

    Args:
        graph: the graph, perhaps one that `to_surgeon` made and a script changed.
        like: the model that it was made from; what graphsurgeon cannot say is taken from there.

    Raises:
        ModelError: the graph is not a valid model: a tensor that no node of the graph produces, a name with two
            meanings, a cycle, an attribute or dtype that ONNX lacks.
    """
    known = {} if like is None else {(f.domain, f.name): f for f in like.functions.values()}
    functions = [_from_function(f, known.get((f.domain, f.name))) for f in graph.functions]
    opsets = _opsets(graph, {} if like is None else like.opset_imports)
    frame = _Frame("main", opsets, None if like is None else like.graph)
    model = ir.Model(
        frame.build(graph),
        ir_version=graph.ir_version or (_DEFAULT_IR_VERSION if like is None else like.ir_version),
        producer_name=graph.producer_name or None,
        producer_version=graph.producer_version or None,
        functions=functions,
    )
    if like is not None:
        model.domain, model.model_version = like.domain, like.model_version
        model.doc_string = like.doc_string
        model.metadata_props.update(like.metadata_props)
        model.meta.update(like.meta)
        model.device_configurations = like.device_configurations
    return model


def _from_function(function: gs.Function, like: ir.Function | None) -> ir.Function:
    where = f"function {function.domain}::{function.name}"
    opsets = _opsets(function, {} if like is None else like.opset_imports)
    frame = _Frame(where, opsets, None if like is None else like.graph, is_function=True)
    attributes = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None)
        if value is None
        else _from_attribute(
            name, value, None if like is None else like.attributes.get(name), where
        )
        for name, value in function.attrs.items()
    ]
    return ir.Function(
        function.domain or "", function.name, graph=frame.build(function), attributes=attributes
    )


def _opsets(graph: gs.Graph, like: Mapping[str, int]) -> dict[str, int]:
    """The imports: those of the graph; for domains that only its nodes know, the former ones, else version 1."""
    held = graph.import_domains
    found = {"": graph.opset} if held is None else {_domain(i.domain): i.version for i in held}
    for node in _all_nodes(graph):
        domain = _domain(node.domain)
        found.setdefault(domain, like.get(domain, 1 if domain else graph.opset))
    return found


def _domain(domain: str | None) -> str:
    return "" if domain in (None, "ai.onnx") else str(domain)


def _all_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    for node in graph.nodes:
        yield node
        for inner in node.subgraphs():
            yield from _all_nodes(inner)


@dataclasses.dataclass
class _Frame:
    """One graph being made: the values that names mean in it, and the graph around it."""

    where: str
    opsets: dict[str, int]
    like: ir.Graph | None = None
    outer: _Frame | None = None
    is_function: bool = False
    values: dict[str, ir.Value] = dataclasses.field(default_factory=dict)
    sources: dict[str, gs.Tensor] = dataclasses.field(default_factory=dict)
    initializers: list[ir.Value] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._known = {} if self.like is None else {v.name: v for v in _defined(self.like)}
        self._former = {} if self.like is None else _by_output(self.like)

    def build(self, graph: gs.Graph) -> ir.Graph:
        """Makes the graph.

        Values come before nodes: a script may have appended nodes in any order, and subgraphs look outwards.
        """
        inputs = [self._input(tensor) for tensor in graph.inputs]
        outputs = [[self._output(tensor, node) for tensor in node.outputs] for node in graph.nodes]
        nodes = [self._node(n, out) for n, out in zip(graph.nodes, outputs, strict=True)]
        results = [self.resolve(tensor, "graph output") for tensor in graph.outputs]
        if any(value is None for value in results):
            raise ModelError(
                f"{self.where}: a graph output has no name; name it before the graph is returned"
            )
        constants = (
            [_constant_node(value) for value in self.initializers] if self.is_function else []
        )
        made = ir.Graph(
            inputs,
            [self._replaced(value, constants) for value in results if value is not None],
            nodes=[*constants, *nodes],
            initializers=() if self.is_function else self.initializers,
            doc_string=graph.doc_string or None,
            opset_imports=self.opsets if self.outer is None else {},
            name=graph.name,
            metadata_props=None if self.like is None else dict(self.like.metadata_props),
        )
        if self.like is not None:
            made.meta.update(self.like.meta)
            made.name = self.like.name if graph.name == (self.like.name or "graph") else graph.name
        scopes.sort(made)
        return made

    def resolve(self, tensor: gs.Tensor, reader: str) -> ir.Value | None:
        """The value that a tensor means here; None for an omitted one.

        Raises:
            ModelError: nothing defines it, or two different tensors have its name.
        """
        if tensor.is_empty():
            return None
        for frame in self._chain():
            if tensor.name in frame.values:
                _check_same(tensor, frame.sources[tensor.name], frame.where)
                return frame.values[tensor.name]
        if isinstance(tensor, gs.Constant):
            return self._home(tensor.name).constant(tensor)
        raise ModelError(
            f"{self.where}: {reader} reads {tensor.name!r}, which no node of the graph produces; append its producer "
            "to graph.nodes, or make it a graph input"
        )

    def _chain(self) -> Iterator[_Frame]:
        frame: _Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.outer

    def _home(self, name: str) -> _Frame:
        """Where a constant belongs: in the graph that held it before, else in this one."""
        held = (f for f in self._chain() if f.like is not None and name in f.like.initializers)
        return next(held, self)

    def constant(self, tensor: gs.Constant) -> ir.Value:
        """Makes `tensor` an initializer here."""
        known = self._known.get(tensor.name)
        made = tensor_of(tensor, None if known is None else known.const_value)
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(made.shape.numpy()),
            type=ir.TensorType(made.dtype),
            const_value=made,
        )
        self._keep(value, tensor, known)
        self.initializers.append(value)
        return value

    def _input(self, tensor: gs.Tensor) -> ir.Value:
        value = self._define(tensor, "a graph input")
        known = self._known.get(tensor.name)
        if isinstance(tensor, gs.Constant):
            value.const_value = tensor_of(tensor, None if known is None else known.const_value)
        elif known is not None and known.is_initializer() and known.is_graph_input():
            value.const_value = known.const_value
        if value.const_value is not None:
            self.initializers.append(value)
        return value

    def _output(self, tensor: gs.Tensor, node: gs.Node) -> ir.Value:
        if tensor.is_empty():
            return ir.Value(name="")
        if isinstance(tensor, gs.Constant):
            raise ModelError(
                f"{self.where}: constant {tensor.name!r} is also an output of {_say(node)}; clear its .inputs, then it "
                "stands for itself"
            )
        return self._define(tensor, _say(node))

    def _define(self, tensor: gs.Tensor, definer: str) -> ir.Value:
        if tensor.name in self.values:
            raise ModelError(
                f"{self.where}: {tensor.name!r} is defined twice, the second time by {definer}; give every tensor a "
                "name of its own"
            )
        value = ir.Value(name=tensor.name)
        known = self._known.get(tensor.name)
        said = Description.of_tensor(tensor)
        if known is not None and said == Description.of_value(known):
            value.type = known.type
            value.shape = None if known.shape is None else known.shape.copy()
        else:
            said.describe(value)
        self._keep(value, tensor, known)
        return value

    def _keep(self, value: ir.Value, tensor: gs.Tensor, known: ir.Value | None) -> None:
        if known is not None:
            value.doc_string = known.doc_string
            value.metadata_props.update(known.metadata_props)
            value.meta.update(known.meta)
        self.values[tensor.name] = value
        self.sources[tensor.name] = tensor

    def _node(self, node: gs.Node, outputs: Sequence[ir.Value]) -> ir.Node:
        former = self._former.get(next((v.name for v in outputs if v.name), None))
        if former is not None and (former.op_type, former.domain) != (
            node.op,
            _domain(node.domain),
        ):
            former = None
        made = ir.Node(
            _domain(node.domain),
            node.op,
            [self.resolve(tensor, _say(node)) for tensor in node.inputs],
            [self._attribute(name, value, node, former) for name, value in node.attrs.items()],
            outputs=outputs,
            name=node.name or None,
        )
        if former is not None:
            made.version, made.doc_string = former.version, former.doc_string
            made.name = former.name if (former.name or "") == node.name else made.name
            made.metadata_props.update(former.metadata_props)
            made.meta.update(former.meta)
            made.device_configurations = former.device_configurations
        return made

    def _attribute(
        self,
        name: str,
        value: Any,  # noqa: ANN401
        node: gs.Node,
        former: ir.Node | None,
    ) -> ir.Attr:
        held = None if former is None else former.attributes.get(name)
        if isinstance(value, gs.Graph):
            inner = (
                held.as_graph()
                if held is not None and held.type == ir.AttributeType.GRAPH
                else None
            )
            where = f"{self.where}/{_say(node)}"
            return ir.AttrGraph(name, _Frame(where, self.opsets, inner, self).build(value))
        version = self.opsets.get(_domain(node.domain), 0)
        schema = operators.find_schema(node.op, version, _domain(node.domain)) if version else None
        declared = None if schema is None else schema.attributes.get(name)
        kind = None if declared is None else ir.AttributeType(declared.type.value)  # type: ignore[attr-defined]
        return _from_attribute(name, value, held, f"{self.where}, {_say(node)}", kind)

    @staticmethod
    def _replaced(value: ir.Value, constants: Sequence[ir.Node]) -> ir.Value:
        """The output of the `Constant` node that stands for a function's constant."""
        return next((n.outputs[0] for n in constants if n.outputs[0].name == value.name), value)


def _from_attribute(
    name: str,
    value: Any,  # noqa: ANN401
    held: ir.Attr | None,
    where: str,
    kind: ir.AttributeType | None = None,
) -> ir.Attr:
    """The attribute that a graphsurgeon value means: the former one where nothing changed.

    Raises:
        ModelError: ONNX has no attribute for such a value.
    """
    if isinstance(value, ir.Attr):
        return value
    if isinstance(value, bytes):
        return ir.Attr(name, ir.AttributeType.STRING, _text(value))
    if isinstance(value, gs.Node.AttributeRef):
        reference = ir.AttributeType(misc.convert_to_onnx_attr_type(value.type))
        return ir.RefAttr(name, value.name, reference)
    if held is not None and not held.is_ref() and _unchanged(held, value):
        return held
    if isinstance(value, gs.Constant):
        former = held.value if held is not None and held.type == ir.AttributeType.TENSOR else None
        tensor = tensor_of(value, former)
        return held if held is not None and tensor is former else ir.AttrTensor(name, tensor)
    try:
        return ir.convenience.convert_attribute(name, _typed(_plain(value, where), kind), kind)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{where}: attribute {name!r} is {value!r}, which ONNX has no attribute type for"
            + ("" if kind is None else f"; {kind.name} was expected")
        ) from error


def _unchanged(held: ir.Attr, value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, gs.Constant):
        return held.type == ir.AttributeType.TENSOR and shared_source(value) is held.value
    if held.type not in PLAIN:
        return False
    if isinstance(held.value, tuple):
        return (
            isinstance(value, list)
            and value == list(held.value)
            and all(type(a) is type(b) for a, b in zip(value, held.value, strict=True))
        )
    return type(value) is type(held.value) and bool(value == held.value)


def _typed(value: Any, kind: ir.AttributeType | None) -> Any:  # noqa: ANN401
    """The value itself; onnx_ir would take an empty list for integers.

    Raises:
        ValueError: nothing says what the elements of an empty list are.
    """
    if kind is None and value == []:
        raise ValueError("an empty list has no element type")
    return value


def _text(value: bytes) -> str | bytes:
    """The text, or the bytes of what is none: contexts of execution providers are kept in such attributes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _plain(value: Any, where: str) -> Any:  # noqa: ANN401
    """A value that `convert_attribute` takes: no NumPy, no types."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, type | np.dtype):
        dtype = data_type(value, where)
        return None if dtype is None else int(dtype)
    if isinstance(value, list | tuple):
        return [_plain(each, where) for each in value]
    return value


def _defined(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _by_output(graph: ir.Graph) -> dict[str | None, ir.Node]:
    named = ((next((v.name for v in node.outputs if v.name), None), node) for node in graph)
    return {name: node for name, node in named if name is not None}


def _constant_node(value: ir.Value) -> ir.Node:
    """A `Constant` node for a constant of a function body, which cannot hold initializers."""
    assert value.const_value is not None
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)], name=None)
    output = node.outputs[0]
    output.name, output.type, output.shape = value.name, value.type, value.shape
    value.replace_all_uses_with(output)
    return node


def _check_same(tensor: gs.Tensor, known: gs.Tensor, where: str) -> None:
    """Refuses two tensors of one name: graphsurgeon would write one and lose the other without a word."""
    if tensor is known:
        return
    constants = [isinstance(each, gs.Constant) for each in (tensor, known)]
    same = not any(constants) or (
        all(constants) and tensor._values is known._values  # noqa: SLF001
    )
    if not same:
        raise ModelError(
            f"{where}: two different tensors are called {tensor.name!r} ({type(known).__name__} and "
            f"{type(tensor).__name__}); give each a name of its own"
        )


def _say(node: gs.Node) -> str:
    label = node.name or next((f"-> {t.name}" for t in node.outputs if t.name), "unnamed")
    return f"{node.op} ({label})"
