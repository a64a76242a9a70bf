"""Reference values kept on disk, so that comparing with the same model again does not run it again.

One folder a model, one file a set of inputs. What a file is called follows from everything that the values follow
from: the model with its weights, the inputs, the runtime, the processor. A file says its own checksum; one that was cut
off or changed is thrown away and made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.ir.encode import encode_model
from graphopt.runtime import onnxruntime_api
from graphopt.runtime.machine import arithmetic
from graphopt.verify.golden_files import value_hash

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir

FOLDER = Path(".cache") / "graphopt" / "reference"
"""Below the user's home."""

CAP_BYTES = 1 << 30
"""Of all files together; what was used longest ago goes first."""

LEAST_BYTES = 1 << 23
"""Of weights: smaller models run faster than their values are looked up."""

_ENTRY_BYTES = 1 << 28
_SCHEMA = 1
_NATIVE = "biufc"


def user_folder() -> Path | None:
    """Where the user's programs keep what can be made again; None where the user has no home."""
    try:
        return Path.home() / FOLDER
    except RuntimeError:
        return None


@dataclasses.dataclass(frozen=True)
class KeptValues:
    """Values of one model, by inputs.

    Attributes:
        folder: of this model.
        cap: of all models together, in bytes.
    """

    folder: Path
    cap: int = CAP_BYTES

    @property
    def is_known(self) -> bool:
        """Whether the model has run before."""
        return self.folder.is_dir() and any(self.folder.iterdir())

    def find(self, feed: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values on some inputs; None where they are not there, or are not what was written."""
        path = self._path(feed)
        try:
            data = path.read_bytes()
            found = _unpacked(data)
        except OSError:
            return None
        except ValueError:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def keep(self, feed: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Writes values, where they are plain arrays and the file system lets us; a cache owes nobody anything."""
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        size = sum(array.nbytes for array in arrays.values())
        plain = all(array.dtype.kind in _NATIVE for array in arrays.values())
        if len(arrays) < len(values) or not plain or size > min(_ENTRY_BYTES, self.cap // 4):
            return
        path = self._path(feed)
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(_packed(arrays))
            temporary.replace(path)
            self._trim()
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _path(self, feed: Mapping[str, Any]) -> Path:
        return self.folder / value_hash([f"{n}={value_hash(v)}" for n, v in sorted(feed.items())])

    def _trim(self) -> None:
        """Drops what was used longest ago until a fifth of the room is free again."""
        files = sorted(_files(self.folder.parent))
        total = sum(size for _, size, _ in files)
        if total <= self.cap:
            return
        for _, size, path in files:
            path.unlink(missing_ok=True)
            total -= size
            if total <= self.cap * 4 // 5:
                return


def kept_values(
    root: Path | None, model: ir.Model, shown: Sequence[str], *, least: int = LEAST_BYTES
) -> KeptValues | None:
    """Where values of a model are kept; None where they are not: no folder to keep them in, or a small model.

    Args:
        root: the folder for all models; None keeps nothing.
        model: as the runtime gets it; its weights are read.
        shown: names of inner values that are kept with the outputs.
        least: bytes of weights from which on keeping pays.
    """
    if root is None:
        return None
    message = encode_model(model)
    if message.size < least:
        return None
    digest = hashlib.sha256()
    for chunk in message.chunks():
        digest.update(chunk)
    told = [_SCHEMA, onnxruntime_api.version(), arithmetic(), sorted(shown)]
    digest.update(json.dumps(told).encode())
    return KeptValues(root / digest.hexdigest())


def _files(root: Path) -> Iterator[tuple[float, int, Path]]:
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):  # another process may have dropped it
            facts = path.stat()
            yield facts.st_mtime, facts.st_size, path


def _packed(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    parts = [np.ascontiguousarray(array).tobytes() for array in arrays.values()]
    payload = b"".join(parts)
    table = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    head = json.dumps(table)
    digest = hashlib.sha256(head.encode() + payload).hexdigest()
    return f"{digest}\n{head}\n".encode() + payload


def _unpacked(data: bytes) -> dict[str, Any]:
    """The values in a file.

    Raises:
        ValueError: it is not what was written.
    """
    digest, _, rest = data.partition(b"\n")
    head, _, payload = rest.partition(b"\n")
    if hashlib.sha256(head + payload).hexdigest().encode() != digest:
        raise ValueError("the checksum differs")
    found: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in json.loads(head):
        kind = np.dtype(dtype)
        count = math.prod(shape)
        array = np.frombuffer(payload, kind, count, offset).reshape(shape).copy()
        offset += count * kind.itemsize
        found[name] = array
    return found
