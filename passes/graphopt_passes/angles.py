"""Reads angles that are written twice along the last axis, as exporters write them for rotary embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match
from graphopt_passes.constants import from_front, given_axes

MAX_DEPTH = 8
"""Nodes between the angles and where they are used: Cos, Cast, a scale, Unsqueeze, Gather and the like."""

_PER_ELEMENT = frozenset({"Cos", "Sin", "Cast", "Neg", "Identity"})


def single_angles(m: Match, g: Builder, value: ir.Value, *, pairs: bool) -> ir.Value | None:
    """One copy of angles that stand twice along the last axis of `value`; None where that is not known.

    Args:
        m: of the match, for shapes and attributes.
        g: takes what has to be computed anew.
        value: the angles, or what is computed of each.
        pairs: whether the copies are neighbours (each angle twice) or halves (all angles twice).
    """
    return _halved(m, g, value, MAX_DEPTH, pairs=pairs)


def _halved(
    m: Match, g: Builder, value: ir.Value, depth: int, *, pairs: bool = False
) -> ir.Value | None:
    """One copy of angles that stand twice along the last axis: halves, or neighbours; None where that is not known."""
    data = values.array(value)
    if data is not None:
        return _halved_table(g, data, pairs=pairs)
    node = value.producer()
    if node is None or node.domain or depth == 0:
        return None
    single = _single(m, g, node) if pairs else _doubled_by_concat(m, node)
    if single is not None or node.op_type == "Concat":
        return single
    inner = None
    if node.inputs and node.inputs[0] is not None and _keeps_last_axis(m, node):
        inner = _halved(m, g, node.inputs[0], depth - 1, pairs=pairs)
    if inner is not None:
        return g.op(node.op_type, inner, *node.inputs[1:], like=node)
    return _halved_scaled(m, g, node, depth, pairs=pairs)


def _doubled_by_concat(m: Match, node: ir.Node) -> ir.Value | None:
    if node.op_type != "Concat":
        return None
    dims = m.dims(node.outputs[0])
    twice = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    return node.inputs[0] if twice and dims and _ends(m, node, len(dims)) else None


def _single(m: Match, g: Builder, node: ir.Node) -> ir.Value | None:
    """The angles before each was written twice beside itself: by a Gather, or on a new last axis."""
    whole = m.dims(node.outputs[0])
    if whole is None or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Gather":
        place, dims = values.array(node.inputs[1]), m.dims(node.inputs[0])
        if place is None or not dims or dims[-1].value is None or not _ends(m, node, len(dims)):
            return None
        twice = np.arange(dims[-1].value).repeat(2)
        return node.inputs[0] if np.array_equal(place, twice) else None
    spread = node.inputs[0].producer() if node.op_type in ("Reshape", "Flatten") else None
    lift = None if spread is None or spread.inputs[0] is None else spread.inputs[0].producer()
    if spread is None or lift is None or spread.op_type not in ("Expand", "Tile", "Concat"):
        return None
    if spread.op_type == "Concat" and any(v is not spread.inputs[0] for v in spread.inputs):
        return None
    if lift.op_type not in ("Unsqueeze", "Reshape") or lift.inputs[0] is None:
        return None
    lifted, wide = m.dims(lift.outputs[0]), m.dims(spread.outputs[0])
    if not lifted or lifted[-1] != 1 or wide != (*lifted[:-1], Dim.of(2)):
        return None
    dims, more = lifted[:-1], len(whole) - len(lifted) + 1
    if more < 0 or not dims or whole != (*[Dim.of(1)] * more, *dims[:-1], dims[-1] * 2):
        return None
    single: ir.Value = lift.inputs[0]
    if m.dims(single) != dims:  # other axes were added with it, those of the heads
        single = g.op("Squeeze", lift.outputs[0], g.ints([len(dims)]))
    return g.op("Unsqueeze", single, g.ints([*range(more)])) if more else single


def _halved_scaled(
    m: Match, g: Builder, node: ir.Node, depth: int, *, pairs: bool
) -> ir.Value | None:
    """A product with one number, as of scaled rotary embeddings."""
    if node.op_type != "Mul":
        return None
    for index, factor in enumerate(node.inputs):
        tensor, other = values.constant(factor), node.inputs[1 - index]
        if tensor is None or tensor.size != 1 or other is None or factor is None:
            continue
        inner = _halved(m, g, other, depth - 1, pairs=pairs)
        return None if inner is None else g.op("Mul", inner, factor)
    return None


def _halved_table(g: Builder, data: npt.NDArray[Any], *, pairs: bool) -> ir.Value | None:
    width = data.shape[-1] if data.ndim else 1
    if width % 2:
        return None
    one, other = (
        (data[..., 0::2], data[..., 1::2])
        if pairs
        else (data[..., : width // 2], data[..., width // 2 :])
    )
    return g.const(np.ascontiguousarray(one), name="angles") if np.array_equal(one, other) else None


def _ends(m: Match, node: ir.Node, rank: int) -> bool:
    return int(m.attr(node, "axis", 0)) % rank == rank - 1


def _keeps_last_axis(m: Match, node: ir.Node) -> bool:
    """Whether a node does with each half of its first input, along the last axis, what it does with the whole."""
    if node.op_type in _PER_ELEMENT:
        return True
    dims = m.dims(node.inputs[0]) if node.inputs[0] is not None else None
    if dims is None or not dims:
        return False
    if node.op_type == "Gather":
        return int(m.attr(node, "axis", 0)) % len(dims) != len(dims) - 1
    if node.op_type in ("Unsqueeze", "Squeeze"):
        rank = len(dims) if node.op_type == "Squeeze" else len(m.known_dims(node.outputs[0]))
        axes = given_axes(m, node, 13)
        return axes is not None and rank - 1 not in from_front(axes, rank)
    if node.op_type == "Slice" and len(node.inputs) > 3:
        cut = values.array(node.inputs[3])
        return cut is not None and all(int(a) % len(dims) != len(dims) - 1 for a in cut.reshape(-1))
    return False


def every_other_of_rest(m: Match, value: ir.Value, source: ir.Value) -> int | None:
    """Where a value starts to take every other element of `source`, the last axis of it, out of what that was cut from.

    Both are one Slice of the same tensor: as tokens beside a class token are cut off, and then parted (EVA, timm).
    None where it takes anything else.
    """
    cut, rest = value.producer(), source.producer()
    if cut is None or rest is None or cut.op_type != "Slice" or rest.op_type != "Slice":
        return None
    if cut.domain or rest.domain or cut.inputs[0] is not rest.inputs[0] or cut.inputs[0] is None:
        return None
    dims = m.dims(cut.inputs[0])
    taken, kept = (_bounds(node, dims or ()) for node in (cut, rest))
    if dims is None or taken is None or kept is None:
        return None
    width, last = dims[-1].value, taken.pop(len(dims) - 1, None)
    if width is None or width % 2 or last is None or last[2] != 2 or taken != kept:
        return None
    start, end, _ = slice(*last).indices(width)
    return start if start in (0, 1) and end == width else None


def _bounds(node: ir.Node, dims: tuple[Dim, ...]) -> dict[int, tuple[int, int, int]] | None:
    """Start, end and step of a Slice by axis, within the size where that is known; None where they are not constant."""
    given = [values.array(value) for value in node.inputs[1:]]
    if len(given) < 3 or not dims or any(data is None for data in given):
        return None
    starts, ends, axes, *steps = (data.reshape(-1).tolist() for data in given if data is not None)
    by = steps[0] if steps else [1] * len(axes)
    found = {}
    for axis, *cut in zip(axes, starts, ends, by, strict=True):
        size = dims[axis].value
        start, end, step = cut if size is None else slice(*cut).indices(size)
        found[axis % len(dims)] = (start, end, step)
    return found
