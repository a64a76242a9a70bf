"""Matrix products: bias, scale, transposition and batch normalisation folded into Gemm and MatMul.

    Before:  y = MatMul(a, b) + c, Gemm(Transpose(a), b), MatMul(x, W) * s, Reshape(Gemm(Reshape(x), W, c))
    After:   y = Gemm(a, b, c), Gemm(a, b, transA=1), MatMul(x, W'), MatMul(x, W) + c

Changes numerics: reordered; weights are folded in float64.  Leaves alone: tied and quantised weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.ir.shapes import product as product_of
from graphopt.rewrite import Either, Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import (
    Wide,
    along,
    feeds_products_only,
    is_tied,
    narrow,
    on_axis,
    refuse_tied,
)

OPSETS = (7, 10_000)
"""Opsets of multidirectional broadcasting, in Gemm as in Add."""

MS = "com.microsoft"
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

a, b = Var(), Var()
x, w = Var(), Var()
c = Var()
k = Var(const=True)
bias = Var(optional=True)


def _refuse_quantized(value: ir.Value) -> None:
    """Declines where a runtime would miss the MatMul that it runs on quantised numbers.

    Raises:
        Skip: the value comes from DequantizeLinear.
    """
    maker = value.producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        raise Skip("the weight is quantised: runtimes look for a plain MatMul on it", maker)


def _is_computed(value: ir.Value) -> bool:
    """Whether the graph computes the operand from others: then it is no weight at all."""
    maker = value.producer()
    return maker is not None and maker.op_type not in ("Constant", "DequantizeLinear")


def _is_matrix(m: Match, *operands: Var | Op) -> bool:
    dims = [m.dims(v) for v in operands]
    return all(d is not None and len(d) == 2 for d in dims)


def _refuse_other_bias(m: Match, addend: ir.Value, rows: Dim, columns: Dim) -> None:
    """Declines an addend that would broaden the product, or is not known not to.

    Raises:
        Skip: C of Gemm must broadcast to [M, N] from its side alone.
    """
    dims = m.known_dims(addend)
    fits = len(dims) <= 2 and all(
        d in (1, whole) for d, whole in zip(reversed(dims), (columns, rows), strict=False)
    )
    if not fits:
        raise Skip("the addend may broaden the product", addend)


def _emits_gemm(m: Match, value: Var | Op) -> bool:
    dtype = m.dtype(value)
    return dtype in FLOATS and m.emits("Gemm", dtype=dtype)


def _demand_floats(m: Match, value: Var | Op) -> None:
    """Integers wrap and do not divide: their products stay as they are.

    Raises:
        Skip: not a floating-point type.
    """
    if m.dtype(value) not in FLOATS:
        raise Skip(
            f"{m.dtype(value)} arithmetic is not folded",
            m.out(value) if isinstance(value, Op) else m[value],
        )


product = Op("MatMul", a, b)
biased = Op("Add", product, c)


@rule(biased, opset=OPSETS)
def fuse_matmul_add_into_gemm(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(a, b) + c` -> `Gemm(a, b, c)` for matrices a [M, K], b [K, N] and c that broadcasts to [M, N].

    Products of higher rank stay: Reshape, Gemm, Reshape is one node more, and no faster in ONNX Runtime, which fuses
    the bias when it loads the model.
    Source: Gemm-7.
    """
    if not _is_matrix(m, a, b) or not _emits_gemm(m, product):
        return None
    _refuse_quantized(m[b])
    _refuse_other_bias(m, m[c], m.known_dims(a)[0], m.known_dims(b)[1])
    return g.op("Gemm", m[a], m[b], m[c])


gemm = Op("Gemm", a, b, bias)
gemm_add = Op("Add", gemm, c)


