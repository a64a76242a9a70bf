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

from graphopt.ir import operators, values
from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context
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

RULE = "fold-factor"
_FACTORS = (("alpha", 1), ("beta", 2))
_FACTOR_ERROR = {ir.DataType.FLOAT16: 2.0**-11, ir.DataType.BFLOAT16: 2.0**-8}
"""Half of a unit in the last place: more is lost only outside the normal range."""

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


def fold_factors(model: ir.Model, half: ir.DataType, ctx: Context) -> None:
    """Multiplies factors of Gemm into its constants where a half does not hold them: kernels take them as halves.

    Before:  y = Gemm<alpha=1e7>(x, w, b)
    After:   y = Gemm(x, 1e7 w, b)
    """
    for scope in all_graphs(model):
        for node in scope.graph:
            for name, place in _FACTORS:
                value = node.inputs[place] if place < len(node.inputs) else None
                if value is None or unheld_factor(node, half) != name:
                    continue
                if values.is_constant(value) and ctx.permit(RULE, node, Numerics.REORDERED):
                    wide = np.asarray(_array(value), np.float64) * node.attributes[name].as_float()
                    node.replace_input_with(place, _constant(scope.graph, wide, value, ctx))
                    del node.attributes[name]


def unheld_factor(node: ir.Node, half: ir.DataType) -> str:
    """The attribute of a Gemm that a half does not hold: `alpha`, `beta` or ""."""
    if node.domain or node.op_type != "Gemm":
        return ""
    for name, _ in _FACTORS:
        factor = np.float32(operators.attribute(node, name, 1.0))
        with np.errstate(over="ignore"):
            error = abs(float(factor.astype(half.numpy())) - float(factor))
        if error > _FACTOR_ERROR[half] * abs(float(factor)):
            return name
    return ""


def _constant(graph: ir.Graph, array: Array, like: ir.Value, ctx: Context) -> ir.Value:
    tensor = ir.Tensor(array.astype(np.float32))
    value = ir.Value(
        name=ctx.names.fresh(f"{like.name}_times"),
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
