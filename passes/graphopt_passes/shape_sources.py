"""Shape arithmetic rebuilt from where the dims are: one `Shape` per unknown dim, one `Concat` per distinct shape."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import Scope, all_nodes
from graphopt.ir.shapes import Dim, Dims
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, is_dead, name_of, remove
from graphopt.rewrite.relink import mark, place_constant

RULE = "rebuild-shape"
_OF_SCORES = frozenset({"Add", "Cast", "Div", "MatMul", "Mul", "Sub", "Where"})
_RANK_LIMIT = 8  # tensors of higher rank are no source: their stretches are many and never needed


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Dims `start` to before `end` of a tensor, as a vector."""

    value: ir.Value
    start: int
    end: int
    rank: int


@dataclasses.dataclass(frozen=True)
class Atom:
    """A tensor of one element that shape arithmetic computes and that stays."""

    value: ir.Value
    scalar: bool


Piece: TypeAlias = Stretch | Atom | tuple[int, ...]
"""A part of a vector: dims of a tensor, a computed number, or constants."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """An input that shape arithmetic feeds.

    Attributes:
        user: the node that reads it.
        index: which of its inputs.
        value: what it reads now.
        elements: what it has to read, which for a Reshape may hold 0 and -1.
        scalar: whether it is a scalar, not a vector.
        position: where the user (or the node of this graph that holds it) stands.
    """

    user: ir.Node
    index: int
    value: ir.Value
    elements: Dims
    scalar: bool
    position: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every demand is made of, and the arithmetic that has to stay."""

    pieces: dict[Demand, tuple[Piece, ...]]
    kept: frozenset[ir.Node]


@dataclasses.dataclass(frozen=True)
class RebuildShapes:
    """Replaces shape arithmetic by dims taken where they are, if that needs fewer nodes.

    Each unknown element of a shape comes from the first tensor that has that dim, a graph input if possible; a Reshape
    copies dims (0) and infers one (-1), an Expand keeps its operand's (1).  What no tensor has as a dim stays computed.

    Before:  h = Transpose(Cast(x))  s = Shape(h)  b = Unsqueeze(Gather(s, 0))  n = Unsqueeze(Gather(s, 1) * 2)
             y = Expand(k, Concat(b, n, [64]))
    After:   s = Shape(x)  …  the fewest Shape, Mul and Concat nodes that give the same numbers
    Changes numerics: exact.  Leaves alone: shapes that are graph outputs, other integers than int64.
    """

    name: ClassVar[str] = "rebuild-shapes"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for scope, nodes in ctx.walk(model).parts:
            survey = Survey(scope.graph, tuple(scope.graph) if changed else nodes, ctx)
            if not survey.arithmetic:
                continue
            opset = scope.opsets.get("", 0)
            plans = [make_plan(survey, runs=runs) for runs in (False, True)]
            sizes = [count_nodes(plan, opset) for plan in plans]
            if min(sizes) < len(survey.arithmetic):
                plan = plans[sizes.index(min(sizes))]
                changed = _Emitter(survey, scope, ctx).apply(plan) or changed
        return changed


