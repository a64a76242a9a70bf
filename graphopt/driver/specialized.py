"""A run on a specialised model: made from the original, compared with it, then optimised in its place."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from graphopt.driver.request import Request, Source
from graphopt.errors import GraphoptError, VerifyError
from graphopt.ir.model_file import load_model, save_model
from graphopt.ir.shapes import Shapes
from graphopt.numerics import Numerics
from graphopt.report.facts import ModelFacts, model_facts
from graphopt.runtime.session import Session, SessionOptions
from graphopt.runtime.specs import output_specs
from graphopt.specialize import Plan, specialize
from graphopt.verify.verifier import ReferenceRun, VerifyOptions


@dataclasses.dataclass(frozen=True)
class Special:
    """Where a specialised model comes from.

    Attributes:
        source: the original, as the user gave it.
        plan: how inputs and outputs stand to the original's.
        before: facts of the original.
    """

    source: Source
    plan: Plan
    before: ModelFacts


def specialized(request: Request) -> tuple[Request, Special | None]:
    """The request with the specialised model as its source, and where that comes from; None where nothing is wanted.

    Raises:
        OptionError: what is wanted does not fit the model.
    """
    if not request.specialization:
        return request, None
    model = load_model(request.source)
    source = request.source
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    before = model_facts(model, path, with_hash=False)
    plan = specialize(model, request.specialization)
    Shapes(model)
    return dataclasses.replace(request, source=model), Special(request.source, plan, before)


def compare_with_original(special: Special, run: ReferenceRun, folder: Path) -> str:
    """Runs the original on what the specialised model was run on; returns in words how they compare.

    Args:
        special: where the model comes from.
        run: of the specialised model.
        folder: for working files.

    Raises:
        VerifyError: they differ, or only one of them runs.
    """
    plan = special.plan
    source = special.source
    is_file = isinstance(source, str | os.PathLike) and Path(source).suffix == ".onnx"
    original = (
        Path(str(source))
        if is_file
        else save_model(load_model(source), folder / "unspecialised.onnx")[0]
    )
    graph = load_model(original)
    outputs = {spec.name for spec in output_specs(graph)}
    names = list(dict.fromkeys(port.original for port in plan.outputs))
    taps = tuple(name for name in names if name not in outputs)
    try:
        session = Session(original, options=SessionOptions(prepack=False, extra_outputs=taps))
    except GraphoptError as fault:
        return f"not compared with the original, which does not run here: {fault}"
    if run.unverifiable:
        return _alone(original, run.unverifiable)
    profile = run.profile(VerifyOptions(Numerics.REORDERED))
    worst = 0.0
    for index, feed in enumerate(run.feeds):
        seen = plan.from_original(session.run(plan.to_original(feed.values), names))
        for name, value in seen.items():
            if name in run.excluded:
                continue
            report = run.judge(name, index, value, profile)
            worst = max(worst, report.max_over_rms or 0.0)
            if not report.passed:
                raise VerifyError(
                    f"the specialised model does not compute what the original does: output {name!r} on feed "
                    f"{feed.name!r}: {report.why}. Nothing was written"
                )
    told = "bit for bit" if worst == 0 else f"up to {worst:.2g} of the RMS"
    return (
        f"the specialised model computes what the original does on {len(run.feeds)} inputs, {told}"
    )


def _alone(original: Path, reason: str) -> str:
    """What is said where the specialised model runs with no inputs.

    Raises:
        VerifyError: the original does run.
    """
    if ReferenceRun(original).unverifiable:
        return f"not compared with the original: {reason}"
    raise VerifyError(
        f"the specialised model does not run, though the original does: {reason.rstrip('.')}. Nothing was written; "
        "other sizes, or other values, may fit the model"
    )
