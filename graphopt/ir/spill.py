"""Arrays that wait in a temporary file: memory that the system takes back when it is not looked at."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Spill:
    """A few arrays in a file without a name, mapped; in memory where no file can be had.

    The file is gone with the object, or with the process, however that ends.
    """

    __slots__ = ("_held", "_places")

    def __init__(self, arrays: Sequence[Array]) -> None:
        """Takes flat arrays."""
        ends = np.cumsum([0, *(array.nbytes for array in arrays)]).tolist()
        self._places = [
            (array.dtype, array.size, at) for array, at in zip(arrays, ends[:-1], strict=True)
        ]
        self._held: mmap.mmap | bytes = _mapped(arrays) if ends[-1] else b""

    def arrays(self) -> list[Array]:
        """The arrays, read-only."""
        return [
            np.frombuffer(self._held, dtype, size, at) if size else np.zeros(0, dtype)
            for dtype, size, at in self._places
        ]

    def rest(self) -> None:
        """Lets go of the pages that were read."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if isinstance(self._held, mmap.mmap) and advice is not None:
            self._held.madvise(advice)


def _mapped(arrays: Sequence[Array]) -> mmap.mmap | bytes:
    try:
        with tempfile.TemporaryFile(prefix="graphopt-") as file:
            for array in arrays:
                file.write(array.view(np.uint8).data)
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:  # no room, or no folder that can be written
        return b"".join(array.tobytes() for array in arrays)
