"""Limits before QuantizeLinear, which saturates and so has limits itself.

    Before:  y = QuantizeLinear(Relu(x), s, z), z the least number of the type
    After:   y = QuantizeLinear(x, s, z)

Changes numerics: reordered, for a NaN that is clipped.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule

SMALL = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16)
"""Types that saturate at bounds of their own."""

x = Var()
scale, zero = Var(const=True), Var(const=True, optional=True)

limited = Op("Relu|Clip", x, ...)
quantized = Op("QuantizeLinear", limited, scale, zero)


@rule(quantized, opset=(10, 10_000))
def drop_limit_before_quantization(m: Match, g: Builder) -> ir.Value | None:
    """`QuantizeLinear(Clip(x, low, high), s, z)` -> `QuantizeLinear(x, s, z)`, where s and z clip no wider.

    Relu is Clip from 0.  Source: QuantizeLinear-10 to -25, Clip-6 to -13, Relu-6.
    """
    dtype = m.dtype(quantized)
    if dtype is None or dtype not in SMALL or m.dtype(x) != ir.DataType.FLOAT:
        return None
    bounds = (0.0, np.inf) if m[limited].op_type == "Relu" else _bounds(m, m[limited])
    if bounds is None:
        return None
    limits, step = np.iinfo(dtype.numpy()), m.wide(scale)
    middle = m.wide(zero, 0.0)
    if not (np.isfinite(step).all() and (step > 0).all()):
        return None
    lowest, highest = ((limit - middle) * step for limit in (limits.min, limits.max))
    if (bounds[0] > lowest).any() or (bounds[1] < highest).any():
        raise Skip("it clips tighter than the quantisation", m[limited])
    return g.op("QuantizeLinear", m[x], m[scale], m.get(zero), like=m[quantized])


def _bounds(m: Match, node: ir.Node) -> tuple[float, float] | None:
    """Between what a Clip clips; None where that is computed."""
    if m.opset() < 11:
        return float(m.attr(node, "min", -np.inf)), float(m.attr(node, "max", np.inf))
    found = [-np.inf, np.inf]
    for index, value in enumerate(node.inputs[1:3]):
        number = values.scalar(value)
        if value is not None and number is None:
            return None
        found[index] = found[index] if number is None else float(number)
    return found[0], found[1]


RULES: tuple[Rule, ...] = (drop_limit_before_quantization,)
