"""Expand and ConstantOfShape next to what broadcasts by itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, broadcast
from graphopt.rewrite import Match, Op, Var, exact

x, s, s1 = Var(), Var(), Var()

_BROADCASTING = (
    "Add|Sub|Mul|Div|Pow|Mod|And|Or|Xor|Equal|Less|LessOrEqual|Greater|GreaterOrEqual|BitShift|BitwiseAnd|BitwiseOr"
    "|BitwiseXor|Where|Max|Min|Sum|Mean"
)
_CASTABLE = frozenset(
    {"BOOL", "FLOAT", "FLOAT16", "DOUBLE", "INT8", "INT16", "INT32", "INT64"}
    | {"UINT8", "UINT16", "UINT32", "UINT64"}
)


def broadcast_dims(*shapes: Sequence[Dim]) -> tuple[Dim, ...]:
    """The dims that tensors of these shapes broadcast to, aligned at the back."""
    rank = max(map(len, shapes))
    padded = [(*[Dim.of(1)] * (rank - len(dims)), *dims) for dims in shapes]
    return tuple(functools.reduce(broadcast, column) for column in zip(*padded, strict=True))


# --- before an operator that broadcasts

broadcasting = Op(_BROADCASTING, ..., fed_by="Expand|ConstantOfShape")


def _thinner(value: ir.Value | None, g: Builder) -> ir.Value | None:
    """What broadcasts to `value`: the operand of its Expand, or the one number of its ConstantOfShape; else None."""
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return None
    if node.op_type == "Expand":
        return node.inputs[0]
    if node.op_type == "ConstantOfShape" and (fill := _fill_of(node)) is not None:
        return g.const(fill.reshape(()), name="fill")
    return None


def _fill_of(node: ir.Node) -> npt.NDArray[Any] | None:
    """The number that a ConstantOfShape repeats, as an array of one element; None for a function parameter."""
    held = node.attributes.get("value")
    if held is None:
        return np.zeros(1, np.float32)
    return None if held.is_ref() else held.as_tensor().numpy()


@exact(broadcasting)
def drop_covered_expand(m: Match, g: Builder) -> ir.Value | None:
    """`Expand(x, s) + y` -> `x + y` where y alone has every dim that Expand adds; a ConstantOfShape becomes one number.

    For every operator that broadcasts both ways, Where included.
    Source: ONNX Expand-8, ConstantOfShape-9, multidirectional broadcasting.
    """
    node = m[broadcasting]
    wanted, operands = m.dims(broadcasting), list(node.inputs)
    shapes = [None if value is None else m.dims(value) for value in operands]
    known = [dims for dims in shapes if dims is not None]
    if wanted is None or len(known) < len(shapes) or len(known) < 2:
        return None
    changed = False
    for place, value in enumerate(operands):
        thin = _thinner(value, g)
        dims = _dims_of(m, thin)
        if dims is None:
            continue
        if broadcast_dims(*known[:place], dims, *known[place + 1 :]) == wanted:
            operands[place], known[place], changed = thin, dims, True
    return g.op(node.op_type, *operands, like=node) if changed else None


def _dims_of(m: Match, value: ir.Value | None) -> tuple[Dim, ...] | None:
    if value is None:
        return None
    fresh = value.const_value is not None and value.producer() is None and not value.uses()
    return () if fresh else m.dims(value)


# --- an Expand alone

_inner_expand = Op("Expand", x, s1, shared=True)
expand_expand = Op("Expand", _inner_expand, s)
_filled = Op("ConstantOfShape", s1, shared=True)
expand_filled = Op("Expand", _filled, s)
computed_expand = Op("Expand", x, s)
cast_filled = Op("Cast", _filled)


@exact(expand_expand)
def join_expands(m: Match, g: Builder) -> ir.Value | None:
    """`Expand(Expand(x, s1), s)` -> `Expand(x, s)` where s alone gives the result.  Source: ONNX Expand-8."""
    dims, data = m.dims(x), m.data(s)
    target = None if data is None else data.dims
    if dims is None or target is None or broadcast_dims(dims, target) != m.dims(expand_expand):
        return None
    return g.op("Expand", m[x], m[s])


@exact(expand_filled)
def fill_expanded_shape(m: Match, g: Builder) -> ir.Value | None:
    """`Expand(ConstantOfShape(s1), s)` -> `ConstantOfShape(s)` where s is the shape of the result.

    Source: ONNX ConstantOfShape-9, Expand-8.
    """
    data = m.data(s)
    if data is None or data.dims is None or data.dims != m.dims(expand_filled):
        return None
    return g.op("ConstantOfShape", m[s], like=m[_filled])


@exact(computed_expand)
def expand_to_constant(m: Match, g: Builder) -> ir.Value | None:
    """`Expand(x, computed)` -> `Expand(x, constant)`: known dims, and 1 for those that x has already.

    Source: ONNX Expand-8.
    """
    if values.is_constant(m[s]):
        return None
    before, after = m.dims(x), m.dims(computed_expand)
    if before is None or after is None:
        return None
    aligned = (*[None] * (len(after) - len(before)), *before)
    if any(not b.is_static and a != b for a, b in zip(aligned, after, strict=True)):
        return None
    return g.op("Expand", m[x], g.ints([1 if b.value is None else b.value for b in after]))


@exact(cast_filled)
def fill_with_cast_number(m: Match, g: Builder) -> ir.Value | None:
    """`Cast(ConstantOfShape(s, v))` -> `ConstantOfShape(s, cast v)` where the number fits the type.

    Source: ONNX ConstantOfShape-9, -20, Cast-6.
    """
    dtype, number = m.dtype(cast_filled), _fill_of(m[_filled])
    if dtype is None or dtype.name not in _CASTABLE or number is None or number.dtype == object:
        return None
    with np.errstate(all="ignore"):
        made = np.asarray(number).astype(dtype.numpy()).reshape(1)
        alike = made.astype(number.dtype) == number
    if dtype is not ir.DataType.BOOL and not bool(alike.all()):
        return None
    return g.op("ConstantOfShape", m[s1], value=ir.tensor(made))


RULES = (
    drop_covered_expand,
    join_expands,
    fill_expanded_shape,
    expand_to_constant,
    fill_with_cast_number,
)
