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
from graphopt.verify.compare import BF16, FP16, Budget
from graphopt.verify.verifier import ReferenceRun, Verification, VerifyOptions

HALVES = (Precision.FP16, Precision.BF16)
EMULATED = (
    "run in true half precision, by emulation: ONNX Runtime on the CPU would compute in float32"
)
HIDDEN = "the same file passes when ONNX Runtime runs it on the CPU as it is: that run would have hidden the failure"


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
    options = dataclasses.replace(options, budget=budget)
    truth = _truth(file, request, options.numerics, folder)
    found = reference.verify(truth, options)
    if truth == file or options.fail_fast:
        return found
    notes = [*found.notes, EMULATED]
    if found.passed is False and reference.verify(file, options).passed:
        notes.append(HIDDEN)
    return dataclasses.replace(found, notes=tuple(notes))


def _truth(file: Path, request: Request, numerics: Numerics, folder: Path) -> Path:
    if request.precision not in HALVES or numerics is not Numerics.LOSSY:
        return file
    model = load_model(file)
    return save_model(emulate(model), folder / "emulated.onnx")[0] if has_halves(model) else file
