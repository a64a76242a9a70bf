"""What goes into and comes out of a model: names, dtypes, shapes and kinds, as frozen facts."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

Dim: TypeAlias = "int | str | None"


class Kind(enum.Enum):
    """The outermost type of an input or output, as far as feeding it is concerned."""

    TENSOR = "tensor"
    SEQUENCE = "sequence"
    OPTIONAL_TENSOR = "optional tensor"
    OPTIONAL_SEQUENCE = "optional sequence"
    MAP = "map"
    SEQUENCE_OF_MAPS = "sequence of maps"
    OPAQUE = "opaque"

    @property
    def optional(self) -> bool:
        """Whether None may be fed."""
        return self in (Kind.OPTIONAL_TENSOR, Kind.OPTIONAL_SEQUENCE)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: the name in the graph.
        dtype: of the elements; of the values for a map; UNDEFINED where unknown.
        shape: of the tensor, or of each element of a sequence; None where the rank is unknown.
            A dimension is an integer, a symbol, or None.
        kind: what surrounds the tensor.
        key: of a map: INT64 or STRING.
        overridable: an initializer that a feed may replace; it need not be fed.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[Dim, ...] | None
    kind: Kind = Kind.TENSOR
    key: ir.DataType | None = None
    overridable: bool = False

    def __str__(self) -> str:
        dims = (
            "?"
            if self.shape is None
            else ",".join("?" if d is None else str(d) for d in self.shape)
        )
        prefix = "" if self.kind is Kind.TENSOR else f"{self.kind.value} of "
        return f"{prefix}{dtype_name(self.dtype)}[{dims}]"


_ORT_DTYPES = {
    "float": ir.DataType.FLOAT,
    "double": ir.DataType.DOUBLE,
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float8e4m3fnuz": ir.DataType.FLOAT8E4M3FNUZ,
    "float8e5m2": ir.DataType.FLOAT8E5M2,
    "float8e5m2fnuz": ir.DataType.FLOAT8E5M2FNUZ,
}


def dtype_name(dtype: ir.DataType) -> str:
    """The dtype as ONNX text writes it, in lower case."""
    return dtype.name.lower()


def parse_runtime_type(text: str) -> tuple[Kind, ir.DataType, ir.DataType | None]:
    """The kind, the element dtype and the key dtype of a type as ONNX Runtime prints it.

    Forms seen in 1.31: `tensor(float)`, `seq(tensor(float))`, `optional(seq(tensor(float)))`,
    `map(int64,tensor(float))`, `seq(map(string,tensor(float)))`, `sparse_tensor(float)`.
    """
    if match := re.fullmatch(r"(seq\()?map\((\w+),tensor\((\w+)\)\)+", text):
        kind = Kind.SEQUENCE_OF_MAPS if match[1] else Kind.MAP
        return kind, _runtime_dtype(match[3]), _runtime_dtype(match[2])
    if match := re.fullmatch(r"(optional\()?(seq\()?tensor\((\w+)\)+", text):
        kinds = {
            (False, False): Kind.TENSOR,
            (False, True): Kind.SEQUENCE,
            (True, False): Kind.OPTIONAL_TENSOR,
            (True, True): Kind.OPTIONAL_SEQUENCE,
        }
        return kinds[match[1] is not None, match[2] is not None], _runtime_dtype(match[3]), None
    return Kind.OPAQUE, ir.DataType.UNDEFINED, None


def _runtime_dtype(word: str) -> ir.DataType:
    if word in _ORT_DTYPES:
        return _ORT_DTYPES[word]
    return ir.DataType.__members__.get(word.upper(), ir.DataType.UNDEFINED)


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """What can be fed to a model, in order; initializers that are also inputs are `overridable`.

    Before IR version 4 every initializer is an input and none can be overridden (ONNX Runtime
    refuses a feed for it), so those are left out.
    """
    graph = model.graph
    specs = [(value, spec_of(value)) for value in graph.inputs]
    keep_defaults = model.ir_version >= 4
    return tuple(
        dataclasses.replace(spec, overridable=value.is_initializer())
        for value, spec in specs
        if keep_defaults or not value.is_initializer()
    )


def output_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """What a model returns, in order."""
    return tuple(spec_of(value) for value in model.graph.outputs)


def spec_of(value: ir.Value) -> TensorSpec:
    """The facts that the graph states about one value."""
    kind = _kind(value.type)
    dtype = value.dtype if value.dtype is not None else ir.DataType.UNDEFINED
    shape = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)
    return TensorSpec(value.name or "", dtype, shape, kind)


def _kind(kind: ir.TypeProtocol | None) -> Kind:
    if isinstance(kind, ir.SequenceType):
        return Kind.SEQUENCE if isinstance(kind.elem_type, ir.TensorType) else Kind.OPAQUE
    if isinstance(kind, ir.OptionalType):
        inner = isinstance(kind.elem_type, ir.SequenceType)
        return Kind.OPTIONAL_SEQUENCE if inner else Kind.OPTIONAL_TENSOR
    if kind is None or isinstance(kind, ir.TensorType):
        return Kind.TENSOR
    return Kind.OPAQUE


def _dim(dim: int | ir.SymbolicDim) -> Dim:
    if isinstance(dim, int):
        # Exporters of old wrote -1 for a dimension that is free.
        return dim if dim >= 0 else None
    return dim.value


def name_list(specs: Sequence[TensorSpec]) -> str:
    """The names of some inputs or outputs for a message, at most twelve."""
    shown = ", ".join(repr(spec.name) for spec in specs[:12])
    return shown + (f" and {len(specs) - 12} more" if len(specs) > 12 else "") if specs else "none"
