"""GroupQueryAttention, RotaryEmbedding and QAttention of com.microsoft written as standard operators.

    Before:  y, k', v' = com.microsoft::GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(q, k, v, past …)
    After:   the cache with the new keys at their places; Softmax(q k'^T / sqrt(d), what is to come hidden) v'

Changes numerics: reordered.  Leaves alone: what the target runs as it is; quantised caches, sinks and other forms that
are named in a remark.  Source: onnxruntime/docs/ContribOperators.md, version 1; contrib_ops/cpu/bert.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt_passes.refusals import refused

MS = "com.microsoft"
OPSETS = (13, 10_000)
"""Of Unsqueeze with axes as an operand."""

INT64 = ir.DataType.INT64
HIDDEN = -65504.0
"""What scores of hidden keys become: the lowest half float."""

_STRANGE_OPERANDS = {
    10: "a bias of scores",
    11: "sinks",
    12: "a quantised cache",
    13: "a quantised cache",
    14: "norms of heads",
    15: "norms of heads",
}
_PLAIN_SETTINGS = {
    "smooth_softmax": (0, -1),
    "qk_output": (0,),
    "causal": (1,),
    "kv_cache_bit_width": (0,),
    "sliding_window_cache": (0,),
}

x, positions, cosines, sines = Var(), Var(), Var(), Var()
query_attention = Op("GroupQueryAttention", x, ..., domain=MS)
rotary = Op("RotaryEmbedding", x, positions, cosines, sines, domain=MS)
integer_attention = Op("QAttention", x, ..., domain=MS)


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


@dataclasses.dataclass(frozen=True)
class _Tape:
    """The builder with the words that attention is written in."""

    g: Builder
    dtype: ir.DataType

    def number(self, value: float) -> ir.Value:
        return self.g.const(np.asarray(value, np.float64).astype(self.dtype.numpy()))

    def integer(self, value: int) -> ir.Value:
        return self.g.const(np.asarray(value, np.int64))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension, as a scalar."""
        return self.g.op("Gather", self.g.op("Shape", value), self.integer(axis))

    def row(self, scalar: ir.Value) -> ir.Value:
        return self.g.op("Reshape", scalar, self.g.ints([1]))

    def count(self, end: ir.Value) -> ir.Value:
        """0, 1, … end - 1."""
        return self.g.op("Range", self.integer(0), end, self.integer(1))

    def unsqueeze(self, value: ir.Value, axes: list[int]) -> ir.Value:
        return self.g.op("Unsqueeze", value, self.g.ints(axes))

    def heads(self, value: ir.Value, count: int) -> ir.Value:
        """[B, S, H * D] -> [B, H, S, D]."""
        parted = self.g.op("Reshape", value, self.g.ints([0, 0, count, -1]))
        return self.g.op("Transpose", parted, perm=[0, 2, 1, 3])

    def turned(
        self, value: ir.Value, angles: tuple[ir.Value, ir.Value], width: int, *, interleaved: bool
    ) -> ir.Value:
        """[B, H, S, D] turned by the cosines and sines [B, 1, S, width]; what is beyond 2 * width stays."""
        g = self.g
        cut = [g.ints([0]), g.ints([2 * width]), g.ints([3])]
        part = g.op("Slice", value, *cut)
        rest = g.op("Slice", value, g.ints([2 * width]), g.ints([2**31 - 1]), g.ints([3]))
        if interleaved:
            paired = g.op("Reshape", part, g.ints([0, 0, 0, width, 2]))
            one, two = (g.op("Gather", paired, self.integer(i), axis=4) for i in (0, 1))
        else:
            one = g.op("Slice", part, g.ints([0]), g.ints([width]), g.ints([3]))
            two = g.op("Slice", part, g.ints([width]), g.ints([2 * width]), g.ints([3]))
        cos, sin = angles
        real = g.op("Sub", g.op("Mul", one, cos), g.op("Mul", two, sin))
        imaginary = g.op("Add", g.op("Mul", one, sin), g.op("Mul", two, cos))
        if interleaved:
            both = g.op("Concat", self.unsqueeze(real, [4]), self.unsqueeze(imaginary, [4]), axis=4)
            joined = g.op("Reshape", both, g.ints([0, 0, 0, 2 * width]))
        else:
            joined = g.op("Concat", real, imaginary, axis=3)
        return g.op("Concat", joined, rest, axis=3)

    def angles(self, tables: tuple[ir.Value, ir.Value], at: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The rows [B, 1, S, width] of both tables at the positions [B, S]."""
        cos, sin = (self.unsqueeze(self.g.op("Gather", each, at, axis=0), [1]) for each in tables)
        return cos, sin


def _tape(m: Match, g: Builder) -> _Tape:
    dtype = m.dtype(x)
    if dtype is None:
        raise Skip("unknown element type", m[x])
    return _Tape(g, dtype)


def _width(m: Match, table: ir.Value) -> int:
    dims = m.dims(table)
    width = None if dims is None or len(dims) != 2 else dims[1].value
    if width is None:
        raise Skip("a table of angles of unknown width", table)
    return width


@rule(rotary, opset=OPSETS)
def expand_rotary(m: Match, g: Builder) -> ir.Value | None:
    """RotaryEmbedding(x, positions, cos, sin) -> halves, or pairs, of x turned by the angles at the positions.

    x: [B, S, H * D] or [B, H, S, D]; positions: [B, S], or [1] of the first.
    Source: com.microsoft RotaryEmbedding-1.
    """
    node = m[rotary]
    if not refused(m, rotary):
        return None
    if m.attr(rotary, "is_packed_batching", 0) or m.attr(rotary, "scale", 1.0) != 1.0:
        raise Skip("packed batches, or a scale", node)
    t, rank, width = _tape(m, g), len(m.known_dims(x)), _width(m, m[cosines])
    if rank == 3:
        last = m.known_dims(x)[2].value
        heads = m.attr(rotary, "num_heads", 0) or (0 if last is None else last // (2 * width))
        if not heads:
            raise Skip("an unknown number of heads", node)
        data = t.heads(m[x], heads)
    else:
        data = m[x]
    at = m[positions]
    given = m.known_dims(positions)
    if len(given) == 1:
        first = g.op("Cast", at, to=int(INT64))
        at = t.unsqueeze(g.op("Add", t.count(t.size(data, 2)), first), [0])
    interleaved = bool(m.attr(rotary, "interleaved", 0))
    turned = t.turned(data, t.angles((m[cosines], m[sines]), at), width, interleaved=interleaved)
    if rank == 4:
        return turned
    return g.op("Reshape", g.op("Transpose", turned, perm=[0, 2, 1, 3]), g.ints([0, 0, -1]))


@rule(query_attention, opset=OPSETS)
def expand_group_query_attention(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """GroupQueryAttention -> rotary positions, the cache, causal scores and products.

    Source: com.microsoft GroupQueryAttention-1: row b has seqlens_k[b] + 1 keys; a first prompt starts at 0.
    """
    node = m[query_attention]
    if not refused(m, query_attention):
        return None
    _refuse_forms(m, node)
    t = _tape(m, g)
    heads = m.attr(query_attention, "num_heads"), m.attr(query_attention, "kv_num_heads")
    query, key, value = _parts(m, t, node, heads)
    starts = _starts(t, node, query)
    if m.attr(query_attention, "do_rotary", 0):
        query, key = _rotated(m, t, node, (query, key), starts)
    if _given(node, 3) is not None:
        held = _places(t, node, starts, key)
        key, value = (
            _stored(t, past, fresh, held)
            for past, fresh in ((node.inputs[3], key), (node.inputs[4], value))
        )
    result = _attended(m, t, (query, key, value), heads, starts)
    # What leaves is a copy: the cache is read inside too.
    return (result, key, value)[: len(node.outputs)]


def _refuse_forms(m: Match, node: ir.Node) -> None:
    for index, words in _STRANGE_OPERANDS.items():
        if _given(node, index) is not None:
            raise Skip(words, node)
    for name, plain in _PLAIN_SETTINGS.items():
        if m.attr(query_attention, name, plain[0]) not in plain:
            raise Skip(f"{name} = {m.attr(query_attention, name)}", node)
    if len(node.outputs) > 3 and node.outputs[3].name:
        raise Skip("scores are an output", node)


def _parts(
    m: Match, t: _Tape, node: ir.Node, heads: tuple[int, int]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values of the new tokens, [B, heads, S, D]."""
    key, value = _given(node, 1), _given(node, 2)
    if key is not None and value is not None:
        return t.heads(m[x], heads[0]), t.heads(key, heads[1]), t.heads(value, heads[1])
    packed = t.heads(m[x], heads[0] + 2 * heads[1])
    ends = [0, heads[0], heads[0] + heads[1], heads[0] + 2 * heads[1]]
    found = [
        t.g.op("Slice", packed, t.g.ints([a]), t.g.ints([b]), t.g.ints([1]))
        for a, b in itertools.pairwise(ends)
    ]
    return found[0], found[1], found[2]


def _starts(t: _Tape, node: ir.Node, query: ir.Value) -> ir.Value:
    """Where the new tokens of each row begin, [B, 1]: 0 in a first prompt."""
    lengths, total = _given(node, 5), _given(node, 6)
    if lengths is None or total is None:
        raise Skip("no lengths", node)
    g, new = t.g, t.size(query, 2)
    whole = g.op("Reshape", g.op("Cast", total, to=int(INT64)), g.ints([]))
    ends = g.op("Add", g.op("Cast", lengths, to=int(INT64)), t.integer(1))
    later = g.op("Sub", g.op("Reshape", ends, g.ints([-1, 1])), new)
    return g.op("Where", g.op("Equal", new, whole), t.integer(0), later)


def _rotated(
    m: Match, t: _Tape, node: ir.Node, parts: tuple[ir.Value, ir.Value], starts: ir.Value
) -> tuple[ir.Value, ir.Value]:
    cos, sin = _given(node, 7), _given(node, 8)
    if cos is None or sin is None:
        raise Skip("no angles", node)
    at = _given(node, 9)
    if at is None:
        at = t.g.op("Add", t.unsqueeze(t.count(t.size(parts[0], 2)), [0]), starts)
    angles = t.angles((cos, sin), at)
    interleaved = bool(m.attr(query_attention, "rotary_interleaved", 0))
    query, key = (t.turned(part, angles, _width(m, cos), interleaved=interleaved) for part in parts)
    return query, key


@dataclasses.dataclass(frozen=True)
class _Places:
    """Which key of old and new ones stands at each place of the cache, [B, T], and where there is one."""

    index: ir.Value
    filled: ir.Value


def _places(t: _Tape, node: ir.Node, starts: ir.Value, key: ir.Value) -> _Places:
    g, past, total = t.g, node.inputs[3], node.inputs[6]
    assert past is not None
    assert total is not None
    old, new = t.size(past, 2), t.size(key, 2)
    whole = g.op("Reshape", g.op("Cast", total, to=int(INT64)), g.ints([]))
    there = t.unsqueeze(t.count(g.op("Max", old, whole)), [0])
    is_old = g.op("Less", there, starts)
    moved = g.op("Sub", g.op("Add", there, old), starts)
    last = g.op("Sub", g.op("Add", old, new), t.integer(1))
    index = g.op("Min", g.op("Where", is_old, there, moved), last)
    return _Places(index, g.op("Less", there, g.op("Add", starts, new)))


def _stored(t: _Tape, past: ir.Value | None, fresh: ir.Value, held: _Places) -> ir.Value:
    """[B, H, T, D]: old and new ones at their places, zeros beyond."""
    g = t.g
    both = g.op("Concat", past, fresh, axis=2)
    sizes = [t.row(t.size(both, 0)), t.row(t.size(both, 1)), t.row(t.size(held.index, 1))]
    shape = g.op("Concat", *sizes, t.row(t.size(both, 3)), axis=0)
    index = g.op("Expand", t.unsqueeze(held.index, [1, 3]), shape)
    chosen = g.op("GatherElements", both, index, axis=2)
    return g.op("Where", t.unsqueeze(held.filled, [1, 3]), chosen, t.number(0.0))


def _attended(
    m: Match,
    t: _Tape,
    parts: tuple[ir.Value, ir.Value, ir.Value],
    heads: tuple[int, int],
    starts: ir.Value,
) -> ir.Value:
    """[B, S, H * D]: each head of queries sees its group's keys up to its own place."""
    g = t.g
    query, key, value = parts
    size = m.known_dims(x)[2].value
    held = _given(m[query_attention], 1)
    if size is None:
        raise Skip("unknown hidden size", m[x])
    depth = size // (heads[0] if held is not None else heads[0] + 2 * heads[1])
    scale = m.attr(query_attention, "scale", 0.0) or 1 / math.sqrt(depth)
    key, value = (_repeated(t, each, heads) for each in (key, value))
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, t.number(scale))
    cap = m.attr(query_attention, "softcap", 0.0)
    if cap and cap > 0:
        bent = g.op("Tanh", g.op("Div", scores, t.number(cap)))
        scores = g.op("Mul", bent, t.number(cap))
    here = g.op("Add", t.unsqueeze(t.count(t.size(query, 2)), [0]), starts)
    there = t.unsqueeze(t.count(t.size(key, 2)), [0, 1])
    seen = g.op("Not", g.op("Greater", there, t.unsqueeze(here, [2])))
    window = m.attr(query_attention, "local_window_size", -1)
    if window > 0:
        first = g.op("Sub", t.unsqueeze(here, [2]), t.integer(window))
        seen = g.op("And", seen, g.op("Greater", there, first))
    hidden = g.op("Where", t.unsqueeze(seen, [1]), t.number(0.0), t.number(HIDDEN))
    weights = g.op("Softmax", g.op("Add", scores, hidden), axis=-1)
    moved = g.op("Transpose", g.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    return g.op("Reshape", moved, g.ints([0, 0, -1]))


def _repeated(t: _Tape, value: ir.Value, heads: tuple[int, int]) -> ir.Value:
    """[B, H_kv, T, D] -> [B, H, T, D], each head for its group."""
    if heads[0] == heads[1]:
        return value
    g, copies = t.g, heads[0] // heads[1]
    wide = g.op("Expand", t.unsqueeze(value, [2]), g.ints([1, 1, copies, 1, 1]))
    sizes = [t.row(t.size(value, axis)) for axis in (0, 2, 3)]
    return g.op("Reshape", wide, g.op("Concat", sizes[0], g.ints([heads[0]]), *sizes[1:], axis=0))


@rule(integer_attention, opset=OPSETS)
def expand_integer_attention(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """QAttention(x, W, b, sx, sw, mask, zx, zw, past) -> Attention(DQ(x), DQ(W), b, mask, past).

    Source: com.microsoft QAttention-1; Attention is written out in turn.
    """
    node = m[integer_attention]
    if not refused(m, integer_attention):
        return None
    weights, scales = _given(node, 1), (_given(node, 3), _given(node, 4))
    if weights is None or scales[0] is None or scales[1] is None:
        raise Skip("an operand is missing", node)
    data = g.op("DequantizeLinear", m[x], scales[0], _given(node, 6), axis=0)
    wide = g.op("DequantizeLinear", weights, scales[1], _given(node, 7), axis=1)
    return tuple(
        g.ops(
            "Attention",
            data,
            wide,
            _given(node, 2),
            _given(node, 5),
            _given(node, 8),
            outputs=len(node.outputs),
            domain=MS,
            like=node,
        )
    )


RULES: tuple[Rule, ...] = (
    expand_rotary,
    expand_group_query_attention,
    expand_integer_attention,
)
