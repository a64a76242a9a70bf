"""One model, its samples, and what is known of quantising it this way or that: each trial is made once.

Everything dear is kept in the cache of the run under what it depends on, so that replays do not repeat it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import onnx_ir as ir

from graphopt.calibrate.collect import by_row, collect
from graphopt.calibrate.samples import JUDGED, Samples
from graphopt.calibrate.statistics import SENTINEL, Collected, Statistics
from graphopt.ir import fingerprint, values
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.rewrite import Context, RemarkKind, name_of
from graphopt.targets import Precision
from graphopt.targets.host import host_architecture
from graphopt.verify.budget import budget_for, samples_for
from graphopt.verify.feed_files import Feed
from graphopt_passes.quantize import inlets
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.cost import Costs, rates_of
from graphopt_passes.quantize.emission import quantize
from graphopt_passes.quantize.equalize import Scaling
from graphopt_passes.quantize.facts import Facts, Layer
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.fusion import read_fusion
from graphopt_passes.quantize.inlets import Inlet
from graphopt_passes.quantize.kinds import BYTES
from graphopt_passes.quantize.mixed import mixed_of
from graphopt_passes.quantize.overrides import Overrides
from graphopt_passes.quantize.placement import PRODUCTS, Site, candidates, is_product, place
from graphopt_passes.quantize.quality import Quality
from graphopt_passes.quantize.styles import Style

RULE = "quantize"
MARGINS = 64
"""Further samples of which is known by how much a class leads the next."""

JUDGED_NS, MOST_JUDGED = 0.5e9, 64
"""Predicted nanoseconds that one choice may be judged for beyond `JUDGED` samples, and how many samples at most."""

ENOUGH, HELD_OUT = 12, 3
"""From how many samples on some are kept for judging alone, and which: every third."""

GAIN = 1.05
"""How many times as fast as float a quantised graph must be, by the table and the clock: other numbers have a price."""

TIMED, DOUBTS = 5, 1
"""How often a graph is timed at most, and how many of these may say less: a busy moment does not decide, nor luck."""

REPAIRS = 8
"""How often leftovers are taken out before the rest is given up."""

PROBED, MOST_PROBED = 4, 64
"""Samples on which the noise of a single layer is measured, at least, and where they take no time."""

PROBE_NS = 15e9
"""Predicted nanoseconds that measuring layers one by one may take; beyond, their noise follows from statistics."""

SPREAD_NS = 1e9
"""The same of the noise of one choice of layers."""

SESSION_NS, WEIGHT_NS = 40e6, 12.0
"""What making one model and session takes, and more for each weight."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is known of one choice of nodes.

    Attributes:
        sites: names of the nodes that run on integers.
        quality: how far it is from float; None where that was not asked.
        ratio: how many times faster than float; 0 where that was not asked.
        is_timed: whether a clock said so; else the table of kernel times.
        scalings: what equalises the channels of the model first.
        inlets: factors in front of products.
    """

    sites: frozenset[str]
    quality: Quality | None = None
    ratio: float = 0.0
    is_timed: bool = True
    scalings: tuple[Scaling, ...] = ()
    inlets: tuple[Inlet, ...] = ()


@dataclasses.dataclass(frozen=True)
class Collecting:
    """How statistics are collected.

    Attributes:
        file: what keeps them; None for nothing.
        workers: processes that share the samples.
    """

    file: Path | None = None
    workers: int = 1


HERE = Collecting()


class Trials:
    """What the choices are made from; `model`, `facts` and `key` change as methods are settled."""

    def __init__(
        self,
        model: ir.Model,
        style: Style,
        samples: Samples,
        ctx: Context,
        overrides: Overrides,
        how: Collecting = HERE,
    ) -> None:
        self.model, self.ctx, self.style, self.overrides = model, ctx, style, overrides
        self.original = model
        self.scalings: tuple[Scaling, ...] = ()
        self.bare = model  # without inlets, which `model` has in front of all products
        self.inlets: tuple[Inlet, ...] = ()
        self.key = f"{fingerprint.structural(model)}:{fingerprint.weights(model)}:{style.name}"
        self.mixed = mixed_of(model.graph, style, overrides, model.opset_imports.get("", 0))
        self.key += "".join(f":{name}" for name in sorted(self.mixed.stated))
        self._first_key = self.key
        self._odd: set[str] = set()
        samples = by_row(lambda: on_disk(model), samples)
        # Judged on what ranges were not taken from, where there is enough: what fits the samples only is no gain.
        enough = len(samples.first(ENOUGH)) == ENOUGH
        parted = enough and how.file is None
        self.parts = samples.parted(HELD_OUT) if parted else (samples,)
        self.file, self.workers = how.file, how.workers
        self.facts = Facts(style, self.statistics(model, self.key, 0), overrides, self.mixed)
        self.budget = budget_for(Precision.INT8, ctx.options.budget)
        self.costs = self.costs_of(self.facts)
        asked = samples_for(self.budget, 0)  # together the first of all
        more = max(MARGINS, asked - asked // HELD_OUT)
        further = self.parts[0].first(more) if enough else []
        judged = samples if self._has_metric else self.parts[-1]
        count = max(self._affordable(), asked if judged is samples else asked // HELD_OUT)
        # Kernels of another processor than this one say nothing, and may refuse what theirs take.
        stated = not (self.on_host and self.is_timed)
        self.judge = Judgement(model, judged.first(count), further=further, stated=stated)
        self.whole: dict[ir.Node, Site] = {}

    def _affordable(self) -> int:
        """How many samples to judge on: the fewer, the more often what wins on them wins by chance."""
        each = self.costs.plain(place(self.model.graph, self.style, lambda _node: True))
        return min(max(int(JUDGED_NS / max(each, 1.0)), JUDGED), MOST_JUDGED)

    def costs_of(self, facts: Facts) -> Costs:
        """Predicted times by these statistics."""
        multiplied = frozenset(each.result for each in self.inlets)
        return Costs(facts.statistics, rates_of(self.style.name), self.is_decoded, multiplied)

    def is_decoded(self, node: ir.Node) -> bool:
        """Whether the user wants a node in element types that no integer kernel takes: it stays where it is wanted."""
        kinds = {self.style.activation, self.style.weight}
        return not kinds <= BYTES or name_of(node) in self.mixed.layers

    @property
    def on_host(self) -> bool:
        """Whether the target's runtime is the one that runs here; of another, neither clock nor table knows a time."""
        return self.ctx.target.provider == "CPUExecutionProvider"

    @property
    def kernels(self) -> dict[str, str]:
        """What the runtime made of the sites that were tried, by name."""
        found: dict[str, str] = self.ctx.cache.setdefault(f"kernels:{self._first_key}", {})
        return found

    @property
    def _has_metric(self) -> bool:
        """Whether a function of the user's decides: it is asked of the same samples in the end."""
        return self.budget is not None and self.budget.metric is not None

    def statistics(self, model: ir.Model, key: str, part: int) -> Mapping[str, Statistics]:
        """What one part of the samples shows of every value that may be quantised."""
        key = f"statistics:{key.removesuffix(' refined')}:{part}"
        if key not in self.ctx.cache:
            self.ctx.cache[key] = self._stored(model, key) or self._collected(model, key, part)
            if model is self.original:
                self._tell_left_out(self.ctx.cache[key].values)
        found: Collected = self.ctx.cache[key]
        return found.values

    def _tell_left_out(self, found: Mapping[str, Statistics]) -> None:
        for name, each in found.items():
            if each.excluded and name not in self._odd:
                self._odd.add(name)
                text = (
                    f"{each.excluded} of {each.elements} elements of '{name}' are NaN, infinite or beyond "
                    f"{SENTINEL:.0e} (masks): its range leaves them out"
                )
                self.ctx.remark(RemarkKind.NOTE, RULE, name, text)

    def _tell_constant(self, found: Mapping[str, Statistics]) -> None:
        """Says which values the samples do not vary: of users' it is a warning."""
        inputs = {value.name for value in self.original.graph.inputs}
        for name, each in found.items():
            if each.samples and each.minimum == each.maximum:
                kind = RemarkKind.WARNING if name in inputs else RemarkKind.NOTE
                text = (
                    f"'{name}' is one and the same number throughout the samples: its range says nothing of others; "
                    "give samples that vary it, if its users do"
                )
                self.ctx.remark(kind, RULE, name, text)

    def _stored(self, model: ir.Model, key: str) -> Collected | None:
        """What an earlier run left of the same model; None where it left nothing that fits."""
        if self.file is None or not self.file.exists() or model is not self.original:
            return None
        found = Collected.load(self.file)
        wanted = candidates(model.graph, self.style, lambda _node: True)
        if found.model == key and found.values.keys() >= {*wanted}:
            return found
        text = f"'{self.file}' holds statistics of another model; they are collected anew"
        self.ctx.remark(RemarkKind.WARNING, RULE, "", text)
        return None

    def _collected(self, model: ir.Model, key: str, part: int) -> Collected:
        names = candidates(model.graph, self.style, lambda _node: True, self.mixed.stated)
        feeds = self._told(self.parts[part])
        found = self._run(model, names, feeds)
        found = dataclasses.replace(found, model=key)
        if self.file is not None and model is self.original:
            found.save(self.file)
        return found

    def _run(self, model: ir.Model, names: tuple[str, ...], feeds: Iterator[Feed]) -> Collected:
        """One pass, where the user wants it."""
        calibration = self.ctx.options.calibration
        executor = None if calibration is None else calibration.executor
        with on_disk(model) as path, self._pool() as pool:
            return collect(path, names, feeds, axes=axes_of(model.graph), executor=executor or pool)

    @contextlib.contextmanager
    def _pool(self) -> Iterator[Executor | None]:
        """Processes of our own to share the samples, where there shall be several."""
        if self.workers == 1:
            yield None
            return
        # A fork would take the threads of the runtime along in an unknown state.
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            yield pool

    def _told(self, samples: Iterable[Feed]) -> Iterator[Feed]:
        for count, feed in enumerate(samples, 1):
            self.ctx.progress(f"calibration: sample {count}", None)
            yield feed

    def final_facts(self) -> Facts:
        """What emission goes by in the end: ranges from all samples."""
        if len(self.parts) == 1:
            self._tell_constant(self.facts.statistics)
            return self.facts
        more = self.statistics(self.model, self.key, 1)
        merged = {name: found.merged(more[name]) for name, found in self.facts.statistics.items()}
        self._tell_constant(merged)
        return dataclasses.replace(self.facts, statistics=merged, chosen={})

    def placed(self, sites: frozenset[str]) -> dict[ir.Node, Site]:
        """The sites of some nodes, as the style places them."""
        graph, stated = self.model.graph, self.mixed.stated
        return place(graph, self.style, lambda node: name_of(node) in sites, stated=stated)

    def all_sites(self, allowed: frozenset[str]) -> frozenset[str]:
        """Names of the nodes of which a placement remains when only these may run on integers."""
        return frozenset(name_of(node) for node in self.placed(allowed))

    def emitted(self, sites: frozenset[str]) -> tuple[ir.Model, list[Layer]]:
        """A copy of the model with these sites in 8 bits, and what was done to each."""
        clone = load_model(self.bare)
        names = Names.of(clone)
        inlets.insert(clone.graph, self.inlets, sites, names)
        layers = quantize(clone, self.facts, lambda n: name_of(n) in sites, names)
        return clone, layers

    def fused(self, allowed: frozenset[str]) -> frozenset[str]:
        """The sites that the runtime fuses; others are taken out until none is left over.

        For a runtime that does not run here, where it is laid out as for the one that does: fused by one at least.
        """
        sites = self.all_sites(allowed)
        if not self.style.stores_outputs:
            return sites
        key = f"fused:{self.key}:{_digest(sites)}"
        if key in self.ctx.cache:
            kept: frozenset[str] = self.ctx.cache[key]
            return kept
        for _ in range(REPAIRS):
            signed = self.style.activation is ir.DataType.INT8
            fusion = read_fusion(self.emitted(sites)[0], self._results(sites), signed=signed)
            self.kernels.update(fusion.kernels)
            # What a site computes goes by another name where that is an output, or something is added behind.
            whole = {name: fusion.kernels.get(f"{name}_float") for name in sites}
            self.kernels.update({name: kind for name, kind in whole.items() if kind is not None})
            if not fusion.leftovers:
                break
            bad = self._owners(sites, fusion.leftovers)
            if not bad:
                break
            for name, rule in sorted(bad.items()):
                self.ctx.missed(RULE, name, f"stays float: the runtime does not fuse it: {rule}")
            sites = self.all_sites(sites - frozenset(bad))
        self.ctx.cache[key] = sites
        return sites

    def _results(self, sites: frozenset[str]) -> tuple[str, ...]:
        """Names under which the outputs of sites may show up in the optimised graph."""
        names: dict[str, None] = {}
        for node, site in self.placed(sites).items():
            for name in _names(node, site):
                names[name] = names[f"{name}_float"] = None
        return tuple(names)

    def _owners(self, sites: frozenset[str], left: Mapping[str, str]) -> dict[str, str]:
        """The sites that leftovers belong to, and the rules that they broke."""
        found = {}
        for node, site in self.placed(sites).items():
            known = _names(node, site)
            for name in (*known, *(f"{each}_float" for each in known)):
                if name in left and not self.is_decoded(node):
                    found[name_of(node)] = left[name]
        return found

    def is_enough(self, trial: Trial) -> bool:
        """Whether a trial is within the budget of the user, else within ours."""
        assert trial.quality is not None
        if self.ctx.options.budget is not None:
            return trial.quality.passed
        return trial.quality.is_good

    @property
    def made_ns(self) -> float:
        """What making a model of one choice, and a session of it, takes."""
        weights = sum(_size(value) for value in self.model.graph.initializers.values())
        return SESSION_NS + WEIGHT_NS * weights

    def noise(self, sites: frozenset[str]) -> dict[str, float]:
        """How much noise each product adds: measured one by one where that is cheap, else by closed forms."""
        key = f"noise:{self.key}:{_digest(sites)}"
        if key in self.ctx.cache:
            known: dict[str, float] = self.ctx.cache[key]
            return known
        products = [node for node in self.placed(sites) if is_product(node)]
        run = 2 * self.costs.plain(self.whole)
        count = int((PROBE_NS / max(len(products), 1) - self.made_ns) / max(run, 1.0))
        if count < PROBED:
            layers = self.emitted(sites)[1]
            found = {layer.site: layer.noise for layer in layers if layer.op_type in PRODUCTS}
        else:
            found = {}
            for node in products:
                alone = self.emitted(frozenset({name_of(node)}))[0]
                found[name_of(node)] = self.judge.noise(alone, min(count, MOST_PROBED))
        self.ctx.cache[key] = found
        return found

    def spread(self, sites: frozenset[str]) -> float:
        """The noise of these sites together, on more samples than decide whether it is little enough."""
        key = f"spread:{self.key}:{_digest(sites)}"
        if key not in self.ctx.cache:
            count = int(SPREAD_NS / max(self.costs.plain(self.whole), 1.0))
            emitted = self.emitted(sites)[0]
            self.ctx.cache[key] = self.judge.noise(emitted, min(max(count, 1), MOST_PROBED))
        return float(self.ctx.cache[key])

    def judged(self, sites: frozenset[str]) -> Trial:
        """How good these sites in 8 bits are."""
        key = f"accuracy:{self.key}:{_digest(sites)}"
        if key not in self.ctx.cache:
            assert self.budget is not None
            found = self.judge.accuracy(self.emitted(sites)[0], self.budget)
            self.ctx.cache[key] = Trial(sites, found)
        trial: Trial = self.ctx.cache[key]
        return trial

    @property
    def is_timed(self) -> bool:
        """Whether this machine is of the family that the style is for: the clock of another says nothing."""
        return (self.style.activation is ir.DataType.INT8) == (host_architecture() == "arm64")

    def ratio(self, sites: frozenset[str]) -> float:
        """How many times faster than float, by the table where the clock cannot tell; 0 for no site."""
        if not sites:
            return 0.0
        if not self.is_timed:
            return self.predicted(sites)
        key = f"speed:{self.key}:{_digest(sites)}"
        if key not in self.ctx.cache:
            self.ctx.cache[key] = timed(self.judge.race(self.emitted(sites)[0]))
        return float(self.ctx.cache[key])

    def predicted(self, sites: frozenset[str]) -> float:
        """How many times as fast as float by the table, at most: of nodes beside `whole`, what is known is counted."""
        plain = self.costs.plain(self.whole) + self.costs.beside(self.model.graph, self.whole)
        left = plain - self.costs.gain(self.placed(sites), self.whole)
        return plain / left if left > 0 else math.inf

    def say(self, text: str) -> None:
        """Tells the user something to act on."""
        self.ctx.remark(RemarkKind.WARNING, RULE, "", text)


