"""How much arithmetic a node does: multiply-accumulate operations, symbolic where the dimensions are.

Only operators whose cost is a product of dimensions count: convolutions, matrix products, attention, recurrent cells.
Elementwise work is left out, as is usual when models are compared (2 floating-point operations a multiply-accumulate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import onnx_ir as ir

from graphopt.ir.shapes.dim import Dim, DimLike

Sizes: TypeAlias = Sequence[Dim]
DimsOf: TypeAlias = Callable[[ir.Value], Sizes | None]


class _UnknownError(Exception):
    """A dimension that the cost depends on is not known; control flow inside this module only."""


@dataclasses.dataclass(frozen=True)
class _Operands:
    """A node with a way to ask for the dimensions of what it takes and gives."""

    node: ir.Node
    dims_of: DimsOf

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def input(self, index: int) -> Sizes:
        return self._known(self.node.inputs[index] if self.has(index) else None)

    def output(self, index: int = 0) -> Sizes:
        return self._known(self.node.outputs[index] if index < len(self.node.outputs) else None)

    def integer(self, name: str, default: int) -> int:
        held = self.node.attributes.get(name)
        if held is None:
            return default
        if held.is_ref():
            raise _UnknownError
        return int(held.as_int())

    def _known(self, value: ir.Value | None) -> Sizes:
        sizes = None if value is None else self.dims_of(value)
        if sizes is None:
            raise _UnknownError
        return sizes


def macs(node: ir.Node, dims_of: DimsOf) -> Dim | None:
    """Multiply-accumulate operations of one run of the node; 0 for what is not counted, None where it is unknown.

    Bodies of control flow are not entered.
    """
    cost = _COSTS.get((node.domain, node.op_type))
    if cost is None:
        return Dim.of(0)
    try:
        return cost(_Operands(node, dims_of))
    except (_UnknownError, IndexError):
        # IndexError: a rank that the operator does not allow.
        return None


def _product(sizes: Sequence[DimLike]) -> Dim:
    total = Dim.of(1)
    for each in sizes:
        total = total * each
    return total


def _conv(weight: int) -> Callable[[_Operands], Dim]:
    """Each output element takes C/group * kernel products; W: [M, C/group, *kernel]."""
    return lambda o: _product(o.output()) * _product(o.input(weight)[1:])


def _conv_transpose(o: _Operands) -> Dim:
    """Each input element goes into M/group * kernel products; W: [C, M/group, *kernel]."""
    return _product(o.input(0)) * _product(o.input(1)[1:])


def _matmul(a: int = 0) -> Callable[[_Operands], Dim]:
    return lambda o: _product(o.output()) * o.input(a)[-1]


def _fused_matmul(o: _Operands) -> Dim:
    left = o.input(0)
    return _product(o.output()) * (left[-2] if o.integer("transA", 0) else left[-1])


def _gemm(o: _Operands) -> Dim:
    return _product(o.output()) * o.input(0)[0 if o.integer("transA", 0) else 1]


def _matmul_nbits(o: _Operands) -> Dim:
    return _product(o.output()) * o.integer("K", 0)


def _recurrent(o: _Operands) -> Dim:
    """X: [steps, batch, I] (or batch first), W: [directions, G*H, I], R: [directions, G*H, H]."""
    x = o.input(0)
    return x[0] * x[1] * (_product(o.input(1)) + _product(o.input(2)))


def _attention(o: _Operands) -> Dim:
    """Q @ K^T and its product with V.  Source: ONNX Attention-23: [B, H, S, D], or [B, S, H*D] with head counts."""
    q, k, v = o.input(0), o.input(1), o.input(2)
    if len(q) == 4:
        heads, steps, head, value_head, keys = q[1], q[2], q[3], v[3], k[2]
    else:
        q_heads, kv_heads = o.integer("q_num_heads", 1), o.integer("kv_num_heads", 1)
        heads, steps, head, value_head, keys = (
            Dim.of(q_heads),
            q[1],
            q[2] // q_heads,
            v[2] // kv_heads,
            k[1],
        )
    if o.has(4):
        keys = keys + o.input(4)[2]
    return q[0] * heads * steps * keys * (head + value_head)


def _contrib_attention(o: _Operands) -> Dim:
    """Projection and attention.  x: [B, S, I], weights: [I, 3*hidden].  Source: com.microsoft Attention-1."""
    x, weights, out = o.input(0), o.input(1), o.output()
    project = x[0] * x[1] * _product(weights)
    return project + x[0] * x[1] * x[1] * (out[-1] * 2)


def _multi_head_attention(o: _Operands) -> Dim:
    """q: [B, S, hidden], k: [B, L, hidden], v: [B, L, hidden of v].  Source: com.microsoft MultiHeadAttention-1."""
    q, k, v = o.input(0), o.input(1), o.input(2)
    return q[0] * q[1] * k[1] * (q[2] + v[2])


def _group_query_attention(o: _Operands) -> Dim:
    """q: [B, S, hidden], present key: [B, kv heads, T, D].  Source: com.microsoft GroupQueryAttention-1."""
    q = o.input(0)
    return q[0] * q[1] * o.output(1)[2] * (q[2] * 2)


def _einsum(o: _Operands) -> Dim:
    """Product over all labels: two operands without ellipsis; anything else is unknown."""
    held = o.node.attributes.get("equation")
    equation = held.as_string().replace(" ", "") if held is not None and not held.is_ref() else "."
    terms = equation.split("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        raise _UnknownError
    sizes: dict[str, Dim] = {}
    for index, term in enumerate(terms):
        sizes.update(zip(term, o.input(index), strict=False))
    return _product(list(sizes.values()))


_MS = "com.microsoft"
_COSTS: dict[tuple[str, str], Callable[[_Operands], Dim]] = {
    ("", "Conv"): _conv(1),
    ("", "ConvInteger"): _conv(1),
    ("", "QLinearConv"): _conv(3),
    ("", "DeformConv"): _conv(1),
    ("", "ConvTranspose"): _conv_transpose,
    ("", "MatMul"): _matmul(),
    ("", "MatMulInteger"): _matmul(),
    ("", "QLinearMatMul"): _matmul(),
    ("", "Gemm"): _gemm,
    ("", "Einsum"): _einsum,
    ("", "LSTM"): _recurrent,
    ("", "GRU"): _recurrent,
    ("", "RNN"): _recurrent,
    ("", "Attention"): _attention,
    (_MS, "FusedConv"): _conv(1),
    (_MS, "NhwcFusedConv"): _conv(1),
    (_MS, "QLinearConv"): _conv(3),
    (_MS, "FusedMatMul"): _fused_matmul,
    (_MS, "TransposeMatMul"): _fused_matmul,
    (_MS, "FusedGemm"): _gemm,
    (_MS, "QGemm"): _gemm,
    (_MS, "MatMulIntegerToFloat"): _matmul(),
    (_MS, "DynamicQuantizeMatMul"): _matmul(),
    (_MS, "MatMulNBits"): _matmul_nbits,
    (_MS, "Attention"): _contrib_attention,
    (_MS, "MultiHeadAttention"): _multi_head_attention,
    (_MS, "GroupQueryAttention"): _group_query_attention,
}