class Survey:
    """What a graph's shape arithmetic is, and where its dims can be had.

    Attributes:
        arithmetic: the nodes whose outputs are all known in terms of dims, and nothing else.
        positions: where each node stands; a node within a subgraph stands where its holder does.
    """

    def __init__(self, graph: ir.Graph, nodes: tuple[ir.Node, ...], ctx: Context) -> None:
        self.graph = graph
        self.shapes = ctx.shapes
        self.nodes = nodes
        self.arithmetic = {node: None for node in self.nodes if self._is_arithmetic(node)}
        self.positions: dict[ir.Node, int] = {}
        self._stretches: dict[Dims, tuple[int, Stretch]] = {}
        self._seen: set[Dims] = set()
        self._atoms: dict[Dim, tuple[int, Atom]] = {}
        if self.arithmetic:
            self._collect()

    def stretch(self, elements: Dims, position: int) -> Stretch | None:
        """The first tensor before `position` that has these dims side by side, or None."""
        at, found = self._stretches.get(elements, (position, None))
        return found if at < position else None

    def atom(self, element: Dim, position: int) -> Atom | None:
        """The first number before `position` that is computed to be `element`, or None."""
        at, found = self._atoms.get(element, (position, None))
        return found if at < position else None

    def outlets(self) -> Iterator[tuple[ir.Value, ir.Node, int]]:
        """The inputs of other nodes that arithmetic feeds."""
        for node in self.arithmetic:
            for value in node.outputs:
                for user, index in value.uses():
                    if user not in self.arithmetic:
                        yield value, user, index

    def demand(self, value: ir.Value, user: ir.Node, index: int) -> Demand | None:
        """What an input needs; None where it is no scalar or vector of int64, or known entirely."""
        data = self.shapes.data(value)
        if data is None or data.dtype != ir.DataType.INT64 or len(data.shape) > 1:
            return None
        elements = data.dims
        if elements is None or data.is_static:
            return None
        position = self.positions[user]
        if index == 1 and not user.domain:
            if user.op_type == "Reshape":
                elements = self._reshaped(user, elements, position)
            elif user.op_type == "Expand":
                elements = self._expanded(user, elements)
        return Demand(user, index, value, elements, not data.shape, position)

    def _is_arithmetic(self, node: ir.Node) -> bool:
        if not node.outputs or any(self.shapes.data(value) is None for value in node.outputs):
            return False  # most nodes: asked first
        return not (node.domain or node.op_type == "Constant" or operators.has_subgraph(node))

    def _collect(self) -> None:
        passing = _scores(self.nodes)
        for value in self.graph.inputs:
            self._add_source(value, -1)
        for position, node in enumerate(self.nodes):
            self.positions[node] = position
            if node in self.arithmetic:
                self._add_atom(node.outputs[0], position)
                continue
            for inner in operators.subgraphs(node):
                self.positions.update(dict.fromkeys(all_nodes(inner), position))
            if node not in passing:
                for value in node.outputs:
                    self._add_source(value, position)

    def _add_source(self, value: ir.Value, position: int) -> None:
        """Notes every stretch of a tensor's dims that holds an unknown one, if it is the first of its kind."""
        dims = self.shapes.dims(value)
        if dims is None or dims in self._seen or len(dims) > _RANK_LIMIT:
            return
        self._seen.add(dims)  # whoever had them before is the first to have any part of them, too
        if all(d.is_static for d in dims):
            return
        for start, end in itertools.combinations(range(len(dims) + 1), 2):
            part = dims[start:end]
            if part not in self._stretches and not all(d.is_static for d in part):
                self._stretches[part] = (position, Stretch(value, start, end, len(dims)))

    def _add_atom(self, value: ir.Value, position: int) -> None:
        data = self.shapes.data(value)
        element = None if data is None or data.dtype != ir.DataType.INT64 else data.item()
        if isinstance(element, Dim) and data is not None and len(data.shape) <= 1:
            self._atoms.setdefault(element, (position, Atom(value, not data.shape)))

    def _reshaped(self, user: ir.Node, elements: Dims, position: int) -> Dims:
        """The shape operand of a Reshape with 0 for dims that it can copy and -1 for one that it can infer."""
        before = None if user.inputs[0] is None else self.shapes.dims(user.inputs[0])
        zero = user.attributes.get("allowzero")
        if before is None or (zero is not None and (zero.is_ref() or zero.as_int())):
            return elements
        copied = [
            Dim.of(0) if not e.is_static and i < len(before) and before[i] == e else e
            for i, e in enumerate(elements)
        ]
        unknown = [i for i, e in enumerate(copied) if not e.is_static]
        if unknown and Dim.of(-1) not in copied:
            hard = [i for i in unknown if self.stretch((copied[i],), position) is None]
            copied[(hard or unknown)[-1]] = Dim.of(-1)
        return tuple(copied)

    def _expanded(self, user: ir.Node, elements: Dims) -> Dims:
        """The shape operand of an Expand with 1 for dims that its operand has already."""
        before = None if user.inputs[0] is None else self.shapes.dims(user.inputs[0])
        if before is None or len(before) > len(elements):
            return elements
        lead = len(elements) - len(before)
        return tuple(
            Dim.of(1) if i >= lead and before[i - lead] == e else e for i, e in enumerate(elements)
        )


