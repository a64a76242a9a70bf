"""The pass that turns float32 arithmetic into half precision where that is right and pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.errors import GraphoptError, TargetError
from graphopt.ir import fingerprint
from graphopt.ir.scopes import sort
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt.rewrite.context import name_of
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt_passes.precision.apply import Emission
from graphopt_passes.precision.flow import flow_of, sentinels
from graphopt_passes.precision.gates import gated_nodes
from graphopt_passes.precision.guards import Guard, guard_masked_rows, take_back
from graphopt_passes.precision.islands import drop_islands
from graphopt_passes.precision.legality import Legality
from graphopt_passes.precision.plan import Decision, Facts, Kind, decide_all, gather
from graphopt_passes.precision.plan_file import read_plan, write_plan
from graphopt_passes.precision.ranges import GENERATED, Feeds, observe
from graphopt_passes.precision.refine import Refinement
from graphopt_passes.precision.rescale import fold_factors
from graphopt_passes.precision.settle import settle, without

_DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_CAST_KNOWS_BF16 = 13


@dataclasses.dataclass(frozen=True)
class CastToHalf:
    """y = MatMul(x, w)  ->  h = Cast<half>(x)  g = MatMul(h, w')  y = Cast<float>(g), inputs and outputs as they were.

    What may be half follows from the operator's schema and the target's kernels; what must stay float32 from shapes,
    counters, ranges seen on calibration samples (or generated inputs), weights that a half does not hold, and the cost
    of casts.  Weights are converted, masks of large negative numbers become ones that stay finite when added.

    Attributes:
        precision: the half dtype.
        float32: nodes or outputs, by name, that stay float32 whatever the rules say.
        plan: a file with decisions to follow, as `write_plan` wrote it and perhaps a person edited it.
        write_plan: a file to write the decisions to.
    """

    precision: Literal["fp16", "bf16"] = "fp16"
    float32: tuple[str, ...] = ()
    plan: str = ""
    write_plan: str = ""
    name: ClassVar[str] = "cast-to-half"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            TargetError: the target computes no faster in that dtype, and the run does not force it.
        """
        half = _DTYPES[self.precision]
        self._check_target(half, ctx)
        opset = model.opset_imports.get("", 0)
        if half is ir.DataType.BFLOAT16 and opset < _CAST_KNOWS_BF16:
            reason = f"Cast knows bfloat16 from opset 13 on, the model imports {opset}"
            ctx.missed("cast", model.graph.name or "", reason)
            return False
        before = len(ctx.rewrites)
        sort(model.graph)
        _ = ctx.shapes  # infers the type of every value
        fold_factors(model, half, ctx)
        guards = guard_masked_rows(model, ctx) if half is ir.DataType.FLOAT16 else []
        flow = flow_of(model)
        masked = {value.name or "" for value in sentinels(model, flow).carriers}
        seen = observe(model, ctx, half, masked)
        legality = Legality(ctx.target, half, model.opset_imports)
        facts = gather(model, legality, seen.spreads, flow, generated=seen.source == GENERATED)
        facts.forced = self._forced(model, ctx)
        decisions = drop_islands(decide_all(model, facts))
        decisions = self._refined(model, decisions, facts, seen.usual, ctx)
        for file in self._plans_to_write(ctx):
            write_plan(file, model, decisions)  # before guards go, by which it is read again
        _drop_guards(guards, decisions)
        names = {
            node: name_of(node) for node in decisions
        }  # outputs of the model pass theirs on to a cast
        Emission(model, decisions, half, facts.masks, ctx).run()
        ctx.refresh()
        _tell(decisions, seen.source, seen.why, ctx)
        _tell_halves(decisions, names, facts, ctx)
        _tell_casts_of_weights(model, half, ctx)
        return len(ctx.rewrites) > before

    def _plans_to_write(self, ctx: Context) -> list[Path]:
        own = Path(self.write_plan) if self.write_plan else None
        return [file for file in (own, ctx.options.save_plan) if file is not None]

    def _forced(self, model: ir.Model, ctx: Context) -> dict[str, str]:
        file = Path(self.plan) if self.plan else ctx.options.plan
        planned = read_plan(file, model, ctx) if file is not None else {}
        return {**planned, **dict.fromkeys(self.float32, Kind.HIGH.value)}

    def _refined(
        self,
        model: ir.Model,
        decisions: dict[ir.Node, Decision],
        facts: Facts,
        feeds: Feeds,
        ctx: Context,
    ) -> dict[ir.Node, Decision]:
        """The decisions with nodes back in float32 until the whole is within the budget."""
        low = gated_nodes(model, decisions, facts.masks.constants)
        budget = budget_for(Precision(self.precision), ctx.options.budget)
        if not feeds or not low or budget is None:
            return decisions
        key = f"precision-refined {budget} {facts.half} {fingerprint.weights(model)} {[name_of(n) for n in low]}"
        if key not in ctx.cache:
            try:
                ctx.cache[key] = settle(model, decisions, facts, feeds, budget, ctx)
            except GraphoptError as error:
                ctx.remark(RemarkKind.WARNING, "refine", "", f"not refined: {error}")
                return decisions
        found: Refinement = ctx.cache[key]
        _tell_refinement(found, ctx)
        return without(decisions, low, found.raised)

    def _check_target(self, half: ir.DataType, ctx: Context) -> None:
        target = ctx.target
        if ctx.options.force or not target.kernels or half.name in target.floats.computes:
            return
        raise TargetError(
            f"target {target.name} has no {half.name.lower()} arithmetic: ONNX Runtime casts to float32 and back "
            "around nearly every operator, which is slower than float32. Choose --target cuda or tensorrt, or --force"
        )


def _drop_guards(guards: Sequence[Guard], decisions: dict[ir.Node, Decision]) -> None:
    """Takes guards back whose readers stay float32: there the mask itself makes rows even."""
    for guard in guards:
        if decisions[guard.node].kind is not Kind.HIGH:
            continue
        product = take_back(guard)
        if product is not None and isinstance(product.graph, ir.Graph):
            del decisions[product]
            product.graph.remove(product, safe=True)


def _tell_refinement(found: Refinement, ctx: Context) -> None:
    if not found.raised and found.after <= 1:
        return
    reason = (
        f"{len(found.raised)} nodes go back to float32: error {found.before:.2g} of the budget before, "
        f"{found.after:.2g} after, {found.runs} experiments in true half precision"
    )
    if found.before > 1:
        reason += " (ONNX Runtime on the CPU computes halves in float32 and would have hidden it)"
    if found.amplified:
        reason += "; the model amplifies rounding on these inputs: give samples with --calibration"
        if found.accepting:
            reason += f", or accept all in half with --budget '{found.accepting}'"
    calm = found.after <= 1 and not found.amplified
    ctx.remark(RemarkKind.NOTE if calm else RemarkKind.WARNING, "refine", "", reason)


def _tell(decisions: dict[ir.Node, Decision], source: str, why: str, ctx: Context) -> None:
    """Says on what the plan rests, and what stays float32 for which reason."""
    if why:
        ctx.remark(
            RemarkKind.WARNING,
            "plan",
            "",
            f"without data ({why}) the plan is conservative: give samples with --calibration",
        )
    else:
        told = f"ranges come from {source}"
        if source == GENERATED:
            told += ", some 30 times larger than usual: the plan is conservative, --calibration gives real ranges"
        ctx.remark(RemarkKind.NOTE, "plan", "", told)
    for node, decision in decisions.items():
        if decision.kind is Kind.HIGH:
            ctx.remark(RemarkKind.NOTE, "float32", node, f"{node.op_type}: {decision.reason}")


def _tell_casts_of_weights(model: ir.Model, half: ir.DataType, ctx: Context) -> None:
    """Warns of weights that a feed may replace: they cannot be stored in half, and are cast at every run."""
    casts = [node for node in model.graph if node.op_type == "Cast"]
    count = sum(
        node.outputs[0].dtype is half
        and node.inputs[0] is not None
        and node.inputs[0].is_graph_input()
        and node.inputs[0].is_initializer()
        for node in casts
    )
    if count:
        told = (
            f"{count} weights are inputs with defaults: they stay float32 in the file and are cast at every run; make "
            "constants of them with --freeze-defaults"
        )
        ctx.remark(RemarkKind.WARNING, "weights", "", told)


def _tell_halves(
    decisions: Mapping[ir.Node, Decision],
    names: Mapping[ir.Node, str],
    facts: Facts,
    ctx: Context,
) -> None:
    """Says of each node in half how far from its limits it was seen; details in quotes, so that one line counts all."""
    for node, decision in decisions.items():
        if any(value.dtype is facts.half for value in node.outputs) and decision.kind in _CAST:
            what = decision.reason or "nothing speaks against it"
            told = f"{what} '{node.op_type}{_seen(names[node], facts)}'"
            ctx.remark(RemarkKind.NOTE, "half", names[node], told)


_CAST = (Kind.LOW, Kind.FOLLOW)


def _seen(name: str, facts: Facts) -> str:
    spread = facts.spreads.get(name)
    if spread is None:
        return ", its range not known"
    return f", up to {spread.absmax:.3g} of {facts.limits.greatest:.3g}, rounding costs {spread.error:.2g} of its size"
