"""The invariants that hold between passes, checked on the IR itself.

They cost a walk over the nodes, not over the weights.  What needs operator schemas is left to `onnx.checker`, which
sees every emitted file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import onnx_ir as ir

from graphopt.ir.operators import HOLDERS, describe, subgraphs
from graphopt.ir.scopes import Census, Row, Scope

Visible: TypeAlias = dict[str | None, ir.Value]


def violations(model: ir.Model, census: Census | None = None) -> Iterator[str]:
    """What is wrong with `model`, a sentence each; nothing for a sound one.

    `census` spares the walk over the model to whoever has just made one.

    Checked: a graph defines every name once, no node of a subgraph takes the name of an outer value, every use comes
    after its definition and within its scope, every value knows its producer, initializers hold a tensor and go by
    their own name, function bodies hold no initializers, graph outputs exist.

    An input or initializer of a subgraph may hide an outer value of its name: exporters write such models, onnx.checker
    and ONNX Runtime take them.  The hidden value must not be read inside.
    """
    census = census or Census(model)
    holding = {scope.parent for scope, _ in census.parts}
    for (scope, nodes), rows in zip(census.parts, census.rows, strict=True):
        if scope.parent is None and (scope in holding or not _is_flawless(scope, nodes, rows)):
            yield from _graph(scope, nodes, {})


def _is_flawless(scope: Scope, nodes: Iterable[ir.Node], rows: Iterable[Row]) -> bool:
    """Whether nothing is wrong with a graph whose nodes hold none: true of nearly all, and sooner told than what is."""
    if any(_initializers(scope)):
        return False
    graph = scope.graph
    given = {*graph.inputs, *graph.initializers.values()}
    names = [value.name for value in given]
    defined: set[ir.Value | None] = {None, *given}
    for node, (_, _, inputs, outputs) in zip(nodes, rows, strict=True):
        if node.graph is not graph or not defined.issuperset(inputs):
            return False
        for value in outputs:
            if value.producer() is not node:
                return False
            if name := value.name:
                names.append(name)
            elif value.uses() or value.is_graph_output():
                return False
        defined.update(outputs)
    taken = set(names)
    return len(taken) == len(names) and all(names) and defined.issuperset(graph.outputs)


def _graph(scope: Scope, nodes: Iterable[ir.Node], visible: Visible) -> Iterator[str]:
    """Checks one graph; `visible` is as before afterwards, so that no graph pays for the size of those around it."""
    graph = scope.graph
    own: Visible = {}
    hidden: Visible = {}
    yield from _initializers(scope)
    for value in dict.fromkeys((*graph.inputs, *graph.initializers.values())):
        if value.name in visible and value.name not in own:
            hidden[value.name] = visible.pop(value.name)
        yield from _define(value, visible, own, scope)
    for node in nodes:
        if not _is_sound(node, graph, visible):
            yield from _node(node, scope, visible)
        for value in node.outputs:
            name = value.name
            if name and name not in visible and value.producer() is node:
                visible[name] = own[name] = value
            else:
                yield from _output(value, node, visible, own, scope)
    for value in graph.outputs:
        if value.name not in visible or visible[value.name] is not value:
            yield f"{scope.path}: output {value.name!r} is not defined in reach"
    for name in own:
        del visible[name]
    visible.update(hidden)


def _initializers(scope: Scope) -> Iterator[str]:
    held = scope.graph.initializers
    if scope.function is not None and scope.parent is None and held:
        yield f"{scope.path}: a function body cannot hold initializers: {sorted(held)[:3]}"
    for name, value in held.items():
        if value.name != name:
            yield f"{scope.path}: initializer {name!r} calls itself {value.name!r}"
        if value.const_value is None and not value.is_graph_input():
            yield f"{scope.path}: initializer {name!r} has no tensor"
    yield from _repeated(scope.graph.inputs, f"{scope.path}: input")


def _repeated(values: Iterable[ir.Value], what: str) -> Iterator[str]:
    seen: set[ir.Value] = set()
    for value in values:
        if value in seen:
            yield f"{what} {value.name!r} is listed twice"
        seen.add(value)


def _is_sound(node: ir.Node, graph: ir.Graph, visible: Visible) -> bool:
    """Whether a node without graphs of its own knows where it is, and reads what is in reach: true of nearly all."""
    for value in node.inputs:
        if (
            value is not None and visible.get(value.name) is not value
        ):  # nothing is visible without a name
            return False
    return node.graph is graph and node.op_type not in HOLDERS and not node.domain


def _node(node: ir.Node, scope: Scope, visible: Visible) -> Iterator[str]:
    if node.graph is not scope.graph:
        yield f"{scope.path}: {describe(node)} does not know its graph"
    for value in node.inputs:
        if value is not None and (value.name is None or visible.get(value.name) is not value):
            yield (
                f"{scope.path}: {describe(node)} reads {value.name!r}, which is not defined before it; "
                "a pass moved or removed its producer"
            )
    for inner in subgraphs(node) if node.attributes else ():
        held = dataclasses.replace(scope, graph=inner, owner=node, parent=scope)
        yield from _graph(held, inner, visible)


def _output(
    value: ir.Value, node: ir.Node, visible: Visible, own: Visible, scope: Scope
) -> Iterator[str]:
    if value.producer() is not node:
        yield f"{scope.path}: output {value.name!r} of {describe(node)} names another producer"
    if value.name or value.uses() or value.is_graph_output():
        yield from _define(value, visible, own, scope)


def _define(value: ir.Value, visible: Visible, own: Visible, scope: Scope) -> Iterator[str]:
    if not value.name:
        yield f"{scope.path}: a value in use has no name"
        return
    if value.name in visible:
        where = "" if value.name in own else ", the first time in a graph around it"
        yield f"{scope.path}: {value.name!r} is defined twice{where}"
        if value.name not in own:
            return
    visible[value.name] = own[value.name] = value
