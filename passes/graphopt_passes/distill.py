"""The pass that carries out `--distill`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.samples import read_samples
from graphopt.calibrate.screening import screening_of, tell_screened
from graphopt.distill.history import History
from graphopt.distill.recover import distill, require_torch
from graphopt.distill.settings import parse_settings
from graphopt.errors import OptionError
from graphopt.ir import fingerprint
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt.runtime.specs import input_specs

RULE = "recover"
FINDING = "distill"
"""Under which name the pass leaves its `History` in `Context.findings`."""


PRUNE = "prune"
"""The name of the pass whose work is recovered."""


@dataclasses.dataclass(frozen=True)
class Distill:
    """Trains the weights that are left to compute what the original computes, where that is asked for.

    Before:  y' = student(x)             pruned, slimmed or quantised
    After:   y" = student(x)             nearer to y = original(x), the same zeros and the same whole numbers' grid
    Changes numerics: lossy; towards the original.  Needs PyTorch and samples, no labels.  A student that training does
    not bring nearer on samples held out stays as it was.  Sources: Hinton et al. 2015 (divergence at a temperature),
    Bengio et al. 2013 (gradients straight through rounding).
    """

    name: ClassVar[str] = "distill"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    settings: str = ""
    """How to train, as `--distill` says it; empty for what the run asks for."""

    early: bool = False
    """Whether to train only what `prune` has just pruned a part of the way, before the rest goes."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: the settings cannot be read, PyTorch is absent, or there are no samples.
            DataError: the samples do not fit the model, or are too few.
            ModelError: the model has an operator that the interpreter does not know.
        """
        text = self.settings or ctx.options.distill
        if not text or (self.early and not _is_part_pruned(ctx)):
            return False
        settings = parse_settings(text)
        require_torch()
        if ctx.options.calibration is None or ctx.original is None:
            raise OptionError(
                "--distill needs samples to learn from: give --calibration, unlabelled inputs, better 256 or more"
            )
        site = model.graph.name or "main"
        if not ctx.permit(RULE, site, Numerics.LOSSY):
            return False
        key = f"distill:{text}:{fingerprint.structural(model)}:{fingerprint.weights(model)}"
        known: tuple[History, dict[str, ir.TensorProtocol]] | None = ctx.cache.get(key)
        if known is None:
            specs = input_specs(model)
            read = screening_of(ctx).of(read_samples(ctx.options.calibration, specs))
            samples = [dict(each.values) for each in read]
            tell_screened(ctx, RULE)
            arrays = [{name: np.asarray(a) for name, a in each.items()} for each in samples]
            history = distill(
                ctx.original(),
                model,
                arrays,
                settings,
                seed=ctx.options.seed,
                progress=ctx.progress,
            )
            ctx.cache[key] = (history, _weights(model))
        else:
            history, weights = known
            _restore(model, weights)
        ctx.findings[FINDING] = history
        for said in history.sentences():
            ctx.remark(RemarkKind.NOTE, RULE, site, said)
        return history.kept > 0


def _is_part_pruned(ctx: Context) -> bool:
    return any(rewrite.pass_name == PRUNE for rewrite in ctx.rewrites)


def _weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    values = model.graph.initializers.items()
    return {name: value.const_value for name, value in values if value.const_value is not None}


def _restore(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> None:
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = weights[name]
