"""Algebra: neutral elements, chains of constants, signs, powers, quotients, idempotent and inverse operators.

Rules called exact give the same bits, NaN, infinities and signed zeros included.  The others may round differently,
and some turn the sign of a zero: their documentation says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Lit, Match, Op, Skip, Var, exact, rule
from graphopt_passes.constants import keeps_dims, narrow, refuse_tied

x, y, cond = Var(), Var(), Var()
w, bias = Var(), Var(const=True)
c, c1, c2 = Var(const=True), Var(const=True), Var(const=True)

_NEGATABLE = frozenset({"FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT32", "INT64"})


def _is_float(m: Match, of: Var) -> bool:
    dtype = m.dtype(of)
    return dtype is not None and dtype.is_floating_point()


# --- neutral elements

commutative_unit = Op("Add|Mul|And|Or|Xor|BitwiseAnd|BitwiseOr|BitwiseXor", x, c)
right_unit = Op("Sub|Div|Pow|BitShift", x, c)


def _is_neutral(op_type: str, number: float, dtype: ir.DataType) -> bool:
    """Whether `x op number` is `x` to the bit."""
    sign = math.copysign(1.0, number) if dtype.is_floating_point() else 0.0
    if op_type in ("Add", "Sub"):
        return number == 0 and sign == {"Add": -1.0, "Sub": 1.0}[op_type] * abs(sign)
    if op_type in ("Mul", "Div", "Pow", "And"):
        return number == 1
    if op_type == "BitwiseAnd":
        return number == (-1 if dtype.is_signed() else 2**dtype.bitwidth - 1)
    return number == 0


def _drop_neutral(m: Match, root: Op) -> ir.Value | None:
    number, dtype = values.fill(m[c]), m.dtype(c)
    if number is None or dtype is None or not _is_neutral(m[root].op_type, number, dtype):
        return None
    return m[x] if keeps_dims(m, x, c, root) else None


@exact(commutative_unit)
def drop_neutral_operand(m: Match, g: Builder) -> ir.Value | None:  # noqa: ARG001
    """`x + (-0.0)`, `x * 1`, `x and True`, `x or False`, `x ^ 0` -> `x` where the constant does not broaden x.

    For integers every zero is neutral; for floats `x + 0.0` is not (`-0.0 + 0.0` is `0.0`): see drop_zero_addend.
    Source: ONNX Add-7, Mul-7, And-7, Or-7, Xor-7, BitwiseAnd-18, BitwiseOr-18, BitwiseXor-18.
    """
    return _drop_neutral(m, commutative_unit)


@exact(right_unit)
def drop_neutral_right_operand(m: Match, g: Builder) -> ir.Value | None:  # noqa: ARG001
    """`x - 0`, `x / 1`, `x ** 1`, `x << 0` -> `x` where the constant does not broaden x.

    Source: ONNX Sub-7, Div-7, Pow-7, BitShift-11.
    """
    return _drop_neutral(m, right_unit)


zero_addend = Op("Add", x, c)
zero_subtrahend = Op("Sub", x, c)


@rule(zero_addend)
def drop_zero_addend(m: Match, g: Builder) -> ir.Value | None:  # noqa: ARG001
    """`x + 0.0` -> `x`.  Differs for x = -0.0 only, whose sign is kept.  Source: ONNX Add-7."""
    return m[x] if values.fill(m[c]) == 0 and keeps_dims(m, x, c, zero_addend) else None


@rule(zero_subtrahend)
def drop_negative_zero_subtrahend(m: Match, g: Builder) -> ir.Value | None:  # noqa: ARG001
    """`x - (-0.0)` -> `x`.  Differs for x = -0.0 only, whose sign is kept.  Source: ONNX Sub-7."""
    return m[x] if values.fill(m[c]) == 0 and keeps_dims(m, x, c, zero_subtrahend) else None


pair_sum = Op("Sum", x, y)


@exact(pair_sum)
def spell_sum_of_two_as_add(m: Match, g: Builder) -> ir.Value | None:
    """`Sum(x, y)` -> `Add(x, y)`: one spelling for later patterns.  Source: ONNX Sum-8, Add-7.

    Before a LayerNormalization it stays where the target's runtime would fuse the Add to its loss.
    """
    users = [use.node.op_type for use in m.out(pair_sum).uses()]
    if "SkipLayerNormalization" in m.facts.target.shuns and "LayerNormalization" in users:
        return None
    return g.op("Add", m[x], m[y])


# --- chains of constants

_CANCELLED = 0.25  # of the larger constant: what is left below that has lost two bits

_first_factor = Op("Mul|Div", x, c1)
factors = Op("Mul|Div", _first_factor, c2)
_first_addend = Op("Add|Sub", x, c1)
addends = Op("Add|Sub", _first_addend, c2)


def _join(m: Match, join: Callable[[Any, Any], Any]) -> npt.NDArray[Any]:
    """`join(c1, c2)` in their element type: integers wrap, floats are computed in float64.

    Raises:
        Skip: the result is larger than both, overflows, underflows, or would duplicate a weight.
    """
    a, b, dtype = m.array(c1), m.array(c2), m.dtype(c1)
    if np.broadcast(a, b).size > max(a.size, b.size):
        raise Skip("the joined constant would be larger than either", m[c2])
    refuse_tied(m[c1])
    refuse_tied(m[c2])
    with np.errstate(all="ignore"):
        if dtype is None or not dtype.is_floating_point():
            return np.asarray(join(a, b), a.dtype)
        wide = np.asarray(join(a.astype(np.float64), b.astype(np.float64)))
    return narrow(wide, dtype, m[c2])


def _refuse_underflow(m: Match, joined: npt.NDArray[Any]) -> None:
    if not _is_float(m, c1):
        return
    limits = ml_dtypes.finfo(joined.dtype)  # type: ignore[no-untyped-call]
    small = np.abs(joined.astype(np.float64)) < float(limits.tiny)
    if bool((small & (m.wide(c1) != 0) & (m.wide(c2) != 0)).any()):
        raise Skip("the joined constant underflows", m[c2])


def _refuse_cancellation(m: Match, joined: npt.NDArray[Any]) -> None:
    if not _is_float(m, c1):
        return
    size = np.maximum(np.abs(m.wide(c1)), np.abs(m.wide(c2)))
    if bool((np.abs(joined.astype(np.float64)) < size * _CANCELLED).any()):
        raise Skip("the constants cancel, which hides a rounding of the sum", m[c2])


@rule(factors)
def join_factors(m: Match, g: Builder) -> ir.Value | None:
    """`(x * c1) * c2` -> `x * (c1 * c2)`, and every mix of `*` and `/` by constants.

    Integers: multiplication only (it wraps alike); their division truncates.  Declines where the joined constant is
    larger than both, or leaves the range of normal numbers.  Source: ONNX Mul-7, Div-7.
    """
    divides = (m[_first_factor].op_type == "Div", m[factors].op_type == "Div")
    if any(divides) and not _is_float(m, c1):
        return None
    if all(divides) or not any(divides):
        joined = _join(m, np.multiply)
    else:
        joined = _join(m, (lambda a, b: b / a) if divides[0] else np.divide)
    _refuse_underflow(m, joined)
    return g.op("Div" if all(divides) else "Mul", m[x], g.const(joined))


@rule(addends)
def join_addends(m: Match, g: Builder) -> ir.Value:
    """`(x + c1) + c2` -> `x + (c1 + c2)`, and every mix of `+` and `-`.  Integers wrap alike.

    Declines where the constants nearly cancel: then the original rounds x to the precision of c1, and the result
    differs by far more than a rounding.  Source: ONNX Add-7, Sub-7.
    """
    join = _ADDENDS[m[_first_addend].op_type, m[addends].op_type]
    joined = _join(m, join)
    _refuse_cancellation(m, joined)
    return g.op("Add", m[x], g.const(joined))


_ADDENDS: Mapping[tuple[str, str], Callable[[Any, Any], Any]] = {
    ("Add", "Add"): np.add,
    ("Sub", "Add"): lambda a, b: b - a,
    ("Add", "Sub"): np.subtract,
    ("Sub", "Sub"): lambda a, b: -(a + b),
}

mirrored = Op("Sub", c2, Op("Add", x, c1))


@rule(mirrored)
def join_minuend(m: Match, g: Builder) -> ir.Value:
    """`c2 - (x + c1)` -> `(c2 - c1) - x`, where the constants do not cancel.  Source: ONNX Sub-7."""
    joined = _join(m, lambda a, b: b - a)
    _refuse_cancellation(m, joined)
    return g.op("Sub", g.const(joined), m[x])


# --- signs

_inner_inverse = Op("Neg|Not|BitwiseNot", x, shared=True)
double_inverse = Op("Neg|Not|BitwiseNot", _inner_inverse)


@exact(double_inverse)
def drop_double_inverse(m: Match, g: Builder) -> ir.Value | None:  # noqa: ARG001
    """`-(-x)`, `not not x`, `~~x` -> `x`.  Source: ONNX Neg-6, Not-1, BitwiseNot-18."""
    return m[x] if m[double_inverse].op_type == m[_inner_inverse].op_type else None


plus_negative = Op("Add", x, Op("Neg", y))
minus_negative = Op("Sub", x, Op("Neg", y))


@exact(plus_negative)
def subtract_negated_addend(m: Match, g: Builder) -> ir.Value:
    """`x + (-y)` -> `x - y`.  Source: ONNX Neg-6."""
    return g.op("Sub", m[x], m[y])


@exact(minus_negative)
def add_negated_subtrahend(m: Match, g: Builder) -> ir.Value:
    """`x - (-y)` -> `x + y`.  Source: ONNX Neg-6."""
    return g.op("Add", m[x], m[y])


times_minus_one = Op("Mul", x, c)
zero_minus = Op("Sub", c, x)
negated_difference = Op("Neg", Op("Sub", x, y))


@exact(times_minus_one)
def negate_instead_of_times_minus_one(m: Match, g: Builder) -> ir.Value | None:
    """`x * -1` -> `-x`.  Source: ONNX Neg-6."""
    dtype = m.dtype(c)
    if values.fill(m[c]) != -1 or dtype is None or dtype.name not in _NEGATABLE:
        return None
    return g.op("Neg", m[x]) if keeps_dims(m, x, c, times_minus_one) else None


@rule(zero_minus)
def negate_instead_of_zero_minus(m: Match, g: Builder) -> ir.Value | None:
    """`0 - x` -> `-x`.  Differs in the sign of a zero result only.  Source: ONNX Neg-6."""
    dtype = m.dtype(c)
    if values.fill(m[c]) != 0 or dtype is None or dtype.name not in _NEGATABLE:
        return None
    return g.op("Neg", m[x]) if keeps_dims(m, x, c, zero_minus) else None


@rule(negated_difference)
def swap_negated_difference(m: Match, g: Builder) -> ir.Value:
    """`-(x - y)` -> `y - x`.  Differs in the sign of a zero result only.  Source: ONNX Neg-6."""
    return g.op("Sub", m[y], m[x])


two_negatives = Op("Mul|Div", Op("Neg", x), Op("Neg", y))
negated_operand = Op("Mul|Div", Op("Neg", x), c)
abs_of_negative = Op("Abs", Op("Neg", x, shared=True))


@exact(two_negatives)
def cancel_two_negatives(m: Match, g: Builder) -> ir.Value | None:
    """`(-x) * (-y)` -> `x * y`, `(-x) / (-y)` -> `x / y`; floats.  Source: ONNX Neg-6."""
    return g.op(m[two_negatives].op_type, m[x], m[y]) if _is_float(m, x) else None


@exact(negated_operand)
def move_sign_into_constant(m: Match, g: Builder) -> ir.Value | None:
    """`(-x) * c` -> `x * (-c)`, `(-x) / c` -> `x / (-c)`; floats.  Source: ONNX Neg-6."""
    if not _is_float(m, c):
        return None
    refuse_tied(m[c])
    return g.op(m[negated_operand].op_type, m[x], g.const(-m.array(c)))


@exact(abs_of_negative)
def drop_sign_under_abs(m: Match, g: Builder) -> ir.Value:
    """`|-x|` -> `|x|`.  Source: ONNX Abs-6, Neg-6."""
    return g.op("Abs", m[x])


# --- idempotent operators

_ROUNDINGS = frozenset({"Ceil", "Floor", "Round"})
_projected = Op("Abs|Relu|Ceil|Floor|Round|Sign", x, shared=True)
projection = Op("Abs|Relu|Ceil|Floor|Round|Sign", _projected)
_nonnegative = Op("Abs|Sigmoid|HardSigmoid|Softmax|Exp|Softplus", x, shared=True)
clamp_of_nonnegative = Op("Relu|Abs", _nonnegative)


@exact(projection)
def drop_second_projection(m: Match, g: Builder) -> ir.Value | None:  # noqa: ARG001
    """`f(f(x))` -> `f(x)` for Abs, Relu, Sign; any two of Ceil, Floor, Round -> the inner one.

    Source: ONNX Abs-6, Relu-6, Sign-9, Ceil-6, Floor-6, Round-11.
    """
    outer, inner = m[projection].op_type, m[_projected].op_type
    same = outer == inner or {outer, inner} <= _ROUNDINGS
    return m.out(_projected) if same else None


@exact(clamp_of_nonnegative)
def drop_clamp_of_nonnegative(m: Match, g: Builder) -> ir.Value | None:  # noqa: ARG001
    """`Relu(f(x))`, `|f(x)|` -> `f(x)` where f is never below +0.0 (NaN passes through both); floats.

    Source: ONNX Relu-6, Sigmoid-6, HardSigmoid-6, Softmax-1, Exp-6, Softplus-1, Abs-6.
    """
    return m.out(_nonnegative) if _is_float(m, x) else None


# --- quotients

_one = Lit(1.0)
one_over = Op("Div", _one, x)
times_reciprocal = Op("Mul", Op("Reciprocal", x), y)
over_reciprocal = Op("Div", y, Op("Reciprocal", x))
by_constant = Op("Div", x, c)


@exact(one_over)
def spell_one_over_as_reciprocal(m: Match, g: Builder) -> ir.Value | None:
    """`1 / x` -> `Reciprocal(x)` for floats, where the 1 does not broaden x.  Source: ONNX Reciprocal-6."""
    if not _is_float(m, x) or not keeps_dims(m, x, _one, one_over):
        return None
    return g.op("Reciprocal", m[x])


@rule(times_reciprocal)
def divide_instead_of_times_reciprocal(m: Match, g: Builder) -> ir.Value | None:
    """`(1 / x) * y` -> `y / x` where that needs no more divisions: x has the shape of the product.

    Source: ONNX Reciprocal-6, Div-7.
    """
    dims = m.dims(x)
    return (
        g.op("Div", m[y], m[x]) if dims is not None and dims == m.dims(times_reciprocal) else None
    )


@rule(over_reciprocal)
def multiply_instead_of_over_reciprocal(m: Match, g: Builder) -> ir.Value:
    """`y / (1 / x)` -> `y * x`.  Source: ONNX Reciprocal-6, Mul-7."""
    return g.op("Mul", m[y], m[x])


@exact(by_constant)
def multiply_by_inverse_power_of_two(m: Match, g: Builder) -> ir.Value | None:
    """`x / c` -> `x * (1/c)` where every element of c is a power of two whose inverse is a normal number; floats.

    Source: ONNX Div-7; IEEE 754: both are then the correctly rounded quotient.
    """
    tensor = values.constant(m[c])
    if tensor is None or not _is_float(m, c) or values.constant(m[x]) is not None:
        return None
    number = values.fill(m[c])
    if number is None or number == 0 or math.frexp(abs(number))[0] != 0.5:
        return None
    limits = ml_dtypes.finfo(tensor.dtype.numpy())  # type: ignore[no-untyped-call]
    if not float(limits.tiny) <= abs(1 / number) <= float(limits.max):
        return None
    refuse_tied(m[c])
    return g.op(
        "Mul", m[x], g.const(np.full(tensor.shape.numpy(), 1 / number, tensor.dtype.numpy()))
    )


# --- choices

_not = Op("Not", cond, shared=True)
where_not = Op("Where", _not, x, y)
_comparison = Op("Less|Greater|LessOrEqual|GreaterOrEqual", x, y)
not_comparison = Op("Not", _comparison)
with_itself = Op("Equal|LessOrEqual|GreaterOrEqual|Less|Greater", x, x)

_OPPOSITE = {
    "Less": "GreaterOrEqual",
    "Greater": "LessOrEqual",
    "LessOrEqual": "Greater",
    "GreaterOrEqual": "Less",
}
_SMALL = 4096  # elements: a constant answer larger than this is not worth its bytes


@rule(where_not)
def swap_branches_of_where_not(m: Match, g: Builder) -> ir.Value:
    """`Where(not c, x, y)` -> `Where(c, y, x)`.

    Not called exact: the kernel of ONNX Runtime 1.31 adds up both choices, so that the sign of a zero may depend on
    the order.  Source: ONNX Where-9.
    """
    return g.op("Where", m[cond], m[y], m[x])


@exact(not_comparison, opset=(16, 10_000))
def compare_the_other_way(m: Match, g: Builder) -> ir.Value | None:
    """`not (x < y)` -> `x >= y` and so on, for integers: NaN compares neither way.

    Source: ONNX Less-13, GreaterOrEqual-16.
    """
    if m.dtype(x) not in (ir.DataType.INT32, ir.DataType.INT64):
        return None
    return g.op(_OPPOSITE[m[_comparison].op_type], m[x], m[y])


@exact(with_itself)
def compare_with_itself(m: Match, g: Builder) -> ir.Value | None:
    """`x == x`, `x <= x`, `x < x` … -> a constant, for integers of small static shape (NaN differs from itself).

    Source: ONNX Equal-7, Less-9, LessOrEqual-12.
    """
    dtype, dims = m.dtype(x), m.dims(x)
    if dtype is None or not dtype.is_integer() or dims is None:
        return None
    if not all(d.is_static for d in dims) or math.prod(map(int, dims)) > _SMALL:
        return None
    truth = m[with_itself].op_type not in ("Less", "Greater")
    return g.op("Constant", value=ir.tensor(np.full(tuple(map(int, dims)), truth)))


# --- zero bias

biased_gemm = Op("Gemm", x, w, bias)


@rule(biased_gemm, opset=(11, 10_000))
def drop_zero_addend_of_gemm(m: Match, g: Builder) -> ir.Value | None:
    """`Gemm(A, B, 0)` -> `Gemm(A, B)`.  Differs in the sign of a zero result only.  Source: ONNX Gemm-11."""
    return g.op("Gemm", m[x], m[w], like=m[biased_gemm]) if values.fill(m[bias]) == 0 else None


RULES = (
    drop_neutral_operand,
    drop_neutral_right_operand,
    drop_zero_addend,
    drop_negative_zero_subtrahend,
    spell_sum_of_two_as_add,
    join_factors,
    join_addends,
    join_minuend,
    drop_double_inverse,
    subtract_negated_addend,
    add_negated_subtrahend,
    negate_instead_of_times_minus_one,
    negate_instead_of_zero_minus,
    swap_negated_difference,
    cancel_two_negatives,
    move_sign_into_constant,
    drop_sign_under_abs,
    drop_second_projection,
    drop_clamp_of_nonnegative,
    spell_one_over_as_reciprocal,
    divide_instead_of_times_reciprocal,
    multiply_instead_of_over_reciprocal,
    multiply_by_inverse_power_of_two,
    swap_branches_of_where_not,
    compare_the_other_way,
    compare_with_itself,
    drop_zero_addend_of_gemm,
)
