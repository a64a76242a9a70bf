"""Whether a model may be run without samples: only where every kernel is known to survive that.

ONNX Runtime 1.31 ends the process on an LSTM with an empty batch, which nobody can catch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.ir import scopes

if TYPE_CHECKING:
    import onnx_ir as ir

# Each was run with a dimension of size zero in ONNX Runtime 1.31; it may refuse, but it returns.
_SURVIVORS = frozenset(
    (
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "Cos",
        "CumSum",
        "Div",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "MaxPool",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Softplus",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
        "com.microsoft::BiasGelu",
        "com.microsoft::FastGelu",
        "com.microsoft::FusedConv",
        "com.microsoft::FusedMatMul",
        "com.microsoft::Gelu",
        "com.microsoft::QuickGelu",
        "com.microsoft::SkipLayerNormalization",
    )
)


def takes_empty(model: ir.Model) -> bool:
    """Whether running a model with empty inputs ends in outputs or in an error, not in the end of the process."""
    used = {
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for scope in scopes.all_graphs(model)
        for node in scope.graph
    }
    called = {f"{domain}::{name}" for domain, name, _ in model.functions}
    return used - called <= _SURVIVORS
