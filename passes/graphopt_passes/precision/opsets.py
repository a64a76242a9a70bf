"""The opsets at which more of a model may be half: many operators take bfloat16 from opset 22 on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from graphopt.ir.scopes import all_graphs
from graphopt.rewrite import Context
from graphopt_passes.precision.legality import Legality, is_float

Wishes = Callable[[ir.Model, Context], Iterator[int]]


def opsets_for(half: ir.DataType) -> Wishes:
    """What says which opsets a model would have to import for its nodes to be legal in `half`."""

    def wishes(model: ir.Model, ctx: Context) -> Iterator[int]:
        _ = ctx.shapes  # infers the type of every value
        opset, highest = model.opset_imports.get("", 0), ctx.target.opset[1]
        found: dict[tuple[str, int], int | None] = {}
        for scope in all_graphs(model):
            for node in scope.graph:
                if node.domain or not any(is_float(v) for v in (*node.inputs, *node.outputs)):
                    continue
                kind = (node.op_type, len(node.inputs))
                if kind not in found:
                    found[kind] = _first(node, half, opset, highest, ctx)
        yield from sorted({wanted for wanted in found.values() if wanted is not None})

    return wishes


def _first(node: ir.Node, half: ir.DataType, opset: int, highest: int, ctx: Context) -> int | None:
    """The first opset after the model's own at which the node is legal; None where it is already, or never is."""
    for version in range(opset, highest + 1):
        legality = Legality(ctx.target, half, {"": version})
        if not legality.slots(node).refusal:
            return version if version > opset else None
    return None
