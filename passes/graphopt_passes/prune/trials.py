"""Ways to slim a model, tried one after the other; the one whose outputs are nearest on samples held out is best."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError, OptionError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Calibration
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.runtime.specs import input_specs
from graphopt_passes.prune.channels import (
    HELD_OUT,
    ROUNDING,
    Costs,
    Group,
    choose,
    divergence,
    find_groups,
    importances,
    input_energies,
    reconstruct,
    row_axis,
    slimmed,
)
from graphopt_passes.prune.labels import Labels, propagate
from graphopt_passes.prune.layers import Layer, Wide, find_layers, find_turned
from graphopt_passes.prune.request import Importance, Measure, SparsityRequest
from graphopt_passes.prune.samples import Feeds, batched, read_singles
from graphopt_passes.prune.slim import Keep, kept_indices

THRIFTS: tuple[float, ...] = (0.0, 0.5, -0.3)
THRIFTS_LARGE = (0.0, -0.3)
"""How much what a channel saves counts beside its importance; models differ in which is better, so all are tried."""

LARGE = 20_000_000
"""Weights from which on only importance by activations is tried, with two thrifts: each trial costs minutes."""

ROUNDS_FROM, ROUNDS = 0.6, 3
"""From this share on channels go in so many rounds, each fitted before the next is chosen, where that is better."""

FINALISTS = 2
"""Ways that are tried in rounds: the best at once."""

FISHER_SAMPLES = 64

SEARCHES = 5
"""Measurements by which the share of the arithmetic is found that saves a share of the time."""

MEASURE_SECONDS = 1.0

Way = tuple[Importance, float]


@dataclasses.dataclass(frozen=True)
class Slimming:
    """One way to slim a model, and how far its outputs then are from the original's.

    Attributes:
        importance: how channels were chosen.
        thrift: how much what a channel saves counted.
        keep: which indices stay.
        classes: how many channels went.
        model: the slimmed clone, fitted.
        error: of the outputs on every `HELD_OUT`-th batch; 0 without samples.
        left: share of the arithmetic.
        rounds: in how many the channels went.
        saved_time: share of the latency, where it was measured.
    """

    importance: Importance
    thrift: float
    keep: Keep
    classes: int
    model: ir.Model
    error: float
    left: float
    rounds: int = 1
    saved_time: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same over all trials."""

    model: ir.Model
    request: SparsityRequest
    feeds: Feeds
    singles: Feeds
    share: float
    total: float
    seed: int

    @property
    def unseen(self) -> Feeds:
        return self.feeds[HELD_OUT - 1 :: HELD_OUT] or self.feeds


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A model on its way, and what is known of its channels."""

    model: ir.Model
    labels: Labels
    groups: list[Group]
    layers: list[Layer]
    costs: Costs
    scores: Mapping[Importance, Mapping[int, float]]


def best_slimming(
    model: ir.Model,
    shapes: Shapes,
    request: SparsityRequest,
    calibration: Calibration | None,
    seed: int,
) -> Slimming | None:
    """The best way found; None where no channel can go.

    Raises:
        OptionError: importance by Fisher information is asked for, and PyTorch or samples are absent.
        ModelError: ... or the interpreter does not know the model.
        DataError: the samples do not fit the model.
    """
    assert request.channels is not None
    specs = input_specs(model)
    singles = [] if calibration is None else read_singles(calibration, specs)
    feeds = batched(singles, specs, batches=HELD_OUT) if singles else []
    layers = [*find_layers(model.graph), *find_turned(model.graph)]
    total = Costs.of(layers, shapes, request.by).total
    job = _Job(model, request, feeds, singles, request.channels, total, seed)
    size = sum(layer.size for layer in layers)
    which, thrifts = request.importance, THRIFTS if feeds else THRIFTS[:1]
    if size > LARGE and feeds:
        which = Importance.ACTIVATION if which is Importance.AUTO else which
        thrifts = THRIFTS_LARGE
    first = _stage(job, model, shapes, which)
    if first is None:
        return None
    if not request.multiple and _is_short(first, job.share):
        request = dataclasses.replace(request, block=ROUNDING)
        job = dataclasses.replace(job, request=request)
        first = _regrouped(job, first)
    if request.by is Measure.LATENCY:
        job = dataclasses.replace(job, share=_share_by_latency(job, first))
    tried = _at_once(job, first, itertools.product(first.scores, thrifts))
    tried += _in_rounds(job, first, sorted(tried, key=lambda each: each.error)[:FINALISTS])
    best = min(tried, key=lambda each: each.error)
    if request.by is Measure.LATENCY:
        return dataclasses.replace(best, saved_time=_saved_time(job, best.model))
    return best


def _stage(job: _Job, model: ir.Model, shapes: Shapes, which: Importance) -> _Stage | None:
    """A model with the scores of its channels; None where none can go."""
    labels = propagate(model, shapes)
    layers = [*find_layers(model.graph), *find_turned(model.graph)]
    groups = _groups(job, labels, layers)
    if not groups:
        return None
    energies = input_energies(model, layers, job.feeds) if job.feeds else None
    shares = _contributions(job, model, layers, which)
    scores = importances(which, groups, energies, shares)
    if not scores:
        raise OptionError(
            f"--sparsity importance={which} needs samples: give --calibration, or choose importance=l2"
        )
    costs = Costs.of(layers, shapes, job.request.by)
    return _Stage(model, labels, groups, layers, costs, scores)


def _groups(job: _Job, labels: Labels, layers: list[Layer]) -> list[Group]:
    request = job.request
    found = find_groups(layers, labels, request.multiple or request.block)
    return [group for group in found if not _is_kept(group, request.dense)]


def _regrouped(job: _Job, stage: _Stage) -> _Stage:
    """The stage with the rounding that the job asks for now."""
    return dataclasses.replace(stage, groups=_groups(job, stage.labels, stage.layers))


def _is_short(stage: _Stage, share: float) -> bool:
    """Whether all channels that may go save less than `share`: what is narrow has no whole blocks to spare."""
    scores = next(iter(stage.scores.values()))
    most = choose(stage.groups, scores, stage.labels, stage.costs, 1.0)
    return stage.costs.left(kept_indices(stage.labels, most)) > (1 - share) * stage.costs.total


def _contributions(
    job: _Job, model: ir.Model, layers: list[Layer], which: Importance
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


def _at_once(job: _Job, stage: _Stage, ways: Iterable[Way]) -> list[Slimming]:
    """All ways, those that choose the same channels once."""
    seen: set[frozenset[int]] = set()
    found = []
    for way in ways:
        dropped = _chosen(stage, way, job.share)
        if dropped not in seen:
            seen.add(dropped)
            found.append(_tried(job, stage, way, dropped, {}))
    return found


def _chosen(stage: _Stage, way: Way, share: float) -> frozenset[int]:
    which, thrift = way
    return choose(stage.groups, stage.scores[which], stage.labels, stage.costs, share, thrift)


def _tried(job: _Job, stage: _Stage, way: Way, dropped: frozenset[int], before: Keep) -> Slimming:
    """The model of a stage without some classes, fitted to the original."""
    made = slimmed(stage.model, stage.labels, dropped)
    cut = kept_indices(stage.labels, dropped)
    keep = composed(before, cut)
    if job.feeds and job.request.refit:
        reconstruct(job.model, made, keep, job.feeds, job.seed)
    error = divergence(job.model, made, job.unseen) if job.feeds else 0.0
    left = stage.costs.left(cut) / job.total
    return Slimming(way[0], way[1], keep, len(dropped), made, error, left)


def _in_rounds(job: _Job, first: _Stage, finalists: list[Slimming]) -> list[Slimming]:
    """The best ways again, a part of the channels at a time."""
    count = job.request.rounds or (ROUNDS if job.share >= ROUNDS_FROM else 1)
    if count == 1 or not job.feeds or not job.request.refit:
        return []
    found = [_rounded(job, first, (each.importance, each.thrift), count) for each in finalists]
    return [each for each in found if each is not None]


def _rounded(job: _Job, first: _Stage, way: Way, count: int) -> Slimming | None:
    stage: _Stage | None = first
    keep: Keep = {}
    classes, done = 0, None
    for turn in range(1, count + 1):
        if stage is None:
            break
        goal = (1 - job.share * turn / count) * job.total
        dropped = _chosen(stage, way, max(1 - goal / stage.costs.total, 0.0))
        done = _tried(job, stage, way, dropped, keep)
        keep, classes = done.keep, classes + len(dropped)
        if turn < count:
            model = load_model(done.model)
            stage = _stage(job, model, Shapes(model), way[0])
    return None if done is None else dataclasses.replace(done, classes=classes, rounds=count)


def composed(before: Keep, cut: Keep) -> Keep:
    """What stays of the original after two cuts, the second of what the first had left."""
    found = {name: dict(axes) for name, axes in before.items()}
    for name, axes in cut.items():
        mine = found.setdefault(name, {})
        for axis, stay in axes.items():
            mine[axis] = mine[axis][stay] if axis in mine else stay
    return found


def _share_by_latency(job: _Job, stage: _Stage) -> float:
    """The least share of the arithmetic that saves the share of the time asked for, by bisection."""
    way = (next(iter(stage.scores)), THRIFTS[0])
    low, high = 0.0, 0.97
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        made = slimmed(stage.model, stage.labels, _chosen(stage, way, middle))
        if _saved_time(job, made) >= job.share:
            high = middle
        else:
            low = middle
    return high


def _saved_time(job: _Job, made: ir.Model) -> float:
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
