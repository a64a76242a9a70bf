"""Nodes that only give codes another place, or choose among them: one scale and zero point before and after.

ONNX Runtime takes the pair away on either side of most of them.  Of the rest it does not, though it has kernels for
bytes: these read the codes, and what they make is decoded behind them.

Before:  y = Pad(x, pads)
After:   y = DQ(Pad(Q(x), pads, zero point))

Source: ONNX Runtime 1.31.1, qdq_selector_action_transformer.cc and kernel tables; each tried at opsets 10 to 25.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir import operators, values

_BY_PAIRS = {
    **dict.fromkeys(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice"), 1),
    **dict.fromkeys(("Split", "Gather", "Expand", "Tile"), 1),
    "Resize": 10,
    "GatherElements": 11,
    "DepthToSpace": 11,
    **dict.fromkeys(("MaxPool", "ReduceMax", "ReduceMin"), 12),
}
_ON_CODES = {"SpaceToDepth": 1, "Pad": 11}
_SINCE = _BY_PAIRS | _ON_CODES
"""The opset from which on there is a kernel for bytes."""

MOVES = frozenset(_SINCE)


def is_move(node: ir.Node, opset: int) -> bool:
    """Whether each element that a node makes is one that it reads, or zero, and a kernel does that with bytes."""
    if node.domain or opset < _SINCE.get(node.op_type, opset + 1):
        return False
    if node.op_type == "Resize":
        # Beyond the edges, tf_crop_and_resize writes a number that is no code.
        how = operators.attribute(node, "coordinate_transformation_mode", "half_pixel")
        nearest = operators.attribute(node, "mode", "nearest") == "nearest"
        return nearest and how != "tf_crop_and_resize"
    if node.op_type == "Pad":
        return not _writes_constant(node) or _filling(node) == 0
    return len(node.outputs) == 1 or node.op_type == "Split"


def reads_codes(node: ir.Node) -> bool:
    """Whether a moving node has to read codes, because the runtime leaves it in float between DQ and Q."""
    unread = [v for v in node.outputs if not v.uses() and not v.is_graph_output()]
    return node.op_type in _ON_CODES or (node.op_type == "Split" and bool(unread))


def point_at(node: ir.Node, codes: ir.Value, zero: ir.Value) -> None:
    """Makes a node read codes; what a Pad writes is the code of zero, of their type also where none is written."""
    node.replace_input_with(0, codes)
    given = len(node.inputs) > _FILLING and node.inputs[_FILLING] is not None
    if node.op_type == "Pad" and (given or _writes_constant(node)):
        node.resize_inputs(max(len(node.inputs), _FILLING + 1))
        node.replace_input_with(_FILLING, zero)


_FILLING = 2


def _writes_constant(node: ir.Node) -> bool:
    return bool(operators.attribute(node, "mode", "constant") == "constant")


def _filling(node: ir.Node) -> float | None:
    """What a Pad writes, or None where a feed decides."""
    value = node.inputs[_FILLING] if len(node.inputs) > _FILLING else None
    found = 0.0 if value is None else values.scalar(value)
    return None if found is None else float(found)
