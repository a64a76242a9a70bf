"""Kernels that compute: integers as they wrap, floats where every runtime rounds alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir.kernels.operation import Array, Inputs, Kernel, Operation, Results, axes_of, need


def _cast(op: Operation, inputs: Inputs) -> Results:
    return cast(need(inputs[0]), ir.DataType(op.attr("to", 0)))


def cast(data: Array, to: ir.DataType) -> Results:
    """A cast between plain numbers, where every runtime agrees on the result; else None."""
    if data.dtype.kind not in "biuf" or to in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    target = to.numpy()
    if data.dtype.kind == "f":
        if not np.isfinite(data).all():
            return None  # NaN payloads, and infinities as integers, differ between runtimes
        if target.kind in "iu" and not _fits(data, target):
            return None
    if target.kind in "biuf" or to == ir.DataType.BFLOAT16:
        return [data.astype(target)]
    return None


def _fits(data: Array, target: np.dtype[Any]) -> bool:
    """Whether floats truncate to integers within the range of a type."""
    if not data.size:
        return True
    limits = np.iinfo(target)
    return float(limits.min) <= float(data.min()) and float(data.max()) < float(limits.max)


def _numeric(
    function: Callable[[Array, Array], Array], kinds: str = "iu"
) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a binary operator on native types of the given kinds."""

    def compute(op: Operation, inputs: Inputs) -> Results:
        left, right = need(inputs[0]), need(inputs[1])
        if left.dtype != right.dtype or left.dtype.kind not in kinds or not _full(left, kinds):
            return None
        return [np.asarray(function(left, right))] if op.version >= 7 else None

    return compute


def _full(array: Array, kinds: str) -> bool:
    """Whether arithmetic on the type is done in the type: float16 is computed in float32 by some."""
    return "f" not in kinds or array.dtype.kind != "f" or array.dtype.itemsize >= 4


def _divide(op: Operation, inputs: Inputs) -> Results:
    left, right = need(inputs[0]), need(inputs[1])
    if left.dtype.kind == "f":
        return _numeric(np.divide, "f")(op, inputs)
    if left.dtype.kind not in "iu" or left.dtype != right.dtype or _has_no_quotient(left, right):
        return None
    quotient = np.floor_divide(left, right)
    inexact = (np.remainder(left, right) != 0) & ((left < 0) != (right < 0))
    return [(quotient + inexact).astype(left.dtype)]


def _has_no_quotient(left: Array, right: Array) -> bool:
    """Whether an integer is divided by zero, or the least one by -1."""
    least = np.iinfo(left.dtype).min
    overflows = least < 0 and bool((right == -1).any()) and bool((left == least).any())
    return overflows or bool((right == 0).any())


def _mod(op: Operation, inputs: Inputs) -> Results:
    left, right = need(inputs[0]), need(inputs[1])
    if left.dtype.kind not in "iu" or left.dtype != right.dtype or _has_no_quotient(left, right):
        return None
    return [(np.fmod if op.attr("fmod", 0) else np.remainder)(left, right)]


def _unary(
    function: Callable[[Array], Array], kinds: str
) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a unary operator on native types of the given kinds."""

    def compute(_op: Operation, inputs: Inputs) -> Results:
        data = need(inputs[0])
        known = data.dtype.kind in kinds and _full(data, kinds)
        return [np.asarray(function(data), dtype=data.dtype)] if known else None

    return compute


def _extreme(function: Callable[[Array, Array], Array]) -> Callable[[Operation, Inputs], Results]:
    """The kernel of Max or Min on integers (runtimes disagree on NaN and signed zeros)."""

    def compute(op: Operation, inputs: Inputs) -> Results:
        result = need(inputs[0])
        if result.dtype.kind not in "iu" or op.version < 8:
            return None
        for other in inputs[1:]:
            result = function(result, need(other))
        return [np.asarray(result)]

    return compute


def _reduce(function: Callable[..., Array], since: int) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a reduction of integers; axes become an input at opset `since`."""

    def compute(op: Operation, inputs: Inputs) -> Results:
        data = need(inputs[0])
        if data.dtype.kind not in "iu" or not data.size:
            return None
        axes = axes_of(op, inputs, since) or None
        if axes is None and op.attr("noop_with_empty_axes", 0):
            return [data]
        found = function(data, axis=axes, keepdims=bool(op.attr("keepdims", 1)))
        return [np.asarray(found, dtype=data.dtype)]

    return compute


def _sum(data: Array, **options: Any) -> Array:  # noqa: ANN401 - passed through to NumPy
    return np.asarray(np.sum(data, dtype=data.dtype, **options))


def _prod(data: Array, **options: Any) -> Array:  # noqa: ANN401
    return np.asarray(np.prod(data, dtype=data.dtype, **options))


def _compare(
    function: Callable[[Array, Array], Array], kinds: str = "iuf"
) -> Callable[[Operation, Inputs], Results]:
    """The kernel of a comparison."""
    return _numeric(function, kinds)


ARITHMETIC: Mapping[str, Kernel] = {
    "Cast": _cast,
    "Add": _numeric(np.add, "iuf"),
    "Sub": _numeric(np.subtract, "iuf"),
    "Mul": _numeric(np.multiply, "iuf"),
    "Div": _divide,
    "Mod": _mod,
    "Max": _extreme(np.maximum),
    "Min": _extreme(np.minimum),
    "Neg": _unary(np.negative, "if"),
    "Abs": _unary(np.abs, "iuf"),
    "Sign": _unary(np.sign, "iu"),
    "Floor": _unary(np.floor, "f"),
    "Ceil": _unary(np.ceil, "f"),
    "Round": _unary(np.rint, "f"),
    "Sqrt": _unary(np.sqrt, "f"),
    "Not": _unary(np.logical_not, "b"),
    "And": _numeric(np.logical_and, "b"),
    "Or": _numeric(np.logical_or, "b"),
    "Xor": _numeric(np.logical_xor, "b"),
    "Equal": _compare(np.equal, "biuf"),
    "Less": _compare(np.less),
    "LessOrEqual": _compare(np.less_equal),
    "Greater": _compare(np.greater),
    "GreaterOrEqual": _compare(np.greater_equal),
    "BitwiseAnd": _numeric(np.bitwise_and),
    "BitwiseOr": _numeric(np.bitwise_or),
    "BitwiseXor": _numeric(np.bitwise_xor),
    "BitwiseNot": _unary(np.bitwise_not, "iu"),
    "ReduceSum": _reduce(_sum, 13),
    "ReduceProd": _reduce(_prod, 18),
    "ReduceMax": _reduce(np.max, 18),
    "ReduceMin": _reduce(np.min, 18),
}
