"""ONNX operators in torch; importing this package imports torch."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.distill.operators import elementwise, layers, quantized, reductions, shapes
from graphopt.distill.operators.call import Call, Operator, Tensor

OPERATORS: Mapping[str, Operator] = {
    **elementwise.OPERATORS,
    **shapes.OPERATORS,
    **reductions.OPERATORS,
    **layers.OPERATORS,
    **quantized.OPERATORS,
}
"""By type."""

MICROSOFT = frozenset(
    {
        "BiasGelu",
        "FastGelu",
        "FusedMatMul",
        "Gelu",
        "QuickGelu",
        "QuantizeLinear",
        "DequantizeLinear",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
"""What is known of com.microsoft."""

ONLY_MICROSOFT = MICROSOFT - {"Gelu", "QuantizeLinear", "DequantizeLinear"}

__all__ = ["MICROSOFT", "ONLY_MICROSOFT", "OPERATORS", "Call", "Operator", "Tensor"]
