"""A protobuf message as pieces: serialised fields, and tensors whose bytes are read when written.

The length of a message stands before it, so sizes are computed first, from dims and dtypes; then
everything can be streamed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import TypeAlias

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.wire import tag, varint

Piece: TypeAlias = bytes | ir.TensorProtocol


class Message:
    """A protobuf message in the making; the bytes of its tensors are read when it is written."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces: list[Piece] = list(pieces)
        self.size = sum(map(len, pieces))

    def write(self, data: bytes) -> None:
        """Appends serialised fields."""
        self.pieces.append(data)
        self.size += len(data)

    def add(self, number: int, child: Message) -> None:
        """Appends a field that holds a message."""
        self.write(tag(number) + varint(child.size))
        self.pieces += child.pieces
        self.size += child.size

    def payload(self, number: int, tensor: ir.TensorProtocol) -> None:
        """Appends a field that holds the bytes of a tensor."""
        self.write(tag(number) + varint(tensor.nbytes))
        self.pieces.append(tensor)
        self.size += tensor.nbytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes, in order, at most one tensor in memory at a time."""
        for piece in self.pieces:
            yield from (piece,) if isinstance(piece, bytes) else tensor_chunks(piece)


def tensor_chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor in the form of `raw_data`.

    Raises:
        ModelError: they are not as many as dtype and shape say.
    """
    written = 0
    for chunk in tensor.chunks() if isinstance(tensor, MappedTensor) else (_tobytes(tensor),):
        written += len(chunk)
        yield chunk
    if written != tensor.nbytes:
        raise ModelError(
            f"tensor {tensor.name!r} of {tensor.dtype} {tensor.shape} has {written} bytes, not {tensor.nbytes}; "
            "make its data fit its shape"
        )


def _tobytes(tensor: ir.TensorProtocol) -> bytes:
    try:
        return tensor.tobytes()
    except OSError as error:  # an ir.ExternalTensor of the caller's own
        raise ModelError(
            f"tensor {tensor.name!r}: cannot read its data: {error}; load the model from its path"
        ) from error


class Role(enum.IntEnum):
    """What a tensor is in the file. The later ones move to external data last: fewer tools read them there."""

    INITIALIZER = 0
    ATTRIBUTE = 1
    SPARSE_PART = 2


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the bytes of a tensor are kept outside the model."""

    file: str
    offset: int


Placement: TypeAlias = Callable[[ir.TensorProtocol, Role], Location | None]


def inline(_tensor: ir.TensorProtocol, _role: Role) -> None:
    """The placement that keeps every tensor in the model."""
