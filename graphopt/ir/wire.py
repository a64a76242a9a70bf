"""A `.onnx` file at protobuf wire level: finds large tensors without parsing or copying them.

Only the fields that lead to tensor data are entered; everything else is copied as it stands, so fields of
newer ONNX versions pass
through to protobuf untouched. The result is a *skeleton*, the same model with the bytes of its large
tensors left where they are.
Source: protobuf encoding specification; field numbers from onnx.proto (IR version 14).
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from graphopt.errors import ModelError

LARGE_BYTES = 1024  # smaller payloads cost more as references than as copies
MAX_DEPTH = 100  # protobuf's own limit of nested messages: no runtime could read a deeper file

_RELEASE_BYTES = 8 << 20
_PIECE_BYTES = 1 << 20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Fields of packed numbers (float_data, double_data; int32_data, int64_data, uint64_data) and the dtypes that
# are kept in them. The former are what raw_data would be; the latter are varints.
_DENSE_FIELD: dict[int, tuple[int, ...]] = {4: (1, 14), 10: (11, 15)}
_VARINT_FIELD: dict[int, tuple[int, ...]] = {
    5: (2, 3, 4, 5, 6, 9, 10, *range(16, 29)),
    7: (7,),
    11: (12, 13),
}
VARINTS = "/varints"  # after the token: the payload is packed integers
_DATA_TYPE, _NAME, _RAW_DATA, _DATA_LOCATION = 2, 8, 9, 14
_CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
}


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without the bytes of its large tensors.

    Attributes:
        data: the serialised ModelProto; a stripped tensor is marked as external, its location is `token`.
        token: a location that no file can contain by chance or intent: it is drawn anew for every scan.
    """

    data: bytes
    token: str


@dataclasses.dataclass(frozen=True)
class Field:
    """One field (or a run of equal scalar fields): `[start, stop)` with its tag, `[body, stop)` without."""

    number: int
    kind: int
    start: int
    body: int
    stop: int


def scan(data: memoryview, origin: str, release: Callable[[], None] = lambda: None) -> Skeleton:
    """The skeleton of a serialised ModelProto; `release` is called now and then, to let go of mapped pages.

    Raises:
        ModelError: a field runs past its message, a varint does not end, or messages nest deeper than
        protobuf allows.
    """
    scanner = _Scanner(data, origin, "\0" + secrets.token_hex(16), release)
    stripped = scanner.message("ModelProto", 0, len(data), 0)
    return Skeleton(bytes(data) if stripped is None else stripped, scanner.token)


