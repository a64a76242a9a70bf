"""Where the numbers of an input may lie and where they usually do, read from the operators that consume them.

N(0, 1) makes half of a square root NaN, meets five of the 256 codes of a quantiser, and never reaches the threshold of
a comparison with 50: what is wrong behind such an operator would not show.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.verify.roles import SIZE_SINKS, Follower

if TYPE_CHECKING:
    from collections.abc import Iterator

    from graphopt.verify.roles import Trail

Array: TypeAlias = "np.ndarray[Any, Any]"
_Span: TypeAlias = "tuple[float, float]"

PIXELS = (0.0, 255.0)
_SMALL_FACTOR = 1 / 64  # an input times less than this is in units of hundreds: pixels
_LARGE_MEAN = 16.0  # an input less this is not around zero
_MAX_READ = 1 << 12  # elements of a constant that are read to see what it does to an input

_LEGAL: dict[tuple[str, int], _Span] = {
    ("Acos", 0): (-1, 1),
    ("Acosh", 0): (1, math.inf),
    ("Asin", 0): (-1, 1),
    ("Atanh", 0): (-1, 1),
    ("GridSample", 1): (-1, 1),
    ("Log", 0): (0, math.inf),
    ("Pow", 1): (-3, 3),
    ("Sqrt", 0): (0, math.inf),
}


@dataclasses.dataclass(frozen=True)
class Domain:
    """What consumers say of the numbers of one input.

    Attributes:
        low, high: outside, some consumer has no number to give.
        usual: where a consumer expects them: codes of a quantiser, pixels, both sides of a clip; None where none says.
    """

    low: float = -math.inf
    high: float = math.inf
    usual: _Span | None = None

    @property
    def limited(self) -> bool:
        """Whether some numbers make no sense."""
        return self.low > -math.inf or self.high < math.inf

    def place(self, normal: Array, scale: float) -> Array:
        """Numbers of the domain made of N(0, 1): unchanged where it has no ends, else from the ends inwards."""
        if self.low > -math.inf and self.high < math.inf:
            middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
            return middle + half * np.clip(normal / 3 * min(scale, 1.0), -1, 1)
        if self.low > -math.inf:
            return self.low + np.abs(normal) * scale
        return self.high - np.abs(normal) * scale if self.high < math.inf else normal * scale


def input_domains(model: ir.Model) -> dict[str, Domain]:
    """The domain of every input of the main graph, by name."""
    follower = Follower(model)
    return {value.name or "": _domain(value, follower) for value in model.graph.inputs}


def decides_sizes(model: ir.Model) -> frozenset[str]:
    """Inputs from which a size, a count or an index may follow: numbers of any magnitude would exhaust the memory."""
    return frozenset(value.name or "" for value in model.graph.inputs if _decides(value))


def _decides(source: ir.Value) -> bool:
    queue, seen = [source], {source}
    for value in queue:
        for node, index in value.uses():
            key = (node.op_type, index)
            opaque = operators.has_subgraph(node) or bool(node.domain)
            if key in SIZE_SINKS or opaque or len(queue) > 1 << 14:
                return True
            if node.op_type in {"Shape", "Size"}:
                continue
            queue += [out for out in node.outputs if out not in seen]
            seen.update(node.outputs)
    return False


def _domain(source: ir.Value, follower: Follower) -> Domain:
    low, high = -math.inf, math.inf
    usual: _Span | None = None
    for trail, node, index in follower.consumers(source):
        if trail.scale == 0 or node.domain not in ("", operators.MICROSOFT):
            continue
        if not trail.guarded and (span := _legal(node, index)) is not None:
            one, other = _inverse(trail, span)
            low, high = max(low, one), min(high, other)
        if usual is None and (found := _usual(trail, node, index)) is not None:
            usual = found
    return Domain(low, high, usual) if low < high else Domain(usual=usual)


def _legal(node: ir.Node, index: int) -> _Span | None:
    """What an operator can take at an input."""
    if (node.op_type, index) == ("Pow", 0):
        power = values.scalar(node.inputs[1])
        return None if power is None or float(power).is_integer() else (0.0, math.inf)
    return _LEGAL.get((node.op_type, index))


def _inverse(trail: Trail, span: _Span) -> _Span:
    """The numbers of the input for which scale * input + offset lies in a span."""
    ends = sorted((end - trail.offset) / trail.scale for end in span)
    return ends[0], ends[1]


def _usual(trail: Trail, node: ir.Node, index: int) -> _Span | None:
    """Where an operator expects the numbers of the input."""
    if node.op_type == "QuantizeLinear" and index == 0:
        span = _codes(node)
    elif node.op_type == "Clip" and index == 0:
        span = _clipped(node)
    elif trail.scale == 1 and trail.offset == 0 and _is_for_pixels(node, index):
        return PIXELS
    else:
        return None
    return None if span is None else _inverse(trail, span)


def _codes(node: ir.Node) -> _Span | None:
    """What the codes of a quantiser with constant scale cover."""
    scale = values.scalar(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = values.constant(zero)
    if scale is None or (zero is not None and tensor is None):
        return None
    dtype = ir.DataType.UINT8 if tensor is None else tensor.dtype
    offset = 0 if tensor is None else values.tensor_scalar(tensor)
    if offset is None or not dtype.is_integer():
        return None
    low = -(1 << (dtype.bitwidth - 1)) if dtype.is_signed() else 0
    return (low - offset) * float(scale), (low + (1 << dtype.bitwidth) - 1 - offset) * float(scale)


def _clipped(node: ir.Node) -> _Span | None:
    """Both limits of a Clip and a quarter beyond them."""
    low, high = (
        values.scalar(node.inputs[i])
        if len(node.inputs) > i
        else operators.attribute(node, name, None)
        for i, name in ((1, "min"), (2, "max"))
    )
    if low is None or high is None or not -1e6 < low < high < 1e6:
        return None
    beyond = (high - low) / 4
    return low - beyond, high + beyond


def _is_for_pixels(node: ir.Node, index: int) -> bool:
    """Whether what a node does to an input brings 0 … 255 to around one: division, a factor, a mean."""
    if node.op_type == "Cast":
        return operators.attribute(node, "to", 0) == ir.DataType.UINT8
    if node.op_type not in {"Add", "Div", "Mul", "Sub"} or len(node.inputs) != 2:
        return False
    other = list(_magnitudes(node.inputs[1 - index]))
    if not other:
        return False
    if node.op_type == "Mul":
        return 0 < max(other) <= _SMALL_FACTOR
    if node.op_type == "Div":
        return index == 0 and min(other) >= 1 / _SMALL_FACTOR
    return index == 0 and min(other) >= _LARGE_MEAN


def _magnitudes(value: ir.Value | None) -> Iterator[float]:
    tensor = values.constant(value)
    if tensor is not None and tensor.dtype.is_floating_point() and 0 < tensor.size <= _MAX_READ:
        array = np.abs(np.asarray(tensor.numpy(), np.float64))
        yield float(array.min())
        yield float(array.max())
