"""How values and weights become integers, before it is asked which: each method is kept where it lowers the noise.

Judged on samples that ranges were not taken from, with all layers in 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from graphopt.calibrate.moments import collect_moments
from graphopt.calibrate.ranges import Method
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.rewrite import RemarkKind, name_of
from graphopt_passes.quantize import equalize
from graphopt_passes.quantize.certificate import host_saturates
from graphopt_passes.quantize.cost import Costs, rates_of
from graphopt_passes.quantize.emission import Facts, quantize
from graphopt_passes.quantize.equalize import Measure
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.trials import RULE, Trials
from graphopt_passes.quantize.windows import windows

SATURATION_MARGIN_DB = 12.0
"""How far below the noise of quantisation saturation must lie to be let through: it adds a quarter of a decibel."""

EQUALIZED_DB = 0.5
"""What equalisation must win on the samples to be kept: it fits ranges of single channels to them."""

REFINED_DB = 0.2
"""What rounding by second moments must win to be kept."""

RANGED_DB = 0.5
"""What another way to find ranges must win over the one that loses the least of each value."""

OTHERS = (Method.PERCENTILE, Method.MIN_MAX)
"""Ways to find ranges that are tried where noise is too much: what an outlier is worth only the output can tell."""


def settle(trials: Trials, allowed: frozenset[str]) -> frozenset[str]:
    """Chooses the methods; returns the nodes that the runtime fuses."""
    _settle_width(trials, allowed)
    fused = trials.fused(allowed)
    trials.whole = trials.placed(fused)
    _settle_ranges(trials, fused)
    _settle_channels(trials, fused)
    _settle_rounding(trials, fused)
    return fused


def _note(trials: Trials, text: str) -> None:
    trials.ctx.remark(RemarkKind.NOTE, RULE, "", text)


def _noise(trials: Trials, fused: frozenset[str]) -> float:
    """Signal to noise with all layers in 8 bits."""
    quality = trials.judged(fused).quality
    assert quality is not None
    return quality.sqnr_db


def _settle_width(trials: Trials, allowed: frozenset[str]) -> None:
    """Lets weights take the whole range of bytes where saturation of 16-bit sums does not bite on the samples.

    The worst case of every layer could saturate; real activations seldom meet it, and the guard costs up to a bit.
    """
    if not trials.style.saturates or not host_saturates():
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
    assert trials.judge is not None
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


def _settle_ranges(trials: Trials, fused: frozenset[str]) -> None:
    """Where all layers together are too noisy, tries ranges that lose more of the values and less of the outputs."""
    if trials.overrides.method is not Method.BEST or trials.is_enough(trials.judged(fused)):
        return
    plain, facts, key = _noise(trials, fused), trials.facts, trials.key
    found = {key: (plain + RANGED_DB, facts)}
    for method in OTHERS:
        overrides = dataclasses.replace(facts.overrides, method=method)
        trials.facts = dataclasses.replace(facts, overrides=overrides, chosen={})
        trials.key = f"{key} {method}"
        found[trials.key] = (_noise(trials, fused), trials.facts)
    trials.key = max(found, key=lambda each: found[each][0])
    best, trials.facts = found[trials.key]
    if trials.facts is not facts:
        method = trials.facts.overrides.method
        _note(
            trials,
            f"ranges by {method}: {best - plain:.1f} dB less noise with all layers in 8 bits",
        )


def _settle_channels(trials: Trials, fused: frozenset[str]) -> None:
    """Scales channels so that one range serves them all, where that lowers the noise on the samples."""
    plain = _noise(trials, fused)
    model, facts, key = trials.model, trials.facts, trials.key
    best, chosen = plain + EQUALIZED_DB, (model, facts, key, trials.scalings)
    for measure in Measure:
        scalings = equalize.plan(model.graph, facts.statistics, measure)
        if not scalings:
            continue
        trials.model = load_model(model)
        equalize.apply(trials.model, scalings, Names.of(trials.model))
        trials.key = f"{key} equalized by {measure}"
        statistics = trials.statistics(trials.model, trials.key, 0)
        trials.facts = dataclasses.replace(facts, statistics=statistics, chosen={})
        noise = _noise(trials, fused)
        if noise > best:
            best, chosen = noise, (trials.model, trials.facts, trials.key, scalings)
        if trials.is_enough(trials.judged(fused)):
            break
    trials.model, trials.facts, trials.key, trials.scalings = chosen
    if trials.scalings:
        trials.whole = trials.placed(fused)
        trials.costs = Costs(trials.facts.statistics, rates_of(trials.style.name))
        _note(
            trials,
            f"channels equalised: {best - plain:.1f} dB less noise with all layers in 8 bits",
        )


def _settle_rounding(trials: Trials, fused: frozenset[str]) -> None:
    """Rounds weights by second moments of what they are multiplied with, where that lowers the noise."""
    if trials.style.saturates:
        return
    moments = _moments(trials, fused)
    if not moments:
        return
    plain, facts, key = _noise(trials, fused), trials.facts, trials.key
    trials.facts = dataclasses.replace(facts, moments=moments, refined={})
    trials.key += " refined"
    won = _noise(trials, fused) - plain
    if won < REFINED_DB:
        trials.facts, trials.key = facts, key
        return
    _note(
        trials,
        f"weights rounded by second moments: {won:.1f} dB less noise with all layers in 8 bits",
    )


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
