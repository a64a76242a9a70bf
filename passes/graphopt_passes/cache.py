"""Keys and values of earlier steps, kept in the attention operator instead of being joined before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.scopes import Scope, all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, name_of, remove
from graphopt.rewrite.commit import take_over
from graphopt.rewrite.relink import mark

RULE = "keep-past-in-attention"


@dataclasses.dataclass(frozen=True)
class Cached:
    """An Attention whose keys and values are joined with those of earlier steps.

    Attributes:
        node: the Attention.
        keys: the Concat of past and new keys.
        values: the Concat of past and new values.
    """

    node: ir.Node
    keys: ir.Node
    values: ir.Node


@dataclasses.dataclass(frozen=True)
class FuseCache:
    """Makes Attention join past and new keys and values by itself.

    Before:  k = Concat(past_k, new_k)  v = Concat(past_v, new_v)  y = Attention(q, k, v, mask)
    After:   y, k, v = Attention(q, new_k, new_v, mask, past_k, past_v)
    All are [B, H, S, D].  Changes numerics: reordered.  Leaves alone: keys that anything but the graph's outputs reads
    besides, a causal attention (its diagonal would move), heads beside each other.  Source: Attention-23.
    """

    name: ClassVar[str] = "fuse-cache"
    numerics: ClassVar[Numerics] = Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for scope in list(all_graphs(model)):
            for cached in list(_cached(scope, ctx)):
                if ctx.permit(RULE, cached.node, Numerics.REORDERED):
                    _apply(cached, ctx)
                    changed = True
        return changed


def _cached(scope: Scope, ctx: Context) -> Iterator[Cached]:
    """The places in a graph, each with a remark where it stays."""
    opset = scope.opsets.get("", 0)
    for node in scope.graph:
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 3:
            continue
        keys, held = (_joined(node.inputs[i], ctx) for i in (1, 2))
        if keys is None or held is None:
            continue
        if not ctx.target.emits("Attention", opset=opset, dtype=node.outputs[0].dtype, form="past"):
            continue
        reason = _reason(node, (keys, held))
        if reason:
            ctx.missed(RULE, node, reason)
        else:
            yield Cached(node, keys, held)


def _joined(value: ir.Value | None, ctx: Context) -> ir.Node | None:
    """The Concat of two tensors [B, H, S, D] along S that makes a value; None where another node does."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Concat" or node.domain or len(node.inputs) != 2:
        return None
    axis = node.attributes.get("axis")
    dims = [None if v is None else ctx.shapes.dims(v) for v in node.inputs]
    if axis is None or axis.is_ref() or axis.as_int() not in (2, -2):
        return None
    return node if all(d is not None and len(d) == 4 for d in dims) else None


def _reason(node: ir.Node, joined: tuple[ir.Node, ir.Node]) -> str:
    """Why the operator cannot take the past in; "" where it can."""
    if any(v is not None for v in node.inputs[4:]) or len(node.outputs) > 1:
        return "it has a past, or further outputs, already"
    causal = node.attributes.get("is_causal")
    if causal is not None and (causal.is_ref() or causal.as_int()):
        return "it is causal: with a past, the diagonal would move"
    heads = node.attributes.get("q_num_heads")
    if heads is not None:
        return "its heads lie beside each other, those of the past do not"
    for each in joined:
        if each.graph is not node.graph or any(
            use.node is not node for use in each.outputs[0].uses()
        ):
            return "the joined keys or values are used elsewhere"
    return "" if joined[0] is not joined[1] else "keys and values are one tensor"


def _apply(cached: Cached, ctx: Context) -> None:
    node, graph = cached.node, cached.node.graph
    assert graph is not None
    past, new = zip(*(each.inputs for each in (cached.keys, cached.values)), strict=True)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    made = ir.Node(
        "",
        "Attention",
        [node.inputs[0], *new, mask, *past],
        attributes=tuple(node.attributes.values()),
        num_outputs=3,
        name=node.name,
        version=node.version,
    )
    mark(made, RULE, node.name or name_of(node), ctx)
    graph.insert_before(node, made)
    olds = (node.outputs[0], cached.keys.outputs[0], cached.values.outputs[0])
    for old, value in zip(olds, made.outputs, strict=True):
        value.type = old.type
        take_over(old, value, fresh=True)
    for each in (node, cached.keys, cached.values):
        if each.graph is not None:
            remove(each, ctx)
    ctx.shapes.update([made])
