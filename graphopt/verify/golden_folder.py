"""Golden cases as folders: finding them, writing them, and what in them nobody mentions."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from graphopt.errors import DataError, OptionError
from graphopt.ir.atomic import filled
from graphopt.verify.golden_files import MANIFEST, SCHEMA, STRUCTURE

if TYPE_CHECKING:
    from pathlib import Path


def refuse_foreign(folder: Path, model: Path) -> None:
    """Refuses to write into a folder that holds anything but a golden case, or its model alone.

    Raises:
        OptionError: it does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OptionError(f"'{folder}' is not a folder; give one for the case.")
    others = [entry for entry in folder.iterdir() if entry.resolve() != model.resolve()]
    if others and not (folder / MANIFEST).is_file():
        raise OptionError(
            f"'{folder}' is not empty and not a golden case (it holds '{others[0].name}'); give another folder."
        )


def place(made: Path, folder: Path, model: Path | None) -> None:
    """Puts a finished case where it belongs, with a model that shall lie there; data sets of the last recording go.

    Raises:
        OptionError: the file system refuses; what was there is as it was.
    """
    with filled(folder, stale="test_data_set_*") as place:
        if model is not None and (folder / "model.onnx").resolve() != model.resolve():
            shutil.copyfile(model, place / "model.onnx")
        for entry in sorted(made.iterdir()):
            if entry.is_dir():
                shutil.copytree(entry, place / entry.name)
            else:
                shutil.copyfile(entry, place / entry.name)


def find_cases(root: Path) -> list[Path]:
    """Folders with a manifest: the root itself, or any below it.

    Raises:
        DataError: there are none, which would otherwise pass for "all is well".
    """
    found = (
        [root]
        if (root / MANIFEST).is_file()
        else sorted(p.parent for p in root.glob(f"**/{MANIFEST}"))
    )
    if not found:
        raise DataError(
            f"There is no golden case in '{root}' (no {MANIFEST}): record one with 'graphopt golden record'."
        )
    return found


def find_orphans(root: Path, cases: list[Path]) -> tuple[str, ...]:
    """Data sets and files of cases that their manifests do not mention, and folders that are no case."""
    found = [path for case in cases for path in _strays(case, read_manifest(case))]
    if root not in cases:
        roots = {case.relative_to(root).parts[0] for case in cases}
        found += [p for p in root.iterdir() if p.is_dir() and p.name not in roots]
    return tuple(sorted(path.relative_to(root).as_posix() for path in found))


def _strays(case: Path, manifest: dict[str, Any]) -> list[Path]:
    known = {case / MANIFEST, case / STRUCTURE, case / manifest["source"]["path"]}
    for data_set in manifest["data_sets"]:
        folder = case / data_set["folder"]
        known |= {
            folder / f"input_{i}.pb"
            for i, entry in enumerate(data_set["inputs"])
            if entry["stored"]
        }
        known |= {folder / entry["file"] for entry in data_set["outputs"] if "file" in entry}
    inside = [*case.glob("test_data_set_*/*"), *(p for p in case.iterdir() if p.is_file())]
    # External weights of the source, licences and notes may lie beside it; protobufs have no business there.
    return [p for p in inside if p not in known and (p.suffix == ".pb" or p.parent != case)]


def remove_orphans(case: Path, manifest: dict[str, Any]) -> None:
    """Removes protobufs of a case that its manifest does not mention."""
    for path in _strays(case, manifest):
        path.unlink()


def read_manifest(case: Path) -> dict[str, Any]:
    """The manifest of a case.

    Raises:
        DataError: it cannot be read, or is of another schema.
    """
    path = case / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read: {error}. Record the case again.") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        seen = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(
            f"'{path}' has schema {seen}; this version reads {SCHEMA}. Record the case again."
        )
    return manifest
