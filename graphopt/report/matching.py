"""Which node of one graph is which node of another: by structure, never by name.

Keys of decreasing strictness are tried in turn: everything before a node and everything after it are the same; the one;
the other; the same weights; weights of the same shape; then outwards from pairs already made; then neighbourhoods.
Keys are numbers given to structures (hash consing), so that equal keys mean equal structures.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set

import onnx_ir as ir

from graphopt.ir import operators, values

_ANCHOR_ELEMENTS = 16
"""A constant of fewer elements (an epsilon, an axis) says little about which node it belongs to."""
_RADIUS = 3
_GRAPH_TYPES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two graphs.

    Attributes:
        graph: the graph.
        opsets: the opset imports that rule its nodes.
        labels: what values from outside the graph (inputs, captures) are called, the same on both sides.
    """

    graph: ir.Graph
    opsets: operators.Opsets
    labels: Mapping[ir.Value, Hashable]

    @functools.cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes that compute something: constants are data, in whichever form they are stored."""
        return tuple(node for node in self.graph if not is_constant_node(node))


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that the model stores for a value, constant or default of an input; None where it stores none."""
    if value is not None and value.is_initializer():
        return value.const_value
    return values.constant(value)


def is_constant_node(node: ir.Node) -> bool:
    """Whether the node is a `Constant`."""
    return node.op_type == "Constant" and not node.domain


def match(a: Side, b: Side) -> dict[ir.Node, ir.Node]:
    """Nodes of `a` and the nodes of `b` that they correspond to, in the order of `a`."""
    matcher = _Matcher(a, b)
    keys = Keys()
    exact_a, exact_b = keys.of(a), keys.of(b)
    matcher.pair(_joined(exact_a), _joined(exact_b))
    matcher.pair(exact_a.before, exact_b.before)
    matcher.pair(exact_a.after, exact_b.after)
    matcher.pair(_anchors(a, keys), _anchors(b, keys), only_equal_counts=True)
    matcher.pair(_shaped_alike(a), _shaped_alike(b), only_equal_counts=True)
    matcher.spread()
    loose_a, loose_b = keys.of(a, loose=True), keys.of(b, loose=True)
    matcher.pair(_joined(loose_a), _joined(loose_b), only_equal_counts=True)
    matcher.spread()
    matcher.pair(_neighbourhoods(a, keys), _neighbourhoods(b, keys), only_equal_counts=True)
    matcher.spread()
    matcher.spread(greedy=True)
    return {node: matcher.pairs[node] for node in a.nodes if node in matcher.pairs}


@dataclasses.dataclass(frozen=True)
class NodeKeys:
    """For each node of a graph, a number for all that it depends on, and one for all that depends on it."""

    before: dict[ir.Node, Hashable]
    after: dict[ir.Node, Hashable]


