"""Reads which keys a query sees through an attention mask: a band beside the diagonal, constant or computed.

A mask that depends on the places of query i and key j alone comes as a constant, as Trilu, or as a comparison of two
Range: `j <= i`, `i - j < 4`, both.  Places are followed as numbers `rows * i + columns * j + offset`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match

MAX_DEPTH = 24
LOW = -1e4
"""What a mask puts in place of a score at most, so that its exponential is zero in every type beside a score."""

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Expand", "Identity"})
_WIDE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types that hold every place exactly."""


@dataclasses.dataclass(frozen=True)
class Band:
    """The keys j that query i sees: lower <= j - i <= upper, None where there is no limit."""

    lower: int | None = None
    upper: int | None = None

    def within(self, other: Band) -> Band:
        """What both let through."""
        lowers = [b for b in (self.lower, other.lower) if b is not None]
        uppers = [b for b in (self.upper, other.upper) if b is not None]
        return Band(max(lowers, default=None), min(uppers, default=None))

    def outside(self) -> Band | None:
        """What does not go through, where that is one band as well."""
        if self.lower is None and self.upper is not None:
            return Band(self.upper + 1, None)
        if self.upper is None and self.lower is not None:
            return Band(None, self.lower - 1)
        return None


ALL = Band()
CAUSAL = Band(None, 0)


@dataclasses.dataclass(frozen=True)
class Place:
    """A number `rows * i + columns * j + offset` at row i and column j of the last two axes."""

    rows: int
    columns: int
    offset: int

    def __sub__(self, other: Place) -> Place:
        return Place(
            self.rows - other.rows, self.columns - other.columns, self.offset - other.offset
        )

    def __add__(self, other: Place) -> Place:
        return self - Place(-other.rows, -other.columns, -other.offset)


def visible(m: Match, mask: ir.Value) -> Band | None:
    """The band that a mask of attention lets through, bool or added; None where it is another or not known."""
    if mask.dtype == ir.DataType.BOOL:
        return _true(m, mask, MAX_DEPTH)
    return _unmasked(m, mask, MAX_DEPTH)


def _true(m: Match, value: ir.Value | None, depth: int) -> Band | None:
    """Where a bool, or a number that is 0 or 1, is true."""
    if value is None or depth == 0:
        return None
    data = values.array(value)
    if data is not None:
        return _of_array(data.astype(bool)) if ((data == 0) | (data == 1)).all() else None
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type in ("LessOrEqual", "Less", "GreaterOrEqual", "Greater"):
        return _compared(m, node, depth - 1)
    if node.op_type == "And":
        return _both(*(_true(m, each, depth - 1) for each in node.inputs))
    if node.op_type == "Not" or (node.op_type == "Equal" and values.fill(node.inputs[1]) == 0):
        inner = _true(m, node.inputs[0], depth - 1)
        return None if inner is None else inner.outside()
    if node.op_type == "ConstantOfShape":
        return ALL if _fill_of_shape(node) == 1 else None
    if node.op_type == "Trilu":
        return _both(_triangle(node), _true(m, node.inputs[0], depth - 1))
    return _true(m, node.inputs[0], depth - 1) if _keeps_places(m, node) else None


def _unmasked(m: Match, value: ir.Value | None, depth: int) -> Band | None:
    """Where an added mask is zero, if it is `LOW` or less everywhere else."""
    if value is None or depth == 0:
        return None
    data = values.array(value)
    if data is not None:
        return _of_array(data == 0) if ((data == 0) | (data <= LOW)).all() else None
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Where":
        return _chosen(m, node, depth - 1)
    if node.op_type == "Add":
        return _both(*(_unmasked(m, each, depth - 1) for each in node.inputs))
    if node.op_type == "Max":
        floors = [values.fill(each) for each in node.inputs[1:]]
        low = all(floor is not None and floor <= LOW for floor in floors)
        return _unmasked(m, node.inputs[0], depth - 1) if low else None
    if node.op_type == "Mul":
        return _multiplied(m, node, depth - 1)
    if node.op_type == "Trilu":
        return _filled_triangle(node)
    return _unmasked(m, node.inputs[0], depth - 1) if _keeps_places(m, node) else None


