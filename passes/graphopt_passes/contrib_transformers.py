"""Attention and embeddings of com.microsoft written as standard operators, for targets that know the standard alone.

    Before:  y = com.microsoft::Attention<num_heads = 2>(x, W, b, mask)
    After:   y = the product with W, split into heads; Softmax(q k^T / sqrt(d) + bias of the mask) v, heads joined

Changes numerics: reordered.  Leaves alone: everything where the target has kernels for com.microsoft; caches of keys
and values, packed operands and other forms that no standard operator states, with a remark.
Source: onnxruntime/docs/ContribOperators.md, version 1; onnxruntime/contrib_ops/cpu/bert.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule

MS = "com.microsoft"
OPSETS = (11, 10_000)
"""Of Range and of negative axes everywhere."""

x, w, k, v = Var(), Var(), Var(), Var()
gamma, beta, bias = Var(), Var(optional=True), Var(optional=True)
mask, segments = Var(optional=True), Var(optional=True)
constant = Var(const=True)
scales = Var()
words, positions, segment_table = Var(), Var(), Var(optional=True)

attention = Op("Attention", x, w, bias, mask, ..., domain=MS)
multi_head = Op("MultiHeadAttention", x, ..., domain=MS)
embed = Op(
    "EmbedLayerNormalization",
    x,
    segments,
    words,
    positions,
    segment_table,
    gamma,
    beta,
    ...,
    domain=MS,
)
skip_norm = Op("SkipLayerNormalization", x, v, gamma, beta, bias, domain=MS)
skip_rms = Op("SkipSimplifiedLayerNormalization", x, v, gamma, bias, domain=MS)
simplified = Op("SimplifiedLayerNormalization", x, gamma)
matmul_nbits = Op("MatMulNBits", x, constant, scales, ..., domain=MS)


@dataclasses.dataclass(frozen=True)
class _Tools:
    """What depends on the opset, and numbers in the type of the operands."""

    g: Builder
    opset: int
    dtype: ir.DataType

    def number(self, value: float) -> ir.Value:
        return self.g.const(ir.tensor(np.asarray(value, np.float64).astype(self.dtype.numpy())))

    def unsqueeze(self, value: ir.Value, axes: list[int]) -> ir.Value:
        if self.opset < 13:
            return self.g.op("Unsqueeze", value, axes=axes)
        return self.g.op("Unsqueeze", value, self.g.ints(axes))

    def split(self, value: ir.Value, sizes: list[int]) -> list[ir.Value]:
        count = len(sizes)
        if self.opset < 13:
            return list(self.g.ops("Split", value, outputs=count, axis=-1, split=sizes))
        return list(self.g.ops("Split", value, self.g.ints(sizes), outputs=count, axis=-1))

    def mean(self, value: ir.Value) -> ir.Value:
        if self.opset < 18:
            return self.g.op("ReduceMean", value, axes=[-1])
        return self.g.op("ReduceMean", value, self.g.ints([-1]))

    def heads(self, value: ir.Value, count: int) -> ir.Value:
        """[B, S, H * D] -> [B, H, S, D]."""
        parted = self.g.op("Reshape", value, self.g.ints([0, 0, count, -1]))
        return self.g.op("Transpose", parted, perm=[0, 2, 1, 3])

    def joined(self, value: ir.Value) -> ir.Value:
        """[B, H, S, D] -> [B, S, H * D]."""
        moved = self.g.op("Transpose", value, perm=[0, 2, 1, 3])
        return self.g.op("Reshape", moved, self.g.ints([0, 0, -1]))

    def masked(self, kept: ir.Value, filler: float) -> ir.Value:
        """0 where something is kept, the filler elsewhere."""
        return self.g.op("Where", kept, self.number(0.0), self.number(filler))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension, as a scalar."""
        return self.g.op("Gather", self.g.op("Shape", value), self.integer(axis))

    def integer(self, value: int) -> ir.Value:
        return self.g.const(np.asarray(value, np.int64))

    def causal(self, query: ir.Value, key: ir.Value, filler: float) -> ir.Value:
        """The bias [S, T] that hides the future; both operands are [B, H, length, D], and end at the same place."""
        g, end = self.g, self.size(key, 2)
        start = g.op("Sub", end, self.size(query, 2))
        here = self.unsqueeze(g.op("Range", start, end, self.integer(1)), [1])
        there = self.unsqueeze(g.op("Range", self.integer(0), end, self.integer(1)), [0])
        return self.masked(g.op("Not", g.op("Less", here, there)), filler)

    def within(self, lengths: ir.Value, key: ir.Value) -> ir.Value:
        """Which keys, [B, T], are within the lengths [B]."""
        g = self.g
        there = g.op("Range", self.integer(0), self.size(key, 2), self.integer(1))
        wide = self.unsqueeze(g.op("Cast", lengths, to=int(ir.DataType.INT64)), [1])
        return g.op("Less", self.unsqueeze(there, [0]), wide)

    def layer_norm(
        self, value: ir.Value, scale: ir.Value, shift: ir.Value | None, epsilon: float
    ) -> ir.Value:
        g = self.g
        if self.opset >= 17:
            return g.op("LayerNormalization", value, scale, shift, axis=-1, epsilon=epsilon)
        centred = g.op("Sub", value, self.mean(value))
        normed = self._over_deviation(centred, centred, epsilon)
        scaled = g.op("Mul", normed, scale)
        return scaled if shift is None else g.op("Add", scaled, shift)

    def rms_norm(self, value: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
        g = self.g
        if self.opset >= 23:
            return g.op("RMSNormalization", value, scale, axis=-1, epsilon=epsilon)
        return g.op("Mul", self._over_deviation(value, value, epsilon), scale)

    def _over_deviation(self, value: ir.Value, of: ir.Value, epsilon: float) -> ir.Value:
        g = self.g
        power = self.mean(g.op("Mul", of, of))
        return g.op("Div", value, g.op("Sqrt", g.op("Add", power, self.number(epsilon))))


def _tools(m: Match, g: Builder, like: ir.Value) -> _Tools:
    dtype = m.dtype(x) or like.dtype
    if dtype is None:
        raise Skip("unknown element type", like)
    return _Tools(g, m.opset(), dtype)


def _wanted(m: Match) -> bool:
    return not m.facts.target.has_domain(MS)


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _used(node: ir.Node, first: int) -> bool:
    return any(out.uses() or out.is_graph_output() for out in node.outputs[first:])


def _width(m: Match, value: ir.Value) -> int:
    dims = m.dims(value)
    size = None if dims is None else dims[-1].value
    if size is None:
        raise Skip("unknown hidden size", value)
    return size


def _weighted(
    t: _Tools, parts: tuple[ir.Value, ir.Value, ir.Value], scale: float, bias_: ir.Value | None
) -> ir.Value:
    """Softmax(q k^T * scale + bias) v, of [B, H, S, D] each."""
    q, key, value = parts
    scores = t.g.op("MatMul", q, t.g.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = t.g.op("Mul", scores, t.number(scale))
    if bias_ is not None:
        scores = t.g.op("Add", scores, bias_)
    return t.joined(t.g.op("MatMul", t.g.op("Softmax", scores, axis=-1), value))


def _sum(g: Builder, parts: list[ir.Value]) -> ir.Value | None:
    total = None
    for part in parts:
        total = part if total is None else g.op("Add", total, part)
    return total


def _mask_bias(
    m: Match, t: _Tools, given: ir.Value | None, key: ir.Value, filler: float
) -> list[ir.Value]:
    """The bias of lengths, [B], of a mask of keys, [B, T], or of queries and keys, [B, S, T]."""
    if given is None:
        return []
    dims, fed = m.dims(given), m.dims(x)
    rank = None if dims is None else len(dims)
    if dims is not None and rank == 1 and fed is not None and dims[0] == fed[0]:
        return [t.masked(t.unsqueeze(t.within(given, key), [1, 2]), filler)]
    if rank not in (2, 3):
        raise Skip(f"a mask of rank {rank}", given)
    kept = t.g.op("Cast", given, to=int(ir.DataType.BOOL))
    return [t.masked(t.unsqueeze(kept, [1, 2] if rank == 2 else [1]), filler)]


@rule(attention, opset=OPSETS)
def expand_attention(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """Attention(x, W, b, mask, past) -> its products, mask, Softmax and products; x [B, S, H], W [H, 3 H'].

    Source: com.microsoft Attention-1: a mask of 0 adds mask_filter_value, the future of unidirectional heads likewise;
    past and present are keys and values, [2, B, heads, length, D].
    """
    if not _wanted(m):
        return None
    node = m[attention]
    if _given(node, 6) is not None or m.attr(attention, "past_present_share_buffer", 0):
        raise Skip("a cache that is written in place", node)
    if m.attr(attention, "do_rotary", 0):
        raise Skip("rotary positions within", node)
    t = _tools(m, g, node.outputs[0])
    sizes = list(m.attr(attention, "qkv_hidden_sizes", ())) or [_width(m, m[w]) // 3] * 3
    heads = m.attr(attention, "num_heads")
    packed = g.op("MatMul", m[x], m[w])
    added = m.get(bias)
    parts = t.split(packed if added is None else g.op("Add", packed, added), sizes)
    query, key, value = (t.heads(part, heads) for part in parts)
    past = _given(node, 4)
    if past is not None:
        before = [g.op("Gather", past, t.integer(index), axis=0) for index in (0, 1)]
        key, value = (
            g.op("Concat", a, b, axis=2) for a, b in zip(before, (key, value), strict=True)
        )
    result = _attended(m, t, attention, (query, key, value), (m.get(mask), sizes[0] // heads))
    if len(node.outputs) == 1:
        return (result,)
    present = g.op("Concat", t.unsqueeze(key, [0]), t.unsqueeze(value, [0]), axis=0)
    return (result, present)


def _attended(
    m: Match,
    t: _Tools,
    root: Op,
    parts: tuple[ir.Value, ir.Value, ir.Value],
    about: tuple[ir.Value | None, int],
) -> ir.Value:
    """What heads attend to, with everything that the node adds to the scores; `about` is the mask and the head size."""
    given, size = about
    query, key, _ = parts
    filler = m.attr(root, "mask_filter_value", -10000.0)
    biases = _mask_bias(m, t, given, key, filler)
    if m.attr(root, "unidirectional", 0):
        biases.append(t.causal(query, key, filler))
    extra = _given(m[root], 5)
    biases += [] if extra is None else [extra]
    scale = m.attr(root, "scale") or 1 / math.sqrt(size)
    return _weighted(t, parts, scale, _sum(t.g, biases))


@rule(multi_head, opset=OPSETS)
def expand_multi_head_attention(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """MultiHeadAttention(q, k, v, b, mask, bias, past) -> products, mask, Softmax and products; each [B, S, H].

    Keys and values of another sequence come as [B, heads, T, D] too.  Source: com.microsoft MultiHeadAttention-1.
    """
    if not _wanted(m):
        return None
    node = m[multi_head]
    fed = [m[x], _given(node, 1), _given(node, 2)]
    ranks = [len(m.dims(each) or ()) if each is not None else 0 for each in fed]
    added = _given(node, 3)
    if ranks not in ([3, 3, 3], [3, 4, 4]) or (added is not None and ranks[1] == 4):
        raise Skip("packed queries, keys and values", node)
    if any(_given(node, index) is not None for index in range(8, len(node.inputs))):
        raise Skip("a cache that is written in place", node)
    t = _tools(m, g, node.outputs[0])
    heads = m.attr(multi_head, "num_heads")
    parts = [each for each in fed if each is not None]
    width = _width(m, m[x])
    if added is not None:
        cut = t.split(added, [_width(m, part) for part in parts])
        parts = [g.op("Add", part, b) for part, b in zip(parts, cut, strict=True)]
    query, key, value = (
        t.heads(part, heads) if rank == 3 else part for part, rank in zip(parts, ranks, strict=True)
    )
    past = (_given(node, 6), _given(node, 7))
    if past[0] is not None and past[1] is not None:
        key = g.op("Concat", past[0], key, axis=2)
        value = g.op("Concat", past[1], value, axis=2)
    about = (_given(node, 4), width // heads)
    result = _attended(m, t, multi_head, (query, key, value), about)
    return (result, key, value)[: len(node.outputs)]


@rule(embed, opset=OPSETS)
def expand_embed_layer_norm(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """EmbedLayerNormalization(ids, segments, W, P, S, gamma, beta) -> the norm of W[ids] + P[0:n] + S[segments].

    Source: com.microsoft EmbedLayerNormalization-1; output 1 counts what the mask keeps, output 2 is the sum.
    """
    if not _wanted(m):
        return None
    node = m[embed]
    given_mask, places = _given(node, 7), _given(node, 8)
    counted = any(out.uses() or out.is_graph_output() for out in node.outputs[1:2])
    if counted and given_mask is None:
        raise Skip("the mask's count is used, and there is no mask", node)
    dtype = m.dtype(gamma)
    if dtype is None:
        raise Skip("unknown element type", node)
    t = _Tools(g, m.opset(), dtype)
    if places is None:
        end = t.g.op("Slice", g.op("Shape", m[x]), g.ints([1]), g.ints([2]), g.ints([0]))
        rows = g.op("Slice", m[positions], g.ints([0]), end, g.ints([0]))
    else:
        rows = g.op("Gather", m[positions], places)
    total = g.op("Add", g.op("Gather", m[words], m[x]), rows)
    table, held = m.get(segment_table), m.get(segments)
    if table is not None and held is not None:
        total = g.op("Add", total, g.op("Gather", table, held))
    epsilon = m.attr(embed, "epsilon", 1e-12)
    normed = t.layer_norm(total, m[gamma], m.get(beta), epsilon)
    count = None
    if given_mask is not None and len(node.outputs) > 1:
        count = (
            g.op("ReduceSum", given_mask, axes=[1], keepdims=0)
            if t.opset < 13
            else g.op("ReduceSum", given_mask, g.ints([1]), keepdims=0)
        )
    return (normed, count, total)[: len(node.outputs)]


@rule(skip_norm, opset=(11, 16))
def expand_skip_layer_norm_in_parts(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """SkipLayerNormalization(x, s, gamma, beta, b) -> the parts of a layer norm, below the opset that has one.

    Source: com.microsoft SkipLayerNormalization-1.
    """
    if not _wanted(m):
        return None
    node = m[skip_norm]
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:3]):
        raise Skip("mean or deviation is used", node)
    t = _tools(m, g, node.outputs[0])
    total = _sum(g, [m[x], m[v], *filter(None, [m.get(bias)])])
    assert total is not None
    normed = t.layer_norm(total, m[gamma], m.get(beta), m.attr(skip_norm, "epsilon", 1e-12))
    return (normed, None, None, total)[: len(node.outputs)]


@rule(skip_rms, opset=OPSETS)
def expand_skip_simplified(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """SkipSimplifiedLayerNormalization(x, s, gamma, b) -> RMSNormalization(x + s + b), and the sum itself.

    Source: com.microsoft SkipSimplifiedLayerNormalization-1.
    """
    if not _wanted(m):
        return None
    node = m[skip_rms]
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:3]):
        raise Skip("mean or deviation is used", node)
    t = _tools(m, g, node.outputs[0])
    total = _sum(g, [m[x], m[v], *filter(None, [m.get(bias)])])
    assert total is not None
    normed = t.rms_norm(total, m[gamma], m.attr(skip_rms, "epsilon", 1e-12))
    return (normed, None, None, total)[: len(node.outputs)]


@rule(simplified, opset=OPSETS)
def expand_simplified(m: Match, g: Builder) -> ir.Value | None:
    """SimplifiedLayerNormalization(x, gamma) -> RMSNormalization(x, gamma), or its parts.

    ONNX Runtime knows it in ai.onnx; the standard does not.  Source: onnxruntime/core/graph/contrib_ops.
    """
    node = m[simplified]
    if not _wanted(m):
        return None
    if len(node.outputs) > 1 and _used(node, 1):
        raise Skip("the deviation is used", node)
    if m.attr(simplified, "axis", -1) != -1:
        raise Skip("an axis other than the last", node)
    t = _tools(m, g, node.outputs[0])
    return t.rms_norm(m[x], m[gamma], m.attr(simplified, "epsilon", 1e-5))


@rule(matmul_nbits, opset=(21, 10_000))
def expand_matmul_nbits(m: Match, g: Builder) -> ir.Value | None:
    """MatMulNBits(a, B, scales, zero points) -> MatMul(a, DequantizeLinear(B)^T), in blocks, 4 bits.

    Without zero points the weights become signed (value - 8), which TensorRT asks for.
    Source: com.microsoft MatMulNBits-1: B is [N, K / block, block / 2], low nibble first.
    """
    if not _wanted(m):
        return None
    node = m[matmul_nbits]
    rows, columns = m.attr(matmul_nbits, "N"), m.attr(matmul_nbits, "K")
    block = m.attr(matmul_nbits, "block_size")
    if m.attr(matmul_nbits, "bits", 4) != 4 or columns % block or _given(node, 4) is not None:
        raise Skip("other than 4 bits, whole blocks and rows in order", node)
    zeros = _given(node, 3)
    packed = _nibbles(m.array(constant)).reshape(rows, -1)[:, :columns]
    blocks = columns // block
    shaped = g.op("Reshape", m[scales], g.ints([rows, blocks]))
    if zeros is None:
        held = g.const(ir.Tensor((packed.astype(np.int8) - 8).astype(ml_dtypes.int4)))
        wide = g.op("DequantizeLinear", held, shaped, axis=1, block_size=block)
    else:
        points = zeros.const_value
        if points is None or zeros.is_graph_input() or points.dtype != ir.DataType.UINT8:
            raise Skip("zero points that are no packed constant", zeros)
        unpacked = _nibbles(points.numpy()).reshape(rows, -1)[:, :blocks]
        held = g.const(ir.Tensor(packed.astype(ml_dtypes.uint4)))
        zero = g.const(ir.Tensor(unpacked.astype(ml_dtypes.uint4)))
        wide = g.op("DequantizeLinear", held, shaped, zero, axis=1, block_size=block)
    product = g.op("MatMul", m[x], g.op("Transpose", wide, perm=[1, 0]))
    added = _given(node, 5)
    return product if added is None else g.op("Add", product, added)


def _nibbles(
    packed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The halves of each byte, the low one first, along the last axis."""
    both = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)


RULES: tuple[Rule, ...] = (
    expand_attention,
    expand_multi_head_attention,
    expand_embed_layer_norm,
    expand_skip_layer_norm_in_parts,
    expand_skip_simplified,
    expand_simplified,
    expand_matmul_nbits,
)
