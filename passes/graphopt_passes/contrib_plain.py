"""Small operators of com.microsoft that the standard has, or writes in a few of its own.

    Before:  y = com.microsoft::Trilu<upper = 1>(x)
    After:   y = Trilu<upper = 1>(x)

Leaves alone: what the target runs as it is.  Source: onnxruntime/docs/ContribOperators.md, version 1.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule
from graphopt_passes.refusals import refused

MS = "com.microsoft"
x, y, bias = Var(), Var(), Var()
axis = Var(const=True)
skip = Var(optional=True)
gamma, beta = Var(), Var()

pad = Op("Pad", x, y, ..., domain=MS)
same = Op("Trilu|Range|GatherND", x, ..., domain=MS)
unique = Op("Unique", x, domain=MS)
expand_dims = Op("ExpandDims", x, axis, domain=MS)
grid_sample = Op("GridSample", x, y, domain=MS)
bias_add = Op("BiasAdd", x, bias, skip, domain=MS)
bias_dropout = Op("BiasDropout", x, bias, skip, ..., domain=MS)
bias_softmax = Op("BiasSoftmax", x, bias, domain=MS)
split_gelu = Op("BiasSplitGelu", x, bias, domain=MS)
gemm_gelu = Op("GemmFastGelu", x, y, skip, domain=MS)
nhwc_pool = Op("NhwcMaxPool", x, domain=MS)
nhwc_conv = Op("NhwcConv", x, y, skip, domain=MS)
group_norm = Op("GroupNorm", x, gamma, beta, domain=MS)
skip_group_norm = Op("SkipGroupNorm", x, gamma, beta, y, skip, domain=MS)

_SINCE = {"Trilu": 14, "Range": 11, "GatherND": 12}
_FIRST, _LAST = [0, 3, 1, 2], [0, 2, 3, 1]


@exact(same, opset=(11, 10_000))
def use_standard_operator(m: Match, g: Builder) -> ir.Value | None:
    """Trilu, Range, GatherND -> the standard operators of the names.

    Source: com.microsoft Trilu-1, Range-1, GatherND-1; ai.onnx Trilu-14, Range-11, GatherND-12.
    """
    node = m[same]
    if not refused(m, same):
        return None
    if m.opset() < _SINCE[node.op_type]:
        raise Skip(f"standard since opset {_SINCE[node.op_type]}", node)
    return g.op(node.op_type, *node.inputs, like=node)


@exact(unique, opset=(11, 10_000))
def use_standard_unique(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """Unique(x) -> Unique<sorted = 0>(x), first indices left out.

    Source: com.microsoft Unique-1: values, the place of each element among them, counts.
    """
    if not refused(m, unique):
        return None
    values_, _, places, counts = g.ops("Unique", m[x], outputs=4, sorted=0)
    return (values_, places, counts)[: len(m[unique].outputs)]


@exact(pad, opset=(11, 10_000))
def use_standard_pad(m: Match, g: Builder) -> ir.Value | None:
    """Pad(x, pads, value) -> the standard operator; pads may come as a row.

    Source: com.microsoft Pad-1, ai.onnx Pad-11.
    """
    node = m[pad]
    if not refused(m, pad):
        return None
    held = m.dims(y)
    pads = g.op("Reshape", m[y], g.ints([-1])) if held is None or len(held) != 1 else m[y]
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    return g.op("Pad", m[x], pads, filler, mode=m.attr(pad, "mode", "constant"))


@exact(expand_dims, opset=(7, 10_000))
def use_unsqueeze(m: Match, g: Builder) -> ir.Value | None:
    """ExpandDims(x, axis) -> Unsqueeze(x, axis).

    Source: com.microsoft ExpandDims-1.
    """
    if not refused(m, expand_dims):
        return None
    place = m.ints(axis)[0]
    if m.opset() >= 13:
        return g.op("Unsqueeze", m[x], g.ints([place]))
    if place < 0:
        place += len(m.known_dims(x)) + 1
    return g.op("Unsqueeze", m[x], axes=[place])


@exact(grid_sample, opset=(16, 10_000))
def use_standard_grid_sample(m: Match, g: Builder) -> ir.Value | None:
    """GridSample(x, grid) -> the standard operator.

    Source: com.microsoft GridSample-1, ai.onnx GridSample-16; modes have other names since opset 20.
    """
    node = m[grid_sample]
    if not refused(m, grid_sample):
        return None
    mode = m.attr(grid_sample, "mode", "bilinear")
    if m.opset() >= 20:
        mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return g.op("GridSample", m[x], m[y], like=node, mode=mode)


@rule(bias_add, opset=(7, 10_000))
def expand_bias_add(m: Match, g: Builder) -> ir.Value | None:
    """BiasAdd(x, b, skip) -> x + b + skip.

    Source: com.microsoft BiasAdd-1.
    """
    if not refused(m, bias_add):
        return None
    out, more = g.op("Add", m[x], m[bias]), m.get(skip)
    return out if more is None else g.op("Add", out, more)


@rule(bias_dropout, opset=(7, 10_000))
def expand_bias_dropout(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """BiasDropout(x, b, residual) -> x + b + residual, in inference.

    Source: com.microsoft BiasDropout-1.
    """
    node = m[bias_dropout]
    if not refused(m, bias_dropout):
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise Skip("training mode is an operand", node)
    out, more = g.op("Add", m[x], m[bias]), m.get(skip)
    return (out if more is None else g.op("Add", out, more), None)[: len(node.outputs)]


@rule(bias_softmax, opset=(13, 10_000))
def expand_bias_softmax(m: Match, g: Builder) -> ir.Value | None:
    """BiasSoftmax(x, b) -> Softmax(x + b), over the last axis.

    Source: com.microsoft BiasSoftmax-1.
    """
    node = m[bias_softmax]
    if not refused(m, bias_softmax):
        return None
    rank, other = len(m.known_dims(x)), len(m.known_dims(bias))
    if m.attr(bias_softmax, "axis", 1) not in (rank - 1, -1) or other != rank:
        raise Skip("an inner axis, or a bias of another rank", node)
    return g.op("Softmax", g.op("Add", m[x], m[bias]), axis=-1)


def _number(g: Builder, value: float, like: ir.Value) -> ir.Value:
    if like.dtype is None:
        raise Skip("unknown element type", like)
    return g.const(np.asarray(value, np.float64).astype(like.dtype.numpy()))


@rule(split_gelu, opset=(18, 10_000))
def expand_split_gelu(m: Match, g: Builder) -> ir.Value | None:
    """BiasSplitGelu(x, b) -> l * Gelu(r), with l and r the halves of x + b.

    Source: com.microsoft BiasSplitGelu-1.
    """
    if not refused(m, split_gelu):
        return None
    left, right = g.ops("Split", g.op("Add", m[x], m[bias]), outputs=2, axis=-1, num_outputs=2)
    bent = g.op("Erf", g.op("Mul", right, _number(g, 1 / math.sqrt(2), m[x])))
    gate = g.op("Add", bent, _number(g, 1.0, m[x]))
    return g.op("Mul", left, g.op("Mul", g.op("Mul", right, _number(g, 0.5, m[x])), gate))


@rule(gemm_gelu, opset=(7, 10_000))
def expand_gemm_gelu(m: Match, g: Builder) -> ir.Value | None:
    """GemmFastGelu(x, W, b) -> FastGelu(MatMul(x, W), b), which is written out in turn.

    Source: com.microsoft GemmFastGelu-1.
    """
    if not refused(m, gemm_gelu):
        return None
    return g.op("FastGelu", g.op("MatMul", m[x], m[y]), m.get(skip), domain=MS)


@exact(nhwc_pool, opset=(12, 10_000))
def expand_nhwc_pool(m: Match, g: Builder) -> ir.Value | None:
    """NhwcMaxPool(x) -> MaxPool between two Transpose.

    Source: com.microsoft NhwcMaxPool-1.
    """
    if not refused(m, nhwc_pool):
        return None
    first, last = _orders(m)
    inner = g.op("MaxPool", g.op("Transpose", m[x], perm=first), like=m[nhwc_pool])
    return g.op("Transpose", inner, perm=last)


@rule(nhwc_conv, opset=(7, 10_000))
def expand_nhwc_conv(m: Match, g: Builder) -> ir.Value | None:
    """NhwcConv(x, W, b) -> Conv between two Transpose; W has channels last too.

    Source: com.microsoft NhwcConv-1.
    """
    if not refused(m, nhwc_conv):
        return None
    first, last = _orders(m)
    weights = g.op("Transpose", m[y], perm=first)
    inner = g.op(
        "Conv", g.op("Transpose", m[x], perm=first), weights, m.get(skip), like=m[nhwc_conv]
    )
    return g.op("Transpose", inner, perm=last)


def _orders(m: Match) -> tuple[list[int], list[int]]:
    """How to bring the channels forward, and back again."""
    rank = len(m.known_dims(x))
    return [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]


@rule(group_norm, opset=(13, 10_000))
def expand_group_norm(m: Match, g: Builder) -> ir.Value | None:
    """GroupNorm(x, gamma, beta) -> InstanceNormalization of the groups, affine, and x * sigmoid(x) where asked for.

    Source: com.microsoft GroupNorm-1; channels are last by default.
    """
    return _normed(m, g, m[x], group_norm) if refused(m, group_norm) else None


@rule(skip_group_norm, opset=(13, 10_000))
def expand_skip_group_norm(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """SkipGroupNorm(x, gamma, beta, skip, b) -> GroupNorm(x + skip + b), and the sum.

    Source: com.microsoft SkipGroupNorm-1.
    """
    if not refused(m, skip_group_norm):
        return None
    skipped = m.dims(y)
    if skipped is None or len(skipped) != len(m.known_dims(x)):
        raise Skip("a skip of another rank", m[y])
    total, added = g.op("Add", m[x], m[y]), m.get(skip)
    if added is not None:
        total = g.op("Add", total, added)
    return (_normed(m, g, total, skip_group_norm), total)[: len(m[skip_group_norm].outputs)]


def _normed(m: Match, g: Builder, value: ir.Value, root: Op) -> ir.Value:
    node = m[root]
    channels_last, groups = m.attr(root, "channels_last", 1), m.attr(root, "groups")
    if len(m.known_dims(x)) != 4:
        raise Skip("other than four dimensions", node)
    data = g.op("Transpose", value, perm=_FIRST) if channels_last else value
    ones, nil = _number(g, 1.0, m[x]), _number(g, 0.0, m[x])
    sizes = g.ints([groups])
    grouped = g.op("Reshape", data, g.ints([0, groups, -1]))
    normed = g.op(
        "InstanceNormalization",
        grouped,
        g.op("Expand", ones, sizes),
        g.op("Expand", nil, sizes),
        epsilon=m.attr(root, "epsilon", 1e-5),
    )
    out = g.op("Reshape", normed, g.op("Shape", data))
    shape = g.ints([1, -1, 1, 1])
    dtype = m.dtype(x)
    assert dtype is not None
    parameters = [
        g.op(
            "Reshape", each if m.dtype(each) == dtype else g.op("Cast", each, to=int(dtype)), shape
        )
        for each in (m[gamma], m[beta])
    ]
    out = g.op("Add", g.op("Mul", out, parameters[0]), parameters[1])
    if m.attr(root, "activation", 0):
        out = g.op("Mul", out, g.op("Sigmoid", out))
    return g.op("Transpose", out, perm=_LAST) if channels_last else out


RULES: tuple[Rule, ...] = (
    use_standard_operator,
    use_standard_unique,
    use_standard_pad,
    use_unsqueeze,
    use_standard_grid_sample,
    expand_bias_add,
    expand_bias_dropout,
    expand_bias_softmax,
    expand_split_gelu,
    expand_gemm_gelu,
    expand_nhwc_pool,
    expand_nhwc_conv,
    expand_group_norm,
    expand_skip_group_norm,
)
