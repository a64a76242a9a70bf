"""What keeps a runtime from doing in 8 bits what shall stay float.

ONNX Runtime makes int8 of float weights, with one scale for all channels, of each Conv, ConvTranspose and Gemm between
a DequantizeLinear and a QuantizeLinear, with nothing but Relu and Clip behind it.  A layer that is left in float for
its accuracy would be the worst one of all.

Before:  DQ -> Conv(x, w, b) -> Relu -> Q
After:   DQ -> com.microsoft FusedConv(x, w, b) -> Relu -> Q      the same kernel, unknown to that rewrite
         DQ -> Max(x) -> Gemm, ConvTranspose: FusedGemm wants an activation; Conv too in standard operators

It also moves a Q up through views and a MaxPool, which then runs on bytes, and away from integer convolutions in a
layout in which that takes six times as long as in float (24 channels of 24 x 24: 106 us beside 17).

Before:  Conv(float) -> Relu -> MaxPool -> Q
After:   Conv(float) -> Relu -> MaxPool -> Max(x) -> Q

Source: ONNX Runtime 1.31.1, weight_bias_quantization.cc, qdq_propagation.cc; read back from optimised graphs.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.build import Names
from graphopt_passes.quantize.fusion import DECODE, ENCODE
from graphopt_passes.quantize.placement import ABSORBED
from graphopt_passes.quantize.styles import MICROSOFT

_QUANTISED = ("Conv", "ConvTranspose", "Gemm")
_VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


def shield(graph: ir.Graph, names: Names, *, contrib: bool = True) -> bool:
    """Writes what the runtime would quantise by itself so that it does not; returns whether com.microsoft is used.

    Without `contrib` in standard operators, for readers that may be another runtime.
    """
    found = [node for node in graph if _is_float_between(node)]
    for node in found:
        if node.op_type == "Conv" and contrib:
            node.domain, node.op_type = MICROSOFT, "FusedConv"
        else:
            assert node.inputs[0] is not None
            same = maxed(node.inputs[0], names)
            graph.insert_before(node, same)
            node.replace_input_with(0, same.outputs[0])
    for node in [node for node in graph if contrib and _is_float_pool(node)]:
        result = node.outputs[0]
        same = maxed(result, names)
        graph.insert_after(node, same)
        for use in result.uses():
            if use.node is not same:
                use.node.replace_input_with(use.idx, same.outputs[0])
    return any(node.domain == MICROSOFT for node in found)


def _is_float_pool(node: ir.Node) -> bool:
    """Whether a Q could move up through a MaxPool of floats."""
    if node.op_type != "MaxPool" or node.domain or len(node.outputs) > 1:
        return False
    if _is_made_by(node.inputs[0], DECODE):
        return False
    value = node.outputs[0]
    while len(uses := tuple(value.uses())) == 1 and uses[0].node.op_type in _VIEWS:
        value = uses[0].node.outputs[0]
    return len(uses) == 1 and uses[0].node.op_type == ENCODE


def _is_float_between(node: ir.Node) -> bool:
    if node.domain or node.op_type not in _QUANTISED:
        return False
    if not _is_made_by(node.inputs[0], DECODE) or _is_made_by(node.inputs[1], DECODE):
        return False
    value = node.outputs[0]
    while len(uses := tuple(value.uses())) == 1 and uses[0].node.op_type in ABSORBED:
        value = uses[0].node.outputs[0]
    return any(use.node.op_type == ENCODE for use in value.uses())


def _is_made_by(value: ir.Value | None, op_type: str) -> bool:
    maker = None if value is None else value.producer()
    return maker is not None and maker.op_type == op_type


def maxed(value: ir.Value, names: Names) -> ir.Node:
    """A Max of one operand: that operand as it is, and nothing that the runtime looks through."""
    same = ir.Node("", "Max", [value], name=names.fresh(f"{value.name}_max"))
    result = same.outputs[0]
    result.name, result.type, result.shape = (
        names.fresh(f"{value.name}_same"),
        value.type,
        value.shape,
    )
    return same
