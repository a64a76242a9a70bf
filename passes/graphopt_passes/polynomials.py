"""Reads arithmetic as a polynomial, so that one comparison catches every spelling of it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values

Polynomial: TypeAlias = tuple[float, ...]
"""Coefficients from the constant term up, without zeros at the end."""

MAX_NODES = 12
MAX_DEGREE = 4

_TOLERANCE = {ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 8e-3}
"""Relative tolerance of coefficients: a few roundings of the type; elsewhere that of six digits, as of 1.41421."""


def read(value: ir.Value, x: ir.Value) -> Polynomial | None:
    """`value` as a polynomial in `x`; None where it is none of small degree.

    Reads Add, Sub, Mul, Div, Neg, Pow and Identity of `x` and of constants that hold one number throughout.  Whether
    such a constant enlarges the shape is for the caller to see, from the shape of the whole.
    """
    return _Reader(x).read(value)


def close(terms: Polynomial, wanted: Polynomial, dtype: ir.DataType | None) -> bool:
    """Whether two polynomials agree up to the rounding of coefficients to `dtype`."""
    tolerance = _TOLERANCE.get(dtype, 4e-6) if dtype is not None else 0.0
    return len(terms) == len(wanted) and all(
        abs(a - b) <= tolerance * abs(b) for a, b in zip(terms, wanted, strict=True)
    )


class _Reader:
    """One reading, bounded in nodes."""

    def __init__(self, x: ir.Value) -> None:
        self._x = x
        self._left = MAX_NODES
        self._seen: dict[ir.Value, Polynomial | None] = {}

    def read(self, value: ir.Value | None) -> Polynomial | None:
        if value is None:
            return None
        if value is self._x:
            return (0.0, 1.0)
        if value in self._seen:
            return self._seen[value]
        number = values.fill(value)
        if number is not None:
            return (number,) if number else ()
        self._seen[value] = found = self._of_node(value)
        return found

    def _of_node(self, value: ir.Value) -> Polynomial | None:
        node = value.producer()
        self._left -= 1
        if node is None or node.domain or self._left < 0:
            return None
        operands = [self.read(v) for v in node.inputs]
        if any(p is None for p in operands):
            return None
        return _combine(node.op_type, [p for p in operands if p is not None])


def _combine(op_type: str, operands: list[Polynomial]) -> Polynomial | None:
    """The polynomial that an operator makes of polynomials, or None."""
    first, second = operands[0], operands[-1]
    number = second[0] if len(second) == 1 else None
    match op_type:
        case "Identity":
            return first
        case "Neg":
            return tuple(-t for t in first)
        case "Add":
            return _plus(first, second)
        case "Sub":
            return _plus(first, tuple(-t for t in second))
        case "Mul":
            return _times(first, second)
        case "Div" if number:
            return _times(first, (1.0 / number,))
        case "Pow" if number in (1.0, 2.0, 3.0):
            result: Polynomial | None = (1.0,)
            for _ in range(int(number or 0)):
                result = None if result is None else _times(result, first)
            return result
        case _:
            return None


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return _trim(np.polynomial.polynomial.polyadd(a or (0.0,), b or (0.0,)))


def _times(a: Polynomial, b: Polynomial) -> Polynomial | None:
    if len(a) + len(b) > MAX_DEGREE + 2:
        return None
    return _trim(np.polynomial.polynomial.polymul(a or (0.0,), b or (0.0,)))


def _trim(terms: npt.NDArray[np.floating[Any]]) -> Polynomial:
    kept = [float(t) for t in terms]
    while kept and kept[-1] == 0:
        kept.pop()
    return tuple(kept)
