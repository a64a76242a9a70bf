"""Products as an integer kernel takes them: plain, and without what they add besides a bias.

Before:  y = Gemm<alpha, beta>(x, W, c)               c computed, or not one number a channel
After:   p = Gemm(x, alpha W)  y = Add(p, beta c)     the product in integers, the sum in float

Before:  y = FusedMatMul<alpha, transB=1>(x, W)       W is read as it is elsewhere, as a table
After:   y = MatMul(x, alpha W^T)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators
from graphopt_passes.quantize.pairs import Pairs


def make_plain(node: ir.Node) -> float:
    """Takes off a product what its weight and bias shall hold; returns what its addend is multiplied with.

    The weight is to be replaced by one that has the factor, and stands as that of a MatMul does.
    """
    beta = float(operators.attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0
    if node.op_type == "FusedMatMul":
        node.domain, node.op_type = "", "MatMul"
        node.attributes.clear()
    for name in ("alpha", "beta") if node.op_type == "Gemm" else ():
        if operators.attribute(node, name, 1.0) != 1:
            node.attributes.pop(name)
    return beta


def part(node: ir.Node, addend: ir.Value, beta: float, pairs: Pairs) -> None:
    """Makes a Gemm a sum of its product and the addend; the sum keeps node, result and names."""
    output = node.outputs[0]
    product = ir.Node(
        "",
        node.op_type,
        node.inputs,
        tuple(node.attributes.values()),
        name=pairs.names.fresh(f"{output.name}_product"),
    )
    made = product.outputs[0]
    made.name = pairs.names.fresh(f"{output.name}_float")
    made.type, made.shape = output.type, output.shape
    new = [product]
    if beta != 1:
        held = pairs.held(f"{addend.name}_by", np.asarray(beta, np.float32))
        times = ir.Node("", "Mul", [addend, held], name=pairs.names.fresh(f"{addend.name}_times"))
        scaled = times.outputs[0]
        scaled.name = pairs.names.fresh(f"{addend.name}_scaled")
        scaled.type, scaled.shape = addend.type, addend.shape
        new, addend = [product, times], scaled
    pairs.graph.insert_before(node, new)
    node.op_type = "Add"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, made)
    node.replace_input_with(1, addend)
