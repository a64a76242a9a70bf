"""The size of numbers that a model is made for, as its constants tell it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt_passes.precision.flow import MOVEMENT
from graphopt_passes.precision.legality import is_float

_UNITS = (8.0, 1e6)
"""From which size on an input is another than generated ones, and beyond which a constant is no unit."""


def units(model: ir.Model) -> dict[str, float]:
    """The size that float inputs of the model are made for, by name, where constants that they meet first tell it.

    Who divides an input by 50000, or takes 30000 from it, expects numbers of that size.
    """
    found: dict[str, float] = {}
    for value in model.graph.inputs:
        if value.dtype != ir.DataType.FLOAT or value.is_initializer():
            continue
        size = max((_unit(reader) for reader in _first_readers(value)), default=0.0)
        if _UNITS[0] <= size <= _UNITS[1]:
            found[value.name or ""] = size
    return found


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Who computes with elements of an input first, as which operand, and behind which layer."""

    node: ir.Node
    place: int
    layer: ir.Node | None = None


def _first_readers(value: ir.Value) -> list[_Reader]:
    """Readers of the value, moved perhaps, and those behind one layer."""
    found, pending = list[_Reader](), list[tuple[ir.Value, ir.Node | None]]([(value, None)])
    while pending:
        current, layer = pending.pop()
        for use in current.uses():
            moves = use.node.op_type in MOVEMENT and not use.node.domain
            if not moves:
                found.append(_Reader(use.node, use.idx, layer))
            if moves or (layer is None and _is_layer(use.node, use.idx)):
                pending += [(made, layer if moves else use.node) for made in use.node.outputs]
    return found


def _is_layer(node: ir.Node, place: int) -> bool:
    """Whether a node multiplies an operand by constant weights."""
    linear = not node.domain and node.op_type in _LAYERS and place == 0
    return linear and is_float(node.inputs[1]) and values.is_constant(node.inputs[1])


def _gain(layer: ir.Node) -> float:
    """How much larger a layer makes numbers."""
    array = values.array(layer.inputs[1])
    if array is None or not array.size:
        return 0.0
    columns = max(array.shape[-1 if layer.op_type == "MatMul" else 0], 1)
    return math.sqrt(float(np.vdot(array, array)) / columns)  # no copy: a weight may be large


_LAYERS = ("MatMul", "Gemm", "Conv")
_OF_A_LAYER = 1e3
"""From which size on a constant behind a layer tells of what goes in: less is part of the arithmetic."""


def _unit(reader: _Reader) -> float:
    """The size of an operand that constants tell; 0 for none."""
    node = reader.node
    if reader.layer is not None:
        size = _unit_beside(node, reader.place) if node.op_type in ("Mul", "Div") else 0.0
        gain = _gain(reader.layer) if size else 0.0
        return size / gain if gain and size / gain >= _OF_A_LAYER else 0.0
    if node.op_type == "BatchNormalization" and not node.domain:
        sizes = [values.array(node.inputs[index]) for index in (3, 4)]
        mean, variance = (0.0 if a is None else float(np.abs(a).max(initial=0)) for a in sizes)
        return max(mean, math.sqrt(variance))
    return _unit_beside(node, reader.place)


def _unit_beside(node: ir.Node, place: int) -> float:
    if node.domain or node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return 0.0
    array = values.array(node.inputs[1 - place])
    if array is None or not array.size or array.dtype.kind != "f":
        return 0.0
    size = float(np.abs(array).max())
    if node.op_type == "Mul":
        return 1 / size if size else 0.0
    return 0.0 if node.op_type == "Div" and place == 1 else size
