"""Sizes that a model states without naming them: the free dimension of an input that meets a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from graphopt.ir import operators
from graphopt.verify.roles import shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

Place: TypeAlias = "tuple[str, int]"
"""An input and one of its axes, counted from 0."""

_KEEPS_SHAPE = frozenset({"Cast", "Dropout", "Identity"})


def stated_sizes(model: ir.Model) -> dict[Place, int]:
    """Sizes of free dimensions that the first operators behind an input leave no choice about."""
    found: dict[Place, int] = {}
    for source in model.graph.inputs:
        if source.shape is None or source.is_initializer() or source.shape.is_static():
            continue
        for axis, size in _demands(source, len(source.shape)):
            found.setdefault((source.name or "", axis), size)
    return found


def _demands(source: ir.Value, rank: int) -> Iterator[tuple[int, int]]:
    queue = [source]
    for value in queue:
        for node, index in value.uses():
            for axis, size in _demanded(node, index):
                if size > 0 and -rank <= axis < rank:
                    yield axis % rank, size
            keeps = node.op_type in _KEEPS_SHAPE or operators.is_elementwise_unary(node)
            if keeps and index == 0 and len(queue) < 32:
                queue.append(node.outputs[0])


def _demanded(node: ir.Node, index: int) -> Iterator[tuple[int, int]]:
    """(axis, size) that a node demands of its input, negative axes counted from the end."""
    if node.op_type == "MatMul":
        yield (-1, _size(node, 1, -2)) if index == 0 else (-2, _size(node, 0, -1))
    elif node.op_type == "Gemm" and index < 2:
        ours, theirs = ("transA", "transB") if index == 0 else ("transB", "transA")
        inner = 1 - index  # of A the columns meet, of B the rows
        axis = inner ^ int(bool(operators.attribute(node, ours, 0)))
        other = (1 - inner) ^ int(bool(operators.attribute(node, theirs, 0)))
        yield axis, _size(node, 1 - index, other)
    elif index:
        return
    elif node.op_type == "Conv":
        yield 1, _size(node, 1, 1) * operators.attribute(node, "group", 1)
    elif node.op_type == "ConvTranspose":
        yield 1, _size(node, 1, 0)
    elif node.op_type in {"GRU", "LSTM", "RNN"}:
        yield 2, _size(node, 1, 2)
    elif node.op_type in {"BatchNormalization", "InstanceNormalization", "PRelu"}:
        yield 1, _size(node, 1, 0)
    elif node.op_type in {
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
    }:
        yield -1, _size(node, 2 if node.op_type.startswith("Skip") else 1, -1)


def _size(node: ir.Node, index: int, axis: int) -> int:
    """The size of an axis of another input, or 0 where it is not known."""
    shape = shape_of(node.inputs[index]) if index < len(node.inputs) else None
    if shape is None:
        return 0
    if len(shape) == 1 and axis == -2:
        axis = 0  # a vector stands for a column
    size = shape[axis] if -len(shape) <= axis < len(shape) else 0
    return size if isinstance(size, int) else 0
