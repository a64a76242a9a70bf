"""Ways to slim a model, tried one after the other; the one whose outputs are nearest on samples held out is best."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.calibrate.screening import Screening
from graphopt.errors import ModelError, OptionError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Calibration
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.runtime.specs import input_specs
from graphopt_passes.prune.branches import Branch, drop_branches, find_branches
from graphopt_passes.prune.channels import (
    HELD_OUT,
    ROUNDING,
    Costs,
    Group,
    choose,
    expense,
    find_groups,
    importances,
    row_axis,
    slimmed,
)
from graphopt_passes.prune.clock import Clock
from graphopt_passes.prune.labels import Labels, propagate
from graphopt_passes.prune.layers import Layer, Wide, find_layers, find_turned
from graphopt_passes.prune.leftover import can_tell, leftovers
from graphopt_passes.prune.reconstruct import (
    divergence,
    input_energies,
    outputs,
    reconstruct,
)
from graphopt_passes.prune.request import Importance, Measure, SparsityRequest
from graphopt_passes.prune.samples import Feeds, batched, read_singles
from graphopt_passes.prune.slim import Keep, kept_indices
from graphopt_passes.prune.ways import Job, Slimming, Stage, Way, unseen
from graphopt_passes.prune.weights import dense_moments

THRIFTS: tuple[float, ...] = (0.0, 0.5, -0.3)
THRIFTS_LARGE = (0.0, -0.3)
"""How much what a channel saves counts beside its importance; models differ in which is better, so all are tried."""

HASTES = (0.0, 1.0)
"""How much the time counts that a channel takes for each multiply-add."""

LARGE = 20_000_000
"""Weights from which on only importance by activations is tried, with two thrifts: each trial costs minutes."""

ROUNDS_FROM, ROUNDS = 0.6, 3
"""From this share on channels go in so many rounds, each fitted before the next is chosen, where that is better."""

THIN = 3
"""One of so many positions of images is looked at then."""

FINALISTS = 2
"""Ways that are tried with all samples, and in rounds: the best at once."""

TURNS, TURNS_LARGE = 3, 1
"""In how many steps branches go, each fitted before the next are chosen."""

RANKED_ON = 32
"""Samples on which branches are ranked."""

ENOUGH = 0.8
"""Of the share of the arithmetic, what shall be saved of the time too."""

ALMOST = 1.15
"""Of what does, the nearest is taken if its error is at most so many times the least of all."""

CLOSE = 0.01
"""Share of the arithmetic for which no channels go any more where branches went."""

FISHER_SAMPLES = 64

SEARCHES = 5
"""Measurements by which the share of the arithmetic is found that saves a share of the time."""

MEASURE_SECONDS = 1.0


def best_slimming(
    model: ir.Model,
    shapes: Shapes,
    request: SparsityRequest,
    calibration: Calibration | None,
    seed: int,
    screening: Screening | None = None,
) -> Slimming | None:
    """The best way found; None where no channel can go.

    Raises:
        OptionError: importance by Fisher information is asked for, and PyTorch or samples are absent.
        ModelError: ... or the interpreter does not know the model.
        DataError: the samples do not fit the model.
    """
    job = _job(model, shapes, request, calibration, seed, screening or Screening())
    which, thrifts = request.importance, THRIFTS if job.feeds else THRIFTS[:1]
    if job.is_large and job.feeds:
        which = Importance.ACTIVATION if which is Importance.AUTO else which
        thrifts = THRIFTS_LARGE
    first = _stage(job, model, shapes, which)
    if first is None:
        return None
    if not request.multiple and _is_short(first, job.share):
        job = dataclasses.replace(job, request=dataclasses.replace(request, block=ROUNDING))
        first = _regrouped(job, first)
    if request.by is Measure.LATENCY:
        job = dataclasses.replace(job, share=_share_by_latency(job, first))
    hastes = HASTES if job.feeds and not job.is_large else HASTES[:1]
    tried = _at_once(job, first, _ways(first, thrifts, hastes))
    tried += _in_rounds(job, first, sorted(tried, key=lambda each: each.error)[:FINALISTS])
    tried += _without_branches(job, first, min(tried, key=lambda each: each.error).way)
    best = _finished(job, _preferred(job, tried))
    if request.by is Measure.LATENCY:
        return dataclasses.replace(best, saved_time=_saved_time(job, best.model))
    return best


def _ways(stage: Stage, thrifts: Sequence[float], hastes: Sequence[float]) -> list[Way]:
    """All ways to try: scores that compare over layers count for what they save, the others also for themselves."""
    found = []
    for importance in stage.scores:
        plain = importance is not Importance.RECONSTRUCTION
        found += [Way(importance, t) for t in (thrifts if plain else (1.0, 0.5))]
        found += [Way(importance, 0.0 if plain else 1.0, h) for h in hastes if h]
    return found


def _job(
    model: ir.Model,
    shapes: Shapes,
    request: SparsityRequest,
    calibration: Calibration | None,
    seed: int,
    screening: Screening,
) -> Job:
    assert request.channels is not None
    specs = input_specs(model)
    singles = [] if calibration is None else read_singles(calibration, specs, screening)
    feeds = batched(singles, specs, batches=HELD_OUT) if singles else []
    layers = [*find_layers(model.graph), *find_turned(model.graph)]
    return Job(
        model,
        request,
        feeds,
        singles,
        share=request.channels,
        total=Costs.of(layers, shapes, request.by).total,
        time=Clock.of(model.graph, shapes, request.multiple or request.block).left({}),
        seed=seed,
        wanted=outputs(model, unseen(feeds)) if feeds else [],
        is_large=sum(layer.size for layer in layers) > LARGE,
    )


def _preferred(job: Job, tried: Sequence[Slimming]) -> Slimming:
    """The nearest that saves what is asked for; if that is arithmetic, one almost as near that saves enough time."""
    least = max(min(each.left for each in tried), 1 - job.share)
    tried = [each for each in tried if each.left <= least + CLOSE]
    nearest = min(tried, key=lambda each: each.error)
    if job.request.by is not Measure.FLOPS:
        return nearest
    fast = [
        each
        for each in tried
        if 1 - each.time >= ENOUGH * job.share and each.error <= ALMOST * nearest.error
    ]
    return min(fast, key=lambda each: each.error, default=nearest)


def _finished(job: Job, best: Slimming) -> Slimming:
    """Fitted to all samples, those that have judged included."""
    if not job.feeds or not job.request.refit:
        return best
    made = load_model(best.model)
    reconstruct(job.model, made, best.keep, job.feeds, job.seed, best.aims)
    return dataclasses.replace(best, model=made)


def _stage(job: Job, model: ir.Model, shapes: Shapes, which: Importance) -> Stage | None:
    """A model with the scores of its channels; None where none can go."""
    labels = propagate(model, shapes)
    layers = [*find_layers(model.graph), *find_turned(model.graph)]
    groups = _groups(job, labels, layers)
    if not groups:
        return None
    energies = input_energies(model, layers, job.feeds) if job.feeds else None
    shares = _contributions(job, model, layers, which)
    scores = importances(which, groups, energies, shares, _losses(job, model, groups, which))
    if not scores:
        raise OptionError(
            f"--sparsity importance={which} needs samples: give --calibration, or choose importance=l2"
        )
    costs = Costs.of(layers, shapes, job.request.by)
    clock = Clock.of(model.graph, shapes, job.request.multiple or job.request.block)
    return Stage(model, labels, groups, layers, costs, clock, scores)


def _losses(
    job: Job, model: ir.Model, groups: Sequence[Group], which: Importance
) -> dict[int, float] | None:
    """What removing each class costs its readers; None where that is not asked for, or would take long."""
    wanted = which is Importance.RECONSTRUCTION or (which is Importance.AUTO and not job.is_large)
    if not wanted or not job.feeds:
        return None
    readers = {
        layer: None
        for group in groups
        for pairs in group.columns.values()
        for layer, _ in pairs
        if can_tell(layer)
    }
    return leftovers(groups, dense_moments(model, list(readers), job.seen, job.seed))


def _groups(job: Job, labels: Labels, layers: list[Layer]) -> list[Group]:
    request = job.request
    found = find_groups(layers, labels, request.multiple or request.block)
    return [group for group in found if not _is_kept(group, request.dense)]


def _regrouped(job: Job, stage: Stage) -> Stage:
    """The stage with the rounding that the job asks for now."""
    return dataclasses.replace(stage, groups=_groups(job, stage.labels, stage.layers))


def _is_short(stage: Stage, share: float) -> bool:
    """Whether all channels that may go save less than `share`: what is narrow has no whole blocks to spare."""
    scores = next(iter(stage.scores.values()))
    most = choose(stage.groups, scores, stage.labels, stage.costs, 1.0)
    return stage.costs.left(kept_indices(stage.labels, most)) > (1 - share) * stage.costs.total


def _contributions(
    job: Job, model: ir.Model, layers: list[Layer], which: Importance
) -> dict[str, Wide] | None:
    """What rows contribute to the answers of samples; None where that is not asked for, or cannot be told."""
    wanted = which is Importance.FISHER
    if not (wanted or which is Importance.AUTO) or not job.singles:
        return None
    if importlib.util.find_spec("torch") is None:
        if wanted:
            raise OptionError(
                "--sparsity importance=fisher needs PyTorch, which is not installed: pip install 'graphopt[distill]', "
                "or choose another importance"
            )
        return None
    fisher: Any = importlib.import_module("graphopt.distill.fisher")
    rows = {layer.name: row_axis(layer) for layer in layers}
    try:
        found: dict[str, Wide] = fisher.contributions(
            model, job.singles[:FISHER_SAMPLES], rows, job.seed
        )
    except ModelError:
        if wanted:
            raise
        return None
    return found


def _is_kept(group: Group, dense: str) -> bool:
    """Whether the user wants a weight dense through which the channels of a group run."""
    pairs = [
        pair for slices in (group.rows, group.columns) for each in slices.values() for pair in each
    ]
    return bool(dense) and any(re.search(dense, layer.name) for layer, _ in pairs)


def _at_once(job: Job, stage: Stage, ways: Iterable[Way]) -> list[Slimming]:
    """All ways, those that choose the same channels once: roughly at first, and then the nearest with all samples."""
    chosen: dict[frozenset[int], Way] = {}
    for way in ways:
        chosen.setdefault(_chosen(stage, way, job.share), way)
    few = job.few if len(job.few) < len(job.seen) else None
    rough = {dropped: _tried(job, stage, way, dropped, {}, few) for dropped, way in chosen.items()}
    if few is None:
        return list(rough.values())
    near = sorted(rough, key=lambda dropped: rough[dropped].error)[:FINALISTS]
    fast = next(d for d in rough if rough[d] is _preferred(job, list(rough.values())))
    return [_tried(job, stage, chosen[d], d, {}) for d in dict.fromkeys([*near, fast])]


def _chosen(stage: Stage, way: Way, share: float) -> frozenset[int]:
    dear = {
        group: max(expense(group, stage.costs), 1e-12) ** way.thrift
        * (_pace(stage, group) ** way.haste if way.haste else 1.0)
        for group in stage.groups
    }
    return choose(
        stage.groups, stage.scores[way.importance], stage.labels, stage.costs, share, dear
    )


def _pace(stage: Stage, group: Group) -> float:
    """The share of the time that goes with one class of a group, over its share of the arithmetic."""
    block = frozenset(group.classes[: group.unit])
    cut = kept_indices(stage.labels, block)
    whole = stage.clock.left({})
    saved = 1 - stage.clock.left(cut) / max(whole, 1e-12)
    return max(saved, 1e-4) / max(len(block) * expense(group, stage.costs), 1e-6)


def _tried(
    job: Job,
    stage: Stage,
    way: Way,
    dropped: frozenset[int],
    before: Keep,
    feeds: Feeds | None = None,
) -> Slimming:
    """The model of a stage without some classes, fitted to the original on some samples, or on all that trials see."""
    made = slimmed(stage.model, stage.labels, dropped)
    cut = kept_indices(stage.labels, dropped)
    keep = composed(before, cut)
    if job.feeds and job.request.refit:
        thin = 1 if feeds is None else THIN
        reconstruct(job.model, made, keep, feeds or job.seen, job.seed, stage.aims, thin=thin)
    error = divergence(job.wanted, made, job.unseen) if job.feeds else 0.0
    left, time = stage.costs.left(cut) / job.total, stage.clock.left(cut) / job.time
    return Slimming(
        way, keep, len(dropped), made, error, left, time, branches=stage.branches, aims=stage.aims
    )


def _in_rounds(job: Job, first: Stage, finalists: list[Slimming]) -> list[Slimming]:
    """The best ways again, a part of the channels at a time."""
    count = job.request.rounds or (ROUNDS if job.share >= ROUNDS_FROM else 1)
    if count == 1 or not job.feeds or not job.request.refit:
        return []
    found = [_rounded(job, first, each.way, count) for each in finalists]
    return [each for each in found if each is not None]


def _rounded(job: Job, first: Stage, way: Way, count: int) -> Slimming | None:
    stage: Stage | None = first
    keep: Keep = {}
    classes, done = 0, None
    for turn in range(1, count + 1):
        if stage is None:
            break
        dropped = _chosen(stage, way, _yet_to_go(job, stage, job.share * turn / count))
        done = _tried(job, stage, way, dropped, keep)
        keep, classes = done.keep, classes + len(dropped)
        if turn < count:
            model = load_model(done.model)
            stage = _stage(job, model, Shapes(model), way.importance)
    return None if done is None else dataclasses.replace(done, classes=classes, rounds=count)


def _yet_to_go(job: Job, stage: Stage, share: float) -> float:
    """The share of what a stage has left that has to go until `share` of the original has gone."""
    return max(1 - (1 - share) * job.total / stage.costs.total, 0.0)


def _without_branches(job: Job, first: Stage, way: Way) -> list[Slimming]:
    """Ways in which whole branches of residual sums go first, ever more of them, and channels for what is missing."""
    wanted = job.feeds and job.request.refit and job.request.blocks
    if not wanted or job.request.by is Measure.PARAMETERS:
        return []
    stage: Stage | None = first
    found: list[Slimming] = []
    turns = TURNS_LARGE if job.is_large else TURNS
    for turn in range(1, turns + 1):
        more = [] if stage is None else _next_branches(job, stage, job.share * turn / turns)
        if stage is None or not more:
            break
        done = _thinned(job, stage, more, way)
        stage = _stage(job, done.model, Shapes(done.model), way.importance)
        if stage is None:
            return [*found, done] if done.left <= 1 - job.share + CLOSE else found
        stage = dataclasses.replace(stage, branches=done.branches, aims=done.aims)
        rest, is_done = _yet_to_go(job, stage, job.share), done.left <= 1 - job.share + CLOSE
        dropped = frozenset() if is_done else _chosen(stage, way, rest)
        found.append(_tried(job, stage, way, dropped, {}))
    return found


def _thinned(job: Job, stage: Stage, more: Sequence[Branch], way: Way) -> Slimming:
    """The model of a stage without some branches, fitted."""
    made = load_model(stage.model)
    new = drop_branches(made, more)
    aims = {name: new.get(aim, aim) for name, aim in stage.aims.items()} | new
    reconstruct(job.model, made, {}, job.seen, job.seed, aims)
    layers = [*find_layers(made.graph), *find_turned(made.graph)]
    left = Costs.of(layers, Shapes(made), job.request.by).total / job.total
    return Slimming(way, {}, 0, made, 0.0, left, branches=(*stage.branches, *more), aims=aims)


def _next_branches(job: Job, stage: Stage, share: float) -> list[Branch]:
    """The branches without which the outputs are nearest, until `share` of the arithmetic has gone; one at least."""
    costs = dict(zip((each.name for each in stage.costs.layers), stage.costs.amounts, strict=True))
    gone = 1 - stage.costs.total / job.total
    known = find_branches(stage.model.graph, stage.layers, Shapes(stage.model))
    kept = re.compile(job.request.dense or "(?!)")
    found: list[Branch] = []
    for branch in _ranked(job, stage, [b for b in known if not any(map(kept.search, b.layers))]):
        spent = sum(costs[name] for name in branch.layers) / job.total
        limit = share if found else job.share
        if spent > 0 and gone + spent <= limit and not any(branch.layers & b.layers for b in found):
            found.append(branch)
            gone += spent
    return found


def _ranked(job: Job, stage: Stage, branches: Sequence[Branch]) -> list[Branch]:
    """Those first without which the outputs are nearest, before anything is fitted to that."""
    feeds, size = [], 0
    for feed in job.unseen:
        feeds.append(feed)
        size += max((len(array) for array in feed.values() if array.ndim), default=1)
        if size >= RANKED_ON:
            break
    errors = {}
    for branch in branches:
        made = load_model(stage.model)
        drop_branches(made, [branch])
        errors[branch] = divergence(job.wanted[: len(feeds)], made, feeds)
    return sorted(branches, key=lambda branch: errors[branch])


def composed(before: Keep, cut: Keep) -> Keep:
    """What stays of the original after two cuts, the second of what the first had left."""
    found = {name: dict(axes) for name, axes in before.items()}
    for name, axes in cut.items():
        mine = found.setdefault(name, {})
        for axis, stay in axes.items():
            mine[axis] = mine[axis][stay] if axis in mine else stay
    return found


def _share_by_latency(job: Job, stage: Stage) -> float:
    """The least share of the arithmetic that saves the share of the time asked for, by bisection."""
    way = Way(next(iter(stage.scores)), THRIFTS[0])
    low, high = 0.0, 0.97
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        made = slimmed(stage.model, stage.labels, _chosen(stage, way, middle))
        if _saved_time(job, made) >= job.share:
            high = middle
        else:
            low = middle
    return high


def _saved_time(job: Job, made: ir.Model) -> float:
    """Share of the CPU time of one run of the original, one sample, one thread."""
    if not job.singles:
        raise OptionError("--sparsity by=latency needs a sample to run: give --calibration")
    options = SessionOptions(threads=1)
    sessions = [
        Session(model_to_bytes(each), level=OptimizationLevel.ALL, options=options)
        for each in (job.model, made)
    ]
    feed = job.singles[0]
    _, slim_latency = measure(sessions, [feed, feed], seconds=MEASURE_SECONDS, min_rounds=15)
    ratio = slim_latency.cpu_ratio
    return 1 - 1 / ratio if ratio > 0 and math.isfinite(ratio) else 0.0
