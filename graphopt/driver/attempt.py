"""One way through: load, run the pipeline, bring within the target's limits, write to a working file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from graphopt.distill.history import History
from graphopt.driver.request import Request
from graphopt.emit import finalize
from graphopt.emit.sparse import SparseFacts, sparse_form
from graphopt.errors import PassError, TargetError
from graphopt.ir import collector
from graphopt.ir.model_file import ExternalData, load_model, save_model
from graphopt.numerics import Numerics
from graphopt.pipeline import PassRun, run_pipeline
from graphopt.report.facts import ModelFacts, model_facts
from graphopt.report.stages import Stage, stage
from graphopt.rewrite import Context, Gate, Remark, Rewrite
from graphopt.rewrite.context import Tuner
from graphopt.runtime.autotune import Autotuner
from graphopt.runtime.footprint import let_go
from graphopt.targets import SparseStyle

Watch = Callable[[PassRun, ir.Model, Context], None]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What one run of the pipeline gave.

    Attributes:
        model: the result.
        runs: what each pass did.
        rewrites: every change, in order.
        remarks: what passes had to say.
        numerics: what the changes may have done to the numbers.
        before: the model as it was read.
        warnings: what the target has to say about the model.
        files: the working files that hold the result, once written; the model first.
        became: values that are gone, and what was put in their place, by name.
        stages: the model as it was read and after each pass that changed it, if the request asks.
        sparse: what storing weights sparse is about; None where none is mostly zero, or nothing was written.
        distilled: what training did; None where there was none.
    """

    model: ir.Model
    runs: tuple[PassRun, ...]
    rewrites: tuple[Rewrite, ...]
    remarks: tuple[Remark, ...]
    numerics: Numerics
    before: ModelFacts
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    became: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    sparse: SparseFacts | None = None
    distilled: History | None = None


def attempt(
    request: Request, gate: Gate, *, watch: Watch | None = None, is_probe: bool = False
) -> Attempt:
    """Loads the source anew and runs the pipeline under `gate`.

    Runs are deterministic: the same gate gives the same model.  A probe is there to be compared, not to be kept: with
    some rewrites left out, it need not be what the target takes.

    Raises:
        GraphoptError: whatever loading, a pass or the target's limits have to say.
    """
    with collector.seldom():
        return _attempt(request, gate, watch, is_probe=is_probe)


def _attempt(request: Request, gate: Gate, watch: Watch | None, *, is_probe: bool) -> Attempt:
    model = load_model(request.source)
    source = request.source
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    before = model_facts(model, path, with_hash=False)
    ctx = _context(request, model, gate)
    done = 0
    counts = request.stages and not is_probe
    stages = [stage("", model)] if counts else []

    def observe(run: PassRun, current: ir.Model) -> None:
        nonlocal done
        done += 1
        if counts and run.changed:
            stages.append(stage(run.name, current))
        if watch is not None:
            watch(run, current, ctx)

    try:
        runs = run_pipeline(model, request.steps, ctx, observer=observe)
    except PassError as fault:
        fault.runs_before = done
        raise
    warnings = _finalize(model, request, is_probe=is_probe)
    return Attempt(
        model,
        runs,
        tuple(ctx.rewrites),
        tuple(ctx.remarks),
        ctx.numerics,
        before,
        warnings,
        became=ctx.became,
        stages=tuple(stages),
        distilled=ctx.findings.get("distill"),
    )


def _context(request: Request, model: ir.Model, gate: Gate) -> Context:
    ctx = Context(
        model,
        request.target,
        request.options,
        gate,
        cache=request.cache,
        original=lambda: load_model(request.source),
        progress=request.progress,
    )
    ctx.tuner = _tuner(ctx)
    return ctx


def _finalize(model: ir.Model, request: Request, *, is_probe: bool) -> tuple[str, ...]:
    """What the target has to say; a probe need not be what it takes."""
    try:
        return finalize(model, request.target)
    except TargetError:
        if not is_probe:
            raise
        return ()


def _tuner(ctx: Context) -> Tuner | None:
    """What measures rewrites, where the user asked for it and the target runs on this machine."""
    file = ctx.options.autotune
    if file is None or ctx.target.provider != "CPUExecutionProvider":
        return None
    return Autotuner(file, ctx)


def write(
    made: Attempt,
    folder: Path,
    name: str,
    external: ExternalData = ExternalData.AUTO,
    style: SparseStyle = SparseStyle.DENSE,
) -> Attempt:
    """The attempt, with its model written as `folder/name`; weights take the form of `style` where that pays."""
    model, facts = sparse_form(made.model, style)
    files = save_model(model, folder / name, external=external)
    held = (value.const_value for value in made.model.graph.initializers.values())
    let_go([tensor for tensor in held if tensor is not None])  # what verification takes comes next
    if facts is not None:
        facts = dataclasses.replace(facts, file_bytes=sum(file.stat().st_size for file in files))
    return dataclasses.replace(made, files=files, sparse=facts)
