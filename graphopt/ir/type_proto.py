"""TypeProto and ValueInfoProto <-> the type, shape and notes of a value."""

from __future__ import annotations

import dataclasses

import onnx
import onnx_ir as ir

from graphopt.ir.notes import name, props, prose, write_props


@dataclasses.dataclass(unsafe_hash=True)
class ForeignType:
    """A type that onnx_ir has no class for (map, opaque, a newer dtype): carried, never looked into.

    Attributes:
        proto: the serialised TypeProto.
        denotation: as in any type; it is in `proto` too.
        elem_type: none that onnx_ir knows.
        dtype: none that onnx_ir knows.
    """

    proto: bytes
    denotation: str | None = None
    elem_type: ir.TypeProtocol | ir.DataType = ir.DataType.UNDEFINED
    dtype: ir.DataType = ir.DataType.UNDEFINED


def read_type(proto: onnx.TypeProto) -> ir.TypeAndShape:
    """The type and the (leaf) shape; both None where the proto says nothing."""
    if not _representable(proto):
        return ir.TypeAndShape(
            ForeignType(proto.SerializeToString(), name(proto.denotation) or None), None
        )
    kind = proto.WhichOneof("value")
    if kind is None:
        return ir.TypeAndShape(None, None)
    denotation = name(proto.denotation) or None
    if kind in ("sequence_type", "optional_type"):
        inner = read_type(getattr(proto, kind).elem_type)
        assert inner.type is not None
        outer = ir.SequenceType if kind == "sequence_type" else ir.OptionalType
        return ir.TypeAndShape(outer(inner.type, denotation=denotation), inner.shape)
    tensor = getattr(proto, kind)
    cls = ir.TensorType if kind == "tensor_type" else ir.SparseTensorType
    shape = _read_shape(tensor.shape) if tensor.HasField("shape") else None
    return ir.TypeAndShape(cls(ir.DataType(tensor.elem_type), denotation=denotation), shape)


def _read_shape(proto: onnx.TensorShapeProto) -> ir.Shape:
    dims = [
        dim.dim_value
        if dim.HasField("dim_value")
        else name(dim.dim_param)
        if dim.HasField("dim_param")
        else None
        for dim in proto.dim
    ]
    return ir.Shape(
        dims, denotations=[name(dim.denotation) or None for dim in proto.dim], frozen=True
    )


def _representable(proto: onnx.TypeProto) -> bool:
    kind = proto.WhichOneof("value")
    if kind is None:
        return not proto.denotation
    if kind in ("sequence_type", "optional_type"):
        inner = getattr(proto, kind).elem_type
        return inner.WhichOneof("value") is not None and _representable(inner)
    return (
        kind in ("tensor_type", "sparse_tensor_type") and getattr(proto, kind).elem_type in _KNOWN
    )


_KNOWN = frozenset(int(dtype) for dtype in ir.DataType)


def write_type(proto: onnx.TypeProto, known: ir.TypeAndShape) -> None:
    """Fills `proto`; a shape without a type cannot be written."""
    if isinstance(known.type, ForeignType):
        proto.MergeFromString(known.type.proto)
    elif known.type is not None:
        ir.serde.serialize_type_into(proto, known.type)
        if known.shape is not None:
            ir.serde.serialize_shape_into(proto, known.shape)


def read_value_info(proto: onnx.ValueInfoProto, value: ir.Value) -> None:
    """Fills in what the proto says; what it leaves out stays as known before."""
    known = read_type(proto.type)
    if known.type is not None:
        value.type = known.type
    if known.shape is not None:
        value.shape = known.shape
    if proto.doc_string:
        value.doc_string = prose(proto.doc_string)
    if proto.metadata_props:
        value.metadata_props.update(props(proto) or {})


def write_value_info(value: ir.Value, alias: str | None = None) -> onnx.ValueInfoProto:
    """The ValueInfoProto of a value, under its own or the given name."""
    proto = onnx.ValueInfoProto(name=alias or value.name)
    write_type(proto.type, ir.TypeAndShape(value.type, value.shape))
    if not proto.type.ByteSize():
        proto.ClearField("type")
    if value.doc_string:
        proto.doc_string = value.doc_string
    write_props(proto, value.metadata_props)
    return proto


def says_something(value: ir.Value) -> bool:
    """Whether a value_info for this value would carry anything."""
    return bool(value.name) and bool(
        value.type is not None
        or value.shape is not None
        or value.doc_string
        or value.metadata_props
    )
