"""One of everything: equal constants become one initializer, equal computations one node."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.scopes import Scope
from graphopt.ir.sparse import CooTensor
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, name_of, remove
from graphopt.rewrite.relink import can_take_over, place_constant, substitute

Key: TypeAlias = Hashable
Held: TypeAlias = tuple[Scope, ir.Value]

MAIN_DOMAINS = frozenset({"", "ai.onnx"})
PROBE_BYTES = 64
CHEAP = frozenset(
    {"Cast", "Constant", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"}
)
"""Operators that cost no more than the `Identity` that would replace them."""


@dataclasses.dataclass(frozen=True)
class MergeDuplicateConstants:
    """Keeps one initializer of each content: dtype, shape and bytes.

    Contents are hashed in pieces, mapped weights without becoming memory; only tensors whose dtype, shape, first,
    middle and last bytes agree are hashed at all.  A constant of a subgraph gives way to an equal one of the main
    graph; equal ones in several subgraphs move to the main graph.

    Before:  initializers a = [1, 2], b = [1, 2]   y = Mul(Add(x, a), b)
    After:   initializers a = [1, 2]               y = Mul(Add(x, a), a)
    Changes numerics: exact.  Leaves alone: graph outputs, overridable initializers, tensors that a quantization
    annotation names, function bodies (their `Constant` nodes merge as common subexpressions), graphs of custom
    operators.
    """

    name: ClassVar[str] = "merge-duplicate-constants"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for group in _equal_groups(_candidates(model, ctx)):
            changed = _merge_constants(group, model.graph, ctx) or changed
        return changed


def _candidates(model: ir.Model, ctx: Context) -> Iterator[Held]:
    """The initializers that may be exchanged for an equal one, outer graphs first."""
    named = ctx.annotated(model)
    for scope, _ in ctx.walk(model).parts:
        if scope.function is not None or not scope.is_plain:
            continue
        for value in scope.graph.initializers.values():
            bound = value.is_graph_input() or value.is_graph_output() or value.name in named
            if not bound and value.const_value is not None:
                yield scope, value


def _equal_groups(held: Iterable[Held]) -> Iterator[list[Held]]:
    """Groups of two or more with equal contents, in the order of their first members."""
    for group in _partition(held, lambda pair: _outline(_tensor(pair))):
        for alike in _partition(group, lambda pair: _probe(_tensor(pair))):
            yield from _partition(alike, lambda pair: digest(_tensor(pair)))


def _partition(held: Iterable[Held], key: Any) -> Iterator[list[Held]]:  # noqa: ANN401
    groups: dict[Key, list[Held]] = collections.defaultdict(list)
    for pair in held:
        groups[key(pair)].append(pair)
    return (group for group in groups.values() if len(group) > 1)


def _tensor(held: Held) -> ir.TensorProtocol:
    tensor = held[1].const_value
    assert tensor is not None
    return tensor


def _merge_constants(group: Sequence[Held], main: ir.Graph, ctx: Context) -> bool:
    (scope, kept), *others = group
    changed = False
    for other_scope, other in others:
        if not ctx.permit("duplicate-constant", other):
            continue
        if other_scope.graph is not scope.graph and scope.graph is not main:
            kept, scope = _move_to_main(kept, scope, main, ctx), Scope(main, scope.opsets)
        other.replace_all_uses_with(kept)
        del other_scope.graph.initializers[other.name or ""]
        changed = True
    return changed


def _move_to_main(value: ir.Value, scope: Scope, main: ir.Graph, ctx: Context) -> ir.Value:
    """Makes an initializer of a subgraph one of the main graph; siblings may use its name, so it gets a new one."""
    del scope.graph.initializers[value.name or ""]
    value.name = ctx.names.fresh(value.name or "constant")
    main.register_initializer(value)
    return value


def digest(tensor: ir.TensorProtocol) -> bytes:
    """A hash of dtype, shape and contents, bit by bit: 0.0 and -0.0 differ."""
    state = hashlib.blake2b(repr(_outline(tensor)).encode(), digest_size=16)
    for piece in _pieces(tensor):
        state.update(piece)
    return state.digest()


def _outline(tensor: ir.TensorProtocol) -> Key:
    """What tells most tensors apart without reading them."""
    return tensor.dtype.name, tuple(tensor.shape.numpy()), isinstance(tensor, CooTensor)


def _probe(tensor: ir.TensorProtocol) -> Key:
    """A few bytes of the contents."""
    if isinstance(tensor, CooTensor):
        return _probe(tensor.values), _probe(tensor.indices)
    if (
        tensor.dtype == ir.DataType.STRING
        or tensor.dtype.bitwidth < 8
        or tensor.nbytes <= PROBE_BYTES
    ):
        return b"".join(bytes(piece) for piece in _pieces(tensor))
    at = (0, tensor.nbytes // 2, tensor.nbytes - PROBE_BYTES)
    return b"".join(_bytes_at(tensor, offset) for offset in at)


def _bytes_at(tensor: ir.TensorProtocol, offset: int) -> bytes:
    """`PROBE_BYTES` of the contents; read past the mapping, where touching one byte brings in pages around it."""
    mapping = tensor.mapping if isinstance(tensor, MappedTensor) else None
    if mapping is not None:
        return b"".join(mapping[0].chunks(mapping[1] + offset, PROBE_BYTES))
    data = tensor.raw if isinstance(tensor, MappedTensor) else _raw(tensor)
    return bytes(data[offset : offset + PROBE_BYTES])


def _pieces(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The contents in pieces, so that no copy of a large weight is made."""
    if isinstance(tensor, CooTensor):
        yield from _pieces(tensor.values)
        yield from _pieces(tensor.indices)
    elif isinstance(tensor, MappedTensor):
        yield from tensor.chunks()
    elif tensor.dtype == ir.DataType.STRING:
        for text in tensor.numpy().reshape(-1).tolist():
            data = text.encode() if isinstance(text, str) else bytes(text)
            yield len(data).to_bytes(8, "little") + data
    elif tensor.dtype.bitwidth < 8:
        yield tensor.tobytes()
    else:
        yield _raw(tensor)


