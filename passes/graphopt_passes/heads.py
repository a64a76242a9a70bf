"""Heads side by side: attention and rotation of [B, S, H D], where no head has to be moved to the front and back.

    Before:  y = Transpose(Attention(Transpose(q), Transpose(k), Transpose(v)))     q, k, v: [B, S, H, D]
    After:   y = Attention(q, k, v, q_num_heads=H, kv_num_heads=H)                  q, k, v: [B, S, H D]

The kernels step over the other heads, so that four copies fall away.  Changes numerics: exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Skip, Var, exact, rule
from graphopt_passes.constants import live_uses
from graphopt_passes.keys import shares
from graphopt_passes.masks import Hidden
from graphopt_passes.repeats import unrepeated

TO_FRONT = (0, 2, 1, 3)
"""[B, S, H, D] <-> [B, H, S, D]."""

BATCH_FIRST = (1, 0, 2)
"""[S, B, …] <-> [B, S, …]."""

TO_FRONT_OF_BATCH, FROM_FRONT_OF_BATCH = (1, 2, 0, 3), (2, 0, 1, 3)
"""[S, B, H, D] -> [B, H, S, D] -> [S, B, H, D]."""

q, k, v, seen = Var(), Var(), Var(), Var()
attention = Op("Attention", q, k, v, ...)
zeroed = Op("Where", seen, attention, Lit(0.0))
back = Op("Transpose", Either(zeroed, attention))


@exact(back, opset=(23, 10_000))
def keep_heads_in_place(m: Match, g: Builder) -> ir.Value | None:
    """`Transpose(Attention(Transpose(q), Transpose(k), Transpose(v)))` -> `Attention` of [B, S, H D].

    q, k, v: [B, S, H, D], each Transpose by (0, 2, 1, 3), or [S, B, H, D] (nn.MultiheadAttention), where the sequence
    still moves behind the batch, but in [S, B, H D], where it may cancel.  Values that come with heads in front keep
    all as it is.  Queries that see no key are made zero in [B, S, H D] as well.
    Source: Attention-23, 3-dimensional inputs.
    """
    node = m[attention]
    end = tuple(m.attr(back, "perm", ()))
    if end not in (TO_FRONT, FROM_FRONT_OF_BATCH) or m.attr(node, "q_num_heads", 0):
        return None
    if not m.emits("Attention", dtype=m.dtype(q), form="heads-in-place"):
        return None
    if any(v is not None for v in node.inputs[4:]) or _has_outputs(node):
        raise Skip("past or present keys have their heads in front", node)
    sources = [_source(m, operand) for operand in (q, k, v)]
    if sources[0] is None or sources[1] is None or sources[2] is None:
        raise Skip("queries, keys and values do not all come from [B, S, H, D]", node)
    heads = [m.known_dims(operand)[1].value for operand in (q, k, v)]
    width = m.known_dims(attention)[3].value
    if None in heads or width is None:
        raise Skip("the number or the size of the heads is unknown", node)
    rows = _rows_seen(m, g)
    flat = [_flat(m, g, *each) for each in sources if each is not None]
    made = g.op(
        "Attention",
        *flat,
        *node.inputs[3:4],
        like=node,
        q_num_heads=heads[0],
        kv_num_heads=heads[1],
    )
    made = rows.zeroed(g, made, m.dtype(q))
    if end != TO_FRONT:
        made = g.op("Transpose", made, perm=BATCH_FIRST)
    return g.op("Reshape", made, g.ints([0, 0, int(heads[0] or 0), width]))


def _rows_seen(m: Match, g: Builder) -> Hidden:
    """Which queries see a key, [B, S, 1], of the same for all heads, [B, 1, S, 1] or less.

    Raises:
        Skip: that differs between heads.
    """
    if not m.has(zeroed):
        return Hidden(None)
    dims = m.known_dims(seen)
    if not dims or dims[-1] != 1 or any(dim != 1 for dim in dims[-3:-2]):
        raise Skip("queries are made zero for some heads alone", m[zeroed])
    return Hidden(None, g.op("Squeeze", m[seen], g.ints([1])) if len(dims) == 4 else m[seen])


def _has_outputs(node: ir.Node) -> bool:
    return any(out.uses() or out.is_graph_output() for out in node.outputs[1:])


def _source(m: Match, operand: Var) -> tuple[ir.Value, bool] | None:
    """[B, S, H, D] whose heads a Transpose brings to the front; or [S, B, H, D], and True."""
    maker = m[operand].producer()
    if maker is None or maker.op_type != "Transpose" or maker.domain:
        return None
    source, perm = maker.inputs[0], tuple(m.attr(maker, "perm", ()))
    dims = None if source is None else m.dims(source)
    if source is None or dims is None or perm not in (TO_FRONT, TO_FRONT_OF_BATCH):
        return None
    static = dims[2].is_static and dims[3].is_static
    return (source, perm == TO_FRONT_OF_BATCH) if static else None


def _flat(m: Match, g: Builder, source: ir.Value, late_batch: bool = False) -> ir.Value:
    """[B, S, H, D] as [B, S, H D]: what it was before it was divided, or a view; [S, B, H, D] with `late_batch`."""
    dims = m.known_dims(source)
    width = int(dims[2]) * int(dims[3])
    maker = source.producer()
    whole = None if maker is None or maker.op_type != "Reshape" else maker.inputs[0]
    if whole is None or m.dims(whole) != (dims[0], dims[1], Dim.of(width)):
        whole = g.op("Reshape", source, g.ints([0, 0, width]))
    return g.op("Transpose", whole, perm=BATCH_FIRST) if late_batch else whole


back_of_batch = Op("Transpose", Either(zeroed, attention))


@exact(back_of_batch, opset=(23, 10_000))
def take_heads_out_of_batch(m: Match, g: Builder) -> ir.Value | None:
    """Attention of [B H, S, D] between Transposes from and to [S, B H, D] -> Attention of [B, S, H D].

    As nn.MultiheadAttention computes where its weights might be asked for: heads count as rows of the batch, q, k, v:
    [S, B, H D] as [S, B H, D].  Source: Attention-23.
    """
    node = m[attention]
    single = m.attr(node, "q_num_heads", 0) == m.attr(node, "kv_num_heads", 0) == 1
    if not single or tuple(m.attr(back_of_batch, "perm", ())) != BATCH_FIRST or _has_outputs(node):
        return None
    if not m.emits("Attention", dtype=m.dtype(q), form="heads-in-place"):
        return None
    found = [_of_sequence(m, m[operand]) for operand in (q, k, v)]
    width = m.known_dims(q)[2].value
    if None in found or not width or any(m.known_dims(each)[2] != width for each in (k, v)):
        return None
    hidden = node.inputs[3] if len(node.inputs) > 3 else None
    zeros = Hidden(None, m.get(seen))
    masks = (hidden, zeros.seen)
    if any(each is not None for each in node.inputs[4:]) or not all(
        _is_for_all(m, each) for each in masks
    ):
        raise Skip("a mask for each head, or a past", node)
    wholes = [each for each in found if each is not None]
    heads = int(m.known_dims(wholes[0])[2]) // width
    turned = [g.op("Transpose", each, perm=BATCH_FIRST) for each in wholes]
    made = g.op("Attention", *turned, hidden, like=node, q_num_heads=heads, kv_num_heads=heads)
    made = zeros.zeroed(g, made, m.dtype(q))
    first = g.op("Transpose", made, perm=BATCH_FIRST)
    shape = [dim.value for dim in m.known_dims(back_of_batch)]
    if shape[1] is None:
        shape[1] = -1
    return g.op("Reshape", first, g.ints([0, *(int(size or 0) for size in shape[1:])]))


def _of_sequence(m: Match, value: ir.Value) -> ir.Value | None:
    """[S, B, H D] of which a value [B H, S, D] is made; None where it is made otherwise."""
    turn = value.producer()
    if turn is None or turn.op_type != "Transpose" or _perm(m, turn) != BATCH_FIRST:
        return None
    view = None if turn.inputs[0] is None else turn.inputs[0].producer()
    whole = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
    dims, turned = None if whole is None else m.dims(whole), m.known_dims(value)
    if dims is None or len(dims) != 3 or len(turned) != 3 or dims[0] != turned[1]:
        return None
    width, size = turned[2].value, dims[2].value
    return whole if width and size and size % width == 0 else None


def _is_for_all(m: Match, hidden: ir.Value | None) -> bool:
    """Whether a mask is the same for all rows of the batch."""
    dims = () if hidden is None else m.dims(hidden)
    return dims is not None and all(dim == 1 for dim in dims[:-2])


x, cos, sin = Var(), Var(), Var()
front = Op("Transpose", x)
rotary = Op("RotaryEmbedding", front, cos, sin, ...)


@exact(rotary, opset=(23, 10_000))
def rotate_heads_in_place(m: Match, g: Builder) -> ir.Value | None:
    """`RotaryEmbedding(Transpose(x), cos, sin)` -> `Transpose(RotaryEmbedding(x, cos, sin, num_heads=H))`.

    x: [B, S, H, D], as [B, S, H D] in the operator; only where the result goes to attention alone, whose own rule then
    takes the Transpose.  Source: RotaryEmbedding-23, 3-dimensional input.
    """
    node = m[rotary]
    if tuple(m.attr(front, "perm", ())) != TO_FRONT:
        return None
    if not m.emits("RotaryEmbedding", dtype=m.dtype(x), form="heads-in-place"):
        return None
    users = live_uses(node.outputs[0])
    if not users or not all(_is_turned_operand(m, user, node.outputs[0]) for user in users):
        return None
    dims = m.known_dims(x)
    if not (dims[2].is_static and dims[3].is_static):
        raise Skip("the number or the size of the heads is unknown", m[x])
    turned = g.op(
        "RotaryEmbedding",
        _flat(m, g, m[x]),
        m[cos],
        m[sin],
        *node.inputs[3:4],
        like=node,
        num_heads=int(dims[2]),
    )
    apart = g.op("Reshape", turned, g.ints([0, 0, int(dims[2]), int(dims[3])]))
    return g.op("Transpose", apart, perm=TO_FRONT)


def _is_turned_operand(m: Match, user: ir.Node, value: ir.Value) -> bool:
    """Whether a node is an Attention all of whose other operands, and whose result, have their heads turned."""
    if user.op_type != "Attention" or user.domain or value not in user.inputs[:2]:
        return False
    if any(each is not None for each in user.inputs[4:]) or _has_outputs(user):
        return False
    after = live_uses(user.outputs[0])
    if len(after) == 1 and after[0].op_type == "Where":  # zeros for queries that see no key
        after = live_uses(after[0].outputs[0])
    turns = [n.op_type == "Transpose" and _perm(m, n) == TO_FRONT for n in after]
    return bool(turns) and all(turns) and all(_comes_turned(m, each) for each in user.inputs[:3])


def _comes_turned(m: Match, value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "RotaryEmbedding" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Transpose" and _perm(m, node) == TO_FRONT


def _perm(m: Match, node: ir.Node) -> tuple[int, ...]:
    return tuple(m.attr(node, "perm", ()))


whole, index = Var(), Var(const=True)
parted = Op("Reshape", whole, ..., shared=True)
moved = Op("Transpose", parted, shared=True)
split = Op("Split", moved, ...)
taken = Op("Gather", moved, index)


@exact(split, opset=(13, 10_000))
def split_packed_heads(m: Match, g: Builder) -> Sequence[ir.Value] | None:
    """`Split(Transpose(Reshape(x, [B, S, 3, H, D]), (2, 0, 3, 1, 4)), axis 0)` -> `Split(x)`, each part turned alone.

    x: [B, S, 3 H D].  Queries, keys and values of one product, as vision transformers pack them: one Transpose of the
    whole becomes three, which attention takes away.  Only where every part goes to attention.  Source: Split-13, -18.
    """
    parts = len(m[split].outputs)
    held = _packed(m)
    if held is None or held[0] != parts or m.attr(split, "axis", 0):
        return None
    if not all(_feeds_attention(out) for out in m[split].outputs):
        return None
    if any(m.known_dims(out)[0] != 1 for out in m[split].outputs):
        return None
    _, heads, width = held
    sizes = g.ints([heads * width] * parts)
    pieces = g.ops("Split", m[whole], sizes, outputs=parts, axis=2)
    return [g.op("Unsqueeze", _in_front(g, p, heads, width), g.ints([0])) for p in pieces]


@exact(taken, opset=(13, 10_000))
def take_packed_heads(m: Match, g: Builder) -> ir.Value | None:
    """`Gather(Transpose(Reshape(x, [B, S, 3, H, D]), (2, 0, 3, 1, 4)), i)` -> `Slice(x)`, turned alone.

    x: [B, S, 3 H D].  As `split_packed_heads`, for one part at a time.  Source: Gather-13, Slice-13.
    """
    held = _packed(m)
    place = values.array(m[index])
    if held is None or place is None or place.ndim or m.attr(taken, "axis", 0):
        return None
    if not _feeds_attention(m.out(taken)):
        return None
    parts, heads, width = held
    start = int(place) % parts * heads * width
    piece = g.op("Slice", m[whole], g.ints([start]), g.ints([start + heads * width]), g.ints([2]))
    return _in_front(g, piece, heads, width)


packed = Var()
divided = Op("Reshape", packed, ..., shared=True)
apart = Either(Op("Unsqueeze", divided, ..., shared=True), divided)
in_front = Op("Transpose", apart, shared=True)
part = Op("Gather", Either(Op("Squeeze", in_front, ..., shared=True), in_front), index)


@exact(part, opset=(13, 10_000))
def take_packed_part(m: Match, g: Builder) -> ir.Value | None:
    """`Gather(Transpose(Reshape(x, [..., 3, E]), parts in front), i)` -> `Slice(x)`, of x [..., 3 E].

    As nn.MultiheadAttention takes queries, keys and values out of one product; axes of size 1 may come and go between.
    A Transpose of the whole falls away.  Source: Gather-13, Slice-13, Squeeze-13.
    """
    place, dims = values.array(m[index]), m.known_dims(packed)
    if place is None or place.ndim or m.attr(part, "axis", 0) or len(dims) < 2:
        return None
    out, perm = m.known_dims(part), tuple(m.attr(in_front, "perm", ()))
    width, whole = out[-1].value if out else None, dims[-1].value
    if not width or not whole or whole % width or out != (*dims[:-1], Dim.of(width)):
        return None
    parts = whole // width
    pieces = m.known_dims(apart)
    moving = [axis for axis in perm if pieces[axis] != 1]
    lead = [dim for dim in dims[:-1] if dim != 1]
    if (
        parts < 2
        or width < 2
        or [d for d in pieces if d != 1] != [*lead, Dim.of(parts), Dim.of(width)]
    ):
        return None
    ranks = [sorted(moving).index(axis) for axis in moving]
    if ranks != [len(lead), *range(len(lead)), len(lead) + 1]:
        return None
    start = int(place) % parts * width
    return g.op(
        "Slice", m[packed], g.ints([start]), g.ints([start + width]), g.ints([len(dims) - 1])
    )


def _packed(m: Match) -> tuple[int, int, int] | None:
    """Parts, heads and their size, where x [B, S, parts H D] is divided and its parts brought to the front."""
    dims, turned = m.known_dims(whole), m.known_dims(parted)
    if tuple(m.attr(moved, "perm", ())) != (2, 0, 3, 1, 4) or len(dims) != 3 or len(turned) != 5:
        return None
    sizes = [d.value for d in turned[2:]]
    if turned[:2] != dims[:2] or None in sizes:
        return None
    if not m.emits("Attention", dtype=m.dtype(whole), form="heads-in-place"):
        return None
    parts, heads, width = (int(size or 0) for size in sizes)
    return parts, heads, width


def _in_front(g: Builder, piece: ir.Value, heads: int, width: int) -> ir.Value:
    apart = g.op("Reshape", piece, g.ints([0, 0, heads, width]))
    return g.op("Transpose", apart, perm=TO_FRONT)


def _feeds_attention(part: ir.Value) -> bool:
    """Whether a part, perhaps without its first axis, scaled or rotated, goes to Attention alone."""
    if part.is_graph_output():
        return False
    users = live_uses(part)
    while len(users) == 1 and users[0].op_type in ("Squeeze", "RotaryEmbedding"):
        if users[0].outputs[0].is_graph_output():
            return False
        users = live_uses(users[0].outputs[0])
    return bool(users) and all(user.op_type == "Attention" and not user.domain for user in users)


all_keys, all_values = Var(), Var()
given = Op("Attention", q, all_keys, all_values, ...)


@rule(given, opset=(23, 10_000))
def share_repeated_heads(m: Match, g: Builder) -> ir.Value | None:
    """`Attention(q, repeat(k), repeat(v))` -> `Attention(q, k, v)`: each head of keys serves several of queries.

    As torch.export writes grouped attention at opset 23.  Source: Attention-23.
    """
    node = m[given]
    found = [unrepeated(m, m[each]) for each in (all_keys, all_values)]
    if found[0] is None or found[1] is None or m.attr(node, "q_num_heads", 0):
        return None
    if len(node.outputs) > 1 or any(v is not None for v in node.inputs[4:]):
        raise Skip("past or present keys are repeated too", node)
    dims = [m.known_dims(each)[:2] for each in found if each is not None]
    if dims[0] != dims[1] or not shares(m.known_dims(q)[:2], dims[0]):
        return None
    if not m.emits("Attention", dtype=m.dtype(q), form="grouped"):
        return None
    return g.op("Attention", m[q], *found, *node.inputs[3:], like=node)


RULES: tuple[Rule, ...] = (
    share_repeated_heads,
    keep_heads_in_place,
    rotate_heads_in_place,
    split_packed_heads,
    take_packed_heads,
    take_packed_part,
    take_heads_out_of_batch,
)
