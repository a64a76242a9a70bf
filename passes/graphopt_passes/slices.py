"""Slice, Split, Concat, Gather in chains: parts of parts, parts of joined tensors, parts joined again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match, Op, Skip, Var, exact
from graphopt_passes.constants import given_axes

FAR = 2**31 - 1
"""Exporters write INT32_MAX or INT64_MAX for "to the end"."""

x = Var()
i = Var(const=True)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a slice takes of one axis: from `start` to before `end`, every `step`-th; negative from the back.

    An `end` of FAR or more is the end of the axis.
    """

    start: int
    end: int
    step: int = 1


def _ints(m: Match, value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of an integer operand that is constant or known from shapes, or None."""
    if value is None:
        return None
    array = values.array(value)
    if array is None:
        data = m.data(value)
        array = None if data is None else data.static()
    return None if array is None else tuple(int(e) for e in array.reshape(-1))


def _parts(m: Match, node: ir.Node, rank: int) -> Mapping[int, Part] | None:
    """What a Slice takes of each axis that it names, axes from the front; None where that is computed."""
    if m.opset() < 10:
        starts, ends, axes = (m.attr(node, name) for name in ("starts", "ends", "axes"))
        steps: Sequence[int] | None = None
    else:
        operands = [*node.inputs[1:], None, None][:4]
        starts, ends, axes, steps = (_ints(m, v) for v in operands)
        if any(
            v is not None and found is None
            for v, found in zip(operands, (starts, ends, axes, steps), strict=True)
        ):
            return None
    if starts is None or ends is None:
        return None
    axes = range(len(starts)) if axes is None else axes
    steps = itertools.repeat(1, len(starts)) if steps is None else steps  # type: ignore[assignment]
    rows = zip(axes, starts, ends, steps, strict=True)  # type: ignore[arg-type]
    return {axis % rank: Part(start, end, step) for axis, start, end, step in rows}


def _slice(m: Match, g: Builder, data: ir.Value, parts: Mapping[int, Part]) -> ir.Value:
    """A Slice in the spelling of the model's opset."""
    axes = sorted(parts)
    starts, ends, steps = zip(
        *((parts[a].start, parts[a].end, parts[a].step) for a in axes), strict=True
    )
    if m.opset() < 10:
        return g.op("Slice", data, starts=starts, ends=ends, axes=axes)
    operands = [g.ints(starts, name="starts"), g.ints(ends, name="ends"), g.ints(axes, name="axes")]
    if any(step != 1 for step in steps):
        operands.append(g.ints(steps, name="steps"))
    return g.op("Slice", data, *operands)


# --- a slice of a slice

_first_slice = Op("Slice", x, ..., shared=True)
slice_slice = Op("Slice", _first_slice, ...)


def join_parts(first: Part, second: Part, size: int | None) -> Part | None:
    """The part that `second` takes of what `first` takes of an axis of `size` (None: unknown); None if not sayable."""
    if size is not None:
        left = range(size)[first.start : first.end : first.step]
        left = left[second.start : second.end : second.step]
        end = left.stop if left.stop >= 0 else -size - 1
        return Part(left.start, end, left.step) if left else Part(0, 0)
    if (first.step, second.step) != (1, 1) or first.start < 0 or second.start < 0:
        return None
    start = first.start + second.start
    if second.end >= FAR:
        return Part(start, first.end)
    if first.end >= FAR:
        return Part(start, second.end if second.end < 0 else first.start + second.end)
    if first.end < 0 or second.end < 0:
        return None
    return Part(start, min(first.end, first.start + second.end))


@exact(slice_slice)
def join_slices(m: Match, g: Builder) -> ir.Value | None:
    """`Slice(Slice(x))` -> `Slice(x)`: other axes side by side, the same axis composed.

    Source: ONNX Slice-1 (attributes), -10 (inputs, steps), -11, -13.
    """
    dims = m.known_dims(x)
    first, second = (_parts(m, m[op], len(dims)) for op in (_first_slice, slice_slice))
    if first is None or second is None:
        return None
    joined = {**first, **second}
    for axis in first.keys() & second.keys():
        part = join_parts(first[axis], second[axis], dims[axis].value)
        if part is None:
            raise Skip(f"both take part of axis {axis}, whose size is unknown", m[_first_slice])
        joined[axis] = part
    return _slice(m, g, m[x], joined)


# --- parts of a Concat

_whole = Op("Concat", ..., shared=True)
slice_concat = Op("Slice", _whole, ...)
split_concat = Op("Split", _whole, ...)
gather_concat = Op("Gather", _whole, i)


def _axis(m: Match, node: ir.Node, value: ir.Value) -> int | None:
    """The axis attribute of a node, from the front of `value`; None where the rank is unknown."""
    dims = m.dims(value)
    return None if not dims else int(m.attr(node, "axis", 0)) % len(dims)


def _offsets(m: Match, operands: Sequence[ir.Value | None], axis: int) -> list[Dim] | None:
    """Where each operand of a Concat starts along the axis, and where the last ends; None if a rank is unknown."""
    found = [Dim.of(0)]
    for operand in operands:
        dims = None if operand is None else m.dims(operand)
        if dims is None:
            return None
        found.append(found[-1] + dims[axis])
    return found


def _absolute(place: int, total: Dim) -> Dim:
    if place >= FAR:
        return total
    return total + place if place < 0 else Dim.of(place)


@exact(slice_concat)
def slice_operand_of_concat(m: Match, g: Builder) -> ir.Value | None:
    """`Slice(Concat(a, b, c))` along its axis -> the operands that it takes, or a Slice of the one that it lies in.

    Source: ONNX Concat-4, Slice-10.
    """
    concat, node = m[_whole], m[slice_concat]
    axis = _axis(m, concat, concat.outputs[0])
    offsets = None if axis is None else _offsets(m, concat.inputs, axis)
    if axis is None or offsets is None:
        return None
    parts = _parts(m, node, len(m.known_dims(concat.outputs[0])))
    if parts is None or parts.keys() != {axis} or parts[axis].step != 1:
        return None
    start, end = (_absolute(p, offsets[-1]) for p in (parts[axis].start, parts[axis].end))
    if start in offsets and end in offsets:
        first, last = offsets.index(start), offsets.index(end)
        taken = concat.inputs[first:last]
        if not taken:
            return None
        return g.op("Concat", *taken, axis=axis) if len(taken) > 1 else taken[0]
    for operand, low, high in zip(concat.inputs, offsets, offsets[1:], strict=False):
        inside = (start - low, end - low)
        if (
            operand is not None
            and start.at_least(low)
            and high.at_least(end)
            and all(d.is_static for d in inside)
        ):
            return _slice(m, g, operand, {axis: Part(int(inside[0]), int(inside[1]))})
    return None


@exact(split_concat)
def split_concat_into_operands(m: Match, g: Builder) -> Sequence[ir.Value | None] | None:  # noqa: ARG001
    """`Split(Concat(a, b))` into the same pieces -> `a`, `b`.  Source: ONNX Concat-4, Split-2, -13."""
    concat, node = m[_whole], m[split_concat]
    joined = concat.outputs[0]
    axis = _axis(m, concat, joined)
    if axis is None or axis != _axis(m, node, joined):
        return None
    pieces = [m.dims(value) for value in node.outputs]
    operands = [None if value is None else m.dims(value) for value in concat.inputs]
    if pieces != operands or None in pieces:
        return None
    return concat.inputs


@exact(gather_concat)
def gather_from_operand_of_concat(m: Match, g: Builder) -> ir.Value | None:
    """`Gather(Concat(a, b), i)` along its axis -> `Gather(a, i)` where every index lies in the one operand.

    Source: ONNX Concat-4, Gather-1.
    """
    concat, node = m[_whole], m[gather_concat]
    axis = _axis(m, concat, concat.outputs[0])
    if axis is None or axis != _axis(m, node, concat.outputs[0]):
        return None
    offsets, indices = _offsets(m, concat.inputs, axis), m.array(i)
    if offsets is None or indices.size == 0 or bool((indices < 0).any()):
        return None
    for operand, low, high in zip(concat.inputs, offsets, offsets[1:], strict=False):
        if (
            low.is_static
            and high.at_least(int(indices.max()) + 1)
            and int(indices.min()) >= int(low)
        ):
            moved = np.asarray(indices - int(low), indices.dtype)
            return g.op("Gather", operand, g.const(moved, name="indices"), axis=axis)
    return None


# --- operands of a Concat

concat = Op("Concat", ...)
concat_of_parts = Op("Concat", ..., fed_by="Slice|Split")


def _is_only_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


@exact(concat)
def flatten_concat(m: Match, g: Builder) -> ir.Value | None:
    """`Concat(Concat(a, b), c)` -> `Concat(a, b, c)` along one axis; operands of size 0 along it go.

    Source: ONNX Concat-4.
    """
    node = m[concat]
    axis = _axis(m, node, node.outputs[0])
    if axis is None:
        return None
    kept: list[ir.Value | None] = []
    for value in node.inputs:
        inner = value.producer() if value is not None else None
        if (
            inner is not None
            and value is not None
            and _joins(m, inner, axis)
            and _is_only_use(value)
        ):
            kept.extend(inner.inputs)
        else:
            kept.append(value)
    left = [v for v in kept if v is not None and not _is_empty(m, v, axis)] or kept[:1]
    if left == list(node.inputs):
        return None
    return left[0] if len(left) == 1 else g.op("Concat", *left, axis=axis)


def _joins(m: Match, node: ir.Node, axis: int) -> bool:
    """Whether a node is a Concat along `axis`."""
    plain = node.op_type == "Concat" and not node.domain
    return plain and _axis(m, node, node.outputs[0]) == axis


def _is_empty(m: Match, value: ir.Value, axis: int) -> bool:
    dims = m.dims(value)
    return dims is not None and dims[axis] == 0


@dataclasses.dataclass(frozen=True)
class _Piece:
    """An operand of a Concat as a stretch of another tensor (or all of itself) along the axis."""

    source: ir.Value
    start: Dim
    end: Dim


def _piece(m: Match, value: ir.Value, axis: int) -> _Piece | None:
    """The stretch that an operand is; None where its dims are unknown."""
    node, dims = value.producer(), m.dims(value)
    if dims is None:
        return None
    if node is not None and not node.domain and node.inputs and node.inputs[0] is not None:
        source = node.inputs[0]
        if node.op_type == "Split" and _axis(m, node, source) == axis:
            return _split_piece(m, node, value, axis)
        if node.op_type == "Slice" and (whole := m.dims(source)) is not None:
            parts = _parts(m, node, len(whole))
            if parts is not None and parts.keys() == {axis} and parts[axis].step == 1:
                start = _absolute(parts[axis].start, whole[axis])
                return _Piece(source, start, start + dims[axis])
    return _Piece(value, Dim.of(0), dims[axis])


def _split_piece(m: Match, node: ir.Node, value: ir.Value, axis: int) -> _Piece | None:
    offsets = _offsets(m, node.outputs, axis)
    source = node.inputs[0]
    if offsets is None or source is None:
        return None
    at = node.outputs.index(value)
    return _Piece(source, offsets[at], offsets[at + 1])


def _stretches(pieces: Sequence[_Piece]) -> Iterator[_Piece]:
    """Neighbours that continue one another, as one."""
    last = pieces[0]
    for piece in pieces[1:]:
        if piece.source is last.source and piece.start == last.end:
            last = dataclasses.replace(last, end=piece.end)
        else:
            yield last
            last = piece
    yield last


@exact(concat_of_parts)
def join_adjacent_parts(m: Match, g: Builder) -> ir.Value | None:
    """`Concat(x[0:a], x[a:b], y)` -> `Concat(x[0:b], y)`; all parts of a Split or of x -> `x`.

    Source: ONNX Concat-4, Split-2, Slice-10.
    """
    node = m[concat_of_parts]
    axis = _axis(m, node, node.outputs[0])
    if axis is None or len(node.inputs) < 2:
        return None
    pieces = [None if value is None else _piece(m, value, axis) for value in node.inputs]
    known = [piece for piece in pieces if piece is not None]
    if len(known) < len(pieces):
        return None
    joined = list(_stretches(known))
    if len(joined) == len(pieces):
        return None
    operands = [
        _take(m, g, piece, axis, dict(zip(known, node.inputs, strict=True))) for piece in joined
    ]
    if None in operands:
        return None
    return operands[0] if len(operands) == 1 else g.op("Concat", *operands, axis=axis)


def _take(
    m: Match, g: Builder, piece: _Piece, axis: int, present: Mapping[_Piece, ir.Value | None]
) -> ir.Value | None:
    """A value for a stretch: one that is there, the whole source, or a Slice; None where the ends are unknown."""
    if piece in present:
        return present[piece]
    whole = m.known_dims(piece.source)[axis]
    if piece.start == 0 and piece.end == whole:
        return piece.source
    if not piece.start.is_static:
        return None
    end = FAR if piece.end == whole else piece.end.value
    if end is None:
        return None
    return _slice(m, g, piece.source, {axis: Part(int(piece.start), end)})


# --- one element, with its axis or without

_element = Op("Gather", x, i, shared=True)
unsqueezed_element = Op("Unsqueeze", _element, ...)
squeezed_element = Op("Squeeze", _element, ...)
_thin = Op("Slice", x, ..., shared=True)
squeezed_slice = Op("Squeeze", _thin, ...)


def _view_axis(m: Match, view: ir.Node, rank: int) -> int | None:
    """The one axis that a Squeeze or Unsqueeze names, from the front; None for several."""
    axes = given_axes(m, view, 13)
    return axes[0] % rank if axes is not None and len(axes) == 1 and rank else None


@exact(unsqueezed_element)
def gather_with_axis(m: Match, g: Builder) -> ir.Value | None:
    """`Unsqueeze(Gather(x, i, a), a)` -> `Gather(x, [i], a)` for a constant scalar i.  Source: ONNX Gather-1."""
    node, index, dims = m[_element], m.array(i), m.known_dims(x)
    axis = _axis(m, node, m[x])
    if index.ndim or axis is None or _view_axis(m, m[unsqueezed_element], len(dims)) != axis:
        return None
    return g.op("Gather", m[x], g.const(index.reshape(1), name="indices"), axis=axis)


@exact(squeezed_element)
def gather_without_axis(m: Match, g: Builder) -> ir.Value | None:
    """`Squeeze(Gather(x, [i], a), a)` -> `Gather(x, i, a)` for a constant i.  Source: ONNX Gather-1."""
    node, index, dims = m[_element], m.array(i), m.known_dims(x)
    axis = _axis(m, node, m[x])
    if index.shape != (1,) or _view_axis(m, m[squeezed_element], len(dims)) != axis:
        return None
    return g.op("Gather", m[x], g.const(index.reshape(()), name="indices"), axis=axis)


@exact(squeezed_slice)
def gather_instead_of_squeezed_slice(m: Match, g: Builder) -> ir.Value | None:
    """`Squeeze(x[i:i+1], a)` -> `Gather(x, i, a)`.  Source: ONNX Slice-1, -10, Squeeze-1, Gather-1."""
    dims = m.known_dims(x)
    parts = _parts(m, m[_thin], len(dims))
    if parts is None or len(parts) != 1:
        return None
    ((axis, part),) = parts.items()
    last = part.start == -1 and part.end >= FAR
    thin = part.start != -1 and part.end == part.start + 1
    if part.step != 1 or not (last or thin) or _view_axis(m, m[squeezed_slice], len(dims)) != axis:
        return None
    return g.op("Gather", m[x], g.const(np.asarray(part.start), name="indices"), axis=axis)


# --- rows by a column of indices

rows = Var()
column = Op("Unsqueeze|Reshape", rows, ..., shared=True)
by_tuples = Op("GatherND", x, column)


@exact(by_tuples)
def gather_instead_of_tuples_of_one(m: Match, g: Builder) -> ir.Value | None:
    """`GatherND(x, i[…, None])` -> `Gather(x, i)`: rows by one index each.  Source: ONNX GatherND-11, -12, Gather-1."""
    dims = m.dims(rows)
    lifted = dims is not None and m.dims(column) == (*dims, Dim.of(1))
    if not lifted or m.attr(by_tuples, "batch_dims", 0):
        return None
    return g.op("Gather", m[x], m[rows], axis=0)


# --- one part of a Split

split = Op("Split", x, ...)


@exact(split)
def slice_instead_of_split(m: Match, g: Builder) -> Sequence[ir.Value | None] | None:
    """A Split of which one output is used -> a Slice.  Source: ONNX Split-2, -13, -18, Slice-10."""
    node = m[split]
    used = [n for n, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    axis = _axis(m, node, m[x])
    offsets = None if axis is None else _offsets(m, node.outputs, axis)
    if len(used) != 1 or len(node.outputs) == 1 or axis is None or offsets is None:
        return None
    start, end = offsets[used[0]], offsets[used[0] + 1]
    last = end == m.known_dims(x)[axis]
    if not start.is_static or not (end.is_static or last):
        return None
    part = _slice(m, g, m[x], {axis: Part(int(start), FAR if last else int(end))})
    return [part if n == used[0] else None for n in range(len(node.outputs))]


RULES = (
    join_slices,
    slice_operand_of_concat,
    split_concat_into_operands,
    gather_from_operand_of_concat,
    flatten_concat,
    join_adjacent_parts,
    gather_with_axis,
    gather_without_axis,
    gather_instead_of_squeezed_slice,
    gather_instead_of_tuples_of_one,
    slice_instead_of_split,
)
