"""Shapes of operators that move elements: joining, cutting, gathering, scattering, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim, ceildiv, maximum, minimum
from graphopt.ir.shapes.facts import Dims, Facts, Ratio
from graphopt.ir.shapes.query import Query, Rules, normalised

_INT64 = ir.DataType.INT64
_INFINITE = 2**31 - 1  # exporters write INT32_MAX and above for "to the end"


def _concat(q: Query) -> Sequence[Facts]:
    shapes = [q.dims(i) for i in range(len(q.inputs))]
    known = [dims for dims in shapes if dims is not None]
    dtype = next((q.dtype(i) for i in range(len(shapes)) if q.dtype(i)), None)
    if not known:
        return [facts.tensor(dtype, None)]
    rank = len(known[0])
    axis = q.axis("axis", 1, rank)
    result = [_agreed([dims[i] for dims in known]) for i in range(rank)]
    if len(known) == len(shapes):
        result[axis] = sum((dims[axis] for dims in known), Dim.of(0))
    else:
        result[axis] = q.fresh(0, axis)
    return [facts.tensor(dtype, result)]


def _agreed(sizes: Sequence[Dim]) -> Dim:
    """One of several sizes that a valid model makes equal: a known one, else the first."""
    return next((size for size in sizes if size.is_static), sizes[0])


def _split(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    count = len(q.node.outputs)
    if given.dims is None:
        return [Facts(given.type)] * count
    axis = q.axis("axis", 0, len(given.dims))
    sizes = _split_sizes(q, given.dims[axis], axis)
    before, after = given.dims[:axis], given.dims[axis + 1 :]
    return [facts.tensor(given.dtype, (*before, size, *after)) for size in sizes]


def _split_sizes(q: Query, total: Dim, axis: int) -> Sequence[Dim]:
    """The size of each output along the split axis."""
    count = len(q.node.outputs)
    if q.has(1):
        sizes = q.elements(1)
        return sizes if sizes and len(sizes) == count else [q.fresh(i, axis) for i in range(count)]
    given: tuple[int, ...] | None = q.attr("split", None)
    if given:
        return [Dim.of(size) for size in given]
    if q.version < 18:
        return [total // count] * count
    each = ceildiv(total, count)
    return [each] * (count - 1) + [total - each * (count - 1)]


def _slice(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    if given.dims is None:
        return [Facts(given.type)]
    result = list(given.dims)
    cuts = _cuts(q, len(result))
    if cuts is None:
        return [facts.tensor(given.dtype, _maybe_cut(q, given.dims))]
    for axis, start, end, step in cuts:
        length = sliced(result[axis], start, end, step)
        result[axis] = q.fresh(0, axis) if length is None else length
    return [facts.tensor(given.dtype, result)]


def _maybe_cut(q: Query, dims: Dims) -> Dims:
    """The dimensions when the bounds are not known: those of axes surely not cut stay."""
    axes = q.ints(3) if q.has(3) else None
    if axes is None:
        return q.unknown_dims(len(dims))
    touched = {normalised(axis, len(dims)) for axis in axes}
    return tuple(q.fresh(0, i) if i in touched else dim for i, dim in enumerate(dims))


def _cuts(q: Query, rank: int) -> list[tuple[int, Dim, Dim, Dim]] | None:
    """(axis, start, end, step) of each cut, or None where they are not known."""
    if q.version < 10:
        columns: list[Dims | None] = [
            tuple(map(Dim.of, q.attr(name, ()))) for name in ("starts", "ends")
        ]
        axes: tuple[int, ...] | None = q.attr("axes", None)
        steps: Dims | None = None
    else:
        columns = [q.elements(1), q.elements(2)]
        axes = q.ints(3) if q.has(3) else None
        steps = q.elements(4) if q.has(4) else None
        if (q.has(3) and axes is None) or (q.has(4) and steps is None):
            return None
    starts, ends = columns
    if starts is None or ends is None:
        return None
    order = range(len(starts)) if axes is None else axes
    paces = steps or (Dim.of(1),) * len(starts)
    where = [normalised(axis, rank) for axis in order]
    return list(zip(where, starts, ends, paces, strict=True))


def sliced(size: Dim, start: Dim, end: Dim, step: Dim) -> Dim | None:
    """The length of a slice of an axis, or None where the sign of a bound is not known."""
    pace = step.value
    if not pace:
        return None
    if pace < 0:
        return _sliced_backward(size, start, end, -pace)
    if start.value is not None and start.value < 0 and _is_infinite(end):
        return ceildiv(minimum((size, -start.value)), pace)
    if _is_infinite(end) and start.upper == 0 and minimum((size, -start)) == size:
        return ceildiv(size, pace)  # `x[-n:]` of no more than n, also where n is 0
    # A start beyond the end gives 0 whether it is clamped or not.
    unclamped = start.lower is not None and start.lower >= 0
    first, last = start if unclamped else _bound(size, start), _bound(size, end)
    if first is None or last is None:
        return None
    return ceildiv(maximum((last - first, 0)), pace)


def _is_infinite(end: Dim) -> bool:
    """Whether the end of a slice stands for the end of the axis."""
    return end.value is not None and end.value >= _INFINITE


def _bound(size: Dim, bound: Dim) -> Dim | None:
    """A bound of a forward slice, clamped to [0, size]; None where its sign is not known."""
    if _is_infinite(bound) or bound == size:
        return size
    if bound.lower is not None and bound.lower >= 0:
        return minimum((bound, size))
    if bound.upper is not None and bound.upper < 0:
        return maximum((minimum((bound + size, size)), 0))
    return None


def _sliced_backward(size: Dim, start: Dim, end: Dim, pace: int) -> Dim | None:
    """The length of a slice with a negative step."""
    if _is_infinite(end):
        return None  # nothing by the standard, everything to ONNX Runtime 1.31
    if end.value is not None and end.value <= -_INFINITE:
        last: Dim | None = Dim.of(-1)
    elif size.value is not None and end.value is not None and end.value < -size.value:
        last = Dim.of(-1)
    else:
        last = _bound(size, end)
        if end.value is not None and end.value < 0 and size.value is None:
            return None
    # The last element is where a slice with a large or a -1 start begins.
    if _is_infinite(start) or start.value == -1:
        first: Dim | None = size - 1
    else:
        top = _bound(size, start)
        if start.value is not None and start.value < 0 and size.value is not None:
            top = Dim.of(max(start.value + size.value, 0))  # clamped to the first element
        first = None if top is None else minimum((top, size - 1))
    if first is None or last is None:
        return None
    return ceildiv(maximum((first - last, 0)), pace)


def _gather(q: Query) -> Sequence[Facts]:
    given, indices = q.facts(0), q.facts(1)
    if given.dims is None or indices.dims is None:
        return [Facts(given.type)]
    axis = q.axis("axis", 0, len(given.dims))
    return [facts.tensor(given.dtype, given.dims[:axis] + indices.dims + given.dims[axis + 1 :])]


def _gather_elements(q: Query) -> Sequence[Facts]:
    return [facts.tensor(q.dtype(0), q.dims(1))]


def _gather_nd(q: Query) -> Sequence[Facts]:
    given, indices = q.facts(0), q.dims(1)
    depth = None if not indices else indices[-1].value
    if given.dims is None or indices is None or depth is None:
        return [Facts(given.type)]
    return [facts.tensor(given.dtype, indices[:-1] + given.dims[depth + q.attr("batch_dims", 0) :])]


def _tile(q: Query) -> Sequence[Facts] | None:
    given = q.facts(0)
    if q.version < 6:
        return None
    if given.dims is None:
        return [Facts(given.type)]
    repeats = q.elements(1)
    if repeats is None or len(repeats) != len(given.dims):
        return [facts.tensor(given.dtype, q.unknown_dims(len(given.dims)))]
    return [facts.tensor(given.dtype, [a * b for a, b in zip(given.dims, repeats, strict=True)])]


def _pad(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    if given.dims is None:
        return [Facts(given.type)]
    rank = len(given.dims)
    held = q.operation.held("pads") or q.operation.held("paddings")
    pads = q.elements(1) if q.version >= 11 else tuple(map(Dim.of, held.as_ints() if held else ()))
    axes = q.ints(3) if q.has(3) else tuple(range(rank))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return [facts.tensor(given.dtype, q.unknown_dims(rank))]
    result = list(given.dims)
    for i, axis in enumerate(axes):
        result[axis] = result[axis] + pads[i] + pads[i + len(axes)]
    return [facts.tensor(given.dtype, result)]


def _depth_to_space(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    block = q.attr("blocksize", 1)
    if given.dims is None or len(given.dims) != 4:
        return [Facts(given.type)]
    n, c, h, w = given.dims
    return [facts.tensor(given.dtype, (n, c // (block * block), h * block, w * block))]


def _space_to_depth(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    block = q.attr("blocksize", 1)
    if given.dims is None or len(given.dims) != 4:
        return [Facts(given.type)]
    n, c, h, w = given.dims
    return [facts.tensor(given.dtype, (n, c * block * block, h // block, w // block))]


def _resize(q: Query) -> Sequence[Facts] | None:
    given = q.facts(0)
    if given.dims is None:
        return [Facts(given.type)]
    rank = len(given.dims)
    if q.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    axes: tuple[int, ...] = q.attr("axes", tuple(range(rank)))
    scales_at, sizes_at = (1, 3) if q.version < 11 else (2, 3)
    factors, sizes = q.data(scales_at), q.elements(sizes_at) if q.has(sizes_at) else None
    result = list(q.unknown_dims(rank))
    for axis in set(range(rank)) - {normalised(axis, rank) for axis in axes}:
        result[axis] = given.dims[axis]
    if q.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        factors = None if sizes is None else factors
    for i, axis in enumerate(axes):
        where = normalised(axis, rank)
        if sizes is not None and len(sizes) == len(axes):
            result[where] = sizes[i]
        elif not q.has(sizes_at) and factors is not None and len(factors.elements) == len(axes):
            result[where] = _scaled(given.dims[where], factors.elements[i]) or result[where]
    return [facts.tensor(given.dtype, result)]


def _scaled(size: Dim, factor: Dim | Ratio | float) -> Dim | None:
    """`floor(size * factor)` where that is certain, or None."""
    if not isinstance(factor, float):
        return None
    if size.value is not None:
        # Runtimes multiply in float32, where 10 * 0.7 is 7.
        return Dim.of(math.floor(np.float32(size.value) * np.float32(factor)))
    number, by = factor.as_integer_ratio()
    # Powers of two and whole numbers: the runtime's float32 product is exact.
    return size * number // by if by <= 1024 and number < 1 << 16 else None


def _upsample(q: Query) -> Sequence[Facts] | None:
    given = q.facts(0)
    held = q.operation.held("scales")
    data = q.data(1)
    if given.dims is None:
        return [Facts(given.type)]
    if held is None and data is None:
        return (
            None if q.version < 7 else [facts.tensor(given.dtype, q.unknown_dims(len(given.dims)))]
        )
    factors = held.as_floats() if held is not None else data.elements if data else ()
    pairs = enumerate(zip(given.dims, factors, strict=True))
    return [facts.tensor(given.dtype, [_scaled(d, f) or q.fresh(0, i) for i, (d, f) in pairs])]


def _one_hot(q: Query) -> Sequence[Facts]:
    indices = q.dims(0)
    if indices is None:
        return [facts.tensor(q.dtype(2), None)]
    axis = q.axis("axis", -1, len(indices) + 1)
    data = q.data(1)
    depth = None if data is None else data.item()
    if isinstance(depth, float):
        depth = Dim.of(int(depth))
    size = depth if isinstance(depth, Dim) else q.fresh(0, axis)
    return [facts.tensor(q.dtype(2), (*indices[:axis], size, *indices[axis:]))]


def _nonzero(q: Query) -> Sequence[Facts]:
    dims = q.dims(0)
    rank = q.fresh(0, 0) if dims is None else Dim.of(len(dims))
    return [facts.tensor(_INT64, (rank, q.fresh(0, 1)))]


def _compress(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    held = q.operation.held("axis")
    if held is None:
        return [facts.tensor(given.dtype, q.unknown_dims(1))]
    if given.dims is None:
        return [Facts(given.type)]
    axis = normalised(held.as_int(), len(given.dims))
    result = [q.fresh(0, axis) if i == axis else dim for i, dim in enumerate(given.dims)]
    return [facts.tensor(given.dtype, result)]


def _top_k(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    if given.dims is None:
        return [Facts(given.type), facts.tensor(_INT64, None)]
    axis = q.axis("axis", -1, len(given.dims))
    wanted = (Dim.of(q.attr("k", 0)),) if q.version < 10 else q.elements(1)
    result = list(given.dims)
    result[axis] = wanted[0] if wanted else q.fresh(0, axis)
    return [facts.tensor(given.dtype, result), facts.tensor(_INT64, result)]


def _scatter(q: Query) -> Sequence[Facts]:
    return [q.same(0)]


RULES: Rules = {
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Scatter": _scatter,
    "ScatterND": _scatter,
    "ScatterElements": _scatter,
    "TensorScatter": _scatter,
    "Tile": _tile,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
    "Upsample": _upsample,
    "OneHot": _one_hot,
    "NonZero": _nonzero,
    "Compress": _compress,
    "TopK": _top_k,
}
