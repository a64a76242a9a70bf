"""Rotary position embedding: both halves of each head, turned by an angle per position.

    Before:  y = x * cos + Concat(-x[..., D/2:], x[..., :D/2]) * sin
    After:   y = RotaryEmbedding(x, cos[..., :D/2], sin[..., :D/2])

The operator takes one angle per pair of elements, exporters write each twice: that both copies are equal is read off
the graph (a table whose halves are equal, Concat(a, a) before Cos and Sin).  Changes numerics: reordered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Either, Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import from_front, given_axes, no_operator

OPSETS = (13, 10_000)
"""Opsets whose Slice, Squeeze and Unsqueeze take their axes as inputs."""

MAX_DEPTH = 8
"""Nodes between the angles and where they are used: Cos, Cast, a scale, Unsqueeze, Gather and the like."""

_PER_ELEMENT = frozenset({"Cos", "Sin", "Cast", "Neg", "Identity"})

x, cos, sin = Var(), Var(), Var()


def _half(index: int) -> tuple[Op, Op]:
    """The first or second half of x, as a Slice and as an output of a Split."""
    return Op("Slice", x, ..., shared=True), Op("Split", x, ..., output=index, shared=True)


first_slice, first_split = _half(0)
second_slice, second_split = _half(1)
first, second = Either(first_slice, first_split), Either(second_slice, second_split)
turned = Op("Concat", Op("Neg", second), first)
rotated = Op("Add", Op("Mul", x, cos), Op("Mul", turned, sin))


@rule(rotated, opset=OPSETS)
def fuse_rotate_half(m: Match, g: Builder) -> ir.Value | None:
    """`x * cos + Concat(-x2, x1) * sin` -> `RotaryEmbedding(x, cos', sin')`, x = [B, H, S, D], x1 and x2 its halves.

    cos, sin: broadcast to [B, 1, S, D], their halves equal; cos', sin': [B, S, D/2].
    Source: RotaryEmbedding-23; arXiv:2104.09864.
    """
    dims = m.known_dims(x)
    if len(dims) != 4 or dims[3].value is None or not _is_last(m, turned, 4):
        return None
    if not (_is_half(m, m[first], 0, dims) and _is_half(m, m[second], 1, dims)):
        return None
    _refuse_without_operator(m)
    caches = [_cache(m, g, m[angles], dims, doubled=True) for angles in (cos, sin)]
    return g.op("RotaryEmbedding", m[x], *caches)


def _product(half: Either, angles: Var) -> Op:
    return Op("Mul", half, angles)


lower = Op("Sub", _product(first, cos), _product(second, sin))
upper = Op("Add", _product(second, cos), _product(first, sin))
joined = Op("Concat", lower, upper)


@rule(joined, opset=OPSETS)
def fuse_rotated_halves(m: Match, g: Builder) -> ir.Value | None:
    """`Concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)` -> `RotaryEmbedding(x, cos, sin)`, x1 and x2 the halves of x.

    x: [B, H, S, D], cos and sin: broadcast to [B, 1, S, D/2].
    Source: RotaryEmbedding-23; arXiv:2104.09864.
    """
    dims = m.known_dims(x)
    if len(dims) != 4 or dims[3].value is None or not _is_last(m, joined, 4):
        return None
    if not (_is_half(m, m[first], 0, dims) and _is_half(m, m[second], 1, dims)):
        return None
    _refuse_without_operator(m)
    caches = [_cache(m, g, m[angles], dims, doubled=False) for angles in (cos, sin)]
    return g.op("RotaryEmbedding", m[x], *caches)


head, tail = Op("Slice", x, ..., shared=True), Op("Slice", x, ..., shared=True)
rotary = Op("RotaryEmbedding", head, cos, sin)
partial = Op("Concat", rotary, tail)


@rule(partial, opset=(23, 10_000))
def widen_partial_rotation(m: Match, g: Builder) -> ir.Value | None:
    """`Concat(RotaryEmbedding(x[..., :r]), x[..., r:])` -> `RotaryEmbedding(x, rotary_embedding_dim=r)`.

    Source: RotaryEmbedding-23.
    """
    dims, inner = m.known_dims(x), m.known_dims(head)
    width, turn = dims[-1].value, inner[-1].value
    if len(dims) != 4 or width is None or turn is None or not _is_last(m, partial, 4):
        return None
    if any(m.attr(rotary, name, 0) for name in ("rotary_embedding_dim", "interleaved")):
        return None
    if _cut(m[head], dims) != (0, turn) or _cut(m[tail], dims) != (turn, width):
        return None
    if not m.emits("RotaryEmbedding", dtype=m.dtype(x)):
        return None
    return g.op("RotaryEmbedding", m[x], m[cos], m[sin], rotary_embedding_dim=turn)


def _refuse_without_operator(m: Match) -> None:
    dtype = m.dtype(x)
    if not m.emits("RotaryEmbedding", dtype=dtype):
        raise Skip(no_operator(m, "RotaryEmbedding", dtype), m[x])


def _is_last(m: Match, node: Op, rank: int) -> bool:
    return int(m.attr(node, "axis", 0)) % rank == rank - 1


def _is_half(m: Match, value: ir.Value, index: int, dims: tuple[Dim, ...]) -> bool:
    """Whether `value` is the first or second half of x along its last axis."""
    node = value.producer()
    assert node is not None
    width = int(dims[-1])
    if node.op_type == "Slice":
        return _cut(node, dims) == ((0, width // 2), (width // 2, width))[index]
    axis = int(m.attr(node, "axis", 0)) % len(dims)
    own = m.dims(value)
    return (
        axis == len(dims) - 1 and own is not None and own[-1].value == width // 2 and not width % 2
    )


def _cut(node: ir.Node, dims: tuple[Dim, ...]) -> tuple[int, int] | None:
    """From where to where a Slice takes of the last axis; None where it does more, or it is not known."""
    given = [values.array(v) for v in node.inputs[1:]]
    if len(given) < 3 or any(data is None or data.size != 1 for data in given):
        return None
    start, end, axis, *step = (int(data.reshape(-1)[0]) for data in given if data is not None)
    width = int(dims[-1])
    if axis % len(dims) != len(dims) - 1 or step not in ([], [1]):
        return None
    return slice(start, end).indices(width)[:2]


def _cache(
    m: Match, g: Builder, angles: ir.Value, dims: tuple[Dim, ...], *, doubled: bool
) -> ir.Value:
    """Cosines or sines as [B, S, D/2], out of what broadcasts against x.

    Raises:
        Skip: their halves are not known to be equal, or they differ between heads.
    """
    own = m.known_dims(angles)
    last = int(dims[3]) if doubled else int(dims[3]) // 2
    fits = len(own) <= 4 and own[-1].value == last and len(own) > 1 and own[-2] == dims[2]
    if not fits or (len(own) > 2 and own[-3].value != 1):
        raise Skip("the angles are not one per position and pair", angles)
    if len(own) == 4 and own[0].value != 1 and own[0] != dims[0]:
        raise Skip("the angles broaden the batch", angles)
    halved = _halved(m, g, angles, MAX_DEPTH) if doubled else angles
    if halved is None:
        raise Skip("the halves of the angles are not known to be equal", angles)
    if len(own) == 2:
        halved = g.op("Unsqueeze", halved, g.ints([0]))
    if len(own) == 4:
        halved = g.op("Squeeze", halved, g.ints([1]))
    one = len(own) < 4 or own[0].value == 1
    return _for_each(m, g, halved, dims[0]) if one and dims[0].value != 1 else halved


def _for_each(m: Match, g: Builder, value: ir.Value, batch: Dim) -> ir.Value:
    """[1, S, D/2] repeated for a batch, which the operator does not broadcast over."""
    if batch.value is not None:
        return g.op("Expand", value, g.ints([batch.value, 1, 1]))
    size = g.op("Shape", m[x], start=0, end=1)
    return g.op("Expand", value, g.op("Concat", size, g.ints([1, 1]), axis=0))


def _halved(m: Match, g: Builder, value: ir.Value, depth: int) -> ir.Value | None:
    """The first half of `value` along its last axis, where the second is equal to it; None where that is not known."""
    data = values.array(value)
    if data is not None:
        return _halved_table(g, data)
    node = value.producer()
    if node is None or node.domain or depth == 0:
        return None
    if node.op_type == "Concat":
        dims = m.dims(value)
        twice = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        return node.inputs[0] if twice and dims and _ends(m, node, len(dims)) else None
    inner = None
    if node.inputs and node.inputs[0] is not None and _keeps_last_axis(m, node):
        inner = _halved(m, g, node.inputs[0], depth - 1)
    if inner is not None:
        return g.op(node.op_type, inner, *node.inputs[1:], like=node)
    return _halved_scaled(m, g, node, depth)


def _halved_scaled(m: Match, g: Builder, node: ir.Node, depth: int) -> ir.Value | None:
    """A product with one number, as of scaled rotary embeddings."""
    if node.op_type != "Mul":
        return None
    for index, factor in enumerate(node.inputs):
        tensor, other = values.constant(factor), node.inputs[1 - index]
        if tensor is None or tensor.size != 1 or other is None or factor is None:
            continue
        inner = _halved(m, g, other, depth - 1)
        return None if inner is None else g.op("Mul", inner, factor)
    return None


def _halved_table(g: Builder, data: npt.NDArray[Any]) -> ir.Value | None:
    width = data.shape[-1] if data.ndim else 1
    if width % 2 or not np.array_equal(data[..., : width // 2], data[..., width // 2 :]):
        return None
    return g.const(np.ascontiguousarray(data[..., : width // 2]), name="angles")


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


RULES: tuple[Rule, ...] = (fuse_rotate_half, fuse_rotated_halves, widen_partial_rotation)
