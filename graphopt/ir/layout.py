"""Which tensors go to external data, into which file and where in it."""

from __future__ import annotations

import dataclasses
import enum

import onnx_ir as ir

from graphopt.ir.message import Location, Piece, Role
from graphopt.ir.wire import LARGE_BYTES

_PAGE_BYTES = 4096
_LINE_BYTES = 64


class ExternalData(enum.Enum):
    """Where `save_model` puts the weights."""

    AUTO = "auto"
    NEVER = "never"
    SINGLE_FILE = "single"
    FILE_PER_TENSOR = "per-tensor"


@dataclasses.dataclass
class Layout:
    """A placement that collects what it moves out of the model.

    Attributes:
        stem: the name of the data file, and the beginning of it where every tensor has its own.
        per_tensor: one file a tensor.
        roles: the tensors that may move have this role or one before it.
    """

    stem: str
    per_tensor: bool
    roles: Role
    files: dict[str, list[Piece]] = dataclasses.field(default_factory=dict)
    _end: int = 0

    def __call__(self, tensor: ir.TensorProtocol, role: Role) -> Location | None:
        """The place of a tensor outside the model, or None where it stays in."""
        if role > self.roles or tensor.nbytes < LARGE_BYTES:
            return None
        if self.per_tensor:
            name = f"{self.stem}.{len(self.files):05d}"
            self.files[name] = [tensor]
            return Location(name, 0)
        # Readers map what begins on a page; small tensors would waste most of theirs.
        step = _PAGE_BYTES if tensor.nbytes >= _PAGE_BYTES else _LINE_BYTES
        padding = -self._end % step
        self.files.setdefault(self.stem, []).extend([bytes(padding), tensor])
        offset = self._end + padding
        self._end = offset + tensor.nbytes
        return Location(self.stem, offset)
