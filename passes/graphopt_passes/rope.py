"""Rotary position embedding: both halves of each head, turned by an angle per position.

    Before:  y = x * cos + Concat(-x[..., D/2:], x[..., :D/2]) * sin
    After:   y = RotaryEmbedding(x, cos[..., :D/2], sin[..., :D/2])

The operator takes one angle per pair of elements, exporters write each twice: that both copies are equal is read off
the graph (a table whose halves are equal, Concat(a, a) before Cos and Sin).  Changes numerics: reordered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, is_cut_to
from graphopt.rewrite import Either, Match, Op, Rule, Skip, Var, rule
from graphopt_passes.angles import every_other_of_rest, single_angles
from graphopt_passes.constants import no_operator

OPSETS = (10, 10_000)
"""Opsets whose Slice takes its axes as input; what is put in place needs opset 23 in any case."""

MAX_DEPTH = 8
"""Cuts of cuts between a part of a head and the whole."""

x, cos, sin = Var(), Var(), Var()
first, second = Var(), Var()

turned = Op("Concat", Op("Neg", second), first)
rotated = Op("Add", Op("Mul", x, cos), Op("Mul", turned, sin))


@rule(rotated, opset=OPSETS)
def fuse_rotate_half(m: Match, g: Builder) -> ir.Value | None:
    """`x * cos + Concat(-x2, x1) * sin` -> `RotaryEmbedding(x, cos', sin')`, x1 and x2 the halves of x.

    x: [B, H, S, D], [B, S, H, D] or [B, S, D]; cos, sin: one per position, their halves equal; cos', sin': [B, S, D/2].
    Source: RotaryEmbedding-23; arXiv:2104.09864.
    """
    return _fuse_doubled(m, g, turned, _halves)


stacked = Op(
    "Concat",
    Op("Unsqueeze|Reshape", Op("Neg", second), ...),
    Op("Unsqueeze|Reshape", first, ...),
)
every_two = Op("Reshape|Flatten", stacked, ...)
rotated_pairs = Op("Add", Op("Mul", x, cos), Op("Mul", every_two, sin))


@rule(rotated_pairs, opset=OPSETS)
def fuse_rotate_every_two(m: Match, g: Builder) -> ir.Value | None:
    """`x * cos + [-x1, x0, -x3, x2, …] * sin` -> `RotaryEmbedding(x, cos', sin', interleaved=1)`.

    As `fuse_rotate_half`, for pairs of neighbours, as of GPT-J; each angle stands twice in cos and sin.
    Source: RotaryEmbedding-23; arXiv:2104.09864.
    """
    return _fuse_doubled(m, g, stacked, _pairs)


def _fuse_doubled(m: Match, g: Builder, joined: Op, parts: _Parts) -> ir.Value | None:
    """The operator for a product with angles that stand there twice."""
    if not _is_last(m, joined, len(m.known_dims(joined))):
        return None
    source = next(
        (v for v in (m[x], m[cos]) if parts(m, v, m[first], m[second])),
        None,
    )
    if source is None:
        return None
    angles = m[cos] if source is m[x] else m[x]
    layout = _Layout.of(m, source, angles, doubled=True)
    _refuse_without_operator(m, source, layout)
    pairs = parts is _pairs
    caches = [_cache(m, g, each, layout, doubled=True, pairs=pairs) for each in (angles, m[sin])]
    return layout.rotate(g, source, caches, interleaved=pairs)


lower = Op("Sub", Op("Mul", first, cos), Op("Mul", second, sin))
upper = Op("Add", Op("Mul", second, cos), Op("Mul", first, sin))
joined = Op("Concat", lower, upper)


@rule(joined, opset=OPSETS)
def fuse_rotated_halves(m: Match, g: Builder) -> ir.Value | None:
    """`Concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)` -> `RotaryEmbedding(x, cos, sin)`, x1 and x2 the halves of x.

    x as in `fuse_rotate_half`; cos, sin: one per position and pair.
    Source: RotaryEmbedding-23; arXiv:2104.09864.
    """
    return _fuse_parts(m, g, joined, _halves)


woven = Op("Concat", Op("Unsqueeze|Reshape", lower, ...), Op("Unsqueeze|Reshape", upper, ...))
interleaved = Op("Reshape|Flatten", woven, ...)


@rule(interleaved, opset=OPSETS)
def fuse_rotated_pairs(m: Match, g: Builder) -> ir.Value | None:
    """`[x0 cos - x1 sin, x0 sin + x1 cos, …]` -> `RotaryEmbedding(x, cos, sin, interleaved=1)`, x0 and x1 neighbours.

    x as in `fuse_rotate_half`; cos, sin: one per position and pair.
    Source: RotaryEmbedding-23; arXiv:2104.09864.
    """
    return _fuse_parts(m, g, woven, _pairs)


def _fuse_parts(m: Match, g: Builder, whole: Op, parts: _Parts) -> ir.Value | None:
    """The operator for parts that are multiplied by the angles one by one."""
    if not _is_last(m, whole, len(m.known_dims(whole))):
        return None
    # The pattern is the same with the roles of halves and angles changed: which are the halves, the graph says.
    for one, other, angles in (
        (m[first], m[second], (m[cos], m[sin])),
        (m[cos], m[sin], (m[first], m[second])),
    ):
        source, dims = _common_source(m, one, other, parts), None
        if source is None and parts is _pairs:
            source, dims = _joined_pairs(m, g, one, other)
        if source is not None:
            layout = _Layout.of(m, source, angles[0], doubled=False, dims=dims)
            _refuse_without_operator(m, one, layout)
            caches = [_cache(m, g, each, layout, doubled=False) for each in angles]
            return layout.rotate(g, source, caches, interleaved=parts is _pairs)
    return None


def _joined_pairs(
    m: Match, g: Builder, one: ir.Value, other: ir.Value
) -> tuple[ir.Value | None, tuple[Dim, ...] | None]:
    """The tensor [B, H, S, D], and its dims, of whose view [B, H, S, D/2, 2] two values are the even and odd elements.

    Where there is only `Transpose(…[B, S, H, D/2, 2])`, the view having been moved before the Transpose.
    """
    nodes = [each.producer() for each in (one, other)]
    at = [None if n is None or not n.inputs else _index_of_last(m, n) for n in nodes]
    if at[0] is None or at[1] is None or at[0][0] is not at[1][0] or (at[0][1], at[1][1]) != (0, 1):
        return None, None
    maker = at[0][0].producer()
    if maker is None or maker.op_type != "Transpose" or maker.inputs[0] is None:
        return None, None
    dims, perm = m.known_dims(at[0][0]), tuple(m.attr(maker, "perm", ()))
    width = dims[-2].value if len(dims) == 5 and dims[-1] == 2 else None
    if not width or perm[3:] != (3, 4):
        return None, None
    flat = g.op("Reshape", maker.inputs[0], g.ints([0, 0, 0, 2 * width]))
    return g.op("Transpose", flat, perm=(*perm[:3], 3)), (*dims[:3], Dim.of(2 * width))


head, tail = Op("Slice", x, ..., shared=True), Op("Slice", x, ..., shared=True)
split_head = Op("Split", x, ..., shared=True)
split_tail = Op("Split", x, ..., output=1, shared=True)
rotary = Op("RotaryEmbedding", Either(head, split_head), cos, sin)
partial = Op("Concat", rotary, Either(tail, split_tail))


@rule(partial, opset=(23, 10_000))
def widen_partial_rotation(m: Match, g: Builder) -> ir.Value | None:
    """`Concat(RotaryEmbedding(x[..., :r]), x[..., r:])` -> `RotaryEmbedding(x, rotary_embedding_dim=r)`.

    x: [B, H, S, D].  Source: RotaryEmbedding-23.
    """
    turn = _turned_width(m, partial, m[rotary].inputs[0])
    if turn is None:
        return None
    return g.op("RotaryEmbedding", m[x], m[cos], m[sin], like=m[rotary], rotary_embedding_dim=turn)


flat = Op("Reshape", Either(head, split_head), ...)
rotary_beside = Op("RotaryEmbedding", flat, cos, sin)
apart = Op("Reshape", rotary_beside, ...)
partial_beside = Op("Concat", apart, Either(tail, split_tail))


@rule(partial_beside, opset=(23, 10_000))
def widen_partial_rotation_in_place(m: Match, g: Builder) -> ir.Value | None:
    """As `widen_partial_rotation`, x: [B, S, H, D], which the operator takes as [B, S, H D].

    Source: RotaryEmbedding-23, 3-dimensional input.
    """
    turn, heads = _turned_width(m, partial_beside, m[flat].inputs[0]), m.known_dims(x)[2].value
    if turn is None or heads is None or heads != m.attr(rotary_beside, "num_heads", 0):
        return None
    if m.known_dims(apart) != (*m.known_dims(x)[:3], Dim.of(turn)):
        return None
    width = int(m.known_dims(x)[3])
    whole = g.op("Reshape", m[x], g.ints([0, 0, heads * width]))
    made = g.op(
        "RotaryEmbedding", whole, m[cos], m[sin], like=m[rotary_beside], rotary_embedding_dim=turn
    )
    return g.op("Reshape", made, g.ints([0, 0, heads, width]))


def _turned_width(m: Match, whole: Op, part: ir.Value | None) -> int | None:
    """How much of each head x [., ., ., D] is turned and put before the rest; None where it is none of that."""
    dims, rest = m.known_dims(x), m[whole].inputs[1]
    if len(dims) != 4 or part is None or rest is None or not _is_last(m, whole, 4):
        return None
    width, turn = dims[-1].value, m.known_dims(part)[-1].value
    turner = rotary_beside if whole is partial_beside else rotary
    if width is None or turn is None or m.attr(turner, "rotary_embedding_dim", 0):
        return None
    base, start, end = _place(m, m[x]) or (m[x], 0, width)
    middle = start + turn
    if _place(m, part) != (base, start, middle) or _place(m, rest) != (base, middle, end):
        return None
    return turn if m.emits("RotaryEmbedding", dtype=m.dtype(x)) else None


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where batch, positions and heads of a rotated tensor are.

    Attributes:
        batch: size of the batch.
        positions: their number.
        heads: their number where they lie beside each other, [B, S, H, D]; 1 without heads, [B, S, D]; else None.
        rank: of the tensor.
        width: of a head.
        source: the tensor.
        dims: of the tensor.
    """

    batch: Dim
    positions: Dim
    heads: Dim | None
    rank: int
    width: int
    source: ir.Value
    dims: tuple[Dim, ...]

    @staticmethod
    def of(
        m: Match,
        source: ir.Value,
        angles: ir.Value,
        *,
        doubled: bool,
        dims: tuple[Dim, ...] | None = None,
    ) -> _Layout:
        """The layout of `source`, told by the axis along which the angles vary; `dims` where it is a new value.

        Raises:
            Skip: they vary along none or several, or a size is unknown.
        """
        dims, own = dims or m.known_dims(source), m.known_dims(angles)
        width = dims[-1].value
        if len(dims) not in (3, 4) or width is None:
            raise Skip("not [B, H, S, D], [B, S, H, D] or [B, S, D]", source)
        fits = len(own) > 1 and own[-1] == (width if doubled else width // 2)
        if fits and len(dims) == 3 and is_cut_to(own[-2], dims[1]):
            return _Layout(dims[0], dims[1], Dim.of(1), 3, width, source, dims)
        if (
            fits
            and len(dims) == 4
            and is_cut_to(own[-2], dims[2])
            and (len(own) < 3 or own[-3] == 1)
        ):
            return _Layout(dims[0], dims[2], None, 4, width, source, dims)
        apart = fits and len(dims) == 4 and len(own) > 2 and own[-2] == 1
        apart = apart and is_cut_to(own[-3], dims[1])
        if apart and dims[2].is_static:
            return _Layout(dims[0], dims[1], dims[2], 4, width, source, dims)
        raise Skip("the angles are not one per position and pair", angles)

    def rotate(
        self, g: Builder, source: ir.Value, caches: list[ir.Value], *, interleaved: bool
    ) -> ir.Value:
        """The operator, on a view where heads lie beside each other."""
        by = 1 if interleaved else None
        if self.heads is None:
            return g.op("RotaryEmbedding", source, *caches, interleaved=by)
        heads = int(self.heads)
        if self.rank == 3:
            return g.op("RotaryEmbedding", source, *caches, num_heads=1, interleaved=by)
        flat = g.op("Reshape", source, g.ints([0, 0, heads * self.width]))
        made = g.op("RotaryEmbedding", flat, *caches, num_heads=heads, interleaved=by)
        return g.op("Reshape", made, g.ints([0, 0, heads, self.width]))


def _refuse_without_operator(m: Match, source: ir.Value, layout: _Layout) -> None:
    dtype, form = source.dtype, "" if layout.heads is None else "heads-in-place"
    if not m.emits("RotaryEmbedding", dtype=dtype) or not m.emits(
        "RotaryEmbedding", dtype=dtype, form=form
    ):
        raise Skip(no_operator(m, "RotaryEmbedding", dtype), source)


def _is_last(m: Match, node: Op, rank: int) -> bool:
    return int(m.attr(node, "axis", 0)) % rank == rank - 1


_Parts: TypeAlias = Callable[[Match, ir.Value, ir.Value, ir.Value], bool]


def _halves(m: Match, source: ir.Value, one: ir.Value, other: ir.Value) -> bool:
    """Whether two values are the first and second half of a third along its last axis."""
    dims = m.dims(source)
    width = None if not dims else dims[-1].value
    place = _place(m, source)
    if width is None or width % 2 or place is None:
        return False
    base, start, end = place
    middle = start + width // 2
    return _place(m, one) == (base, start, middle) and _place(m, other) == (base, middle, end)


def _place(m: Match, value: ir.Value, depth: int = MAX_DEPTH) -> tuple[ir.Value, int, int] | None:
    """The value that a Slice or Split along the last axis takes from, at the end of a chain; from where to where."""
    dims, node = m.dims(value), value.producer()
    width = None if not dims else dims[-1].value
    if dims is None or width is None:
        return None
    cut = None if node is None or node.domain else _cut(m, node, value, len(dims))
    source = None if node is None or cut is None else node.inputs[0]
    outer = None if source is None or depth == 0 else _place(m, source, depth - 1)
    if cut is None or outer is None:
        return value, 0, width
    base, offset, _ = outer
    return base, offset + cut[0], offset + cut[1]


def _cut(m: Match, node: ir.Node, value: ir.Value, rank: int) -> tuple[int, int] | None:
    """From where to where a Slice or Split takes `value` of the last axis; None where it does anything else."""
    dims = m.dims(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if dims is None or dims[-1].value is None:
        return None
    if node.op_type == "Slice":
        return _slice(node, rank, dims[-1].value, 1)
    if node.op_type != "Split" or int(m.attr(node, "axis", 0)) % rank != rank - 1:
        return None
    sizes = [m.known_dims(out)[-1].value for out in node.outputs]
    index = node.outputs.index(value)
    if None in sizes:
        return None
    start = sum(int(size or 0) for size in sizes[:index])
    return start, start + int(sizes[index] or 0)


def _slice(node: ir.Node, rank: int, width: int, step: int) -> tuple[int, int] | None:
    """Start and end of a Slice of the last axis alone, in that step."""
    given = [values.array(v) for v in node.inputs[1:]]
    if len(given) < 3 or any(data is None or data.size != 1 for data in given):
        return None
    start, end, axis, *by = (int(data.reshape(-1)[0]) for data in given if data is not None)
    if axis % rank != rank - 1 or (by or [1]) != [step]:
        return None
    return slice(start, end).indices(width)[:2]


def _pairs(m: Match, source: ir.Value, one: ir.Value, other: ir.Value) -> bool:
    """Whether two values are the even and the odd elements of a third along its last axis."""
    return _element(m, one, source) == 0 and _element(m, other, source) == 1


def _element(m: Match, value: ir.Value, source: ir.Value) -> int | None:
    """Which of each pair of neighbours in `source` a value takes: every other element, or one of [..., D/2, 2]."""
    found = _pair_of(m, value)
    if found is not None and found[0] is source:
        return found[1]
    of_part = _element_of_part(m, value, source)
    return every_other_of_rest(m, value, source) if of_part is None else of_part


def _element_of_part(m: Match, value: ir.Value, source: ir.Value) -> int | None:
    """The same, where `source` is a part of a head, and the value takes every other element of it out of the whole."""
    node, place = value.producer(), _place(m, source)
    if node is None or node.domain or node.op_type != "Slice" or place is None:
        return None
    cut_from = node.inputs[0]
    origin = None if cut_from is None else _place(m, cut_from)
    if cut_from is None or origin is None or origin[0] is not place[0]:
        return None
    dims, (_, start, end) = m.known_dims(cut_from), place
    cut = _slice(node, len(dims), origin[2] - origin[1], 2)
    if cut is None or (end - start) % 2:
        return None
    first, taken = origin[1] + cut[0] - start, len(range(cut[0], cut[1], 2))
    return first if first in (0, 1) and 2 * taken == end - start else None


def _pair_of(m: Match, value: ir.Value) -> tuple[ir.Value, int] | None:
    """The tensor and which of each pair of its neighbours a value takes."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None or node.domain:
        return None
    source, dims = node.inputs[0], m.dims(node.inputs[0])
    if node.op_type == "Slice" and dims is not None and dims[-1].value is not None:
        cut = _slice(node, len(dims), dims[-1].value, 2)
        whole = cut is not None and cut[1] == dims[-1].value and not cut[1] % 2
        return (source, cut[0]) if whole and cut is not None and cut[0] in (0, 1) else None
    at = _index_of_last(m, node)
    return None if at is None else _before_pairing(m, at)


def _index_of_last(m: Match, node: ir.Node) -> tuple[ir.Value, int] | None:
    """The tensor and the index that a Gather, or a Squeeze of a Slice or Split, takes along its last axis of 2."""
    source = node.inputs[0]
    dims = None if source is None else m.dims(source)
    if source is None or dims is None:
        return None
    if node.op_type == "Gather":
        place = values.array(node.inputs[1])
        last = int(m.attr(node, "axis", 0)) % len(dims) == len(dims) - 1
        return (source, int(place) % 2) if last and place is not None and not place.ndim else None
    cutter = source.producer()
    if node.op_type not in ("Squeeze", "Reshape") or cutter is None or cutter.domain:
        return None
    own, cut = m.dims(node.outputs[0]), _cut(m, cutter, source, len(dims))
    pairs = cutter.inputs[0]
    if own != dims[:-1] or dims[-1] != 1 or cut is None or pairs is None:
        return None
    return pairs, cut[0]


def _before_pairing(m: Match, at: tuple[ir.Value, int]) -> tuple[ir.Value, int] | None:
    """[..., D] and the index, for an index into its view [..., D/2, 2]."""
    pairs, index = at
    node, dims = pairs.producer(), m.dims(pairs)
    source = None if node is None or node.op_type != "Reshape" else node.inputs[0]
    own = None if source is None else m.dims(source)
    if source is None or own is None or dims is None or dims[-1] != 2 or not own:
        return None
    return (source, index) if (*dims[:-2], dims[-2] * 2) == own else None


def _common_source(m: Match, one: ir.Value, other: ir.Value, parts: _Parts) -> ir.Value | None:
    """The tensor of which two values are the parts."""
    if parts is _pairs:
        found = _pair_of(m, one)
        source = None if found is None else found[0]
    else:
        node = one.producer()
        source = node.inputs[0] if node is not None and node.op_type in ("Slice", "Split") else None
    return source if source is not None and parts(m, source, one, other) else None


def _cache(
    m: Match,
    g: Builder,
    angles: ir.Value,
    layout: _Layout,
    *,
    doubled: bool,
    pairs: bool = False,
) -> ir.Value:
    """Cosines or sines as [B, S, D/2], out of what broadcasts against the rotated tensor.

    Raises:
        Skip: their copies are not known to be equal, or they differ between heads.
    """
    own = m.known_dims(angles)
    if _Layout.of(m, layout.source, angles, doubled=doubled, dims=layout.dims) != layout:
        raise Skip("cosines and sines are laid out differently", angles)
    if len(own) == layout.rank and own[0] not in (1, layout.batch):
        raise Skip("the angles broaden the batch", angles)
    halved = single_angles(m, g, angles, pairs=pairs) if doubled else angles
    if halved is None:
        raise Skip("the copies of the angles are not known to be equal", angles)
    rank = len(own)
    if layout.rank == 4 and (rank == 4 or layout.heads is not None):
        place = rank - (3 if layout.heads is None else 2)
        halved = g.op("Squeeze", halved, g.ints([place]))
        rank -= 1
    if rank == 2:
        halved = g.op("Unsqueeze", halved, g.ints([0]))
    one = rank == 2 or own[0] == 1 or len(own) < layout.rank
    return _for_each(g, halved, layout) if one and layout.batch != 1 else halved


def _for_each(g: Builder, value: ir.Value, layout: _Layout) -> ir.Value:
    """[1, S, D/2] repeated for a batch, which the operator does not broadcast over."""
    if layout.batch.value is not None:
        return g.op("Expand", value, g.ints([layout.batch.value, 1, 1]))
    size = g.op("Shape", layout.source, start=0, end=1)
    return g.op("Expand", value, g.op("Concat", size, g.ints([1, 1]), axis=0))


RULES: tuple[Rule, ...] = (
    fuse_rotate_half,
    fuse_rotate_every_two,
    fuse_rotated_halves,
    fuse_rotated_pairs,
    widen_partial_rotation,
    widen_partial_rotation_in_place,
)