def _both(*bands: Band | None) -> Band | None:
    found = [each for each in bands if each is not None]
    return None if len(found) < len(bands) else found[0].within(found[1])


def _chosen(m: Match, node: ir.Node, depth: int) -> Band | None:
    """`Where(c, z, low)` and `Where(c, low, z)`, z zero or a mask itself."""
    kept = _true(m, node.inputs[0], depth)
    for low, other, band in (
        (node.inputs[2], node.inputs[1], kept),
        (node.inputs[1], node.inputs[2], None if kept is None else kept.outside()),
    ):
        number = values.fill(low)
        if number is None or number > LOW:
            continue
        if band is not None and _true(m, other, depth) == band:
            return band  # one wherever a key is seen, which Softmax does not notice
        return _both(band, _unmasked(m, other, depth))
    return None


def _multiplied(m: Match, node: ir.Node, depth: int) -> Band | None:
    """`masked * low`, masked 0 or 1, also as `1 - kept`."""
    for flags, low in (node.inputs, node.inputs[::-1]):
        number = values.fill(low)
        if flags is None or number is None or not np.finfo(np.float64).min < number <= LOW:
            continue
        maker = flags.producer()
        if maker is not None and maker.op_type == "Sub" and values.fill(maker.inputs[0]) == 1:
            return _true(m, maker.inputs[1], depth)
        masked = _true(m, flags, depth)
        return None if masked is None else masked.outside()
    return None


def _filled_triangle(node: ir.Node) -> Band | None:
    """`Trilu(low everywhere)`: zero on the other side."""
    source = node.inputs[0]
    maker = None if source is None else source.producer()
    fill = values.fill(source)
    if fill is None and maker is not None and maker.op_type == "ConstantOfShape":
        fill = _fill_of_shape(maker)
    if fill is None and maker is not None and maker.op_type == "Expand":
        fill = values.fill(maker.inputs[0])
    masked = _triangle(node)
    return masked.outside() if masked is not None and fill is not None and fill <= LOW else None


def _fill_of_shape(node: ir.Node) -> float | None:
    attribute = node.attributes.get("value")
    if attribute is None or attribute.is_ref():
        return None
    return float(attribute.as_tensor().numpy().reshape(-1)[0])


def _triangle(node: ir.Node) -> Band | None:
    """What Trilu keeps.  Source: Trilu-14."""
    upper, k = node.attributes.get("upper"), 0
    if upper is not None and upper.is_ref():
        return None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        number = values.scalar(node.inputs[1])
        if number is None:
            return None
        k = int(number)
    return Band(k, None) if upper is None or upper.as_int() else Band(None, k)


def _compared(m: Match, node: ir.Node, depth: int) -> Band | None:
    """A comparison of places, as a limit of j - i."""
    sides = [_place(m, each, depth) for each in node.inputs]
    if sides[0] is None or sides[1] is None:
        return None
    gap = sides[0] - sides[1]  # the comparison is of this and zero
    greater, strict = node.op_type.startswith("Greater"), not node.op_type.endswith("OrEqual")
    if greater:
        gap = Place(0, 0, 0) - gap
    limit = -gap.offset - strict
    if (gap.rows, gap.columns) == (-1, 1):
        return Band(None, limit)
    return Band(-limit, None) if (gap.rows, gap.columns) == (1, -1) else None


