"""Casts, transposes and views (Reshape, Squeeze, Unsqueeze, Flatten) in chains, and views whose shape is known."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, product
from graphopt.rewrite import Match, Op, Skip, Var, exact
from graphopt_passes.constants import given_axes

x, s = Var(), Var(computed=True)

_VIEWS = "Reshape|Squeeze|Unsqueeze|Flatten"

# --- casts

_FLOATS = {
    ir.DataType.FLOAT16: (11, 5),  # bits of the significand, of the exponent
    ir.DataType.BFLOAT16: (8, 8),
    ir.DataType.FLOAT: (24, 8),
    ir.DataType.DOUBLE: (53, 11),
}


def _holds(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Whether every number of type `narrow` is one of type `wide`."""
    if ir.DataType.STRING in (wide, narrow):
        return False
    if narrow in (wide, ir.DataType.BOOL):
        return True
    if narrow.is_integer():
        bits = narrow.bitwidth - narrow.is_signed()
        if wide.is_integer():
            signs = wide.is_signed() or not narrow.is_signed()
            return signs and bits <= wide.bitwidth - wide.is_signed()
        return wide in _FLOATS and bits <= _FLOATS[wide][0]
    if narrow not in _FLOATS or wide not in _FLOATS:
        return False
    return all(a <= b for a, b in zip(_FLOATS[narrow], _FLOATS[wide], strict=True))


_inner_cast = Op("Cast", x, shared=True)
cast_cast = Op("Cast", _inner_cast)


def _is_skippable(first: ir.DataType, middle: ir.DataType, last: ir.DataType) -> bool:
    """Whether converting `first` to `last` by way of `middle` gives the bits of converting directly."""
    if ir.DataType.STRING in (first, last) or not _holds(middle, first):
        return False
    if last.is_integer() and not first.is_integer() and first is not ir.DataType.BOOL:
        return False  # what a number out of range becomes depends on the type that it is read from
    if last.is_integer() and not middle.is_integer():
        return _holds(last, first)
    # ONNX Runtime rounds integers to half precision by way of float: twice, unless float holds them
    return last in (first, ir.DataType.FLOAT, ir.DataType.DOUBLE) or _holds(
        ir.DataType.FLOAT, first
    )


@exact(cast_cast)
def join_casts(m: Match, g: Builder) -> ir.Value | None:
    """`Cast(Cast(x, middle), last)` -> `Cast(x, last)`, or `x`, where the middle type holds every value of the first.

    Left alone: strings, and floats that end as integers (out of range, the result depends on the type read).
    Source: ONNX Cast-6, -13, -19 (saturate).
    """
    first, middle, last = m.dtype(x), m.dtype(_inner_cast), m.dtype(cast_cast)
    if first is None or middle is None or last is None or not _is_skippable(first, middle, last):
        return None
    return m[x] if first == last else g.op("Cast", m[x], like=m[cast_cast])


# --- transposes

_inner_transpose = Op("Transpose", x, shared=True)
transpose_transpose = Op("Transpose", _inner_transpose)


def permutation(m: Match, node: ir.Node) -> tuple[int, ...] | None:
    """Which input axis each output axis of a Transpose is; None where that is not known, or no permutation."""
    held = m.attr(node, "perm")
    if held is not None:
        return tuple(held) if sorted(held) == list(range(len(held))) else None
    dims = m.dims(node.outputs[0])
    return None if dims is None else tuple(reversed(range(len(dims))))


def keeps_order(perm: Sequence[int], dims: Sequence[Dim]) -> bool:
    """Whether a Transpose of a tensor of shape `dims` moves axes of size 1 only, so that no element moves."""
    moved = [axis for axis in perm if dims[axis] != 1]
    return moved == sorted(moved)


@exact(transpose_transpose)
def join_transposes(m: Match, g: Builder) -> ir.Value | None:
    """`Transpose(Transpose(x, p), q)` -> `Transpose(x, p[q])`, or `x` where they cancel.  Source: ONNX Transpose-1."""
    first = permutation(m, m[_inner_transpose])
    second = permutation(m, m[transpose_transpose])
    if first is None or second is None:
        return None
    perm = [first[axis] for axis in second]
    return m[x] if perm == sorted(perm) else g.op("Transpose", m[x], perm=perm)


# --- views

_view = Op(f"{_VIEWS}|Transpose", x, ..., shared=True)
view_view = Op(_VIEWS, _view, ...)
_plain_view = Op(_VIEWS, x, ..., shared=True)
transposed_view = Op("Transpose", _plain_view)
computed_reshape = Op("Reshape", x, s)
_joined_view = Op(_VIEWS, x, ..., shared=True)
_transposed = Op("Transpose", _joined_view)
viewed_transpose = Op(_VIEWS, _transposed, ...)


