"""Shapes of ONNX Runtime's operators in the domain com.microsoft, and of those it adds to the default one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim
from graphopt.ir.shapes.elementwise import broadcast_dims
from graphopt.ir.shapes.facts import Facts
from graphopt.ir.shapes.linear import RULES as LINEAR
from graphopt.ir.shapes.linear import matmul_dims, windows
from graphopt.ir.shapes.networks import RULES as NETWORKS
from graphopt.ir.shapes.query import Query, Rules

_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


def _same(q: Query) -> Sequence[Facts]:
    return [q.same(0)]


def _half_of_last(q: Query) -> Sequence[Facts]:
    """BiasSplitGelu: half of the channels gate the others."""
    dims = q.dims(0)
    return [facts.tensor(q.dtype(0), None if not dims else (*dims[:-1], dims[-1] // 2))]


def _fused_matmul(q: Query) -> Sequence[Facts] | None:
    a, b = q.dims(0), q.dims(1)
    if a is None or b is None or q.attr("transBatchA", 0) or q.attr("transBatchB", 0):
        return [facts.tensor(q.dtype(0), None)]
    if q.attr("transA", 0) and len(a) > 1:
        a = (*a[:-2], a[-1], a[-2])
    if q.attr("transB", 0) and len(b) > 1:
        b = (*b[:-2], b[-1], b[-2])
    return [facts.tensor(q.dtype(0), matmul_dims(a, b))]


def _simplified_layer_norm(q: Query) -> Sequence[Facts]:
    dims = q.dims(0)
    reduced = None
    if dims is not None:
        axis = q.axis("axis", -1, len(dims))
        reduced = (*dims[:axis], *(Dim.of(1),) * (len(dims) - axis))
    return [q.same(0), facts.tensor(_FLOAT, reduced)]


def _skip_layer_norm(q: Query) -> Sequence[Facts]:
    dims = q.dims(0)
    reduced = None if not dims else (*dims[:-1], Dim.of(1))
    small = facts.tensor(_FLOAT, reduced)
    return [q.same(0), small, small, q.same(0)]


def _embed_layer_norm(q: Query) -> Sequence[Facts]:
    ids, table = q.dims(0), q.dims(2)
    dims = None if ids is None or not table else (*ids, table[-1])
    dtype = q.dtype(2)
    mask = None if ids is None else ids[:1]
    return [
        facts.tensor(dtype, dims),
        facts.tensor(ir.DataType.INT32, mask),
        facts.tensor(dtype, dims),
    ]


def _attention(q: Query) -> Sequence[Facts]:
    return _attended(q, q.dtype(0), past_index=4)


def _integer_attention(q: Query) -> Sequence[Facts]:
    return _attended(q, q.dtype(3), past_index=8)  # of the type of the scale


def _attended(q: Query, dtype: ir.DataType | None, *, past_index: int) -> Sequence[Facts]:
    given, weights, bias = q.dims(0), q.dims(1), q.dims(2)
    if given is None or len(given) != 3:
        return [facts.tensor(dtype, None)]
    sizes: tuple[int, ...] = q.attr("qkv_hidden_sizes", ())
    columns = weights[-1] if weights else bias[0] if bias else None
    hidden = Dim.of(sizes[2]) if sizes else q.fresh(0, 2) if columns is None else columns // 3
    output = facts.tensor(dtype, (*given[:2], hidden))
    if len(q.node.outputs) < 2:
        return [output]
    heads = Dim.of(q.attr("num_heads", 1))
    past = q.dims(past_index)
    total = given[1] if not q.has(past_index) else given[1] + past[3] if past else q.fresh(1, 3)
    present = (2, given[0], heads, total, hidden // heads)
    shared = past_index == 4 and q.has(6)  # a cache that is written in place has its own length
    return [output, facts.tensor(dtype, q.unknown_dims(5, 1) if shared else present)]


def _multi_head_attention(q: Query) -> Sequence[Facts]:
    query, value = q.dims(0), q.dims(2)
    dtype = q.dtype(0)
    if query is None:
        return [facts.tensor(dtype, q.unknown_dims(3))]
    if len(query) == 5:  # packed: batch, length, heads, 3, head size
        hidden = query[2] * query[4]
    elif value is not None and len(value) == 4:  # batch, heads, length, head size
        hidden = value[1] * value[3]
    else:
        hidden = value[2] if value is not None and len(value) == 3 else q.fresh(0, 2)
    output = facts.tensor(dtype, (*query[:2], hidden))
    return [output, *_multi_head_presents(q, query[0])]


def _multi_head_presents(q: Query, batch: Dim) -> Sequence[Facts]:
    """Keys and values with those of the past: batch, heads, total length, head size."""
    heads = Dim.of(q.attr("num_heads", 0))
    past, found = q.dims(6), []
    for output in range(1, min(len(q.node.outputs), 3)):
        given = q.dims(output)
        total, size = q.fresh(output, 2), q.fresh(output, 3)
        if given is not None and len(given) in (3, 4) and not q.has(8) and heads != 0:
            size = given[2] // heads if len(given) == 3 else given[3]
            length = given[-2]
            if not q.has(6) or (past is not None and len(past) == 4):
                total = length + past[2] if past is not None else length
        found.append(facts.tensor(q.dtype(0), (batch, heads, total, size)))
    return found


def _group_query_attention(q: Query) -> Sequence[Facts]:
    query, key = q.dims(0), q.dims(1)
    dtype = q.dtype(0)
    if query is None or len(query) != 3:
        return [facts.tensor(dtype, q.unknown_dims(3))]
    heads, groups = q.attr("num_heads", 0), q.attr("kv_num_heads", 0)
    sizes = [(q.fresh(i, 2), q.fresh(i, 3)) for i in range(1, min(len(q.node.outputs), 3))]
    presents = [facts.tensor(dtype, (query[0], groups, *size)) for size in sizes]
    if q.has(1) and key is not None:
        return [facts.tensor(dtype, query), *presents]
    packed = not q.has(1) and heads > 0  # query, key and value side by side
    hidden = query[2] // (heads + 2 * groups) * heads if packed else q.fresh(0, 2)
    return [facts.tensor(dtype, (*query[:2], hidden)), *presents]


def _matmul_nbits(q: Query) -> Sequence[Facts]:
    given = q.dims(0)
    columns = q.attr("N", 0)
    return [facts.tensor(q.dtype(0), None if not given else (*given[:-1], columns))]


def _matmul_integer_to_float(q: Query) -> Sequence[Facts]:
    return [facts.tensor(q.dtype(2), matmul_dims(q.dims(0), q.dims(1)))]


def _dynamic_quantize_matmul(q: Query) -> Sequence[Facts]:
    return [facts.tensor(q.dtype(0), matmul_dims(q.dims(0), q.dims(1)))]


def _qlinear_binary(q: Query) -> Sequence[Facts]:
    return [facts.tensor(q.dtype(0), broadcast_dims((q.dims(0), q.dims(3))))]


def _qlinear_pool(q: Query) -> Sequence[Facts]:
    given = q.dims(0)
    kernel: tuple[int, ...] = q.attr("kernel_shape", ())
    if given is None or q.attr("channels_last", 0):
        return [facts.tensor(q.dtype(0), None if given is None else q.unknown_dims(len(given)))]
    moved = windows(q, given[2:], kernel, ceil=bool(q.attr("ceil_mode", 0)))
    return [facts.tensor(q.dtype(0), (*given[:2], *moved))]


def _qlinear_global_pool(q: Query) -> Sequence[Facts]:
    given = q.dims(0)
    if given is None:
        return [facts.tensor(q.dtype(0), None)]
    ones = (Dim.of(1),) * (len(given) - 2)
    dims = (given[0], *ones, given[-1]) if q.attr("channels_last", 0) else (*given[:2], *ones)
    return [facts.tensor(q.dtype(0), dims)]


def _qlinear_concat(q: Query) -> Sequence[Facts]:
    tensors = range(2, len(q.inputs), 3)
    shapes = [q.dims(i) for i in tensors]
    known = [dims for dims in shapes if dims is not None]
    if len(known) != len(shapes) or not known:
        return [facts.tensor(q.dtype(1), None)]
    result = list(known[0])
    axis = q.axis("axis", 0, len(result))
    result[axis] = sum((dims[axis] for dims in known), Dim.of(0))
    return [facts.tensor(q.dtype(1), result)]


def _expand_dims(q: Query) -> Sequence[Facts]:
    dims, axes = q.dims(0), q.ints(1)
    if dims is None or axes is None:
        return [facts.tensor(q.dtype(0), None)]
    axis = axes[0] + (len(dims) + 1 if axes[0] < 0 else 0)
    return [facts.tensor(q.dtype(0), (*dims[:axis], 1, *dims[axis:]))]


RULES: Rules = {
    "BiasGelu": _same,
    "BiasSplitGelu": _half_of_last,
    "FastGelu": _same,
    "Gelu": _same,
    "QuickGelu": _same,
    "Inverse": _same,
    "Trilu": _same,
    "RotaryEmbedding": _same,
    "GroupNorm": _same,
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "FusedConv": LINEAR["Conv"],
    "FusedGemm": LINEAR["Gemm"],
    "SimplifiedLayerNormalization": _simplified_layer_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_layer_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "Attention": _attention,
    "QAttention": _integer_attention,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _group_query_attention,
    "MatMulNBits": _matmul_nbits,
    "MatMulBnb4": _matmul_nbits,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "QuantizeLinear": NETWORKS["QuantizeLinear"],
    "DequantizeLinear": NETWORKS["DequantizeLinear"],
    "QLinearAdd": _qlinear_binary,
    "QLinearMul": _qlinear_binary,
    "QLinearLeakyRelu": _same,
    "QLinearSigmoid": _same,
    "QLinearSoftmax": _same,
    "QLinearAveragePool": _qlinear_pool,
    "QLinearGlobalAveragePool": _qlinear_global_pool,
    "QLinearConcat": _qlinear_concat,
    "ExpandDims": _expand_dims,
}

UNLISTED: Rules = {"SimplifiedLayerNormalization": _simplified_layer_norm}
"""Operators that ONNX Runtime accepts in the default domain although onnx does not define them."""
