"""Tables whose rows are picked by Gather (embeddings), pruned where the user asks for it.

A row is read as it is: nothing before the table can make up for what it loses, only the layers behind it can, and they
are fitted afterwards.  So tables stay dense by default, though in small language models they are a fifth to a half of
the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.sparse import thin
from graphopt.runtime.footprint import let_go
from graphopt_passes.prune.allocate import smallest
from graphopt_passes.prune.layers import FLOATS

LEAST_ELEMENTS = 1 << 14
"""Smaller tables stay dense."""

LEAST_SHARE = 0.1
"""Of the greatest table: beside a vocabulary, positions and kinds of tokens are few, and each input reads them."""


@dataclasses.dataclass(frozen=True)
class PrunedTable:
    """A table after pruning.

    Attributes:
        value: the initializer.
        tensor: as it is to be stored.
        zeros: how many elements are zero.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    zeros: int


def find_tables(graph: ir.Graph, dense: str = "") -> list[ir.Value]:
    """The large float constants [rows, columns] of a graph that Gather alone reads, row by row.

    Args:
        graph: the main graph.
        dense: names that the user wants dense, as a regular expression.
    """
    found = [value for value in graph.initializers.values() if _is_table(value)]
    most = max((table_size(value) for value in found), default=0)
    return [
        value
        for value in found
        if table_size(value) >= max(LEAST_ELEMENTS, LEAST_SHARE * most)
        and not (dense and re.search(dense, value.name or ""))
    ]


def _is_table(value: ir.Value) -> bool:
    tensor = values.constant(value)
    if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
        return False
    uses = tuple(value.uses())
    picked = all(
        node.op_type == "Gather"
        and not node.domain
        and place == 0
        and operators.attribute(node, "axis", 0) in (0, -2)
        for node, place in uses
    )
    return bool(uses) and picked and not value.is_graph_output()


def table_size(value: ir.Value) -> int:
    """Number of elements."""
    return 0 if value.const_value is None else int(value.const_value.size)


def prune_tables(tables: Sequence[ir.Value], share: float) -> list[PrunedTable]:
    """Each table with that share of its elements zero, the smallest of the whole table.

    Over the whole table, not row by row: rows of seldom words are short, and lose more.
    """
    return [_pruned(value, share) for value in tables] if share else []


def _pruned(value: ir.Value, share: float) -> PrunedTable:
    tensor = value.const_value
    assert tensor is not None
    array = np.array(tensor.numpy())
    let_go([tensor])
    keep = smallest(np.abs(array.astype(np.float32, copy=False)), round(share * array.size))
    array[~keep] = 0
    array += array.dtype.type(0)  # -0.0 would count as a value in the file
    zeros = int(array.size - np.count_nonzero(array))
    return PrunedTable(value, thin(array, tensor.dtype, value.name), zeros)


def stored(done: Sequence[PrunedTable]) -> Mapping[str, ir.TensorProtocol]:
    """The tables by name."""
    return {each.value.name or "": each.tensor for each in done}
