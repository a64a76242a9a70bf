"""Makes values inside a model visible as outputs, without touching its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import (  # type: ignore[import-untyped, unused-ignore]
    DecodeError,
)

from graphopt.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence


def tap(model: Path | bytes, value_names: Sequence[str]) -> bytes:
    """The serialised model with the named values of its main graph as further outputs.

    External data stays where it is, so a model of any size can be tapped: run the result with
    `SessionOptions.external_folder` set to the folder of the file. Values that are outputs already
    are not added twice. An added output states no type; ONNX Runtime infers it.

    Raises:
        ModelError: the model cannot be parsed, or has no such value in its main graph.
    """
    proto = _parse(model)
    _refuse_unknown(proto, value_names, model)
    present = {value.name for value in proto.graph.output}
    for name in dict.fromkeys(value_names):
        if name not in present:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(proto.SerializeToString())


def only(model: Path | bytes, value_names: Sequence[str]) -> onnx.ModelProto:
    """The model with the named values as its outputs, in that order, and only the nodes they need.

    Raises:
        ModelError: as `tap`.
    """
    proto = _parse(model)
    _refuse_unknown(proto, value_names, model)
    keep_outputs(proto.graph, value_names)
    return proto


def _refuse_unknown(
    proto: onnx.ModelProto, value_names: Sequence[str], model: Path | bytes
) -> None:
    known = {output for node in proto.graph.node for output in node.output if output}
    known |= {value.name for value in proto.graph.input}
    known |= {tensor.name for tensor in proto.graph.initializer}
    for name in value_names:
        if name not in known:
            raise ModelError(
                f"{_where(model)} has no value '{name}' in its main graph '{proto.graph.name}'; "
                "only values outside If, Loop, Scan and functions can be made outputs."
            )


def keep_outputs(graph: onnx.GraphProto, value_names: Sequence[str]) -> None:
    """Makes the named values the outputs of a graph, in that order, and drops the nodes that nothing needs then."""
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(value_names))
    needed, kept = set(value_names), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node.SerializeToString())
            needed.update(_read_by(node))
    del graph.node[:]
    for data in reversed(kept):
        graph.node.add().ParseFromString(data)


def _read_by(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those of the graphs inside it among them."""
    found = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            found.update(value.name for value in graph.output)
            for inner in graph.node:
                found |= _read_by(inner)
    return found


def _parse(model: Path | bytes) -> onnx.ModelProto:
    try:
        data = model.read_bytes() if isinstance(model, Path) else model
        proto = onnx.ModelProto()
        proto.ParseFromString(data)
    except (OSError, DecodeError) as error:
        raise ModelError(f"{_where(model)} cannot be read as ONNX: {error}.") from error
    return proto


def _where(model: Path | bytes) -> str:
    return f"'{model}'" if isinstance(model, Path) else "the model in memory"
