"""Carries out `--sparsity channels:R`: tries the measures of importance, keeps the best, says what was saved."""

from __future__ import annotations

import dataclasses
import itertools
import re

import onnx_ir as ir

from graphopt.ir import fingerprint
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.rewrite import Calibration, Context, RemarkKind
from graphopt.runtime.specs import input_specs
from graphopt_passes.prune.channels import (
    HELD_OUT,
    Costs,
    Group,
    choose,
    divergence,
    find_groups,
    importances,
    input_energies,
    reconstruct,
    slimmed,
)
from graphopt_passes.prune.labels import propagate
from graphopt_passes.prune.layers import find_layers
from graphopt_passes.prune.request import Importance, Measure, SparsityRequest
from graphopt_passes.prune.samples import Feeds, batched, read_singles
from graphopt_passes.prune.slim import kept_indices, slim

RULE = "channels"

THRIFTS: tuple[float, ...] = (0.0, 0.5, -0.3)
THRIFTS_LARGE = (0.0, -0.3)
"""How much what a channel saves counts beside its importance; models differ in which is better, so all are tried."""

_WHAT = {Measure.FLOPS: "multiply-adds", Measure.PARAMETERS: "weights"}

LARGE = 20_000_000
"""Weights from which on only importance by activations is tried, with two thrifts: each trial costs minutes."""

_BLIND = (
    "no samples were given, so that channels were chosen by their weights alone and the others could not make up for "
    "them: this usually costs most of the accuracy; give --calibration"
)


@dataclasses.dataclass(frozen=True)
class Slimming:
    """One way to slim a model, and how far its outputs then are from the original's.

    Attributes:
        importance: how channels were chosen.
        dropped: classes that are removed.
        model: the slimmed clone, fitted.
        error: of the outputs on every `HELD_OUT`-th batch; 0 without samples.
        left: share of the arithmetic.
    """

    importance: Importance
    dropped: frozenset[int]
    model: ir.Model
    error: float
    left: float


def remove_channels(model: ir.Model, ctx: Context, request: SparsityRequest, text: str) -> bool:
    """Removes channels from `model` in place until the share asked for is saved; returns whether any went."""
    site = model.graph.name or "main"
    if not ctx.permit(RULE, site, Numerics.LOSSY):
        return False
    key = f"slim:{text}:{fingerprint.structural(model)}:{fingerprint.weights(model)}"
    best: Slimming | None = ctx.cache.get(key)
    if best is None:
        best = _best(model, ctx, request)
        ctx.cache[key] = best
    if best is None or not best.dropped:
        reason = "no channels can be removed: inputs, outputs or operators that are not known hold all of them"
        ctx.remark(RemarkKind.WARNING, RULE, site, reason)
        return False
    _adopt(model, ctx, best)
    _tell(ctx, site, request, best)
    return True


def _best(model: ir.Model, ctx: Context, request: SparsityRequest) -> Slimming | None:
    labels = propagate(model, ctx.shapes)
    layers = find_layers(model.graph)
    groups = [g for g in find_groups(layers, labels) if not _is_kept(g, request.dense)]
    if not groups or request.channels is None:
        return None
    feeds = _feeds(model, ctx.options.calibration)
    seed = ctx.options.seed
    energies = input_energies(model, layers, feeds) if feeds else None
    costs = Costs.of(layers, ctx.shapes, request.by)
    tried: list[Slimming] = []
    which, thrifts = request.importance, THRIFTS if feeds else THRIFTS[:1]
    if sum(layer.size for layer in layers) > LARGE and feeds:
        which = Importance.ACTIVATION if which is Importance.AUTO else which
        thrifts = THRIFTS_LARGE
    ways = itertools.product(importances(which, groups, energies).items(), thrifts)
    for (which, scores), thrift in ways:
        dropped = choose(groups, scores, labels, costs, request.channels, thrift)
        if any(dropped == each.dropped for each in tried):
            continue
        made = slimmed(model, labels, dropped)
        keep = kept_indices(labels, dropped)
        if feeds and request.refit:
            reconstruct(model, made, keep, feeds, seed)
        unseen = feeds[HELD_OUT - 1 :: HELD_OUT] or feeds
        error = divergence(model, made, unseen) if feeds else 0.0
        tried.append(Slimming(which, dropped, made, error, costs.left(keep) / costs.total))
    return min(tried, key=lambda each: each.error)


def _is_kept(group: Group, dense: str) -> bool:
    """Whether the user wants a weight dense through which the channels of a group run."""
    pairs = [
        pair for slices in (group.rows, group.columns) for each in slices.values() for pair in each
    ]
    return bool(dense) and any(re.search(dense, layer.name) for layer, _ in pairs)


def _feeds(model: ir.Model, calibration: Calibration | None) -> Feeds:
    """Samples in at least `HELD_OUT` batches, so that one can be held out."""
    if calibration is None:
        return []
    specs = input_specs(model)
    singles = read_singles(calibration, specs)
    return batched(singles, specs, batches=HELD_OUT)


def _adopt(model: ir.Model, ctx: Context, best: Slimming) -> None:
    """Does to the model itself what was done to the clone."""
    labels = propagate(model, ctx.shapes)
    slim(model, kept_indices(labels, best.dropped), Names.of(model))
    clone = load_model(best.model)
    for name, value in model.graph.initializers.items():
        if name in clone.graph.initializers:
            value.const_value = clone.graph.initializers[name].const_value
    ctx.refresh()


def _tell(ctx: Context, site: str, request: SparsityRequest, best: Slimming) -> None:
    saved = 1 - best.left
    said = f"{len(best.dropped)} channels removed: {saved:.1%} of the {_WHAT[request.by]}, chosen by {best.importance}"
    if ctx.options.calibration is None:
        ctx.remark(RemarkKind.WARNING, RULE, site, _BLIND)
    else:
        said += f"; outputs differ by {best.error:.1%} (RMS) on every fifth batch of samples"
    ctx.remark(RemarkKind.NOTE, RULE, site, said)
    assert request.channels is not None
    if saved < request.channels - 0.01:
        reason = f"short of {request.channels:.0%}: what is left is needed, or holds its last tenth"
        ctx.remark(RemarkKind.WARNING, RULE, site, f"{said}, {reason}")
