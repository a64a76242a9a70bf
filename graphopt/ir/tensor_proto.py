"""TensorProto -> tensor: every dtype, every data field, with dims and lengths checked against each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir import notes
from graphopt.ir.external import ModelFolder
from graphopt.ir.mapped import MappedFile, MappedTensor, Notes, PackedIntegers
from graphopt.ir.sparse import CooTensor
from graphopt.ir.wire import VARINTS, packed_integers

_T = onnx.TensorProto
_MAX_ELEMENTS = 2**63 - 1
_MAX_RANK = 32  # NumPy's until version 2; ONNX operators stay far below

# dtype -> (data field, dtype of its elements); all others are kept in int32_data, one element or packed
# byte each.
_FIELD: dict[int, tuple[str, str]] = {
    _T.FLOAT: ("float_data", "<f4"),
    _T.COMPLEX64: ("float_data", "<f4"),
    _T.DOUBLE: ("double_data", "<f8"),
    _T.COMPLEX128: ("double_data", "<f8"),
    _T.INT64: ("int64_data", "<i8"),
    _T.UINT64: ("uint64_data", "<u8"),
    _T.UINT32: ("uint64_data", "<u8"),
}
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


@dataclasses.dataclass(frozen=True)
class TensorReader:
    """Reads the tensors of one model.

    Attributes:
        body: the file or bytes that the skeleton was made from, or None where there is no skeleton.
        token: the location that marks a tensor whose bytes stayed in `body`.
        folder: where external data may lie, or None where the model came without a path.
    """

    body: MappedFile | bytes | None = None
    token: str | None = None
    folder: ModelFolder | None = None

    def tensor(self, proto: onnx.TensorProto, where: str) -> ir.TensorProtocol:
        """The tensor that `proto` describes; large data stays in its file.

        Raises:
            ModelError: dims, dtype and data contradict each other, or external data cannot be used.
        """
        where = f"{where}, tensor {proto.name!r}"
        dtype, dims = _dtype(proto, where), _dims(proto, where)
        if proto.HasField("segment"):
            raise ModelError(
                f"{where}: is one segment of a tensor; join the segments before, no runtime reads them"
            )
        described = _notes(proto)
        if self._stayed_as_varints(proto):
            return MappedTensor(
                self._varints(proto, dtype, dims, where), dtype, dims, notes=described
            )
        if proto.data_location == _T.EXTERNAL:
            source, offset = self._external(proto, dtype, dims, where)
            return MappedTensor(source, dtype, dims, offset=offset, notes=described)
        if dtype == ir.DataType.STRING:
            return _string_tensor(proto, dims, described, where)
        if dtype == ir.DataType.UNDEFINED:
            return _untyped_tensor(proto, where)
        data = proto.raw_data if proto.HasField("raw_data") else _typed_data(proto, dtype, where)
        _check_length(len(data), dtype, dims, where)
        return MappedTensor(data, dtype, dims, notes=described)

    def sparse_tensor(self, proto: onnx.SparseTensorProto, where: str) -> CooTensor:
        """The sparse tensor that `proto` describes, in its own layout.

        Raises:
            ModelError: as `tensor`, and where values, indices and dims do not fit together.
        """
        name = notes.name(proto.values.name)
        dims = _dims(proto, f"{where}, sparse tensor {name!r}")
        values = self.tensor(proto.values, where)
        # Indices may be left out where there are no values; ONNX Runtime wants them spelt out.
        nothing = ir.Tensor(np.zeros(0, np.int64))
        indices = self.tensor(proto.indices, where) if proto.HasField("indices") else nothing
        packed = bool(len(proto.indices.int64_data)) or self._stayed_as_varints(proto.indices)
        elements = indices.numpy()  # held until they are checked
        if self._stayed_as_varints(proto.indices) and indices.dtype == ir.DataType.INT64:
            payload, described = self._payload(proto.indices), _notes(proto.indices)
            indices = PackedIntegers(payload, elements, described)
        try:
            return CooTensor(values, indices, dims, name=name, packed=packed)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from error

    def _stayed_as_varints(self, proto: onnx.TensorProto) -> bool:
        return self.token is not None and any(
            entry.value == self.token + VARINTS for entry in proto.external_data
        )

    def _varints(
        self, proto: onnx.TensorProto, dtype: ir.DataType, dims: Sequence[int], where: str
    ) -> bytes | memoryview:
        """The data of a large tensor that is kept as packed integers."""
        self._check_once(proto, where)
        stored = np.dtype(_FIELD.get(proto.data_type, ("int32_data", "<i4"))[1])
        try:
            elements = packed_integers(self._payload(proto), stored)
        except ValueError as error:
            raise ModelError(f"{where}: {error}; the file is corrupt, export it again") from error
        narrow = _narrowed(elements, dtype, where)
        _check_length(narrow.nbytes, dtype, dims, where)
        return narrow.view(np.uint8).data

    def _payload(self, proto: onnx.TensorProto) -> memoryview:
        """The packed integers of a tensor whose data stayed so."""
        assert self.body is not None
        data = self.body.data if isinstance(self.body, MappedFile) else memoryview(self.body)
        entries = _entries(proto)
        offset, length = int(entries["offset"]), int(entries["length"])
        return data[offset : offset + length]

    @staticmethod
    def _check_once(proto: onnx.TensorProto, where: str) -> None:
        typed = any(len(getattr(proto, field)) for field in _TYPED_FIELDS)
        if typed or proto.HasField("raw_data") or len(proto.external_data) != 3:
            raise ModelError(
                f"{where}: its data are given more than once; the file is corrupt or hostile"
            )

    def _external(
        self, proto: onnx.TensorProto, dtype: ir.DataType, dims: Sequence[int], where: str
    ) -> tuple[MappedFile | bytes, int]:
        if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
            raise ModelError(
                f"{where}: {dtype} cannot be kept as external data; store it in the model"
            )
        entries = _entries(proto)
        location = entries.get("location", "")
        offset = _number(entries, "offset", where) or 0
        length = _number(entries, "length", where)
        if self.body is not None and location == self.token:
            self._check_once(proto, where)
            source: MappedFile | bytes = self.body
        elif self.folder is None:
            raise ModelError(
                f"{where}: is kept in the file {location!r}, but the model came without a folder; load it from its path"
            )
        else:
            source = self.folder.source(location, where)
        _check_length(_nbytes(dtype, dims) if length is None else length, dtype, dims, where)
        size = len(source.data) if isinstance(source, MappedFile) else len(source)
        if offset + _nbytes(dtype, dims) > size:
            raise ModelError(
                f"{where}: bytes {offset} to {offset + _nbytes(dtype, dims)} of {location!r} are outside the file, "
                f"which has {size}; it may be truncated or belong to another model"
            )
        return source, offset


def _entries(proto: onnx.TensorProto) -> dict[str, str]:
    return {notes.name(entry.key): notes.name(entry.value) for entry in proto.external_data}


def _notes(proto: onnx.TensorProto) -> Notes:
    return Notes(
        name=notes.name(proto.name) if proto.HasField("name") else None,
        doc_string=notes.text(proto, "doc_string"),
        metadata_props=notes.props(proto),
    )


def _dtype(proto: onnx.TensorProto, where: str) -> ir.DataType:
    try:
        return ir.DataType(proto.data_type)
    except ValueError as error:
        raise ModelError(
            f"{where}: data type {proto.data_type} is not known to onnx-ir {ir.__version__}; a newer one may know it"
        ) from error


def _dims(proto: onnx.TensorProto | onnx.SparseTensorProto, where: str) -> tuple[int, ...]:
    dims = tuple(proto.dims)
    if (
        len(dims) > _MAX_RANK
        or any(dim < 0 for dim in dims)
        or math.prod(dim or 1 for dim in dims) > _MAX_ELEMENTS
    ):
        raise ModelError(
            f"{where}: {len(dims)} dims {list(dims[:_MAX_RANK])}: more than {_MAX_RANK}, negative, or over 64 bits "
            "in all; the file is corrupt or hostile"
        )
    return dims


def _count(dims: Iterable[int]) -> int:
    return math.prod(list(dims))


def _nbytes(dtype: ir.DataType, dims: Sequence[int]) -> int:
    return (_count(dims) * dtype.bitwidth + 7) // 8


def _check_length(length: int, dtype: ir.DataType, dims: Sequence[int], where: str) -> None:
    expected = _nbytes(dtype, dims)
    if length != expected:
        cause = "the file is corrupt" if length else "the weights have been stripped"
        raise ModelError(
            f"{where}: dims {list(dims)} of {dtype} are {expected} bytes, its data are {length}; {cause}, export the "
            "model again"
        )


def _number(entries: dict[str, str], key: str, where: str) -> int | None:
    text = entries.get(key, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(
            f"{where}: external data {key} {text!r} is not a byte count; the file is corrupt or hostile"
        )
    return int(text)


def _typed_data(proto: onnx.TensorProto, dtype: ir.DataType, where: str) -> bytes:
    field, stored = _FIELD.get(proto.data_type, ("int32_data", "<i4"))
    count = len(getattr(proto, field))
    # fromiter: a list of a hundred million Python numbers would take gigabytes.
    elements = np.fromiter(iter(getattr(proto, field)), np.dtype(stored), count)
    return _narrowed(elements, dtype, where).tobytes()


def _narrowed(
    elements: np.ndarray[Any, Any], dtype: ir.DataType, where: str
) -> np.ndarray[Any, Any]:
    """The elements in the width of `raw_data`: int32_data and uint64_data also hold narrower types."""
    if dtype.bitwidth == 6:
        if bool(((elements < 0) | (elements > 63)).any()):
            raise ModelError(f"{where}: {dtype} data outside 0..63; the file is corrupt")
        unpacked = elements.astype(np.uint8).view(dtype.numpy())
        return np.frombuffer(ir.Tensor(unpacked, dtype).tobytes(), np.uint8)
    if dtype.bitwidth in (2, 4, 8):
        return elements.astype(np.uint8)
    if dtype.bitwidth == 16:
        return elements.astype("<u2")
    return elements.astype("<u4") if dtype == ir.DataType.UINT32 else elements


def _string_tensor(
    proto: onnx.TensorProto, dims: Sequence[int], described: Notes, where: str
) -> ir.StringTensor:
    count, expected = len(proto.string_data), _count(dims)
    if count != expected or proto.HasField("raw_data"):
        raise ModelError(
            f"{where}: dims {list(dims)} promise {expected} strings in string_data, there are {count}; "
            "the file is corrupt"
        )
    return ir.StringTensor(
        list(proto.string_data),
        shape=ir.Shape(dims),
        name=described.name,
        doc_string=described.doc_string,
        metadata_props=described.metadata_props,
    )


def _untyped_tensor(proto: onnx.TensorProto, where: str) -> ir.TensorProtocol:
    """An attribute's empty tensor: kept as it is, there is nothing to read."""
    if proto.dims or proto.HasField("raw_data"):
        raise ModelError(
            f"{where}: has data but no data type; the file is corrupt, export it again"
        )
    copy = onnx.TensorProto()
    copy.CopyFrom(proto)
    return ir.serde.TensorProtoTensor(copy)
