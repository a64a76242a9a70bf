"""Tensors whose bytes stay where they were found: in a mapped file or in a buffer of the caller."""

from __future__ import annotations

import abc
import dataclasses
import math
import mmap
import os
import stat
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir.wire import packed_integers

CHUNK_BYTES = 8 << 20


class MappedFile:
    """A regular file, mapped read-only.

    The mapping belongs to the file that was opened, not to its name: replacing the file (rename over it)
    leaves the tensors as they
    were. Only overwriting it in place changes or truncates them under our hands, as with any mapping.
    """

    __slots__ = ("__weakref__", "_fd", "data", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens and maps.

        Raises:
            OSError: the file cannot be opened.
            ModelError: it is not a regular file.
        """
        self.path = Path(path)
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer before we can refuse it.
        self._fd = os.open(
            path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        )
        weakref.finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: not a regular file; give the path of a file on disk")
        size = status.st_size
        self.data = memoryview(mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) if size else b"")

    def fileno(self) -> int:
        """The descriptor, for copies inside the kernel."""
        return self._fd

    def advise(self, name: str) -> None:
        """Tells the kernel how the pages will be used (a `MADV_` name of `mmap`), where it listens."""
        mapping, advice = self.data.obj, getattr(mmap, name, None)
        if isinstance(mapping, mmap.mmap) and advice is not None:
            mapping.madvise(advice)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """The bytes of a range in pieces, read past the mapping so that they do not count as our memory.

        Raises:
            ModelError: the file has been cut short since it was mapped.
        """
        while length:
            piece = self._read(min(length, CHUNK_BYTES), offset)
            if not piece:
                raise ModelError(
                    f"{self.path}: cut short while in use, {length} bytes missing at offset {offset}; do not "
                    "overwrite a model in place while it is loaded"
                )
            yield piece
            offset, length = offset + len(piece), length - len(piece)

    def _read(self, size: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, size, offset)
        return bytes(self.data[offset : offset + size])


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a TensorProto says besides its elements."""

    name: str | None = None
    doc_string: str | None = None
    metadata_props: dict[str, str] | None = None


class HeldTensor(abc.ABC):
    """What our tensors share: name and notes, and the array protocols on top of `numpy()`."""

    __slots__ = (
        "__weakref__",
        "dims",
        "doc_string",
        "dtype",
        "meta",
        "metadata_props",
        "name",
        "raw",
        "shape",
    )

    def __init__(self, dtype: ir.DataType, dims: Sequence[int], notes: Notes, raw: object) -> None:
        self.dtype: ir.DataType = dtype
        self.dims: tuple[int, ...] = tuple(dims)
        self.shape: ir.ShapeProtocol = ir.Shape(dims, frozen=True)
        self.name: str | None = notes.name
        self.doc_string: str | None = notes.doc_string
        self.metadata_props: MutableMapping[str, str] = dict(notes.metadata_props or {})
        self.meta: MutableMapping[str, Any] = {}
        self.raw: Any = raw

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(list(self.dims))

    @property
    def nbytes(self) -> int:
        """The bytes of the elements, packed as in `raw_data`."""
        return (self.size * self.dtype.bitwidth + 7) // 8

    @abc.abstractmethod
    def numpy(self) -> np.ndarray[Any, Any]:
        """The elements."""

    @abc.abstractmethod
    def tobytes(self) -> bytes:
        """The elements in the form of `raw_data`."""

    def tofile(self, file: IO[bytes]) -> None:
        """Writes the elements in the form of `raw_data`."""
        file.write(self.tobytes())

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> np.ndarray[Any, Any]:
        array = self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)
        return array.copy() if copy else array

    def __dlpack__(self, *, stream: Any = None) -> Any:  # noqa: ANN401 - a PyCapsule
        return self.numpy().copy().__dlpack__(stream=stream)  # DLPack cannot say "read-only"

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    def __repr__(self) -> str:
        return f"{type(self).__name__}<{self.dtype},{self.shape}>(name={self.name!r})"


class MappedTensor(HeldTensor):
    """A tensor over little-endian bytes, packed as ONNX packs `raw_data`, that are not copied.

    `numpy()` is a read-only view (not necessarily aligned), except for types below one byte, which are
    unpacked.
    """

    __slots__ = ("_offset", "_source")

    def __init__(
        self,
        source: MappedFile | bytes | memoryview,
        dtype: ir.DataType,
        dims: Sequence[int],
        *,
        offset: int = 0,
        notes: Notes | None = None,
    ) -> None:
        """`source[offset : offset + nbytes]` are the elements; the caller has checked that they are there."""
        data = source.data if isinstance(source, MappedFile) else memoryview(source)
        super().__init__(dtype, dims, notes or Notes(), None)
        self.raw = data[offset : offset + self.nbytes]
        self._source = source
        self._offset = offset

    @property
    def mapping(self) -> tuple[MappedFile, int] | None:
        """The file and the offset in it, or None where the bytes are in memory."""
        return (self._source, self._offset) if isinstance(self._source, MappedFile) else None

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes in pieces, without mapping them into memory."""
        if isinstance(self._source, MappedFile):
            return self._source.chunks(self._offset, self.nbytes)
        return iter((self.raw,))

    def numpy(self) -> np.ndarray[Any, Any]:
        """The elements: a view where NumPy has the type's size."""
        if self.dtype.bitwidth < 8:
            packed = np.frombuffer(self.raw, dtype=np.uint8)
            return ir.PackedTensor(packed, self.dtype, shape=self.dims).numpy()
        little = self.dtype.numpy().newbyteorder("<")
        return np.frombuffer(self.raw, dtype=little).reshape(self.dims)

    def tobytes(self) -> bytes:
        """A copy of the bytes."""
        return bytes(self.raw)

    def tofile(self, file: IO[bytes]) -> None:
        """Writes the bytes in pieces."""
        for piece in self.chunks():
            file.write(piece)


class PackedIntegers(HeldTensor):
    """INT64 elements that stay packed where they were found, one byte for every 7 bits, and are read when asked for.

    For the indices of sparse tensors: unpacked they take eight bytes each, and hardly anybody looks at them.
    """

    __slots__ = ("_elements",)

    def __init__(
        self, packed: memoryview, elements: np.ndarray[Any, Any], notes: Notes | None = None
    ) -> None:
        """`packed` is the content of a packed field, `elements` what stands in it; not held beyond the caller's use."""
        super().__init__(ir.DataType.INT64, elements.shape, notes or Notes(), packed)
        self._elements = weakref.ref(elements)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The elements, read-only; shared while somebody holds them."""
        elements = self._elements()
        if elements is None:
            elements = packed_integers(self.raw, np.dtype("<i8")).reshape(self.dims)
            elements.flags.writeable = False
            self._elements = weakref.ref(elements)
        return elements

    def tobytes(self) -> bytes:
        """The elements in the form of `raw_data`."""
        return self.numpy().tobytes()
