"""The elements of small tensors, followed symbolically from shapes to shapes.

Where every input is known, the NumPy kernels compute the output. Operators that only move elements
run the same kernels on arrays of dims. Arithmetic on dims is spelled out here; an element that
cannot be followed is None and becomes a symbol of its own in the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import kernels
from graphopt.ir.shapes.dim import Dim, maximum, minimum, truncdiv
from graphopt.ir.shapes.facts import MAX_ELEMENTS, Array, Element, Ratio
from graphopt.ir.shapes.query import Query, axes_given

Unknown: TypeAlias = Element | None

_MAX_FRACTION = 1024  # denominators up to this, powers of two: products stay exact in float32
_MAX_FACTOR = 1 << 16

_DATA_INPUTS: Mapping[str, tuple[int, ...]] = {
    "ScatterND": (0, 2),
    "ScatterElements": (0, 2),
    "Scatter": (0, 2),
    "Pad": (0, 2),
}


def follow(q: Query) -> list[Array | None] | None:
    """The elements of each output as object arrays (None within: not known), or None for nothing.

    Raises:
        ValueError, IndexError, TypeError, KeyError, OverflowError: the node is malformed.
    """
    if not q.inputs or any(given is not None and given.data is None for given in q.inputs):
        return None
    computed = _computed(q)
    if computed is not None:
        return computed
    moved = _moved(q)
    if moved is not None:
        return moved
    rule = None if q.node.domain else SYMBOLIC.get(q.node.op_type)
    found = None if rule is None else rule(q)
    return None if found is None else [found]


def _computed(q: Query) -> list[Array | None] | None:
    """The outputs of a node all of whose inputs are known numbers."""
    kernel = kernels.kernel(q.node)
    if kernel is None:
        return None
    inputs: list[Array | None] = []
    for given in q.inputs:
        array = None if given is None or given.data is None else given.data.static()
        if given is not None and array is None:
            return None
        inputs.append(array)
    results = kernels.run(kernel, q.operation, inputs)
    if results is None or any(result.size > MAX_ELEMENTS for result in results):
        return None
    return list(results)


def _moved(q: Query) -> list[Array | None] | None:
    """The outputs of a node that only moves elements; what says where to must be known."""
    kernel = kernels.movement(q.node)
    if kernel is None or q.node.op_type == "Where":
        return None
    data_inputs = _DATA_INPUTS.get(q.node.op_type, (0,))
    inputs: list[Array | None] = []
    for index, given in enumerate(q.inputs):
        if given is None or given.data is None:
            inputs.append(None)
            continue
        carries = index in data_inputs or q.node.op_type == "Concat"
        array = given.data.array if carries else given.data.static()
        if array is None:
            return None
        inputs.append(array)
    results = kernels.run(kernel, q.operation, inputs)
    if results is None or any(result.size > MAX_ELEMENTS for result in results):
        return None
    return list(results)


def _array(q: Query, index: int) -> Array:
    """The elements of an input as an object array.

    Raises:
        ValueError: the input is absent.
    """
    data = q.data(index)
    if data is None:
        raise ValueError(f"input {index} is absent")
    return data.array


def _apply(function: Callable[..., Unknown], *arrays: Array) -> Array:
    """A function of elements over broadcast arrays."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)


def _binary(function: Callable[[Any, Any], Unknown]) -> Callable[[Query], Array]:
    """The rule of an operator on two arrays."""
    return lambda q: _apply(function, _array(q, 0), _array(q, 1))


def _unary(function: Callable[[Any], Unknown]) -> Callable[[Query], Array]:
    """The rule of an operator on one array."""
    return lambda q: _apply(function, _array(q, 0))


def _variadic(function: Callable[[Any, Any], Unknown]) -> Callable[[Query], Array]:
    """The rule of an operator on any number of arrays."""

    def infer(q: Query) -> Array:
        arrays = [_array(q, i) for i in range(len(q.inputs))]
        return functools.reduce(lambda a, b: _apply(_strict(function), a, b), arrays)

    return infer


def _strict(function: Callable[[Any, Any], Unknown]) -> Callable[[Any, Any], Unknown]:
    """The function with unknown operands giving an unknown result."""
    return lambda a, b: None if a is None or b is None else function(a, b)


