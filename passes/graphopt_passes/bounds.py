"""Bounds: Clip, Relu, Max and Min in chains.

A clamp is `min(max(x, low), high)`.  ONNX Runtime (and the operator's text) give a Clip without `max` the largest
finite number as its upper bound, not infinity; Relu has none.  The rules keep that apart.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Lit, Match, Op, Skip, Var, exact, rule
from graphopt_passes.constants import keeps_dims

x = Var()
c1, c2 = Var(const=True), Var(const=True)
low1, high1 = Var(const=True, optional=True), Var(const=True, optional=True)
low2, high2 = Var(const=True, optional=True), Var(const=True, optional=True)
zero = Lit(0.0)

_clamp = Op("Clip", x, low1, high1)
_relu = Op("Relu", x)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The clamp `min(max(x, low), high)` on elements of one type."""

    low: float
    high: float

    def then(self, outer: Bounds) -> Bounds:
        """The clamp that does this one and then `outer`."""
        low = min(self.low, self.high)  # max < min: every element becomes max
        return Bounds(outer(low), outer(self.high))

    def __call__(self, number: float) -> float:
        """`number`, clamped."""
        return min(max(number, self.low), self.high)


_RELU = Bounds(0.0, math.inf)


def _limits(dtype: ir.DataType) -> tuple[float, float]:
    """The smallest and largest finite number of a type."""
    if dtype.is_floating_point():
        held = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
        return float(held.min), float(held.max)
    whole = np.iinfo(dtype.numpy())
    return int(whole.min), int(whole.max)


def _bounds(m: Match, clip: Op, low: Var, high: Var, dtype: ir.DataType) -> Bounds:
    """The bounds of a Clip, attributes before opset 11.

    Raises:
        Skip: a bound is empty or NaN.
    """
    smallest, largest = _limits(dtype)
    if m.opset() < 11:
        return Bounds(float(m.attr(clip, "min")), float(m.attr(clip, "max")))
    ends = []
    for var, default in ((low, smallest), (high, largest)):
        value = m.get(var)
        number = default if value is None else values.scalar(value)
        if number is None or math.isnan(number):
            raise Skip("a bound of Clip is not a number", value)
        ends.append(number)
    return Bounds(*ends)


def _dtype(m: Match) -> ir.DataType:
    """The element type of x, where rewriting its bounds is safe.

    Raises:
        Skip: it is unknown.
    """
    dtype = m.dtype(x)
    if dtype is None:
        raise Skip("unknown element type", m[x])
    return dtype


def _emit(m: Match, g: Builder, bounds: Bounds, dtype: ir.DataType) -> ir.Value | None:
    """The node that clamps x so: Relu or Clip; None where the opset has no Clip for the type."""
    if bounds == _RELU and (dtype.is_floating_point() or m.opset() >= 14):
        return g.op("Relu", m[x])
    if not dtype.is_floating_point() and m.opset() < 12:
        return None
    if m.opset() < 11:
        return g.op("Clip", m[x], min=float(bounds.low), max=float(bounds.high))
    ends = (
        None if number == limit else g.const(np.asarray(number, dtype.numpy()), name=name)
        for number, limit, name in zip(
            (bounds.low, bounds.high), _limits(dtype), ("min", "max"), strict=True
        )
    )
    return g.op("Clip", m[x], *ends)


clip_clip = Op("Clip", _clamp, low2, high2)
clip_relu = Op("Clip", _relu, low2, high2)
relu_clip = Op("Relu", _clamp)


@exact(clip_clip)
def join_clips(m: Match, g: Builder) -> ir.Value | None:
    """`Clip(Clip(x, a, b), c, d)` -> `Clip(x, clip(a, c, d), clip(b, c, d))`, constant bounds.

    Source: ONNX Clip-6 (attributes), Clip-11 (inputs), Clip-12 (integers).
    """
    dtype = _dtype(m)
    inner = _bounds(m, _clamp, low1, high1, dtype)
    return _emit(m, g, inner.then(_bounds(m, clip_clip, low2, high2, dtype)), dtype)


@exact(clip_relu)
def join_relu_into_clip(m: Match, g: Builder) -> ir.Value | None:
    """`Clip(Relu(x), c, d)` -> `Clip(x, max(0, c), d)` (d >= 0).  Source: ONNX Clip-11, Relu-6."""
    dtype = _dtype(m)
    return _emit(m, g, _RELU.then(_bounds(m, clip_relu, low2, high2, dtype)), dtype)


