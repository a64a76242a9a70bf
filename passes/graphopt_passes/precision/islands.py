"""Whether a region in half pays: what it computes or moves against the casts at its shores."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.scopes import all_graphs
from graphopt_passes.precision.legality import is_float
from graphopt_passes.precision.plan import Decision, Facts, Kind

# fmt: off
_HEAVY = frozenset((
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "MultiHeadAttention", "GroupQueryAttention", "LSTM", "GRU",
    "RNN", "Einsum", "FusedMatMul", "FusedConv", "DeformConv",
))
# fmt: on


def drop_islands(decisions: dict[ir.Node, Decision]) -> dict[ir.Node, Decision]:
    """The decisions, with regions left in float32 that would cost more casts than they have nodes."""
    kept = dict(decisions)
    for region in _regions(decisions):
        if any(node.op_type in _HEAVY for node in region):
            continue
        casts = _shore(region)
        if casts >= len(region):
            reason = f"cost: {casts} casts around {len(region)} cheap nodes would not pay"
            for node in region:
                kept[node] = dataclasses.replace(kept[node], kind=Kind.HIGH, reason=reason)
    return kept


EXPERIMENTS = 1e11
"""Products and sums that experiments may take in all: about twenty seconds on one core."""

_FEWEST, _MOST = 96, 480


def runs_allowed(model: ir.Model, facts: Facts) -> int:
    """How many experiments a model is worth: more where one costs little."""
    total = sum(_work(node, facts) for scope in all_graphs(model) for node in scope.graph)
    return int(min(max(EXPERIMENTS / max(total, 1.0), _FEWEST), _MOST))


def gain(node: ir.Node, facts: Facts) -> float:
    """What a node in half saves, in bytes that need not be moved: operands, casts, arithmetic at its going rate."""
    moved = 0.0
    for value in (*node.inputs, *node.outputs):
        seen = facts.spread(value) if value is not None and is_float(value) else None
        moved += _BESIDE * (0 if seen is None else seen.size)
    return 1.0 + moved + _work(node, facts) / OPERATIONS


_BESIDE = 8.0
"""Bytes for each element of an operand: two less to move, and a cast less that would move six."""

OPERATIONS = 50.0
"""Products and sums that a GPU makes while it moves a byte; GPUs of these years: 20 in float32, 300 in half."""


def _work(node: ir.Node, facts: Facts) -> float:
    """Products and sums of one run of a node."""
    seen = facts.spread(node.outputs[0]) if node.outputs else None
    size = 1 if seen is None else seen.size
    return size * (_depth(node) if node.op_type in _HEAVY else 1)


def _depth(node: ir.Node) -> float:
    """Products for each element of the result, by the size of the weights."""
    tensors = [tensor for v in node.inputs if (tensor := values.constant(v)) is not None]
    largest = max(tensors, key=lambda tensor: tensor.size, default=None)
    if largest is None or len(largest.shape) == 0:
        return 64.0
    shape = largest.shape.numpy()
    return largest.size / max(shape[-1] if node.op_type in ("MatMul", "Gemm") else shape[0], 1)


def _regions(decisions: dict[ir.Node, Decision]) -> list[list[ir.Node]]:
    """Nodes in half that hand halves to one another."""
    low = {node for node, d in decisions.items() if d.kind in (Kind.LOW, Kind.FOLLOW)}
    seen: set[ir.Node] = set()
    regions = []
    for start in decisions:
        if start not in low or start in seen:
            continue
        region, pending = [], [start]
        seen.add(start)
        while pending:
            node = pending.pop()
            region.append(node)
            for mate in _mates(node):
                if mate in low and mate not in seen:
                    seen.add(mate)
                    pending.append(mate)
        regions.append(region)
    return regions


def _mates(node: ir.Node) -> list[ir.Node]:
    found = [
        maker
        for value in node.inputs
        if is_float(value) and value is not None and (maker := value.producer()) is not None
    ]
    found += [use.node for value in node.outputs if is_float(value) for use in value.uses()]
    return found


def _shore(region: list[ir.Node]) -> int:
    """Values that would be cast on their way in or out."""
    inside = set(region)
    entering = {
        value
        for node in region
        for value in node.inputs
        if value is not None
        and is_float(value)
        and value.producer() not in inside
        and not values.is_constant(value)
    }
    leaving = {
        value
        for node in region
        for value in node.outputs
        if is_float(value)
        and (value.is_graph_output() or any(use.node not in inside for use in value.uses()))
    }
    return len(entering) + len(leaving)
