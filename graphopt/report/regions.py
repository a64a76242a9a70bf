"""Groups nodes that only one of two graphs has, and puts side by side what stands in the same place."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping

import onnx_ir as ir

from graphopt.ir import operators
from graphopt.report.matching import Side


@dataclasses.dataclass(frozen=True)
class Region:
    """Neighbouring nodes of the first graph and those of the second in their place; either may be empty."""

    removed: tuple[ir.Node, ...]
    added: tuple[ir.Node, ...]


def replacements(a: Side, b: Side, pairs: Mapping[ir.Node, ir.Node]) -> list[Region]:
    """What `a` has and `b` has not, and the reverse, in the order of `a`, then of `b`.

    Two regions stand in the same place when a paired node, or an output of the graph, takes its input from both.
    """
    groups = _Groups()
    removed = [node for node in a.nodes if node not in pairs]
    taken = set(pairs.values())
    added = [node for node in b.nodes if node not in taken]
    numbers: dict[ir.Node, Hashable] = {}
    for number, (one, other) in enumerate(pairs.items()):
        numbers[one] = numbers[other] = number
    for side, nodes in ((a, removed), (b, added)):
        outputs: dict[ir.Value, list[int]] = defaultdict(list)
        for index, value in enumerate(side.graph.outputs):
            outputs[value].append(index)
        inside = set(nodes)
        for node in nodes:
            groups.add(node)
            for place in _places(node, inside, numbers, outputs):
                groups.join(node, place)
    in_a = set(removed)
    found: dict[Hashable, tuple[list[ir.Node], list[ir.Node]]] = {}
    for node in (*removed, *added):
        found.setdefault(groups.root(node), ([], []))[node not in in_a].append(node)
    return [Region(tuple(gone), tuple(new)) for gone, new in found.values()]


def _places(
    node: ir.Node,
    inside: set[ir.Node],
    numbers: Mapping[ir.Node, Hashable],
    outputs: Mapping[ir.Value, Iterable[int]],
) -> Iterator[Hashable]:
    """The neighbours of a node in its region, and the places outside that take what it computes."""
    for value in node.outputs:
        for user, index in value.uses():
            if user in inside:
                yield user
            elif user in numbers:
                yield "input", numbers[user], 0 if operators.is_commutative(user) else index
        yield from (("output", index) for index in outputs.get(value, ()))


class _Groups:
    """Disjoint sets with path halving."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def add(self, item: Hashable) -> None:
        self._parent.setdefault(item, item)

    def root(self, item: Hashable) -> Hashable:
        parent = self._parent
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    def join(self, one: Hashable, other: Hashable) -> None:
        self.add(one)
        self.add(other)
        self._parent[self.root(one)] = self.root(other)
