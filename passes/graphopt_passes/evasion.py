"""Keeps the runtime's load-time optimiser from fusions that its kernels lose by; the last step of a pipeline.

    Before:  z = Add(x, y)   n = LayerNormalization(z, …)
    After:   z = Sum(x, y)   n = LayerNormalization(z, …)

What is slower, and by which measurement, is the target's `shuns`.  Changes numerics: exact.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Var, exact

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


RULES: tuple[Rule, ...] = (hide_residual_addition,)
