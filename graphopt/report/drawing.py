"""Changed neighbourhoods of a graph as SVG: the nodes that went, those that came, and what they lie between."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from xml.sax.saxutils import escape

import onnx_ir as ir

from graphopt.report.diff import ModelDiff, Replacement
from graphopt.report.facts import operator_name

MAX_DRAWINGS = 12
MAX_NODES = 24
MAX_NEIGHBOURS = 4
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 150, 26, 18, 26


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One kind of change.

    Attributes:
        title: what became what, in words.
        count: at how many places.
        at: the value that is computed, at the place that is drawn.
        before: SVG of the nodes that went, and of their neighbours.
        after: SVG of the nodes that came, and of theirs.
    """

    title: str
    count: int
    at: str
    before: str
    after: str


def drawings(before: ir.Model, after: ir.Model, diff: ModelDiff) -> tuple[Drawing, ...]:
    """Each kind of change once, the most frequent first; at most a dozen."""
    kinds = Counter((each.removed, each.added) for each in diff.replacements)
    places: dict[tuple[tuple[str, ...], tuple[str, ...]], Replacement] = {}
    for each in diff.replacements:
        places.setdefault((each.removed, each.added), each)
    found = []
    for (removed, added), count in kinds.most_common(MAX_DRAWINGS):
        place = places[removed, added]
        title = f"{_words(removed)} → {_words(added)}"
        one = _drawn(before.graph, place.at, removed, "gone")
        other = _drawn(after.graph, place.stands, added, "new")
        found.append(Drawing(title, count, place.at, one, other))
    return tuple(found)


def _drawn(graph: ir.Graph, at: str, operators: Sequence[str], style: str) -> str:
    """The nodes behind a value that are of the given operators, and the nodes next to them."""
    inside = _region(graph, at, operators)
    around = _neighbours(inside)
    return draw([node for node in graph if node in inside or node in around], style, around)


def _neighbours(inside: Sequence[ir.Node]) -> set[ir.Node]:
    """What feeds some nodes and what reads them, constants aside; a few of each."""
    feeds = [p for node in inside for p in _producers(node) if p.op_type != "Constant"]
    reads = [use.node for node in inside for v in node.outputs for use in v.uses()]
    sides = (dict.fromkeys(n for n in side if n not in inside) for side in (feeds, reads))
    return {node for side in sides for node in list(side)[:MAX_NEIGHBOURS]}


def draw(nodes: Sequence[ir.Node], style: str, around: Collection[ir.Node] = ()) -> str:
    """Nodes in rows by their longest way from an input; an empty drawing where there are none.

    Args:
        nodes: in the order of their graph.
        style: of the nodes.
        around: those among them that are there for orientation.
    """
    if not nodes:
        return ""
    rows: dict[int, list[ir.Node]] = {}
    depth: dict[ir.Node, int] = {}
    for node in nodes:
        above = [depth[p] for p in _producers(node) if p in depth]
        depth[node] = max(above, default=-1) + 1
        rows.setdefault(depth[node], []).append(node)
    place = {
        node: (column * (_WIDTH + _GAP_X), row * (_HEIGHT + _GAP_Y))
        for row, members in rows.items()
        for column, node in enumerate(members)
    }
    width = max(x for x, _ in place.values()) + _WIDTH + 2
    height = max(y for _, y in place.values()) + _HEIGHT + 2
    lines = [_edge(place[p], place[node]) for node in nodes for p in _producers(node) if p in place]
    boxes = [_box(node, *place[node], "kept" if node in around else style) for node in nodes]
    return (
        f'<svg viewBox="-1 -1 {width} {height}" width="{width}" height="{height}" role="img">'
        f"{''.join(lines)}{''.join(boxes)}</svg>"
    )


def _region(graph: ir.Graph, at: str, operators: Sequence[str]) -> list[ir.Node]:
    """The nodes behind a value that are of the given operators, in the order of the graph."""
    left = Counter(operators)
    value = next((v for node in graph for v in node.outputs if v.name == at), None)
    producer = None if value is None else value.producer()
    queue = [] if producer is None else [producer]
    found: set[ir.Node] = set()
    while queue and len(found) < MAX_NODES:
        node = queue.pop(0)
        if node in found or left[operator_name(node)] <= 0:
            continue
        left[operator_name(node)] -= 1
        found.add(node)
        queue += _producers(node)
    return [node for node in graph if node in found]


def _producers(node: ir.Node) -> list[ir.Node]:
    made = (value.producer() for value in node.inputs if value is not None)
    return [each for each in made if each is not None]


def _box(node: ir.Node, x: int, y: int, style: str) -> str:
    name = operator_name(node).removeprefix("com.microsoft::")
    shown = name if len(name) <= 20 else name[:19] + "…"
    told = escape(f"{operator_name(node)} {node.outputs[0].name or ''}")
    return (
        f'<g class="{style}"><title>{told}</title><rect x="{x}" y="{y}" rx="5" width="{_WIDTH}" height="{_HEIGHT}"/>'
        f'<text x="{x + _WIDTH // 2}" y="{y + 17}">{escape(shown)}</text></g>'
    )


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + _WIDTH // 2, start[1] + _HEIGHT, end[0] + _WIDTH // 2, end[1]
    bend = (y1 + y2) // 2
    return f'<path d="M{x1} {y1} C{x1} {bend} {x2} {bend} {x2} {y2}"/>'


def _words(operators: Sequence[str]) -> str:
    counts = Counter(operators)
    parts = [name if count == 1 else f"{count} {name}" for name, count in counts.items()]
    shown = ", ".join(parts[:6]) + (" …" if len(parts) > 6 else "")
    return shown or "nothing"
