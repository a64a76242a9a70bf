"""Walks over every graph of a model, functions included; captures, order, liveness.

`onnx_ir.Model.graphs()` leaves functions out, and a subgraph knows neither its parent nor its opset
imports: `Scope` says both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir import operators


@dataclasses.dataclass(frozen=True, eq=False)
class Scope:
    """One graph of a model and where it sits.

    Attributes:
        graph: the graph itself; for a function its body.
        opsets: the opset imports that rule its nodes.
        owner: the node that holds the graph, or None for the main graph and function bodies.
        parent: the scope of `owner`, or None.
        function: the function whose body this graph is or lies in, or None.
    """

    graph: ir.Graph
    opsets: operators.Opsets
    owner: ir.Node | None = None
    parent: Scope | None = None
    function: ir.Function | None = None

    @property
    def path(self) -> str:
        """Where the graph is, for messages: `main`, `main/If (cond)`, `function my::f/Loop (l)`."""
        if self.parent is not None and self.owner is not None:
            return f"{self.parent.path}/{operators.describe(self.owner)}"
        if self.function is not None:
            return f"function {self.function.domain}::{self.function.name}"
        return "main"

    @property
    def is_plain(self) -> bool:
        """Whether If, Loop, Scan and SequenceMap alone hold the graph.

        Others may want to find inputs of certain names in their graphs, or weights: BeamSearch of ONNX Runtime does.
        """
        scope: Scope | None = self
        while scope is not None and scope.owner is not None:
            if scope.owner.domain not in ("", "ai.onnx"):
                return False
            scope = scope.parent
        return True


def all_graphs(model: ir.Model) -> Iterator[Scope]:
    """Every graph of a model, outer before inner: the main graph first, functions last."""
    yield from nested(Scope(model.graph, model.opset_imports))
    for function in tuple(model.functions.values()):
        yield from nested(Scope(function.graph, function.opset_imports, function=function))


Row: TypeAlias = tuple[str, str, Sequence[ir.Value | None], Sequence[ir.Value]]
"""Operator, domain, inputs and outputs of a node: what everybody who walks over the nodes asks of each."""


class Census:
    """Every graph of a model with its nodes, as they are now: `all_graphs` for those who look at each node as well.

    Attributes:
        parts: each graph and its nodes, in the order of `all_graphs`.
        rows: what there is to say of those nodes, in the same order.
    """

    def __init__(self, model: ir.Model) -> None:
        parts: list[tuple[Scope, tuple[ir.Node, ...]]] = []
        rows: list[tuple[Row, ...]] = []
        bodies = [Scope(f.graph, f.opset_imports, function=f) for f in model.functions.values()]
        stack = [*reversed(bodies), Scope(model.graph, model.opset_imports)]
        while stack:
            scope = stack.pop()
            nodes = tuple(scope.graph)
            told = tuple([(n.op_type, n.domain, n.inputs, n.outputs) for n in nodes])
            parts.append((scope, nodes))
            rows.append(told)
            pairs = zip(nodes, told, strict=True)
            holders = [n for n, row in pairs if row[0] in operators.HOLDERS or row[1]]
            if holders:
                stack.extend(reversed(_held(scope, holders)))
        self.parts = tuple(parts)
        self.rows = tuple(rows)

    @property
    def size(self) -> int:
        """How many nodes there are."""
        return sum(len(nodes) for _, nodes in self.parts)

    @property
    def is_stale(self) -> bool:
        """Whether a graph has more or fewer nodes by now."""
        return any(len(scope.graph) != len(nodes) for scope, nodes in self.parts)


def nested(scope: Scope) -> Iterator[Scope]:
    """A scope and every scope within it, outer before inner, in the order of the nodes."""
    stack = [scope]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(reversed(_held(current, current.graph)))


def _held(scope: Scope, nodes: Iterable[ir.Node]) -> list[Scope]:
    """The scopes of the graphs that nodes of a scope hold."""
    return [
        dataclasses.replace(scope, graph=graph, owner=node, parent=scope)
        for node in nodes
        if node.op_type in operators.HOLDERS or node.domain
        for graph in operators.subgraphs(node)
    ]


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of every graph within it; a node before those it holds."""
    stack: list[Iterator[ir.Node]] = [iter(graph)]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        yield node
        if node.attributes:
            stack.extend(iter(inner) for inner in reversed(operators.subgraphs(node)))


def captures(graph: ir.Graph) -> tuple[ir.Value, ...]:
    """The values of outer graphs that a graph, or one within it, uses; in order of first use."""
    inside = _defined(graph)
    found: dict[ir.Value, None] = {}
    for node in all_nodes(graph):
        found.update((v, None) for v in node.inputs if v is not None and v not in inside)
    for inner in _with_subgraphs(graph):
        found.update((v, None) for v in inner.outputs if v not in inside)
    return tuple(found)


def dependencies(node: ir.Node) -> tuple[ir.Value, ...]:
    """What must be computed before the node: inputs and captures of its subgraphs, once each."""
    found: dict[ir.Value, None] = {v: None for v in node.inputs if v is not None}
    for graph in operators.subgraphs(node):
        found.update((v, None) for v in captures(graph))
    return tuple(found)


def is_sorted(graph: ir.Graph) -> bool:
    """Whether each node of the graph comes after everything it needs; subgraphs are not entered."""
    ours = set(graph)
    seen: set[ir.Node] = set()
    for node in graph:
        needed = (value.producer() for value in dependencies(node))
        if any(maker in ours and maker not in seen for maker in needed if maker is not None):
            return False
        seen.add(node)
    return True


def sort(graph: ir.Graph) -> None:
    """Puts each node of the graph and of its subgraphs after what it needs; stable.

    Raises:
        ModelError: the nodes depend on one another in a cycle.
    """
    if all(is_sorted(inner) for inner in _with_subgraphs(graph)):
        return
    try:
        graph.sort()
    except ValueError as error:
        raise ModelError(
            f"the nodes of graph {graph.name!r} depend on one another in a cycle: "
            "no runtime can order them"
        ) from error


def is_dead(node: ir.Node) -> bool:
    """Whether nothing uses any output of the node: no node, no subgraph, no graph output."""
    return not any(value.is_graph_output() or value.uses() for value in node.outputs)


def topological(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The nodes of one graph, each after those of them it needs; ties keep the order given.

    Raises:
        ModelError: the nodes depend on one another in a cycle.
    """
    pending = {node: position for position, node in enumerate(nodes)}
    ordered: list[ir.Node] = []
    done: set[ir.Node] = set()
    open_nodes: set[ir.Node] = set()
    for root in pending:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            makers = (value.producer() for value in dependencies(node))
            missing = [m for m in makers if m is not None and m in pending and m not in done]
            if not missing:
                done.add(node)
                open_nodes.discard(node)
                ordered.append(stack.pop())
                continue
            open_nodes.add(node)
            if any(maker in open_nodes for maker in missing):
                raise ModelError(
                    f"{operators.describe(node)} needs its own result: "
                    "a cycle that no runtime can order"
                )
            stack.extend(sorted(missing, key=pending.__getitem__, reverse=True))
    return ordered


def _with_subgraphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and every graph within it."""
    return (scope.graph for scope in nested(Scope(graph, {})))


def _defined(graph: ir.Graph) -> set[ir.Value]:
    """The values that the graph and the graphs within it define."""
    found: set[ir.Value] = set()
    for inner in _with_subgraphs(graph):
        found.update(inner.inputs)
        found.update(inner.initializers.values())
        for node in inner:
            found.update(node.outputs)
    return found
