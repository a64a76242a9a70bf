"""Facts about a model that reports compare: nodes, operators, constants, opsets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.scopes import Census, all_graphs


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a report says of a model, before or after.

    Attributes:
        path: the file it was read from or written to; None for a model in memory.
        size_bytes: of that file and of the external data beside it; None for a model in memory.
        sha256: of that file alone; None for a model in memory.
        ir_version: of the ONNX file format.
        opsets: version of each imported operator domain, "" is ai.onnx.
        nodes: subgraphs and functions included.
        operators: how many nodes of each operator, most frequent first.
        parameters: elements of initializers and of `Constant` nodes.
        parameter_bytes: what they take as dense tensors.
    """

    path: str | None
    size_bytes: int | None
    sha256: str | None
    ir_version: int
    opsets: Mapping[str, int]
    nodes: int
    operators: Mapping[str, int]
    parameters: int
    parameter_bytes: int


def model_facts(
    model: ir.Model,
    path: Path | None = None,
    *,
    files: Sequence[Path] | None = None,
    with_hash: bool = True,
) -> ModelFacts:
    """The facts of a model.

    Args:
        model: the model.
        path: the file that holds it, if one does.
        files: that file and those with its external data; found through the tensors if None, which is right for a
            model that was read from `path`, not for one that was written to it and still maps what it came from.
        with_hash: whether to read the whole file for its hash.
    """
    operators = operator_counts(model)
    tensors = [tensor for _, tensor in stored_tensors(model)]
    in_file = path is not None and path.is_file()
    return ModelFacts(
        path=str(path) if path is not None else None,
        size_bytes=_size_bytes(files or _files(model, path)) if path and in_file else None,
        sha256=file_sha256(path) if path is not None and in_file and with_hash else None,
        ir_version=model.ir_version,
        opsets=dict(sorted(model.opset_imports.items())),
        nodes=sum(operators.values()),
        operators=operators,
        parameters=sum(tensor.size for tensor in tensors),
        parameter_bytes=sum(values.size_bytes(tensor) for tensor in tensors),
    )


def operator_name(node: ir.Node) -> str:
    """`Conv`, or `com.microsoft::Gelu` outside the standard domain."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def operator_counts(model: ir.Model) -> dict[str, int]:
    """Nodes of each operator, subgraphs and functions included, most frequent first."""
    counter: Counter[str] = Counter()
    for rows in Census(model).rows:
        for (op_type, domain), count in Counter([row[:2] for row in rows]).items():
            counter[f"{domain}::{op_type}" if domain else op_type] += count
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def stored_tensors(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Every initializer and every `Constant` node's tensor, with its value, in every graph.

    Initializers that a feed may override count: they are stored all the same.
    """
    for scope in all_graphs(model):
        for value in scope.graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
        for node in scope.graph:
            if node.op_type == "Constant" and not node.domain:
                tensor = values.constant(node.outputs[0])
                if tensor is not None:
                    yield node.outputs[0], tensor


def external_files(model: ir.Model, model_path: Path | None) -> dict[str, int]:
    """Files other than the model's own that hold its tensors, relative to its folder, and the bytes used of each.

    Small files, which loading reads whole instead of mapping them, are not known any more.
    """
    used: Counter[str] = Counter()
    folder = model_path.resolve().parent if model_path is not None else None
    for _, tensor in stored_tensors(model):
        file = external_file(tensor)
        if file is None or (model_path is not None and file == model_path.resolve()):
            continue
        within = folder is not None and file.is_relative_to(folder)
        used[str(file.relative_to(folder) if within and folder is not None else file)] += (
            tensor.nbytes
        )
    return dict(sorted(used.items()))


def external_file(tensor: ir.TensorProtocol) -> Path | None:
    """The file that a tensor is mapped from, links followed; None for one in memory."""
    if isinstance(tensor, MappedTensor):
        return tensor.mapping[0].path.resolve() if tensor.mapping is not None else None
    return Path(tensor.path).resolve() if isinstance(tensor, ir.ExternalTensor) else None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(model: ir.Model, path: Path) -> list[Path]:
    return [path, *(path.resolve().parent / file for file in external_files(model, path))]


def _size_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())