class Keys:
    """Gives equal numbers to equal structures."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._contents: dict[int, tuple[ir.TensorProtocol, Hashable]] = {}

    def of(self, side: Side, *, loose: bool = False) -> NodeKeys:
        """The keys of every node; `loose` leaves attributes and the contents of constants out."""
        before, _ = self._before(side, loose)
        return NodeKeys(before, self._after(side, loose))

    def number(self, structure: Hashable) -> int:
        """The number of a structure."""
        return self._numbers.setdefault(structure, len(self._numbers))

    def content(self, tensor: ir.TensorProtocol) -> Hashable:
        """A key that two tensors share if dtype, shape and elements are equal."""
        # The tensor is kept beside its key, so that its id stays its own.
        found = self._contents.get(id(tensor))
        if found is None:
            found = self._contents[id(tensor)] = (tensor, content_key(tensor))
        return found[1]

    def _before(
        self, side: Side, loose: bool
    ) -> tuple[dict[ir.Node, Hashable], dict[ir.Value, Hashable]]:
        made: dict[ir.Value, Hashable] = dict(side.labels)
        keys: dict[ir.Node, Hashable] = {}
        for node in side.nodes:
            inputs = [self._value(value, made, loose) for value in node.inputs]
            if operators.is_commutative(node):
                inputs.sort(key=repr)
            bodies = [self._body(inner, side, made, loose) for inner in operators.subgraphs(node)]
            structure = (_signature(node, side.opsets, loose), tuple(inputs), tuple(bodies))
            keys[node] = self.number(structure)
            made.update(
                (value, self.number((keys[node], index)))
                for index, value in enumerate(node.outputs)
            )
        return keys, made

    def _body(
        self, graph: ir.Graph, side: Side, made: Mapping[ir.Value, Hashable], loose: bool
    ) -> Hashable:
        labels = {**made, **{v: ("body input", i) for i, v in enumerate(graph.inputs)}}
        body = Side(graph, side.opsets, labels)
        _, inside = self._before(body, loose)
        return tuple(self._value(value, inside, loose) for value in graph.outputs)

    def _value(
        self, value: ir.Value | None, made: Mapping[ir.Value, Hashable], loose: bool
    ) -> Hashable:
        if value is None:
            return "absent"
        if value in made:
            return made[value]
        tensor = stored(value)
        if tensor is None:
            return "unknown"
        return "constant" if loose else self.content(tensor)

    def _after(self, side: Side, loose: bool) -> dict[ir.Node, Hashable]:
        places: defaultdict[ir.Value, list[int]] = defaultdict(list)
        for index, value in enumerate(side.graph.outputs):
            places[value].append(index)
        keys: dict[ir.Node, Hashable] = {}
        for node in reversed(side.nodes):
            users = tuple(
                (*(f"output {i}" for i in places[value]), *self._users(value, keys))
                for value in node.outputs
            )
            keys[node] = self.number(("after", _signature(node, side.opsets, loose), users))
        return keys

    def _users(self, value: ir.Value, keys: Mapping[ir.Node, Hashable]) -> list[str]:
        return sorted(
            f"{keys.get(user, user.op_type)}/{0 if operators.is_commutative(user) else index}"
            for user, index in value.uses()
        )


class _Matcher:
    """Pairs made so far."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        self.pairs: dict[ir.Node, ir.Node] = {}
        self.free_a = set(a.nodes)
        self.free_b = set(b.nodes)

    def pair(
        self,
        keys_a: Mapping[ir.Node, Hashable],
        keys_b: Mapping[ir.Node, Hashable],
        *,
        only_equal_counts: bool = False,
    ) -> None:
        """Pairs free nodes with equal keys, in order; groups of unequal size only if the key is strict."""
        groups: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
        for node in self.b.nodes:
            if node in keys_b and node in self.free_b:
                groups[keys_b[node]].append(node)
        wanted: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
        for node in self.a.nodes:
            if node in keys_a and node in self.free_a:
                wanted[keys_a[node]].append(node)
        for key, nodes in wanted.items():
            others = groups.get(key, [])
            if only_equal_counts and len(nodes) != len(others):
                continue
            for one, other in zip(nodes, others, strict=False):
                self._join(one, other)

    def spread(self, *, greedy: bool = False) -> None:
        """Pairs the neighbours of pairs, where operator and position agree, until none are left.

        Of several consumers that look the same, `greedy` pairs as many as there are, in order; else all or none.
        """
        queue = list(self.pairs.items())
        while queue:
            a, b = queue.pop()
            found = [*self._producers(a, b), *self._consumers(a, b, greedy)]
            for one, other in found:
                if one in self.free_a and other in self.free_b:
                    self._join(one, other)
                    queue.append((one, other))

    def _producers(self, a: ir.Node, b: ir.Node) -> Iterable[tuple[ir.Node, ir.Node]]:
        lefts = [None if value is None else value.producer() for value in a.inputs]
        rights = [None if value is None else value.producer() for value in b.inputs]
        aligned = list(zip(lefts, rights, strict=False))
        if operators.is_commutative(a) and len(lefts) == len(rights) == 2:
            aligned += zip(lefts, reversed(rights), strict=True)
        for one, other in aligned:
            if one is not None and other is not None and self._may_pair(one, other):
                yield one, other

    def _consumers(self, a: ir.Node, b: ir.Node, greedy: bool) -> Iterable[tuple[ir.Node, ir.Node]]:
        for left, right in zip(a.outputs, b.outputs, strict=False):
            ours = _by_use(left, self.free_a)
            theirs = _by_use(right, self.free_b)
            for key, users in ours.items():
                others = theirs.get(key, [])
                if greedy or len(users) == len(others):
                    yield from zip(users, others, strict=False)

    def _may_pair(self, one: ir.Node, other: ir.Node) -> bool:
        free = one in self.free_a and other in self.free_b
        return free and one.op_identifier() == other.op_identifier()

    def _join(self, one: ir.Node, other: ir.Node) -> None:
        self.pairs[one] = other
        self.free_a.remove(one)
        self.free_b.remove(other)


def _by_use(value: ir.Value, among: Set[ir.Node]) -> dict[Hashable, list[ir.Node]]:
    """The nodes of `among` that take a value, by operator and input."""
    found: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
    for user, index in value.uses():
        if user in among:
            position = 0 if operators.is_commutative(user) else index
            users = found[user.op_identifier(), position]
            if user not in users:
                users.append(user)
    return found


