"""What a run gives back, and moving it to where the user wants it."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from pathlib import Path

import onnx_ir as ir

from graphopt.driver.attempt import Attempt
from graphopt.driver.request import parse_external
from graphopt.emit.sparse import sparse_form
from graphopt.errors import OptionError
from graphopt.ir.atomic import FileSet
from graphopt.ir.model_file import ExternalData, save_model
from graphopt.report.run import RunReport
from graphopt.targets import SparseStyle

MANIFEST = "manifest.json"
SCHEMA = "graphopt-bundle/1"
MODEL = "model.onnx"


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
            path: the file to write; in a folder that exists, `model.onnx`.
            external: where weights go: auto, never, single, per-tensor.

        Raises:
            OptionError: the path cannot be written, or `external` is none of these.
        """
        place = parse_external(external)
        file = Path(path) / MODEL if Path(path).is_dir() else Path(path)
        model, _ = sparse_form(self.model, self.sparse)
        return save_model(model, file, external=place)


def check_output(output: Path) -> None:
    """Refuses an output that could not be written, before any work is done.

    Raises:
        OptionError: with the reason and the remedy.
    """
    parent = output.parent
    if is_bundle(output):
        check_folder_output(output)
    elif output.is_dir():
        raise OptionError(
            f"{output} is a folder whose name ends in .onnx; name a file in it, such as {output / MODEL}, or another "
            "folder for a bundle"
        )
    if not parent.is_dir():
        raise OptionError(
            f"cannot write {output}: {parent} is not a folder; make it first (mkdir -p {parent})"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OptionError(f"cannot write {output}: no permission to write in {parent}")


def place(made: Attempt, output: Path) -> Path:
    """Moves the working files beside each other to where `output` says; the model last.

    Each move is a rename within one file system; where one fails or is interrupted, what was there comes back.

    Raises:
        OptionError: the file system refuses.
    """
    assert made.files
    model, *data = made.files
    placed = FileSet()
    for file in data:
        placed.adopt(output.parent / file.name, file)
    placed.adopt(output, model)
    placed.commit()
    return output


def is_bundle(output: Path | None) -> bool:
    """Whether `-o` names a folder to fill: anything that does not end in `.onnx`."""
    return output is not None and output.suffix != ".onnx"


def model_name(output: Path | None) -> str:
    """What the model's file is called."""
    return MODEL if output is None or is_bundle(output) else output.name


def check_folder_output(output: Path) -> None:
    """Refuses to replace anything but a bundle.

    Raises:
        OptionError: the path is a file, or a folder that holds something else.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OptionError(
            f"cannot write the bundle {output}: it is a file; name a folder, or end the name in .onnx for one model"
        )
    if output.is_dir() and any(output.iterdir()) and not _is_ours(output):
        raise OptionError(
            f"cannot write the bundle {output}: the folder is not empty and no bundle of graphopt; name another one, "
            f"or a file in it, such as {output / MODEL}"
        )


def _is_ours(folder: Path) -> bool:
    try:
        body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and str(body.get("schema", "")).startswith("graphopt-bundle/")


def place_bundle(built: Path, output: Path) -> Path:
    """Puts a finished bundle at `output`; what was there comes back if that fails.  Returns the model's path."""
    if not output.exists():
        built.rename(output)
        return output / MODEL
    aside = output.parent / f".graphopt-{secrets.token_hex(8)}.old"
    output.rename(aside)
    try:
        built.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return output / MODEL
