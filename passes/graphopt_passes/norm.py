"""Normalisations: LayerNormalization and RMSNormalization out of their parts, in every spelling of the parts.

    Before:  d = x - ReduceMean(x); y = d / Sqrt(ReduceMean(d * d) + eps) * scale + bias
    After:   y = LayerNormalization(x, scale, bias)

First the bare normalisation is recognised, with a scale of ones; then what scales and shifts it is taken in.
Changes numerics: reordered.  Leaves alone: E[x^2] - E[x]^2 (another number where the mean is large), a standard
deviation plus epsilon, float64 (the operators compute their statistics in float32).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import along, from_front, given_axes, narrow, no_operator, trailing
from graphopt_passes.means import epsilon_of, filled, scale_of_ones, trailing_axes

OPSETS = (7, 10_000)

x = Var()
eps = Var(const=True)


def _mean_square(*spellings: Op | Var) -> tuple[Op, Either]:
    """The mean of the square of a value, in one of its spellings, and that plus epsilon, if it is not 0."""
    square = Either(
        *(
            option
            for each in spellings
            for option in (Op("Pow", each, Lit(2.0)), Op("Mul", each, each))
        )
    )
    mean = Op("ReduceMean", square, ...)
    return mean, Either(Op("Add", mean, eps), mean)


def _normalized(value: Op | Var, moment: Either) -> tuple[Op, Op]:
    """`value` over the square root of `moment`: as a quotient, and as a product with the reciprocal."""
    root = Either(Op("Sqrt", moment), Op("Pow", moment, Lit(0.5)))
    inverse = Either(
        Op("Reciprocal", root), Op("Div", Lit(1.0), root), Op("Pow", moment, Lit(-0.5))
    )
    return Op("Div", value, root), Op("Mul", value, inverse)


mean = Op("ReduceMean", x, ...)
centred = Op("Sub", x, mean)
mean_again = Op("ReduceMean", x, ...)
centred_again = Op("Sub", x, mean_again)
"""As torch.export spells a variance: with a mean of its own, its axes counted from the other end."""
variance, _ = _mean_square(centred, centred_again)
wide = Op("Cast", x)
wide_mean = Op("ReduceMean", wide, ...)
wide_variance, _ = _mean_square(Op("Sub", wide, wide_mean))
"""As torch.export spells a variance in half precision: in float32."""
_any_variance = Either(variance, Op("Cast", wide_variance))
lifted_variance = Either(Op("Add", _any_variance, eps), _any_variance)
centred_quotient, centred_product = _normalized(centred, lifted_variance)

power, lifted_power = _mean_square(x)
quotient, product = _normalized(x, lifted_power)


@rule(centred_quotient, opset=OPSETS, benefit=3)
def fuse_centred_quotient(m: Match, g: Builder) -> ir.Value | None:
    """`d / sqrt(mean(d^2) + eps)` -> `LayerNormalization(x, 1)`, d = x - mean(x).

    The means are over the same trailing axes; over all of H, W, … of [N, C, H, W, …] it is an instance normalisation.
    Source: LayerNormalization-17, InstanceNormalization-6.
    """
    return _centred(m, g, centred_quotient)


@rule(centred_product, opset=OPSETS, benefit=3)
def fuse_centred_product(m: Match, g: Builder) -> ir.Value | None:
    """`d * (1 / sqrt(mean(d^2) + eps))` -> `LayerNormalization(x, 1)`, d = x - mean(x).

    Source: LayerNormalization-17, InstanceNormalization-6.
    """
    return _centred(m, g, centred_product)


@rule(quotient, opset=OPSETS, benefit=2)
def fuse_rms_quotient(m: Match, g: Builder) -> ir.Value | None:
    """`x / sqrt(mean(x^2) + eps)` -> `RMSNormalization(x, 1)`, the mean over trailing axes.

    Source: RMSNormalization-23.
    """
    return _rms(m, g)


@rule(product, opset=OPSETS, benefit=2)
def fuse_rms_product(m: Match, g: Builder) -> ir.Value | None:
    """`x * (1 / sqrt(mean(x^2) + eps))` -> `RMSNormalization(x, 1)`, the mean over trailing axes.

    Source: RMSNormalization-23.
    """
    return _rms(m, g)


weight = Var()
weighted_quotient, weighted_product = _normalized(Op("Mul", x, weight), lifted_power)
weighted_centred = Op("Mul", centred, weight)
centred_weighted_quotient, centred_weighted_product = _normalized(weighted_centred, lifted_variance)


@rule(weighted_quotient, opset=OPSETS, benefit=2)
def fuse_weighted_rms_quotient(m: Match, g: Builder) -> ir.Value | None:
    """`x * w / sqrt(mean(x^2) + eps)` -> `RMSNormalization(x, 1) * w`, whose factor then goes into the operator.

    Source: RMSNormalization-23.
    """
    return _weighted(m, g, _rms(m, g))


@rule(weighted_product, opset=OPSETS, benefit=2)
def fuse_weighted_rms_product(m: Match, g: Builder) -> ir.Value | None:
    """`x * w * (1 / sqrt(mean(x^2) + eps))` -> `RMSNormalization(x, 1) * w`.  Source: RMSNormalization-23."""
    return _weighted(m, g, _rms(m, g))


@rule(centred_weighted_quotient, opset=OPSETS, benefit=3)
def fuse_weighted_centred_quotient(m: Match, g: Builder) -> ir.Value | None:
    """`d * w / sqrt(mean(d^2) + eps)` -> `LayerNormalization(x, 1) * w`, d = x - mean(x).  Source: as without w."""
    return _weighted(m, g, _centred(m, g, centred_weighted_quotient))


@rule(centred_weighted_product, opset=OPSETS, benefit=3)
def fuse_weighted_centred_product(m: Match, g: Builder) -> ir.Value | None:
    """`d * w * (1 / sqrt(mean(d^2) + eps))` -> `LayerNormalization(x, 1) * w`.  Source: as without w."""
    return _weighted(m, g, _centred(m, g, centred_weighted_product))


def _weighted(m: Match, g: Builder, normal: ir.Value | None) -> ir.Value | None:
    return None if normal is None else g.op("Mul", normal, m[weight])


offset = Var()
_root = Either(Op("Sqrt", lifted_variance), Op("Pow", lifted_variance, Lit(0.5)))
_inverse = Either(
    Op("Reciprocal", _root), Op("Div", Lit(1.0), _root), Op("Pow", lifted_variance, Lit(-0.5))
)
_factor = Either(Op("Mul", _inverse, weight), _inverse)
_pulled = Op("Mul", mean, _factor)
distributed = Op("Add", Op("Mul", x, _factor), Op("Sub", offset, _pulled))


@rule(distributed, opset=OPSETS, benefit=3)
def fuse_distributed_norm(m: Match, g: Builder) -> ir.Value | None:
    """`x * i + (b - mean(x) * i)` -> `LayerNormalization(x, 1) * w + b`, i = w / sqrt(mean(d^2) + eps).

    d = x - mean(x).  As tf.nn.batch_normalization computes Keras' LayerNormalization.  Source: LayerNormalization-17.
    """
    normal = _centred(m, g, distributed)
    if normal is None:
        return None
    scaled = g.op("Mul", normal, m[weight]) if weight in m.env else normal
    return g.op("Add", scaled, m[offset])


gain = Var()
shift_free = Op("RMSNormalization", centred, gain)


@rule(shift_free, opset=(23, 10_000), benefit=2)
def fuse_rms_of_centred(m: Match, g: Builder) -> ir.Value | None:
    """`RMSNormalization(x - mean(x), s)` -> `LayerNormalization(x, s)`: an exporter took the tail for the whole.

    torch.onnx at opset 23 does so with a layer normalisation that is spelled out.  Source: LayerNormalization-17.
    """
    node, over = m[shift_free], trailing_axes(m, m[mean], m[x])
    rank = len(m.known_dims(x))
    if over is None or int(m.attr(node, "axis", -1)) % rank != rank - len(over):
        return None
    if not m.emits("LayerNormalization", dtype=m.dtype(x)):
        raise Skip(no_operator(m, "LayerNormalization", m.dtype(x)), m[x])
    return g.op("LayerNormalization", m[x], m[gain], like=node)


total = Either(
    Op("ReduceSumSquare", x, ...),
    Op("ReduceSum", Either(Op("Pow", x, Lit(2.0)), Op("Mul", x, x)), ...),
)
length = Either(Op("ReduceL2", x, ...), Op("Sqrt", total), Op("Sqrt", Op("Add", total, eps)))
unit = Op("Div", x, length)
unit_product = Op("Mul", x, Either(Op("Reciprocal", length), Op("Div", Lit(1.0), length)))


@rule(unit, opset=OPSETS)
def fuse_unit_length(m: Match, g: Builder) -> ir.Value | None:
    """`x / sqrt(sum(x^2) + eps)` -> `RMSNormalization(x, 1/sqrt(D), eps/D)` over the last axis, of size D.

    Without epsilon a row of zeros is NaN in both.  Leaves alone: a length that is clamped from below (another number
    where it is clamped).  Source: RMSNormalization-23.
    """
    return _unit(m, g)


@rule(unit_product, opset=OPSETS)
def fuse_unit_length_product(m: Match, g: Builder) -> ir.Value | None:
    """`x * (1 / sqrt(sum(x^2) + eps))` -> `RMSNormalization(x, 1/sqrt(D), eps/D)` over the last axis, of size D.

    Source: RMSNormalization-23.
    """
    return _unit(m, g)


def _unit(m: Match, g: Builder) -> ir.Value | None:
    node, dims, dtype = _reduction(m), m.known_dims(x), m.dtype(x)
    since = 13 if node.op_type == "ReduceSum" else 18
    held = given_axes(m, node, since)
    size = dims[-1].value if dims else None
    if not held or from_front(held, len(dims)) != (len(dims) - 1,) or not size or dtype is None:
        return None
    if not m.attr(node, "keepdims", 1):
        return None
    if not m.emits("RMSNormalization", dtype=dtype, form="unit-length"):
        raise Skip(no_operator(m, "RMSNormalization", dtype), m[x])
    epsilon = epsilon_of(m, eps, m[x]) / size
    factor = g.const(np.full([size], size**-0.5, dtype.numpy()), name="scale")
    return g.op("RMSNormalization", m[x], factor, axis=-1, epsilon=epsilon)


def _reduction(m: Match) -> ir.Node:
    """The node that sums the squares."""
    value = m[total] if total in m.env else m[length]
    maker = value.producer()
    assert maker is not None, "the pattern bound it"
    return maker


def _centred(m: Match, g: Builder, root: Op) -> ir.Value | None:
    over = trailing_axes(m, m[mean], m[x])
    if over is None:
        return _channels_first(m, g)
    if any(trailing_axes(m, m[op], m[x]) != over for op in _moments(m)):
        return None
    dims, dtype = m.known_dims(x), m.dtype(x)
    epsilon = epsilon_of(m, eps, m[x])
    emits = m.emits("LayerNormalization", dtype=dtype)
    layers = emits and all(dims[a].is_static for a in over)
    instances = m.emits("InstanceNormalization", dtype=dtype) or not layers
    scaled = not layers or _is_scaled(m, root, dims)
    if len(over) == len(dims) - 2 > 1 and instances and scaled:
        return _instance(m, g, dims[1], epsilon)
    if not emits:
        raise Skip(no_operator(m, "LayerNormalization", dtype), m[x])
    ones = scale_of_ones(g, dtype, [dims[a] for a in over], m[x])
    return g.op("LayerNormalization", m[x], ones, axis=-len(over), epsilon=epsilon)


def _moments(m: Match) -> list[Op]:
    """The reductions beside the first mean."""
    return [op for op in (variance, mean_again, wide_variance, wide_mean) if m.has(op)]


def _channels_first(m: Match, g: Builder) -> ir.Value | None:
    """The means are over axis 1 of [N, C, H, …]: a layer normalisation between two Transpose, where that pays."""
    dims, dtype = m.known_dims(x), m.dtype(x)
    axes = [given_axes(m, m[op], 18) for op in (mean, *_moments(m))]
    keeps = all(m.attr(op, "keepdims", 1) for op in (mean, *_moments(m)))
    if (
        len(dims) < 3
        or not keeps
        or any(a is None or from_front(a, len(dims)) != (1,) for a in axes)
    ):
        return None
    if not m.emits("LayerNormalization", dtype=dtype, form="channels-first"):
        raise Skip("the target gains nothing by a normalisation between two Transpose", m[x])
    ones, epsilon = scale_of_ones(g, dtype, [dims[1]], m[x]), epsilon_of(m, eps, m[x])
    last = g.op("Transpose", m[x], perm=(0, *range(2, len(dims)), 1))
    normal = g.op("LayerNormalization", last, ones, axis=-1, epsilon=epsilon)
    return g.op("Transpose", normal, perm=(0, len(dims) - 1, *range(1, len(dims) - 1)))


def _is_scaled(m: Match, root: Op, dims: tuple[Dim, ...]) -> bool:
    """Whether a constant per channel scales the normalised value, as an instance normalisation can take it in."""
    channels = dims[1].value
    users = [user for user, _ in m.out(root).uses() if user.op_type == "Mul"]
    data = [values.array(v) for user in users for v in user.inputs]
    return channels is not None and any(
        d is not None and d.size > 1 and along(d, len(dims), 1, channels) is not None for d in data
    )


def _instance(m: Match, g: Builder, channels: Dim, epsilon: float) -> ir.Value:
    dtype = m.dtype(x)
    if not m.emits("InstanceNormalization", dtype=dtype):
        raise Skip(f"the target has no InstanceNormalization for {dtype} that pays", m[x])
    ones = scale_of_ones(g, dtype, [channels], m[x])
    zeros = filled(g, 0.0, dtype, [channels], m[x])
    return g.op("InstanceNormalization", m[x], ones, zeros, epsilon=epsilon)


def _rms(m: Match, g: Builder) -> ir.Value | None:
    maker = m[x].producer()
    over = trailing_axes(m, m[power], m[x])
    if over is None or (maker is not None and maker.op_type == "Sub" and _centres(maker)):
        return None
    dtype = m.dtype(x)
    if not m.emits("RMSNormalization", dtype=dtype):
        raise Skip(no_operator(m, "RMSNormalization", dtype), m[x])
    dims, epsilon = m.known_dims(x), epsilon_of(m, eps, m[x])
    ones = scale_of_ones(g, dtype, [dims[a] for a in over], m[x])
    return g.op("RMSNormalization", m[x], ones, axis=-len(over), epsilon=epsilon)


def _centres(node: ir.Node) -> bool:
    """Whether a Sub takes a mean away: the tail of a layer normalisation is no RMS normalisation of its own."""
    taken = node.inputs[1]
    maker = None if taken is None else taken.producer()
    return maker is not None and maker.op_type == "ReduceMean"


scale, shift = Var(), Var(optional=True)
factor = Var()
norm = Op("LayerNormalization|RMSNormalization|InstanceNormalization", x, scale, shift)
scaled_norm = Op("Mul", norm, factor)
shifted_norm = Op("Add", norm, factor)


@rule(scaled_norm, opset=OPSETS)
def fold_factor_into_norm(m: Match, g: Builder) -> ir.Value:
    """`Norm(x, s, b) * f` -> `Norm(x, s*f, b*f)`, f one number per element of s.

    f may be computed where s is all ones and there is no b.
    Source: LayerNormalization-17, RMSNormalization-23, InstanceNormalization-6.
    """
    node = m[norm]
    if len(node.outputs) > 1:
        raise Skip("the statistics are used", node)
    if values.constant(m[factor]) is None:
        return g.op(node.op_type, m[x], _computed_scale(m, node), m.get(shift), like=node)
    number = _per_element(m, node, factor)
    bias = m.get(shift)
    if bias is not None and not values.is_filled_with(bias, 0.0):
        bias = g.const(narrow(m.wide(shift) * number, bias.dtype, bias), name="bias")
    weight = g.const(narrow(m.wide(scale) * number, m.dtype(scale), m[scale]), name="scale")
    return g.op(node.op_type, m[x], weight, bias, like=node)


def _computed_scale(m: Match, node: ir.Node) -> ir.Value:
    """The factor itself as scale.

    Raises:
        Skip: something else scales already, or the factor has not exactly the scale's shape.
    """
    plain = values.is_filled_with(m[scale], 1.0)
    if (
        m.get(shift) is not None
        or not plain
        or m.dims(factor) != m.dims(scale)
        or node.op_type == "InstanceNormalization"
    ):
        raise Skip("the factor is computed, and not of the scale's shape", m[factor])
    return m[factor]


def _per_element(
    m: Match, node: ir.Node, constant: Var
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A constant beside the result of `node`, in the shape of the scale.

    Raises:
        Skip: it varies along other axes.
    """
    data, rank = m.array(constant), len(m.known_dims(x))
    dims = m.known_dims(scale)
    if not all(d.is_static for d in dims):
        raise Skip("the size of the scale is unknown", m[scale])
    shape = tuple(int(d) for d in dims)
    per_channel = node.op_type == "InstanceNormalization"
    found = along(data, rank, 1, shape[0]) if per_channel else trailing(data, rank, shape)
    if found is None:
        raise Skip("the constant does not vary along the normalised axes alone", m[constant])
    return found.astype(np.float64)


