"""Runs the rules over graphs: facts of values, symbols for what is unknown, bodies and function calls.

A *frame* holds the facts of one activation: the main graph with all its subgraphs, or one call of a
function. A function that is called twice has two frames, as if it were inlined.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt.ir import kernels, operators, values
from graphopt.ir.shapes import (
    containers,
    contrib,
    control,
    elements,
    elementwise,
    facts,
    linear,
    movement,
    networks,
    reductions,
    schema,
    views,
)
from graphopt.ir.shapes.dim import Dim, Kind, Symbol
from graphopt.ir.shapes.facts import FOLLOWED, UNKNOWN, Array, Dims, Facts
from graphopt.ir.shapes.likeness import Inputs, Likeness, likeness_of
from graphopt.ir.shapes.query import Query, Rule, Rules

STANDARD: Rules = {
    **elementwise.RULES,
    **views.RULES,
    **movement.RULES,
    **reductions.RULES,
    **linear.RULES,
    **networks.RULES,
    **containers.RULES,
    **contrib.UNLISTED,
}

_COUNTED = FOLLOWED & facts.INTEGRAL
_MAX_SYMBOLS = 8  # unknown elements of a tensor that get a symbol each: more is no shape
_MAX_CALLS = 64  # nesting of function calls; a deeper one calls itself


@dataclasses.dataclass(eq=False)
class Frame:
    """The facts of one activation of a graph with all its subgraphs.

    Attributes:
        opsets: the opset imports that rule its nodes.
        bindings: what the call gives the parameters of the function.
        depth: how many repeated bodies and calls surround it.
        facts: what is known of each value.
        calls: the frame of each call made from here.
        symbols: what stands for axes and elements that are not known.
        alike: the facts that nodes of each likeness were found to give.
    """

    opsets: operators.Opsets
    bindings: Mapping[str, ir.Attr] = dataclasses.field(default_factory=dict)
    depth: int = 0
    facts: dict[ir.Value, Facts] = dataclasses.field(default_factory=dict)
    calls: dict[ir.Node, Frame] = dataclasses.field(default_factory=dict)
    symbols: dict[tuple[ir.Value, int, Kind], Dim] = dataclasses.field(default_factory=dict)
    alike: dict[Likeness, Sequence[Facts]] = dataclasses.field(default_factory=dict)


class Engine:
    """Infers nodes and graphs of one model.

    Attributes:
        owners: for each subgraph seen, the node that holds it.
    """

    def __init__(self, functions: Mapping[ir.OperatorIdentifier, ir.Function]) -> None:
        self.functions = functions
        self.owners: dict[ir.Graph, ir.Node] = {}
        self._depths: dict[ir.Graph, int] = {}
        self._symbol_depths: dict[Symbol, int] = {}
        self._constants: dict[ir.Value, tuple[ir.TensorProtocol, Facts]] = {}
        self._numbers = itertools.count()
        self._asked = 0  # how often a symbol was
        self._nesting = 0

    def lookup(self, frame: Frame, value: ir.Value) -> Facts:
        """The facts of a value; those of constants are found when first asked for."""
        known = frame.facts.get(value)
        if known is not None:
            return known
        tensor = values.constant(value)
        return UNKNOWN if tensor is None else self.of_constant(value, tensor)

    def of_constant(
        self, value: ir.Value, tensor: ir.TensorProtocol, *, passing: bool = False
    ) -> Facts:
        """The facts of a constant, found once; of one that may be dropped again only a small one is kept."""
        cached = self._constants.get(value)
        if cached is not None and cached[0] is tensor:
            return cached[1]
        found = facts.of_tensor(tensor)
        if not passing or found.data is not None:
            self._constants[value] = (tensor, found)
        return found

    def infer(self, frame: Frame, node: ir.Node) -> Sequence[Facts]:
        """The facts of each output of a node, from the facts of its inputs."""
        function = self.functions.get(node.op_identifier()) if self.functions else None
        if function is not None:
            query = self._query(frame, node, self._inputs(frame, node))
            outputs: Sequence[Facts] = _filled(self._call(frame, query, function), node)
        elif node.op_type == "Constant" and not node.domain:
            return [self._constant(frame, node)]
        else:
            outputs = self._of_operator(frame, node)
        return [
            given
            if given.type is not None
            and given.dims is not None
            and (given.data is not None or len(given.dims) > 1)
            else self.completed(frame, value, _or_declared(self, frame, value, given))
            for value, given in zip(node.outputs, outputs, strict=True)
        ]

    def _of_operator(self, frame: Frame, node: ir.Node) -> Sequence[Facts]:
        """What an operator gives of itself: the same for every node that cannot be told from this one.

        Models are made of blocks that repeat, so most nodes were seen before.  A symbol belongs to one value, so what
        holds a new one is found for each node anew.
        """
        inputs = self._inputs(frame, node)
        version = operators.opset(node, frame.opsets) or 0
        reads_dims = node.op_type in elementwise.RULES and not node.domain
        likeness = likeness_of(node, version, inputs, reads_dims=reads_dims)
        known = None if likeness is None else frame.alike.get(likeness)
        if known is not None:
            return known
        asked = self._asked
        query = self._query(frame, node, inputs)
        outputs = _filled(self._by_rule(frame, query), node)
        outputs = self._with_elements(frame, query, outputs)
        if likeness is not None and self._asked == asked:
            frame.alike[likeness] = outputs
        return outputs

    def run_graph(self, frame: Frame, graph: ir.Graph) -> None:
        """Infers every node of a graph, in order."""
        for node in graph:
            for value, given in zip(node.outputs, self.infer(frame, node), strict=True):
                frame.facts[value] = given

    def completed(self, frame: Frame, value: ir.Value, given: Facts) -> Facts:
        """The facts with a symbol for each element of a small integer tensor that is not known."""
        if given.data is not None or given.dims is None or len(given.dims) > 1:
            return given
        if given.dtype not in _COUNTED or not given.is_tensor:
            return given
        shape = tuple(dim.value for dim in given.dims)
        sizes = [size for size in shape if size is not None]
        count = sizes[0] if sizes else 1
        if len(sizes) < len(shape) or count > _MAX_SYMBOLS:
            return given
        kind = Kind.FLAG if given.dtype == ir.DataType.BOOL else Kind.ELEMENT
        held = [self.symbol(frame, value, index, kind) for index in range(count)]
        data = facts.SymbolicData.of(held, given.dtype)
        data = facts.SymbolicData(data.array.reshape(sizes), given.dtype)
        return Facts(given.type, given.dims, data)

    def symbol(self, frame: Frame, value: ir.Value, index: int, kind: Kind) -> Dim:
        """The symbol that stands for an axis or an element of a value, the same each time."""
        self._asked += 1
        key = (value, index, kind)
        known = frame.symbols.get(key)
        if known is None:
            symbol = Symbol(f"?{next(self._numbers)}", kind)
            known = frame.symbols[key] = Dim.named(symbol.name, kind)
            self._symbol_depths[symbol] = self._depth(frame, value)
        return known

    def declared(self, frame: Frame, value: ir.Value) -> Facts:
        """The facts that the model itself states of a value, each unknown dimension a symbol."""
        kind = value.type
        if isinstance(kind, ir.TensorType):  # types are mutable: the model's own stay its own
            kind = facts.tensor_type(kind.dtype)
        container = isinstance(kind, ir.SequenceType)  # whose tensors a name does not tie together
        if value.shape is None or (container and not value.shape.is_static()):
            return Facts(kind)
        dims = []
        for axis, size in enumerate(value.shape):
            name = None if isinstance(size, int) else size.value
            if isinstance(size, int) and size >= 0:
                dims.append(Dim.of(size))
            elif name:
                dims.append(Dim.named(name))
            else:
                dims.append(self.symbol(frame, value, axis, Kind.AXIS))
        return Facts(kind, tuple(dims))

    def define(self, frame: Frame, function: ir.Function, inputs: Sequence[Facts]) -> None:
        """Infers the body of a function from the facts of its inputs."""
        for value, given in itertools.zip_longest(function.inputs, inputs, fillvalue=UNKNOWN):
            if isinstance(value, ir.Value) and isinstance(given, Facts):
                frame.facts[value] = self.completed(frame, value, given)
        self.run_graph(frame, function.graph)

    def _inputs(self, frame: Frame, node: ir.Node) -> Inputs:
        """The facts of the inputs of a node."""
        known, lookup = frame.facts.get, self.lookup
        return tuple([None if v is None else known(v) or lookup(frame, v) for v in node.inputs])

    def _query(self, frame: Frame, node: ir.Node, inputs: Inputs) -> Query:
        """A node with the facts of its inputs."""
        version = operators.opset(node, frame.opsets) or 0
        operation = kernels.Operation(node, version, frame.bindings)

        def fresh(output: int, axis: int) -> Dim:
            return self.symbol(frame, node.outputs[output], axis, Kind.AXIS)

        return Query(operation, inputs, fresh)

    def _constant(self, frame: Frame, node: ir.Node) -> Facts:
        """The facts of a Constant node."""
        tensor = values.constant(node.outputs[0])
        if tensor is None and frame.bindings is not kernels.UNBOUND:  # a parameter of the function
            for name in node.attributes:
                bound = kernels.Operation(node, 0, frame.bindings).held(name)
                tensor = None if bound is None else values.constant_of_attribute(name, bound)
        return UNKNOWN if tensor is None else facts.of_tensor(tensor)

    def _with_elements(self, frame: Frame, query: Query, outputs: list[Facts]) -> list[Facts]:
        """The outputs with their elements, where they are small and can be followed."""
        if not any(_is_followed(given) for given in outputs):
            return outputs
        try:
            arrays = elements.follow(query)
        except kernels.REFUSALS:
            return outputs
        if arrays is None:
            return outputs
        triples = zip(query.node.outputs, outputs, arrays, strict=False)
        found = [self._with_array(frame, *triple) for triple in triples]
        return found + outputs[len(found) :]

    def _with_array(
        self, frame: Frame, value: ir.Value, given: Facts, array: Array | None
    ) -> Facts:
        """The facts of a tensor with its elements; an unknown integer becomes a symbol."""
        if array is None or given.dtype is None or not _is_followed(given):
            return given
        held = array.reshape(-1).tolist()
        if None in held:
            if given.dtype.is_floating_point():
                return given
            kind = Kind.FLAG if given.dtype == ir.DataType.BOOL else Kind.ELEMENT
            held = [
                self.symbol(frame, value, i, kind) if e is None else e for i, e in enumerate(held)
            ]
            array = facts.object_array(held, array.shape)
        return facts.of_data(facts.SymbolicData.of_array(array, given.dtype))

    def _by_rule(self, frame: Frame, query: Query) -> Sequence[Facts] | None:
        """The facts by the rule of the operator, else by onnx, else None."""
        rule = _rule(query.node)
        held = rule is None and operators.has_subgraph(query.node)
        try:
            if held:
                return control.infer(query, _Bodies(self, frame, query.node))
            found = None if rule is None else rule(query)
        except kernels.REFUSALS:
            found = None
        try:
            return schema.infer(query, frame.opsets) if found is None and not held else found
        except kernels.REFUSALS:
            return None

    def _call(self, frame: Frame, query: Query, function: ir.Function) -> Sequence[Facts] | None:
        """The facts of a call, as if the function were inlined."""
        if self._nesting >= _MAX_CALLS:
            return None
        try:
            bindings = _bindings(function, query.operation)
        except kernels.REFUSALS:  # passes on a parameter of a body that nobody calls
            return None
        self._nesting += 1
        called = frame.calls.get(query.node)
        if called is None or called.bindings != bindings:
            depth = self._depth(frame, query.node.outputs[0]) if query.node.outputs else 0
            called = Frame(function.opset_imports, bindings, depth)
            frame.calls[query.node] = called
        self.define(called, function, [given or UNKNOWN for given in query.inputs])
        self._nesting -= 1
        return [self.lookup(called, value) for value in function.outputs]

    def _depth(self, frame: Frame, value: ir.Value) -> int:
        """How many repeated bodies surround a value."""
        producer = value.producer()
        graph = value.graph if producer is None else producer.graph
        return frame.depth + (0 if graph is None else self._depths.get(graph, 0))

    def is_outer(self, frame: Frame, graph: ir.Graph, dim: Dim) -> bool:
        """Whether a dim means the same outside a repeated body as in it."""
        limit = frame.depth + self._depths.get(graph, 0)
        return all(self._symbol_depths.get(symbol, 0) < limit for symbol in dim.symbols())

    def enter(self, node: ir.Node, graph: ir.Graph, *, repeated: bool) -> None:
        """Notes which node holds a body, and how many repeated bodies surround it."""
        outer = 0 if node.graph is None else self._depths.get(node.graph, 0)
        self.owners[graph] = node
        self._depths[graph] = outer + repeated


@dataclasses.dataclass(frozen=True)
class _Bodies:
    """The engine as the rules of control flow see it."""

    engine: Engine
    frame: Frame
    node: ir.Node

    def run(self, graph: ir.Graph, inputs: Sequence[Facts], *, repeated: bool) -> Sequence[Facts]:
        self.engine.enter(self.node, graph, repeated=repeated)
        for value, given in zip(graph.inputs, inputs, strict=False):
            typed = given if given.type is not None else given._replace(type=value.type)
            self.frame.facts[value] = self.engine.completed(self.frame, value, typed)
        self.engine.run_graph(self.frame, graph)
        return [self.engine.lookup(self.frame, value) for value in graph.outputs]

    def completed(self, value: ir.Value, given: Facts) -> Facts:
        return self.engine.completed(self.frame, value, given)

    def joined(self, value: ir.Value, a: Facts, b: Facts) -> Facts:
        kind = a.type if a.type is not None and a.type == b.type else (a.type or b.type)
        if a.type is not None and b.type is not None and a.type != b.type:
            return Facts(value.type)  # an optional that the loop fills: what it declares holds
        data = a.data if a.data == b.data else None
        if a.dims is None or b.dims is None or len(a.dims) != len(b.dims):
            return Facts(kind)
        if not isinstance(kind, ir.TensorType) and a.dims != b.dims:
            return Facts(kind)
        return Facts(kind, self._joined_dims(value, a.dims, b.dims), data)

    def is_outer(self, graph: ir.Graph, dim: Dim) -> bool:
        return self.engine.is_outer(self.frame, graph, dim)

    def _joined_dims(self, value: ir.Value, a: Dims, b: Dims) -> Dims:
        pairs = enumerate(zip(a, b, strict=True))
        return tuple(
            x if x == y else self.engine.symbol(self.frame, value, axis, Kind.AXIS)
            for axis, (x, y) in pairs
        )


def _rule(node: ir.Node) -> Rule | None:
    """The rule of an operator, or None."""
    if not node.domain:
        return STANDARD.get(node.op_type)
    return contrib.RULES.get(node.op_type) if node.domain == operators.MICROSOFT else None


def _filled(found: Sequence[Facts] | None, node: ir.Node) -> list[Facts]:
    """The facts of every output of a node, of which fewer or more may have been found."""
    return [*(found or ()), *[UNKNOWN] * len(node.outputs)][: len(node.outputs)]


def _is_followed(given: Facts) -> bool:
    """Whether the elements of a tensor may matter and are not known yet."""
    return given.data is None and (given.dtype in FOLLOWED) and given.is_tensor


def _or_declared(engine: Engine, frame: Frame, value: ir.Value, given: Facts) -> Facts:
    """The facts; where inference knows nothing, the declared type, and of a custom operator the shape.

    A declared shape of an operator that has rules is not believed: where the rules cannot tell, it
    is a trace of the exporter's example input more often than not.
    """
    if given.type is not None and given.dims is not None:
        return given
    producer = value.producer()
    opaque = producer is not None and _rule(producer) is None and _schema(frame, producer) is None
    declared = engine.declared(frame, value)
    kind = declared.type if given.type is None else given.type
    dims = declared.dims if opaque and given.dims is None else given.dims
    return Facts(kind, dims, given.data)


def _schema(frame: Frame, node: ir.Node) -> object | None:
    """The schema of an operator, or None for one that onnx does not know."""
    return operators.schema(node, frame.opsets)


def _bindings(function: ir.Function, call: kernels.Operation) -> Mapping[str, ir.Attr]:
    """The values of a function's parameters in a call: its attributes, else their defaults."""
    found = {}
    for name, default in function.attributes.items():
        given = call.held(name)
        if given is not None:
            found[name] = given
        elif default.type != ir.AttributeType.UNDEFINED:
            found[name] = default
    return found
