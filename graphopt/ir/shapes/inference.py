"""`Shapes`: what inference knows of a whole model, kept true while the model is rewritten."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from graphopt.ir import kernels, operators, scopes, values
from graphopt.ir.shapes.engine import Engine, Frame
from graphopt.ir.shapes.facts import UNKNOWN, Dims, Facts, SymbolicData


@dataclasses.dataclass(frozen=True)
class Conflict:
    """An output of the main graph whose declaration and inference contradict each other.

    The declaration stays in the model, the inferred facts are what `Shapes` answers.
    """

    output: str
    declared: str
    inferred: str


class Shapes:
    """Types, dimensions and small contents of every value of a model.

    Constructing it infers the whole model: main graph, subgraphs with the values that they capture,
    and functions as their calls use them. `update` keeps it true after a change. The model's own
    `value.type` and `value.shape` are kept in step: integers and the user's own dim_params, nothing
    else. What the file declares of intermediate values is replaced by what is inferred, and
    believed only where inference knows nothing (custom operators). Graph inputs and outputs stay as
    declared.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._engine = Engine(model.functions)
        self._main = Frame(model.opset_imports)
        self._bodies: dict[ir.Function, Frame] = {}
        self._levels: dict[ir.Node, int] = {}
        self._worded: dict[int, tuple[Dims, list[int | str | None]]] = {}
        self._infer_all()

    def dims(self, value: ir.Value) -> Dims | None:
        """The dimensions of a tensor, or None where the rank is not known or it is no tensor.

        A value that several calls of a function share has the dimensions on which all calls agree.
        """
        known = self._main.facts.get(value) or self._facts(value)
        return known.dims if known.type is None or isinstance(known.type, ir.TensorType) else None

    def data(self, value: ir.Value) -> SymbolicData | None:
        """The elements of a small tensor, each an integer or an expression of dimensions, or None."""
        return self._facts(value).data

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a tensor, or None."""
        known = self._facts(value)
        return known.dtype if known.is_tensor else None

    def facts(self, value: ir.Value) -> Facts:
        """Everything known of a value, containers included."""
        return self._facts(value)

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """The outputs of the main graph that contradict their declaration."""
        found = (self._conflict(value) for value in self._model.graph.outputs)
        return tuple(conflict for conflict in found if conflict is not None)

    def update(self, nodes: Iterable[ir.Node]) -> None:
        """Recomputes nodes that are new or changed and, from there, whatever their results change."""
        nodes = list(nodes)
        changed_functions = any(self._in_function(node) for node in nodes)
        seeds = [node for node in nodes if not self._in_function(node)]
        if changed_functions:
            everything = scopes.all_nodes(self._model.graph)
            seeds += [n for n in everything if n.op_identifier() in self._model.functions]
        self._propagate(seeds)
        if changed_functions:
            self._define_functions()

    def preview(
        self, nodes: Iterable[ir.Node], constants: Iterable[ir.Value], graph: ir.Graph
    ) -> None:
        """Infers nodes that no graph holds yet, in order, as if they and `constants` stood in `graph`.

        A rewrite is judged by what it would put into the model before it is made; `update` follows
        when it is, `forget` when it is not.
        """
        frame = self._frame(graph)
        held = [(value, value.const_value) for value in constants]
        for value, tensor in held:
            if tensor is not None:
                frame.facts[value] = self._engine.of_constant(value, tensor, passing=True)
        for node in nodes:
            for value, given in zip(node.outputs, self._engine.infer(frame, node), strict=True):
                frame.facts[value] = given
                self._write(value, given)
        for value, _ in held:  # once placed, they are found like any other
            frame.facts.pop(value, None)

    def agree(self, one: ir.Value, other: ir.Value) -> bool:
        """Whether the same is known of two values, so that nodes cannot tell them apart."""
        if values.is_constant(one) or values.is_constant(other):  # whose elements are known as well
            return False
        return self._facts(one) == self._facts(other)

    def placed(self, nodes: Iterable[ir.Node], users: Iterable[ir.Node], *, stale: bool) -> None:
        """Takes over what `preview` found of nodes that are in the model now, and of those that read their results.

        Args:
            nodes: the nodes, in order.
            users: what reads what they replace.
            stale: whether what is known of an operand of the users has changed.
        """
        if self._model.functions:
            self.update([*nodes, *users])
            return
        seeds = [node for node in nodes if not self._taken_over(node)]
        for user in users:
            self._level(user)
            if stale:
                seeds.append(user)
        if seeds:
            self._propagate(seeds)

    def _taken_over(self, node: ir.Node) -> bool:
        """Whether all that inference can say of a node was found before it was placed."""
        self._level(node)
        known = [self._main.facts.get(value, UNKNOWN) for value in node.outputs]
        if any(given.type is None or given.dims is None for given in known):
            return False  # where inference knows nothing, what the model declares counts
        if node.attributes.data and operators.has_subgraph(node):
            return False
        for value, given in zip(node.outputs, known, strict=True):
            if value.is_graph_output():  # it took over a declaration since
                self._write(value, given)
        return True

    def _frame(self, graph: ir.Graph) -> Frame:
        """The facts that hold in a graph: those of its function's body, or of the main graph."""
        if not self._bodies:
            return self._main
        root: ir.Graph | None = graph
        while root is not None and root in self._engine.owners:
            root = self._engine.owners[root].graph
        bodies = (frame for function, frame in self._bodies.items() if function.graph is root)
        return next(bodies, self._main)

    def _propagate(self, seeds: Iterable[ir.Node]) -> None:
        """Recomputes nodes in order of their level, and what depends on a result that changed."""
        queue: list[tuple[int, int, ir.Node]] = []
        order = itertools.count()
        waiting: set[ir.Node] = set()

        def push(node: ir.Node) -> None:
            if node not in waiting and node.graph is not None:
                waiting.add(node)
                heapq.heappush(queue, (self._level(node), next(order), node))

        for node in seeds:
            push(node)
        while queue:
            _, _, node = heapq.heappop(queue)
            waiting.discard(node)
            if node.graph is not None:
                for dependent in self._recompute(node):
                    push(dependent)

    def forget(self, node: ir.Node) -> None:
        """Drops what is known of a node that has been removed from the model."""
        self._levels.pop(node, None)
        for graph in operators.subgraphs(node):
            self._engine.owners.pop(graph, None)
        outputs = node.outputs
        for frame in (self._main, *self._bodies.values()) if self._bodies else (self._main,):
            frame.calls.pop(node, None)
            for value in outputs:
                frame.facts.pop(value, None)

    def _facts(self, value: ir.Value) -> Facts:
        """The facts in the main graph, else in the body of the function that has the value."""
        known = self._main.facts.get(value)
        if known is not None:
            return known
        for frame in self._bodies.values():
            if value in frame.facts:
                return frame.facts[value]
        return self._engine.lookup(self._main, value)

    def _infer_all(self) -> None:
        """Infers every graph and writes the results into the model."""
        graph = self._model.graph
        for value in graph.inputs:
            given = self._engine.declared(self._main, value)
            self._main.facts[value] = self._engine.completed(self._main, value, given)
        unsorted = [node for node in graph if self._infer(node)]
        if unsorted:
            self.update(scopes.topological(graph))
        for body in tuple(self._engine.owners):
            self._write_graph(self._main, body)
        self._define_functions()

    def _infer(self, node: ir.Node) -> bool:
        """Infers a node for the first time; whether an input had not been inferred before it."""
        known = self._main.facts
        early = False
        level = 0
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None:
                early = early or value not in known
                level = max(level, self._levels.get(producer, 0) + 1)
        self._levels[node] = level
        for value, given in zip(node.outputs, self._engine.infer(self._main, node), strict=True):
            known[value] = given
            self._write(value, given)
        return early

    def _recompute(self, node: ir.Node) -> Iterator[ir.Node]:
        """Infers a node again; yields the nodes that depend on a result that changed."""
        known = self._main.facts
        found = self._engine.infer(self._main, node)
        for graph in self._held(node):
            self._write_graph(self._main, graph)
        for value, given in zip(node.outputs, found, strict=True):
            if known.get(value) == given:
                self._write(value, given)
                continue
            known[value] = given
            self._write(value, given)
            for use in value.uses():
                yield use.node
            if value.is_graph_output() and value.graph in self._engine.owners:
                yield self._engine.owners[value.graph]

    def _held(self, node: ir.Node) -> Iterator[ir.Graph]:
        """Every graph within a node."""
        for graph in operators.subgraphs(node):
            for scope in scopes.nested(scopes.Scope(graph, {})):
                yield scope.graph

    def _level(self, node: ir.Node) -> int:
        """A number greater than that of every node it depends on, as far as that is known."""
        levels = self._levels
        level = levels.get(node, 0)
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None:
                level = max(level, levels.get(producer, 0) + 1)
        owners = self._engine.owners
        owner = owners.get(node.graph) if owners and node.graph is not None else None
        if owner is not None:
            level = max(level, levels.get(owner, 0))
        levels[node] = level
        return level

    def _in_function(self, node: ir.Node) -> bool:
        """Whether a node lies in the body of a function, or in a graph within one."""
        graph = node.graph
        while graph is not None and graph in self._engine.owners:
            graph = self._engine.owners[graph].graph
        return any(graph is function.graph for function in self._model.functions.values())

    def _define_functions(self) -> None:
        """Gives the body of each function the facts on which all its calls agree."""
        calls: dict[ir.OperatorIdentifier, list[Frame]] = {}
        stack = [self._main]
        while stack:
            frame = stack.pop()
            for node, called in frame.calls.items():
                calls.setdefault(node.op_identifier(), []).append(called)
                stack.append(called)
        for name, function in self._model.functions.items():
            self._bodies[function] = self._agreed(function, calls.get(name, []))
            for scope in scopes.nested(scopes.Scope(function.graph, function.opset_imports)):
                self._write_graph(self._bodies[function], scope.graph)

    def _agreed(self, function: ir.Function, frames: list[Frame]) -> Frame:
        """The frame of the only call or of equal calls, else one that knows only what they share."""
        first = frames[0] if frames else None
        if first is not None and all(_same_call(function, first, other) for other in frames[1:]):
            return first
        frame = Frame(function.opset_imports, kernels.UNBOUND)
        inputs = [
            _shared([other.facts.get(value, UNKNOWN) for other in frames])
            for value in function.inputs
        ]
        self._engine.define(frame, function, inputs)
        return frame

    def _write_graph(self, frame: Frame, graph: ir.Graph) -> None:
        """Writes the facts of the inputs of a body and of every value in it into the model."""
        for value in graph.inputs:
            self._write(value, frame.facts.get(value, UNKNOWN))
        for node in graph:
            self._levels.setdefault(node, 0)
            for value in node.outputs:
                self._write(value, frame.facts.get(value, UNKNOWN))

    def _write(self, value: ir.Value, given: Facts) -> None:
        """Puts type and shape into the model, in its own words; declared outputs stay."""
        kind, dims = value.type, given.dims
        kept = value.is_graph_output() and value.graph is self._model.graph
        if given.type is not None and kind != given.type and not (kept and kind):
            value.type = _copied(given.type)
        shape = value.shape
        if dims is None or (kept and shape is not None):
            return
        wanted = self._wording(dims)
        if shape is None or _words(shape) != wanted:
            value.shape = ir.Shape(wanted)

    def _wording(self, dims: Dims) -> list[int | str | None]:
        """The dims in the model's own words; nodes that are alike share the tuple, and so the answer."""
        known = self._worded.get(id(dims))
        if known is None:
            words = [dim.value if dim.value is not None else dim.symbol for dim in dims]
            known = self._worded[id(dims)] = dims, words  # kept, so that the identity stays theirs
        return known[1]

    def _conflict(self, value: ir.Value) -> Conflict | None:
        """The contradiction between declaration and inference of a graph output, or None."""
        known = self._facts(value)
        dtypes = known.dtype is None or value.dtype is None or known.dtype == value.dtype
        declared = value.shape
        if declared is None or known.dims is None:
            agree = True
        elif len(declared) != len(known.dims):
            agree = False
        else:
            pairs = zip(declared, known.dims, strict=True)
            agree = not any(isinstance(a, int) and a >= 0 and b.differs(a) for a, b in pairs)
        if dtypes and agree:
            return None
        words = None if declared is None else [_word(size) for size in declared]
        return Conflict(
            value.name or "", _typed(value.dtype, words), _typed(known.dtype, known.dims)
        )


