"""ONNX operators in torch; importing this package imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphopt.distill.operators import (
    attention,
    elementwise,
    layers,
    quantized,
    recurrent,
    reductions,
    shapes,
)
from graphopt.distill.operators.call import Call, Operator, Tensor
from graphopt.ir import operators

OPERATORS: Mapping[str, Operator] = {
    **elementwise.OPERATORS,
    **shapes.OPERATORS,
    **reductions.OPERATORS,
    **layers.OPERATORS,
    **attention.OPERATORS,
    **recurrent.OPERATORS,
    **quantized.OPERATORS,
}
"""By type."""

MICROSOFT = frozenset(
    {
        "BiasGelu",
        "FastGelu",
        "FusedConv",
        "FusedMatMul",
        "Gelu",
        "MultiHeadAttention",
        "QuickGelu",
        "QuantizeLinear",
        "DequantizeLinear",
        "RotaryEmbedding",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
"""What is known of com.microsoft."""

ONLY_MICROSOFT = MICROSOFT - {"Gelu", "QuantizeLinear", "DequantizeLinear", "RotaryEmbedding"}


def operator_of(node: ir.Node) -> Operator | None:
    """What a node does; None where that is not known."""
    kind = node.op_type
    if node.domain == operators.MICROSOFT:
        return attention.MICROSOFT.get(kind, OPERATORS.get(kind)) if kind in MICROSOFT else None
    if node.domain or kind in ONLY_MICROSOFT:
        return None
    return OPERATORS.get(kind)


__all__ = ["MICROSOFT", "ONLY_MICROSOFT", "OPERATORS", "Call", "Operator", "Tensor", "operator_of"]
