"""Static INT8: calibrated, placed so that the runtime fuses it, within the budget, and never slower than float."""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.collect import by_row
from graphopt.calibrate.samples import Samples, read_samples
from graphopt.calibrate.screening import screening_of, tell_screened
from graphopt.emit import finalize
from graphopt.errors import OptionError
from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.numerics import Numerics
from graphopt.rewrite import Calibration, Context, RemarkKind, name_of
from graphopt.runtime.specs import input_specs
from graphopt_passes.quantize import bodies, equalize, inlets
from graphopt_passes.quantize.emission import quantize
from graphopt_passes.quantize.facts import Layer
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.kinds import least_opset, with_kinds
from graphopt_passes.quantize.overrides import (
    Overrides,
    check_operators,
    check_patterns,
    check_symmetric,
    check_weights,
    names_of,
    operator_of,
    parse,
)
from graphopt_passes.quantize.placement import QUANTISED, is_product
from graphopt_passes.quantize.search import Search
from graphopt_passes.quantize.styles import MICROSOFT, Style, style_for, style_named
from graphopt_passes.quantize.telling import Floats, facts, summary, tell_ignored, told
from graphopt_passes.quantize.tied import turned_weights
from graphopt_passes.quantize.trials import RULE, Collecting, Trial, Trials


