"""Fingerprints of a model that do not depend on names: what it computes, and with which numbers.

A node's colour is a hash of its operator, attributes and the colours of its inputs. Constants of one form
look alike to it, so colours are computed twice: the second time a constant brings along what becomes of
it, all the way down, and `Add(a, a)` differs from `Add(a, b)`. A graph is the multiset of its nodes'
colours with its inputs and outputs in order: the order of independent nodes does not count.
Source: colour refinement (Weisfeiler and Leman, 1968) on a directed acyclic graph, once up and once down.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir

from graphopt.ir.message import tensor_chunks
from graphopt.ir.notes import canonical_domain
from graphopt.ir.sparse import CooTensor
from graphopt.ir.type_proto import write_type


def structural(model: ir.Model) -> str:
    """Returns the SHA-256 of a model's operators, attributes, wiring, dtypes, opsets and functions.

    Names count only for inputs and outputs of the model. Constants count with dtype and shape, their elements for
    `weights`. Documentation, metadata, producer and versions of the file do not count.
    """
    colors = _Colors(model)
    functions = sorted(colors.functions)
    opsets = sorted(f"{domain}:{version}" for domain, version in _opsets(model.graph.opset_imports))
    inputs = [f"{value.name}:{_typed(value)}" for value in model.graph.inputs]
    outputs = [f"{value.name}:{_typed(value)}" for value in model.graph.outputs]
    return _digest(["model", colors.main, *functions, "|", *opsets, "|", *inputs, "|", *outputs])


def weights(model: ir.Model) -> str:
    """Returns the SHA-256 of the elements of all constants, each with its place in the structure.

    Two models with equal `structural` and `weights` compute the same; swapped weights differ. Tensors are streamed.
    """
    colors = _Colors(model)
    return _digest(sorted(_digest([color, _content(tensor)]) for color, tensor in colors.constants))


@dataclasses.dataclass
class _Round:
    """The colours of one round; a seed says what becomes of a value that no other value feeds."""

    seeds: dict[ir.Value, str]
    values: dict[ir.Value, str] = dataclasses.field(default_factory=dict)
    nodes: dict[ir.Node, str] = dataclasses.field(default_factory=dict)
    constants: list[tuple[str, ir.TensorProtocol]] = dataclasses.field(default_factory=list)


class _Colors:
    """Colours of a model: of its main graph, of its functions, and of the place of each constant."""

    def __init__(self, model: ir.Model) -> None:
        first = _Round({})
        self._model(model, first)
        second = _Round(_fates(model, first))
        self.main, self.functions = self._model(model, second)
        self.constants = second.constants

    @staticmethod
    def _model(model: ir.Model, state: _Round) -> tuple[str, list[str]]:
        functions = [_function(function, state) for function in model.functions.values()]
        return _graph(model.graph, state), functions


def _function(function: ir.Function, state: _Round) -> str:
    opsets = [f"{domain}:{version}" for domain, version in _opsets(function.opset_imports)]
    declared = [
        _attribute(attribute, state, "function") for attribute in function.attributes.values()
    ]
    return _digest(
        [
            "function",
            *function.identifier(),
            *opsets,
            *sorted(declared),
            _graph(function.graph, state),
        ]
    )


def _graph(graph: ir.Graph, state: _Round) -> str:
    for index, value in enumerate(graph.inputs):
        state.values[value] = _digest(["input", str(index), _typed(value)])
    for value in graph.initializers.values():
        if value.const_value is not None:
            given = state.values.get(value, "")  # an input with a default
            color = _digest([given, _form(value.const_value), state.seeds.get(value, "")])
            state.values[value] = color
            state.constants.append((color, value.const_value))
    for node in graph:
        _node(node, state)
    outputs = [_color(value, state) for value in graph.outputs]
    # A dead initializer is no part of the structure's nodes, but it is part of the file.
    initializers = [
        state.values[v] for v in graph.initializers.values() if v.const_value is not None
    ]
    return _digest(
        [
            "graph",
            *(state.values[value] for value in graph.inputs),
            "|",
            *outputs,
            "|",
            *sorted(state.nodes[node] for node in graph),
            "|",
            *sorted(initializers),
        ]
    )


def _node(node: ir.Node, state: _Round) -> None:
    inputs = ["" if value is None else _color(value, state) for value in node.inputs]
    while inputs and not inputs[-1]:
        inputs.pop()
    place = _digest(
        [*node.op_identifier(), *inputs, *(state.seeds.get(value, "") for value in node.outputs)]
    )
    attributes = sorted(
        _attribute(attribute, state, place) for attribute in node.attributes.values()
    )
    color = _digest(["node", place, *attributes])
    state.nodes[node] = color
    for index, value in enumerate(node.outputs):
        state.values[value] = _digest([color, str(index), value.dtype.name if value.dtype else ""])


def _color(value: ir.Value, state: _Round) -> str:
    return state.values.get(value, "undefined")


def _attribute(attribute: ir.Attr, state: _Round, place: str) -> str:
    head = [attribute.name, attribute.type.name]
    if attribute.is_ref():
        return _digest([*head, "ref", attribute.ref_attr_name or ""])
    return _digest([*head, *_attribute_value(attribute, state, place)])


def _attribute_value(attribute: ir.Attr, state: _Round, place: str) -> Iterator[str]:
    kind, value = attribute.type, attribute.value
    several = value if isinstance(value, (tuple, list)) else (value,)
    for index, item in enumerate(several):
        if isinstance(item, ir.Graph):
            yield _graph(item, state)
        elif isinstance(item, ir.TypeAndShape):
            proto = onnx.TypeProto()
            write_type(proto, item)
            yield proto.SerializeToString(deterministic=True).hex()
        elif isinstance(item, ir.TensorProtocol):
            color = _digest([place, attribute.name, str(index), _form(item)])
            state.constants.append((color, item))
            yield color
        else:
            yield f"{kind.name}:{item!r}"


def _fates(model: ir.Model, state: _Round) -> dict[ir.Value, str]:
    """For each value that no other value feeds: which nodes use it, and what becomes of their outputs."""
    below: dict[ir.Node, str] = {}
    fates: dict[ir.Value, str] = {}
    _descend(model.graph, "main", state, below, fates)
    for function in model.functions.values():
        _descend(function.graph, ":".join(function.identifier()), state, below, fates)
    return fates


def _descend(
    graph: ir.Graph, seed: str, state: _Round, below: dict[ir.Node, str], fates: dict[ir.Value, str]
) -> None:
    leaves: dict[ir.Value, list[str]] = {}
    for index, value in enumerate(graph.outputs):
        leaves.setdefault(value, []).append(_digest([seed, str(index)]))

    def fate(value: ir.Value) -> str:
        uses = [_digest([below.get(use.node, ""), str(use.idx)]) for use in value.uses()]
        return _digest(sorted([*uses, *leaves.get(value, ())]))

    for node in reversed(graph):
        below[node] = _digest([state.nodes[node], *map(fate, node.outputs)])
        for name, attribute in sorted(node.attributes.items()):
            for index, inner in enumerate(_graphs(attribute)):
                _descend(inner, _digest([below[node], name, str(index)]), state, below, fates)
        if not any(node.inputs):
            fates.update((value, fate(value)) for value in node.outputs)
    fates.update((value, fate(value)) for value in (*graph.inputs, *graph.initializers.values()))


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    several = attribute.value if isinstance(attribute.value, (tuple, list)) else (attribute.value,)
    return [graph for graph in several if isinstance(graph, ir.Graph)]


def _form(tensor: ir.TensorProtocol) -> str:
    carrier = "sparse" if isinstance(tensor, CooTensor) else "dense"
    return f"{carrier}:{tensor.dtype.name}:{list(tensor.shape.numpy())}"


def _content(tensor: ir.TensorProtocol) -> str:
    """The hash of the elements; of a sparse tensor, of its parts."""
    if isinstance(tensor, CooTensor):
        return _digest(
            [_content(tensor.values), hashlib.sha256(tensor.positions().tobytes()).hexdigest()]
        )
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return _digest(repr(text) for text in _strings(tensor))
    digest = hashlib.sha256()
    for chunk in tensor_chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def _strings(tensor: ir.TensorProtocol) -> list[bytes | str]:
    return list(tensor.numpy().reshape(-1).tolist()) if tensor.dtype == ir.DataType.STRING else []


def _typed(value: ir.Value) -> str:
    proto = onnx.TypeProto()
    write_type(proto, ir.TypeAndShape(value.type, value.shape))
    return bytes(proto.SerializeToString(deterministic=True)).hex()


def _opsets(opsets: dict[str, int]) -> list[tuple[str, int]]:
    return sorted((canonical_domain(domain), version) for domain, version in opsets.items())


def _digest(parts: Iterable[str]) -> str:
    """One hash of several strings; none can run into its neighbour."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
