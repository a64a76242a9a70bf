"""Integer arithmetic written in floats that hold whole numbers, where the target has no such integers.

    Before:  q = QuantizeLinear(x, s, 121)      y = DequantizeLinear(q, s, 121)        uint8, for TensorRT
    After:   y = (Clip(Round(x / s) + 121, 0, 255) - 121) * s                          float32

Whole numbers up to 2^24 are exact in float32, so that bytes, their products and sums of some hundreds of them stay what
they are.  `symmetrize-quantization` makes integers of such a model that run as integers, with other numbers.
Leaves alone: whatever the target takes.  Source: ONNX QuantizeLinear-21, QLinearConv-10, MatMulInteger-10.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule
from graphopt_passes.refusals import refused

FLOAT = ir.DataType.FLOAT
LIMITS = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
}
"""Integers whose every value float32 holds, with their bounds."""

COPIES = "Transpose|Reshape|Flatten|Squeeze|Unsqueeze|MaxPool|Slice|Gather|Expand|Identity|Concat"
CENTRE = 128
OPSETS = (10, 10_000)
"""Of QuantizeLinear."""

x, w, s, t, z, zw, c, o, oz = (Var() for _ in range(9))
zero = Var(optional=True)
centre = Var(const=True)

quantize = Op("QuantizeLinear", x, s, zero)
dequantize = Op("DequantizeLinear", x, s, zero)
centred = Op(
    "DequantizeLinear", Op("QuantizeLinear", x, s, centre, shared=True), t, Var(const=True)
)
conv = Op("QLinearConv", x, s, z, w, t, zw, o, oz, ...)
matmul = Op("QLinearMatMul", x, s, z, w, t, zw, o, oz)
conv_integer = Op("ConvInteger", x, w, ...)
matmul_integer = Op("MatMulInteger", x, w, ...)
dynamic = Op("DynamicQuantizeLinear", x)
copy = Op(COPIES, Op("Cast", x, shared=True), ..., shared=True)
widened = Op("Cast", copy)
rounded = Op("Cast", x, shared=True)
returned = Op("Cast", rounded)


def _axis(m: Match, root: Op) -> int:
    axis = m.attr(root, "axis", 1)
    return int(axis)


def along(m: Match, g: Builder, value: ir.Value, parameter: ir.Value, axis: int) -> ir.Value:
    """A scale or zero point in the shape that broadcasts along `axis` of `value`, which the graph holds.

    Raises:
        Skip: a rank is unknown, or the parameter is of blocks.
    """
    held, dims = m.dims(parameter), m.dims(value)
    if held is None or len(held) > 1:
        raise Skip("scales or zero points of unknown rank, or in blocks", parameter)
    if not held:
        return parameter
    if held[0].value == 1:
        return g.op("Reshape", parameter, g.ints([]))
    if dims is None:
        raise Skip("unknown rank", value)
    shape = [1] * len(dims)
    shape[axis] = -1
    data = values.array(parameter)
    return (
        g.op("Reshape", parameter, g.ints(shape)) if data is None else g.const(data.reshape(shape))
    )


def point_of(
    m: Match, g: Builder, value: ir.Value, point: ir.Value | None, axis: int
) -> ir.Value | None:
    """A zero point as float32 along `axis` of `value`; None for zero."""
    data = None if point is None else values.array(point)
    if point is None or (data is not None and not np.any(data.astype(np.int64))):
        return None
    if data is None:
        return g.op("Cast", along(m, g, value, point, axis), to=int(FLOAT))
    dims = m.dims(value)
    if data.size > 1 and dims is None:
        raise Skip("unknown rank", value)
    return g.const(_wide(data, len(dims or ()), axis))


def whole(m: Match, g: Builder, value: ir.Value, point: ir.Value | None, axis: int) -> ir.Value:
    """The value less its zero point, in float32: exact."""
    data = values.array(value)
    points = None if point is None else values.array(point)
    if data is not None and (point is None or points is not None):
        wide = data.astype(np.float32)
        return g.const(wide if points is None else wide - _wide(points, wide.ndim, axis))
    wide_value = g.op("Cast", value, to=int(FLOAT))
    less = point_of(m, g, value, point, axis)
    return wide_value if less is None else g.op("Sub", wide_value, less)


def _wide(numbers: npt.NDArray[np.generic], rank: int, axis: int) -> npt.NDArray[np.float32]:
    """Parameters in the shape that broadcasts along their axis."""
    if numbers.size == 1 or rank == 0:
        return numbers.reshape(-1)[:1].reshape(()).astype(np.float32)
    if numbers.ndim != 1:
        raise Skip("scales or zero points in blocks")
    shape = [1] * rank
    shape[axis] = -1
    return numbers.reshape(shape).astype(np.float32)


def clipped(g: Builder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Whole numbers within the bounds of `dtype`, as that type."""
    low, high = (g.const(np.float32(limit)) for limit in LIMITS[dtype])
    return g.op("Cast", g.op("Clip", value, low, high), to=int(dtype))