@rule(gemm_add, opset=OPSETS)
def fold_addend_into_gemm(m: Match, g: Builder) -> ir.Value:
    """`Gemm(a, b) + c` -> `Gemm(a, b, c)`; two constant addends become one: `beta*k + c`."""
    node = m[gemm]
    _demand_floats(m, gemm)
    rows, columns = m.known_dims(gemm)
    _refuse_other_bias(m, m[c], rows, columns)
    beta = float(m.attr(node, "beta", 1.0))
    if m.get(bias) is None or beta == 0:
        return g.op("Gemm", m[a], m[b], m[c], like=node, beta=None)
    total = beta * m.wide(bias) + m.wide(c)
    return g.op("Gemm", m[a], m[b], g.const(narrow(total, m.dtype(c), m[c])), like=node, beta=None)


def _is_swap(m: Match, node: ir.Node) -> bool:
    """Whether a Transpose of a matrix exchanges its axes."""
    dims = m.dims(node.outputs[0])
    return dims is not None and len(dims) == 2 and tuple(m.attr(node, "perm", (1, 0))) == (1, 0)


left = Op("Gemm", Op("Transpose", a, shared=True), b, bias)
right = Op("Gemm", a, Op("Transpose", b, shared=True), bias)


@rule(left, opset=OPSETS)
def fold_transpose_into_gemm_a(m: Match, g: Builder) -> ir.Value | None:
    """`Gemm(a^T, b, c)` -> `Gemm(a, b, c, transA flipped)`."""
    if not _is_swap(m, _maker(m[left], 0)):
        return None
    flipped = 1 - int(m.attr(left, "transA", 0))
    return g.op("Gemm", m[a], m[b], m.get(bias), like=m[left], transA=flipped)


@rule(right, opset=OPSETS)
def fold_transpose_into_gemm_b(m: Match, g: Builder) -> ir.Value | None:
    """`Gemm(a, b^T, c)` -> `Gemm(a, b, c, transB flipped)`; a tied weight stays one tensor."""
    if not _is_swap(m, _maker(m[right], 1)):
        return None
    flipped = 1 - int(m.attr(right, "transB", 0))
    return g.op("Gemm", m[a], m[b], m.get(bias), like=m[right], transB=flipped)


turned_gemm = Op("Gemm", a, b)
turned = Op("Transpose", turned_gemm)


@rule(turned, opset=(11, 10_000))
def fold_transpose_behind_gemm(m: Match, g: Builder) -> ir.Value | None:
    """`Gemm(a, b)^T` -> `Gemm(b, a)`, both flags flipped; of two computed matrices: weights are packed on the right."""
    if not _is_swap(m, m[turned]) or any(values.is_constant(m[each]) for each in (a, b)):
        return None
    first, second = (1 - int(m.attr(turned_gemm, name, 0)) for name in ("transB", "transA"))
    return g.op("Gemm", m[b], m[a], like=m[turned_gemm], transA=first, transB=second)


def _maker(node: ir.Node, index: int) -> ir.Node:
    value = node.inputs[index]
    maker = None if value is None else value.producer()
    assert maker is not None, "the pattern bound it"
    return maker


flip = Op("Transpose", b, shared=True)
flipped_product = Op("MatMul", a, flip)