def _place(m: Match, value: ir.Value | None, depth: int) -> Place | None:
    """What a number is in terms of row and column; None where it is not a place."""
    if value is None or depth == 0:
        return None
    number = values.fill(value)
    if number is not None:
        return Place(0, 0, int(number)) if float(number).is_integer() else None
    data, dims = values.array(value), m.dims(value)
    axis = None if dims is None else _only_axis(dims)
    if data is not None:
        start = data.reshape(-1)[0]
        steps = np.array_equal(data.reshape(-1), start + np.arange(data.size))
        return _along(axis, int(start)) if steps and data.dtype.kind in "iu" else None
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Range":
        start, step = values.scalar(node.inputs[0]), values.scalar(node.inputs[2])
        return None if start is None or step != 1 else _along(-1, int(start))
    if node.op_type in ("Add", "Sub"):
        sides = [_place(m, each, depth - 1) for each in node.inputs]
        if sides[0] is None or sides[1] is None:
            return None
        return sides[0] + sides[1] if node.op_type == "Add" else sides[0] - sides[1]
    return _moved_place(m, node, dims, depth - 1)


def _moved_place(m: Match, node: ir.Node, dims: tuple[Dim, ...] | None, depth: int) -> Place | None:
    """A view of places along one axis, which may have become another."""
    source = node.inputs[0] if node.op_type in (*_VIEWS, "Cast", "Transpose") else None
    before = None if source is None else m.dims(source)
    inner = _place(m, source, depth)
    if inner is None or before is None or dims is None:
        return None
    if node.op_type == "Cast":
        return inner if node.outputs[0].dtype in _WIDE else None
    if (inner.rows, inner.columns) not in ((0, 1), (1, 0)):
        return None
    if node.op_type in ("Expand", "Identity"):
        axis = -1 if inner.columns else -2
        return inner if before[axis] == dims[axis] else None
    return _along(_only_axis(dims), inner.offset) if _only_axis(before) is not None else None


def _only_axis(dims: tuple[Dim, ...]) -> int | None:
    """The one axis, counted from the end, that is not of size 1."""
    found = [axis for axis, dim in enumerate(dims) if dim != 1]
    return found[0] - len(dims) if len(found) == 1 else None


def _along(axis: int | None, offset: int) -> Place | None:
    if axis not in (-1, -2):
        return None
    return Place(0, 1, offset) if axis == -1 else Place(1, 0, offset)


def _keeps_places(m: Match, node: ir.Node) -> bool:
    """Whether a node leaves each element of the last two axes where it is."""
    if node.op_type in ("Cast", "Identity"):
        return True
    source = node.inputs[0] if node.inputs else None
    before = None if source is None else m.dims(source)
    after = m.dims(node.outputs[0])
    if before is None or after is None:
        return False
    if node.op_type == "Expand" and all(dim == 1 for dim in before):
        return True
    if len(before) < 2:
        return False
    if node.op_type == "Slice":
        return _from_the_corner(m, node, len(before))
    return node.op_type in _VIEWS and before[-2:] == after[-2:]


def _from_the_corner(m: Match, node: ir.Node, rank: int) -> bool:
    """Whether a Slice takes the first rows and columns, as a mask made for the longest sequence is cut."""
    if len(node.inputs) < 4 or node.inputs[1] is None or node.inputs[3] is None:
        return False
    starts, axes = m.data(node.inputs[1]), values.array(node.inputs[3])
    if starts is None or axes is None:
        return False
    steps = values.fill(node.inputs[4]) if len(node.inputs) > 4 else 1.0
    first = zip(starts.array.reshape(-1), axes.reshape(-1), strict=True)
    return steps == 1 and all(start == 0 for start, axis in first if axis % rank >= rank - 2)


def _of_array(kept: npt.NDArray[np.bool_]) -> Band | None:
    """The band of a constant [..., S, L], alike for all leading indices."""
    if kept.all():
        return ALL
    if kept.ndim < 2 or 1 in kept.shape[-2:] or kept.size == 0:  # the same for all rows is no band
        return None
    flat = kept.reshape(-1, *kept.shape[-2:])
    if not (flat == flat[:1]).all():
        return None
    seen = flat[0]
    places = np.arange(seen.shape[1])[None, :] - np.arange(seen.shape[0])[:, None]
    if not seen.any():
        return None
    lower, upper = int(places[seen].min()), int(places[seen].max())
    if not np.array_equal(seen, (lower <= places) & (places <= upper)):
        return None
    return Band(None if lower == places.min() else lower, None if upper == places.max() else upper)
