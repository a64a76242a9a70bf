"""Reads what the elements of an attention mask can be: whether a whole row may be masked, and by what.

Such rows can be told apart, for targets whose operator is not known to make zeros of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, is_cut_to, maximum
from graphopt.rewrite import Skip

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

VIEWS = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Tile", "Identity"}
)
MAX_DEPTH = 12
MAX_TABLE = 1 << 20
SAFE = 1e30
"""Of a mask in float32: what is beyond may overflow where it is added to something."""

LIFTED = {
    ir.DataType.FLOAT: -(2.0**127),
    ir.DataType.FLOAT16: 0.0,
    ir.DataType.BFLOAT16: 0.0,
}
"""What a row of a mask is lifted to that is lower throughout: the same Softmax, and never the lowest number.

ONNX Runtime takes that one for -infinity.  In float32, any score vanishes beside the number here as it does beside the
lowest, and more than half of that can be reached without rounding.  In half precision scores must not vanish: kernels
that add in float32 keep them beside any number.
"""

NEAR = -8.0
"""A number in half precision that sums with scores are hardly rounded beside."""

SMALL = 1e6
"""A bias that vanishes beside what float32 is lifted to."""

_INTEGERS = {
    ir.DataType.INT8: 2.0**7,
    ir.DataType.UINT8: 2.0**8,
    ir.DataType.INT16: 2.0**15,
    ir.DataType.INT32: 2.0**31,
    ir.DataType.INT64: 2.0**63,
}


@dataclasses.dataclass(frozen=True)
class Reach:
    """What the elements of a value can be.

    Attributes:
        low: no finite element is below.
        masked: whether elements may be -infinity, so that a whole row may be.
        best: every row has an element that is not below; -infinity where that is not known.
    """

    low: float
    masked: bool
    best: float = -math.inf

    @property
    def floor(self) -> float:
        """What the largest element of a row is at least, where it is finite."""
        return max(self.low, self.best)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What hides scores from attention.

    Attributes:
        mask: as the operator takes it; None for none.
        seen: [..., S, 1], which queries see a key, where the others shall be zero and the operator is not trusted to
            make them so; None where it is.
    """

    mask: ir.Value | None
    seen: ir.Value | None = None

    def zeroed(self, g: Builder, whole: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """The result of the operator, zero for queries that see no key, as a guard against NaN would have it."""
        if self.seen is None:
            return whole
        return g.op("Where", self.seen, whole, number_of(g, 0.0, dtype))


def apart(g: Builder, added: ir.Value, dtype: ir.DataType | None) -> Hidden:
    """A mask each of whose rows holds -infinity alone or an ordinary number too: the former are told apart."""
    best = g.op("ReduceMax", _flags_of(g, added, dtype), g.ints([-1]))
    seen = g.op("Greater", best, number_of(g, -math.inf, dtype))
    return Hidden(g.op("Where", seen, added, number_of(g, 0.0, dtype)), seen)


def _flags_of(g: Builder, added: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """A mask, or a smaller one that is -infinity where it is: of `Where(c, -infinity, bias)`, without the bias."""
    node = added.producer()
    if node is None or node.op_type != "Where" or node.domain:
        return added
    for low, other in ((1, 2), (2, 1)):
        bias = reach_of(node.inputs[other])
        if values.fill(node.inputs[low]) != -math.inf or bias is None or bias.masked:
            continue
        if values.scalar(node.inputs[other]) is not None:
            return added
        branches = [number_of(g, -math.inf, dtype), number_of(g, 0.0, dtype)]
        return g.op("Where", node.inputs[0], *(branches if low == 1 else branches[::-1]))
    return added


def narrowed(g: Builder, mask: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """A constant mask in the type that attention is computed in; what is below its range masks.

    Raises:
        Skip: it is computed.
    """
    data = values.array(mask)
    if data is None or dtype is None:
        raise Skip("the mask is computed in another type than the scores", mask)
    with np.errstate(over="ignore"):
        return g.const(data.astype(dtype.numpy()), name="mask")


def number_of(g: Builder, number: float, dtype: ir.DataType | None) -> ir.Value:
    """A number in the type that attention is computed in, which the target's table knew."""
    assert dtype is not None
    return g.const(np.asarray(number, dtype.numpy()))


HARMLESS = Reach(0.0, masked=False)


def reach_of(value: ir.Value | None, depth: int = MAX_DEPTH) -> Reach | None:
    """What a mask or score can be below; None where nothing is known.  Products of computed values count as 0."""
    node = None if value is None else value.producer()
    if value is not None and values.is_constant(value):
        return _reach_of_constant(value)
    if node is None or node.domain or depth == 0:
        return None
    if node.op_type in ("MatMul", "Einsum"):
        return HARMLESS
    if node.op_type in VIEWS:
        inner = reach_of(node.inputs[0], depth - 1)
        return None if inner is None else dataclasses.replace(inner, best=-math.inf)
    if node.op_type in _READERS:
        return _READERS[node.op_type](node, depth - 1)
    if node.op_type == "Gather":
        return _reach_of_rows(values.constant(node.inputs[0]))
    if node.op_type == "Add":
        return _held(node, _sum(*(reach_of(v, depth - 1) for v in node.inputs)))
    if node.op_type == "Cast" and node.outputs[0].dtype in FLOATS:
        return reach_of(node.inputs[0], depth - 1)
    if node.op_type in ("Mul", "Div"):
        return _held(node, _scaled(node, depth - 1))
    return None


def _reach_of_parts(node: ir.Node, depth: int) -> Reach | None:
    """What several values can be one behind the other."""
    return functools.reduce(_either, [reach_of(each, depth) for each in node.inputs])


def _reach_of_fill(node: ir.Node, _depth: int) -> Reach | None:
    """What a tensor of one number is, zero where none is named."""
    held = node.attributes.get("value")
    if held is None:
        return HARMLESS
    number = float("nan") if held.is_ref() else float(held.as_tensor().numpy().reshape(-1)[0])
    return Reach(min(number, 0.0), masked=False) if math.isfinite(number) else None


def _raised(node: ir.Node, depth: int) -> Reach | None:
    """What is at least a number, perhaps more."""
    if len(node.inputs) != 2:
        return None
    for value, floor in (node.inputs, node.inputs[::-1]):
        number = values.scalar(floor)
        inner = None if number is None else reach_of(value, depth)
        if number is not None and number > -math.inf and inner is not None:
            low = float(number)
            least = low if inner.masked else max(inner.low, low)
            return Reach(least, masked=False, best=max(inner.best, low))
    return None


def _held(node: ir.Node, reach: Reach | None) -> Reach | None:
    """What is left of a sum or product in its type: below the lowest number, it is -infinity."""
    dtype = node.outputs[0].dtype
    if reach is None or dtype is None or dtype not in FLOATS or reach.low >= float(dtype.min):
        return reach
    return dataclasses.replace(reach, low=float(dtype.min), masked=True)


def _reach_of_where(node: ir.Node, depth: int) -> Reach | None:
    """Either branch; `Where(bool(z), c, z)` takes z where it is zero alone."""
    test, then, other = node.inputs
    maker = None if test is None else test.producer()
    zero = maker is not None and maker.op_type == "Cast" and maker.inputs[0] is other
    return _either(reach_of(then, depth), HARMLESS if zero else reach_of(other, depth))


_READERS = {
    "Where": _reach_of_where,
    "Max": _raised,
    "Concat": _reach_of_parts,
    "ConstantOfShape": _reach_of_fill,
}


def _reach_of_integers(value: ir.Value | None, factor: float) -> Reach | None:
    """What integers or booleans as numbers are at least, times a negative number; None where that may overflow."""
    limit = _largest(value)
    if limit is None:
        return None
    low = factor * limit
    return Reach(low, masked=False) if low > -SAFE or limit <= 1 else None


def _reach_of_slopes(node: ir.Node) -> Reach | None:
    """What integers as numbers are at least, times a constant for each head, as of ALiBi."""
    for table, integers in (node.inputs, node.inputs[::-1]):
        slopes, limit = values.constant(table), _largest(integers)
        if slopes is None or limit is None or slopes.size > MAX_TABLE or slopes.dtype not in FLOATS:
            continue
        low = -float(np.abs(slopes.numpy().astype(np.float64)).max(initial=0.0)) * limit
        return Reach(low, masked=False) if low > -SAFE else None
    return None


def _largest(value: ir.Value | None, depth: int = MAX_DEPTH) -> float | None:
    """The largest magnitude of integers or booleans that were cast, also of 1 less them; None where it is unknown."""
    node = None if value is None else value.producer()
    if node is None or node.domain or depth == 0 or not node.inputs:
        return None
    source = node.inputs[-1]
    if node.op_type == "Cast" and source is not None:
        held = _largest(source, depth - 1)
        if held is not None or source.dtype is None:
            return held
        return 1.0 if source.dtype == ir.DataType.BOOL else _INTEGERS.get(source.dtype)
    if node.op_type == "Sub" and values.fill(node.inputs[0]) == 1.0:
        held = _largest(source, depth - 1)
        return None if held is None else held if held <= 1 else held + 1
    return _largest(node.inputs[0], depth - 1) if node.op_type in VIEWS else None


def _reach_of_rows(table: ir.TensorProtocol | None) -> Reach | None:
    """What a value can be whose elements are any of a small constant's, as biases of relative positions are."""
    if table is None or table.size > MAX_TABLE or table.dtype not in FLOATS:
        return None
    data = table.numpy().astype(np.float64)
    return (
        Reach(float(np.min(data, initial=0.0)), masked=False) if np.isfinite(data).all() else None
    )


def _reach_of_constant(value: ir.Value) -> Reach | None:
    """A constant with -infinity masks a row only if a whole row of it is so."""
    data = values.array(value)
    if data is None or data.dtype.kind not in "fiV" or data.size == 0:
        return None
    wide = data.astype(np.float64)
    if np.isnan(wide).any() or np.isposinf(wide).any():
        return None
    best = float(np.min(wide.max(axis=-1))) if wide.ndim else float(wide)
    low = float(np.min(wide, initial=0.0, where=np.isfinite(wide)))
    return Reach(low, masked=best == -math.inf, best=best)


def _either(a: Reach | None, b: Reach | None) -> Reach | None:
    if a is None or b is None:
        return None
    return Reach(min(a.low, b.low), a.masked or b.masked)


def _sum(a: Reach | None, b: Reach | None) -> Reach | None:
    if a is None or b is None:
        return None
    if HARMLESS in (a, b):
        return b if a == HARMLESS else a
    return Reach(a.low + b.low, a.masked or b.masked)


def _scaled(node: ir.Node, depth: int) -> Reach | None:
    """A score or mask times a positive number, the scale of attention; or zeros and ones times a negative one."""
    first = 1 if values.scalar(node.inputs[0]) is not None and node.op_type == "Mul" else 0
    number = values.scalar(node.inputs[1 - first])
    if number is not None and -math.inf < number < 0 and node.op_type == "Mul":
        return _reach_of_integers(node.inputs[first], float(number))
    if number is None and node.op_type == "Mul":
        return _reach_of_slopes(node)
    inner = reach_of(node.inputs[first], depth)
    if number is None or inner is None or not 0 < number < math.inf:
        return None
    factor = float(number) if node.op_type == "Mul" else 1 / float(number)
    return Reach(inner.low * factor, inner.masked, inner.best * factor)


def ends_in(shape: Sequence[Dim], rows: Dim, columns: Dim) -> bool:
    """Whether a mask is for scores [..., rows, columns], perhaps out of a table that is cut to their length.

    Also `table[L - S:L, :L]`, as of tokens behind a past: where its columns broadcast, the table is long enough.
    """
    if len(shape) < 2 or not is_cut_to(shape[-1], columns):
        return False
    past = columns - rows
    return is_cut_to(shape[-2], rows) or shape[-2] == maximum((0, shape[-1] - past))


def lowest(dtype: ir.DataType | None) -> float:
    """The lowest finite number of a float type, to which a score can still be added without overflow."""
    if dtype == ir.DataType.FLOAT16:
        return -6e4  # a few scores above -65504
    if dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BFLOAT16):
        return float(dtype.min)
    return 0.0
