"""Verifying half precision on a machine that has none: an emulation of the file stands for the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from graphopt.driver.request import Request
from graphopt.ir.model_file import load_model, save_model
from graphopt.numerics import Numerics
from graphopt.runtime.emulate import emulate, has_halves
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt.verify.compare import Budget
from graphopt.verify.feeds import LARGE
from graphopt.verify.verifier import ReferenceRun, Verification, VerifyOptions

HALVES = (Precision.FP16, Precision.BF16)
ROUNDED = (*HALVES, Precision.FP16_WEIGHTS)
REPORTED = Budget(agreement=None)
"""Differences are measured and shown, and gate nothing."""
UNJUDGED = (
    "pruned without --budget: the differences are shown, not judged; give --inputs and a budget such as "
    "top1-agreement>=0.98 to have them judged"
)

EMULATED = (
    "run in true half precision, by emulation: ONNX Runtime on the CPU would compute in float32"
)
HIDDEN = "the same file passes when ONNX Runtime runs it on the CPU as it is: that run would have hidden the failure"


def usual(run: ReferenceRun, request: Request) -> ReferenceRun:
    """The run without the generated feed that is 30 times larger than usual, where a half is to be judged.

    Scores of a hundred before a softmax make one unit in the last place of a half an error of percents, in a model that
    never sees such scores.  What overflows on that feed was kept in float32 when it was cast.
    """
    if request.precision not in ROUNDED or request.inputs is not None:
        return run
    kept = [index for index, feed in enumerate(run.feeds) if feed.name.split(",")[0] != LARGE]
    if 0 < len(kept) < len(run.feeds):
        run.feeds = tuple(run.feeds[index] for index in kept)
        run.outputs = [run.outputs[index] for index in kept]
        run.notes.append(f"judged on usual inputs: the generated feed '{LARGE}' is left out")
    return run


def verify(
    reference: ReferenceRun, file: Path, options: VerifyOptions, request: Request, folder: Path
) -> Verification:
    """Compares a written candidate with the reference, in true half precision where it was cast to half.

    Args:
        reference: the original.
        file: the candidate.
        options: how strictly; the budget of the run is added.
        request: the run.
        folder: for working files.
    """
    budget = options.budget or budget_for(request.precision, request.options.budget)
    if request.options.sparsity and request.options.budget is None:
        budget = REPORTED  # how much accuracy zeros may cost, only the user knows
    options = dataclasses.replace(options, budget=budget)
    truth = _truth(file, request, options.numerics, folder)
    found = reference.verify(truth, options)
    if budget is REPORTED and options.numerics is Numerics.LOSSY:
        found = dataclasses.replace(found, notes=(*found.notes, UNJUDGED), judged=False)
    if truth == file:
        return found
    notes = [*found.notes, EMULATED]
    is_probe = options.feed is not None  # one of many, of which nobody reads the notes
    if found.passed is False and not is_probe and reference.verify(file, options).passed:
        notes.append(HIDDEN)
    return dataclasses.replace(found, notes=tuple(notes))


def _truth(file: Path, request: Request, numerics: Numerics, folder: Path) -> Path:
    if request.precision not in HALVES or numerics is not Numerics.LOSSY:
        return file
    model = load_model(file)
    return save_model(emulate(model), folder / "emulated.onnx")[0] if has_halves(model) else file