@rule(shifted_norm, opset=OPSETS)
def fold_addend_into_norm(m: Match, g: Builder) -> ir.Value | None:
    """`Norm(x, s, b) + f` -> `Norm(x, s, b + f)`, f one number per element of s.

    RMSNormalization has no bias.  Source: LayerNormalization-17, InstanceNormalization-6.
    """
    node = m[norm]
    if node.op_type == "RMSNormalization" or len(node.outputs) > 1:
        raise Skip("there is no bias to take the addend", node)
    if values.constant(m[factor]) is None:
        if m.get(shift) is not None or m.dims(factor) != m.dims(scale):
            return None  # a residual connection
        return g.op(node.op_type, m[x], m[scale], m[factor], like=node)
    total = m.wide(shift, 0.0) + _per_element(m, node, factor)
    bias = g.const(narrow(total, m.dtype(factor), m[factor]), name="bias")
    return g.op(node.op_type, m[x], m[scale], bias, like=node)


layer_norm = Op("LayerNormalization", x, scale, shift)
channels_first = Op("Transpose", layer_norm)
scaled_channels = Op("Mul", channels_first, factor)
shifted_channels = Op("Add", channels_first, factor)


@rule(scaled_channels, opset=OPSETS)
def fold_factor_through_transpose(m: Match, g: Builder) -> ir.Value | None:
    """`Transpose(LayerNorm(x, s, b)) * f` -> `Transpose(LayerNorm(x, s*f, b*f))`, f one number per channel [C, 1, …].

    Source: LayerNormalization-17.
    """
    number = _per_channel(m)
    if number is None:
        return None
    bias = m.get(shift)
    if bias is not None:
        bias = g.const(narrow(m.wide(shift) * number, bias.dtype, bias), name="bias")
    weight = g.const(narrow(m.wide(scale) * number, m.dtype(scale), m[scale]), name="scale")
    normal = g.op("LayerNormalization", m[x], weight, bias, like=m[layer_norm])
    return g.op("Transpose", normal, like=m[channels_first])


