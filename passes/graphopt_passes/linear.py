"""Arithmetic with constants around matrix products, at a distance: through views, transposes and other products.

    Before:  q = Reshape(x W + b); y = (q kT) / 8;      z = Transpose(BatchNormalization(Transpose(x)))
    After:   q = Reshape(x W/8 + b/8); y = q kT;        z = x * s + t

Changes numerics: reordered; weights are folded in float64.  Leaves alone: tied weights, values with other uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import Wide, along, feeds_products_only, narrow, on_axis, refuse_tied

OPSETS = (7, 10_000)
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
VIEWS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
MAX_STEPS = 6

x, y, w = Var(), Var(), Var()
k = Var(const=True)


@dataclasses.dataclass(frozen=True)
class Path:
    """How a number reaches a product with a constant weight.

    Attributes:
        steps: nodes that a factor commutes with, from the far end, each with the input that it enters by.
        weight: the constant weight.
        product: the MatMul or Gemm on it.
        addend: the constant that an Add gives to the product, if any.
    """

    steps: tuple[tuple[ir.Node, int], ...]
    weight: ir.Value
    product: ir.Node
    addend: ir.Value | None


def _find(value: ir.Value, graph: ir.Graph | None) -> Path | None:
    """The way from a value up to a product with a constant weight, through values that nothing else needs."""
    steps: list[tuple[ir.Node, int]] = []
    addend: ir.Value | None = None
    for _ in range(MAX_STEPS):
        node = value.producer()
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        if node is None or node.domain or node.graph is not graph or not alone:
            return None
        if node.op_type in ("MatMul", "Gemm") and values.is_constant(node.inputs[1]):
            weight = node.inputs[1]
            assert weight is not None
            return Path(tuple(steps), weight, node, addend)
        source = 0
        if node.op_type == "Add" and addend is None:
            source = 1 if values.is_constant(node.inputs[0]) else 0
            addend = node.inputs[1 - source]
            if not values.is_constant(addend):
                return None
        elif addend is not None:
            return None  # an Add before the product, and after something else: no bias of it
        elif node.op_type in VIEWS or node.op_type == "MatMul":
            steps.append((node, 0))
        else:
            return None
        entered = node.inputs[source]
        if entered is None:
            return None
        value = entered
    return None


scaled = Op("Mul|Div", y, k)


@rule(scaled, opset=OPSETS)
def fold_distant_scale_into_weight(m: Match, g: Builder) -> ir.Value | None:
    """`f(x W + b) * s` -> `f(x (W*s) + b*s)` for a number s; f: views, and products with f's value on the left.

    The 1/sqrt(d) of attention, before or after the product of queries and keys, goes into the queries' weight.
    """
    path = _find(m[y], m[scaled].graph)
    if path is None or not (path.steps or path.addend) or m.dtype(y) not in FLOATS:
        return None
    number = values.scalar(m[k])
    if number is None or m.dims(scaled) is None or m.dims(scaled) != m.dims(y):
        return None
    if m[scaled].op_type == "Div" and number == 0:
        return None
    factor = 1 / number if m[scaled].op_type == "Div" else float(number)
    return _rebuild(g, path, factor)


def _rebuild(g: Builder, path: Path, factor: float) -> ir.Value:
    """The path with weight and addends times `factor`."""
    refuse_tied(path.weight)
    inputs = list(path.product.inputs)
    inputs[1] = _times(g, path.weight, factor)
    if len(inputs) > 2 and inputs[2] is not None:
        if not values.is_constant(inputs[2]):
            raise Skip("the addend of the product is computed", path.product)
        inputs[2] = _times(g, inputs[2], factor)
    value = g.op(path.product.op_type, *inputs, like=path.product)
    if path.addend is not None:
        value = g.op("Add", value, _times(g, path.addend, factor))
    for node, index in reversed(path.steps):
        others = [value if i == index else v for i, v in enumerate(node.inputs)]
        value = g.op(node.op_type, *others, like=node)
    return value


def _times(g: Builder, constant: ir.Value, factor: float) -> ir.Value:
    data = values.array(constant)
    assert data is not None
    scaled_data = narrow(data.astype(np.float64) * factor, constant.dtype, constant)
    return g.const(scaled_data, name="weight")


left, right = Var(), Var()
left_number, right_number = Var(const=True), Var(const=True)
left_scaled, right_scaled = Op("Mul|Div", left, left_number), Op("Mul|Div", right, right_number)
doubly_scaled = Op("MatMul", left_scaled, right_scaled)


@rule(doubly_scaled, opset=OPSETS)
def merge_scales_of_product(m: Match, g: Builder) -> ir.Value | None:
    """`(a * s) @ (b * t)` -> `(a * (s*t)) @ b` for numbers s, t: the queries are scaled, not all the keys."""
    total = 1.0
    sides = ((left_scaled, left, left_number), (right_scaled, right, right_number))
    for operator, operand, constant in sides:
        number = values.scalar(m[constant])
        if number is None or number == 0 or m.dtype(operand) not in FLOATS:
            return None
        if m.dims(operand) is None or m.dims(operand) != m.dims(operator):
            return None
        total *= 1 / number if m[operator].op_type == "Div" else number
    factor = narrow(np.asarray(total, np.float64), m.dtype(left), m[left_number])
    return g.op("MatMul", g.op("Mul", m[left], g.const(factor, name="scale")), m[right])


shifted = Op("Add|Sub", x, k, shared=True)
product = Op("MatMul", shifted, w)
bias = Var(const=True)
biased = Op("Add", product, bias)


@rule(biased, opset=OPSETS)
def fold_shift_before_product(m: Match, g: Builder) -> ir.Value | None:
    """`(x + t) W + b` -> `x W + (b + t W)`, t a number or one per row of W [K], b one per column [N]."""
    weight = values.array(m[w])
    if weight is None or weight.ndim != 2:
        return None
    shift = _per_row(m, shifted, weight.shape[0])
    addend = along(m.array(bias), len(m.known_dims(product)), -1, weight.shape[1])
    if shift is None or addend is None:
        return None
    total = addend + shift @ weight.astype(np.float64)
    constant = g.const(narrow(total, m.dtype(x), m[bias]), name="bias")
    return g.op("Add", g.op("MatMul", m[x], m[w]), constant)


def _per_row(m: Match, operator: Op, rows: int) -> Wide | None:
    """The constant of arithmetic before a product, per row of the weight; None where it may not go there.

    It is negative for Sub, and the reciprocal for Div.
    """
    dims, op_type = m.dims(x), m[operator].op_type
    if dims is None or m.dtype(x) not in FLOATS or not dims or dims[-1] != rows:
        return None
    number = along(m.array(k), len(dims), -1, rows)
    if number is None or not feeds_products_only(m.out(operator)):
        return None
    with np.errstate(divide="ignore"):
        return {"Sub": -number, "Div": 1 / number}.get(op_type, number)


c = Var(optional=True)
entering = Op("Add|Sub|Mul|Div", x, k, shared=True)
entered = Op("Gemm", entering, w, c)


@rule(entered, opset=OPSETS)
def fold_arithmetic_before_gemm(m: Match, g: Builder) -> ir.Value | None:
    """`Gemm(x + t, W, b)` -> `Gemm(x, W, b + t W)`, `Gemm(x * s, W, b)` -> `Gemm(x, s W, b)`.

    s, t: a number, or one per row of W [K].  Source: Gemm-7.
    """
    node, weight = m[entered], values.array(m[w])
    if weight is None or m.attr(node, "transA", 0):
        return None
    row = 1 if m.attr(node, "transB", 0) else 0
    number = _per_row(m, entering, weight.shape[row])
    if number is None:
        return None
    if m[entering].op_type in ("Mul", "Div"):
        refuse_tied(m[w])
        matrix = narrow(weight.astype(np.float64) * on_axis(number, 2, row), m.dtype(w), m[w])
        return g.op("Gemm", m[x], g.const(matrix, name="weight"), m.get(c), like=node)
    if m.get(c) is not None and not values.is_constant(m[c]):
        return None
    alpha, beta = (float(m.attr(node, name, 1.0)) for name in ("alpha", "beta"))
    held = m.wide(c, 0.0) * (beta if m.get(c) is not None else 0.0)
    total = held + alpha * (number @ np.moveaxis(weight.astype(np.float64), row, 0))
    constant = g.const(narrow(total, m.dtype(x), m[w]), name="bias")
    return g.op("Gemm", m[x], m[w], constant, like=node, beta=None)


gamma, beta_, mean, var = (Var(const=True) for _ in range(4))
there = Op("Transpose", x)
normalized = Op("BatchNormalization", there, gamma, beta_, mean, var)
back = Op("Transpose", normalized)


@rule(back, opset=(9, 10_000))
def unfold_batchnorm_between_transposes(m: Match, g: Builder) -> ir.Value | None:
    """`Transpose(BN(Transpose(x, p)), q)` -> `x * s + t` where q undoes p; s, t: [C, 1, …] on the channel's axis of x.

    Source: BatchNormalization-9, -14 in inference mode.
    """
    rank = len(m.known_dims(x))
    first, second = (_perm(m, m[op], rank) for op in (there, back))
    if [first[i] for i in second] != list(range(rank)):
        return None
    node = m[normalized]
    if m.attr(node, "training_mode", 0) or any(v.uses() for v in node.outputs[1:]):
        raise Skip("BatchNormalization in training mode", node)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = m.wide(gamma) / np.sqrt(m.wide(var) + float(m.attr(node, "epsilon", 1e-5)))
    shift = m.wide(beta_) - m.wide(mean) * scale
    trailing = rank - first[1]
    s, t = (narrow(on_axis(v, trailing, 0), m.dtype(x), m[gamma]) for v in (scale, shift))
    return g.op("Add", g.op("Mul", m[x], g.const(s, name="scale")), g.const(t, name="shift"))


def _perm(m: Match, node: ir.Node, rank: int) -> Sequence[int]:
    return tuple(m.attr(node, "perm", ())) or tuple(reversed(range(rank)))


gain, offset = Var(const=True), Var(const=True)
multiplied = Op("MatMul", x, w)
with_offset = Op("Add", multiplied, offset)
with_gain = Op("Mul|Div", with_offset, gain)


@rule(with_gain, opset=OPSETS)
def fold_scale_after_bias(m: Match, g: Builder) -> ir.Value | None:
    """`(x W + b) * s` -> `x (W*s) + b*s`, s a number or one per column of W [N], b likewise: a layer scale."""
    weight, rank = values.array(m[w]), len(m.known_dims(multiplied))
    if weight is None or weight.ndim != 2 or m.dtype(w) not in FLOATS:
        return None
    factor = along(m.array(gain), rank, -1, weight.shape[1])
    shift = along(m.array(offset), rank, -1, weight.shape[1])
    if factor is None or shift is None:
        raise Skip("scale or bias are not one number per column", m[with_gain])
    refuse_tied(m[w])
    if m[with_gain].op_type == "Div":
        with np.errstate(divide="ignore"):
            factor = 1.0 / factor
    matrix = narrow(weight.astype(np.float64) * factor, m.dtype(w), m[w])
    bias_data = narrow(shift * factor, m.dtype(offset), m[offset])
    product_ = g.op("MatMul", m[x], g.const(matrix, name="weight"))
    return g.op("Add", product_, g.const(bias_data, name="bias"))


LAST_KEPT = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Views that may leave the last axis what it is."""