@dataclasses.dataclass(frozen=True)
class QuantizeStatic:
    """Runs convolutions and matrix products on 8-bit integers, with ranges from calibration samples.

    Needs samples (`--calibration`).  What the runtime does not fuse is taken out again; layers that cost the most
    accuracy for the time they save stay float until the budget is met; if the result is not faster than float here,
    nothing is quantised unless `--force`.

    Before:  y = Conv(x, W, B)
    After:   y = DQ(Q(Conv(DQ(Q(x)), DQ(Wq), DQ(Bq))))
    Changes numerics: lossy, within the budget.  Leaves alone: computed weights, float16; for TensorRT, bodies
    of control flow.

    Other element types than bytes (`activations`, `weights`, overrides) are stored as the user says; no kernel of a
    processor multiplies them: layers compute in float between what is stored.

    Attributes:
        style: how the runtime wants it: x86-avx2, x86-vnni, arm, tensorrt; by the target's processor where empty.
        method: how ranges follow from statistics: best, min-max, moving-average, percentile, entropy, mse.
        activations: element type of all activations, the style's where empty: uint8, int8, uint16, int16, uint4, int4,
            float8e4m3fn, float8e5m2; for TensorRT int8, or float8e4m3fn with weights of that.
        weights: element type of all weights, of the same.
        scheme: symmetric or asymmetric (with zero points) activations; the style's where empty.
        weights_scheme: the same of weights; symmetric where empty.
        skip_ops: operator types that stay float.
        skip_nodes: patterns of names of nodes, or of their first outputs, that stay float.
        overrides: what holds for single layers and values: "PATTERN: exclude", "PATTERN: method=percentile
            range=-4..4 bits=7 dtype=int8 axis=tensor", "PATTERN: dtype=uint16 weights=int16"; PATTERN is one of names,
            or op:Gemm for all nodes of an operator.
        statistics: file that keeps what the samples gave: written where it is missing, read instead of running the
            samples again where it is there.
        workers: processes that share the samples; the result has the same bits.
    """

    style: str = ""
    method: str = "best"
    activations: str = ""
    weights: str = ""
    scheme: str = ""
    weights_scheme: str = ""
    skip_ops: tuple[str, ...] = ()
    skip_nodes: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    statistics: str = ""
    workers: int = 1

    name: ClassVar[str] = "quantize-static"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: no calibration samples, an option that is none, or a name that the model does not have.
        """
        if self.workers < 1:
            raise OptionError(f"workers {self.workers}: at least one process runs the samples")
        style = self._styled(model, ctx)
        overrides = self._overrides(model, style, ctx)
        if ctx.options.calibration is None:
            raise OptionError(
                "--precision int8 needs calibration samples: give --calibration PATH (an .npz whose leading axis is "
                "the samples, a folder of .npz files, images with --preprocess), or choose --precision int8-dynamic, "
                "which needs none"
            )
        with turned_weights(model.graph, ctx.names):
            return self._run(model, style, overrides, ctx.options.calibration, ctx)

    def _run(
        self,
        model: ir.Model,
        style: Style,
        overrides: Overrides,
        calibration: Calibration,
        ctx: Context,
    ) -> bool:
        allowed = self._allowed(model, overrides, ctx)
        inside = style.stores_outputs and bodies.has_products(model)
        if not allowed and not inside:
            _say_nothing_fits(model, ctx)
            return False
        if not _lifted(model, _least(style, overrides), ctx):
            return False
        _ = ctx.shapes  # inferred once: all that follows asks values for types and shapes
        floats = Floats.of(model, allowed)
        screening = screening_of(ctx)
        given = read_samples(calibration, input_specs(model))
        samples = screening.of(by_row(lambda: on_disk(model), given))
        trials = best = None
        if allowed:
            trials = Trials(model, style, samples, ctx, overrides, self._collecting())
            best = Search(trials).best(allowed)
        changed = inside and self._bodies(model, style, samples, ctx, overrides)
        tell_screened(ctx, RULE)
        if trials is not None and best is not None:
            changed |= _apply(model, model.graph, best, trials, ctx)
        floats.tell(ctx, RULE)
        tell_ignored(model, overrides, ctx, RULE)
        if changed:
            ctx.refresh()
        return changed

    def _styled(self, model: ir.Model, ctx: Context) -> Style:
        """How values and weights are written for the target, in the types that the recipe states."""
        schemes = self.scheme, self.weights_scheme
        style = _style(self.style, model, ctx)
        return with_kinds(style, self.activations, self.weights, ctx.target, schemes)

    def _overrides(self, model: ir.Model, style: Style, ctx: Context) -> Overrides:
        """What the recipe says of single layers; all of it is about something that there is."""
        overrides = parse(self.method, self.overrides)
        check_operators(self.skip_ops, QUANTISED)
        check_weights(overrides.rules, style)
        patterns = (*self.skip_nodes, *(pattern for pattern, _ in overrides.rules))
        if patterns:
            known = names_of(model, ctx)
            check_patterns(patterns, known)
            if not style.zero_points:
                check_symmetric(overrides.rules, known, style)
        return overrides

    def _bodies(
        self, model: ir.Model, style: Style, samples: Samples, ctx: Context, overrides: Overrides
    ) -> bool:
        """The same within If, Loop and Scan; before the main graph, whose values they may read."""

        def decide(alone: ir.Model, turns: Samples, about: Context) -> tuple[Trials, Trial]:
            allowed = self._allowed(alone, overrides, about)
            trials = Trials(alone, style, turns, about, overrides)
            return trials, Search(trials).best(allowed) if allowed else Trial(frozenset())

        def write(into: ir.Model, choice: bodies.Choice, body: ir.Graph) -> bool:
            _written(into, body, choice.best.sites, choice.best, choice.trials, Names.of(into))
            return True

        choices = bodies.choose(model, samples, ctx, decide)
        graphs, changed = bodies.graphs_of(model), False
        for choice in bodies.kept(model, choices, samples, ctx, write):
            changed |= _apply(model, graphs[choice.index], choice.best, choice.trials, ctx)
        return changed

    def _collecting(self) -> Collecting:
        return Collecting(Path(self.statistics) if self.statistics else None, self.workers)

    def _allowed(self, model: ir.Model, overrides: Overrides, ctx: Context) -> frozenset[str]:
        """Names of the nodes of the main graph that the user did not exclude; empty without any product."""
        found = [node for node in model.graph if not self._skips(node, overrides)]
        broken = [node for node in found if is_product(node) and _holds(node)]
        for node in broken:
            ctx.missed(RULE, node, f"stays float: its weight or bias {_holds(node)}")
        names = frozenset(name_of(node) for node in found) - {name_of(node) for node in broken}
        has_product = any(is_product(node) and name_of(node) in names for node in found)
        return names if has_product else frozenset()

    def _skips(self, node: ir.Node, overrides: Overrides) -> bool:
        names = (node.name or "", name_of(node))
        kinds = {node.op_type, node.op_type.removeprefix("Fused")}
        if not kinds.isdisjoint(self.skip_ops) or overrides.of(*names, operator_of(node)).exclude:
            return True
        return any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.skip_nodes for name in names
        )


def _style(given: str, model: ir.Model, ctx: Context) -> Style:
    """The style asked for, else that of the target.

    Raises:
        OptionError: there is none of this name, or the target has no kernels for it: it takes no activations in
            integers, no zero points and int32 biases, or no com.microsoft.
    """
    target = ctx.target
    if target.qdq is not None and not target.qdq.activations:
        raise OptionError(
            f"the target '{target.name}' has no integer kernels for Q and DQ around activations: store weights in 8 "
            "bits alone (--precision int8 does so there), or choose another target"
        )
    style = style_named(given) if given else style_for(target)
    if style.contrib and not target.has_domain(MICROSOFT):
        style = dataclasses.replace(style, contrib=False, least_opset=13)
    if not style_for(target).zero_points and style.zero_points:
        site = next((name_of(node) for node in model.graph if is_product(node)), "")
        raise OptionError(
            f"style '{style.name}' gives '{site}' inputs with zero points and an int32 bias, and the target "
            f"'{ctx.target.name}' takes symmetric int8 and float biases only: leave style out"
        )
    return style


def _holds(node: ir.Node) -> str:
    """What the constants of a product hold that no scale does; nothing where they are numbers."""
    for array in map(values.array, node.inputs[1:]):
        if array is not None and array.size == 0:
            return "has no elements"
        if array is not None and not np.isfinite(array).all():
            return "holds NaN or infinities"
    return ""


def _least(style: Style, overrides: Overrides) -> int:
    """The opset from which on Q and DQ of all element types in use can be written."""
    kinds = {style.activation, style.weight}
    for _, said in overrides.rules:
        kinds |= {kind for kind in (said.dtype, said.weight) if kind is not None}
    least = 10 if style.contrib else style.least_opset
    return max(least, least_opset(kinds, contrib=style.contrib))


def _lifted(model: ir.Model, wanted: int, ctx: Context) -> bool:
    """Brings the opset to where the runtime has Q and DQ, if every operator in use means the same there."""
    opset = model.opset_imports.get("", 0)
    if opset >= wanted:
        return True
    for version in (wanted,) if wanted > 13 else (13, 12, 11, 10):
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
        f"the model imports ai.onnx opset {opset}; quantised values need {wanted}, where some of its operators mean "
        "something else: export it anew at opset 13 or later",
    )
    return False


def _say_nothing_fits(model: ir.Model, ctx: Context) -> None:
    if bodies.has_products(model):
        text = f"stays float: its products lie in bodies of If, Loop and Scan, which stay float for '{ctx.target.name}'"
        ctx.remark(RemarkKind.WARNING, RULE, "", text)
        return
    ctx.remark(
        RemarkKind.WARNING,
        RULE,
        "",
        "nothing to quantise: no Conv, Gemm or MatMul of float32 with a constant weight; weights that are inputs too "
        "are no constants: --freeze-defaults makes them so",
    )


def _apply(model: ir.Model, graph: ir.Graph, best: Trial, trials: Trials, ctx: Context) -> bool:
    """Quantises the sites of a trial that the gate permits, in the main graph or in a body."""
    permitted = frozenset(
        name_of(node)
        for node in graph
        if name_of(node) in best.sites and ctx.permit(RULE, node, Numerics.LOSSY)
    )
    if not permitted:
        return False
    by = "its 8-bit kernel" if trials.on_host else f"laid out for {ctx.target.name}"
    for layer in _written(model, graph, permitted, best, trials, ctx.names):
        kernel = trials.kernels.get(layer.site, by)
        row = facts(layer, kernel)
        ctx.remark(RemarkKind.NOTE, RULE, layer.site, told(layer, kernel), facts=row)
    if best.quality is not None:
        where = "" if graph is model.graph else graph.name or ""
        ctx.remark(RemarkKind.NOTE, RULE, where, summary(best))
    return True


def _written(
    model: ir.Model,
    graph: ir.Graph,
    sites: frozenset[str],
    best: Trial,
    trials: Trials,
    names: Names,
) -> list[Layer]:
    """Writes sites of one graph in 8 bits."""
    equalize.apply(graph, best.scalings, names)
    inlets.insert(graph, best.inlets, sites, names)
    return quantize(
        model, trials.final_facts(), lambda node: name_of(node) in sites, names, body=graph
    )