@rule(shifted_channels, opset=OPSETS)
def fold_addend_through_transpose(m: Match, g: Builder) -> ir.Value | None:
    """`Transpose(LayerNorm(x, s, b)) + f` -> `Transpose(LayerNorm(x, s, b + f))`, f one number per channel [C, 1, …].

    Source: LayerNormalization-17.
    """
    number = _per_channel(m)
    if number is None:
        return None
    total = narrow(m.wide(shift, 0.0) + number, m.dtype(factor), m[factor])
    bias = g.const(total, name="bias")
    normal = g.op("LayerNormalization", m[x], m[scale], bias, like=m[layer_norm])
    return g.op("Transpose", normal, like=m[channels_first])


def _per_channel(m: Match) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    """A constant beside the transposed result, per element of the scale; None where it varies otherwise."""
    node, dims, data = m[layer_norm], m.known_dims(x), values.array(m[factor])
    size = values.constant(m[scale])
    axis = int(m.attr(node, "axis", -1)) % len(dims)
    if data is None or size is None or axis != len(dims) - 1 or len(node.outputs) > 1:
        return None
    perm = tuple(m.attr(channels_first, "perm", ())) or tuple(reversed(range(len(dims))))
    return along(data, len(dims), perm.index(len(dims) - 1), int(size.size))