def _raw(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes of a tensor of whole-byte elements."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


@dataclasses.dataclass(frozen=True)
class MergeCommonSubexpressions:
    """Computes equal things once.

    Two nodes are equal when operator, attributes (defaults filled in, tensors by content, subgraphs by structure) and
    inputs (in any order where the operator allows it bit for bit) are.  A node in a subgraph also gives way to an
    equal one that comes before it in an enclosing graph.  An If whose branches are equal gets a constant condition, for
    control flow to be inlined.

    Before:  a = Exp(x)  b = Exp(x)  y = Add(a, b)
    After:   a = Exp(x)              y = Add(a, a)
    Changes numerics: exact.  Leaves alone: random operators, custom operators, calls of functions; pairs of graph
    outputs that an `Identity` would not make cheaper.
    """

    name: ClassVar[str] = "merge-common-subexpressions"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for scope, nodes in ctx.walk(model).parts:
            if scope.parent is None:
                merger = _Merger(scope.opsets, frozenset(model.functions), ctx)
                changed = merger.run(nodes) or changed
        return changed


class _Merger:
    """Walks a graph and its subgraphs in order; nodes stay in view until the graph that holds them ends."""

    def __init__(
        self, opsets: operators.Opsets, functions: frozenset[ir.OperatorIdentifier], ctx: Context
    ) -> None:
        self._keys = _Keys(opsets, functions)
        self._ctx = ctx
        self._known: dict[Key, ir.Node] = {}

    def run(self, nodes: Sequence[ir.Node]) -> bool:
        changed = False
        opened: list[Key] = []
        for node in nodes:
            for inner in operators.subgraphs(node):
                changed = self.run(tuple(inner)) or changed
            changed = self._decide(node) or changed
            key = self._keys.of(node)
            if key is None:
                continue
            kept = self._known.get(key)
            if kept is None:
                self._known[key] = node
                opened.append(key)
            else:
                changed = _merge_nodes(node, kept, self._ctx) or changed
        for key in opened:
            del self._known[key]
        return changed

    def _decide(self, node: ir.Node) -> bool:
        """Fixes the condition of an If that computes the same either way."""
        if node.op_type != "If" or node.domain not in MAIN_DOMAINS or not node.inputs:
            return False
        condition, branches = node.inputs[0], operators.subgraphs(node)
        if condition is None or values.is_constant(condition) or len(branches) != 2:
            return False
        one, two = (self._keys.of_branch(branch) for branch in branches)
        if one != two or not self._ctx.permit("equal-branches", node):
            return False
        name = self._ctx.names.fresh(f"{name_of(node)}_condition")
        # A node: in a function body nothing else will do, elsewhere it goes with the If.
        chosen = place_constant(np.array(True), name, node, as_node=True, ctx=self._ctx)
        node.replace_input_with(0, chosen)
        self._ctx.shapes.update([node])
        return True


def _merge_nodes(node: ir.Node, kept: ir.Node, ctx: Context) -> bool:
    """Replaces `node` by `kept`, which dominates it; at most one output may need an `Identity`."""
    graph = node.graph
    assert graph is not None
    pairs = list(zip(node.outputs, kept.outputs, strict=True))
    copies = sum(not can_take_over(old, new, graph) for old, new in pairs)
    if copies > 1 or (copies and node.op_type in CHEAP and not node.domain):
        ctx.missed(
            "common-subexpression",
            node,
            f"equal to {operators.describe(kept)}, but both are graph outputs and a copy would cost as much",
        )
        return False
    if not ctx.permit("common-subexpression", node):
        return False
    users = dict.fromkeys(use.node for old in node.outputs for use in old.uses())
    made = [substitute(old, new, node, "common-subexpression", ctx) for old, new in pairs]
    remove(node, ctx)
    ctx.shapes.update([*filter(None, made), *users])
    return True


class _Keys:
    """Gives equal nodes equal keys.  Values are numbered as they are met, so keys are short."""

    def __init__(
        self, opsets: operators.Opsets, functions: frozenset[ir.OperatorIdentifier]
    ) -> None:
        self._opsets = opsets
        self._functions = functions
        self._numbers: dict[ir.Value | None, int] = {}
        self._pure: dict[Key, bool] = {}

    def of(self, node: ir.Node) -> Key | None:
        """The key of a node, or None where it may not be merged."""
        return self._node(node, {}) if self._is_pure(node) else None

    def _is_pure(self, node: ir.Node) -> bool:
        """Asked once of nodes that have neither attributes nor a mode to tell them apart."""
        if node.attributes.data or node.op_type == "Dropout":
            return operators.is_pure(node, self._opsets, self._functions)
        kind = *node.op_identifier(), node.version
        known = self._pure.get(kind)
        if known is None:
            known = operators.is_pure(node, self._opsets, self._functions)
            self._pure[kind] = known
        return known

    def of_branch(self, graph: ir.Graph) -> Key:
        """What a branch computes, whatever types it declares for its results."""
        count, nodes, ends = self._graph(graph, {})
        return count, nodes, tuple(end[0] for end in ends)

    def _node(self, node: ir.Node, local: dict[ir.Value, Key]) -> Key:
        given = list(node.inputs)
        while given and given[-1] is None:  # to leave an input out is the same as to name none
            given.pop()
        if local:
            inputs = [self._value(value, local) for value in given]
        else:
            numbers = self._numbers
            inputs = [numbers.setdefault(value, len(numbers)) for value in given]
        if len(inputs) == 2 and _commutes(node):
            inputs.sort(key=repr)
        outputs = tuple(bool(value.name) for value in node.outputs)
        attributes = tuple(
            (name, self._attribute(held, local)) for name, held in self._attributes(node)
        )
        return *node.op_identifier(), node.version, tuple(inputs), outputs, attributes

    def _value(self, value: ir.Value | None, local: dict[ir.Value, Key]) -> Key:
        if value is not None and value in local:
            return local[value]
        return self._numbers.setdefault(value, len(self._numbers))

    def _attributes(self, node: ir.Node) -> Iterator[tuple[str, Any]]:
        """Attributes by name, those that are absent with their defaults."""
        version = operators.opset(node, self._opsets) or 0
        held = node.attributes.data  # the dictionary within, without the cost of its view
        for name, default in _defaults(node.op_type, version, node.domain, tuple(held)):
            yield name, held.get(name, default)

    def _attribute(self, held: object, local: dict[ir.Value, Key]) -> Key:
        if isinstance(held, (str, int, float)) or not isinstance(held, ir.Attr):
            return _plain(held)
        if held.is_ref():
            return "ref", held.ref_attr_name
        if held.type == ir.AttributeType.GRAPH:
            return self._graph(held.as_graph(), local)
        if held.type == ir.AttributeType.GRAPHS:
            return tuple(self._graph(graph, local) for graph in held.as_graphs())
        return _plain(held.value)

    def _graph(
        self, graph: ir.Graph, outer: dict[ir.Value, Key]
    ) -> tuple[int, tuple[Key, ...], tuple[tuple[Key, str, str], ...]]:
        """The structure of a subgraph: its own values by position, captured ones by their numbers outside."""
        local = dict(outer)
        prefix = f"{len(outer)}"
        for value in graph.inputs:
            local[value] = f"{prefix}.{len(local)}", str(value.type)
        for value in graph.initializers.values():
            if value.const_value is not None and not value.is_graph_input():
                local[value] = digest(value.const_value)
        nodes = []
        for node in graph:
            nodes.append(self._node(node, local))
            for value in node.outputs:
                local[value] = f"{prefix}.{len(local)}"
        ends = tuple((self._value(v, local), str(v.type), str(v.shape)) for v in graph.outputs)
        return len(graph.inputs), tuple(nodes), ends


def _commutes(node: ir.Node) -> bool:
    """Whether both orders give the same bits: runtimes settle `Max(0.0, -0.0)` by position."""
    if node.op_type in ("Max", "Min"):
        dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
        return dtype is not None and dtype.is_integer()
    return operators.is_commutative(node)


@functools.lru_cache(maxsize=4096)
def _defaults(
    op_type: str, version: int, domain: str, given: tuple[str, ...]
) -> tuple[tuple[str, Any], ...]:
    """The attributes that a node has or its schema has a default for, by name; None where the node has one."""
    schema = operators.find_schema(op_type, version, domain)
    named = (
        {name: operators.default_of(schema, name) for name in schema.attributes} if schema else {}
    )
    found = {name: default for name, default in named.items() if default is not None}
    return tuple(sorted({**found, **dict.fromkeys(given)}.items()))


def _plain(held: object) -> Key:
    """A hashable form of an attribute's value; floats as text, so that NaN equals NaN and 0.0 differs from -0.0."""
    if isinstance(
        held, (str, int, bytes)
    ):  # most are: asking for a protocol first takes longer than all the rest
        return held
    if isinstance(held, float):
        return "float", repr(held)
    if isinstance(held, (tuple, list)):
        return tuple(_plain(each) for each in held)
    if isinstance(held, ir.TensorProtocol):
        return digest(held)
    if isinstance(held, ir.TypeAndShape):
        return str(held.type), str(held.shape)
    return repr(held)
