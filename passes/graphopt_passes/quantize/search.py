"""Which nodes run on integers: what the runtime fuses, where it pays, without the layers that hurt most.

What is faster is decided by a table, so that the same samples give the same bytes; a clock only certifies the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from graphopt.calibrate.moments import collect_moments
from graphopt.calibrate.samples import Samples
from graphopt.calibrate.statistics import Collected, Statistics, collect
from graphopt.ir import fingerprint, values
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.rewrite import Context, RemarkKind, name_of
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt.verify.feed_files import Feed
from graphopt_passes.quantize import equalize
from graphopt_passes.quantize.certificate import Judgement, host_saturates, read_fusion
from graphopt_passes.quantize.cost import Costs, rates_of
from graphopt_passes.quantize.emission import Facts, Layer, candidates, quantize
from graphopt_passes.quantize.equalize import Scaling
from graphopt_passes.quantize.overrides import Overrides
from graphopt_passes.quantize.placement import Site, is_product, place
from graphopt_passes.quantize.quality import Quality
from graphopt_passes.quantize.styles import Style
from graphopt_passes.quantize.windows import windows

RULE = "quantize"
JUDGED = 24
"""Samples on which numbers are compared while searching."""

MARGINS = 64
"""Further samples of which is known by how much a class leads the next."""

ENOUGH, HELD_OUT = 12, 3
"""From how many samples on some are kept for judging alone, and which: every third."""

GAIN = 1.02
"""How many times faster than float a quantised graph must be to be emitted."""

TIMED = 3
"""How often a graph is timed before it counts as too slow: other work on the machine must not decide."""

SATURATION_MARGIN_DB = 12.0
"""How far below the noise of quantisation saturation must lie to be let through: it adds a quarter of a decibel."""

REPAIRS = 8
"""How often leftovers are taken out before the rest is given up."""

PROBED = 4
"""Samples on which the noise of a single layer is measured."""

PROBE_NS = 15e9
"""Predicted nanoseconds that measuring layers one by one may take; beyond, their noise follows from statistics."""

SESSION_NS, WEIGHT_NS = 40e6, 25.0
"""What making one model and session takes, and more for each weight."""

EQUALIZED_DB = 0.5
"""What equalisation must win on the samples to be kept: it fits ranges of single channels to them."""


REFINED_DB = 0.2
"""What rounding by second moments must win to be kept."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is known of one choice of nodes.

    Attributes:
        sites: names of the nodes that run on integers.
        quality: how far it is from float; None where that was not asked.
        ratio: how many times faster than float; 0 where it was not timed.
        scalings: what equalises the channels of the model first.
    """

    sites: frozenset[str]
    quality: Quality | None = None
    ratio: float = 0.0
    scalings: tuple[Scaling, ...] = ()


class Search:
    """Finds the nodes to quantise: fused, within the budget, fastest."""

    def __init__(
        self,
        model: ir.Model,
        style: Style,
        samples: Samples,
        ctx: Context,
        overrides: Overrides,
        file: Path | None = None,
    ) -> None:
        self.model, self.ctx, self.style, self.overrides = model, ctx, style, overrides
        self.original = model
        self.scalings: tuple[Scaling, ...] = ()
        self.key = f"{fingerprint.structural(model)}:{fingerprint.weights(model)}:{style.name}"
        # Judged on what ranges were not taken from, where there is enough: what fits the samples only is no gain.
        enough = len(samples.first(ENOUGH)) == ENOUGH
        parted = enough and self.on_host and file is None
        self.parts = samples.parted(HELD_OUT) if parted else (samples,)
        self.file = file
        self.facts = self._facts(self._statistics(model, self.key, 0))
        self.budget = budget_for(Precision.INT8, ctx.options.budget)
        self.judge: Judgement | None = None
        if self.on_host:
            further = self.parts[0].first(MARGINS) if enough else []
            self.judge = Judgement(model, self.parts[-1].first(JUDGED), further=further)
        self.costs = Costs(self.facts.statistics, rates_of(style.name))
        self.whole: dict[ir.Node, Site] = {}

    @property
    def on_host(self) -> bool:
        """Whether the target's runtime is the one that runs here."""
        return self.ctx.target.provider == "CPUExecutionProvider"

    def close(self) -> None:
        """Removes working files."""
        if self.judge is not None:
            self.judge.close()

    def _facts(self, statistics: Mapping[str, Statistics]) -> Facts:
        return Facts(self.style, statistics, self.overrides)

    def _statistics(self, model: ir.Model, key: str, part: int) -> Mapping[str, Statistics]:
        key = f"statistics:{key.removesuffix(' refined')}:{part}"
        if key not in self.ctx.cache:
            self.ctx.cache[key] = self._stored(model, key) or self._collected(model, key, part)
        found: Collected = self.ctx.cache[key]
        return found.values

    def _stored(self, model: ir.Model, key: str) -> Collected | None:
        """What an earlier run left of the same model; None where it left nothing that fits."""
        if self.file is None or not self.file.exists() or model is not self.original:
            return None
        found = Collected.load(self.file)
        if found.model == key:
            return found
        text = f"'{self.file}' holds statistics of another model; they are collected anew"
        self.ctx.remark(RemarkKind.WARNING, RULE, "", text)
        return None

    def _collected(self, model: ir.Model, key: str, part: int) -> Collected:
        names = candidates(model.graph, self.style, lambda _node: True)
        feeds = self._told(self.parts[part])
        found = collect(model_to_bytes(model), names, feeds, axes=_axes(model.graph))
        found = dataclasses.replace(found, model=key)
        if self.file is not None and model is self.original:
            found.save(self.file)
        return found

    def _told(self, samples: Iterable[Feed]) -> Iterator[Feed]:
        for count, feed in enumerate(samples, 1):
            self.ctx.progress(f"calibration: sample {count}", None)
            yield feed

    def final_facts(self) -> Facts:
        """What emission goes by in the end: ranges from all samples."""
        if len(self.parts) == 1:
            return self.facts
        more = self._statistics(self.model, self.key, 1)
        merged = {name: found.merged(more[name]) for name, found in self.facts.statistics.items()}
        return dataclasses.replace(
            self._facts(merged), moments=self.facts.moments, refined=self.facts.refined
        )

    def best(self, allowed: frozenset[str]) -> Trial:
        """The choice to apply; one without sites where float is better."""
        if self.judge is None:
            return Trial(self._all_sites(allowed))
        self._settle_range(allowed)
        fused = self._fused(allowed)
        self.whole = self._placed(fused)
        self._settle_channels(fused)
        self._settle_rounding(fused)
        for sites in self._choices(fused):
            trial = self._within_budget(sites)
            if not trial.sites:
                continue
            trial = dataclasses.replace(
                trial, ratio=self._ratio(trial.sites), scalings=self.scalings
            )
            if trial.ratio >= GAIN or self.ctx.options.force:
                self._explain(trial, fused)
                return trial
        self._say_why_not(fused)
        return Trial(frozenset())

    def _choices(self, fused: frozenset[str]) -> list[frozenset[str]]:
        """What to try, the fastest by the table first; everything with --force."""
        if self.ctx.options.force:
            return [fused]
        products = [n for n in self.whole if is_product(n)]
        dense = frozenset(name_of(n) for n in products if n.op_type != "Conv")
        alone = frozenset(name_of(n) for n in products)
        others = fused - alone
        bare = self._all_sites(alone)  # what lies between products may be faster in float
        found = [self._cheapest(fused), self._cheapest(bare), self._all_sites(dense | others)]
        return [group for group in dict.fromkeys(found) if group and self._pays(group)]

    def _pays(self, sites: frozenset[str]) -> bool:
        return self.costs.gain(self._placed(sites), self.whole) > 0

    def _cheapest(self, sites: frozenset[str]) -> frozenset[str]:
        """The sites without those whose integer kernels lose time, by the table."""
        placed = self._placed(sites)
        best = self.costs.gain(placed, self.whole)
        order = sorted(placed, key=lambda n: self.costs.gain({n: placed[n]}, self.whole))
        for node in order:
            rest = self._all_sites(sites - {name_of(node)})
            if not is_product(node) or rest == sites:
                continue
            gain = self.costs.gain(self._placed(rest), self.whole)
            if gain > best:
                sites, best = rest, gain
        return sites

    def _explain(self, best: Trial, wanted: frozenset[str]) -> None:
        """Says what stays float, and why."""
        paying = self._cheapest(wanted)
        for name in sorted(wanted - best.sites):
            if name in paying:
                self.ctx.missed(
                    RULE, name, "stays float: accuracy; it adds more noise than it saves time"
                )
            else:
                self.ctx.missed(
                    RULE,
                    name,
                    "stays float: speed; in 8 bits it would take longer on this processor",
                )

    def _say_why_not(self, fused: frozenset[str]) -> None:
        fastest = self._cheapest(fused)
        if not fastest or not self._pays(fastest):
            self._say(
                "stays float: no layer would be faster in 8 bits on this processor; --force emits it all the same"
            )
            return
        found, ratio = self._judged(fastest), self._ratio(fastest)
        if ratio < GAIN:
            self._say(
                f"stays float: quantised it would run at {ratio:.2f}x the speed of float here; --force emits it"
            )
            return
        assert found.quality is not None
        flips = found.quality.flips
        told = "" if flips is None else f" and {flips:.1%} of the samples with another class"
        self._say(
            f"stays float: no faster choice of layers is within the budget; all that pay would be {ratio:.2f}x as fast "
            f"at {found.quality.sqnr_db:.1f} dB{told}: relax it with --budget sqnr>={found.quality.sqnr_db - 0.5:.0f}"
        )

    def _settle_range(self, allowed: frozenset[str]) -> None:
        """Lets weights take the whole range of bytes where saturation of 16-bit sums does not bite on the samples.

        The worst case of every layer could saturate; real activations seldom meet it, and the guard costs up to a bit.
        """
        assert self.judge is not None
        assert self.budget is not None
        if not self.style.saturates or not host_saturates():
            return  # a machine that does not saturate cannot tell what happens on one that does
        full = dataclasses.replace(self.style, name=f"{self.style.name} full", saturates=False)
        key = f"agreement:{self.key}"
        if key not in self.ctx.cache:
            facts = dataclasses.replace(self.facts, style=full)
            clone = load_model(self.model)
            names = self._all_sites(allowed)
            quantize(clone, facts, lambda node: name_of(node) in names, Names.of(clone))
            noise = self.judge.accuracy(clone, self.budget).sqnr_db
            self.ctx.cache[key] = (self.judge.agreement(clone), noise)
        agreement, noise = self.ctx.cache[key]
        if agreement < noise + SATURATION_MARGIN_DB:
            self.ctx.remark(
                RemarkKind.NOTE,
                RULE,
                "",
                "weights are coarser where sums of 16 bits could saturate: at full range the kernels agree with Q "
                f"and DQ to {agreement:.0f} dB only",
            )
            return
        self.style = full
        self.key += " full"
        self.facts = dataclasses.replace(self.facts, style=full)

    def _settle_channels(self, fused: frozenset[str]) -> None:
        """Scales channels so that one range serves them all, where that lowers the noise on the samples."""
        scalings = equalize.plan(self.model.graph, self.facts.statistics)
        if not scalings:
            return
        plain = self._judged(fused).quality
        model, facts, key = self.model, self.facts, self.key
        self.model = load_model(model)
        equalize.apply(self.model, scalings, Names.of(self.model))
        self.key += " equalized"
        self.facts = self._facts(self._statistics(self.model, self.key, 0))
        scaled = self._judged(fused).quality
        assert plain is not None
        assert scaled is not None
        if scaled.sqnr_db < plain.sqnr_db + EQUALIZED_DB:
            self.model, self.facts, self.key = model, facts, key
            return
        self.scalings = scalings
        self.whole = self._placed(fused)
        self.costs = Costs(self.facts.statistics, rates_of(self.style.name))
        won = scaled.sqnr_db - plain.sqnr_db
        text = f"channels equalised: {won:.1f} dB less noise with all layers in 8 bits"
        self.ctx.remark(RemarkKind.NOTE, RULE, "", text)

    def _settle_rounding(self, fused: frozenset[str]) -> None:
        """Rounds weights by second moments of what they are multiplied with, where that lowers the noise."""
        wanted = windows(self._placed(fused), self.costs.elements)
        if not wanted or self.style.saturates:
            return
        key = f"moments:{self.key}"
        if key not in self.ctx.cache:
            feeds = self.parts[0]
            found = collect_moments(
                model_to_bytes(self.model), list(dict.fromkeys(wanted.values())), feeds
            )
            self.ctx.cache[key] = {
                name: found[each] for name, each in wanted.items() if each in found
            }
        plain = self._judged(fused).quality
        facts, old = self.facts, self.key
        self.facts = dataclasses.replace(facts, moments=self.ctx.cache[key], refined={})
        self.key += " refined"
        refined = self._judged(fused).quality
        assert plain is not None
        assert refined is not None
        if refined.sqnr_db < plain.sqnr_db + REFINED_DB:
            self.facts, self.key = facts, old
            return
        won = refined.sqnr_db - plain.sqnr_db
        text = (
            f"weights rounded by second moments: {won:.1f} dB less noise with all layers in 8 bits"
        )
        self.ctx.remark(RemarkKind.NOTE, RULE, "", text)

    def _say(self, text: str) -> None:
        self.ctx.remark(RemarkKind.WARNING, RULE, "", text)

    def _placed(self, sites: frozenset[str]) -> dict[ir.Node, Site]:
        return place(self.model.graph, self.style, lambda node: name_of(node) in sites)

    def _all_sites(self, allowed: frozenset[str]) -> frozenset[str]:
        return frozenset(name_of(node) for node in self._placed(allowed))

    def _emitted(self, sites: frozenset[str]) -> tuple[ir.Model, list[Layer]]:
        clone = load_model(self.model)
        layers = quantize(clone, self.facts, lambda n: name_of(n) in sites, Names.of(clone))
        return clone, layers

    def _fused(self, allowed: frozenset[str]) -> frozenset[str]:
        """The sites that the runtime fuses; others are taken out until none is left over."""
        sites = self._all_sites(allowed)
        key = f"fused:{self.key}:{_digest(sites)}"
        if key in self.ctx.cache:
            kept: frozenset[str] = self.ctx.cache[key]
            return kept
        for _ in range(REPAIRS):
            fusion = read_fusion(self._emitted(sites)[0], self._results(sites))
            if not fusion.leftovers:
                break
            bad = self._owners(sites, frozenset(fusion.leftovers))
            for name in sorted(bad):
                self.ctx.missed(RULE, name, "stays float: the runtime does not fuse it")
            sites = self._all_sites(sites - bad)
        self.ctx.cache[key] = sites
        return sites

    def _results(self, sites: frozenset[str]) -> tuple[str, ...]:
        """Names under which the outputs of sites may show up in the optimised graph."""
        names: dict[str, None] = {}
        for node, site in self._placed(sites).items():
            for name in (name_of(node), site.result.name or ""):
                names[name] = names[f"{name}_float"] = None
        return tuple(names)

    def _owners(self, sites: frozenset[str], left: frozenset[str]) -> frozenset[str]:
        return frozenset(
            name_of(node)
            for node, site in self._placed(sites).items()
            if {name_of(node), site.result.name, f"{site.result.name}_float"} & left
        )

    def _within_budget(self, sites: frozenset[str]) -> Trial:
        """The same sites, without those it takes to meet the budget: about log2 trials."""
        whole = self._judged(sites)
        if self._is_enough(whole):
            return whole
        ranking = self._ranking(sites)
        low, high, best = 0, len(ranking), Trial(frozenset())
        while high - low > 1:
            middle = (low + high) // 2
            rest = self._all_sites(sites - frozenset(ranking[:middle]))
            rest = rest if self.ctx.options.force else self._cheapest(rest)
            trial = self._judged(rest) if rest else Trial(rest)
            if trial.sites and self._is_enough(trial):
                high, best = middle, trial
            else:
                low = middle
        return best

    def _is_enough(self, trial: Trial) -> bool:
        assert trial.quality is not None
        if self.ctx.options.budget is not None:
            return trial.quality.passed
        return trial.quality.is_good

    def _ranking(self, sites: frozenset[str]) -> list[str]:
        """Products by the noise that they add for the time that they save, worst first."""
        noise = self._noise(sites)
        placed = self._placed(sites)
        gain = self.costs.gain(placed, self.whole)
        worth = {}
        for name in noise:
            rest = self._placed(sites - {name})
            worth[name] = max(gain - self.costs.gain(rest, self.whole), 1.0)
        return sorted(noise, key=lambda name: (-noise[name] / worth[name], name))

    def _noise(self, sites: frozenset[str]) -> dict[str, float]:
        """How much noise each product adds: measured one by one where that is cheap, else by closed forms."""
        assert self.judge is not None
        key = f"noise:{self.key}:{_digest(sites)}"
        if key in self.ctx.cache:
            known: dict[str, float] = self.ctx.cache[key]
            return known
        products = [node for node in self._placed(sites) if is_product(node)]
        weights = sum(_size(value) for value in self.model.graph.initializers.values())
        each = PROBED * 2 * self.costs.plain(self.whole) + SESSION_NS + WEIGHT_NS * weights
        if each * len(products) > PROBE_NS:
            layers = self._emitted(sites)[1]
            found = {layer.site: layer.noise for layer in layers if layer.method}
        else:
            found = {}
            for node in products:
                alone = self._emitted(frozenset({name_of(node)}))[0]
                found[name_of(node)] = self.judge.noise(alone, PROBED)
        self.ctx.cache[key] = found
        return found

    def _judged(self, sites: frozenset[str]) -> Trial:
        key = f"accuracy:{self.key}:{_digest(sites)}"
        if key not in self.ctx.cache:
            assert self.judge is not None
            assert self.budget is not None
            found = self.judge.accuracy(self._emitted(sites)[0], self.budget)
            self.ctx.cache[key] = Trial(sites, found)
        trial: Trial = self.ctx.cache[key]
        return trial

    def _ratio(self, sites: frozenset[str]) -> float:
        """How many times faster than float; 0 for no site."""
        if not sites:
            return 0.0
        key = f"speed:{self.key}:{_digest(sites)}"
        if key not in self.ctx.cache:
            assert self.judge is not None
            emitted = self._emitted(sites)[0]
            ratio = 0.0
            for _ in range(TIMED):
                ratio = max(ratio, self.judge.speed(emitted))
                if ratio >= GAIN:
                    break
            self.ctx.cache[key] = ratio
        return float(self.ctx.cache[key])


def _axes(graph: ir.Graph) -> dict[str, tuple[int, ...]]:
    """Along which axis the channels of each value lie, by who reads it."""
    found: dict[str, tuple[int, ...]] = {}
    for node in graph:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is not None:
            found[node.inputs[0].name or ""] = (-1,)
        for value in node.outputs:
            found.setdefault(value.name or "", (1, -1))
    return found


def _size(value: ir.Value) -> int:
    tensor = values.constant(value)
    return 0 if tensor is None else tensor.size


def _digest(sites: Iterable[str]) -> str:
    return "\0".join(sorted(sites))
