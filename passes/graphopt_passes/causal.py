"""Causal attention: masks that let each query see what came before it, told to the operator instead of computed.

    Before:  y = Attention(q, k, v, mask)     mask[i, j]: j <= i, or also i - j < w
    After:   y = Attention(q, k, v, is_causal=1), or y = GroupQueryAttention(q, k, v, local_window_size=w)

ONNX Runtime's CPU kernel of GroupQueryAttention computes the exponentials of what a query sees alone; Attention
computes those of masked scores too, whose underflow costs ten times as much.  Changes numerics: reordered.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, is_cut_to
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt_passes.bands import ALL, CAUSAL, Band, visible

MS = "com.microsoft"
WIDTH = 8
"""What the size of a head is a multiple of, as GroupQueryAttention demands."""

q, k, v, mask = Var(), Var(), Var(), Var()
masked = Op("Attention", q, k, v, mask)


@rule(masked, opset=(23, 10_000))
def drop_mask_that_hides_nothing(m: Match, g: Builder) -> ir.Value | None:
    """`Attention(q, k, v, mask)` -> `Attention(q, k, v)`, the mask true, or zero, everywhere.  Source: Attention-23."""
    if visible(m, m[mask]) != ALL or len(m[masked].outputs) > 1:
        return None
    return g.op("Attention", m[q], m[k], m[v], like=m[masked])


@rule(masked, opset=(23, 10_000))
def name_causal_mask(m: Match, g: Builder) -> ir.Value | None:
    """`Attention(q, k, v, j <= i)` -> `Attention(q, k, v, is_causal=1)`, as many keys as queries.

    With fewer queries than keys, runtimes differ in where the diagonal lies.  Source: Attention-23.
    """
    node = m[masked]
    if not m.emits("Attention", dtype=m.dtype(q), form="causal") or visible(m, m[mask]) != CAUSAL:
        return None
    if len(node.outputs) > 1 or not _is_square(m, node):
        raise Skip("a causal mask of fewer queries than keys", m[mask])
    return g.op("Attention", m[q], m[k], m[v], like=node, is_causal=1)


attention = Op("Attention", q, k, v, ...)


@rule(attention, opset=(23, 10_000), benefit=2)
def group_causal_attention(m: Match, g: Builder) -> ir.Value | None:
    """`Attention(q, k, v, mask)` -> `GroupQueryAttention(q, k, v)`, the mask causal, with a window or without.

    q: [B, S, H D], k, v: [B, S, G D].  Source: com.microsoft GroupQueryAttention-1.
    """
    node = m[attention]
    if not m.emits("GroupQueryAttention", MS, m.dtype(q)):
        return None
    band = _band(m, node)
    if band is None or band.upper != 0 or (band.lower is not None and band.lower > 0):
        return None
    if any(each is not None for each in node.inputs[4:]) or len(node.outputs) > 1:
        raise Skip("past or present keys are given or asked for", node)
    heads, groups = (int(m.attr(node, name, 0)) for name in ("q_num_heads", "kv_num_heads"))
    if not heads or not groups:
        raise Skip("the heads are in front: the kernel takes [B, S, H D]", node)
    _refuse_sizes(m, node, heads, groups)
    length, total = _lengths(m, g)
    return g.op(
        "GroupQueryAttention",
        *(m[q], m[k], m[v], None, None, length, total),
        domain=MS,
        num_heads=heads,
        kv_num_heads=groups,
        scale=m.attr(node, "scale", None),
        local_window_size=None if band.lower is None else 1 - band.lower,
    )


def _band(m: Match, node: ir.Node) -> Band | None:
    """What the queries of a node see; None where that is no band."""
    given = node.inputs[3] if len(node.inputs) > 3 else None
    if not m.attr(node, "is_causal", 0):
        return None if given is None else visible(m, given)
    return CAUSAL if given is None else None


def _is_square(m: Match, node: ir.Node) -> bool:
    """Whether there are as many keys as queries, and the mask is of both."""
    axis = 1 if len(m.known_dims(q)) == 3 else 2
    size = m.known_dims(q)[axis]
    given = node.inputs[3] if len(node.inputs) > 3 else None
    whole = given is None or all(is_cut_to(dim, size) for dim in m.known_dims(given)[-2:])
    return whole and m.known_dims(k)[axis] == size


def _refuse_sizes(m: Match, node: ir.Node, heads: int, groups: int) -> None:
    """Declines what the kernel does not take.

    Raises:
        Skip: fewer queries than keys, heads of other sizes, or limited scores.
    """
    if not _is_square(m, node):
        raise Skip("a causal mask of fewer queries than keys", node)
    hidden = [m.known_dims(each)[2].value for each in (q, k, v)]
    if hidden[0] is None or hidden[1] is None or hidden[1] != hidden[2]:
        raise Skip("keys and values differ in size, or it is unknown", node)
    if hidden[0] // heads % WIDTH or hidden[0] * groups != hidden[1] * heads:
        raise Skip(f"the size of a head is no multiple of {WIDTH}", node)
    if m.attr(node, "softcap", 0.0) or m.attr(node, "qk_matmul_output_mode", 0):
        raise Skip("the scores are limited, or asked for", node)


def _lengths(m: Match, g: Builder) -> tuple[ir.Value, ir.Value]:
    """The last key of each row of the batch, and how many keys there are.

    An empty batch has no keys here: the kernel of ONNX Runtime 1.31 refuses that, and would divide by zero otherwise.
    """
    batch, size = m.known_dims(q)[:2]
    if batch.value and size.value is not None:
        each = np.full([batch.value], size.value - 1, np.int32)
        whole = np.asarray(size.value, np.int32)
        return g.const(each, name="last"), g.const(whole, name="keys")
    rows = g.op("Shape", m[q], start=0, end=1)
    keys = _as_int32(g, size, g.op("Shape", m[q], start=1, end=2))
    last = g.op("Expand", g.op("Sub", keys, g.const(np.ones(1, np.int32))), rows)
    some = g.op("Min", _as_int32(g, batch, rows), g.const(np.ones(1, np.int32)))
    return last, g.op("Squeeze", g.op("Mul", keys, some), g.ints([0]))


def _as_int32(g: Builder, dim: Dim, size: ir.Value) -> ir.Value:
    if dim.value is not None:
        return g.const(np.asarray([dim.value], np.int32))
    return g.op("Cast", size, to=ir.DataType.INT32)


RULES: tuple[Rule, ...] = (drop_mask_that_hides_nothing, name_causal_mask, group_causal_attention)
