"""Reads heads that were repeated for grouped attention, as exporters write `repeat_kv`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match


def unrepeated(m: Match, value: ir.Value) -> ir.Value | None:
    """[B, G, L, D] before each head was repeated, however that is spelled; None where it was not."""
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Gather":
        return _of_repeating_gather(m, node)
    if node.op_type == "Expand" and node.inputs[0] is not None:
        one, whole = m.dims(node.inputs[0]), m.dims(value)
        single = one is not None and len(one) == 4 and one[1] == 1
        if (
            single
            and whole is not None
            and one is not None
            and whole == (one[0], whole[1], *one[2:])
        ):
            return node.inputs[0]
    return _of_repeated_axis(m, value)


def _of_repeating_gather(m: Match, node: ir.Node) -> ir.Value | None:
    """The source of `Gather(k, [0, 0, 1, 1, …], axis=1)`: `repeat_interleave` as torch.export spells it."""
    source, data = node.inputs[0], values.array(node.inputs[1])
    dims = None if source is None else m.dims(source)
    if dims is None or data is None or len(dims) != 4 or dims[1].value is None or data.ndim != 1:
        return None
    few = dims[1].value
    if int(m.attr(node, "axis", 0)) % 4 != 1 or few == 0 or data.size % few:
        return None
    return source if np.array_equal(data, np.arange(few).repeat(data.size // few)) else None


def _of_repeated_axis(m: Match, value: ir.Value) -> ir.Value | None:
    """[B, G, L, D] out of `Reshape(Expand(Unsqueeze(k, 2), [B, G, n, L, D]), [B, G n, L, D])`, Tile for Expand too."""
    node = value.producer()
    inner = node.inputs[0] if node is not None and node.op_type == "Reshape" else value
    spread = None if inner is None else inner.producer()
    if inner is None or spread is None or spread.op_type not in ("Expand", "Tile"):
        return None
    lift = None if spread.inputs[0] is None else spread.inputs[0].producer()
    if lift is None or lift.op_type not in ("Unsqueeze", "Reshape") or lift.inputs[0] is None:
        return None
    wide, dims, whole = m.dims(inner), m.dims(lift.inputs[0]), m.dims(value)
    if wide is None or dims is None or whole is None or len(wide) != 5 or len(dims) != 4:
        return None
    lifted = m.known_dims(lift.outputs[0])
    if lifted != (*dims[:2], Dim.of(1), *dims[2:]) or wide != (*dims[:2], wide[2], *dims[2:]):
        return None
    repeated = (dims[0], dims[1] * wide[2], *dims[2:])
    return lift.inputs[0] if value is inner or whole == repeated else None
