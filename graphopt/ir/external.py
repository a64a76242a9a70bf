"""External tensor data: reads it from the model's own folder only, and lays it out for writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path, PureWindowsPath

from graphopt.errors import ModelError
from graphopt.ir.mapped import MappedFile

_SMALL_FILE_BYTES = 64 << 10  # such files are read, not mapped: a mapping holds a file descriptor


class ModelFolder:
    """The folder that external data of one model may lie in; maps each file once.

    Both the folder of the path as given and that of the file it leads to count: model caches keep the
    model and its data as links
    into one store.
    """

    def __init__(self, model: Path) -> None:
        self._folder = model.parent
        self._roots = {Path(os.path.realpath(model.parent)), Path(os.path.realpath(model)).parent}
        self._sources: dict[Path, MappedFile | bytes] = {}

    def source(self, location: str, where: str) -> MappedFile | bytes:
        """The bytes of the file that a tensor's `location` names.

        Raises:
            ModelError: the location is absolute, leaves the folder (directly or through a link), is
            missing or not a file.
        """
        path = self._resolve(location, where)
        if path not in self._sources:
            self._sources[path] = _read(path, location, where)
        return self._sources[path]

    def _resolve(self, location: str, where: str) -> Path:
        windows = PureWindowsPath(location)
        if (
            not location
            or "\0" in location
            or windows.is_absolute()
            or windows.drive
            or location.startswith(("/", "\\"))
        ):
            raise _refused(location, where, "is not a path relative to the model")
        if ".." in windows.parts:
            raise _refused(location, where, "leads out of the model's folder")
        path = Path(os.path.realpath(self._folder / location))
        if not any(path.is_relative_to(root) for root in self._roots):
            raise _refused(location, where, f"leads out of the model's folder, to {path}")
        return path


def _read(path: Path, location: str, where: str) -> MappedFile | bytes:
    try:
        file = MappedFile(path)
    except FileNotFoundError as error:
        raise ModelError(
            f"{where}: external data file {location!r} is missing ({path}); keep it beside the model, under that name"
        ) from error
    except OSError as error:
        hint = (
            "raise `ulimit -n` or keep the data in fewer files"
            if error.errno == errno.EMFILE
            else "make it readable"
        )
        raise ModelError(
            f"{where}: cannot read external data file {path}: {error.strerror}; {hint}"
        ) from error
    return bytes(file.data) if len(file.data) <= _SMALL_FILE_BYTES else file


def _refused(location: str, where: str, why: str) -> ModelError:
    return ModelError(
        f"{where}: external data location {location!r} {why}, and is not followed; move the data beside "
        "the model and store its name alone"
    )