raised = Op("Cast", x)
wide_norm = Op("LayerNormalization|RMSNormalization", raised, scale)
lowered = Op("Cast", wide_norm)


@rule(lowered, opset=OPSETS)
def fold_casts_into_norm(m: Match, g: Builder) -> ir.Value | None:
    """`Cast(Norm(Cast(x, float32), 1), T)` -> `Norm(x, 1)`, stash_type float32, x of type T = float16 or bfloat16.

    The operators compute in stash_type and cast the normalised value before they scale it: with a scale of ones that is
    what the casts say.  Source: LayerNormalization-17, RMSNormalization-23.
    """
    node, dtype = m[wide_norm], m.dtype(x)
    same = dtype == m.dtype(lowered) and dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if not same or m.dtype(wide_norm) != ir.DataType.FLOAT or dtype is None:
        return None
    if len(node.outputs) > 1 or not values.is_filled_with(m[scale], 1.0):
        raise Skip("the scale is applied before the cast", node)
    if not m.emits(node.op_type, dtype=dtype):
        raise Skip(f"the target has no {node.op_type} for {dtype}", node)
    ones = g.const(np.ones(m.array(scale).shape, dtype.numpy()), name="scale")
    return g.op(node.op_type, m[x], ones, like=node, stash_type=1)


RULES: tuple[Rule, ...] = (
    fuse_centred_quotient,
    fuse_centred_product,
    fuse_rms_quotient,
    fuse_rms_product,
    fuse_weighted_rms_quotient,
    fuse_weighted_rms_product,
    fuse_weighted_centred_quotient,
    fuse_weighted_centred_product,
    fuse_distributed_norm,
    fuse_rms_of_centred,
    fuse_unit_length,
    fuse_unit_length_product,
    fold_factor_into_norm,
    fold_addend_into_norm,
    fold_factor_through_transpose,
    fold_addend_through_transpose,
    fold_casts_into_norm,
)
