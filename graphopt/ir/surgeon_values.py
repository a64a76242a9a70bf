"""What onnx_graphsurgeon says about values, and what we say: weights, element types, shapes.

A weight enters a graphsurgeon graph as `SharedValues`: a reference to the tensor, wherever its bytes lie.  Its data are
read only when a script asks for `.values`, or when graphsurgeon itself exports the graph (as `fold_constants` does).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from graphopt.errors import ModelError
from graphopt.ir.sparse import CooTensor
from graphopt.ir.tensor_proto import TensorReader

SurgeonType: TypeAlias = np.dtype[Any] | int | None

# What graphsurgeon 0.6 keeps as a number of TensorProto.DataType, because its NumPy table has no entry for them.
_NUMBERED = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
    }
)
_KINDS: Mapping[str, Callable[[ir.DataType], ir.TypeProtocol]] = {
    "tensor_type": ir.TensorType,
    "sequence_type": lambda elem: ir.SequenceType(ir.TensorType(elem)),
    "sparse_tensor_type": ir.SparseTensorType,
}

PLAIN = (
    ir.AttributeType.INT,
    ir.AttributeType.FLOAT,
    ir.AttributeType.STRING,
    ir.AttributeType.INTS,
    ir.AttributeType.FLOATS,
    ir.AttributeType.STRINGS,
)
"""Attributes that are Python numbers, texts, or lists of them."""


class SharedValues(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """The values of a `gs.Constant` that are a tensor of ours, not a copy of it."""

    def __init__(self, source: ir.TensorProtocol) -> None:
        self.source = source
        self.shape = [int(dim) for dim in source.shape.numpy()]
        self.dtype = surgeon_dtype(source.dtype)
        self.nbytes = source.nbytes

    @property
    def tensor(self) -> onnx.TensorProto:
        """The tensor with its data, for graphsurgeon's own export."""
        return ir.to_proto(self.source)

    def load(self) -> np.ndarray[Any, Any]:
        """A copy that the script may write to; strings as `str`, as graphsurgeon has them."""
        return _writable(self.source)


class SharedSparseValues(SparseValues):  # type: ignore[misc]
    """As `SharedValues`, for a tensor that is kept sparse."""

    def __init__(self, source: CooTensor, name: str) -> None:
        self.source = source
        self.name = name
        self.shape = [int(dim) for dim in source.shape.numpy()]
        self.dtype = surgeon_dtype(source.dtype)
        self.nbytes = source.nbytes

    @property
    def tensor(self) -> onnx.SparseTensorProto:
        """The sparse tensor with its data, for graphsurgeon's own export."""
        proto = onnx.SparseTensorProto(dims=self.shape)
        proto.values.CopyFrom(ir.to_proto(self.source.values))
        proto.values.name = self.name
        proto.indices.CopyFrom(ir.to_proto(self.source.indices))
        return proto

    def load(self) -> np.ndarray[Any, Any]:
        """A dense copy that the script may write to."""
        return _writable(self.source)


def _writable(source: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    data = source.numpy()
    if source.dtype == ir.DataType.STRING:
        texts = [text.decode() for text in data.reshape(-1)]
        return np.asarray(texts, dtype=object).reshape(data.shape)
    return np.array(data)


def share(tensor: ir.TensorProtocol, name: str) -> gs.Constant:
    """A graphsurgeon constant over `tensor`; nothing is read."""
    if isinstance(tensor, CooTensor):
        return gs.Constant(name, SharedSparseValues(tensor, name))
    return gs.Constant(name, SharedValues(tensor))


def shared_source(constant: gs.Constant) -> ir.TensorProtocol | None:
    """The tensor behind a constant whose values nobody has read or set, or None."""
    held = constant._values  # noqa: SLF001  `.values` would read the data
    return held.source if isinstance(held, SharedValues | SharedSparseValues) else None


def tensor_of(constant: gs.Constant, like: ir.TensorProtocol | None) -> ir.TensorProtocol:
    """The tensor of a constant: what it shares, else `like` where the data are the same, else its own array.

    Raises:
        ModelError: graphsurgeon cannot say what the values are.
    """
    source = shared_source(constant)
    if source is not None:
        return source
    held = constant._values  # noqa: SLF001
    if isinstance(held, SparseValues):
        return TensorReader().sparse_tensor(held.tensor, "graphsurgeon graph")
    if isinstance(held, LazyValues):
        return TensorReader().tensor(held.tensor, "graphsurgeon graph")
    if not isinstance(held, np.ndarray):
        raise ModelError(
            f"graphsurgeon constant {constant.name!r} holds a {type(held).__name__}, not a NumPy array; set "
            ".values to an array"
        )
    made = _from_array(constant, held)
    return like if like is not None and _same(made, like) else made


def _from_array(constant: gs.Constant, array: np.ndarray[Any, Any]) -> ir.TensorProtocol:
    if array.dtype.kind in "OUS":
        texts = [t if isinstance(t, bytes) else str(t).encode() for t in array.reshape(-1)]
        return ir.StringTensor(texts, shape=ir.Shape(array.shape), name=constant.name)
    where = f"graphsurgeon constant {constant.name!r}"
    wanted = data_type(constant._export_dtype, where)  # noqa: SLF001
    if wanted is not None and wanted != data_type(array.dtype, where):
        array = array.astype(wanted.numpy())
    return ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=constant.name)