def timed(race: Callable[[], float]) -> float:
    """The ratio that a race shows: at least `GAIN` if all but `DOUBTS` of the turns say so, else the least doubted.

    Near the bound a median would be a coin; what is emitted shall be faster wherever it is timed again.
    """
    found: list[float] = []
    while sum(ratio < GAIN for ratio in found) <= DOUBTS and (
        sum(ratio >= GAIN for ratio in found) < TIMED - DOUBTS
    ):
        found.append(race())
    if sum(ratio < GAIN for ratio in found) <= DOUBTS:
        return statistics.median(found)
    return statistics.median(ratio for ratio in found if ratio < GAIN)


def axes_of(graph: ir.Graph) -> dict[str, tuple[int, ...]]:
    """Along which axis the channels of each value lie, by who reads it."""
    found: dict[str, tuple[int, ...]] = {}
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul") and node.inputs[0] is not None:
            found[node.inputs[0].name or ""] = (-1,)
        for value in node.outputs:
            found.setdefault(value.name or "", (1, -1))
    return found


def _names(node: ir.Node, site: Site) -> tuple[str, ...]:
    """Of a site and of all that it makes."""
    return tuple(dict.fromkeys((name_of(node), *(value.name or "" for value in site.results))))


def _size(value: ir.Value) -> int:
    tensor = values.constant(value)
    return 0 if tensor is None else tensor.size


def _digest(sites: Iterable[str]) -> str:
    return "\0".join(sorted(sites))
