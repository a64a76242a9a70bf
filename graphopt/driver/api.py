"""`graphopt.optimize`: the run as a Python function."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from graphopt.driver.optimize import run
from graphopt.driver.request import (
    DEFAULT_FOLD_LIMIT,
    Feeds,
    Progress,
    Request,
    Source,
    VerifyMode,
    parse_choice,
    parse_external,
    parse_extra,
    parse_gate,
    parse_plan,
    parse_precision,
    parse_sparse,
    resolve_target,
)
from graphopt.driver.result import Result
from graphopt.emit.profiles import Range, parse_profile
from graphopt.pipeline import Pass, Step
from graphopt.pipeline.recipe import Recipe
from graphopt.pipeline.registry import load_pass, pipeline_for
from graphopt.rewrite import Calibration, Options
from graphopt.runtime.autotune import KEPT
from graphopt.specialize import Specialization, from_table, over
from graphopt.targets import Precision, Target
from graphopt.verify.criteria import Criteria, Metric, load_metric, parse_gates
from graphopt.verify.kept import user_folder

FREEZE_DEFAULTS = "freeze-defaults"


def optimize(  # noqa: PLR0913  the options of the command line, by keyword only
    source: Source,
    *,
    output: str | os.PathLike[str] | None = None,
    target: str | Target | None = None,
    precision: str | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    passes: Sequence[str | Pass] = (),
    disable: Sequence[str] = (),
    freeze_defaults: bool = False,
    verify: str | None = None,
    inputs: str | os.PathLike[str] | Feeds | None = None,
    seed: int | None = None,
    fold_limit_bytes: int | None = None,
    external: str = "auto",
    sparse: str = "auto",
    calibration: Calibration | str | os.PathLike[str] | Feeds | None = None,
    budget: str | None = None,
    sparsity: str | None = None,
    distill: str | None = None,
    plan: str | os.PathLike[str] | None = None,
    save_plan: str | os.PathLike[str] | None = None,
    force: bool = False,
    autotune: bool | str | os.PathLike[str] = False,
    gates: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    remarks: bool = False,
    stages: bool = False,
    strict: bool = False,
    repro: str | os.PathLike[str] | None = None,
    cache: bool | str | os.PathLike[str] = False,
    profiles: Mapping[str, tuple[int, int, int]] | None = None,
    extras: Sequence[str] = (),
    specialize: Specialization | None = None,
    progress: Progress | None = None,
) -> Result:
    """The optimised model, verified against the original.

    Args:
        source: path of a model (`.onnx`, ONNX text), its bytes, an `onnx.ModelProto` or an `onnx_ir.Model`.
        output: file to write, x.onnx, or a folder for a bundle; None writes nothing (`Result.save` does it later).
        target: what to emit for: cpu (default), cuda, tensorrt, portable, or a `Target`.
        precision: fp32 (default) keeps every dtype as it is.
        recipe: a recipe, or the path of one in TOML; options given here go before its own.
        passes: further passes, run after the pipeline: `module:object`, recipe specs, or passes.
        disable: passes (`fold-constants`) or rules (`tidy/drop-identity`) to leave out.
        freeze_defaults: make constants of inputs that have a default: no caller of the result can feed them any more.
        verify: final (default), each (after every pass) or off.
        inputs: inputs to compare on: npz, a folder of npz, ONNX `test_data_set_*`, or feeds; generated if None.
        seed: of everything random.
        fold_limit_bytes: how much larger than what it makes dead a folded constant may be.
        external: where weights go: auto (beside the model from 2 GiB on), never, single, per-tensor.
        sparse: form of weights that are mostly zero: auto (with `sparsity` what the target reads, where the file
            shrinks; else kept), dense, sparse_initializer, constant, kept (as they came).
        calibration: samples for passes that decide by data: a path, feeds, or a `Calibration`.
        budget: the error that a lossy run may make, such as "sqnr>=30".
        sparsity: what to prune: "0.8", "2:4", "channels:0.5", "max" (the most within `budget`).
        distill: train what is left towards the original (needs torch and `calibration`): "yes", "steps=500,lr=3e-4".
        plan: a precision plan to follow (fp16, bf16, fp8), as `save_plan` wrote it and perhaps a person edited it;
            nodes are found by structure.
        save_plan: a file for the precision plan of the run (fp16, bf16, fp8): dtype and reason of every node.
        force: emit what the target is known to run slower.
        autotune: time what fusions gain on this machine, instead of going by the target's tables; True keeps results
            in the user's cache, a path in that file. Only for targets that run here.
        gates: limits for single outputs instead of the run's: {"logits": "sqnr>=40", "debug": "ignore"}.
        metric: a function of yours that judges outputs besides: "module:function>=0.98", or a `Metric`.
        remarks: search for near misses and report them.
        stages: count bytes and arithmetic after each pass, and the layers of the result, for a report.
        strict: raise where a pass or a rewrite fails, instead of leaving it out.
        cache: keep what the original computes for the next run on it, where its weights take more than 8 MB: with
            True in the user's cache (at most 1 GiB), or in the folder given.
        profiles: of a bundle: least, usual and largest size of dynamic dimensions, by name or `INPUT:AXIS`.
        extras: of a bundle: triton (a model repository), ort (the .ort format).
        specialize: what to make of the model first: sizes, bound inputs, chosen outputs, names, types, layouts.
        repro: folder for the smallest model that shows the first rewrite that breaks the numbers.
        progress: called with the stage that begins, and how much of it is done if that is known.

    Raises:
        ModelError: the model cannot be read.
        DataError: the inputs do not fit it.
        OptionError: an option, recipe or path cannot be used.
        TargetError: the target cannot take what the model needs.
        VerifyError: the result is wrong and nothing could be left out to mend it.
        PassError: a pass failed, and `strict` was asked for or leaving it out did not help.
    """
    held = (
        recipe if isinstance(recipe, Recipe) else Recipe.load(Path(recipe)) if recipe else Recipe()
    )
    chosen = resolve_target(target or held.target or "cpu")
    level = parse_precision(precision or held.precision or Precision.FP32)
    frozen = (load_pass(FREEZE_DEFAULTS),) if freeze_defaults else ()
    added = (load_pass(each) if isinstance(each, str) else each for each in passes)
    steps: tuple[Step, ...] = (*frozen, *held.apply(pipeline_for(chosen, level)), *added)
    request = Request(
        source=source,
        output=None if output is None else Path(output),
        target=chosen,
        precision=level,
        steps=steps,
        gate=parse_gate((*held.disable, *disable), steps),
        options=Options(
            seed=_first(seed, held.seed, 0),
            fold_limit_bytes=_first(fold_limit_bytes, held.fold_limit_bytes, DEFAULT_FOLD_LIMIT),
            trace_misses=remarks,
            calibration=_calibration(calibration),
            budget=held.budget if budget is None else budget,
            sparsity=held.sparsity if sparsity is None else sparsity,
            force=force,
            distill=distill,
            autotune=_kept(autotune),
            plan=parse_plan("plan", plan, level),
            save_plan=parse_plan("save_plan", save_plan, level),
        ),
        verify=VerifyMode(
            parse_choice("verify mode", verify or held.verify or "final", VerifyMode)
        ),
        inputs=Path(inputs) if isinstance(inputs, str | os.PathLike) else inputs,
        strict=strict,
        stages=stages,
        criteria=_criteria(gates, metric),
        external=parse_external(external),
        repro=None if repro is None else Path(repro),
        kept=_cached(cache),
        profiles=_ranges({**held.profiles, **(profiles or {})}),
        extras=tuple(parse_extra(each, output) for each in (*held.extras, *extras)),
        sparse=parse_sparse(sparse),
        specialization=over(
            from_table(held.specialize, held.source, held.folder), specialize or Specialization()
        ),
        progress=progress or (lambda _stage, _part: None),
        recipe=str(recipe) if isinstance(recipe, str | os.PathLike) else None,
    )
    return run(request, progress or (lambda _stage, _part: None))


def _ranges(given: Mapping[str, tuple[int, int, int]]) -> dict[str, Range]:
    texts = {name: ",".join(map(str, sizes)) for name, sizes in given.items()}
    return dict(parse_profile(f"{name}={sizes}") for name, sizes in texts.items())


def _criteria(gates: Mapping[str, str] | None, metric: str | Metric | None) -> Criteria:
    metrics = load_metric(metric) if isinstance(metric, str) else metric
    return Criteria(parse_gates(gates or {}), () if metrics is None else (metrics,))


def _kept(autotune: bool | str | os.PathLike[str]) -> Path | None:
    """The file of measured gains; None where nothing shall be measured."""
    if isinstance(autotune, bool):
        return Path.home() / KEPT if autotune else None
    return Path(autotune)


def _cached(cache: bool | str | os.PathLike[str]) -> Path | None:
    """The folder for the original's values; None where they shall not be kept."""
    if isinstance(cache, bool):
        return user_folder() if cache else None
    return Path(cache)


def _calibration(given: Calibration | str | os.PathLike[str] | Feeds | None) -> Calibration | None:
    if given is None or isinstance(given, Calibration):
        return given
    return Calibration(Path(given) if isinstance(given, str | os.PathLike) else given)


def _first(*given: int | None) -> int:
    return next(number for number in given if number is not None)