def _same(made: ir.TensorProtocol, like: ir.TensorProtocol) -> bool:
    """Whether two tensors hold the same bits: a script that only read a weight must not un-map it."""
    if made.dtype != like.dtype or made.shape.numpy() != like.shape.numpy():
        return False
    if made.dtype == ir.DataType.STRING:
        return bool((made.numpy() == like.numpy()).all())
    mine, other = (np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8) for t in (made, like))
    return bool(np.array_equal(mine, other))


def surgeon_dtype(dtype: ir.DataType | None) -> SurgeonType:
    """The element type as graphsurgeon's importer writes it: a NumPy dtype, or an ONNX number."""
    if dtype is None or dtype == ir.DataType.UNDEFINED:
        return None
    return int(dtype) if dtype in _NUMBERED else dtype.numpy()


def data_type(dtype: object, where: str) -> ir.DataType | None:
    """The element type that a graphsurgeon dtype (NumPy type, ONNX number or None) means.

    Raises:
        ModelError: ONNX has no such type.
    """
    if dtype is None:
        return None
    try:
        if isinstance(dtype, int | np.integer):
            return ir.DataType(int(dtype))
        found: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]  # whatever a script has set
        return ir.DataType.STRING if found.kind in "OUS" else ir.DataType.from_numpy(found)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{where}: dtype {dtype!r} is none that ONNX has; set a NumPy dtype"
        ) from error


@dataclasses.dataclass(frozen=True)
class Description:
    """What graphsurgeon can say about a value.

    Attributes:
        dtype: the element type, or None.
        shape: dims as numbers, names, or None for unknown ones; None for unknown rank.
        kind: the field of TypeProto.
    """

    dtype: ir.DataType | None
    shape: tuple[int | str | None, ...] | None
    kind: str

    @classmethod
    def of_value(cls, value: ir.Value) -> Description:
        """What can be said about a value of ours; nothing about types that graphsurgeon lacks."""
        shape = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)
        kind = value.type
        match kind:
            case ir.TensorType():
                return cls(_known(kind.dtype), shape, "tensor_type")
            case ir.SequenceType(elem_type=ir.TensorType()):
                return cls(_known(kind.elem_type.dtype), shape, "sequence_type")
            case ir.SparseTensorType():
                return cls(_known(kind.dtype), shape, "sparse_tensor_type")
            case None:
                return cls(None, shape, "tensor_type")
        return cls(None, None, "optional_type")

    @classmethod
    def of_tensor(cls, tensor: gs.Tensor) -> Description:
        """What a graphsurgeon tensor says.

        Raises:
            ModelError: its dtype is none of ONNX.
        """
        dtype = data_type(tensor.dtype, f"graphsurgeon tensor {tensor.name!r}")
        shape = None if tensor.shape is None else tuple(_dim(dim) for dim in tensor.shape)
        return cls(dtype, shape, getattr(tensor, "type", None) or "tensor_type")

    def variable(self, name: str) -> gs.Variable:
        """A graphsurgeon variable of this description."""
        shape = None if self.shape is None else list(self.shape)
        return gs.Variable(name, surgeon_dtype(self.dtype), shape, self.kind)

    def describe(self, value: ir.Value) -> None:
        """Sets type and shape of `value`."""
        make = _KINDS.get(self.kind)
        if make is not None and self.dtype is not None:
            value.type = make(self.dtype)
        if self.shape is not None:
            value.shape = ir.Shape(self.shape)


def _known(dtype: ir.DataType) -> ir.DataType | None:
    return None if dtype == ir.DataType.UNDEFINED else dtype


def _dim(dim: object) -> int | str | None:
    """A dim as a number, a name, or None where it is unknown: -1 means that to graphsurgeon, and in faulty exports."""
    if isinstance(dim, ir.SymbolicDim):
        dim = dim.value
    if dim is None or isinstance(dim, str):
        return dim or None
    number = int(dim)  # type: ignore[call-overload]  # a number of any kind
    return None if number < 0 else number
