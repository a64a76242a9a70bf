"""Operators of com.microsoft written as standard ones, for targets that know the standard alone.

    Before:  y = com.microsoft::QuickGelu<alpha = 1.702>(x)
    After:   y = Mul(x, Sigmoid(Mul(x, 1.702)))

Where the target has a standard operator that means the same (Gelu at opset 20), that one is used.  Changes numerics:
reordered.  Leaves alone: everything where the target has kernels for com.microsoft.
Source: onnxruntime/docs/ContribOperators.md, version 1.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule

MS = "com.microsoft"
CUBIC = 0.044715
TANH = math.sqrt(2 / math.pi)
OPSETS = (7, 10_000)
"""Opsets of multidirectional broadcasting."""

x, y, w, z, b = Var(), Var(), Var(), Var(), Var()
bias = Var(optional=True)
gamma, beta = Var(), Var(optional=True)

gelu = Op("Gelu", x, domain=MS)
bias_gelu = Op("BiasGelu", x, b, domain=MS)
fast_gelu = Op("FastGelu", x, bias, domain=MS)
quick_gelu = Op("QuickGelu", x, domain=MS)
fused_matmul = Op("FusedMatMul|TransposeMatMul", x, y, domain=MS)
skip_norm = Op("SkipLayerNormalization", x, y, gamma, beta, bias, domain=MS)
fused_conv = Op("FusedConv", x, w, bias, Var(optional=True), domain=MS)
fused_gemm = Op("FusedGemm", x, y, bias, domain=MS)
scaled = Op("QuantizeLinear|DequantizeLinear", x, y, Var(optional=True), domain=MS)


def _wanted(m: Match) -> bool:
    return not m.facts.target.has_domain(MS)


def _number(g: Builder, value: float, like: ir.Value) -> ir.Value:
    dtype = like.dtype
    if dtype is None:
        raise Skip("unknown element type", like)
    return g.const(ir.tensor(np.asarray(value, np.float64).astype(dtype.numpy())))


def _gelu_of(m: Match, g: Builder, value: ir.Value) -> ir.Value:
    """0.5 * v * (1 + erf(v / sqrt(2)))."""
    if m.emits("Gelu", dtype=value.dtype or m.dtype(x)):
        return g.op("Gelu", value)
    like = m[x]
    bent = g.op("Erf", g.op("Mul", value, _number(g, 1 / math.sqrt(2), like)))
    gate = g.op("Add", bent, _number(g, 1.0, like))
    return g.op("Mul", g.op("Mul", value, _number(g, 0.5, like)), gate)


@rule(gelu, opset=(9, 10_000))
def expand_gelu(m: Match, g: Builder) -> ir.Value | None:
    """Gelu(x) -> 0.5 x (1 + erf(x / sqrt(2))), or the standard operator of the name.

    Source: com.microsoft Gelu-1; Erf since opset 9.
    """
    return _gelu_of(m, g, m[x]) if _wanted(m) else None


@rule(bias_gelu, opset=(9, 10_000))
def expand_bias_gelu(m: Match, g: Builder) -> ir.Value | None:
    """BiasGelu(x, b) -> Gelu(x + b).

    Source: com.microsoft BiasGelu-1.
    """
    return _gelu_of(m, g, g.op("Add", m[x], m[b])) if _wanted(m) else None


@rule(fast_gelu, opset=OPSETS)
def expand_fast_gelu(m: Match, g: Builder) -> ir.Value | None:
    """FastGelu(x, b) -> 0.5 v (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3))), v = x + b.

    Source: com.microsoft FastGelu-1.
    """
    if not _wanted(m):
        return None
    like, given = m[x], m.get(bias)
    value = like if given is None else g.op("Add", like, given)
    if m.emits("Gelu", dtype=like.dtype):
        return g.op("Gelu", value, approximate="tanh")
    cube = g.op("Mul", g.op("Mul", value, value), value)
    inner = g.op("Add", value, g.op("Mul", cube, _number(g, CUBIC, like)))
    bent = g.op("Tanh", g.op("Mul", inner, _number(g, TANH, like)))
    gate = g.op("Add", bent, _number(g, 1.0, like))
    return g.op("Mul", g.op("Mul", value, _number(g, 0.5, like)), gate)


@rule(quick_gelu, opset=OPSETS)
def expand_quick_gelu(m: Match, g: Builder) -> ir.Value | None:
    """QuickGelu(x) -> x * sigmoid(alpha x).

    Source: com.microsoft QuickGelu-1, alpha 1.702 by default.
    """
    if not _wanted(m):
        return None
    alpha = m.attr(quick_gelu, "alpha", 1.702)
    inner = g.op("Mul", m[x], _number(g, alpha, m[x]))
    return g.op("Mul", m[x], g.op("Sigmoid", inner))


@rule(fused_matmul, opset=OPSETS)
def expand_fused_matmul(m: Match, g: Builder) -> ir.Value | None:
    """FusedMatMul(a, b) -> alpha * MatMul(a or its transpose, b or its transpose).

    Source: com.microsoft FusedMatMul-1; transposes are of the last two dimensions, and of none for vectors.
    """
    if not _wanted(m):
        return None
    if m.attr(fused_matmul, "transBatchA", 0) or m.attr(fused_matmul, "transBatchB", 0):
        raise Skip("transposes batch dimensions", m[fused_matmul])
    left = _transposed(m, g, x, bool(m.attr(fused_matmul, "transA", 0)))
    right = _transposed(m, g, y, bool(m.attr(fused_matmul, "transB", 0)))
    product = g.op("MatMul", left, right)
    alpha = m.attr(fused_matmul, "alpha", 1.0)
    return product if alpha == 1.0 else g.op("Mul", product, _number(g, alpha, m[x]))


def _transposed(m: Match, g: Builder, operand: Var, wanted: bool) -> ir.Value:
    if not wanted:
        return m[operand]
    rank = len(m.known_dims(operand))
    if rank < 2:
        return m[operand]
    perm = [*range(rank - 2), rank - 1, rank - 2]
    return g.op("Transpose", m[operand], perm=perm)


@rule(skip_norm, opset=(17, 10_000))
def expand_skip_layer_norm(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """SkipLayerNormalization(x, s, gamma, beta, b) -> LayerNormalization(x + s + b), and the sum itself.

    Source: com.microsoft SkipLayerNormalization-1: mean and inverse deviation, outputs 1 and 2, are for training.
    """
    if not _wanted(m):
        return None
    node = m[skip_norm]
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:3]):
        raise Skip("mean or deviation is used", node)
    total = g.op("Add", m[x], m[y])
    given = m.get(bias)
    if given is not None:
        total = g.op("Add", total, given)
    epsilon = m.attr(skip_norm, "epsilon", 1e-12)
    normed = g.op("LayerNormalization", total, m[gamma], m.get(beta), axis=-1, epsilon=epsilon)
    return (normed, None, None, total)[: len(node.outputs)]


@rule(fused_conv, opset=OPSETS)
def expand_fused_conv(m: Match, g: Builder) -> ir.Value | None:
    """FusedConv(x, W, b, z) -> activation(Conv(x, W, b) + z).

    Source: com.microsoft FusedConv-1.
    """
    if not _wanted(m):
        return None
    node = m[fused_conv]
    out = g.op("Conv", m[x], m[w], m.get(bias), like=node, activation=None, activation_params=None)
    addend = node.inputs[3] if len(node.inputs) > 3 else None
    if addend is not None:
        out = g.op("Add", out, addend)
    parameters = m.attr(fused_conv, "activation_params", ())
    return _activated(g, out, m.attr(fused_conv, "activation", ""), tuple(parameters), node)


@rule(fused_gemm, opset=OPSETS)
def expand_fused_gemm(m: Match, g: Builder) -> ir.Value | None:
    """FusedGemm(a, b, c) -> activation(Gemm(a, b, c)).

    Source: com.microsoft FusedGemm-1.
    """
    if not _wanted(m):
        return None
    node = m[fused_gemm]
    product = g.op(
        "Gemm",
        m[x],
        m[y],
        m.get(bias),
        like=node,
        activation=None,
        activation_alpha=None,
        activation_beta=None,
        activation_gamma=None,
    )
    parameters = [m.attr(fused_gemm, f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    given = tuple(each for each in parameters if each is not None)
    return _activated(g, product, m.attr(fused_gemm, "activation", ""), given, node)


def _activated(
    g: Builder, value: ir.Value, kind: str, parameters: tuple[float, ...], node: ir.Node
) -> ir.Value:
    if not kind:
        return value
    if kind in ("Relu", "Tanh", "Sigmoid") and not parameters:
        return g.op(kind, value)
    if kind == "LeakyRelu" and len(parameters) <= 1:
        return g.op("LeakyRelu", value, alpha=parameters[0] if parameters else None)
    if kind == "HardSigmoid" and len(parameters) == 2:
        return g.op("HardSigmoid", value, alpha=parameters[0], beta=parameters[1])
    raise Skip(f"activation {kind} with {len(parameters)} parameters", node)


@rule(scaled, opset=(13, 10_000))
def expand_quantization(m: Match, g: Builder) -> ir.Value | None:
    """QuantizeLinear and DequantizeLinear of 8-bit integers -> the standard operators of the names.

    Source: com.microsoft QuantizeLinear-1, DequantizeLinear-1; ai.onnx since 13 has the axis.
    """
    if not _wanted(m):
        return None
    node = m[scaled]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    held = zero.dtype if zero is not None else None
    if held not in (ir.DataType.INT8, ir.DataType.UINT8) or m.dtype(y) != ir.DataType.FLOAT:
        raise Skip("zero point other than of 8 bits, or scale other than float32", node)
    axis = m.attr(scaled, "axis")
    return g.op(node.op_type, m[x], m[y], zero, axis=axis)


RULES: tuple[Rule, ...] = (
    expand_gelu,
    expand_bias_gelu,
    expand_fast_gelu,
    expand_quick_gelu,
    expand_fused_matmul,
    expand_skip_layer_norm,
    expand_fused_conv,
    expand_fused_gemm,
    expand_quantization,
)