def _ratio(element: Element) -> Ratio | None:
    """A float element as an exact quotient with a denominator that is a power of two, or None."""
    if isinstance(element, Ratio):
        return element if element.by & (element.by - 1) == 0 else None
    if isinstance(element, Dim) or not np.isfinite(element):
        return None
    number, by = element.as_integer_ratio()
    small = by <= _MAX_FRACTION and abs(number) <= _MAX_FACTOR
    return Ratio(Dim.of(number), by) if small else None


def _reduced(number: Dim, by: int) -> Unknown:
    """A quotient in lowest terms that floats hold exactly."""
    while by % 2 == 0 and number % 2 == 0:
        number, by = number // 2, by // 2
    if number.value is not None:
        return number.value / by if by & (by - 1) == 0 else None
    return Ratio(number, by) if by <= _MAX_FRACTION else None


def _arithmetic(
    dims: Callable[[Dim, Dim], Dim | None], ratios: Callable[[Ratio, Ratio], Unknown]
) -> Callable[[Element, Element], Unknown]:
    """An operation on two dims, or on two floats that are exact quotients."""

    def compute(a: Element, b: Element) -> Unknown:
        if isinstance(a, Dim) and isinstance(b, Dim):
            return dims(a, b)
        left, right = _ratio(a), _ratio(b)
        return None if left is None or right is None else ratios(left, right)

    return compute


def _divide_ratios(a: Ratio, b: Ratio) -> Unknown:
    by = b.number.value
    if not by:
        return None
    number, divisor = a.number * b.by, a.by * by
    if divisor < 0:
        number, divisor = -number, -divisor
    if divisor & (divisor - 1) == 0:
        return _reduced(number, divisor)
    # Inexact from here on: only rounding down, up and truncation may follow (see `_ratio`).
    return Ratio(number, divisor) if a.by == 1 and divisor <= _MAX_FRACTION else None


def _modulo(a: Dim, b: Dim) -> Dim | None:
    return a % b if b.lower is not None and b.lower >= 0 else None


def _compare(
    dims: Callable[[Dim, Dim], bool | None],
) -> Callable[[Element, Element], Unknown]:
    """A comparison: 1, 0, or None where the dims do not tell."""

    def compute(a: Element, b: Element) -> Unknown:
        if isinstance(a, Dim) and isinstance(b, Dim):
            known = dims(a, b)
            return None if known is None else Dim.of(int(known))
        return None

    return compute


def _equal(a: Dim, b: Dim) -> bool | None:
    return True if a == b else False if a.differs(b) else None


def _less(a: Dim, b: Dim) -> bool | None:
    return True if b.at_least(a + 1) else False if a.at_least(b) else None


