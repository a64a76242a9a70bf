"""Sums of embeddings under a layer normalisation: one operator where the target's kernel gains by it.

    Before:  y = LayerNormalization(words[ids] + positions[places] + segments[types], s, b)
    After:   y = EmbedLayerNormalization(ids, types, words, positions, segments, s, b, , places)

Changes numerics: reordered.  Ids may not be negative, as Gather would allow: the kernel refuses them.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Either, Match, Op, Rule, Skip, Var, rule

MS = "com.microsoft"

first, second, third = Var(), Var(), Var()
scale, shift = Var(const=True), Var(const=True)
two = Op("Add|Sum", first, second)
three = Op("Add|Sum", Op("Add|Sum", first, second), third)
all_three = Op("Sum", first, second, third)
normal = Op("LayerNormalization", Either(all_three, three, two), scale, shift)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One summand: rows of a table, by ids [B, S]; without ids, the table is rows 0, 1, … for each place."""

    table: ir.Value
    ids: ir.Value | None


@rule(normal, opset=(7, 10_000), benefit=2)
def fuse_embedding_layer_norm(m: Match, g: Builder) -> ir.Value | None:
    """`LayerNormalization(sum of two or three embeddings)` -> `EmbedLayerNormalization`.

    ids: [B, S], tables: [N, H], the positions' ids [1, S] or [B, S], or all positions [1, S, H].  Source:
    com.microsoft EmbedLayerNormalization-1.
    """
    found = [_lookup(m, m[each]) for each in (first, second, third) if m.get(each) is not None]
    if not any(each is not None and each.ids is not None for each in found):
        return None
    if not m.emits("EmbedLayerNormalization", MS, m.dtype(normal)):
        return None
    node = m[normal]
    if len(node.outputs) > 1 or int(m.attr(normal, "axis", -1)) not in (-1, 2):
        raise Skip("it is not over the last axis alone, or its statistics are used", node)
    if any(each is None for each in found) or len(m.known_dims(normal)) != 3:
        raise Skip("a summand is no embedding of [B, S]", node)
    parts = _in_order(m, [each for each in found if each is not None])
    if parts is None:
        raise Skip("no summand is of places alone", node)
    ids = [None if each is None or each.ids is None else _as_int32(g, each.ids) for each in parts]
    held = [None if each is None else _table(g, each) for each in parts]
    return g.ops(  # the second output, an index of the mask, may not be left out
        "EmbedLayerNormalization",
        *(ids[0], ids[2], *held, m[scale], m[shift], None, ids[1]),
        outputs=2,
        domain=MS,
        epsilon=float(m.attr(normal, "epsilon", 1e-5)),
    )[0]


def _lookup(m: Match, value: ir.Value) -> Lookup | None:
    """A summand as rows of a constant table; None where it is something else."""
    dims, node = m.dims(value), value.producer()
    if values.is_constant(value):
        whole = dims is not None and len(dims) == 3 and dims[0] == 1 and dims[1].is_static
        return Lookup(value, None) if whole else None
    if node is None or node.op_type != "Gather" or node.domain or m.attr(node, "axis", 0):
        return None
    table, ids = node.inputs
    if table is None or ids is None or not values.is_constant(table):
        return None
    ids = _unexpanded(m, ids)
    rows, places = m.dims(table), m.dims(ids)
    flat = rows is not None and len(rows) == 2 and places is not None and len(places) == 2
    return Lookup(table, ids) if flat else None


def _unexpanded(m: Match, ids: ir.Value) -> ir.Value:
    """One row of ids that an Expand repeats for the batch, or the ids as they are."""
    node = ids.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Expand" else None
    before, after = None if source is None else m.dims(source), m.dims(ids)
    if source is None or before is None or after is None or len(before) != 2 or len(after) != 2:
        return ids
    return source if before[0] == 1 and before[1] == after[1] else ids


def _in_order(m: Match, found: list[Lookup]) -> tuple[Lookup, Lookup, Lookup | None] | None:
    """Words, places and types: places have no ids, constant ones, or one row of them for all of the batch."""
    batch = m.known_dims(normal)[0]
    shared = [e for e in found if e.ids is None or _is_of_places(m, e.ids, batch)]
    if len(shared) != 1:
        return None
    others = [each for each in found if each is not shared[0]]
    others.sort(key=lambda each: -_rows(m, each))  # the smaller table is that of types
    return others[0], shared[0], others[1] if len(others) > 1 else None


def _is_of_places(m: Match, ids: ir.Value, batch: Dim) -> bool:
    return values.is_constant(ids) or m.known_dims(ids)[0] == 1 != batch


def _table(g: Builder, each: Lookup) -> ir.Value:
    """A table [N, H]: places that come as [1, S, H] lose their first axis."""
    if each.ids is not None:
        return each.table
    data = values.array(each.table)
    if data is None:
        raise Skip("not a constant", each.table)
    return g.const(data[0], name="positions")


def _rows(m: Match, each: Lookup) -> int:
    return int(m.known_dims(each.table)[0])


def _as_int32(g: Builder, ids: ir.Value) -> ir.Value:
    return ids if ids.dtype == ir.DataType.INT32 else g.op("Cast", ids, to=ir.DataType.INT32)


RULES: tuple[Rule, ...] = (fuse_embedding_layer_norm,)