@rule(flipped_product, opset=(11, 10_000))
def fuse_transposed_matmul_into_gemm(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(a, b^T)` -> `Gemm(a, b, transB=1)` for matrices; needs Gemm-11, whose C is optional."""
    if not _is_matrix(m, a) or not _is_swap(m, m[flip]) or not _emits_gemm(m, flipped_product):
        return None
    return g.op("Gemm", m[a], m[b], transB=1)


flip_a = Op("Transpose", a, shared=True)
flipped_left = Op("MatMul", flip_a, b)


@rule(flipped_left, opset=(11, 10_000))
def fuse_left_transposed_matmul_into_gemm(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(a^T, b)` -> `Gemm(a, b, transA=1)` for matrices; needs Gemm-11, whose C is optional."""
    if not _is_matrix(m, b) or not _is_swap(m, m[flip_a]) or not _emits_gemm(m, flipped_left):
        return None
    return g.op("Gemm", m[a], m[b], transA=1)


scaled_gemm = Op("Mul|Div", gemm, k)


@rule(scaled_gemm, opset=OPSETS)
def fold_scale_into_gemm(m: Match, g: Builder) -> ir.Value:
    """`Gemm(a, b, c) * s` -> `Gemm(a, b, c, alpha*s, beta*s)` or, for one s per column, `Gemm(a, b*s, c*s)`."""
    node, operator = m[gemm], m[scaled_gemm]
    _demand_floats(m, gemm)
    columns = m.known_dims(gemm)[1]
    factor = _factor(m, operator, rank=2, size=columns)
    if np.all(factor == factor.reshape(-1)[0]):
        number = float(factor.reshape(-1)[0])
        alpha, beta = (number * float(m.attr(node, n, 1.0)) for n in ("alpha", "beta"))
        return g.op("Gemm", m[a], m[b], m.get(bias), like=node, alpha=alpha, beta=beta)
    axis = 0 if m.attr(node, "transB", 0) else 1
    weight = _times(m, g, b, on_axis(factor, 2, axis))
    if m.get(bias) is None:
        return g.op("Gemm", m[a], weight, like=node)
    shift = narrow(m.wide(bias) * factor, m.dtype(bias), m[bias])
    return g.op("Gemm", m[a], weight, g.const(shift, name="bias"), like=node)


def _factor(m: Match, operator: ir.Node, *, rank: int, size: Dim) -> Wide:
    """The constant of a Mul or Div as a factor per column.

    Raises:
        Skip: it is not one number per column, or would broaden the product.
    """
    data = m.array(k)
    number = along(data, rank, -1, size.value if size.value is not None else 1)
    if number is None or data.size == 0:
        raise Skip("the factor is not one number per column", m[k])
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 / number if operator.op_type == "Div" else number


def _times(m: Match, g: Builder, weight: Var, factor: Wide) -> ir.Value:
    """A constant weight times `factor`.

    Raises:
        Skip: it is not constant, tied, or too large for its type afterwards.
    """
    _refuse_quantized(m[weight])
    wide = m.wide(weight)
    refuse_tied(m[weight])
    return g.const(narrow(wide * factor, m.dtype(weight), m[weight]), name="weight")


matmul = Op("MatMul", x, w)
scaled = Op("Mul|Div", matmul, k)


@rule(scaled, opset=OPSETS)
def fold_scale_into_matmul(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(x, W) * s` -> `MatMul(x, W*s)`, s a number or one per column [N], W constant [K, N]."""
    dims = m.dims(matmul)
    if dims is None or _is_computed(m[w]) or m.array(w).ndim != 2:
        return None
    _demand_floats(m, w)
    factor = _factor(m, m[scaled], rank=len(dims), size=Dim.of(m.array(w).shape[1]))
    return g.op("MatMul", m[x], _times(m, g, w, factor))


scaled_x = Op("Mul|Div", x, k, shared=True)
product_of_scaled = Op("MatMul", scaled_x, w)


@rule(product_of_scaled, opset=OPSETS)
def fold_input_scale_into_matmul(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(x * s, W)` -> `MatMul(x, s*W)`, s a number or one per row of W [K]; x must have the product's shape.

    Where `x * s` has several uses, all must be products with constants: a norm's scale before queries, keys and values.
    """
    dims = m.dims(x)
    if (
        dims is None
        or _is_computed(m[w])
        or m.array(w).ndim != 2
        or dims[-1:] != (m.array(w).shape[0],)
    ):
        return None
    _demand_floats(m, w)
    if not feeds_products_only(m.out(scaled_x)):
        raise Skip("the scaled value is used elsewhere", m[scaled_x])
    factor = _factor(m, m[scaled_x], rank=len(dims), size=dims[-1])
    return g.op("MatMul", m[x], _times(m, g, w, on_axis(factor, 2, 0)))


gamma, beta_, mean, var = (Var(const=True) for _ in range(4))
linear = Either(gemm, matmul)
normalized = Op("BatchNormalization", linear, gamma, beta_, mean, var)


@rule(normalized, opset=(7, 10_000))
def fold_batchnorm_into_gemm(m: Match, g: Builder) -> ir.Value | None:
    """`BN(Gemm(a, B, c))` -> `Gemm(a, B*s, c')`, with s = gamma / sqrt(var + eps) [N]; BN(MatMul) likewise, to Gemm.

    Source: BatchNormalization-7, -9, -14 in inference mode, Gemm-7.
    """
    node = m[normalized]
    if m.attr(node, "training_mode", 0) or any(v.uses() for v in node.outputs[1:]):
        raise Skip("BatchNormalization in training mode", node)
    if m.opset() < 9 and not m.attr(node, "spatial", 1):
        raise Skip("BatchNormalization of each position: spatial is 0", node)
    if len(m.known_dims(node.outputs[0])) != 2:
        raise Skip("the channels are not the columns", node)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = m.wide(gamma) / np.sqrt(m.wide(var) + float(m.attr(node, "epsilon", 1e-5)))
    shift = m.wide(beta_) - m.wide(mean) * scale
    inner, weight = (m[gemm], b) if m.has(gemm) else (None, w)
    if inner is None:
        if not _emits_gemm(m, w):
            return None
        data = g.const(narrow(shift, m.dtype(w), m[w]), name="bias")
        return g.op("Gemm", m[x], _times(m, g, w, scale), data)
    if m.get(bias) is not None:
        shift = shift + scale * float(m.attr(inner, "beta", 1.0)) * m.wide(bias)
    axis = 0 if m.attr(inner, "transB", 0) else 1
    data = g.const(narrow(shift, m.dtype(b), m[b]), name="bias")
    return g.op(
        "Gemm", m[a], _times(m, g, weight, on_axis(scale, 2, axis)), data, like=inner, beta=None
    )


tied_product = Op("MatMul", a, Op("Transpose", w, shared=True))


@rule(tied_product)
def fuse_transposed_weight(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(a, W^T)` -> `FusedMatMul(a, W, transB=1)` for a constant W with other uses: no transposed copy of it.

    Source: com.microsoft FusedMatMul-1; ONNX Runtime folds the Transpose of any constant when it loads a model.
    """
    swap, rank = _maker(m[tied_product], 1), len(m.known_dims(w))
    swaps = (*range(rank - 2), rank - 1, rank - 2)
    if not is_tied(m[w]) or tuple(m.attr(swap, "perm", ()) or range(rank)[::-1]) != swaps:
        return None
    if not m.emits("FusedMatMul", MS, m.dtype(w)):
        raise Skip(f"the target multiplies no transposed {m.dtype(w)}", m[w])
    return g.op("FusedMatMul", m[a], m[w], domain=MS, transB=1)


w2 = Var()
first = Op("MatMul", x, w)
chain = Op("MatMul", first, w2)


@rule(chain)
def merge_constant_products(m: Match, g: Builder) -> ir.Value | None:
    """`(x @ A) @ B` -> `x @ (A @ B)`, A [K, R], B [R, N], where that is no larger: K*N <= K*R + R*N."""
    if _is_computed(m[w]) or _is_computed(m[w2]):
        return None
    left_, right_ = m.array(w), m.array(w2)
    if left_.ndim != 2 or right_.ndim != 2 or m.dtype(first) not in FLOATS:
        return None
    rows, inner = left_.shape
    if rows * right_.shape[1] > inner * (rows + right_.shape[1]):
        raise Skip("the product of the weights is larger than they are", m[first])
    refuse_tied(m[w])
    refuse_tied(m[w2])
    merged = m.wide(w) @ m.wide(w2)
    return g.op("MatMul", m[x], g.const(narrow(merged, m.dtype(w), m[w]), name="weight"))


batched = Op("MatMul", x, w)


@rule(batched)
def squeeze_weight(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(x, W [1, …, K, N])` -> `MatMul(x, W [K, N])` where x has W's rank or more: runtimes pack matrices only.

    ONNX Runtime 1.31 CPU: 1.13x on the op.
    """
    wide, dims = m.dims(w), m.dims(x)
    if wide is None or dims is None or not 2 < len(wide) <= len(dims):
        return None
    if any(d != 1 for d in wide[:-2]):
        return None
    data = m.array(w)
    refuse_tied(m[w])
    return g.op("MatMul", m[x], g.const(data.reshape(data.shape[-2:]), name="weight"))


rows_of = Op("Reshape", x, Var(), shared=True)
c1 = Var(optional=True)
flat_product = Either(Op("MatMul", rows_of, w), Op("Gemm", rows_of, w, c1))
folded = Op("Reshape", flat_product, Var())


@rule(folded, opset=OPSETS)
def drop_reshapes_around_product(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape([…, N], MatMul(Reshape([-1, K], x […, K]), W))` -> `MatMul(x, W)`; a Gemm becomes MatMul and Add.

    x: […, K], W: [K, N] (transposed where the Gemm says so), y: […, N]; rank of y above 2.  Heads that the first
    Reshape puts side by side, x: […, H, D], are put so by one of their own.
    """
    dims, out = m.dims(x), m.dims(folded)
    node = _maker(m[folded], 0)
    flat = m.dims(node.inputs[0]) if node.inputs[0] is not None else None
    if dims is None or out is None or flat is None or len(flat) != 2 or len(out) < 3:
        return None
    lead = len(out) - 1
    if len(dims) <= lead or dims[:lead] != out[:lead] or product_of(dims[lead:]) != flat[-1]:
        return None
    rows = m[x]
    if len(dims) > lead + 1:
        if flat[-1].value is None:
            return None
        rows = g.op("Reshape", rows, g.ints([*[0] * lead, flat[-1].value]))
    if node.op_type == "MatMul":
        return g.op("MatMul", rows, m[w])
    return _as_matmul(m, g, node, rows)


def _as_matmul(m: Match, g: Builder, node: ir.Node, rows: ir.Value) -> ir.Value | None:
    """Gemm(x, W, c) with x of any rank: MatMul and Add, where alpha, beta and transA are trivial."""
    if m.attr(node, "transA", 0) or m.attr(node, "alpha", 1.0) != 1:
        return None
    addend = m.get(c1)
    if addend is not None and (m.attr(node, "beta", 1.0) != 1 or len(m.known_dims(addend)) > 1):
        return None
    weight = m[w]
    if m.attr(node, "transB", 0):
        _refuse_quantized(m[w])
        data = m.array(w)
        refuse_tied(m[w])
        weight = g.const(np.ascontiguousarray(data.T), name="weight")
    y = g.op("MatMul", rows, weight)
    return y if addend is None else g.op("Add", y, addend)


zero = Var(const=True)
with_zero = Op("Gemm", a, b, zero)


@rule(with_zero, opset=(11, 10_000))
def drop_zero_addend(m: Match, g: Builder) -> ir.Value | None:
    """`Gemm(a, b, 0)` -> `Gemm(a, b)`, beta = 0 likewise; needs Gemm-11, whose C is optional."""
    data: npt.NDArray[Any] = m.array(zero)
    if m.attr(with_zero, "beta", 1.0) != 0 and np.any(data):
        return None
    return g.op("Gemm", m[a], m[b], like=m[with_zero], beta=None)


RULES: tuple[Rule, ...] = (
    fuse_matmul_add_into_gemm,
    fold_addend_into_gemm,
    fold_transpose_into_gemm_a,
    fold_transpose_into_gemm_b,
    fold_transpose_behind_gemm,
    fuse_transposed_matmul_into_gemm,
    fuse_left_transposed_matmul_into_gemm,
    fold_scale_into_gemm,
    fold_scale_into_matmul,
    fold_input_scale_into_matmul,
    fold_batchnorm_into_gemm,
    fuse_transposed_weight,
    merge_constant_products,
    squeeze_weight,
    drop_reshapes_around_product,
    drop_zero_addend,
)
