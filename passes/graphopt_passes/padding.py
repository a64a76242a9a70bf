"""Padding: a Pad before a convolution or pool becomes the operator's own pads; `auto_pad` becomes explicit.

Before:  y = Conv(Pad(x, p, 0), W)
After:   y = Conv(x, W) with pads p
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule

x, w = Var(), Var()
pad = Op("Pad", x, ...)
conv = Op("Conv|ConvInteger", pad, w, ...)
pool = Op("AveragePool|MaxPool", pad)

NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax", "Exp", "Abs", "Softplus", "HardSigmoid"})
"""Operators whose result is never below zero, so that zeros around it cannot win a maximum."""


@dataclasses.dataclass(frozen=True)
class Padding:
    """What a constant-mode Pad adds: elements before and after each spatial axis, and their value."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    value: float


def _spatial_padding(m: Match, node: ir.Node) -> Padding:
    """Reads a Pad that adds one constant around the spatial axes only.

    Source: Pad-2 (attributes), -11 (inputs), -18 (axes).

    Raises:
        Skip: it does something else.
    """
    if m.attr(node, "mode", "constant") != "constant":
        raise Skip("only constant padding is what a window sees outside", node)
    amounts = _input_ints(node, 1) if m.opset() >= 11 else tuple(m.attr(node, "pads", ()))
    rank = len(m.known_dims(x))
    axes = tuple(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = tuple(a % rank for a in _input_ints(node, 3))
    if len(amounts) != 2 * len(axes) or min(amounts, default=0) < 0:
        raise Skip("the padding is negative or not known", node)
    begins, ends = (
        dict(zip(axes, amounts, strict=False)),
        dict(zip(axes, amounts[len(axes) :], strict=True)),
    )
    if any(d.get(a, 0) for d in (begins, ends) for a in (0, 1)):
        raise Skip("the batch or channel axis is padded", node)
    return Padding(
        tuple(begins.get(a, 0) for a in range(2, rank)),
        tuple(ends.get(a, 0) for a in range(2, rank)),
        _value(m, node),
    )


def _value(m: Match, node: ir.Node) -> float:
    if m.opset() < 11:
        return float(m.attr(node, "value", 0.0))
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return 0.0
    number = values.scalar(node.inputs[2])
    if number is None:
        raise Skip("the value of the padding is not constant", node)
    return float(number)


def _input_ints(node: ir.Node, index: int) -> tuple[int, ...]:
    data = values.array(node.inputs[index])
    if data is None:
        raise Skip("the padding is not constant", node)
    return tuple(int(i) for i in data.reshape(-1))


def _total(m: Match, node: ir.Node, added: Padding) -> tuple[int, ...]:
    """The pads of `node` with `added` around them."""
    auto = m.attr(node, "auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        raise Skip(f"auto_pad {auto} depends on the padded size", node)
    both = (*added.begins, *added.ends)
    own = m.attr(node, "pads", ()) if auto == "NOTSET" else ()
    return tuple(a + b for a, b in zip(both, own or (0,) * len(both), strict=True))


@rule(conv)
def fold_pad_into_conv(m: Match, g: Builder) -> ir.Value:
    """`Conv(Pad(x, p, 0), W)` -> `Conv(x, W, pads += p)`; ConvInteger where the padding is its zero point.

    Source: Pad-2..25, Conv-1..22, ConvInteger-10.
    """
    node, added = m[conv], _spatial_padding(m, m[pad])
    if added.value != _outside(node):
        raise Skip(f"the convolution sees another value outside than {added.value}", node)
    pads = _total(m, node, added)
    return g.op(node.op_type, m[x], *node.inputs[1:], like=node, pads=pads, auto_pad=None)


def _outside(node: ir.Node) -> float | None:
    """What a convolution sees outside its input: zero, or the zero point that stands for it."""
    if node.op_type == "Conv" or len(node.inputs) < 3 or node.inputs[2] is None:
        return 0.0
    number = values.scalar(node.inputs[2])
    return None if number is None else float(number)


@rule(pool)
def fold_pad_into_pool(m: Match, g: Builder) -> ir.Value:
    """`AveragePool(Pad(x, p, 0))` -> `AveragePool(x, pads += p, count_include_pad=1)`; MaxPool where the padding loses.

    The padding loses where it is -infinity or the lowest number, or zero around what is never negative; a window that
    holds nothing but -infinity may come out as the lowest number.  Every window must see something of x, and none be
    a partial one (ceil_mode), whose count of padded elements runtimes disagree about.

    Source: AveragePool-7..22, MaxPool-1..22.
    """
    node, added = m[pool], _spatial_padding(m, m[pad])
    if m.attr(node, "ceil_mode", 0):
        raise Skip("ceil_mode makes partial windows, which count padding differently", node)
    if len(node.outputs) > 1:
        raise Skip("the indices refer to the padded input", node)
    pads = _total(m, node, added)
    reach = tuple(m.attr(node, "kernel_shape", ()))
    if any(p >= k for p, k in zip(pads, (*reach, *reach), strict=True)):
        raise Skip("a window would lie in the padding altogether", node)
    if node.op_type == "MaxPool":
        _refuse_winning_padding(m, added.value)
        return g.op("MaxPool", m[x], like=node, pads=pads, auto_pad=None)
    if added.value != 0:
        raise Skip("the padding is not zero", m[pad])
    if any(m.attr(node, "pads", ())) and not m.attr(node, "count_include_pad", 0):
        raise Skip("the pool leaves its own padding out of the count", node)
    return g.op("AveragePool", m[x], like=node, pads=pads, auto_pad=None, count_include_pad=1)


def _refuse_winning_padding(m: Match, value: float) -> None:
    """Declines where a padded element could be the maximum of a window."""
    maker = m[x].producer()
    if value <= _lowest(m.dtype(x)):
        return
    if value == 0 and maker is not None and maker.op_type in NON_NEGATIVE:
        return
    raise Skip(f"padding of {value} could be the maximum of a window", m[pad])


def _lowest(dtype: ir.DataType | None) -> float:
    if dtype is None:
        return -np.inf
    return float(dtype.min)


automatic = Op("Conv|ConvInteger|AveragePool|MaxPool", x, ...)


@exact(automatic)
def spell_out_auto_pad(m: Match, g: Builder) -> ir.Value | Sequence[ir.Value] | None:
    """`auto_pad=SAME_UPPER|SAME_LOWER|VALID` -> `pads`, where the sizes that matter are known.

    Along an axis of size d: total = max((ceil(d / stride) - 1) * stride + (k - 1) * dilation + 1 - d, 0); with stride 1
    the size cancels out.  Source: Conv-11, MaxPool-12, AveragePool-19.
    """
    node = m[automatic]
    auto = m.attr(node, "auto_pad", "NOTSET")
    if auto == "NOTSET" or m.attr(node, "ceil_mode", 0):
        return None
    kernel = _kernel(m, node)
    totals = [0] * len(kernel) if auto == "VALID" else _same_totals(m, node, kernel)
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    pads = (*less, *more) if auto != "SAME_LOWER" else (*more, *less)
    return g.ops(
        node.op_type,
        *node.inputs,
        outputs=len(node.outputs),
        like=node,
        pads=pads if any(pads) else None,
        auto_pad=None,
    )


def _kernel(m: Match, node: ir.Node) -> tuple[int, ...]:
    given = m.attr(node, "kernel_shape", ())
    if given or "Pool" in node.op_type:
        return tuple(given)
    weight = node.inputs[1]
    dims = () if weight is None else m.known_dims(weight)[2:]
    if not all(d.is_static for d in dims):
        raise Skip("the kernel's size is unknown", node)
    return tuple(int(d) for d in dims)


def _same_totals(m: Match, node: ir.Node, kernel: Sequence[int]) -> list[int]:
    """Padded elements along each spatial axis so that an output has ceil(size / stride) elements."""
    ones = (1,) * len(kernel)
    strides = m.attr(node, "strides", ()) or ones
    dilations = m.attr(node, "dilations", ()) or ones
    dims = m.dims(x)
    totals = []
    for i, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        reach = (k - 1) * dilation + 1
        size = None if dims is None or len(dims) != len(kernel) + 2 else dims[i + 2].value
        if stride == 1:
            totals.append(reach - 1)
        elif size is None:
            raise Skip(f"auto_pad with stride {stride} depends on an unknown size", node)
        else:
            totals.append(max((-(-size // stride) - 1) * stride + reach - size, 0))
    return totals


RULES: tuple[Rule, ...] = (fold_pad_into_conv, fold_pad_into_pool, spell_out_auto_pad)