moved = Var()
normalized_view = Op("BatchNormalization", moved, gamma, beta_, mean, var)


@rule(normalized_view, opset=(7, 10_000))
def unfold_batchnorm_of_moved_product(m: Match, g: Builder) -> ir.Value | None:
    """`BN(Transpose(x W + b))` -> `Transpose((x W + b) * s + t)`, s and t per column, where columns become channels.

    As of a linear layer before a normalisation of its features: [B, S, N] -> [B, N, S], or viewed as [B S, N], or both.
    Scale and shift then go into W and b.  Source: BatchNormalization-7, -9, -14 in inference mode.
    """
    node, views = m[normalized_view], _views_to_columns(m)
    if not views:
        return None
    value = views[-1].inputs[0]
    matrix = _weight_of(value)
    if value is None or matrix is None or matrix.dtype not in FLOATS:
        return None
    if m.opset() < 9 and not m.attr(node, "spatial", 1):
        raise Skip("BatchNormalization of each position: spatial is 0", node)
    if m.attr(node, "training_mode", 0) or any(v.uses() for v in node.outputs[1:]):
        raise Skip("BatchNormalization in training mode", node)
    refuse_tied(matrix)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = m.wide(gamma) / np.sqrt(m.wide(var) + float(m.attr(node, "epsilon", 1e-5)))
    shift = m.wide(beta_) - m.wide(mean) * factor
    number, addend = (narrow(v, matrix.dtype, m[gamma]) for v in (factor, shift))
    scaled = g.op("Mul", value, g.const(number, name="scale"))
    made = g.op("Add", scaled, g.const(addend, name="shift"))
    for view in reversed(views):
        made = g.op(view.op_type, made, *view.inputs[1:], like=view)
    return made


