"""Shapes of operators that give the same elements another shape, and of those that make shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import kernels
from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim, Kind, ceildiv, maximum, product
from graphopt.ir.shapes.elementwise import broadcast_dims
from graphopt.ir.shapes.facts import Dims, Facts
from graphopt.ir.shapes.query import Query, Rules, axes_given, normalised

_INT64 = ir.DataType.INT64


def reshaped(
    dims: Dims | None, wanted: Dims, fresh: Callable[[int], Dim], *, allow_zero: bool = False
) -> Dims:
    """The dimensions after a Reshape to `wanted`, whose elements may be 0 (copy) or -1 (infer).

    An element computed from dimensions is taken for a size (not 0 or -1 in a run that succeeds,
    except where 0 is the size of the input as well); any other unknown element gives
    what `fresh` says of its axis.
    """
    result = list(wanted)
    inferred = None
    for axis, size in enumerate(wanted):
        if size.value == -1:
            inferred = axis
        elif size.value == 0 and not allow_zero:
            result[axis] = dims[axis] if dims is not None and axis < len(dims) else fresh(axis)
        elif not is_size(size):
            result[axis] = fresh(axis)
    if inferred is not None:
        others = [dim for axis, dim in enumerate(result) if axis != inferred]
        result[inferred] = fresh(inferred) if dims is None else _quotient(dims, others)
    return tuple(result)


def is_size(dim: Dim) -> bool:
    """Whether an element of a shape tensor is known to be meant as a size, neither -1 nor 0 as a sign."""
    if dim.lower is not None and dim.lower >= 0:
        return True
    return not dim.is_static and not any(s.kind in (Kind.ELEMENT, Kind.FLAG) for s in dim.symbols())


def _quotient(dims: Dims, others: Sequence[Dim]) -> Dim:
    """The inferred size: elements divided by the other sizes, equal ones cancelled first."""
    left = list(dims)
    divisors = []
    for size in others:
        if size in left:
            left.remove(size)
        else:
            divisors.append(size)
    return product(left) // product(divisors)


def _reshape(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    if q.version < 5:
        wanted: Dims | None = tuple(map(Dim.of, q.attr("shape", ())))
    else:
        wanted = q.elements(1)
    if wanted is None:
        rank = _length(q, 1)
        return [facts.tensor(given.dtype, None if rank is None else q.unknown_dims(rank))]
    allow_zero = bool(q.attr("allowzero", 0))
    dims = reshaped(given.dims, wanted, lambda axis: q.fresh(0, axis), allow_zero=allow_zero)
    return [facts.tensor(given.dtype, dims)]


def _length(q: Query, index: int) -> int | None:
    """The number of elements of a one-dimensional input, or None."""
    dims = q.dims(index)
    return dims[0].value if dims is not None and len(dims) == 1 else None


def _squeeze(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    known, axes = axes_given(q, 13)
    if given.dims is None:
        return [Facts(given.type)]
    rank = len(given.dims)
    if not known:
        count = _length(q, 1)
        return [facts.tensor(given.dtype, None if count is None else q.unknown_dims(rank - count))]
    if axes is None:
        if not all(dim.is_static or dim.at_least(2) for dim in given.dims):
            return [Facts(given.type)]
        gone = {i for i, dim in enumerate(given.dims) if dim == 1}
    else:
        gone = {normalised(axis, rank) for axis in axes}
    return [facts.tensor(given.dtype, [d for i, d in enumerate(given.dims) if i not in gone])]


def _unsqueeze(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    known, axes = axes_given(q, 13)
    if given.dims is None:
        return [Facts(given.type)]
    if not known or axes is None:
        count = _length(q, 1)
        rank = None if count is None else len(given.dims) + count
        return [facts.tensor(given.dtype, None if rank is None else q.unknown_dims(rank))]
    rank = len(given.dims) + len(axes)
    new = {normalised(axis, rank) for axis in axes}
    rest = iter(given.dims)
    return [facts.tensor(given.dtype, [1 if i in new else next(rest) for i in range(rank)])]


def _flatten(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    if given.dims is None:
        return [facts.tensor(given.dtype, q.unknown_dims(2))]
    rank = len(given.dims)
    axis = q.attr("axis", 1)
    axis += rank if axis < 0 else 0
    return [facts.tensor(given.dtype, (product(given.dims[:axis]), product(given.dims[axis:])))]


def _transpose(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    perm: tuple[int, ...] | None = q.attr("perm", None)
    if given.dims is None:
        rank = None if perm is None else len(perm)
        return [facts.tensor(given.dtype, None if rank is None else q.unknown_dims(rank))]
    order = range(len(given.dims))[::-1] if perm is None else perm
    return [facts.tensor(given.dtype, [given.dims[axis] for axis in order])]


def _expand(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    wanted = q.elements(1)
    if wanted is None or given.dims is None:
        count = _length(q, 1)
        known = count is not None and given.dims is not None
        rank = max(count or 0, len(given.dims or ()))
        return [facts.tensor(given.dtype, q.unknown_dims(rank) if known else None)]
    return [facts.tensor(given.dtype, broadcast_dims((given.dims, wanted)))]


def _shape(q: Query) -> Sequence[Facts]:
    dims = q.dims(0)
    if dims is None:
        return [facts.tensor(_INT64, q.unknown_dims(1))]
    start, end = kernels.shape_range(q.operation, len(dims))
    return [facts.of_data(facts.SymbolicData.of(dims[start:end], _INT64))]


def _size(q: Query) -> Sequence[Facts]:
    dims = q.dims(0)
    if dims is None:
        return [facts.tensor(_INT64, ())]
    data = facts.SymbolicData.of((product(dims),), _INT64)
    return [facts.of_data(facts.SymbolicData(data.array.reshape(()), _INT64))]


def _constant_of_shape(q: Query) -> Sequence[Facts]:
    held = q.operation.held("value")
    dtype = ir.DataType.FLOAT if held is None else held.value.dtype
    wanted = q.elements(0)
    if wanted is None:
        rank = _length(q, 0)
        return [facts.tensor(dtype, None if rank is None else q.unknown_dims(rank))]
    return [facts.tensor(dtype, wanted)]


def _range(q: Query) -> Sequence[Facts]:
    dtype = q.dtype(0) or q.dtype(1)
    ends = [q.data(i) for i in range(3)]
    start, limit, delta = (None if data is None else data.item() for data in ends)
    if isinstance(start, Dim) and isinstance(limit, Dim) and isinstance(delta, Dim):
        step = delta.value
        if step:
            gap = limit - start if step > 0 else start - limit
            return [facts.tensor(dtype, (maximum((ceildiv(gap, abs(step)), 0)),))]
    if isinstance(start, float) and isinstance(limit, float) and isinstance(delta, float) and delta:
        # Runtimes subtract in the element type and divide in double precision.
        narrow = np.float64 if dtype == ir.DataType.DOUBLE else np.float32
        distance = float(narrow(limit) - narrow(start))
        return [facts.tensor(dtype, (max(0, math.ceil(distance / delta)),))]
    return [facts.tensor(dtype, q.unknown_dims(1))]


RULES: Rules = {
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Expand": _expand,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
}