def _word(size: int | ir.SymbolicDim) -> str:
    return str(size) if isinstance(size, int) else size.value or "?"


def _typed(dtype: ir.DataType | None, dims: Sequence[object] | None) -> str:
    return f"{dtype} " + ("of any shape" if dims is None else f"[{', '.join(map(str, dims))}]")


def _same_call(function: ir.Function, a: Frame, b: Frame) -> bool:
    """Whether two calls give a function the same inputs and parameters."""
    if a.bindings != b.bindings:
        return False
    return all(a.facts.get(value) == b.facts.get(value) for value in function.inputs)


def _shared(given: list[Facts]) -> Facts:
    """What all facts of a list say, symbols that belong to one of them left out."""
    if not given or any(one.type != given[0].type for one in given):
        return UNKNOWN
    dims = given[0].dims
    same = all(one.dims == dims for one in given)
    return Facts(given[0].type, dims if same else None)


def _words(shape: ir.Shape) -> list[int | str | None]:
    """A shape as it is written: integers, names, None."""
    return [size if isinstance(size, int) else size.value for size in shape]


def _copied(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    """A type that the model may own and change."""
    if isinstance(kind, ir.TensorType):
        return ir.TensorType(kind.dtype, denotation=kind.denotation)
    if isinstance(kind, ir.SequenceType):
        return ir.SequenceType(_copied(kind.elem_type), denotation=kind.denotation)
    if isinstance(kind, ir.OptionalType):
        return ir.OptionalType(_copied(kind.elem_type), denotation=kind.denotation)
    return kind
