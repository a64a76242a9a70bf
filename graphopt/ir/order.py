"""Puts nodes in order, and names the nodes that cannot be."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.errors import ModelError


def sort_graph(graph: ir.Graph, where: str) -> None:
    """Sorts the nodes of a graph and of its subgraphs, otherwise keeping their order.

    Raises:
        ModelError: nodes feed one another in a circle.
    """
    try:
        graph.sort()
    except ValueError as error:
        raise ModelError(
            f"{where}: nodes feed one another in a circle: {_cycle(graph)}; the model is invalid, "
            "export it again"
        ) from error


def _cycle(graph: ir.Graph) -> str:
    """The nodes of one cycle, each before the one it takes from."""
    feeds = {node: _sources(node) for node in graph}
    while free := [node for node, sources in feeds.items() if not any(s in feeds for s in sources)]:
        for node in free:
            del feeds[node]
    path: list[ir.Node] = []
    node = next(iter(feeds))
    while node not in path:
        path.append(node)
        node = next(source for source in feeds[node] if source in feeds)
    names = [f"{n.op_type} {n.name or n.outputs[0].name}" for n in path[path.index(node) :]]
    return " <- ".join([*names, names[0]])


def _sources(node: ir.Node) -> list[ir.Node]:
    """The nodes that feed a node; what its subgraphs use counts as its own."""
    inner = [
        n
        for attribute in node.attributes.values()
        for g in _graphs(attribute)
        for n in g.all_nodes()
    ]
    values = [value for n in (node, *inner) for value in n.inputs if value is not None]
    return [producer for value in values if (producer := value.producer()) is not None]


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()