def reshape_target(before: Sequence[Dim], after: Sequence[Dim]) -> tuple[int, ...] | None:
    """A constant that reshapes `before` to `after`, or None where more than -1 and copied dims would be needed.

    A lone unknown dim becomes -1.  Of several, those that stand at the same place before become 0 (copied) and one more
    may be -1; then, as with every Reshape that exporters write so, a copied dim may not be 0 at run time.
    """
    if any(d == 0 for d in after):
        return None
    unknown = [i for i, d in enumerate(after) if not d.is_static]
    if len(unknown) == 1:
        return tuple(-1 if d.value is None else d.value for d in after)
    moved = [i for i in unknown if i >= len(before) or before[i] != after[i]]
    if len(moved) > 1:
        return None
    return tuple(
        -1 if i in moved else 0 if d.value is None else d.value for i, d in enumerate(after)
    )


def _reshape(m: Match, g: Builder, root: Op) -> ir.Value | None:
    """`x` in the shape of the root, by no node or one; None where the shapes are not known."""
    before, after = m.dims(x), m.dims(root)
    if before is None or after is None:
        return None
    if before == after:
        return m[x]
    target = reshape_target(before, after)
    return None if target is None else g.op("Reshape", m[x], g.ints(target, name="shape"))


def _joined_axes(m: Match) -> tuple[int, ...] | None:
    """The axes of one Squeeze or Unsqueeze that does what two of its kind do, or None."""
    inner, outer = m[_view], m[view_view]
    first, second = given_axes(m, inner, 13), given_axes(m, outer, 13)
    dims = m.dims(x)
    if inner.op_type != outer.op_type or first is None or second is None or dims is None:
        return None
    rank = len(dims)
    if inner.op_type == "Unsqueeze":
        final = rank + len(first) + len(second)
        added = {axis % final for axis in second}
        left = [axis for axis in range(final) if axis not in added]
        return tuple(sorted(added | {left[axis] for axis in first}))
    dropped = {axis % rank for axis in first}
    left = [axis for axis in range(rank) if axis not in dropped]
    return tuple(sorted(dropped | {left[axis] for axis in second}))


def _with_axes(m: Match, g: Builder, kind: str, axes: tuple[int, ...]) -> ir.Value:
    if m.opset() < 13:
        return g.op(kind, m[x], axes=axes)
    return g.op(kind, m[x], g.ints(axes, name="axes"))


def _reads_no_dim(m: Match, node: ir.Node) -> bool:
    """Whether a Reshape takes its whole shape from its second input, copying no dim of the first."""
    if node.op_type != "Reshape" or m.attr(node, "allowzero", 0):
        return node.op_type == "Reshape"
    shape = values.array(node.inputs[1])
    return shape is not None and bool((shape != 0).all())


@exact(view_view)
def join_views(m: Match, g: Builder) -> ir.Value | None:
    """A view of a view -> one Squeeze, Unsqueeze or Reshape, or `x`; a Transpose that moves no element is a view.

    Squeeze and Unsqueeze join by their axes.  Any other pair becomes a Reshape to a constant, with at most one -1 and
    copied dims (0); failing that, a Reshape keeps its shape operand where that copies no dim.
    Source: ONNX Reshape-5, -14 (allowzero), Squeeze-11, -13, Unsqueeze-11, -13, Flatten-9, Transpose-1.
    """
    inner, outer = m[_view], m[view_view]
    if inner.op_type == "Transpose" and not _moves_nothing(m, inner, x):
        return None
    if m.dims(x) is not None and m.dims(x) == m.dims(view_view):
        return m[x]
    if inner.op_type == outer.op_type and inner.op_type in ("Squeeze", "Unsqueeze"):
        axes = _joined_axes(m)
        return None if axes is None else _with_axes(m, g, inner.op_type, axes)
    made = _reshape(m, g, view_view)
    if made is None and _reads_no_dim(m, outer):
        return g.op("Reshape", m[x], outer.inputs[1], like=outer)
    if made is None and m.dims(view_view) is not None and m.dims(x) is not None:
        raise Skip("more than one unknown dim would have to be computed", inner)
    return made


def _moves_nothing(m: Match, node: ir.Node, of: Var | Op) -> bool:
    perm, dims = permutation(m, node), m.dims(of)
    return perm is not None and dims is not None and keeps_order(perm, dims)


