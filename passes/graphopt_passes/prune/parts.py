"""Operators that take a value apart by channel: what their outputs are, and what their constants state after a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt_passes.prune.book import Axes, Book, Ids
from graphopt_passes.prune.factors import Unknown
from graphopt_passes.prune.layers import Array


def grouped(book: Book, read: Ids | None, weight: Axes, group: int) -> None:
    """A grouped convolution: the same places of all groups go together, so that the groups stay equal."""
    made, inner = weight[0], weight[1]
    if read is None or made is None or inner is None or len(made) % group:
        book.freeze([read, made, inner])
        return
    for block in read.reshape(group, -1):
        book.unify(inner, block)
    lead, *others = made.reshape(group, -1)
    for block in others:
        book.unify(lead, block)


def split(book: Book, node: ir.Node) -> Sequence[Axes]:
    """Each output has its part of the labels along the axis."""
    x = book.input(node, 0)
    axis = int(operators.attribute(node, "axis", 0)) % len(x)
    sizes = [book.dims(output)[axis] for output in node.outputs]
    ids = x[axis]
    known = [size for size in sizes if size is not None]
    if ids is None or len(known) < len(sizes) or sum(known) != len(ids):
        raise Unknown
    if len(node.inputs) > 1 and node.inputs[1] is not None and values.array(node.inputs[1]) is None:
        raise Unknown
    ends = np.cumsum(known)
    parts = np.split(ids, ends[:-1])
    return [[*x[:axis], part if len(part) > 1 else None, *x[axis + 1 :]] for part in parts]


def sliced(book: Book, node: ir.Node) -> Sequence[Axes]:
    """A stretch of the labels along each axis that is cut with steps of 1; whole axes pass."""
    x = book.input(node, 0)
    out: Axes = list(x)
    for axis, (start, end) in stretches(node, book.dims(_read(node))).items():
        ids = x[axis]
        if ids is not None and end - start < len(ids):
            out[axis] = ids[start:end] if end - start > 1 else None
            if end - start <= 1:
                book.freeze([ids])
    return [out]


def _read(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise Unknown
    return value


def stated_bounds(node: ir.Node) -> tuple[Array | None, Array | None, Array | None]:
    """The starts, ends and axes of a Slice: inputs, or attributes up to opset 9; None where they are not constant."""
    if "starts" in node.attributes:
        axes = node.attributes.get("axes")
        starts, ends = (np.asarray(node.attributes[name].as_ints()) for name in ("starts", "ends"))
        return starts, ends, None if axes is None else np.asarray(axes.as_ints())
    one, two, three = (
        values.array(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2, 3)
    )
    return one, two, three


def stretches(node: ir.Node, dims: Sequence[int | None]) -> dict[int, tuple[int, int]]:
    """The first and last index of each axis that a Slice names.

    Raises:
        Unknown: they are not constant, or steps are not 1.
    """
    starts, ends, axes = stated_bounds(node)
    if starts is None or ends is None:
        raise Unknown
    if len(node.inputs) > 3 and node.inputs[3] is not None and axes is None:
        raise Unknown
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    if steps is not None and ((known := values.array(steps)) is None or (known != 1).any()):
        raise Unknown
    named = range(len(starts)) if axes is None else [int(a) % len(dims) for a in axes]
    found = {}
    for axis, start, end in zip(named, starts.tolist(), ends.tolist(), strict=True):
        size = dims[axis]
        if size is None:
            if start == 0 and end >= np.iinfo(np.int32).max:
                continue
            raise Unknown
        first, last = (min(max(at + size if at < 0 else at, 0), size) for at in (start, end))
        if last <= first:
            raise Unknown
        found[axis] = (first, last)
    return found


def expanded(book: Book, node: ir.Node) -> Sequence[Axes]:
    """Axes that keep their extent pass; those that are repeated stay as they are."""
    x, out = book.input(node, 0), book.fresh(node.outputs[0])
    if values.array(node.inputs[1]) is None:
        raise Unknown
    before, after = book.dims(_read(node)), book.dims(node.outputs[0])
    lead = len(after) - len(before)
    made: Axes = list(out)
    for axis, ids in enumerate(x):
        if before[axis] == after[lead + axis]:
            made[lead + axis] = ids
        else:
            book.freeze([ids])
    book.freeze([ids for ids, old in zip(made, out, strict=True) if ids is old])
    return [made]


def split_sizes(
    node: ir.Node, keep: Mapping[str, Mapping[int, Ids]], rank: int
) -> list[int] | None:
    """What a Split has to state after a cut along its axis; None where none was.

    Values still have the shapes that they had before the cut.
    """
    axis = int(operators.attribute(node, "axis", 0)) % rank
    cut = [keep.get(output.name or "", {}).get(axis) for output in node.outputs]
    if all(stay is None for stay in cut):
        return None
    return [
        _extent(output, axis) if stay is None else len(stay)
        for output, stay in zip(node.outputs, cut, strict=True)
    ]


def _extent(value: ir.Value, axis: int) -> int:
    dim = None if value.shape is None else value.shape[axis]
    assert isinstance(dim, int)  # propagation took only Splits whose parts are known
    return dim


def slice_bounds(
    node: ir.Node, keep: Mapping[str, Mapping[int, Ids]]
) -> tuple[list[int], list[int]] | None:
    """The starts and ends of a Slice after a cut; None where no axis that it names was cut."""
    source = node.inputs[0]
    cut = {} if source is None else keep.get(source.name or "", {})
    starts, ends, axes = stated_bounds(node)
    if source is None or source.shape is None or not cut or starts is None or ends is None:
        return None
    dims = [dim if isinstance(dim, int) else None for dim in source.shape]
    named = range(len(starts)) if axes is None else [int(a) % len(dims) for a in axes]
    found = stretches(node, dims)
    first, last = starts.tolist(), ends.tolist()
    changed = False
    for place, axis in enumerate(named):
        if axis in cut and axis in found:
            begin, end = found[axis]
            first[place] = int((cut[axis] < begin).sum())
            last[place] = int((cut[axis] < end).sum())
            changed = True
    return (first, last) if changed else None