@exact(relu_clip)
def join_clip_into_relu(m: Match, g: Builder) -> ir.Value | None:
    """`Relu(Clip(x, a, b))` -> `Clip(x, max(0, a), max(0, b))`.  Source: ONNX Clip-11, Relu-6."""
    dtype = _dtype(m)
    return _emit(m, g, _bounds(m, _clamp, low1, high1, dtype).then(_RELU), dtype)


_max = Op("Max", x, c1)
_min = Op("Min", x, c1)
min_max = Op("Min", _max, c2)
max_min = Op("Max", _min, c2)
same_extremes = Op("Max|Min", Op("Max|Min", x, c1), c2)
max_zero = Op("Max", x, zero)


def _extremes(m: Match, inner: Op, whole: Op) -> tuple[float, float] | None:
    """The two constants, where each is one number and neither broadens x."""
    numbers = values.fill(m[c1]), values.fill(m[c2])
    if None in numbers or not keeps_dims(m, x, c1, inner) or not keeps_dims(m, x, c2, whole):
        return None
    return numbers  # type: ignore[return-value]  # neither is None


@rule(min_max)
def clip_instead_of_min_of_max(m: Match, g: Builder) -> ir.Value | None:
    """`Min(Max(x, a), b)` -> `Clip(x, a, b)`, one number each.  May differ in the sign of a zero result only.

    Source: ONNX Min-8, Max-8, Clip-6.
    """
    found = _extremes(m, _max, min_max)
    if found is None:
        return None
    return _emit(m, g, Bounds(min(found), found[1]), _dtype(m))


@rule(max_min)
def clip_instead_of_max_of_min(m: Match, g: Builder) -> ir.Value | None:
    """`Max(Min(x, b), a)` -> `Clip(x, a, b)` where a <= b.  May differ in the sign of a zero result only.

    Source: ONNX Min-8, Max-8, Clip-6.
    """
    found = _extremes(m, _min, max_min)
    if found is None:
        return None
    high, low = found
    if low > high:
        raise Skip(
            f"lower bound {low} above upper bound {high}: every element becomes the lower", m[x]
        )
    return _emit(m, g, Bounds(low, high), _dtype(m))


min_relu = Op("Min", _relu, c1)
relu_min = Op("Relu", _min)


def _relu_below(m: Match, g: Builder, narrowed: Op) -> ir.Value | None:
    high = values.fill(m[c1])
    if high is None or high < 0 or not keeps_dims(m, x, c1, narrowed):
        return None
    return _emit(m, g, Bounds(0.0, high), _dtype(m))


@rule(min_relu)
def clip_instead_of_min_of_relu(m: Match, g: Builder) -> ir.Value | None:
    """`Min(Relu(x), b)` -> `Clip(x, 0, b)` for b >= 0.  May differ in the sign of a zero result only.

    Source: ONNX Relu-6, Min-8, Clip-6.
    """
    return _relu_below(m, g, min_relu)


@rule(relu_min)
def clip_instead_of_relu_of_min(m: Match, g: Builder) -> ir.Value | None:
    """`Relu(Min(x, b))` -> `Clip(x, 0, b)` for b >= 0.  May differ in the sign of a zero result only.

    Source: ONNX Relu-6, Min-8, Clip-6.
    """
    return _relu_below(m, g, _min)


@exact(same_extremes)
def join_extremes(m: Match, g: Builder) -> ir.Value | None:
    """`Max(Max(x, a), b)` -> `Max(x, max(a, b))`, one number each; likewise Min.  Source: ONNX Max-8, Min-8."""
    inner, outer = same_extremes.inputs[0], m[same_extremes].op_type
    assert isinstance(inner, Op)
    if m[inner].op_type != outer:
        return None
    found = _extremes(m, inner, same_extremes)
    if found is None or 0 in found:  # the order of zeros of both signs is the kernel's own
        return None
    number = max(found) if outer == "Max" else min(found)
    return g.op(outer, m[x], g.const(np.asarray(number, _dtype(m).numpy())))


@rule(max_zero)
def relu_instead_of_max_with_zero(m: Match, g: Builder) -> ir.Value | None:
    """`Max(x, 0)` -> `Relu(x)` for floats.  Differs in the sign of a zero result only.

    Source: ONNX Max-8, Relu-6.
    """
    if not _dtype(m).is_floating_point() or not keeps_dims(m, x, zero, max_zero):
        return None
    return g.op("Relu", m[x])


RULES = (
    join_clips,
    join_relu_into_clip,
    join_clip_into_relu,
    clip_instead_of_min_of_max,
    clip_instead_of_max_of_min,
    clip_instead_of_min_of_relu,
    clip_instead_of_relu_of_min,
    join_extremes,
    relu_instead_of_max_with_zero,
)