def rounded_to(g: Builder, steps: ir.Value, point: ir.Value | None, dtype: ir.DataType) -> ir.Value:
    """Cast(Clip(Round(steps) + zero point)); the zero point is of `point_of`."""
    out = g.op("Round", steps)
    return clipped(g, out if point is None else g.op("Add", out, point), dtype)


@exact(centred, benefit=3, opset=(10, 10_000))
def centre_bytes(m: Match, g: Builder) -> ir.Value | None:
    """Q/DQ of uint8 around 128 -> of int8 around 0: the same numbers, bytes less 128.

    Source: TensorRT takes int8 with zero point 0 alone.
    """
    node = m[centred]
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    style = m.facts.target.qdq
    if maker is None or style is None or style.zero_points or not refused(m, centred):
        return None
    if not (_is_centre(maker) and _is_centre(node)):
        return None
    first = g.const(np.zeros(m.array(centre).shape, np.int8))
    bytes_ = g.op("QuantizeLinear", m[x], m[s], first, like=maker)
    return g.op("DequantizeLinear", bytes_, m[t], first, like=node)


def _is_centre(node: ir.Node) -> bool:
    data = values.array(node.inputs[2]) if len(node.inputs) > 2 else None
    return data is not None and data.dtype == np.uint8 and bool(np.all(data == CENTRE))


def _will_be_centred(m: Match, node: ir.Node) -> bool:
    """Whether `centre_bytes` takes every reader of the bytes."""
    style = m.facts.target.qdq
    readers = [use.node for use in node.outputs[0].uses()]
    paired = readers and all(r.op_type == "DequantizeLinear" and _is_centre(r) for r in readers)
    fits = style is not None and not style.zero_points and _is_centre(node)
    return fits and bool(paired) and not node.outputs[0].is_graph_output()