def _floor(element: Element) -> Unknown:
    if isinstance(element, Ratio):
        return Ratio(element.number // element.by, 1)
    return None


def _ceil(element: Element) -> Unknown:
    if isinstance(element, Ratio):
        return Ratio(-((-element.number) // element.by), 1)
    return None


def _round(element: Element) -> Unknown:
    return element if isinstance(element, Ratio) and element.by == 1 else None


def _absolute(element: Element) -> Unknown:
    if isinstance(element, Dim):
        return element if element.at_least(0) else -element if (-element).at_least(0) else None
    if isinstance(element, Ratio) and element.number.at_least(0):
        return element
    return None


def _not(element: Element) -> Unknown:
    return 1 - element if isinstance(element, Dim) else None


def _and(a: Dim, b: Dim) -> Dim | None:
    if a.value == 0 or b.value == 0:
        return Dim.of(0)
    return b if a.value == 1 else a if b.value == 1 or a == b else None


def _or(a: Dim, b: Dim) -> Dim | None:
    if a.value == 1 or b.value == 1:
        return Dim.of(1)
    return b if a.value == 0 else a if b.value == 0 or a == b else None


def _cast(q: Query) -> Array | None:
    to = ir.DataType(q.attr("to", 0))
    given = q.data(0)
    return (
        None if given is None else _apply(lambda e: cast_element(e, given.dtype, to), given.array)
    )


def _cast_like(q: Query) -> Array | None:
    given, to = q.data(0), q.dtype(1)
    if given is None or to is None:
        return None
    return _apply(lambda e: cast_element(e, given.dtype, to), given.array)


def cast_element(element: Element, source: ir.DataType, to: ir.DataType) -> Unknown:
    """An element in another type, or None."""
    floating = to in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    if isinstance(element, Dim):
        if to == ir.DataType.BOOL:
            return Dim.of(0) if element == 0 else Dim.of(1) if element.differs(0) else None
        if floating:
            return Ratio(element, 1) if element.value is None else float(element.value)
        return element
    if floating:
        return element if isinstance(element, Ratio) else None
    if isinstance(element, Ratio) and to != ir.DataType.BOOL and source.is_floating_point():
        return truncdiv(element.number, element.by)
    return None


def _where(q: Query) -> Array:
    return _apply(_choose, _array(q, 0), _array(q, 1), _array(q, 2))


def _choose(condition: Element, a: Element, b: Element) -> Unknown:
    if a == b:
        return a
    if isinstance(condition, Dim) and condition.value is not None:
        return a if condition.value else b
    return None


def _reduce(function: Callable[[Any, Any], Unknown], since: int) -> Callable[[Query], Array | None]:
    """The rule of a reduction; axes become an input at opset `since`."""

    def infer(q: Query) -> Array | None:
        array = _array(q, 0)
        known, axes = axes_given(q, since)
        if not known or not array.size or (not axes and q.attr("noop_with_empty_axes", 0)):
            return None
        gone = tuple(axis % array.ndim for axis in axes) if axes else tuple(range(array.ndim))
        kept = [axis for axis in range(array.ndim) if axis not in gone]
        rows = np.transpose(array, (*kept, *gone)).reshape(
            *(array.shape[axis] for axis in kept), -1
        )
        result = rows[..., 0]
        for column in range(1, rows.shape[-1]):
            result = _apply(_strict(function), result, rows[..., column])
        wrapped = np.asarray(result, dtype=object)
        return np.expand_dims(wrapped, gone) if q.attr("keepdims", 1) else wrapped

    return infer


def _negated(known: bool | None) -> bool | None:
    return None if known is None else not known


_add = _arithmetic(
    lambda a, b: a + b, lambda a, b: _reduced(a.number * b.by + b.number * a.by, a.by * b.by)
)
_subtract = _arithmetic(
    lambda a, b: a - b, lambda a, b: _reduced(a.number * b.by - b.number * a.by, a.by * b.by)
)
_multiply = _arithmetic(lambda a, b: a * b, lambda a, b: _reduced(a.number * b.number, a.by * b.by))
_divide = _arithmetic(lambda a, b: None if b == 0 else truncdiv(a, b), _divide_ratios)
_mod = _arithmetic(_modulo, lambda _a, _b: None)
_max = _arithmetic(
    lambda a, b: maximum((a, b)),
    lambda a, b: _reduced(maximum((a.number * b.by, b.number * a.by)), a.by * b.by),
)
_min = _arithmetic(
    lambda a, b: minimum((a, b)),
    lambda a, b: _reduced(minimum((a.number * b.by, b.number * a.by)), a.by * b.by),
)
_both = _arithmetic(_and, lambda _a, _b: None)
_either = _arithmetic(_or, lambda _a, _b: None)

SYMBOLIC: Mapping[str, Callable[[Query], Array | None]] = {
    "Add": _binary(_add),
    "Sub": _binary(_subtract),
    "Mul": _binary(_multiply),
    "Div": _binary(_divide),
    "Mod": _binary(_mod),
    "Sum": _variadic(_add),
    "Max": _variadic(_max),
    "Min": _variadic(_min),
    "Neg": _unary(lambda e: _subtract(Dim.of(0) if isinstance(e, Dim) else 0.0, e)),
    "Abs": _unary(_absolute),
    "Floor": _unary(_floor),
    "Ceil": _unary(_ceil),
    "Round": _unary(_round),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Where": _where,
    "Not": _unary(_not),
    "And": _binary(_both),
    "Or": _binary(_either),
    "Equal": _binary(_compare(_equal)),
    "Less": _binary(_compare(_less)),
    "Greater": _binary(_compare(lambda a, b: _less(b, a))),
    "LessOrEqual": _binary(_compare(lambda a, b: _negated(_less(b, a)))),
    "GreaterOrEqual": _binary(_compare(lambda a, b: _negated(_less(a, b)))),
    "ReduceSum": _reduce(_add, 13),
    "ReduceProd": _reduce(_multiply, 18),
    "ReduceMax": _reduce(_max, 18),
    "ReduceMin": _reduce(_min, 18),
}
