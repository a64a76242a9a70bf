"""Scores of rows that are masked throughout, made zero: so that a half's mask gives them the same even softmax.

A mask of -3.4e38 swallows the scores that it is added to (in bfloat16, -1e38 does): where it hides a whole row, all its
elements become equal and the softmax is even.  The largest mask of float16 swallows nothing in a kernel that adds in
float32.  With scores of zero the sum is even whatever the mask is, so that nothing changes in float32 and attention may
be half.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context
from graphopt.rewrite.relink import mark
from graphopt_passes.precision import flow as flows

RULE = "guard-masked-rows"
_ATTENTION = {("", "Attention"): (0, 3), ("com.microsoft", "MultiHeadAttention"): (0, 5)}
"""Where the queries are, and the mask that is added to their scores."""

_AXES_ARE_INPUT = 18
_FEWEST = 13  # opset: below, Greater and Cast know less


@dataclasses.dataclass(frozen=True)
class Guard:
    """A node that reads guarded scores or queries.

    Attributes:
        node: the reader.
        place: of the operand.
        original: what it read before.
    """

    node: ir.Node
    place: int
    original: ir.Value


def guard_masked_rows(model: ir.Model, ctx: Context) -> list[Guard]:
    """Multiplies what meets a mask by 0 in rows that are masked throughout, by 1 elsewhere.

    Before:  y = Attention(q, k, v, mask)
    After:   y = Attention(q * (ReduceMax(mask, -1) > -2.9e4), k, v, mask)
    Leaves alone: masks that follow from sizes alone, which hide no row; masks that swallow nothing in float32 either.

    Args:
        model: in float32, typed, sorted; it is changed.
        ctx: the run.
    """
    flow = flows.flow_of(model)
    masked = flows.sentinels(model, flow, flows.SWALLOWS).carriers
    found: list[Guard] = []
    opset = model.opset_imports.get("", 0)
    if not masked or opset < _FEWEST:
        return found
    inserter = _Inserter(ctx, opset)
    for scope in all_graphs(model):
        for node in tuple(scope.graph):
            site = _site(node, masked)
            if site is None or not _is_fed(site[1], model, flow):
                continue
            place, mask = site
            narrow = _drops_heads(node, place, mask)
            if narrow is None or not ctx.permit(RULE, node, Numerics.LOSSY):
                continue
            found.append(inserter.insert(node, place, mask, narrow=narrow))
    if found:
        ctx.refresh()
        _ = ctx.shapes
    return found


def take_back(guard: Guard) -> ir.Node | None:
    """Lets the reader read what it read before; the product, where nobody reads it any more."""
    product = guard.node.inputs[guard.place]
    guard.node.replace_input_with(guard.place, guard.original)
    if product is None or product.uses():
        return None
    return product.producer()


def _site(node: ir.Node, masked: frozenset[ir.Value]) -> tuple[int, ir.Value] | None:
    """Where a node reads what a mask is added to, and the mask."""
    places = _ATTENTION.get((node.domain, node.op_type))
    if places is not None:
        place, other = places
        mask = node.inputs[other] if other < len(node.inputs) else None
        shown = [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
        return None if mask is None or mask not in masked or shown else (place, mask)
    if node.domain or node.op_type != "Add" or not _ends_in_rows(node):
        return None
    hidden = [value in masked for value in node.inputs]
    if hidden.count(True) != 1:
        return None
    mask = node.inputs[hidden.index(True)]
    assert mask is not None
    return hidden.index(False), mask


def _ends_in_rows(node: ir.Node) -> bool:
    """Whether a softmax over the last axis is all that reads the sum."""
    made = node.outputs[0]
    readers = [use.node for use in made.uses()]
    last = {-1, -1 if made.shape is None else len(made.shape) - 1}
    return bool(readers) and all(
        reader.op_type == "Softmax"
        and not reader.domain
        and (axis := reader.attributes.get("axis")) is not None
        and axis.as_int() in last
        for reader in readers
    )


def _is_fed(mask: ir.Value, model: ir.Model, flow: flows.Flow) -> bool:
    """Whether elements of an input decide what is masked: sizes alone give causal masks, which hide no row."""
    if values.is_constant(mask):
        return False
    sources = flow.reach([mask], lambda node: node.op_type not in ("Shape", "Size"), back=True)
    inputs = set(model.graph.inputs) - set(model.graph.initializers.values())
    return not sources.isdisjoint(inputs)


def _drops_heads(node: ir.Node, place: int, mask: ir.Value) -> bool | None:
    """Whether the axis of heads has to go, because queries have none; None where rows cannot be told apart."""
    value = node.inputs[place]
    if value is None or value.shape is None or mask.shape is None or len(mask.shape) < 1:
        return None
    if mask.shape[-1] == 1:
        return None
    if node.op_type == "Add" or len(value.shape) == 4:
        return False if len(mask.shape) <= len(value.shape) else None
    if len(mask.shape) < 3:
        return False
    return True if mask.shape[-3] == 1 else None


@dataclasses.dataclass
class _Inserter:
    """Puts guards in; rows of one mask are looked at once a graph."""

    ctx: Context
    opset: int
    made: dict[tuple[ir.Graph, ir.Value, bool], ir.Value] = dataclasses.field(default_factory=dict)

    def insert(self, node: ir.Node, place: int, mask: ir.Value, *, narrow: bool) -> Guard:
        """Guards one operand; the graph is sorted, so that what an earlier node looked at is there."""
        graph, value = node.graph, node.inputs[place]
        assert isinstance(graph, ir.Graph)
        assert value is not None
        tape, key = Builder(), (graph, mask, narrow)
        if key not in self.made:
            self.made[key] = self._open_rows(tape, mask, narrow=narrow)
        node.replace_input_with(place, tape.op("Mul", value, self.made[key]))
        for constant in tape.constants:
            constant.name = self.ctx.names.fresh(f"{mask.name}_{constant.name}")
            graph.register_initializer(constant)
        for each in tape.nodes:
            each.name = each.outputs[0].name = self.ctx.names.fresh(f"{mask.name}_rows")
            mark(each, RULE, value.name or "", self.ctx)
        graph.insert_before(node, tape.nodes)
        return Guard(node, place, value)

    def _open_rows(self, tape: Builder, mask: ir.Value, *, narrow: bool) -> ir.Value:
        """1 for rows of which something shows, 0 for those that are masked throughout."""
        if self.opset >= _AXES_ARE_INPUT:
            peak = tape.op("ReduceMax", mask, tape.ints([-1], name="axis"), keepdims=1)
        else:
            peak = tape.op("ReduceMax", mask, axes=[-1], keepdims=1)
        least = tape.const(np.array(flows.MASKED, np.float32), name="least")
        rows = tape.op("Cast", tape.op("Greater", peak, least), to=int(ir.DataType.FLOAT))
        return tape.op("Squeeze", rows, tape.ints([-3], name="heads")) if narrow else rows
