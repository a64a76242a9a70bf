"""The invariants that hold between passes, checked on the IR itself.

They cost a walk over the nodes, not over the weights.  What needs operator schemas is left to `onnx.checker`, which
sees every emitted file.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt.ir.operators import describe, subgraphs
from graphopt.ir.scopes import Scope, all_graphs


def violations(model: ir.Model) -> Iterator[str]:
    """What is wrong with `model`, a sentence each; nothing for a sound one.

    Checked: every name is defined once and not redefined in a subgraph, every use comes after its definition and
    within its scope, every value knows its producer, initializers hold a tensor, function bodies hold no
    initializers, graph outputs exist.
    """
    for scope in all_graphs(model):
        if scope.parent is None:
            yield from _graph(scope.graph, scope, {})


def _graph(graph: ir.Graph, scope: Scope, outer: dict[str, ir.Value]) -> Iterator[str]:
    visible = dict(outer)
    if scope.function is not None and not outer and graph.initializers:
        yield f"{scope.path}: a function body cannot hold initializers: {sorted(graph.initializers)[:3]}"
    for name, value in graph.initializers.items():
        if value.const_value is None and not value.is_graph_input():
            yield f"{scope.path}: initializer {name!r} has no tensor"
    inputs = dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    for value in inputs:
        yield from _define(value, visible, scope)
    for node in graph:
        yield from _node(node, graph, scope, visible)
    for value in graph.outputs:
        if value.name not in visible or visible[value.name] is not value:
            yield f"{scope.path}: output {value.name!r} is not defined in reach"


def _node(
    node: ir.Node,
    graph: ir.Graph,
    scope: Scope,
    visible: dict[str, ir.Value],
) -> Iterator[str]:
    if node.graph is not graph:
        yield f"{scope.path}: {describe(node)} does not know its graph"
    for value in node.inputs:
        if value is not None and (value.name is None or visible.get(value.name) is not value):
            yield (
                f"{scope.path}: {describe(node)} reads {value.name!r}, which is not defined before it; "
                "a pass moved or removed its producer"
            )
    for inner in subgraphs(node):
        yield from _graph(inner, scope, visible)
    for value in node.outputs:
        if value.producer() is not node:
            yield f"{scope.path}: output {value.name!r} of {describe(node)} names another producer"
        if value.name or value.uses() or value.is_graph_output():
            yield from _define(value, visible, scope)


def _define(value: ir.Value, visible: dict[str, ir.Value], scope: Scope) -> Iterator[str]:
    if not value.name:
        if value.producer() is None or value.uses() or value.is_graph_output():
            yield f"{scope.path}: a value in use has no name"
        return
    if value.name in visible:
        yield f"{scope.path}: {value.name!r} is defined twice"
    visible[value.name] = value
