"""Weights stored in half precision and computed with in float32: half the file, on every target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir import fingerprint, values
from graphopt.ir.scopes import all_graphs, sort
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt.rewrite.relink import mark
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt_passes.precision.apply import narrowed
from graphopt_passes.precision.flow import Masks
from graphopt_passes.precision.gates import Gates, gated_nodes
from graphopt_passes.precision.legality import Slots, is_float
from graphopt_passes.precision.limits import LIMITS
from graphopt_passes.precision.plan import Decision, Kind
from graphopt_passes.precision.ranges import observe, spread_of
from graphopt_passes.precision.refine import Refinement, refine

RULE = "store"
_HALF = ir.DataType.FLOAT16
_CAST_FROM_HALF = 6


@dataclasses.dataclass(frozen=True)
class StoreHalf:
    """Stores large weights as float16, with a cast to float32 in front of who reads them.

    Before:  y = MatMul(x, w)                        w: float32, 4 bytes an element
    After:   y = MatMul(x, Cast<float>(h))           h: float16, 2 bytes an element
    Changes numerics: lossy, within the budget: weights of nodes that cost too much stay.  Runtimes fold the casts when
    they load the model, so that nothing runs slower.  Leaves alone: small weights, weights that a half does not hold
    (more than 2^-9 of their size lost), defaults that a feed may replace.

    Attributes:
        least: elements of a weight from which on it pays.
    """

    least: int = 1 << 10

    name: ClassVar[str] = "store-half"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if model.opset_imports.get("", 0) < _CAST_FROM_HALF:
            ctx.missed(RULE, model.graph.name or "", "Cast takes float16 from opset 6 on")
            return False
        sort(model.graph)
        _ = ctx.shapes
        wanted = self._candidates(model, ctx)
        for value, reason in self._refused(model, wanted, ctx).items():
            wanted.pop(value, None)
            ctx.missed(RULE, value, reason)
        stored = [v for v in wanted if ctx.permit(RULE, v, Numerics.LOSSY)]
        for value in stored:
            _store(value, wanted[value], ctx)
        if stored:
            ctx.refresh()
        return bool(stored)

    def _candidates(self, model: ir.Model, ctx: Context) -> dict[ir.Value, ir.Graph]:
        found: dict[ir.Value, ir.Graph] = {}
        for scope in all_graphs(model):
            for value in scope.graph.initializers.values():
                tensor = values.constant(value)
                if tensor is None or not is_float(value) or tensor.size < self.least:
                    continue
                if value.is_graph_output() or not value.uses():
                    continue
                spread, _ = spread_of(tensor.numpy(), _HALF)
                limits = LIMITS[_HALF]
                if spread.absmax > limits.greatest or spread.error > limits.error:
                    ctx.missed(RULE, value, "a half does not hold it: too large, or too small")
                else:
                    found[value] = scope.graph
        return found

    def _refused(
        self, model: ir.Model, wanted: Mapping[ir.Value, ir.Graph], ctx: Context
    ) -> dict[ir.Value, str]:
        """Weights whose rounding costs more than the budget allows, by experiment."""
        decisions = {
            node: _decision(node, wanted) for scope in all_graphs(model) for node in scope.graph
        }
        low = gated_nodes(model, decisions, set())
        budget = budget_for(Precision.FP16_WEIGHTS, ctx.options.budget)
        if not low or budget is None:
            return {}
        key = (
            f"weights-refined {budget} {fingerprint.weights(model)} {fingerprint.structural(model)}"
        )
        if key not in ctx.cache:
            seen = observe(model, ctx, _HALF, set())
            try:
                gates = Gates.of(model, decisions, _HALF, Masks(), seen.usual, budget)
                ctx.cache[key] = refine(len(low), gates) if seen.usual else None
            except GraphoptError as error:
                ctx.remark(RemarkKind.WARNING, RULE, "", f"not compared: {error}")
                return {}
        found: Refinement | None = ctx.cache[key]
        raised = {} if found is None else found.raised
        return {
            value: reason
            for index, reason in raised.items()
            for value in low[index].inputs
            if value is not None and value in wanted
        }


def _decision(node: ir.Node, wanted: Mapping[ir.Value, ir.Graph]) -> Decision:
    places = tuple(value is not None and value in wanted for value in node.inputs)
    slots = Slots(places, (False,) * len(node.outputs))
    return Decision(Kind.LOW if any(places) else Kind.FIXED, slots=slots)


def _store(value: ir.Value, graph: ir.Graph, ctx: Context) -> None:
    """Puts a half and a cast in the place of a weight."""
    tensor = value.const_value
    assert tensor is not None
    narrow = ir.Value(
        name=ctx.names.fresh(f"{value.name}_float16"),
        type=ir.TensorType(_HALF),
        shape=value.shape,
        const_value=narrowed(tensor, _HALF, masks=False),
    )
    graph.register_initializer(narrow)
    to = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    node = ir.Node("", "Cast", [narrow], [to], name=ctx.names.fresh(f"{value.name}_float"))
    out = node.outputs[0]
    out.name = ctx.names.fresh(f"{value.name}_float")
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    mark(node, RULE, value.name or "", ctx)
    first = next(iter(graph))
    graph.insert_before(first, node)
    for use in value.uses():
        use.node.replace_input_with(use.idx, out)
    del graph.initializers[value.name or ""]
