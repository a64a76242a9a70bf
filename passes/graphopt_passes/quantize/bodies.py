"""Static integers inside If, Loop and Scan: each body is calibrated, chosen and judged as a model of its own.

No runtime shows values within a body, so a body is run by itself on what the graph around it gives it.  Together they
are judged by the outputs of the whole model, for what is off in one turn of a loop is off in the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.samples import Samples
from graphopt.ir import values
from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import Scope, captures, nested
from graphopt.rewrite import Context
from graphopt.runtime.session import Session, SessionOptions
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt.verify.feed_files import Feed
from graphopt_passes.precision.bodies import MAX_TURNS, Arrays, Bodies, standalone, wanted_of
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.placement import is_product
from graphopt_passes.quantize.trials import RULE, Trial, Trials

RECORDED = 32
"""Samples that bodies are followed on, at most: of all batches, since those may take other ways."""

TURNS, BYTES = 64, 1 << 28
"""Turns of one body that are kept, and bytes of all together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What to do in one body.

    Attributes:
        index: of the body among all graphs of the model, outer before inner.
        trials: what it was chosen from.
        best: the choice.
    """

    index: int
    trials: Trials
    best: Trial


Decide = Callable[[ir.Model, Samples, Context], tuple[Trials, Trial]]
"""Chooses what of a model runs on integers."""

Write = Callable[[ir.Model, Choice, ir.Graph], bool]
"""Writes a choice into a body of a model; whether anything changed."""


def graphs_of(model: ir.Model) -> list[ir.Graph]:
    """The main graph and the bodies of a model, outer before inner."""
    return [scope.graph for scope in nested(Scope(model.graph, model.opset_imports))]


def has_products(model: ir.Model) -> bool:
    """Whether any body holds what an integer kernel takes."""
    return any(is_product(node) for graph in graphs_of(model)[1:] for node in graph)


def choose(model: ir.Model, samples: Samples, ctx: Context, decide: Decide) -> list[Choice]:
    """What to run on integers in each body, judged by the outputs of the body; for bodies that samples reached."""
    graphs = graphs_of(model)
    found = []
    turns, endless = _recorded(model, samples)
    for index, graph in enumerate(graphs[1:], 1):
        if not any(is_product(node) for node in graph):
            continue
        if graph not in turns:
            why = f"its loop takes more than {MAX_TURNS} turns, the most that are followed"
            why = why if graph in endless else "no sample reached this body"
            ctx.missed(RULE, graph.name or "", f"stays float: {why}")
            continue
        alone = _alone(model, graph, turns[graph])
        trials, best = decide(alone, _samples(alone, turns[graph]), _context(alone, ctx))
        if best.sites:
            found.append(Choice(index, trials, best))
    return found


def kept(
    model: ir.Model, choices: Sequence[Choice], samples: Samples, ctx: Context, write: Write
) -> list[Choice]:
    """Those choices with which, one after another, the whole model stays within the budget."""
    if not choices:
        return []
    stated = ctx.target.provider != "CPUExecutionProvider"
    judge = Judgement(model, samples.first(JUDGED_BODIES), stated=stated)
    budget = budget_for(Precision.INT8, ctx.options.budget)
    assert budget is not None
    found: list[Choice] = []
    for choice in choices:
        clone = load_model(model)
        graphs = graphs_of(clone)
        for each in (*found, choice):
            write(clone, each, graphs[each.index])
        quality = judge.accuracy(clone, budget)
        name = graphs[choice.index].name or ""
        if quality.passed if ctx.options.budget is not None else quality.is_good:
            found.append(choice)
        else:
            text = f"stays float: accuracy; in 8 bits this body brings the model to {quality.sqnr_db:.1f} dB"
            ctx.missed(RULE, name, text)
    return found


JUDGED_BODIES = 16
"""Samples on which the whole model is compared."""


def _recorded(
    model: ir.Model, samples: Samples
) -> tuple[dict[ir.Graph, list[Arrays]], frozenset[ir.Graph]]:
    """What each body was given, by body; and the bodies within loops that take too many turns to be followed."""
    wanted = wanted_of(model.graph)
    inputs = {value.name for value in model.graph.inputs}
    taps = tuple(name for name in wanted if name not in inputs)
    with on_disk(model) as path:
        session = Session(path, options=SessionOptions(extra_outputs=taps))
    bodies, room = Bodies(model), BYTES
    found: dict[ir.Graph, list[Arrays]] = {}
    for feed in samples.spread(RECORDED):
        known = {**feed.values, **session.run(feed.values)}
        for turn in bodies.turns(model.graph, known):
            kept_turns = found.setdefault(turn.graph, [])
            size = sum(np.asarray(array).nbytes for array in turn.feeds.values())
            if len(kept_turns) < TURNS and size <= room:
                kept_turns.append(turn.feeds)
                room -= size
    endless = (each for body in bodies.endless for each in nested(Scope(body, {})))
    return found, frozenset(scope.graph for scope in endless)


def _alone(model: ir.Model, body: ir.Graph, feeds: Sequence[Arrays]) -> ir.Model:
    """A body as a model; what it captures and no feed can change is a constant of it.

    Inputs that are of one size in all turns state it: what the runtime fuses depends on it.
    """
    graph = standalone(body)
    fixed = {v.name: v for v in captures(body) if values.constant(v) is not None}
    for value in [each for each in graph.inputs if each.name in fixed]:
        tensor = values.constant(fixed[value.name])
        assert tensor is not None
        graph.inputs.remove(value)
        value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
        graph.register_initializer(value)
    for value in graph.inputs:
        sizes = {np.shape(each[value.name or ""]) for each in feeds}
        value.shape = ir.Shape(sizes.pop()) if len(sizes) == 1 else None
    graph.opset_imports.update(model.opset_imports)
    return load_model(ir.Model(graph, ir_version=model.ir_version))


def _samples(alone: ir.Model, feeds: Sequence[Arrays]) -> Samples:
    """What a body was given, as samples of it; shuffled, so that samples kept for judging are of all turns."""
    names = {value.name for value in alone.graph.inputs}
    order = np.random.default_rng(0).permutation(len(feeds))
    turns = tuple(
        Feed(f"turn {index}", {name: a for name, a in feeds[index].items() if name in names})
        for index in order
    )
    return Samples(lambda: iter(turns))


def _context(alone: ir.Model, ctx: Context) -> Context:
    """The run, about a body: its outputs are not those that the user's budget is about."""
    return Context(
        alone,
        ctx.target,
        dataclasses.replace(ctx.options, budget=None),
        ctx.gate,
        remarks=ctx.remarks,
        pass_name=ctx.pass_name,
        cache=ctx.cache,
    )
