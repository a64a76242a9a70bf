"""Slice, Pad and Resize, whose operands name axes: on a tensor whose axes are permuted, and how to say it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values

SPATIAL = frozenset({"Slice", "Pad", "Resize"})
Array: TypeAlias = npt.NDArray[Any]
Place: TypeAlias = Callable[[Array], ir.Value]

_FIRST = {"Slice": 10, "Pad": 11, "Resize": 11}
"""The first opset at which the operands are inputs as they are now."""
_AXES = {"Slice": 3, "Pad": 3}
"""Which input names the axes of the others."""


def can_permute(node: ir.Node, rank: int, opset: int) -> bool:
    """Whether a node's operands are constants that can be said of other axes."""
    if opset < _FIRST[node.op_type] or len(node.inputs) < 2:
        return False
    if node.op_type == "Slice":
        return _given(node, _AXES["Slice"]) is not None
    if node.op_type == "Pad":
        axes = node.inputs[3] if len(node.inputs) > 3 else None
        pads = _given(node, 1)
        return pads is not None and (
            pads.size == 2 * rank if axes is None else _given(node, 3) is not None
        )
    held = node.attributes.get("axes")
    whole = held is None or not held.is_ref()
    absent = len(node.inputs) < 2 or node.inputs[1] is None or _is_empty(node.inputs[1])
    return (
        whole
        and absent
        and all(
            v is None or _is_empty(v) or values.constant(v) is not None for v in node.inputs[2:]
        )
    )


def permute(node: ir.Node, perm: Sequence[int], place: Place) -> None:
    """Says a node's operands of the axes that they have before `Transpose(perm)`.

    Source: Slice-10, -11, -13, Pad-11, -13, -18, Resize-11, -13, -18.
    """
    index = _AXES.get(node.op_type)
    if index is not None and len(node.inputs) > index and node.inputs[index] is not None:
        axes = _given(node, index)
        assert axes is not None, "can_permute said so"
        node.replace_input_with(index, place(_moved(axes, perm)))
    elif node.op_type == "Pad":
        pads = _given(node, 1)
        assert pads is not None, "can_permute said so"
        node.replace_input_with(1, place(_in_order(pads.reshape(2, -1), perm).reshape(-1)))
    elif node.op_type == "Resize":
        _permute_resize(node, perm, place)


def _permute_resize(node: ir.Node, perm: Sequence[int], place: Place) -> None:
    """With the attribute `axes` (opset 18), those are renamed; without, scales or sizes stand in the other order."""
    held = node.attributes.get("axes")
    if held is not None:
        moved = _moved(np.asarray(held.as_ints()), perm)
        node.attributes["axes"] = ir.AttrInt64s("axes", moved.tolist())
        return
    for index in range(2, len(node.inputs)):
        data = _given(node, index)
        if data is not None and data.size:
            node.replace_input_with(index, place(_in_order(data[None, :], perm).reshape(-1)))


def _moved(axes: Array, perm: Sequence[int]) -> Array:
    return np.asarray([perm[int(axis)] for axis in axes.reshape(-1)], np.int64)


def _in_order(rows: Array, perm: Sequence[int]) -> Array:
    """Numbers per axis of the transposed tensor, per axis of the original."""
    back = [list(perm).index(axis) for axis in range(len(perm))]
    return np.ascontiguousarray(rows[:, back])


def _given(node: ir.Node, index: int) -> Array | None:
    return values.array(node.inputs[index]) if len(node.inputs) > index else None


def _is_empty(value: ir.Value | None) -> bool:
    data = values.array(value)
    return data is not None and data.size == 0