@exact(dequantize, opset=OPSETS)
def write_out_dequantize(m: Match, g: Builder) -> ir.Value | None:
    """DequantizeLinear(q, s, z) -> (q - z) * s in float32; a constant becomes one of floats.

    Source: ONNX DequantizeLinear-21.
    """
    node = m[dequantize]
    if not refused(m, dequantize):
        return None
    dtype, result = m.dtype(x), m.dtype(s)
    if result is None or result not in (FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise Skip("a scale of unknown type", node)
    data, scale = values.array(m[x]), values.array(m[s])
    point = m.get(zero)
    if (
        data is not None
        and scale is not None
        and (point is None or values.array(point) is not None)
    ):
        return g.const(_dequantized(m, data, scale, None if point is None else values.array(point)))
    if dtype not in LIMITS and dtype != ir.DataType.INT32:
        raise Skip(f"{dtype} is computed while the model runs", node)
    if m.attr(dequantize, "block_size", 0):
        raise Skip("blocks of what is computed while the model runs", node)
    axis = _axis(m, dequantize)
    wide = whole(m, g, m[x], point, axis)
    scaled = along(m, g, m[x], m[s], axis)
    if result == FLOAT:
        return g.op("Mul", wide, scaled)
    product = g.op("Mul", wide, g.op("Cast", scaled, to=int(FLOAT)))
    return g.op("Cast", product, to=int(result))


def _dequantized(
    m: Match,
    data: npt.NDArray[np.generic],
    scale: npt.NDArray[np.generic],
    points: npt.NDArray[np.generic] | None,
) -> npt.NDArray[np.generic]:
    """The floats that constant integers stand for, as the runtime computes them."""
    axis, block = _axis(m, dequantize), m.attr(dequantize, "block_size", 0)
    zeros = np.zeros_like(scale, np.float32) if points is None else points.astype(np.float32)
    factors = scale.astype(np.float32)
    if block:
        axis %= data.ndim
        cut = [slice(None)] * data.ndim
        cut[axis] = slice(data.shape[axis])
        zeros, factors = (np.repeat(each, block, axis)[tuple(cut)] for each in (zeros, factors))
    else:
        zeros, factors = (_wide(each, data.ndim, axis) for each in (zeros, factors))
    wide = data.astype(np.int32 if data.dtype != np.int32 else np.int64).astype(np.float32)
    if data.dtype == np.int32 and not np.any(zeros):
        wide = data.astype(np.float32)
    return np.asarray((wide - zeros) * factors).astype(scale.dtype)


@exact(quantize, opset=OPSETS)
def write_out_quantize(m: Match, g: Builder) -> ir.Value | None:
    """QuantizeLinear(x, s, z) -> Cast(Clip(Round(x / s) + z)), in float32.

    Source: ONNX QuantizeLinear-21.
    """
    node = m[quantize]
    if not refused(m, quantize) or _will_be_centred(m, node):
        return None
    dtype = m.dtype(node.outputs[0])
    if dtype not in LIMITS or m.attr(quantize, "block_size", 0) or m.opset() < 11:
        raise Skip(f"{dtype}, blocks, or an opset without Round", node)
    axis = _axis(m, quantize)
    source = m[x] if m.dtype(x) == FLOAT else g.op("Cast", m[x], to=int(FLOAT))
    scale = along(m, g, m[x], m[s], axis)
    if m.dtype(s) != FLOAT:
        scale = g.op("Cast", scale, to=int(FLOAT))
    point = point_of(m, g, m[x], m.get(zero), axis)
    return rounded_to(g, g.op("Div", source, scale), point, dtype)


@exact(widened, benefit=2)
def cast_before_moving(m: Match, g: Builder) -> ir.Value | None:
    """Cast<to = float>(Transpose(Cast<to = uint8>(x))) -> Transpose(Cast<to = float>(Cast<to = uint8>(x))).

    Where the target cannot move bytes.  Source: conversions and moves commute.
    """
    mover = m[copy]
    if m.dtype(mover.outputs[0]) not in LIMITS or not refused(m, copy):
        return None
    to = m.attr(widened, "to")
    if mover.op_type == "MaxPool" and to != int(FLOAT):
        return None
    moved = [mover.inputs[0]] if mover.op_type != "Concat" else list(mover.inputs)
    given = [g.op("Cast", value, to=to) for value in moved if value is not None]
    return g.op(mover.op_type, *given, *mover.inputs[len(moved) :], like=mover)


@exact(returned, benefit=2)
def keep_whole_numbers(m: Match, g: Builder) -> ir.Value | None:
    """Cast<to = float>(Cast<to = uint8>(v)) -> v, where v is whole and within the bounds.

    Source: `clipped` makes such values: Clip(Round(…) + z, low, high).
    """
    del g
    dtype = m.dtype(m[rounded].outputs[0])
    same = m.dtype(x) == m.dtype(m[returned].outputs[0]) == FLOAT
    if not same or dtype not in LIMITS or not _is_within(m[x], dtype):
        return None
    return m[x]


def _is_within(value: ir.Value, dtype: ir.DataType) -> bool:
    low, high = LIMITS[dtype]
    clip = value.producer()
    if clip is None or clip.op_type != "Clip" or len(clip.inputs) != 3:
        return False
    lower, upper = values.scalar(clip.inputs[1]), values.scalar(clip.inputs[2])
    if lower is None or upper is None or not low <= lower <= upper <= high:
        return False
    return float(lower).is_integer() and float(upper).is_integer() and _is_whole(clip.inputs[0])


def _is_whole(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        number = values.array(node.inputs[1])
        if number is not None:
            return bool(np.all(number == np.rint(number))) and _is_whole(node.inputs[0])
        other = node.inputs[1].producer() if node.inputs[1] is not None else None
        return (
            other is not None and other.op_type in ("Cast", "Reshape") and _is_whole(node.inputs[0])
        )
    return node is not None and node.op_type == "Round"


@exact(conv, opset=OPSETS)
def write_out_qlinear_conv(m: Match, g: Builder) -> ir.Value | None:
    """QLinearConv -> Cast(Clip(Round(Conv(x - zx, w - zw, b) * (sx sw / sy)) + zy)), in whole floats.

    Source: ONNX QLinearConv-10; the runtime multiplies the sum of 32 bits by one scale.
    """
    node = m[conv]
    if not refused(m, conv):
        return None
    if _is_native(m, w):
        return _paired(m, g, conv, "Conv", 0)
    bias = node.inputs[8] if len(node.inputs) > 8 else None
    given = None if bias is None else g.op("Cast", bias, to=int(FLOAT))
    total = g.op("Conv", whole(m, g, m[x], m[z], 1), whole(m, g, m[w], m[zw], 0), given, like=node)
    return _requantized(m, g, total, conv, 1)


@exact(matmul, opset=OPSETS)
def write_out_qlinear_matmul(m: Match, g: Builder) -> ir.Value | None:
    """QLinearMatMul -> Cast(Clip(Round(MatMul(a - za, b - zb) * (sa sb / sy)) + zy)), in whole floats.

    Source: ONNX QLinearMatMul-21.
    """
    if not refused(m, matmul):
        return None
    if _is_native(m, w):
        return _paired(m, g, matmul, "MatMul", -1)
    rank = len(m.known_dims(w))
    _refuse_rows(m, z, s)
    total = g.op("MatMul", whole(m, g, m[x], m[z], 0), whole(m, g, m[w], m[zw], rank - 1))
    return _requantized(m, g, total, matmul, -1)


def _refuse_rows(m: Match, *parameters: Var) -> None:
    for each in parameters:
        dims = m.known_dims(each)
        if dims and dims[0].value != 1:
            raise Skip("one scale a row", m[each])


def _is_native(m: Match, weights: Var) -> bool:
    """Whether pairs around a float operator are in the style of the target: int8, zero points 0, constant weights."""
    style = m.facts.target.qdq
    if style is None or style.zero_points or values.array(m[weights]) is None or m.opset() < 13:
        return False
    points = [values.array(m[each]) for each in (z, zw, oz)]
    return all(p is not None and p.dtype == np.int8 and not p.any() for p in points)


def _paired(m: Match, g: Builder, root: Op, op_type: str, axis: int) -> ir.Value:
    """QuantizeLinear(op(DequantizeLinear(x), DequantizeLinear(w))): what explicit quantisation fuses again."""
    node = m[root]
    data = g.op("DequantizeLinear", m[x], m[s], m[z])
    rank = len(m.known_dims(w))
    weights = g.op("DequantizeLinear", m[w], m[t], m[zw], axis=axis % rank)
    bias = node.inputs[8] if op_type == "Conv" and len(node.inputs) > 8 else None
    given = []
    if bias is not None:
        numbers = values.array(bias)
        scales = values.array(m[s]), values.array(m[t])
        if numbers is None or scales[0] is None or scales[1] is None:
            raise Skip("a bias that is no constant", bias)
        product = scales[0].astype(np.float64) * scales[1].astype(np.float64)
        given = [g.const((numbers * product).astype(np.float32))]
    like = node if op_type == "Conv" else None
    out = g.op(op_type, data, weights, *given, like=like)
    return g.op("QuantizeLinear", out, m[o], m[oz])


def _requantized(m: Match, g: Builder, total: ir.Value, root: Op, channel: int) -> ir.Value:
    dtype = m.dtype(oz)
    if dtype not in LIMITS:
        raise Skip(f"an output of {dtype}", m[root])
    if m.opset() < 11:
        raise Skip("an opset without Round", m[root])
    scales = [values.array(m[each]) for each in (s, t, o)]
    if any(each is None for each in scales):
        raise Skip("scales that are computed while the model runs", m[root])
    a, b, c_ = (np.asarray(each, np.float32).reshape(-1) for each in scales)
    factor = np.asarray(a * b / c_, np.float32)
    if factor.size == 1:
        number = factor.reshape(())
    elif channel == 1:
        number = factor.reshape(-1, *[1] * (len(m.known_dims(x)) - 2))
    else:
        number = factor
    point = point_of(m, g, m[x], m[oz], 0)
    return rounded_to(g, g.op("Mul", total, g.const(number)), point, dtype)


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


@exact(conv_integer, opset=OPSETS)
def write_out_conv_integer(m: Match, g: Builder) -> ir.Value | None:
    """ConvInteger(x, w, zx, zw) -> Cast<to = int32>(Conv(x - zx, w - zw)), in whole floats.

    Source: ONNX ConvInteger-10.
    """
    node = m[conv_integer]
    if not refused(m, conv_integer):
        return None
    data = whole(m, g, m[x], _optional(node, 2), 1)
    out = g.op("Conv", data, whole(m, g, m[w], _optional(node, 3), 0), like=node)
    return g.op("Cast", out, to=int(ir.DataType.INT32))


@exact(matmul_integer, opset=OPSETS)
def write_out_matmul_integer(m: Match, g: Builder) -> ir.Value | None:
    """MatMulInteger(a, b, za, zb) -> Cast<to = int32>(MatMul(a - za, b - zb)), in whole floats.

    Source: ONNX MatMulInteger-10.
    """
    node = m[matmul_integer]
    if not refused(m, matmul_integer):
        return None
    point = _optional(node, 2)
    if point is not None:
        dims = m.known_dims(point)
        if dims and dims[0].value != 1:
            raise Skip("one zero point a row", point)
    rank = len(m.known_dims(w))
    data = whole(m, g, m[x], point, 0)
    out = g.op("MatMul", data, whole(m, g, m[w], _optional(node, 3), rank - 1))
    return g.op("Cast", out, to=int(ir.DataType.INT32))


@rule(dynamic, opset=(13, 10_000))
def write_out_dynamic_quantize(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """DynamicQuantizeLinear(x) -> its bytes, scale and zero point, from the least and largest of x and 0.

    Source: ONNX DynamicQuantizeLinear-11.
    """
    if not refused(m, dynamic):
        return None
    nil, top = g.const(np.float32(0)), g.const(np.float32(255))
    high = g.op("Max", g.op("ReduceMax", m[x], keepdims=0), nil)
    low = g.op("Min", g.op("ReduceMin", m[x], keepdims=0), nil)
    scale = g.op("Div", g.op("Sub", high, low), top)
    point = g.op("Round", g.op("Div", g.op("Sub", nil, low), scale))
    point = g.op("Min", g.op("Max", point, nil), top)
    steps = g.op("Add", g.op("Round", g.op("Div", m[x], scale)), point)
    as_byte = g.op("Cast", point, to=int(ir.DataType.UINT8))
    return (clipped(g, steps, ir.DataType.UINT8), scale, as_byte)


RULES: tuple[Rule, ...] = (
    centre_bytes,
    cast_before_moving,
    keep_whole_numbers,
    write_out_dequantize,
    write_out_quantize,
    write_out_qlinear_conv,
    write_out_qlinear_matmul,
    write_out_conv_integer,
    write_out_matmul_integer,
    write_out_dynamic_quantize,
)
