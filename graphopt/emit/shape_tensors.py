"""Inputs that decide shapes: an engine is built for a range of their values, not of their dimensions."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.emit.placement import HOST_INPUTS

_HANDS_ON = frozenset(
    {
        *("Abs", "Add", "Cast", "Ceil", "Concat", "Div", "Equal", "Expand", "Flatten", "Floor"),
        *("Gather", "Identity", "Max", "Min", "Mod", "Mul", "Neg", "ReduceProd", "ReduceSum"),
        *("Reshape", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
    }
)
"""Operators whose results are shapes if their operands are."""

_DECIDED_OTHERWISE = frozenset({"If", "Loop"})
"""They read on the host too, but conditions and counts are no shapes."""


def shape_tensors(model: ir.Model) -> frozenset[str]:
    """Names of integer inputs of at most one dimension whose values become shapes, axes or sizes.

    Source: TensorRT documentation, "shape tensors"; the operands are those that the CUDA kernels of ONNX Runtime read
    on the host.
    """
    return frozenset(
        value.name
        for value in model.graph.inputs
        if value.name and not value.is_initializer() and _may_be(value) and _reaches(value)
    )


def _may_be(value: ir.Value) -> bool:
    small = value.shape is not None and len(value.shape) <= 1
    return small and value.dtype in (ir.DataType.INT32, ir.DataType.INT64)


def _reaches(root: ir.Value) -> bool:
    pending, seen = [root], {root}
    while pending:
        for use in pending.pop().uses():
            op = use.node.op_type if not use.node.domain else ""
            if op in HOST_INPUTS and use.idx in HOST_INPUTS[op] and op not in _DECIDED_OTHERWISE:
                return True
            fresh = [out for out in use.node.outputs if out not in seen] if op in _HANDS_ON else []
            seen.update(fresh)
            pending += fresh
    return False
