"""Integer operators of com.microsoft written as Q/DQ pairs around float operators of the standard.

    Before:  y = com.microsoft::QLinearAdd(a, sa, za, b, sb, zb, sy, zy)
    After:   y = QuantizeLinear(DequantizeLinear(a, sa, za) + DequantizeLinear(b, sb, zb), sy, zy)

Changes numerics: reordered; a result may round to the next step.  Leaves alone: what the target runs as it is.
Source: onnxruntime/docs/ContribOperators.md, version 1.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt_passes.refusals import refused

MS = "com.microsoft"
OPSETS = (13, 10_000)
"""Of the axis of DequantizeLinear."""

FLOAT = ir.DataType.FLOAT

x, s, w, t, o = (Var() for _ in range(5))
z, zw, oz = (Var(optional=True) for _ in range(3))

binary = Op("QLinearAdd|QLinearMul", x, s, z, w, t, zw, o, oz, domain=MS)
unary = Op(
    "QLinearSigmoid|QLinearLeakyRelu|QLinearAveragePool|QLinearGlobalAveragePool|QLinearSoftmax|QLinearReduceMean",
    x,
    s,
    z,
    o,
    oz,
    domain=MS,
)
concat = Op("QLinearConcat", o, oz, ..., domain=MS)
where = Op("QLinearWhere", x, w, s, z, Var(), t, zw, o, oz, domain=MS)
gemm = Op("QGemm", x, s, z, w, t, zw, ..., domain=MS)
dynamic_matmul = Op("DynamicQuantizeMatMul", x, w, t, ..., domain=MS)
to_float = Op("MatMulIntegerToFloat", x, w, s, t, ..., domain=MS)


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _real(
    g: Builder, q: ir.Value, scale: ir.Value, point: ir.Value | None, axis: int = 1
) -> ir.Value:
    return g.op("DequantizeLinear", q, scale, point, axis=axis)


def _steps(g: Builder, value: ir.Value, scale: ir.Value, point: ir.Value | None) -> ir.Value:
    return g.op("QuantizeLinear", value, scale, point)


@rule(binary, opset=OPSETS)
def expand_qlinear_binary(m: Match, g: Builder) -> ir.Value | None:
    """QLinearAdd, QLinearMul -> Q(DQ(a) + DQ(b)), Q(DQ(a) * DQ(b)).

    Source: com.microsoft QLinearAdd-1, QLinearMul-1.
    """
    if not refused(m, binary):
        return None
    operands = _real(g, m[x], m[s], m.get(z)), _real(g, m[w], m[t], m.get(zw))
    op_type = m[binary].op_type.removeprefix("QLinear")
    return _steps(g, g.op(op_type, *operands), m[o], m.get(oz))


@rule(unary, opset=OPSETS)
def expand_qlinear_unary(m: Match, g: Builder) -> ir.Value | None:
    """QLinearSigmoid, LeakyRelu, pools, Softmax and ReduceMean -> Q(f(DQ(x))).

    Source: com.microsoft, version 1 of each.
    """
    node = m[unary]
    if not refused(m, unary):
        return None
    if m.attr(unary, "channels_last", 0):
        raise Skip("channels last", node)
    op_type = node.op_type.removeprefix("QLinear")
    data = _real(g, m[x], m[s], m.get(z))
    if op_type == "ReduceMean":
        out = _mean(m, g, data)
    elif op_type == "Softmax":
        if m.attr(unary, "opset", 13) < 13:
            raise Skip("the Softmax of an opset before 13", node)
        out = g.op("Softmax", data, axis=m.attr(unary, "axis", -1))
    else:
        out = g.op(op_type, data, like=node, channels_last=None)
    return _steps(g, out, m[o], m.get(oz))


def _mean(m: Match, g: Builder, data: ir.Value) -> ir.Value:
    axes = list(m.attr(unary, "axes", ()))
    keep = m.attr(unary, "keepdims", 1)
    if m.opset() < 18:
        return g.op("ReduceMean", data, axes=axes or None, keepdims=keep)
    return g.op("ReduceMean", data, g.ints(axes) if axes else None, keepdims=keep)


@rule(concat, opset=OPSETS)
def expand_qlinear_concat(m: Match, g: Builder) -> ir.Value | None:
    """QLinearConcat(so, zo, a, sa, za, …) -> Q(Concat(DQ(a), …)).

    Source: com.microsoft QLinearConcat-1.
    """
    node = m[concat]
    if not refused(m, concat):
        return None
    rest = list(node.inputs[2:])
    parts = []
    for index in range(0, len(rest), 3):
        q, scale = rest[index], rest[index + 1] if index + 1 < len(rest) else None
        if q is None or scale is None:
            raise Skip("an operand without scale", node)
        parts.append(_real(g, q, scale, rest[index + 2] if index + 2 < len(rest) else None))
    return _steps(g, g.op("Concat", *parts, axis=m.attr(concat, "axis")), m[o], m.get(oz))


@rule(where, opset=OPSETS)
def expand_qlinear_where(m: Match, g: Builder) -> ir.Value | None:
    """QLinearWhere(c, a, sa, za, b, sb, zb, so, zo) -> Q(Where(c, DQ(a), DQ(b))).

    Source: com.microsoft QLinearWhere-1.
    """
    node = m[where]
    other = node.inputs[4]
    if not refused(m, where) or other is None:
        return None
    chosen = g.op("Where", m[x], _real(g, m[w], m[s], m.get(z)), _real(g, other, m[t], m.get(zw)))
    return _steps(g, chosen, m[o], m.get(oz))


@rule(gemm, opset=OPSETS)
def expand_qgemm(m: Match, g: Builder) -> ir.Value | None:
    """QGemm(a, sa, za, b, sb, zb, c, sy, zy) -> Q(Gemm(DQ(a), DQ(b), c * alpha sa sb)), or without Q.

    Source: com.microsoft QGemm-1: c is of 32 bits and has the scale of the product.
    """
    node = m[gemm]
    if not refused(m, gemm):
        return None
    alpha = m.attr(gemm, "alpha", 1.0)
    swapped = {name: m.attr(gemm, name, 0) for name in ("transA", "transB")}
    data = _real(g, m[x], m[s], m.get(z), 0)
    weights = _real(g, m[w], m[t], m.get(zw), 0 if swapped["transB"] else 1)
    out = g.op("Gemm", data, weights, alpha=alpha, **swapped)
    added = _given(node, 6)
    if added is not None:
        scale = g.op("Mul", m[s], m[t])
        wide = g.op("Mul", g.op("Cast", added, to=int(FLOAT)), scale)
        if alpha != 1.0:
            raise Skip("alpha beside a bias", node)
        out = g.op("Add", out, wide)
    scale_out = _given(node, 7)
    return out if scale_out is None else _steps(g, out, scale_out, _given(node, 8))


@rule(dynamic_matmul, opset=OPSETS)
def expand_dynamic_matmul(m: Match, g: Builder) -> ir.Value | None:
    """DynamicQuantizeMatMul(a, B, sb, zb, c) -> (MatMulInteger of DynamicQuantizeLinear(a) and B) * sa * sb + c.

    Source: com.microsoft DynamicQuantizeMatMul-1.
    """
    node = m[dynamic_matmul]
    if not refused(m, dynamic_matmul):
        return None
    q, scale, point = g.ops("DynamicQuantizeLinear", m[x], outputs=3)
    return _scaled(g, (q, m[w]), (scale, m[t]), (point, _given(node, 3)), _given(node, 4))


@rule(to_float, opset=OPSETS)
def expand_matmul_to_float(m: Match, g: Builder) -> ir.Value | None:
    """MatMulIntegerToFloat(a, B, sa, sb, za, zb, c) -> MatMulInteger(a, B, za, zb) * sa * sb + c.

    Source: com.microsoft MatMulIntegerToFloat-1.
    """
    node = m[to_float]
    if not refused(m, to_float):
        return None
    points = _given(node, 4), _given(node, 5)
    return _scaled(g, (m[x], m[w]), (m[s], m[t]), points, _given(node, 6))


def _scaled(
    g: Builder,
    operands: tuple[ir.Value, ir.Value],
    scales: tuple[ir.Value, ir.Value],
    points: tuple[ir.Value | None, ir.Value | None],
    added: ir.Value | None,
) -> ir.Value:
    """(a - za) (b - zb) sa sb + c."""
    total = g.op("Cast", g.op("MatMulInteger", *operands, *points), to=int(FLOAT))
    out = g.op("Mul", total, g.op("Mul", *scales))
    return out if added is None else g.op("Add", out, added)


RULES: tuple[Rule, ...] = (
    expand_qlinear_binary,
    expand_qlinear_unary,
    expand_qlinear_concat,
    expand_qlinear_where,
    expand_qgemm,
    expand_dynamic_matmul,
    expand_matmul_to_float,
)
