"""Arithmetic around QuantizeLinear that the rounding makes void.

    Before:  y = QuantizeLinear(DequantizeLinear(x, s, z), s, z)     y = QuantizeLinear(Relu(x), s, z), z the least
    After:   y = x                                                   y = QuantizeLinear(x, s, z)

QuantizeLinear saturates, so what is clipped no tighter than that needs no clipping before.  Changes numerics: exact;
reordered for a NaN that is clipped.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule

SMALL = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16)
"""Types of which `(q - z) * s / s`, in float32, rounds to `q - z` again."""

x = Var()
scale, zero = Var(const=True), Var(const=True, optional=True)
scale_again, zero_again = Var(const=True), Var(const=True, optional=True)

restored = Op("DequantizeLinear", x, scale, zero, shared=True)
requantized = Op("QuantizeLinear", restored, scale_again, zero_again)


@exact(requantized, opset=(10, 10_000))
def drop_requantization(m: Match, g: Builder) -> ir.Value | None:
    """`QuantizeLinear(DequantizeLinear(x, s, z), s, z)` -> `x`; a pair of pairs becomes one.

    Source: QuantizeLinear-10 to -25, DequantizeLinear-10 to -25.
    """
    del g
    dtype = m.dtype(x)
    if dtype not in SMALL or m.dtype(requantized) != dtype:
        return None
    if m.dtype(restored) != ir.DataType.FLOAT or m.attr(restored, "axis", 1) != m.attr(
        requantized, "axis", 1
    ):
        return None
    if m.attr(restored, "block_size", 0) or m.attr(requantized, "block_size", 0):
        return None
    same = np.array_equal(m.array(scale), m.array(scale_again)) and np.array_equal(
        m.array(zero, 0.0), m.array(zero_again, 0.0)
    )
    positive = bool((m.array(scale) > 0).all() and np.isfinite(m.array(scale)).all())
    if not same or not positive:
        raise Skip("the pairs differ in scale or zero point", m[requantized])
    return m[x]


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


RULES: tuple[Rule, ...] = (drop_requantization, drop_limit_before_quantization)