def content_key(tensor: ir.TensorProtocol) -> Hashable:
    """A key that two tensors share if dtype, shape and elements are equal."""
    digest = hashlib.blake2b(_bytes(tensor), digest_size=16).digest()
    return tensor.dtype.name, tuple(tensor.shape.numpy()), digest


def _bytes(tensor: ir.TensorProtocol) -> bytes:
    """The elements; strings, which have no fixed width, with their lengths."""
    if tensor.dtype != ir.DataType.STRING:
        return tensor.tobytes()
    return repr(tensor.numpy().reshape(-1).tolist()).encode()


def attribute_texts(node: ir.Node, opsets: operators.Opsets) -> dict[str, str]:
    """The attributes of a node but for graphs, by name, in words; the operator's defaults are left out."""
    schema = operators.schema(node, opsets)
    texts: dict[str, str] = {}
    for name, held in sorted(node.attributes.items()):
        if held.type in _GRAPH_TYPES:
            continue
        text = _attribute_text(held)
        if schema is None or text != _default_text(
            schema.name, schema.since_version, schema.domain, name
        ):
            texts[name] = text
    return texts


def attribute_default(node: ir.Node, opsets: operators.Opsets, name: str) -> str | None:
    """What the schema says that an attribute is where it is absent, in words; None where it says nothing."""
    schema = operators.schema(node, opsets)
    if schema is None:
        return None
    return _default_text(schema.name, schema.since_version, schema.domain, name)


def _attribute_text(held: ir.Attr) -> str:
    if held.is_ref():
        return f"@{held.ref_attr_name}"
    if held.type == ir.AttributeType.TENSOR:
        tensor = held.as_tensor()
        digest = hashlib.blake2b(_bytes(tensor), digest_size=4).hexdigest()
        return f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())} #{digest}"
    if held.type == ir.AttributeType.STRING:
        return repr(held.value)
    if isinstance(held.value, list | tuple):
        return f"[{', '.join(map(str, held.value))}]"
    return str(held.value)


@functools.lru_cache(maxsize=4096)
def _default_text(op_type: str, version: int, domain: str, name: str) -> str | None:
    schema = operators.find_schema(op_type, version, domain)
    held = None if schema is None else schema.attributes.get(name)
    if held is None or not held.default_value.name:
        return None
    return _attribute_text(ir.serde.deserialize_attribute(held.default_value))


def _signature(node: ir.Node, opsets: operators.Opsets, loose: bool) -> Hashable:
    if loose:
        return node.op_identifier()
    return node.op_identifier(), tuple(attribute_texts(node, opsets).items())


def _joined(keys: NodeKeys) -> dict[ir.Node, Hashable]:
    return {node: (before, keys.after[node]) for node, before in keys.before.items()}


def _anchors(side: Side, keys: Keys) -> dict[ir.Node, Hashable]:
    """Nodes known by their weights."""
    return {
        node: (node.op_identifier(), tuple(keys.content(tensor) for tensor in large))
        for node, large in _weighted(side)
    }


def _shaped_alike(side: Side) -> dict[ir.Node, Hashable]:
    """Nodes by their attributes and the shape of their first weight: folding changes its elements and adds biases."""
    return {
        node: (_signature(node, side.opsets, loose=False), tuple(large[0].shape.numpy()))
        for node, large in _weighted(side)
    }


def _weighted(side: Side) -> Iterator[tuple[ir.Node, list[ir.TensorProtocol]]]:
    """Nodes that take constants of some size, and those."""
    for node in side.nodes:
        tensors = [stored(value) for value in node.inputs]
        large = [t for t in tensors if t is not None and t.size >= _ANCHOR_ELEMENTS]
        if large:
            yield node, large


def _neighbourhoods(side: Side, keys: Keys) -> dict[ir.Node, Hashable]:
    """A number for the operators around each node (Weisfeiler-Lehman refinement, `_RADIUS` steps)."""
    colours: dict[ir.Node, Hashable] = {node: node.op_identifier() for node in side.nodes}
    for _ in range(_RADIUS):
        colours = {node: keys.number(_around(node, colours)) for node in side.nodes}
    return colours


def _around(node: ir.Node, colours: Mapping[ir.Node, Hashable]) -> Hashable:
    makers = [None if value is None else value.producer() for value in node.inputs]
    sources = tuple(str(colours.get(maker)) if maker is not None else "" for maker in makers)
    users = sorted(str(colours.get(user)) for value in node.outputs for user, _ in value.uses())
    return colours[node], sources, tuple(users)