def _scores(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """What leads from a product to a Softmax: fused attention has no such tensor, whose Shape would keep it apart."""
    found: set[ir.Node] = set()
    waiting = [node for node in nodes if node.op_type == "Softmax"]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node.op_type != "MatMul":
            makers = (value.producer() for value in node.inputs if value is not None)
            waiting.extend(m for m in makers if m is not None and m.op_type in _OF_SCORES)
    return found


def make_plan(survey: Survey, *, runs: bool) -> Plan:
    """Pieces for every demand, by single dims or, with `runs`, by the longest stretches."""
    pieces: dict[Demand, tuple[Piece, ...]] = {}
    kept: dict[ir.Node, None] = {}
    waiting = list(survey.outlets())
    for node in survey.arithmetic:
        if any(value.is_graph_output() for value in node.outputs):
            waiting.extend(_keep(node, kept, survey))
    while waiting:
        value, user, index = waiting.pop()
        demand = survey.demand(value, user, index)
        found = None if demand is None else pieces_of(survey, demand, runs=runs)
        if demand is None or found is None:
            waiting.extend(_keep(value.producer(), kept, survey))
            continue
        pieces[demand] = found
        for piece in found:
            if isinstance(piece, Atom):
                waiting.extend(_keep(piece.value.producer(), kept, survey))
    return Plan(pieces, frozenset(kept))


def _keep(
    node: ir.Node | None, kept: dict[ir.Node, None], survey: Survey
) -> Iterator[tuple[ir.Value, ir.Node, int]]:
    """Notes that a node of the arithmetic stays; yields the inputs that have to be fed then."""
    if node is None or node in kept:
        return
    kept[node] = None
    for index, value in enumerate(node.inputs):
        if value is not None and value.producer() in survey.arithmetic:
            yield value, node, index


def pieces_of(survey: Survey, demand: Demand, *, runs: bool) -> tuple[Piece, ...] | None:
    """What a demand can be made of, or None where an element can be had nowhere before its user."""
    elements, position = demand.elements, demand.position
    found: list[Piece] = []
    at = 0
    while at < len(elements):
        longest = _longest(survey, elements, at, position, runs=runs)
        if longest is not None:
            found.append(longest)
            at += longest.end - longest.start
        elif elements[at].is_static:
            number = int(elements[at])
            last = found.pop() if found and isinstance(found[-1], tuple) else ()
            assert isinstance(last, tuple)
            found.append((*last, number))
            at += 1
        else:
            atom = survey.atom(elements[at], position)
            if atom is None:
                return None
            found.append(atom)
            at += 1
    return tuple(found)


def _longest(
    survey: Survey, elements: Dims, at: int, position: int, *, runs: bool
) -> Stretch | None:
    """The longest stretch of a tensor's dims that stands from `at` on; only a single dim, or all, without `runs`."""
    ends = range(len(elements), at, -1)
    for end in ends:
        if runs or end == at + 1 or (at == 0 and end == len(elements)):
            found = survey.stretch(elements[at:end], position)
            if found is not None:
                return found
    return None


def count_nodes(plan: Plan, opset: int) -> int:
    """How many nodes of shape arithmetic there are once the plan is carried out."""
    made: set[object] = set()
    for demand, pieces in plan.pieces.items():
        for piece in pieces:
            if isinstance(piece, Stretch):
                made.add(piece)
                whole = piece.end - piece.start == piece.rank
                if opset < 15 and not whole:
                    made.add((piece.value, "Shape"))
            if isinstance(piece, Atom):
                if piece.scalar != demand.scalar:
                    made.add((piece, demand.scalar))
            elif demand.scalar:
                made.add((piece, "Squeeze"))
        if len(pieces) > 1:
            made.add(pieces)
    return len(made) + len(plan.kept)


class _Emitter:
    """Carries a plan out, each distinct piece once."""

    def __init__(self, survey: Survey, scope: Scope, ctx: Context) -> None:
        self._survey = survey
        self._ctx = ctx
        self._opset = scope.opsets.get("", 0)
        self._as_nodes = scope.function is not None and scope.owner is None
        self._graph = scope.graph
        self._made: dict[object, ir.Value] = {}

    def apply(self, plan: Plan) -> bool:
        """Feeds every demand anew; returns whether anything changed."""
        changed = []
        for demand in sorted(plan.pieces, key=lambda d: d.position):
            if self._is_fed(demand, plan.pieces[demand]):
                continue
            site = f"{name_of(demand.user)}[{demand.index}]"
            if not self._ctx.permit(RULE, site):
                continue
            value = self._value(demand, plan.pieces[demand])
            demand.user.replace_input_with(demand.index, value)
            changed.append(demand.user)
        self._ctx.shapes.update(changed)
        self._sweep()
        return bool(changed)

    def _sweep(self) -> None:
        """Removes the arithmetic that nothing reads any more, and what only it read."""
        waiting = list(self._survey.arithmetic)
        while waiting:
            node = waiting.pop()
            if node.graph is not None and is_dead(node):
                waiting.extend(remove(node, self._ctx))

    @staticmethod
    def _is_fed(demand: Demand, pieces: Sequence[Piece]) -> bool:
        """Whether the demand reads the one number that it is to read."""
        return len(pieces) == 1 and isinstance(pieces[0], Atom) and pieces[0].value is demand.value

    def _value(self, demand: Demand, pieces: tuple[Piece, ...]) -> ir.Value:
        anchor = self._survey.nodes[demand.position]
        if demand.scalar:
            return self._scalar(pieces[0], anchor)
        parts = [self._vector(piece, anchor) for piece in pieces]
        if len(parts) == 1:
            return parts[0]
        return self._once(pieces, "Concat", parts, anchor, after=None, axis=0)

    def _scalar(self, piece: Piece, anchor: ir.Node) -> ir.Value:
        if isinstance(piece, Atom) and piece.scalar:
            return piece.value
        vector = self._vector(piece, anchor)
        if self._opset < 13:
            return self._once((piece, "s"), "Squeeze", [vector], anchor, after=vector, axes=[0])
        axes = self._constant([0], anchor)
        return self._once((piece, "s"), "Squeeze", [vector, axes], anchor, after=vector)

    def _vector(self, piece: Piece, anchor: ir.Node) -> ir.Value:
        if isinstance(piece, tuple):
            return self._constant(piece, anchor)
        if isinstance(piece, Atom):
            return self._unsqueezed(piece, anchor)
        data, whole = piece.value, piece.end - piece.start == piece.rank
        if whole:
            return self._once(piece, "Shape", [data], anchor, after=data)
        if self._opset >= 15:
            ends = {"start": piece.start, "end": piece.end}
            if piece.end == piece.rank:
                del ends["end"]
            if piece.start == 0:
                del ends["start"]
            return self._once(piece, "Shape", [data], anchor, after=data, **ends)
        shape = self._once((data, "Shape"), "Shape", [data], anchor, after=data)
        indices = self._constant(range(piece.start, piece.end), anchor)
        return self._once(piece, "Gather", [shape, indices], anchor, after=shape)

    def _unsqueezed(self, atom: Atom, anchor: ir.Node) -> ir.Value:
        if not atom.scalar:
            return atom.value
        if self._opset < 13:
            return self._once(
                (atom, "u"), "Unsqueeze", [atom.value], anchor, after=atom.value, axes=[0]
            )
        axes = self._constant([0], anchor)
        return self._once((atom, "u"), "Unsqueeze", [atom.value, axes], anchor, after=atom.value)

    def _constant(self, numbers: Sequence[int], anchor: ir.Node) -> ir.Value:
        key = ("constant", tuple(numbers))
        if key not in self._made:
            tensor = np.asarray(tuple(numbers), np.int64)
            name = self._ctx.names.fresh("shape_" + "_".join(map(str, numbers)).replace("-", "m"))
            first = next(iter(self._graph)) if self._as_nodes else anchor
            made = place_constant(tensor, name, first, as_node=self._as_nodes, ctx=self._ctx)
            self._made[key] = made
        return self._made[key]

    def _once(
        self,
        key: object,
        kind: str,
        inputs: Sequence[ir.Value],
        anchor: ir.Node,
        *,
        after: ir.Value | None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """The output of a node that is made once: behind the producer of `after`, else ahead of `anchor`."""
        if key in self._made:
            return self._made[key]
        held = [ir.convenience.convert_attribute(name, a) for name, a in attributes.items()]
        node = ir.Node("", kind, inputs, held)
        origin = name_of(anchor)
        node.name = self._ctx.names.fresh(f"{origin}_{kind}")
        node.outputs[0].name = self._ctx.names.fresh(f"{origin}_{kind}")
        mark(node, RULE, origin, self._ctx)
        self._insert(node, anchor, after)
        self._ctx.shapes.update([node])
        self._made[key] = node.outputs[0]
        return node.outputs[0]

    def _insert(self, node: ir.Node, anchor: ir.Node, after: ir.Value | None) -> None:
        if after is None:
            self._graph.insert_before(anchor, node)
            return
        producer = after.producer()
        if producer is not None and producer.graph is self._graph:
            self._graph.insert_after(producer, node)
        else:
            self._graph.insert_before(_first(self._graph), node)


def _first(graph: ir.Graph) -> ir.Node:
    """The first node that is no constant."""
    return next(node for node in graph if values.constant(node.outputs[0]) is None)
