"""Keeps the runtime's load-time optimiser from fusions that its kernels lose by; the last step of a pipeline.

    Before:  z = Add(x, y)   n = LayerNormalization(z, …)
    After:   z = Sum(x, y)   n = LayerNormalization(z, …)

What is slower, and by which measurement, is the target's `shuns`.  Changes numerics: exact, PRelu reordered.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule

SKIP_LAYER_NORM = "SkipLayerNormalization"

x, y = Var(), Var()
residual = Op("Add", x, y)


@exact(residual, opset=(8, 10_000))
def hide_residual_addition(m: Match, g: Builder) -> ir.Value | None:
    """`LayerNormalization(x + y)` -> `LayerNormalization(Sum(x, y))`, where the target shuns SkipLayerNormalization.

    ONNX Runtime's SkipLayerNormFusion looks for an Add; the Sum of two is the same kernel loop and the same number.
    Source: Sum-8.
    """
    if SKIP_LAYER_NORM not in m.facts.target.shuns:
        return None
    fed = [use.node for use in m.out(residual).uses() if use.idx == 0]
    if not any(user.op_type == "LayerNormalization" and not user.domain for user in fed):
        return None
    return g.op("Sum", m[x], m[y])


FEW = 1 << 14
"""Elements below which one slow kernel costs less than four fast ones."""

slope = Var(const=True)
parametric = Op("PRelu", x, slope)


@rule(parametric, opset=(8, 10_000))
def spell_out_prelu(m: Match, g: Builder) -> ir.Value | None:
    """`PRelu(x, a)` -> `Relu(x) + a * Min(x, 0)`, a constant, where the target shuns PRelu.

    The kernel of ONNX Runtime 1.31 goes element by element.  A tensor that is small, or whose slope is one number
    (LeakyRelu), stays.  Only the sign of a zero may change.  Source: PRelu-7, -9, -16, Min-8.
    """
    if "PRelu" not in m.facts.target.shuns or m.dtype(x) != ir.DataType.FLOAT:
        return None
    dims = m.known_dims(x)
    if m.dims(parametric) != dims:
        raise Skip("the slope broadens the result", m[slope])
    if all(d.is_static for d in dims) and math.prod(int(d) for d in dims) < FEW:
        return None
    if not np.isfinite(m.array(slope)).all():
        raise Skip("a slope is not finite", m[slope])
    below = g.op("Min", m[x], g.const(np.zeros((), np.float32), name="zero"))
    return g.op("Add", g.op("Relu", m[x]), g.op("Mul", below, m[slope]))


RULES: tuple[Rule, ...] = (hide_residual_addition, spell_out_prelu)
