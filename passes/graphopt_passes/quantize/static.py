"""Static INT8: calibrated, placed so that the runtime fuses it, within the budget, and never slower than float."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import ClassVar

import onnx_ir as ir

from graphopt.calibrate.ranges import Method
from graphopt.calibrate.samples import Samples, read_samples
from graphopt.calibrate.statistics import Collected, collect
from graphopt.emit import finalize
from graphopt.errors import OptionError
from graphopt.ir import fingerprint
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind, name_of
from graphopt.runtime.specs import input_specs
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt_passes.quantize.certificate import (
    Judgement,
    host_saturates,
    read_fusion,
)
from graphopt_passes.quantize.emission import Facts, Layer, candidates, quantize
from graphopt_passes.quantize.placement import is_product, place
from graphopt_passes.quantize.styles import Style, style_named, style_of

RULE = "quantize"
JUDGED = 16
"""Samples on which numbers are compared while searching."""

SQNR_DB = 20.0
"""Of the worst output over all samples, where the user states no budget; of probabilities, that of their scores."""

GAIN = 1.02
"""How many times faster than float a quantised graph must be to be emitted."""

SATURATION_MARGIN_DB = 12.0
"""How far below the noise of quantisation saturation must lie to be let through: it adds a quarter of a decibel."""

REPAIRS = 8
"""How often leftovers are taken out before the rest is given up."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What was measured of one choice of nodes.

    Attributes:
        sites: names of the nodes that run on integers.
        sqnr_db: of the worst output on the worst sample.
        passed: whether the budget is met.
        ratio: how many times faster than float; 0 where it was not timed.
    """

    sites: frozenset[str]
    sqnr_db: float = 0.0
    passed: bool = False
    ratio: float = 0.0


@dataclasses.dataclass(frozen=True)
class QuantizeStatic:
    """Runs convolutions and matrix products on 8-bit integers, with ranges from calibration samples.

    Needs samples (`--calibration`).  What the runtime does not fuse is taken out again; layers that cost the most
    accuracy stay float until the budget is met; if the result is not faster than float here, nothing is quantised
    unless `--force`.

    Before:  y = Conv(x, W, B)
    After:   y = DQ(Q(Conv(DQ(Q(x)), DQ(Wq), DQ(Bq))))
    Changes numerics: lossy, within the budget.  Leaves alone: subgraphs, computed weights, float16.

    Attributes:
        style: how the runtime wants it: x86-avx2, x86-vnni, arm, tensorrt; by the target's processor where empty.
        method: how ranges follow from statistics: best, min-max, moving-average, percentile, entropy, mse.
        skip_ops: operator types that stay float.
        skip_nodes: patterns of names of nodes, or of their first outputs, that stay float.
    """

    style: str = ""
    method: str = "best"
    skip_ops: tuple[str, ...] = ()
    skip_nodes: tuple[str, ...] = ()

    name: ClassVar[str] = "quantize-static"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: no calibration samples, or an option that is none.
        """
        style = style_named(self.style or style_of(ctx.target.architecture))
        if self.method not in {m.value for m in Method}:
            known = ", ".join(m.value for m in Method)
            raise OptionError(f"unknown calibration method {self.method!r}; choose one of {known}")
        if ctx.options.calibration is None:
            raise OptionError(
                "--precision int8 needs calibration samples: give --calibration PATH (an .npz whose leading axis is "
                "the samples, a folder of .npz files, images with --preprocess), or choose --precision int8-dynamic, "
                "which needs none"
            )
        allowed = self._allowed(model, ctx)
        if not allowed or not _lifted(model, style, ctx):
            return False
        samples = read_samples(ctx.options.calibration, input_specs(model))
        search = _Search(model, style, Method(self.method), samples, ctx)
        try:
            best = search.best(allowed)
        finally:
            search.close()
        return _apply(model, best, search.facts, ctx)

    def _allowed(self, model: ir.Model, ctx: Context) -> frozenset[str]:
        """Names of the nodes of the main graph that the user did not exclude; empty without any product."""
        found = [node for node in model.graph if not self._skips(node)]
        if not any(is_product(node) for node in found):
            ctx.remark(
                RemarkKind.WARNING,
                RULE,
                "",
                "nothing to quantise: no Conv, Gemm or MatMul of float32 with a constant weight in the main graph; "
                "weights that are inputs too are no constants: --pass freeze-defaults makes them so",
            )
            return frozenset()
        return frozenset(name_of(node) for node in found)

    def _skips(self, node: ir.Node) -> bool:
        names = (node.name or "", name_of(node))
        return node.op_type in self.skip_ops or any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.skip_nodes for name in names
        )


