"""Whole branches of residual sums: which can go, and the model without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.shapes import Shapes
from graphopt_passes.prune.layers import Layer

Aims = dict[str, str]
"""By name of a value that stays, which value of the original it now stands for: the sum after it, whose branch went."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """One summand of a residual sum.

    Attributes:
        total: name of the sum.
        index: which input of it goes.
        layers: names of the weights that go with it.
    """

    total: str
    index: int
    layers: frozenset[str]


def find_branches(graph: ir.Graph, layers: Sequence[Layer], shapes: Shapes) -> list[Branch]:
    """The summands that can go: as large as the sum is without them, and made by layers that make nothing else."""
    by_node = {layer.node: layer for layer in layers}
    found = []
    for node in graph:
        if not _is_sum(node):
            continue
        for index in (0, 1):
            gone = _made_for(node, index)
            names = frozenset(by_node[each].name for each in gone if each in by_node)
            if names and _stays_as_large(node, index, shapes):
                found.append(Branch(node.outputs[0].name or "", index, names))
    return found


def drop_branches(model: ir.Model, branches: Collection[Branch]) -> Aims:
    """Takes branches out of the main graph in place; what each value that stays then stands for.

    What stands for a sum can be fitted to it: what goes is partly made up for by the layer before.
    """
    aims: Aims = {}
    wanted = {branch.total: branch for branch in branches}
    for node in tuple(model.graph):
        branch = wanted.get(node.outputs[0].name or "") if node.outputs else None
        if branch is None or node.graph is None:
            continue
        gone, other = _made_for(node, branch.index), node.inputs[1 - branch.index]
        assert other is not None
        kept = _before_relu(other, node)
        if kept is not None:
            aims[kept.name or ""] = branch.total
        _replace(node, other)
        for dead in (node, *reversed([each for each in model.graph if each in gone])):
            _remove(model.graph, dead)
    return aims


def _is_sum(node: ir.Node) -> bool:
    """Whether a node adds two activations."""
    two = node.op_type == "Add" and not node.domain and len(node.inputs) == 2
    both = [v for v in node.inputs if v is not None and not values.is_constant(v)]
    return (
        two and len(both) == 2 and both[0] is not both[1] and not node.outputs[0].is_graph_output()
    )


def _made_for(node: ir.Node, index: int) -> set[ir.Node]:
    """The nodes from which nothing follows but one input of a node."""
    gone: set[ir.Node] = set()
    stack = [node.inputs[index]]
    while stack:
        value = stack.pop()
        maker = None if value is None else value.producer()
        if maker is None or maker in gone or not _is_spare(maker, node, index, gone):
            continue
        gone.add(maker)
        stack.extend(maker.inputs)
    return gone


def _is_spare(maker: ir.Node, node: ir.Node, index: int, gone: set[ir.Node]) -> bool:
    return (
        all(
            not output.is_graph_output()
            and all(user in gone or (user is node and at == index) for user, at in output.uses())
            for output in maker.outputs
        )
        and maker.graph is node.graph
    )


def _stays_as_large(node: ir.Node, index: int, shapes: Shapes) -> bool:
    other = node.inputs[1 - index]
    before = None if other is None else shapes.dims(other)
    return before is not None and before == shapes.dims(node.outputs[0])


def _before_relu(other: ir.Value, node: ir.Node) -> ir.Value | None:
    """What stands for the sum from now on; None where something else reads it as well."""
    gone = _made_for(node, 1 - list(node.inputs).index(other))
    if any(user is not node and user not in gone for user, _ in other.uses()):
        return None
    maker = other.producer()
    after = [user for user, _ in node.outputs[0].uses()]
    if maker is not None and maker.op_type == "Relu" and [u.op_type for u in after] == ["Relu"]:
        before = maker.inputs[0]
        return before if before is not None and len(before.uses()) == 1 else None
    return other


def _replace(node: ir.Node, other: ir.Value) -> None:
    """Lets the readers of a sum read its other summand; a second Relu of it goes."""
    maker = other.producer()
    for user, at in tuple(node.outputs[0].uses()):
        user.replace_input_with(at, other)
        if user.op_type == "Relu" and maker is not None and maker.op_type == "Relu":
            out = user.outputs[0]
            if not out.is_graph_output():
                for reader, place in tuple(out.uses()):
                    reader.replace_input_with(place, other)
                _remove(_graph(user), user)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Removes a node that nothing reads, with the initializers that it alone has read."""
    read = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in read:
        if (
            value.is_initializer()
            and not value.uses()
            and not value.is_graph_output()
            and not value.is_graph_input()
        ):
            graph.initializers.pop(value.name or "", None)
