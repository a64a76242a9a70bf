"""Folding of per-channel arithmetic into convolutions: before them, after them, batch normalisation included.

    Before:  y = BatchNormalization(Conv(x, W, b), …), Conv(x, W) + c, Conv(x * s, W)
    After:   y = Conv(x, W', b')

Changes numerics: reordered; weights are folded in float64.  Needs constant weights.  Leaves alone: tied weights,
quantised weights, training mode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import Wide, along, is_tied, live_uses, narrow, on_axis, refuse_tied

BROADCASTING = (7, 10_000)
"""Opsets of multidirectional broadcasting; before, Add and its like took `axis` and `broadcast`."""

x, w = Var(), Var()
b = Var(optional=True)
c = Var(const=True)
gamma, beta, mean, var = Var(), Var(), Var(), Var()

conv = Op("Conv|ConvTranspose", x, w, b)


def _out_axis(node: ir.Node) -> int:
    """Which axis of the weight counts output channels (of one group, for ConvTranspose)."""
    return 1 if node.op_type == "ConvTranspose" else 0


def _out_channels(m: Match, node: ir.Node, weight: tuple[int, ...]) -> int:
    groups = int(m.attr(node, "group", 1)) if node.op_type == "ConvTranspose" else 1
    return weight[_out_axis(node)] * groups


def _weight(m: Match) -> np.ndarray[Any, Any]:
    """The constant weight, which must be there for folding.

    Raises:
        Skip: not constant, or quantised.
    """
    _refuse_quantized(m[w])
    return m.array(w)


def _quantizer(value: ir.Value) -> ir.Node | None:
    maker = value.producer()
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _refuse_quantized(value: ir.Value) -> None:
    if (maker := _quantizer(value)) is not None:
        raise Skip("the weight is quantised: folding would undo that", maker)


def _scale_outputs(m: Match, node: ir.Node, weight: Wide, scale: Wide) -> Wide:
    """`weight` with output channel i multiplied by scale[i].

    Conv: W [M, C/g, *kernel].  ConvTranspose: W [C, M/g, *kernel], whose rows belong to groups in order.
    """
    if node.op_type == "Conv":
        return weight * on_axis(scale, weight.ndim, 0)
    groups = int(m.attr(node, "group", 1))
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    factor = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * factor).reshape(weight.shape)


def _rebuild(m: Match, g: Builder, node: ir.Node, weight: Wide, bias: Wide) -> ir.Value:
    """The convolution with other constants; a bias of zeros is left out if there was none."""
    dtype = m.dtype(w)
    args = [m[x], g.const(narrow(weight, dtype, m[w]), name="weight")]
    if np.any(bias) or m.get(b) is not None:
        args.append(g.const(narrow(bias, dtype, m[w]), name="bias"))
    return g.op(node.op_type, *args, like=node)


def _statistics(m: Match, node: ir.Node) -> tuple[Wide, Wide]:
    """Scale and shift of an inference-mode BatchNormalization: y = x * scale + shift, each [C].

    Source: BatchNormalization-1 (`is_test`), -7 (`spatial`), -9, -14 (`training_mode`).

    Raises:
        Skip: it normalises with the statistics of the batch, or of each position.
    """
    opset = m.opset()
    if opset < 7 and not m.attr(node, "is_test", 0):
        raise Skip("BatchNormalization in training mode: is_test is not set", node)
    if opset < 9 and not m.attr(node, "spatial", 1):
        raise Skip("BatchNormalization of each position: spatial is 0", node)
    if opset >= 14 and m.attr(node, "training_mode", 0):
        raise Skip("BatchNormalization in training mode", node)
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise Skip("BatchNormalization in training mode: its statistics are used", node)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = m.wide(gamma) / np.sqrt(m.wide(var) + float(m.attr(node, "epsilon", 1e-5)))
    return scale, m.wide(beta) - m.wide(mean) * scale


def _folds_alike(m: Match, root: ir.Node) -> bool:
    """Whether every other use of the weight is a convolution of the same form that folds into the same constants."""
    inner = m[conv]
    for user in live_uses(m[w]):
        if user is inner:
            continue
        outs = [use.node for use in user.outputs[0].uses()]
        same = user.op_type == inner.op_type and user.inputs[1:] == inner.inputs[1:]
        if not same or user.outputs[0].is_graph_output() or len(outs) != 1:
            return False
        if outs[0].op_type != root.op_type or outs[0].inputs[1:] != root.inputs[1:]:
            return False
    return not m[w].is_graph_output()


bn = Op("BatchNormalization", conv, gamma, beta, mean, var)


@rule(bn)
def fold_batchnorm_into_conv(m: Match, g: Builder) -> ir.Value:
    """`BN(Conv(x, W, b))` -> `Conv(x, W*s, (b - mean)*s + beta)`, with s = gamma / sqrt(var + eps) [M].

    ConvTranspose too, in groups.  Computed in float64, stored in W's dtype.
    Source: ONNX BatchNormalization in inference mode, opsets 1 to 15.
    """
    scale, shift = _statistics(m, m[bn])
    weight = _weight(m).astype(np.float64)
    if is_tied(m[w]) and not _folds_alike(m, m[bn]):
        refuse_tied(m[w])
    folded = _scale_outputs(m, m[conv], weight, scale)
    return _rebuild(m, g, m[conv], folded, m.wide(b, 0.0) * scale + shift)


scaled = Op("Mul|Div", conv, c)


@rule(scaled, opset=BROADCASTING)
def fold_scale_into_conv(m: Match, g: Builder) -> ir.Value:
    """`Conv(x, W, b) * c` -> `Conv(x, W*c, b*c)`, c a scalar or one number per channel [M]; Div likewise.

    Source: ONNX Mul-7, Div-7; W and b as in Conv-11, ConvTranspose-11.
    """
    weight = _weight(m).astype(np.float64)
    channels = _out_channels(m, m[conv], weight.shape)
    scale = along(m.array(c), weight.ndim, 1, channels)
    if scale is None:
        raise Skip("the factor is not one number per channel", m[c])
    refuse_tied(m[w])
    if m[scaled].op_type == "Div":
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = 1.0 / scale
    bias = np.broadcast_to(m.wide(b, 0.0), (channels,)) * scale
    return _rebuild(m, g, m[conv], _scale_outputs(m, m[conv], weight, scale), bias)


shifted = Op("Add|Sub", conv, c)


@rule(shifted, opset=BROADCASTING)
def fold_shift_into_conv(m: Match, g: Builder) -> ir.Value:
    """`Conv(x, W, b) + c` -> `Conv(x, W, b + c)`, c a scalar or one number per channel [M]; minus likewise.

    The weight stays as it is: it may be tied, and need not be constant.
    """
    _refuse_quantized(m[w])
    dims = m.known_dims(w)
    if not all(d.is_static for d in dims):
        raise Skip("the number of output channels is unknown", m[w])
    channels = _out_channels(m, m[conv], tuple(int(d) for d in dims))
    shift = along(m.array(c), len(dims), 1, channels)
    if shift is None:
        raise Skip("the addend is not one number per channel", m[c])
    if m[shifted].op_type == "Sub":
        shift = -shift
    bias = narrow(m.wide(b, 0.0) + shift, m.dtype(c), m[c])
    return g.op(
        m[conv].op_type, m[x], m[w], g.const(np.ascontiguousarray(bias), name="bias"), like=m[conv]
    )


reversed_ = Op("Sub", c, conv)


@rule(reversed_, opset=BROADCASTING)
def fold_difference_into_conv(m: Match, g: Builder) -> ir.Value:
    """`c - Conv(x, W, b)` -> `Conv(x, -W, c - b)`, c a scalar or one number per channel [M]."""
    weight = _weight(m).astype(np.float64)
    channels = _out_channels(m, m[conv], weight.shape)
    shift = along(m.array(c), weight.ndim, 1, channels)
    if shift is None:
        raise Skip("the minuend is not one number per channel", m[c])
    refuse_tied(m[w])
    return _rebuild(m, g, m[conv], -weight, shift - m.wide(b, 0.0))


def _scale_inputs(m: Match, node: ir.Node, weight: Wide, factor: Wide) -> Wide:
    """`weight` with what meets input channel i multiplied by factor[i].

    Conv: W [M, C/g, *kernel], where the j-th block of M/g outputs meets the j-th block of inputs.
    """
    if node.op_type == "ConvTranspose":
        return weight * on_axis(factor, weight.ndim, 0)
    groups = int(m.attr(node, "group", 1))
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    blocks = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * blocks).reshape(weight.shape)


def _in_channels(m: Match, node: ir.Node, weight: tuple[int, ...]) -> int:
    groups = int(m.attr(node, "group", 1)) if node.op_type == "Conv" else 1
    return weight[1 if node.op_type == "Conv" else 0] * groups


def _pads_nothing(m: Match, node: ir.Node) -> bool:
    """Whether a Conv sees nothing but its input: then a constant shift of the input shifts the output constantly."""
    auto = m.attr(node, "auto_pad", "NOTSET")
    return node.op_type == "Conv" and (
        auto == "VALID" or (auto == "NOTSET" and not any(m.attr(node, "pads", ())))
    )


def _fold_before(m: Match, g: Builder, node: ir.Node, scale: Wide, shift: Wide) -> ir.Value:
    """`Conv(x * scale + shift, W, b)` -> `Conv(x, W * scale, b + W . shift)`, scale and shift [C]."""
    if np.any(shift) and not _pads_nothing(m, node):
        raise Skip("the shift does not reach the padding", node)
    weight = _weight(m).astype(np.float64)
    refuse_tied(m[w])
    bias = m.wide(b, 0.0)
    if np.any(shift):
        spread = _scale_inputs(m, node, weight, shift)
        bias = bias + spread.sum(axis=tuple(range(1, weight.ndim)))
    return _rebuild(m, g, node, _scale_inputs(m, node, weight, scale), bias)


before = Op("Mul|Div|Add|Sub", x, c)
after = Op("Conv|ConvTranspose", before, w, b)


@rule(after, opset=BROADCASTING)
def fold_input_affine_into_conv(m: Match, g: Builder) -> ir.Value:
    """`Conv(x * s, W, b)` -> `Conv(x, W*s, b)`; `x + t` adds `sum(W*t)` to b where nothing is padded.

    s, t: scalars or one number per input channel [C].  x keeps its shape, which must have C channels already.
    """
    node, arithmetic = m[after], m[before]
    _refuse_quantized(m[w])
    dims, weight = m.known_dims(x), m.array(w)
    channels = _in_channels(m, node, weight.shape)
    number = along(m.array(c), weight.ndim, 1, channels)
    if number is None:
        raise Skip("the constant is not one number per channel", m[c])
    if len(dims) != weight.ndim or dims[1] != channels:
        raise Skip("the arithmetic may broaden its input", arithmetic)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = {"Mul": number, "Div": 1.0 / number}.get(arithmetic.op_type, np.ones(channels))
    shift = {"Add": number, "Sub": -number}.get(arithmetic.op_type, np.zeros(channels))
    return _fold_before(m, g, node, scale, shift)


bn_before = Op("BatchNormalization", x, gamma, beta, mean, var)
after_bn = Op("Conv|ConvTranspose", bn_before, w, b)


@rule(after_bn)
def fold_batchnorm_before_conv(m: Match, g: Builder) -> ir.Value:
    """`Conv(BN(x), W, b)` -> `Conv(x, W*s, b + sum(W*t))`, with BN(x) = x*s + t, where nothing is padded or t is 0."""
    scale, shift = _statistics(m, m[bn_before])
    return _fold_before(m, g, m[after_bn], scale, shift)


zero = Var(const=True)
biased = Op("Conv|ConvTranspose", x, w, zero)


@rule(biased)
def drop_zero_bias(m: Match, g: Builder) -> ir.Value | None:
    """`Conv(x, W, 0)` -> `Conv(x, W)`: only the sign of a zero sum may change.

    Left alone where the weight is quantised: runtimes match the bias of a quantised convolution by position.
    """
    if _quantizer(m[w]) is not None or np.any(m.array(zero)):
        return None
    return g.op(m[biased].op_type, m[x], m[w], like=m[biased])


RULES: tuple[Rule, ...] = (
    fold_batchnorm_into_conv,
    fold_scale_into_conv,
    fold_shift_into_conv,
    fold_difference_into_conv,
    fold_input_affine_into_conv,
    fold_batchnorm_before_conv,
    drop_zero_bias,
)
