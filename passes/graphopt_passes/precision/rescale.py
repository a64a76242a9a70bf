"""Weights too small or products too large for a half: the weights times a power of two, the product times its inverse.

Before:  y = MatMul(x, w)                                   w near 1e-8, which a half rounds to zero
After:   h = MatMul(Cast<half>(x), half(w * 2^26))          y = Cast<float>(h) * 2^-26
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt_passes.precision.limits import Limits
from graphopt_passes.precision.ranges import Spread, spread_of

Array = np.ndarray[Any, Any]

PRODUCTS: Mapping[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "Gemm": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
}
"""Operators that are linear in a constant, and which inputs of theirs may be constants that are scaled together."""

ROOM = 2.0**-4
"""Of the greatest half: how large the scaled product may be seen."""

STEPS = 14
"""Exponents that are tried."""

_NORMAL = {ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}
"""Smallest normal numbers."""

GREATEST_SHIFT = 100
"""Of the exponent: float32 has to hold the scale and its inverse."""


def scaled_inputs(node: ir.Node) -> tuple[int, ...]:
    """Places of the constants that take the scale: weights, and the bias that is added to the product."""
    if node.domain or node.op_type not in PRODUCTS:
        return ()
    places = [p for p in PRODUCTS[node.op_type] if p < len(node.inputs) and node.inputs[p]]
    if node.op_type == "MatMul":
        return tuple([p for p in places if values.is_constant(node.inputs[p])][-1:])
    if not all(values.is_constant(node.inputs[p]) for p in places):
        return ()
    return tuple(places)


def shift_for(node: ir.Node, made: Spread | None, half: ir.DataType, limits: Limits) -> int | None:
    """The exponent of two by which to scale the constants of a product; None where none helps.

    Args:
        node: the product.
        made: what it was seen to give; None where nobody knows.
        half: the dtype.
        limits: of that dtype.
    """
    places = scaled_inputs(node)
    if not places:
        return None
    arrays = [_array(node.inputs[place]) for place in places]
    largest = float(np.abs(arrays[0]).max(initial=0.0))
    if not 0 < largest < math.inf:
        return None
    reach = largest if made is None else max(made.absmax, largest)
    if not 0 < reach < math.inf:
        return None
    room = math.floor(math.log2(limits.greatest * ROOM / reach))
    if room < 0:
        wanted = [room]
    else:
        # In the middle between what the weights need and what was seen: real inputs may be larger, and smaller.
        least = max(1, math.ceil(math.log2(_NORMAL[half] / largest)))
        middle = (least + room) // 2
        wanted = list(range(middle, min(room, middle + STEPS) + 1)) if least <= room else []
    for shift in wanted:
        if abs(shift) <= GREATEST_SHIFT and _holds(arrays, shift, half, limits):
            return shift
    return None


def _holds(arrays: Sequence[Array], shift: int, half: ir.DataType, limits: Limits) -> bool:
    """Whether constants fit a half when they are scaled."""
    spreads = [spread_of(np.ldexp(array, shift), half)[0] for array in arrays]
    return all(
        each.error <= limits.error / 2 and each.absmax <= limits.greatest for each in spreads
    )


def _array(value: ir.Value | None) -> Array:
    tensor = values.constant(value)
    assert tensor is not None
    return np.asarray(tensor.numpy(), np.float32)
