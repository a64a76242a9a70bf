"""One scale for what a Concat joins: codes are joined as they are, and nothing is rounded anew.

Source: ONNX Runtime 1.31.1, qdq_selectors.cc (QLinearConcat takes other scales, and rescales); NVIDIA's guide to
explicit quantisation: Q behind a Concat is moved in front of it, and cancels what was decoded there if scales are one.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TypeAlias

import onnx_ir as ir

from graphopt.calibrate.formats import Parameters
from graphopt_passes.quantize.placement import Role, Site

Stored: TypeAlias = MutableMapping[ir.Value, Parameters]
"""How values are stored."""

VIEWS = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
"""What holds the same numbers before and behind."""


def unify_operands(sites: dict[ir.Node, Site], stored: Stored) -> None:
    """Operands of a Concat take its scale where nobody else reads them and no Relu hangs on their zero point."""
    for site in sites.values():
        if site.role is not Role.CONCAT:
            continue
        shared = stored[site.result]
        first = shared.format.codes[0]
        for index in site.activations:
            value = site.node.inputs[index]
            assert value is not None
            maker = next((s for s in sites.values() if s.result is value), None)
            if maker is None or maker.role is Role.MOVE or len(value.uses()) > 1:
                continue
            if stored[value].format.dtype is not shared.format.dtype:
                continue
            if maker.absorbed is None or shared.zero_point == first:
                stored[value] = shared


def unify_joined(graph: ir.Graph, stored: Stored) -> None:
    """What a Concat joins and its result take the widest scale among them, of values without zero points.

    Where only inputs of products are stored, a Concat lies in float between what its operands and its result are
    stored for: one scale lets the runtime join codes.
    """
    groups: dict[ir.Value, ir.Value] = {}
    for node in graph:
        if node.domain or node.op_type not in {"Concat", *VIEWS}:
            continue
        operands = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        for value in operands:
            if value is not None:
                groups[_first(groups, value)] = _first(groups, node.outputs[0])
    for members in _together(graph, groups, stored):
        widest = max((stored[value] for value in members), key=lambda each: float(each.scale))
        for value in members:
            if stored[value].format == widest.format:
                stored[value] = widest


def _together(
    graph: ir.Graph, groups: dict[ir.Value, ir.Value], stored: Stored
) -> Iterator[list[ir.Value]]:
    """Stored values of each group that a Concat is in."""
    joined = {
        _first(groups, node.outputs[0])
        for node in graph
        if node.op_type == "Concat" and not node.domain
    }
    found: dict[ir.Value, list[ir.Value]] = {}
    for value in stored:
        found.setdefault(_first(groups, value), []).append(value)
    return (members for group, members in found.items() if group in joined and len(members) > 1)


def _first(groups: dict[ir.Value, ir.Value], value: ir.Value) -> ir.Value:
    """What stands for the group of a value."""
    while value in groups and groups[value] is not value:
        value = groups[value]
    return value
