"""What a run gives back, and moving it to where the user wants it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import onnx_ir as ir

from graphopt.driver.attempt import Attempt
from graphopt.driver.request import parse_external
from graphopt.emit.sparse import is_apart, sparse_form
from graphopt.errors import OptionError
from graphopt.ir.model_file import ExternalData, save_model
from graphopt.report.run import RunReport
from graphopt.targets import SparseStyle


@dataclasses.dataclass(frozen=True)
class Result:
    """An optimised model and the report of how it came about.

    Attributes:
        model: the result, in memory; weights are still mapped from where they lie.
        report: what was done and how it compares.
        path: where it was written, or None.
        sparse: the form that weights take in a file where they are mostly zero.
    """

    model: ir.Model
    report: RunReport
    path: Path | None
    sparse: SparseStyle = SparseStyle.DENSE

    def save(
        self, path: str | os.PathLike[str], *, external: str = ExternalData.AUTO.value
    ) -> tuple[Path, ...]:
        """Writes the model; returns the files written, the model first.

        Args:
            path: the file to write.
            external: where weights go: auto, never, single, per-tensor.

        Raises:
            OptionError: the path cannot be written, or `external` is none of these.
        """
        place = parse_external(external)
        model, _ = sparse_form(self.model, self.sparse, external=is_apart(place))
        return save_model(model, Path(path), external=place)


def check_output(output: Path) -> None:
    """Refuses an output that could not be written, before any work is done.

    Raises:
        OptionError: with the reason and the remedy.
    """
    parent = output.parent
    if output.is_dir():
        raise OptionError(
            f"{output} is a folder: this version writes one model; name a file in it, such as {output / 'model.onnx'}"
        )
    if not parent.is_dir():
        raise OptionError(
            f"cannot write {output}: {parent} is not a folder; make it first (mkdir -p {parent})"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OptionError(f"cannot write {output}: no permission to write in {parent}")


def place(made: Attempt, output: Path) -> Path:
    """Moves the working files beside each other to where `output` says; the model last.

    Each move is a rename within one file system, so an interruption leaves the old file or the new one.
    """
    assert made.files
    *data, model = reversed(made.files)
    for file in data:
        file.replace(output.parent / file.name)
    model.replace(output)
    return output
