"""If, Loop and Scan over bodies that are functions of tensors; importing this imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from graphopt.distill.operators import Call, Tensor

Body: TypeAlias = Callable[[Sequence[Tensor]], "tuple[Tensor, ...]"]
"""A graph within the graph: from its inputs to its outputs."""

Controlled: TypeAlias = Callable[[Call, Mapping[str, Body]], "tuple[Tensor, ...]"]


def _if(call: Call, bodies: Mapping[str, Body]) -> tuple[Tensor, ...]:
    return bodies["then_branch" if bool(call.x) else "else_branch"](())


def _loop(call: Call, bodies: Mapping[str, Body]) -> tuple[Tensor, ...]:
    trips, go = call.at(0), call.at(1)
    carried = tuple(call.inputs[2:])
    go = torch.tensor(True) if go is None else go
    rows: list[tuple[Tensor, ...]] = []
    while bool(go) and (trips is None or len(rows) < int(trips)):
        go, *made = bodies["body"]((torch.tensor(len(rows)), go, *carried))
        carried = tuple(made[: len(carried)])
        rows.append(tuple(made[len(carried) :]))
    return (*carried, *_stacked(rows, call.outputs - len(carried)))


def _stacked(rows: Sequence[tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
    if not rows and count > 0:
        raise NotImplementedError("rows of a loop that makes no turn")
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _scan(call: Call, bodies: Mapping[str, Body]) -> tuple[Tensor, ...]:
    if call.opset < 9:
        raise NotImplementedError("Scan of opset 8")
    count = call.attributes["num_scan_inputs"]
    state, given = call.inputs[: len(call.inputs) - count], call.inputs[-count:]
    axes = call.get("scan_input_axes", [0] * count)
    turned = call.get("scan_input_directions", [0] * count)
    moved = [
        each.movedim(axis, 0).flip(0) if back else each.movedim(axis, 0)
        for each, axis, back in zip(given, axes, turned, strict=True)
        if each is not None
    ]
    rows: list[tuple[Tensor, ...]] = []
    for slices in zip(*moved, strict=True):
        made = bodies["body"]((*state, *slices))
        state = made[: len(state)]
        rows.append(made[len(state) :])
    outs = _stacked(rows, call.outputs - len(state))
    axes = call.get("scan_output_axes", [0] * len(outs))
    turned = call.get("scan_output_directions", [0] * len(outs))
    placed = (
        (each.flip(0) if back else each).movedim(0, axis)
        for each, axis, back in zip(outs, axes, turned, strict=True)
    )
    return (*state, *placed)


CONTROL: Mapping[str, Controlled] = {"If": _if, "Loop": _loop, "Scan": _scan}
"""By type."""
