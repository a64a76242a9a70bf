"""The constant matrix of a product: where it is, how it lies, and what keeps it from being stored in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values

PRODUCTS = {("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")}


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """The constant right operand of a product.

    Attributes:
        value: the constant, behind a Transpose where there is one (tied embeddings).
        turned: whether it lies as [N, K].
    """

    value: ir.Value
    turned: bool

    @property
    def matrix(self) -> np.ndarray:
        """The constant as [K, N]."""
        array = values.array(self.value)
        assert array is not None
        return array.T if self.turned else array


def factor_of(node: ir.Node) -> Factor | None:
    """The constant right operand of a MatMul or Gemm; None where it is computed."""
    if not is_product(node) or node.inputs[1] is None:
        return None
    value, turned = node.inputs[1], is_turned(node)
    if values.is_constant(value):
        return Factor(value, turned)
    maker = value.producer()
    if maker is None or maker.domain or maker.op_type != "Transpose":
        return None
    source = maker.inputs[0]
    tensor = values.constant(source)
    if source is None or tensor is None or len(tensor.shape) != 2:
        return None
    swaps = list(operators.attribute(maker, "perm", (1, 0))) == [1, 0]
    return Factor(source, not turned) if swaps else None


def is_product(node: ir.Node) -> bool:
    """Whether a node multiplies matrices, and does nothing else but scale and add a bias."""
    return (node.domain, node.op_type) in PRODUCTS


def is_turned(node: ir.Node) -> bool:
    """Whether a Gemm or FusedMatMul turns its right operand."""
    return node.op_type != "MatMul" and bool(operators.attribute(node, "transB", 0))


def times(node: ir.Node, name: str) -> float:
    """A factor that a product is scaled with: alpha, or beta for the bias."""
    return 1.0 if node.op_type == "MatMul" else float(operators.attribute(node, name, 1.0))


def why_not(node: ir.Node, least: int, dtypes: Collection[ir.DataType]) -> str | None:
    """What keeps the weight of a product from being stored in integers; "" for what is none or too small to tell."""
    factor = factor_of(node)
    if factor is None:
        left = is_product(node) and values.constant(node.inputs[0])
        return "its constant is the left operand" if left and left.size >= least else ""
    tensor = values.constant(factor.value)
    assert tensor is not None
    if tensor.size < least or values.is_constant(node.inputs[0]):
        return ""
    if tensor.dtype not in dtypes:
        return f"its weight is of {tensor.dtype.name.lower()}"
    if len(tensor.shape) != 2:
        return f"its weight has {len(tensor.shape)} axes; the kernels take matrices"
    if node.op_type == "MatMul":
        return None
    if any(operators.attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return "it turns its left operand, or batches (transA, transBatchA, transBatchB)"
    if added(node) is not None and times(node, "beta") != 1:
        return "it scales a bias that is no row of constants (beta)"
    return None


def bias_row(node: ir.Node) -> np.ndarray | None:
    """The bias of a Gemm as one number a column, times beta; None where it has none, or another."""
    factor, array = factor_of(node), values.array(_bias(node))
    if array is None or factor is None:
        return None
    columns = factor.matrix.shape[1]
    if array.size != 1 and array.shape not in ((columns,), (1, columns)):
        return None
    return np.broadcast_to(array.reshape(-1) * array.dtype.type(times(node, "beta")), (columns,))


def added(node: ir.Node) -> ir.Value | None:
    """What a Gemm adds that is no row of constants; a product with integers leaves it to an Add."""
    return _bias(node) if bias_row(node) is None else None


def _bias(node: ir.Node) -> ir.Value | None:
    has_one = node.op_type == "Gemm" and len(node.inputs) > 2 and times(node, "beta") != 0
    return node.inputs[2] if has_one else None


def broken(factor: Factor) -> str:
    """Why no scale holds the weight; empty where one does."""
    matrix = factor.matrix
    if not matrix.any():
        return "its weight is 0 throughout: its outputs are exact, in integers only nearly"
    laid = matrix.T if factor.turned else matrix
    rows = max((1 << 18) // max(laid.shape[-1], 1), 1)
    whole = all(bool(np.isfinite(laid[i : i + rows]).all()) for i in range(0, len(laid), rows))
    return "" if whole else "its weight holds NaN or infinities"
