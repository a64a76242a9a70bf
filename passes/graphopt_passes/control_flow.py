"""Control flow that is decided before the model runs: branches and loop bodies that run at most once."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.build import Constant
from graphopt.ir.scopes import Scope, all_graphs, all_nodes
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, name_of, remove
from graphopt.rewrite.relink import mark, place_constant, substitute

ENDLESS = 2**63 - 1

MAX_UNROLLED_NODES = 64
"""A loop is written out only where at most these result: a few turns of a small body, for what folds then."""

MAX_PACKING_NODES = 6
"""As many nodes cost what a loop costs by itself: 7 us in ONNX Runtime 1.31 on a CPU, 1 us for each small node.

A Scan of 3 turns over 1 input, with 1 result, takes 13.1 us, written out with 7 of them 14.4; a Loop of 3 turns with 1
stacked result 14.2 us, written out with 4 of them 11.0.
"""


@dataclasses.dataclass(frozen=True)
class InlineControlFlow:
    """Puts what runs exactly once in the place of the `If` or `Loop` around it, and drops loops that never run.

    Before:  y = If(true) <then_branch = { t = Exp(x) }, else_branch = …>
    After:   y = Exp(x)
    A Loop or Scan of a few turns, known in number, is written out turn by turn.

    Changes numerics: exact.  Leaves alone: conditions that a feed decides; loops of many turns; scan outputs of unknown
    size of a loop that never runs; Scan before opset 9, which runs over batches.
    Source: ONNX If-1 .. 25, Loop-1 .. 25, Scan-9 .. 25.
    """

    name: ClassVar[str] = "inline-control-flow"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        inner_first = [scope for scope, _ in ctx.walk(model).parts][
            ::-1
        ]  # what they become moves outwards once
        if all(scope.owner is None for scope in inner_first):
            return False
        inliner = _Inliner(model, ctx)
        for scope in inner_first:
            for node in tuple(scope.graph):
                if node.domain in ("", "ai.onnx") and node.op_type in ("If", "Loop", "Scan"):
                    changed = inliner.visit(node, scope) or changed
        return changed


@dataclasses.dataclass(frozen=True)
class Loop:
    """A Loop node, opened.

    Attributes:
        node: the node.
        body: its graph: inputs (iteration, condition, carried…), outputs (condition, carried…, scanned…).
        carried: how many values are handed from turn to turn.
    """

    node: ir.Node
    body: ir.Graph
    carried: int

    @staticmethod
    def of(node: ir.Node) -> Loop | None:
        """The opened node, or None where its parts do not fit together."""
        bodies = operators.subgraphs(node)
        carried = max(len(node.inputs) - 2, 0)
        if len(bodies) != 1:
            return None
        body = bodies[0]
        fits = len(body.inputs) == carried + 2 and len(node.outputs) <= len(body.outputs) - 1
        return Loop(node, body, carried) if fits and len(body.outputs) >= carried + 1 else None

    def trips(self) -> int | None:
        """0 or 1 where the loop is known to take that many turns, otherwise None."""
        limit, condition = (*self.node.inputs, None, None)[:2]
        count = ENDLESS if limit is None else values.scalar(limit)
        begins = True if condition is None else values.scalar(condition)
        if (count is not None and count <= 0) or begins is False:
            return 0
        if not begins or count is None:
            return None
        stops = values.scalar(self.body.outputs[0]) is False
        return 1 if count == 1 or stops else None

    def unrolled(self) -> int | None:
        """How many turns, where they are known, nothing ends them early, and few nodes result."""
        limit, condition = (*self.node.inputs, None, None)[:2]
        count = values.scalar(limit)
        begins = condition is None or values.scalar(condition) is True
        last = self.body.outputs[0]
        goes_on = last is self.body.inputs[1] or values.scalar(last) is True
        maker = last.producer()
        if maker is not None and maker.op_type == "Identity":
            goes_on = goes_on or maker.inputs[0] is self.body.inputs[1]
        if count is None or not begins or not goes_on:
            return None
        scans = len(self.node.outputs) - self.carried
        return int(count) if count > 1 and _is_small(self.body, int(count), 0, scans) else None


def _is_small(body: ir.Graph, turns: int, taken: int, stacked: int) -> bool:
    """Whether so many turns make few nodes, of which few take inputs apart and stack results."""
    size = sum(1 for _ in all_nodes(body))
    extra = turns * taken + stacked * (turns + 1)
    return turns * size + extra <= MAX_UNROLLED_NODES and extra <= MAX_PACKING_NODES


@dataclasses.dataclass(frozen=True)
class Scan:
    """A Scan node, opened.

    Attributes:
        node: the node.
        body: its graph: inputs (state…, piece…), outputs (state…, result of a turn…).
        carried: how many values are handed from turn to turn.
        axes: along which axis each scanned input is taken apart, then each result stacked.
        backwards: whether from its end, likewise.
    """

    node: ir.Node
    body: ir.Graph
    carried: int
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    backwards: tuple[tuple[bool, ...], tuple[bool, ...]]

    @staticmethod
    def of(node: ir.Node, opsets: operators.Opsets) -> Scan | None:
        """The opened node, or None where its parts do not fit together or it runs over batches."""
        bodies = operators.subgraphs(node)
        if len(bodies) != 1 or (operators.opset(node, opsets) or 0) < 9:
            return None
        body, count = bodies[0], operators.attribute(node, "num_scan_inputs", 0)
        carried = len(node.inputs) - count
        stacked = len(body.outputs) - carried
        fits = carried >= 0 and stacked >= 0 and len(body.inputs) == len(node.inputs)
        if not fits or len(node.outputs) != len(body.outputs):
            return None
        sides = (("input", count), ("output", stacked))
        axes = [operators.attribute(node, f"scan_{side}_axes", (0,) * n) for side, n in sides]
        back = [operators.attribute(node, f"scan_{side}_directions", (0,) * n) for side, n in sides]
        return Scan(
            node,
            body,
            carried,
            (tuple(axes[0]), tuple(axes[1])),
            (tuple(map(bool, back[0])), tuple(map(bool, back[1]))),
        )

    def turns(self, ctx: Context) -> int | None:
        """How many turns, where they are known and few nodes result."""
        for value, axis in zip(self.node.inputs[self.carried :], self.axes[0], strict=True):
            dims = None if value is None else ctx.shapes.dims(value)
            if dims is None or not -len(dims) <= axis < len(dims) or not dims[axis].is_static:
                continue
            turns = int(dims[axis])
            fits = turns > 0 and _is_small(self.body, turns, len(self.axes[0]), len(self.axes[1]))
            return turns if fits else None
        return None


class _Inliner:
    """Moves the nodes of a subgraph into the graph around it."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self._ctx = ctx
        self._counts: collections.Counter[str] = collections.Counter()
        self._nodes: collections.Counter[str] = collections.Counter()
        for scope in all_graphs(model):
            graph = scope.graph
            self._counts.update(v.name for v in graph.inputs if v.name and not v.is_initializer())
            self._counts.update(graph.initializers.keys())
            self._counts.update(v.name for node in graph for v in node.outputs if v.name)
            self._nodes.update(node.name for node in graph if node.name)

    def visit(self, node: ir.Node, scope: Scope) -> bool:
        """Inlines `node` if it is decided; returns whether it was."""
        if operators.has_references(node):
            return False
        return {"If": self._if, "Loop": self._loop, "Scan": self._scan}[node.op_type](node, scope)

    def _if(self, node: ir.Node, scope: Scope) -> bool:
        condition = values.scalar(node.inputs[0]) if node.inputs else None
        if condition is None:
            return False
        branch = node.attributes["then_branch" if condition else "else_branch"].as_graph()
        if len(branch.outputs) != len(node.outputs) or not self._ctx.permit("inline-if", node):
            return False
        self._replace(node, self._move(branch, node, scope, "inline-if"), "inline-if")
        return True

    def _loop(self, node: ir.Node, scope: Scope) -> bool:
        loop = Loop.of(node)
        trips = None if loop is None else loop.trips()
        if loop is None:
            return False
        if trips is None:
            turns = loop.unrolled()
            return turns is not None and self._unroll(loop, turns, scope)
        return self._skip(loop, scope) if trips == 0 else self._once(loop, scope)

    def _skip(self, loop: Loop, scope: Scope) -> bool:
        """A loop without a turn: carried values pass through, scan outputs are empty."""
        node = loop.node
        carried = [value for value in node.inputs[2:] if value is not None]
        empty = [
            _no_turns(value, inner, self._ctx)
            for value, inner in zip(
                node.outputs[loop.carried :], loop.body.outputs[loop.carried + 1 :], strict=False
            )
        ]
        if len(carried) < loop.carried or any(
            tensor is None and (value.uses() or value.is_graph_output())
            for tensor, value in zip(empty, node.outputs[loop.carried :], strict=True)
        ):
            self._ctx.missed(
                "drop-loop",
                node,
                "never runs, but the size of what it would have scanned is unknown",
            )
            return False
        if not self._ctx.permit("drop-loop", node):
            return False
        scanned = [None if t is None else self._constant(t, "scanned", node, scope) for t in empty]
        self._replace(node, [*carried, *scanned], "drop-loop")
        return True

    def _once(self, loop: Loop, scope: Scope) -> bool:
        """A loop of one turn: the body, with turn 0 and a true condition."""
        node, body = loop.node, loop.body
        given = [value for value in node.inputs[2:] if value is not None]
        if len(given) < loop.carried or any(v.is_initializer() for v in body.inputs):
            return False
        if not self._ctx.permit("inline-loop", node):
            return False
        moved = self._turn(loop, body, 0, given, scope, "inline-loop")
        carried, scanned = moved[: loop.carried], moved[loop.carried : len(node.outputs)]
        stacked = [self._stack([value], 0, node, scope) for value in scanned]
        self._replace(node, [*carried, *stacked], "inline-loop")
        return True

    def _unroll(self, loop: Loop, turns: int, scope: Scope) -> bool:
        """A loop of a few turns: a copy of the body for each, what one carries on handed to the next."""
        node, body = loop.node, loop.body
        carried = [value for value in node.inputs[2:] if value is not None]
        if len(carried) < loop.carried or any(v.is_initializer() for v in body.inputs):
            return False
        if not self._ctx.permit("unroll-loop", node):
            return False
        results = []
        for turn in range(turns):
            copy = self._copy(body)
            results.append(self._turn(loop, copy, turn, carried, scope, "unroll-loop"))
            carried = results[-1][: loop.carried]
        stacked = [
            self._stack([each[index] for each in results], 0, node, scope)
            if _is_read(value)
            else None
            for index, value in enumerate(node.outputs)
            if index >= loop.carried
        ]
        self._replace(node, [*carried, *stacked], "unroll-loop")
        return True

    def _copy(self, body: ir.Graph) -> ir.Graph:
        """A copy of a body, whose names are on record."""
        copy = body.clone(allow_outer_scope_values=True)
        self._counts.update(v.name for v in _defined(copy) if v.name)
        self._nodes.update(each.name for each in copy if each.name)
        return copy

    def _scan(self, node: ir.Node, scope: Scope) -> bool:
        """A Scan of a few turns: a copy of the body for each, on pieces of what it scans."""
        scan = Scan.of(node, scope.opsets)
        turns = None if scan is None else scan.turns(self._ctx)
        given = [value for value in node.inputs if value is not None]
        whole = len(given) == len(node.inputs)
        if scan is None or turns is None or not whole:
            return False
        if any(v.is_initializer() for v in scan.body.inputs):
            return False
        if not self._ctx.permit("unroll-scan", node):
            return False
        carried, scanned = given[: scan.carried], given[scan.carried :]
        results = []
        for turn in range(turns):
            pieces = [
                self._piece(value, turns - 1 - turn if back else turn, axis, node, scope)
                for value, axis, back in zip(scanned, scan.axes[0], scan.backwards[0], strict=True)
            ]
            copy = self._copy(scan.body)
            ends = list(copy.outputs)
            results.append(self._run(copy, (*carried, *pieces), ends, node, scope, "unroll-scan"))
            carried = results[-1][: scan.carried]
        stacked: list[ir.Value | None] = []
        for index, (axis, back) in enumerate(zip(scan.axes[1], scan.backwards[1], strict=True)):
            rows = [each[scan.carried + index] for each in (results[::-1] if back else results)]
            read = _is_read(node.outputs[scan.carried + index])
            stacked.append(self._stack(rows, axis, node, scope) if read else None)
        self._replace(node, [*carried, *stacked], "unroll-scan")
        return True

    def _piece(
        self, value: ir.Value, index: int, axis: int, node: ir.Node, scope: Scope
    ) -> ir.Value:
        """What a turn sees of a scanned input."""
        number = self._constant(np.array(index, np.int64), "turn", node, scope)
        made = ir.Node("", "Gather", [value, number], [ir.AttrInt64("axis", axis)])
        return self._insert(made, node)

    def _turn(
        self,
        loop: Loop,
        body: ir.Graph,
        turn: int,
        given: Sequence[ir.Value],
        scope: Scope,
        rule: str,
    ) -> list[ir.Value]:
        """Moves a body ahead of its loop, as turn number `turn` on the values `given`; returns its results."""
        node = loop.node
        number = self._constant(np.array(turn, np.int64), "turn", node, scope)
        condition = self._constant(np.array(True), "condition", node, scope)
        ends = list(body.outputs)[1:]
        return self._run(body, (number, condition, *given), ends, node, scope, rule)

    def _run(
        self,
        body: ir.Graph,
        given: Sequence[ir.Value],
        ends: list[ir.Value],
        node: ir.Node,
        scope: Scope,
        rule: str,
    ) -> list[ir.Value]:
        """Moves a body ahead of its node, on the values `given`; returns what `ends` have become."""
        for inner, value in zip(tuple(body.inputs), given, strict=True):
            ends = [value if end is inner else end for end in ends]
            _drop_outputs(body, inner)
            inner.replace_all_uses_with(value)
        return self._move(body, node, scope, rule, ends=ends)

    def _stack(self, rows: Sequence[ir.Value], axis: int, node: ir.Node, scope: Scope) -> ir.Value:
        """What each turn gave, along a new axis, as the loop would have stacked it."""
        axes = None
        if scope.opsets.get("", 0) >= 13:
            axes = self._constant(np.array([axis], np.int64), "axes", node, scope)
        raised = [self._unsqueeze(value, axes, axis, node) for value in rows]
        if len(raised) == 1:
            return raised[0]
        return self._insert(ir.Node("", "Concat", raised, [ir.AttrInt64("axis", axis)]), node)

    def _unsqueeze(
        self, value: ir.Value, axes: ir.Value | None, axis: int, node: ir.Node
    ) -> ir.Value:
        if axes is None:
            made = ir.Node("", "Unsqueeze", [value], [ir.AttrInt64s("axes", [axis])])
        else:
            made = ir.Node("", "Unsqueeze", [value, axes])
        return self._insert(made, node)

    def _insert(self, made: ir.Node, node: ir.Node) -> ir.Value:
        """Puts a new node ahead of the loop that it is made for; returns its output."""
        base = f"{name_of(node)}_{made.op_type}"
        made.name, made.outputs[0].name = self._ctx.names.fresh(base), self._ctx.names.fresh(base)
        mark(made, "inline-loop", name_of(node), self._ctx)
        assert node.graph is not None
        node.graph.insert_before(node, made)
        self._ctx.shapes.update([made])
        return made.outputs[0]

    def _constant(self, tensor: Constant, hint: str, node: ir.Node, scope: Scope) -> ir.Value:
        name = self._ctx.names.fresh(f"{name_of(node)}_{hint}")
        as_node = scope.function is not None and scope.owner is None
        return place_constant(tensor, name, node, as_node=as_node, ctx=self._ctx)

    def _move(
        self,
        inner: ir.Graph,
        node: ir.Node,
        scope: Scope,
        rule: str,
        *,
        ends: Sequence[ir.Value] | None = None,
    ) -> list[ir.Value]:
        """Moves initializers and nodes of a subgraph ahead of the node that holds it; returns its results."""
        graph = node.graph
        assert graph is not None
        results = list(inner.outputs if ends is None else ends)
        inner.outputs.clear()
        replaced: dict[ir.Value, ir.Value] = {}
        for value in tuple(inner.initializers.values()):
            replaced[value] = self._move_initializer(value, inner, node, scope)
        moved = tuple(inner)
        inner.remove(moved)
        for each in moved:
            for value in each.outputs:
                self._rename(value)
            if each.name and self._nodes[each.name] > 1:  # no runtime takes two of a name
                self._nodes[each.name] -= 1
                each.name = self._ctx.names.fresh(each.name)
            mark(each, rule, name_of(node), self._ctx)
        graph.insert_before(node, moved)
        self._ctx.shapes.update(moved)
        return [replaced.get(value, value) for value in results]

    def _move_initializer(
        self, value: ir.Value, inner: ir.Graph, node: ir.Node, scope: Scope
    ) -> ir.Value:
        del inner.initializers[value.name or ""]
        self._rename(value)
        tensor = value.const_value
        assert tensor is not None
        assert node.graph is not None
        if scope.function is None or scope.owner is not None:
            node.graph.register_initializer(value)
            return value
        new = place_constant(tensor, value.name or "", node, as_node=True, ctx=self._ctx)
        value.replace_all_uses_with(new)
        value.name = None
        return new

    def _rename(self, value: ir.Value) -> None:
        """Gives a value of a subgraph a new name where another graph, which may now be in its sight, has the same."""
        if value.name and self._counts[value.name] > 1:
            self._counts[value.name] -= 1
            value.name = self._ctx.names.fresh(value.name)

    def _replace(self, node: ir.Node, new: Sequence[ir.Value | None], rule: str) -> None:
        """Puts values where the outputs of `node` were, and removes it with the graphs that it still holds."""
        users = dict.fromkeys(use.node for old in node.outputs for use in old.uses())
        made = [
            substitute(old, value, node, rule, self._ctx)
            for old, value in zip(node.outputs, new, strict=True)
            if value is not None
        ]
        remove(node, self._ctx)
        self._ctx.shapes.update([*filter(None, made), *users])


def _defined(graph: ir.Graph) -> list[ir.Value]:
    """The values that a graph's own nodes and initializers define."""
    return [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _drop_outputs(graph: ir.Graph, value: ir.Value) -> None:
    """Takes a value out of the outputs of a graph that is about to be emptied."""
    kept = [output for output in graph.outputs if output is not value]
    if len(kept) < len(graph.outputs):
        graph.outputs.clear()
        graph.outputs.extend(kept)


def _no_turns(value: ir.Value, inner: ir.Value, ctx: Context) -> ir.TensorProtocol | None:
    """The empty tensor that a scan output is after no turn: [0, *dims of one turn]; None where those are unknown."""
    dims, dtype = ctx.shapes.dims(inner), value.dtype or inner.dtype
    if dims is None or dtype is None or not all(dim.is_static for dim in dims):
        return None
    shape = (0, *(int(dim) for dim in dims))
    if dtype == ir.DataType.STRING:
        return ir.StringTensor(np.empty(shape, object), shape=ir.Shape(shape))
    return ir.tensor(np.empty(shape, dtype.numpy()), dtype=dtype)