def _lifted(model: ir.Model, style: Style, ctx: Context) -> bool:
    """Brings the opset to where the runtime has integer kernels, if every operator in use means the same there."""
    opset = model.opset_imports.get("", 0)
    wanted = 10 if style.contrib else style.least_opset
    if opset >= wanted:
        return True
    for version in (13, 12, 11, 10):
        if version < wanted:
            break
        limits = dataclasses.replace(ctx.target, opset=(version, ctx.target.opset[1]))
        finalize(model, limits)
        if model.opset_imports.get("", 0) >= wanted:
            ctx.refresh()
            return True
    ctx.remark(
        RemarkKind.WARNING,
        RULE,
        "",
        f"the model imports ai.onnx opset {opset}; integer kernels need {wanted}, where some of its operators mean "
        "something else: export it anew at opset 13 or later",
    )
    return False


class _Search:
    """Finds the nodes to quantise: fused, within the budget, fastest."""

    def __init__(
        self, model: ir.Model, style: Style, method: Method, samples: Samples, ctx: Context
    ) -> None:
        self.model, self.ctx, self.style = model, ctx, style
        self.key = f"{fingerprint.structural(model)}:{fingerprint.weights(model)}:{style.name}"
        names = candidates(model.graph, style, lambda _node: True)
        self.facts = Facts(style, self._statistics(names, samples).values, method)
        self.budget = budget_for(Precision.INT8, ctx.options.budget)
        self.judge = Judgement(model, samples.first(JUDGED)) if self.on_host else None

    @property
    def on_host(self) -> bool:
        """Whether the target's runtime is the one that runs here."""
        return self.ctx.target.provider == "CPUExecutionProvider"

    def close(self) -> None:
        """Removes working files."""
        if self.judge is not None:
            self.judge.close()

    def _statistics(self, names: tuple[str, ...], samples: Samples) -> Collected:
        key = f"statistics:{self.key}"
        if key not in self.ctx.cache:
            self.ctx.cache[key] = collect(model_to_bytes(self.model), names, samples)
        found: Collected = self.ctx.cache[key]
        return found

    def best(self, allowed: frozenset[str]) -> Trial:
        """The choice to apply; one without sites where float is better."""
        if self.judge is None:
            return Trial(self._all_sites(allowed), passed=True)
        self._settle_range(allowed)
        groups = self._groups(self._fused(allowed))
        if self.ctx.options.force:
            groups = groups[:1]
        ratios = {group: self._ratio(group) for group in groups}
        least = 0.0 if self.ctx.options.force else GAIN
        best = Trial(frozenset())
        for group in sorted(groups, key=lambda each: -ratios[each]):
            if ratios[group] < max(least, best.ratio):
                break  # leaving layers in float makes nothing faster
            trial = self._within_budget(group)
            trial = dataclasses.replace(trial, ratio=self._ratio(trial.sites))
            if trial.sites and trial.passed and trial.ratio >= max(least, best.ratio):
                best = trial
        self._explain(best, max(ratios.values(), default=0.0), self._all_sites(allowed))
        return best

    def _explain(self, best: Trial, fastest: float, wanted: frozenset[str]) -> None:
        """Says what stays float, and why."""
        if best.sites:
            for name in sorted(wanted - best.sites):
                self.ctx.missed(RULE, name, "stays float: for accuracy, or because it is faster so")
        elif fastest < GAIN and not self.ctx.options.force:
            self._say(
                f"stays float: quantised it would run at {fastest:.2f}x the speed of float here; --force emits it"
            )
        else:
            self._say(
                "stays float: no choice of layers is within the budget and faster; relax it with --budget"
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
            facts = Facts(full, self.facts.statistics, self.facts.method, self.facts.chosen)
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
        self.facts = Facts(full, self.facts.statistics, self.facts.method, self.facts.chosen)

    def _say(self, text: str) -> None:
        self.ctx.remark(RemarkKind.WARNING, RULE, "", text)

    def _all_sites(self, allowed: frozenset[str]) -> frozenset[str]:
        sites = place(self.model.graph, self.style, lambda node: name_of(node) in allowed)
        return frozenset(name_of(node) for node in sites)

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
        placed = place(self.model.graph, self.style, lambda node: name_of(node) in sites)
        names: dict[str, None] = {}
        for node, site in placed.items():
            for name in (name_of(node), site.result.name or ""):
                names[name] = names[f"{name}_float"] = None
        return tuple(names)

    def _owners(self, sites: frozenset[str], left: frozenset[str]) -> frozenset[str]:
        placed = place(self.model.graph, self.style, lambda node: name_of(node) in sites)
        return frozenset(
            name_of(node)
            for node, site in placed.items()
            if {name_of(node), site.result.name, f"{site.result.name}_float"} & left
        )

    def _groups(self, sites: frozenset[str]) -> list[frozenset[str]]:
        """Choices to compare by speed: everything, wide convolutions, matrix products, products alone."""
        products = [n for n in self.model.graph if name_of(n) in sites and is_product(n)]
        dense = frozenset(name_of(n) for n in products if n.op_type != "Conv")
        wide = frozenset(name_of(n) for n in products if n.op_type != "Conv" or _is_wide(n))
        others = sites - frozenset(name_of(n) for n in products)
        groups = [sites, self._all_sites(wide | others), self._all_sites(dense | others)]
        groups.append(
            sites - others
        )  # what lies between products may have a faster kernel in float
        return [group for group in dict.fromkeys(groups) if group]

    def _within_budget(self, sites: frozenset[str]) -> Trial:
        """The same sites, without the noisiest few that it takes to meet the budget: about log2 trials."""
        whole = self._judged(sites)
        if whole.passed:
            return whole
        ranking = self._ranking(sites)
        low, high, best = 0, len(ranking), Trial(frozenset())
        while high - low > 1:
            middle = (low + high) // 2
            trial = self._judged(self._all_sites(sites - frozenset(ranking[:middle])))
            if trial.passed:
                high, best = middle, trial
            else:
                low = middle
        for name in ranking[:high] if best.sites else ():
            self.ctx.missed(
                RULE, name, "stays float: it costs the most accuracy, and the budget is tight"
            )
        return best

    def _ranking(self, sites: frozenset[str]) -> list[str]:
        """Products by how much noise they add, noisiest first."""
        layers = self._emitted(sites)[1]
        noisy = [layer for layer in layers if layer.method]
        return [layer.site for layer in sorted(noisy, key=lambda each: -each.noise)]

    def _judged(self, sites: frozenset[str]) -> Trial:
        key = f"accuracy:{self.key}:{self.budget}:{_digest(sites)}"
        if key not in self.ctx.cache:
            assert self.judge is not None
            assert self.budget is not None
            found = self.judge.accuracy(self._emitted(sites)[0], self.budget)
            enough = found.sqnr_db >= SQNR_DB or self.ctx.options.budget is not None
            self.ctx.cache[key] = Trial(sites, found.sqnr_db, found.passed and enough)
        trial: Trial = self.ctx.cache[key]
        return trial

    def _ratio(self, sites: frozenset[str]) -> float:
        """How many times faster than float; 0 for no site."""
        if not sites:
            return 0.0
        key = f"speed:{self.key}:{_digest(sites)}"
        if key not in self.ctx.cache:
            assert self.judge is not None
            self.ctx.cache[key] = self.judge.speed(self._emitted(sites)[0])
        return float(self.ctx.cache[key])


def _digest(sites: Iterable[str]) -> str:
    return "\0".join(sorted(sites))


def _is_wide(node: ir.Node) -> bool:
    """Whether a convolution has enough channels for integer kernels to win."""
    weight = node.inputs[1]
    shape = weight.shape if weight is not None else None
    return shape is not None and all(isinstance(d, int) and d >= 8 for d in shape[:2])


def _apply(model: ir.Model, best: Trial, facts: Facts, ctx: Context) -> bool:
    """Quantises the sites of a trial that the gate permits."""
    permitted = {
        name_of(node)
        for node in model.graph
        if name_of(node) in best.sites and ctx.permit(RULE, node, Numerics.LOSSY)
    }
    if not permitted:
        return False
    layers = quantize(model, facts, lambda node: name_of(node) in permitted, ctx.names)
    ctx.refresh()
    for layer in layers:
        ctx.remark(RemarkKind.NOTE, RULE, layer.site, _told(layer))
    if best.ratio:
        ctx.remark(
            RemarkKind.NOTE,
            RULE,
            "",
            f"{best.ratio:.2f}x the speed of float on this machine; worst output {best.sqnr_db:.1f} dB on "
            f"{JUDGED} samples or fewer",
        )
    return True


def _told(layer: Layer) -> str:
    if not layer.method:
        return f"{layer.op_type} on integers"
    raised = f", {layer.raised} channels coarser against saturation" if layer.raised else ""
    return (
        f"{layer.op_type} in 8 bits: range by {layer.method}, {layer.clipped:.2g} clipped, noise "
        f"{layer.input_noise:.2g} of the input and {layer.weight_noise:.2g} of the weight{raised}"
    )