def _views_to_columns(m: Match) -> list[ir.Node]:
    """The Transpose and views, the last first, that bring the last axis of a value to the place of the channels."""
    found: list[ir.Node] = []
    value, axis = m[moved], 1
    while len(found) < MAX_STEPS:
        node = value.producer()
        if node is None or node.domain or node.inputs[0] is None or value.is_graph_output():
            return []
        if node.op_type not in ("Transpose", *LAST_KEPT):
            return found if axis == len(m.known_dims(value)) - 1 else []
        if len(value.uses()) > 1:
            return []
        before, after = m.known_dims(node.inputs[0]), m.known_dims(value)
        if node.op_type == "Transpose":
            axis = _perm(m, node, len(before))[axis]
        elif axis != len(after) - 1 or not before or before[-1] != after[-1]:
            return []
        else:
            axis = len(before) - 1
        found.append(node)
        value = node.inputs[0]
    return []


def _weight_of(value: ir.Value | None) -> ir.Value | None:
    """The constant matrix of a product, perhaps with an addend, that nothing else uses."""
    node = None if value is None else value.producer()
    if value is None or node is None or len(value.uses()) > 1:
        return None
    if node.op_type == "Add":
        inner = [v for v in node.inputs if v is not None and values.constant(v) is None]
        return _weight_of(inner[0]) if len(inner) == 1 else None
    held = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    tensor = values.constant(held)
    return held if tensor is not None and len(tensor.shape) == 2 else None


RULES: tuple[Rule, ...] = (
    fold_scale_after_bias,
    unfold_batchnorm_of_moved_product,
    merge_scales_of_product,
    fold_distant_scale_into_weight,
    fold_shift_before_product,
    fold_arithmetic_before_gemm,
    unfold_batchnorm_between_transposes,
)
