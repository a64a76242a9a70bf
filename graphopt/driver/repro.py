"""A minimal reproduction of a wrong rewrite: the part of the model that shows it, before and after, with inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from graphopt.errors import OptionError
from graphopt.ir.atomic import filled
from graphopt.ir.model_file import ExternalData, load_model, save_model
from graphopt.rewrite import Rewrite
from graphopt.runtime.specs import input_specs, output_specs
from graphopt.verify.divergence import Divergence, cut
from graphopt.verify.golden_files import write_value

BEFORE, AFTER, NOTES = "before.onnx", "after.onnx", "README.md"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A failure to reproduce.

    Attributes:
        original: file of the model as it was.
        result: file of the model that is wrong.
        divergence: where they part.
        guilty: the rewrites that are to blame.
        reason: what verification said.
    """

    original: Path
    result: Path
    divergence: Divergence
    guilty: Sequence[Rewrite]
    reason: str


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds anything but an older reproduction.

    Raises:
        OptionError: it does.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is not a folder; name one for the reproduction")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / BEFORE).is_file():
        raise OptionError(f"{folder} is not empty; name another folder for the reproduction")


def write_repro(folder: Path, fault: Fault) -> None:
    """Writes the region before and after, the inputs and output that the original has there, and how to run it.

    Raises:
        OptionError: the file system refuses; the folder is as it was.
    """
    with filled(folder) as place:
        _write(place, fault)


def _write(folder: Path, fault: Fault) -> None:
    data = folder / "test_data_set_0"
    data.mkdir()
    found = fault.divergence
    for source, name in ((fault.original, BEFORE), (fault.result, AFTER)):
        part = cut(load_model(source), found)
        save_model(part, folder / name, external=ExternalData.AUTO)
    part = load_model(folder / BEFORE)
    for position, spec in enumerate(input_specs(part)):
        write_value(data / f"input_{position}.pb", spec.name, found.captured[spec.name], spec.kind)
    (output,) = output_specs(part)
    write_value(data / "output_0.pb", output.name, found.captured[found.value], output.kind)
    (folder / NOTES).write_text(_notes(fault), encoding="utf-8")


def _notes(fault: Fault) -> str:
    found = fault.divergence
    names = "\n".join(f"* `{r.pass_name}/{r.rule}` at `{r.site}`" for r in fault.guilty)
    return f"""# A rewrite that changes the numbers

{names}

Verification said: {fault.reason}

The first value that differs is `{found.value}` ({found.operator or "an input"}): {found.report.why}
{found.spread} values after it differ too. Everything that feeds it agrees with the original, so the fault lies in the
nodes of `{BEFORE}` (the original's) that became those of `{AFTER}`. `test_data_set_0` holds what the original
computes there.

    graphopt diff {BEFORE} {AFTER}
    graphopt verify {BEFORE} {AFTER} --inputs .

The second command exits with status 1 and shows the difference.
"""