@exact(transposed_view)
def join_transpose_into_view(m: Match, g: Builder) -> ir.Value | None:
    """`Transpose(view(x))` -> `Reshape(x)` where the Transpose moves axes of size 1 only.

    Source: ONNX Transpose-1, Reshape-5.
    """
    return (
        _reshape(m, g, transposed_view)
        if _moves_nothing(m, m[transposed_view], _plain_view)
        else None
    )


@exact(viewed_transpose)
def transpose_instead_of_transposed_view(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape(Transpose(Reshape(x)))` -> `Transpose(x)` where the first joins neighbours and the last parts them.

    x: [a, b, c, d] -> [a*b, c, d] -> [a*b, d, c] -> [a, b, d, c] is Transpose(x, [0, 1, 3, 2]): how torch.export spells
    the transposed key of an attention.  Source: ONNX Reshape-5, Transpose-1.
    """
    before, middle, after = m.dims(x), m.dims(_joined_view), m.dims(viewed_transpose)
    perm = permutation(m, m[_transposed])
    if before is None or middle is None or after is None or perm is None:
        return None
    groups = _groups(before, middle)
    if groups is None:
        return None
    order = [axis for place in perm for axis in groups[place]]
    if after != tuple(before[axis] for axis in order):
        return None
    return g.op("Transpose", m[x], perm=order)


_viewed = Op(_VIEWS, x, ..., shared=True)
_turned = Op("Transpose", _viewed)
parted_transpose = Op("Reshape", _turned, ...)


@exact(parted_transpose)
def part_before_transpose(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape(Transpose(view(x)))` -> `Transpose(Reshape(view(x)))` where the Reshape parts axes: two views meet.

    x: [S, B E] as [S, B H, D] -> [B H, S, D] -> [B, H, S, D] is Transpose of [S, B, H, D].  Source: ONNX Reshape-5.
    """
    before, middle, after = m.dims(_viewed), m.dims(_turned), m.dims(parted_transpose)
    perm = permutation(m, m[_turned])
    if before is None or middle is None or after is None or perm is None:
        return None
    groups = _groups(after, middle)
    if groups is None or len(after) == len(middle):
        return None
    order = [axis for place in range(len(before)) for axis in groups[perm.index(place)]]
    target = reshape_target(before, [after[axis] for axis in order])
    if target is None:
        return None
    apart = g.op("Reshape", m.out(_viewed), g.ints(target, name="shape"))
    return g.op("Transpose", apart, perm=tuple(order.index(axis) for axis in range(len(after))))


def _groups(before: Sequence[Dim], joined: Sequence[Dim]) -> list[list[int]] | None:
    """Which neighbouring axes of `before` each axis of `joined` joins; None where it does anything else."""
    groups: list[list[int]] = []
    axis = 0
    for size in joined:
        group = [axis]
        axis += 1
        while axis < len(before) and product(before[i] for i in group) != size:
            group.append(axis)
            axis += 1
        if group[-1] >= len(before) or product(before[i] for i in group) != size:
            return None
        groups.append(group)
    return groups if axis == len(before) else None


@exact(computed_reshape)
def reshape_to_constant(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape(x, computed)` -> `Reshape(x, constant)`: known dims, 0 for dims of x in place, at most one -1.

    `[d0, d1, 4, d2/4]` of x: [d0, d1, 256] becomes `[0, 0, 4, 64]`.  Source: ONNX Reshape-5, -14.
    """
    before, after = m.dims(x), m.dims(computed_reshape)
    if before is None or after is None:
        return None
    if _contradicts(m.out(computed_reshape), after):
        raise Skip("the shape declared for the graph output is wrong", m[s])
    target = reshape_target(before, after)
    if target is None:
        raise Skip("more than one unknown dim has to be computed", m[s])
    return g.op("Reshape", m[x], g.ints(target, name="shape"))


def _contradicts(value: ir.Value, dims: Sequence[Dim]) -> bool:
    """Whether a graph output is declared with another shape: a constant would bring that to light, and be refused."""
    if not value.is_graph_output() or value.shape is None:
        return False
    declared = [size if isinstance(size, int) else None for size in value.shape]
    if len(declared) != len(dims):
        return True
    return any(
        a is not None and b.is_static and b != a for a, b in zip(declared, dims, strict=True)
    )


RULES = (
    join_casts,
    join_transposes,
    transpose_instead_of_transposed_view,
    part_before_transpose,
    join_views,
    join_transpose_into_view,
    reshape_to_constant,
)
