"""Distillation of one file from another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from graphopt.calibrate.samples import read_samples
from graphopt.calibrate.screening import Screening
from graphopt.distill.history import History
from graphopt.distill.recover import Progress, distill
from graphopt.distill.settings import parse_settings
from graphopt.emit.sparse import sparse_form
from graphopt.ir.model_file import ExternalData, load_model, save_model
from graphopt.ir.sparse import CooTensor
from graphopt.report.facts import stored_tensors
from graphopt.rewrite import Calibration
from graphopt.runtime.specs import input_specs
from graphopt.targets import SparseStyle


def distil_file(  # noqa: PLR0913  the options of the command line
    teacher: Path,
    student: Path,
    output: Path,
    calibration: Calibration,
    settings: str,
    *,
    seed: int = 0,
    external: ExternalData = ExternalData.AUTO,
    progress: Progress | None = None,
) -> History:
    """Trains a student towards a teacher and writes it; weights that came sparse are written sparse.

    Raises:
        ModelError: a file cannot be read, or has an operator that cannot be interpreted.
        DataError: samples, inputs or outputs do not fit.
        OptionError: the settings cannot be read, or PyTorch is absent.
    """
    wanted = parse_settings(settings)
    original, made = load_model(teacher), load_model(student)
    screening = Screening()
    feeds = [
        {name: np.asarray(array) for name, array in each.values.items()}
        for each in screening.of(read_samples(calibration, input_specs(original)))
    ]
    came_sparse = any(isinstance(tensor, CooTensor) for _, tensor in stored_tensors(made))
    style = SparseStyle.INITIALIZER if came_sparse else SparseStyle.DENSE
    history = distill(original, made, feeds, wanted, seed=seed, progress=progress)
    history = dataclasses.replace(history, left_out=screening.told())
    form, _ = sparse_form(made, style)
    save_model(form, output, external=external)
    return history
