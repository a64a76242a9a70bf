"""Carries out `--sparsity channels:R`: tries the measures of importance, keeps the best, says what was saved."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.calibrate.screening import screening_of, tell_screened
from graphopt.ir import fingerprint
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt_passes.prune.branches import drop_branches
from graphopt_passes.prune.channels import ROUNDING
from graphopt_passes.prune.request import Measure, SparsityRequest
from graphopt_passes.prune.slim import slim
from graphopt_passes.prune.trials import best_slimming
from graphopt_passes.prune.ways import Slimming

RULE = "channels"

_WHAT = {
    Measure.FLOPS: "multiply-adds",
    Measure.PARAMETERS: "weights",
    Measure.LATENCY: "multiply-adds",
}

_BLOCKS = {"x86-vnni": 16, "x86-amx": 16}
"""Channels that lie together in ONNX Runtime's convolutions where processors have AVX-512: 24 take as long as 32."""

_BLIND = (
    "no samples were given, so that channels were chosen by their weights alone and the others could not make up for "
    "them: this usually costs most of the accuracy; give --calibration"
)


def remove_channels(model: ir.Model, ctx: Context, request: SparsityRequest, text: str) -> bool:
    """Removes channels from `model` in place until the share asked for is saved; returns whether any went."""
    site = model.graph.name or "main"
    if not ctx.permit(RULE, site, Numerics.LOSSY):
        return False
    block = _BLOCKS.get(ctx.target.architecture, ROUNDING)
    request = dataclasses.replace(request, block=block)
    key = (
        f"slim:{text}:{request.block}:{fingerprint.structural(model)}:{fingerprint.weights(model)}"
    )
    best: Slimming | None = ctx.cache.get(key)
    if best is None:
        options, screening = ctx.options, screening_of(ctx)
        best = best_slimming(
            model, ctx.shapes, request, options.calibration, options.seed, screening
        )
        tell_screened(ctx, RULE)
        ctx.cache[key] = best
    if best is None or not (best.keep or best.branches):
        reason = "no channels can be removed: inputs, outputs or operators that are not known hold all of them"
        ctx.remark(RemarkKind.WARNING, RULE, site, reason)
        return False
    _adopt(model, ctx, best)
    _tell(ctx, site, request, best)
    return True


def _adopt(model: ir.Model, ctx: Context, best: Slimming) -> None:
    """Does to the model itself what was done to the clone."""
    drop_branches(model, best.branches)
    slim(model, best.keep, Names.of(model))
    clone = load_model(best.model)
    for name, value in model.graph.initializers.items():
        theirs = clone.graph.initializers.get(name)
        if theirs is None or theirs.const_value is None or value.const_value is None:
            continue
        # Whole numbers are sizes, which the cut has stated; in a clone cut in rounds a name may mean an older one.
        if theirs.const_value.dtype.is_floating_point():
            value.const_value = theirs.const_value
    ctx.refresh()


def _tell(ctx: Context, site: str, request: SparsityRequest, best: Slimming) -> None:
    saved = 1 - best.left
    turns = f" in {best.rounds} rounds" if best.rounds > 1 else ""
    count = len(best.branches)
    also = f"{count} branch{'es' if count > 1 else ''} of residual sums and " if count else ""
    said = f"{also}{best.classes} channels removed{turns}: {saved:.1%} of the {_WHAT[request.by]}"
    said += f", chosen by {best.way.importance}"
    if ctx.options.calibration is None:
        ctx.remark(RemarkKind.WARNING, RULE, site, _BLIND)
    else:
        said += f"; outputs differ by {best.error:.1%} (RMS) on every fifth batch of samples"
    if request.by is Measure.LATENCY:
        saved = best.saved_time
        said += f"; one run takes {saved:.1%} less CPU time, as measured here in one thread"
    ctx.remark(RemarkKind.NOTE, RULE, site, said)
    assert request.channels is not None
    if saved < request.channels - (0.05 if request.by is Measure.LATENCY else 0.01):
        reason = f"short of {request.channels:.0%}: what is left is needed, or holds its last tenth"
        ctx.remark(RemarkKind.WARNING, RULE, site, f"{said}, {reason}")