def packed_integers(data: memoryview, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The integers of a packed field; beyond the width of `dtype` they wrap, as protobuf's do.

    In pieces: protobuf itself would take eight bytes an element, Python objects forty.

    Raises:
        ValueError: a varint does not end, or is longer than ten bytes.
    """
    raw = np.frombuffer(data, np.uint8)
    pieces = [raw[at : at + _PIECE_BYTES] for at in range(0, raw.size, _PIECE_BYTES)]
    numbers: np.ndarray[Any, Any] = np.empty(
        sum(int(np.count_nonzero(piece < 0x80)) for piece in pieces), dtype
    )
    at = filled = 0
    while at < raw.size:
        piece = raw[at : at + _PIECE_BYTES]
        stops = np.flatnonzero(piece < 0x80)
        if not stops.size:
            raise ValueError("a varint does not end")
        numbers[filled : filled + stops.size] = _integers(piece, stops).view(np.int64).astype(dtype)
        at, filled = at + int(stops[-1]) + 1, filled + stops.size
    return numbers


def _integers(data: np.ndarray[Any, Any], stops: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[N] uint64: the varints of `data` that end at `stops`."""
    starts = np.concatenate([[0], stops[:-1] + 1])
    lengths = stops - starts + 1
    if int(lengths.max()) > 10:
        raise ValueError("a varint is longer than ten bytes")
    values: np.ndarray[Any, Any] = (data[starts] & 0x7F).astype(np.uint64)
    for index in range(1, int(lengths.max())):
        longer = np.flatnonzero(lengths > index)
        bits = (data[starts[longer] + index] & 0x7F).astype(np.uint64)
        values[longer] |= bits << np.uint64(7 * index)
    return values


def varint(value: int) -> bytes:
    """The protobuf encoding of a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def packed_field(numbers: np.ndarray[Any, Any]) -> bytes:
    """The content of a packed field of non-negative integers: one byte each for every 7 bits.

    In pieces, as `packed_integers`.
    """
    step = _PIECE_BYTES // 8
    return b"".join(
        _varints(numbers[at : at + step].astype(np.uint64)) for at in range(0, numbers.size, step)
    )


def _varints(numbers: np.ndarray[Any, Any]) -> bytes:
    lengths = np.ones(numbers.size, np.int64)
    for bits in range(7, 64, 7):
        lengths += numbers >= np.uint64(1 << bits)
    starts = np.cumsum(lengths) - lengths
    out = np.zeros(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max())):
        long = lengths > place
        part = (numbers[long] >> np.uint64(7 * place)) & np.uint64(0x7F)
        out[starts[long] + place] = part | np.where(lengths[long] > place + 1, 0x80, 0).astype(
            np.uint64
        )
    return out.tobytes()


def tag(number: int) -> bytes:
    """The tag of a length-delimited field."""
    return varint(number << 3 | _BYTES)


def blob(number: int, body: bytes) -> bytes:
    """A whole length-delimited field."""
    return tag(number) + varint(len(body)) + body


@cache
def _run_of(tag_byte: int) -> re.Pattern[bytes]:
    """Matches further scalar fields with the same one-byte tag."""
    body = {
        _VARINT: rb"[\x80-\xff]{0,9}[\x00-\x7f]",
        _FIXED64: rb"[\s\S]{8}",
        _FIXED32: rb"[\s\S]{4}",
    }
    return re.compile(rb"(?:" + re.escape(bytes([tag_byte])) + body[tag_byte & 7] + rb")*")


@dataclasses.dataclass
class _Scanner:
    data: memoryview
    origin: str
    token: str
    release: Callable[[], None]
    passed_bytes: int = 0

    def message(self, kind: str, start: int, stop: int, depth: int) -> bytes | None:
        """The message without its large tensor data, or None where it has none."""
        if depth > MAX_DEPTH:
            raise ModelError(
                f"{self.origin}: messages nest more than {MAX_DEPTH} deep at byte {start}, which no ONNX reader "
                "accepts; the file is corrupt or hostile, export the model again"
            )
        if kind == "TensorProto":
            return self._tensor(start, stop)
        children = _CHILDREN[kind]
        pieces: list[bytes | memoryview] = []
        kept = start
        for field in self._fields(start, stop):
            child = children.get(field.number)
            if child is None or field.kind != _BYTES or field.stop - field.body < LARGE_BYTES:
                continue
            stripped = self.message(child, field.body, field.stop, depth + 1)
            if stripped is not None:
                pieces += [self.data[kept : field.start], blob(field.number, stripped)]
                kept = field.stop
        if not pieces:
            return None
        return b"".join([*pieces, self.data[kept:stop]])

    def _tensor(self, start: int, stop: int) -> bytes | None:
        fields = list(self._fields(start, stop))
        scalars = {f.number: self._varint(f.body, f.stop)[0] for f in fields if f.kind == _VARINT}
        if scalars.get(_DATA_LOCATION):
            return None
        large = [f for f in fields if self._is_payload(f, scalars.get(_DATA_TYPE, 0))]
        if len(large) != 1 or large[0].stop - large[0].body < LARGE_BYTES:
            return None
        payload = large[0]
        self._pass(payload.stop - payload.body)
        return b"".join(
            [
                self.data[start : payload.start],
                self.data[payload.stop : stop],
                _entry("location", self.token + VARINTS * (payload.number in _VARINT_FIELD)),
                _entry("offset", str(payload.body)),
                _entry("length", str(payload.stop - payload.body)),
                varint(_DATA_LOCATION << 3) + b"\x01",
            ]
        )

    def _pass(self, size: int) -> None:
        # A look at one byte may map megabytes (Linux 6.18 maps whole large folios): without this, looking
        # at every header of a large model would bring most of it into our memory.
        self.passed_bytes += size
        if self.passed_bytes >= _RELEASE_BYTES:
            self.release()
            self.passed_bytes = 0

    @staticmethod
    def _is_payload(field: Field, data_type: int) -> bool:
        if field.kind != _BYTES:
            return False
        typed = _DENSE_FIELD.get(field.number) or _VARINT_FIELD.get(field.number, ())
        return field.number == _RAW_DATA or data_type in typed

    def _fields(self, at: int, stop: int) -> Iterator[Field]:
        while at < stop:
            start = at
            key, body = self._varint(at, stop)
            kind = key & 7
            if kind == _BYTES:
                size, body = self._varint(body, stop)
                at = body + size
            elif kind == _VARINT:
                at = self._varint(body, stop)[1]
            elif kind in (_FIXED64, _FIXED32):
                at = body + (8 if kind == _FIXED64 else 4)
            else:
                raise self._corrupt(
                    start, f"wire type {kind} of field {key >> 3} is not one that ONNX uses"
                )
            if not key >> 3:
                raise self._corrupt(start, "field number 0")
            if at > stop:
                raise self._corrupt(
                    start, f"field {key >> 3} ends at byte {at}, its message at {stop}"
                )
            # Attributes and old files hold numbers one field each: a million must not be a million turns
            # of this loop.
            if kind != _BYTES and body == start + 1 and at < stop and self.data[at] == key:
                run = _run_of(key).match(self.data, at, stop)
                at = run.end() if run else at
            yield Field(key >> 3, kind, start, body, at)

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        value = 0
        for shift, index in enumerate(range(at, min(at + 10, stop))):
            byte = self.data[index]
            value |= (byte & 0x7F) << 7 * shift
            if byte < 0x80:
                return value, index + 1
        raise self._corrupt(at, "a varint does not end")

    def _corrupt(self, at: int, what: str) -> ModelError:
        return ModelError(
            f"{self.origin}: not a whole ONNX file: {what} (byte {at} of {len(self.data)}); "
            "it may be truncated or of another format, fetch or export it again"
        )


def _entry(key: str, value: str) -> bytes:
    """An external_data entry (field 13) of a TensorProto."""
    return blob(13, blob(1, key.encode()) + blob(2, value.encode()))
