"""Reads keys and values as attention is spelled: transposed in three ways, their heads repeated for several queries."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match
from graphopt_passes.repeats import unrepeated


def shares(queries: tuple[Dim, ...], keys: tuple[Dim, ...]) -> bool:
    """Whether each head of keys serves the same number of heads of queries."""
    if queries == keys:
        return True
    several, few = queries[1].value, keys[1].value
    return (
        queries[0] == keys[0] and several is not None and bool(few) and several % int(few or 1) == 0
    )


def ungrouped(m: Match, key: ir.Value, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before their heads were repeated, where both were alike: `repeat_kv` of grouped attention."""
    found = [unrepeated(m, each) for each in (key, value)]
    if None in found:
        return key, value
    keys, vals = (each for each in found if each is not None)
    return (keys, vals) if m.known_dims(keys)[:2] == m.known_dims(vals)[:2] else (key, value)


def untransposed(
    m: Match, g: Builder, k_t: ir.Value, graph: ir.Graph | ir.Function | None
) -> ir.Value:
    """The keys [B, H, L, D] (or an Expand to [B, G, n, L, D]) whose transpose `k_t`, in `graph`, the scores use."""
    maker = k_t.producer()
    if maker is not None and maker.graph is graph:
        folded = _of_folded_heads(m, k_t, maker)
        if folded is not None:
            return folded
        if maker.op_type == "Transpose" and maker.inputs[0] is not None:
            perm = tuple(m.attr(maker, "perm", (3, 2, 1, 0)))
            if perm == (0, 1, 3, 2):
                return maker.inputs[0]
            return g.op("Transpose", maker.inputs[0], perm=(perm[0], perm[1], perm[3], perm[2]))
    return g.op("Transpose", k_t, perm=(0, 1, 3, 2))


def _of_folded_heads(m: Match, k_t: ir.Value, maker: ir.Node) -> ir.Value | None:
    """Keys k whose kT is `Reshape(Transpose(Reshape(k, [B H, L, D]), (0, 2, 1)), [B, H, D, L])`: as torch exports."""
    swap = _maker(maker.inputs[0]) if maker.op_type == "Reshape" else None
    fold = _maker(swap.inputs[0]) if swap is not None and swap.op_type == "Transpose" else None
    if swap is None or fold is None or fold.op_type != "Reshape" or fold.inputs[0] is None:
        return None
    if tuple(m.attr(swap, "perm", ())) != (0, 2, 1):
        return None
    source = fold.inputs[0]
    dims, flat, turned = m.dims(source), m.dims(fold.outputs[0]), m.known_dims(k_t)
    if dims is None or flat is None or len(turned) != 4 or len(dims) < 4:
        return None
    wanted = (turned[0], turned[1], turned[3], turned[2])
    if flat[1:] != wanted[2:] or dims[-2:] != wanted[2:]:
        return None
    if dims == wanted:
        return source
    grouped = len(dims) == 5 and unrepeated(m, source) is not None
    return source if grouped and (dims[0], dims[1] * dims[2]) == wanted[:2] else None


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def cast_below_views(g: Builder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A value in another type, cast before it was viewed: what looks for the views finds them."""
    node = value.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None:
        return g.op("Cast", value, to=dtype)
    if node.op_type in ("Transpose", "Reshape"):
        below = cast_below_views(g, node.inputs[0], dtype)
        return g.op(node.op_type, below, *node.inputs[1:], like=node)
    if node.op_type == "Cast" and value.dtype == dtype:
        return cast_below_views(g, node.inputs[0], dtype)
    return g.op("Cast", value, to=dtype)


def first_with(m: Match, operand: ir.Value, size: Dim) -> tuple[ir.Value, int]:
    """What queries or values are a view of, and which of its axes is of that size."""
    found, node = (operand, len(m.known_dims(operand)) - 2), operand.producer()
    while node is not None and node.op_type in ("Transpose", "Reshape") and node.inputs[0]:
        dims = m.known_dims(node.inputs[0])
        if size in dims:
            found = node.inputs[0], dims.index(size)
        node = node.inputs[0].producer()
    return found


def size_of(g: Builder, size: Dim, source: ir.Value, axis: int) -> ir.Value:
    """A size as a tensor of one number, of that axis of `source` where it is not known."""
    if size.value is not None:
        return g.ints([size.value])
    return g.op("Shape", source, start=axis, end=axis + 1)
