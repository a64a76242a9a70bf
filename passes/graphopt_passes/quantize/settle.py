"""How values and weights become integers, before it is asked which: each method is kept where it lowers the noise.

Judged on samples that ranges were not taken from, with all layers in 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.formats import Parameters
from graphopt.calibrate.moments import collect_moments
from graphopt.calibrate.ranges import Method
from graphopt.calibrate.statistics import Statistics
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.rewrite import RemarkKind, name_of
from graphopt_passes.quantize import equalize, inlets
from graphopt_passes.quantize.certificate import host_saturates
from graphopt_passes.quantize.emission import quantize
from graphopt_passes.quantize.equalize import Measure
from graphopt_passes.quantize.facts import Facts
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.kinds import BYTES
from graphopt_passes.quantize.overrides import Override
from graphopt_passes.quantize.placement import Role
from graphopt_passes.quantize.probing import TRIALS, Probe, Ranging, search
from graphopt_passes.quantize.quality import won
from graphopt_passes.quantize.trials import RULE, Trials
from graphopt_passes.quantize.windows import windows

SATURATION_MARGIN_DB = 12.0
"""How far below the noise of quantisation saturation must lie to be let through: it adds a quarter of a decibel."""

EQUALIZED_DB = 0.5
"""What equalisation must win on the samples to be kept: it fits ranges of single channels to them."""

REFINED_DB = 0.2
"""What rounding by second moments, and ranges by outputs, must win to be kept."""

RANGED_DB = 0.5
"""What another way to find ranges must win over the one that loses the least of each value."""

PROBED, LEAST_PROBED = 24, 4
"""Samples on which the range of a single value is judged by the outputs; with fewer than the second, it is not."""

RANGED_NS = 30e9
"""Predicted nanoseconds that this may take."""

OTHERS = (Method.PERCENTILE, Method.MIN_MAX)
"""Ways to find ranges that are tried where noise is too much: what an outlier is worth only the output can tell."""


Ranges = Callable[[Trials, frozenset[str], Mapping[str, Statistics]], None]
"""Settles the ranges of values; those that are as they were keep theirs."""


def fuse(trials: Trials, allowed: frozenset[str]) -> frozenset[str]:
    """Chooses how wide weights are; returns the nodes that the runtime fuses."""
    _settle_width(trials, allowed)
    fused = trials.fused(allowed)
    trials.whole = trials.placed(fused)
    return fused


def settle(trials: Trials, fused: frozenset[str]) -> None:
    """Chooses the other methods."""
    ranges = _settle_values if _probed(trials) else _settle_ranges
    ranges(trials, fused, {})
    before = trials.facts.statistics
    if _settle_channels(trials, fused):
        ranges(trials, fused, before)
    _settle_inlets(trials, fused, ranges)
    _settle_rounding(trials, fused)


def _note(trials: Trials, text: str) -> None:
    trials.ctx.remark(RemarkKind.NOTE, RULE, "", text)


def _merit(trials: Trials, fused: frozenset[str]) -> float:
    """How good it is with all layers in 8 bits."""
    quality = trials.judged(fused).quality
    assert quality is not None
    return quality.merit_db


def _settle_width(trials: Trials, allowed: frozenset[str]) -> None:
    """Lets weights take the whole range of bytes where saturation of 16-bit sums does not bite on the samples.

    The worst case of every layer could saturate; real activations seldom meet it, and the guard costs up to a bit.
    """
    if not trials.style.saturates or not trials.on_host or not host_saturates():
        return  # a machine that does not saturate cannot tell what happens on one that does
    full = dataclasses.replace(trials.style, name=f"{trials.style.name} full", saturates=False)
    facts = dataclasses.replace(trials.facts, style=full)
    agreement, noise = _saturation(trials, facts, allowed)
    if agreement < noise + SATURATION_MARGIN_DB:
        _note(
            trials,
            "weights are coarser where sums of 16 bits could saturate: at full range the kernels agree with Q and DQ "
            f"to {agreement:.0f} dB only",
        )
        return
    trials.style, trials.facts = full, facts
    trials.key += " full"


def _saturation(trials: Trials, facts: Facts, allowed: frozenset[str]) -> tuple[float, float]:
    """How far the kernels agree with Q and DQ, and the signal to noise, in dB, of weights at full range."""
    assert trials.budget is not None
    key = f"agreement:{trials.key}"
    if key not in trials.ctx.cache:
        clone = load_model(trials.model)
        names = trials.all_sites(allowed)
        quantize(clone, facts, lambda node: name_of(node) in names, Names.of(clone))
        noise = trials.judge.accuracy(clone, trials.budget).sqnr_db
        trials.ctx.cache[key] = (trials.judge.agreement(clone), noise)
    agreement, noise = trials.ctx.cache[key]
    return float(agreement), float(noise)


def _settle_ranges(
    trials: Trials, fused: frozenset[str], _before: Mapping[str, Statistics]
) -> None:
    """Where all layers together are too noisy, tries ranges that lose more of the values and less of the outputs."""
    if trials.overrides.method is not Method.BEST or trials.is_enough(trials.judged(fused)):
        return
    plain, facts, key = _merit(trials, fused), trials.facts, trials.key
    found = {key: (plain + RANGED_DB, facts)}
    for method in OTHERS:
        overrides = dataclasses.replace(facts.overrides, method=method)
        trials.facts = dataclasses.replace(facts, overrides=overrides, chosen={})
        trials.key = f"{key} {method}"
        found[trials.key] = (_merit(trials, fused), trials.facts)
    trials.key = max(found, key=lambda each: found[each][0])
    best, trials.facts = found[trials.key]
    if trials.facts is not facts:
        method = trials.facts.overrides.method
        _note(
            trials,
            f"ranges by {method}: {best - plain:.1f} dB less noise with all layers in 8 bits",
        )


def _probed(trials: Trials) -> int:
    """Samples on which to ask what the range of each value does to the outputs; 0 where that takes too long."""
    if trials.overrides.method is not Method.BEST:
        return 0
    each = (
        2 * TRIALS * len(trials.whole) * trials.costs.plain(trials.whole)
    )  # switches hinder fusion
    count = int(RANGED_NS / each) if each > 0 else PROBED
    return 0 if count < LEAST_PROBED else min(count, PROBED)


def _settle_values(trials: Trials, fused: frozenset[str], before: Mapping[str, Statistics]) -> None:
    """Chooses the range of each value by what it does to the outputs, if that lowers the noise of all together.

    Values that are as they were `before` keep what was chosen for them then.
    """
    facts, key = trials.facts, trials.key
    every = _ranged_values(trials, fused)
    names = tuple(name for name in every if not _is_as_before(name, facts.statistics, before))
    cached = f"ranged:{key}"
    if cached not in trials.ctx.cache:

        def resolve(name: str, each: Ranging) -> Parameters:
            return (
                dataclasses.replace(facts, ranged={name: each}, chosen={}).choice(name).parameters
            )

        quality = trials.judged(fused).quality
        classes = quality is not None and quality.change is not None
        feeds = trials.parts[0].first(_probed(trials))
        probe = Probe(trials.model, names, feeds, classes=classes)
        chosen = {name: each for name, each in facts.ranged.items() if name not in names}
        trials.ctx.cache[cached] = chosen | search(probe, names, resolve)
    ranged: Mapping[str, Ranging] = trials.ctx.cache[cached]
    if ranged == facts.ranged:
        return
    told = f"ranges of {len(ranged)} values by what they do to the outputs"
    facts = dataclasses.replace(facts, ranged=ranged, chosen={})
    _adopt(trials, fused, facts, "ranged", told, doubts=1.0)  # chosen from many on few samples


def _is_as_before(
    name: str, found: Mapping[str, Statistics], before: Mapping[str, Statistics]
) -> bool:
    """Whether a value has the range that it had, up to rounding."""
    if name not in before or name not in found:
        return False
    return bool(np.allclose(found[name].mean_range, before[name].mean_range, rtol=1e-3))


def _adopt(
    trials: Trials, fused: frozenset[str], facts: Facts, how: str, told: str, doubts: float = 0.0
) -> None:
    """Goes by other facts where that lowers the noise, by more than so many of its standard errors."""
    plain, was, key = trials.judged(fused).quality, trials.facts, trials.key
    trials.facts, trials.key = facts, f"{key} {how}"
    found = trials.judged(fused).quality
    assert plain is not None
    assert found is not None
    gain, error = won(plain, found)
    if gain - doubts * error < REFINED_DB:
        trials.facts, trials.key = was, key
        return
    _note(trials, f"{told}: {gain:.1f} dB less noise with all layers in 8 bits")


def _ranged_values(trials: Trials, fused: frozenset[str]) -> tuple[str, ...]:
    """Names of the values that have a range of their own: what only moves takes that of what it was."""
    sites = trials.placed(fused)
    moved = {v for site in sites.values() if site.role is Role.MOVE for v in site.results}
    found: dict[ir.Value, None] = {}
    for site in sites.values():
        read = [site.node.inputs[index] for index in site.activations]
        found.update(dict.fromkeys(v for v in (*read, *site.held) if v is not None))
    facts = trials.facts
    return tuple(
        name
        for value in found
        if value not in moved
        and (name := value.name)
        and facts.said(name) == Override()
        and facts.kind(name) in BYTES
    )


def _settle_channels(trials: Trials, fused: frozenset[str]) -> bool:
    """Scales channels so that one range serves them all, where that lowers the noise on the samples."""
    plain = _merit(trials, fused)
    model, facts, key = trials.model, trials.facts, trials.key
    best, chosen = plain + EQUALIZED_DB, (model, facts, key, trials.scalings)
    for measure in Measure:
        scalings = equalize.plan(model.graph, facts.statistics, measure)
        if not scalings:
            continue
        trials.model = load_model(model)
        equalize.apply(trials.model.graph, scalings, Names.of(trials.model))
        trials.bare, trials.key = trials.model, f"{key} equalized by {measure}"
        statistics = trials.statistics(trials.model, trials.key, 0)
        trials.facts = dataclasses.replace(facts, statistics=statistics, chosen={})
        noise = _merit(trials, fused)
        if noise > best:
            best, chosen = noise, (trials.model, trials.facts, trials.key, scalings)
        if trials.is_enough(trials.judged(fused)):
            break
    trials.model, trials.facts, trials.key, trials.scalings = chosen
    trials.bare = trials.model
    if trials.scalings:
        trials.whole = trials.placed(fused)
        trials.costs = trials.costs_of(trials.facts)
        _note(
            trials,
            f"channels equalised: {best - plain:.1f} dB less noise with all layers in 8 bits",
        )
    return bool(trials.scalings)


def _settle_inlets(trials: Trials, fused: frozenset[str], ranges: Ranges) -> None:
    """Multiplies channels in front of products where nothing before could carry the factors, and noise is too much."""
    if trials.overrides.method is not Method.BEST or not trials.on_host:
        return  # what a factor takes, only a table of times can tell
    if trials.is_enough(trials.judged(fused)):
        return
    plain, facts, key = _merit(trials, fused), trials.facts, trials.key
    found = inlets.plan(trials.whole, facts.statistics, Names.of(trials.bare))
    if not found:
        return
    trials.model, trials.inlets, trials.key = load_model(trials.bare), found, f"{key} factored"
    inlets.insert(trials.model.graph, found, fused, Names.of(trials.model))
    statistics = trials.statistics(trials.model, trials.key, 0)
    trials.facts = dataclasses.replace(facts, statistics=statistics, chosen={})
    trials.whole = trials.placed(fused)
    trials.costs = trials.costs_of(trials.facts)
    ranges(trials, fused, facts.statistics)
    gain = _merit(trials, fused) - plain
    if gain >= EQUALIZED_DB:
        text = f"factors for channels of {len(found)} values in front of products: {gain:.1f} dB less noise"
        _note(trials, f"{text} with all layers in 8 bits")
        return
    trials.model, trials.inlets, trials.facts, trials.key = trials.bare, (), facts, key
    trials.whole = trials.placed(fused)
    trials.costs = trials.costs_of(facts)


def _settle_rounding(trials: Trials, fused: frozenset[str]) -> None:
    """Rounds weights by second moments of what they are multiplied with, where that lowers the noise."""
    if trials.style.saturates:
        return
    moments = _moments(trials, fused)
    if not moments:
        return
    facts = dataclasses.replace(trials.facts, moments=moments, refined={})
    _adopt(trials, fused, facts, "refined", "weights rounded by second moments")


def _moments(trials: Trials, fused: frozenset[str]) -> Mapping[str, np.ndarray]:
    wanted = windows(trials.placed(fused), trials.costs.elements)
    key = f"moments:{trials.key}"
    if wanted and key not in trials.ctx.cache:
        inputs = list(dict.fromkeys(wanted.values()))
        with on_disk(trials.model) as path:
            found = collect_moments(path, inputs, trials.parts[0])
        trials.ctx.cache[key] = {
            name: found[each] for name, each in wanted.items() if each in found
        }
    known: Mapping[str, np.ndarray] = trials.ctx.cache.get(key, {})
    return known
