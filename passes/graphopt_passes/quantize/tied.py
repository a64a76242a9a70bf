"""Weights behind a Transpose of what others read as it lies (tied embeddings): constants while layers are chosen.

Before:  y = MatMul(n, Transpose(table))      e = Gather(table, i)
While:   y = MatMul(n, turned)                the same numbers, and a constant weight
After:   a layer in integers keeps its own codes; one in float reads the Transpose again, and nothing is stored twice

Where the target has FusedMatMul there is no Transpose, and a layer that is scaled keeps a weight of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.build import Names
from graphopt_passes.quantize.files import outside


@contextlib.contextmanager
def turned_weights(graph: ir.Graph, names: Names) -> Iterator[None]:
    """Has products read constants for as long as it takes to quantise some; the others read what they read before."""
    laid = [(node, node.inputs[1], _turned(node, names)) for node in graph if _is_tied(node)]
    for node, _, held in laid:
        graph.register_initializer(held)
        node.replace_input_with(1, held)
    try:
        yield
    finally:
        for node, before, held in laid:
            if node.inputs[1] is held:
                node.replace_input_with(1, before)
        for _, _, held in laid:
            if not held.uses():
                graph.initializers.pop(held.name or "", None)


def _is_tied(node: ir.Node) -> bool:
    if node.domain or node.op_type != "MatMul":
        return False
    maker = node.inputs[1].producer() if node.inputs[1] is not None else None
    if maker is None or maker.domain or maker.op_type != "Transpose":
        return False
    tensor = values.constant(maker.inputs[0])
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT or len(tensor.shape) != 2:
        return False
    return tuple(operators.attribute(maker, "perm", (1, 0))) == (1, 0)


def _turned(node: ir.Node, names: Names) -> ir.Value:
    """The weight as the product reads it."""
    assert node.inputs[1] is not None
    maker = node.inputs[1].producer()
    assert maker is not None
    array = values.array(maker.inputs[0])
    assert array is not None
    name = names.fresh(f"{node.inputs[1].name}_turned")
    tensor = outside(array.T, name)
    return ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(array.T.shape),
        const_value=tensor,
    )
