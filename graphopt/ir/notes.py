"""What messages carry besides their meaning, and where the IR keeps what it has no place for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import onnx

TRAINING_INFO = "graphopt.training_info"  # Model.meta: tuple of serialised TrainingInfoProto
STRAY_VALUE_INFO = (
    "graphopt.stray_value_info"  # Graph.meta: ValueInfoProtos, serialised, of names it lacks
)
STRAY_ANNOTATIONS = (
    "graphopt.stray_annotations"  # Graph.meta: TensorAnnotations, serialised, of names it lacks
)
OWN_VALUE_INFO = (
    "graphopt.own_value_info"  # Graph.meta of a function: its value_info stood in the function
)
DECLARED = "graphopt.declared"  # Value.meta of an initializer: it had a value_info
QUANTIZATION = (
    "quant_parameter_tensor_names"  # Value.meta: onnx_ir's own key for the annotation of a value
)

FUNCTION_VALUE_INFO_IR = (
    10  # before, exporters put it into the main graph, as `domain::function/value`
)

Documented: TypeAlias = (
    onnx.ModelProto
    | onnx.GraphProto
    | onnx.NodeProto
    | onnx.FunctionProto
    | onnx.TensorProto
    | onnx.AttributeProto
)
Annotated: TypeAlias = (
    onnx.ModelProto
    | onnx.GraphProto
    | onnx.NodeProto
    | onnx.FunctionProto
    | onnx.TensorProto
    | onnx.ValueInfoProto
)


def text(proto: Documented, field: str) -> str | None:
    """A string field, or None where the proto does not have it."""
    return prose(getattr(proto, field)) if proto.HasField(field) else None


def name(found: str | bytes) -> str:
    """A name; protobuf gives bytes for what is not UTF-8.

    Raises:
        UnicodeDecodeError: it is not.
    """
    return found.decode("utf-8") if isinstance(found, bytes) else found


def prose(found: str | bytes) -> str:
    """Text for people, with marks in place of what is not UTF-8: no reason to refuse a model."""
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else found


def props(proto: Annotated) -> dict[str, str] | None:
    """The metadata, or None where there are none."""
    return {prose(p.key): prose(p.value) for p in proto.metadata_props} or None


def write_props(proto: Annotated, metadata: Mapping[str, str]) -> None:
    """Adds metadata, sorted: the same model gives the same bytes."""
    for key in sorted(metadata):
        proto.metadata_props.add(key=key, value=metadata[key])


def opsets(protos: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Opset imports by domain; of two for one domain the last counts, as in ONNX Runtime."""
    return {canonical_domain(name(proto.domain)): proto.version for proto in protos}


def canonical_domain(domain: str) -> str:
    """The domain as the IR writes it: ONNX's own is the empty one."""
    return "" if domain == "ai.onnx" else domain


def read_string(data: bytes) -> str | bytes:
    """Text, or the bytes where an exporter stored something else in a string attribute."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data
