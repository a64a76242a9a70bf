"""The whole of refinement: experiments on gates, islands left out, and a look at the graph that would be emitted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.scopes import all_graphs
from graphopt.rewrite import Context
from graphopt.runtime.emulate import emulate
from graphopt.runtime.session import Session
from graphopt.verify.compare import Budget
from graphopt_passes.precision.apply import Emission
from graphopt_passes.precision.flow import Masks
from graphopt_passes.precision.gates import Gates
from graphopt_passes.precision.islands import drop_islands, gain, runs_allowed
from graphopt_passes.precision.plan import Decision, Facts, Kind
from graphopt_passes.precision.ranges import MANY, Feeds, is_small
from graphopt_passes.precision.refine import TARGET, Refinement, Trait, refine

MAX_ROUNDS = 3
"""How often islands are left out and what is left is tried again."""

EMITTED = 0.97
"""Of the budget: what the emitted graph may take; later passes move a rounding here and there."""

TRIED = 0.95
"""Of the budget: what experiments aim at where they run on many draws; on few, the next one may be worse by a third."""

STRICTER = (0.7, 0.45)
"""Of the budget: what experiments aim at after the emitted graph took more than they said."""


def settle(
    model: ir.Model,
    decisions: dict[ir.Node, Decision],
    facts: Facts,
    feeds: Feeds,
    budget: Budget,
    ctx: Context,
) -> Refinement:
    """The nodes that have to go back to float32 so that the emitted graph is within the budget.

    Args:
        model: in float32; it is not changed.
        decisions: by node.
        facts: on which they rest.
        feeds: to judge on.
        budget: what is allowed.
        ctx: the run.

    Raises:
        ModelError: ONNX Runtime refuses the model with gates.
    """
    gates = Gates.of(model, decisions, facts.half, facts.masks, feeds, budget)
    limit = runs_allowed(model, facts)
    search = functools.partial(
        refine,
        len(gates.nodes),
        gates,
        traits=[Trait(gain(node, facts), node.op_type) for node in gates.nodes],
        target=TRIED if len(feeds) >= MANY else TARGET,
    )
    found = _without_islands(search(limit=limit), decisions, gates, limit, search)
    for target in STRICTER if is_small(model) else ():
        kept = without(decisions, gates.nodes, found.raised)
        if gates.judge(_emitted(model, kept, facts, ctx)) <= EMITTED:
            break
        again = search(limit=gates.runs + limit // 2, raised=found.raised, target=target)
        found = _without_islands(_continued(found, again), decisions, gates, limit, search)
    return found


def without(
    decisions: Mapping[ir.Node, Decision], gated: Sequence[ir.Node], raised: Mapping[int, str]
) -> dict[ir.Node, Decision]:
    """The decisions with some gated nodes in float32, and without the islands that this makes."""
    if not raised:
        return dict(decisions)
    high = {gated[index]: Decision(Kind.HIGH, reason) for index, reason in raised.items()}
    return drop_islands({**decisions, **high})


def _without_islands(
    found: Refinement,
    decisions: Mapping[ir.Node, Decision],
    gates: Gates,
    limit: int,
    search: Callable[..., Refinement],
) -> Refinement:
    """What experiments say, islands that do not pay left out: leaving out a rounding is no smaller error always."""
    for _ in range(MAX_ROUNDS):
        kept = without(decisions, gates.nodes, found.raised)
        dropped = {
            index: kept[node].reason
            for index, node in enumerate(gates.nodes)
            if kept[node].kind is Kind.HIGH and index not in found.raised
        }
        found = dataclasses.replace(found, raised={**found.raised, **dropped})
        if not dropped or len(found.raised) == len(gates.nodes):
            break
        again = search(limit=gates.runs + limit // 2, raised=found.raised)
        found = _continued(found, again)
        if again.before <= 1:
            break
    return found


def _continued(found: Refinement, again: Refinement) -> Refinement:
    return dataclasses.replace(found, raised=again.raised, after=again.after, runs=again.runs)


def _emitted(
    model: ir.Model, decisions: Mapping[ir.Node, Decision], facts: Facts, ctx: Context
) -> Session:
    """The graph that the decisions lead to, emulated, made from a copy of the model."""
    copy = load_model(model)
    nodes, held = dict[ir.Node, ir.Node](), dict[ir.Value, ir.Value]()
    for ours, theirs in zip(all_graphs(model), all_graphs(copy), strict=True):
        held |= zip(ours.graph.inputs, theirs.graph.inputs, strict=True)
        held |= {v: theirs.graph.initializers[n] for n, v in ours.graph.initializers.items()}
        for node, twin in zip(ours.graph, theirs.graph, strict=True):
            nodes[node] = twin
            held |= zip(node.outputs, twin.outputs, strict=True)
    kept = (facts.masks.constants, facts.masks.carriers, facts.masks.finite)
    masks = Masks(*(frozenset(held[v] for v in each) for each in kept))
    twins = {nodes[node]: decision for node, decision in decisions.items()}
    trial = Context(copy, ctx.target, ctx.options)
    Emission(copy, twins, facts.half, masks, trial).run()
    return Session(model_to_bytes(emulate(copy)))
