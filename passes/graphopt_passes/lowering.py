"""Standard operators written in other standard ones where the target refuses them as they are.

    Before:  y = Equal(a, b)          a, b: bool, for TensorRT
    After:   y = Not(Xor(a, b))

Leaves alone: everything that the target takes.  Source: ONNX operator documentation.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact, rule
from graphopt_passes.refusals import refused

MAX_POSITIONS = 1 << 22
"""Of a sampling grid that becomes a constant."""

x, y, k, grid_size = Var(), Var(), Var(), Var(const=True)
scales = Var()
BOOL, FLOAT = ir.DataType.BOOL, ir.DataType.FLOAT

equal = Op("Equal", x, y)
moved = Op(
    "Pad|Transpose|Slice|Concat|Tile|ScatterElements|ScatterND|GatherElements|Where|ReduceMax|ReduceMin|TopK|"
    "ArgMax|ArgMin|Flatten|DepthToSpace|SpaceToDepth|Resize|Upsample|MaxPool|Compress|Expand|Squeeze|Unsqueeze|"
    "Reshape|Gather|GatherND|Split|Trilu|ReverseSequence",
    x,
    ...,
)
top_k = Op("TopK", x, k)
layer_norm = Op("LayerNormalization", x, y, ...)
affine = Op("AffineGrid", x, grid_size)
compress = Op("Compress", x, y)
power_pool = Op("LpPool", x)
resize = Op("Resize", x, Var(optional=True), scales)
det = Op("Det", x)


@exact(equal)
def write_equal_of_booleans(m: Match, g: Builder) -> ir.Value | None:
    """Equal(a, b) -> Not(Xor(a, b)), of booleans.

    Source: ONNX Equal-1 takes bool; TensorRT's does not.
    """
    if m.dtype(x) != BOOL or not refused(m, equal):
        return None
    return g.op("Not", g.op("Xor", m[x], m[y]))


_FLOATS_ONLY = frozenset({"MaxPool", "Resize", "Upsample"})
_WIDER = {
    BOOL: ir.DataType.INT32,
    ir.DataType.UINT8: ir.DataType.INT32,
    ir.DataType.INT8: ir.DataType.INT32,
}
_CARRIED = {"Where": (1, 2), "ScatterElements": (0, 2), "ScatterND": (0, 2), "Pad": (0, 2)}
"""Which operands hold the elements that are moved; the first alone, or all for Concat, elsewhere."""


@exact(moved)
def move_wider_elements(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """Pad(x) -> Cast<to = bool>(Pad(Cast<to = int32>(x))): what only moves elements, in a type that the target moves.

    Source: the conversions are exact both ways, and the operators compute nothing.
    """
    node = m[moved]
    dtype = m.dtype(m[x] if node.op_type != "Where" else node.inputs[1] or m[x])
    if dtype not in _WIDER or not refused(m, moved):
        return None
    if node.op_type in ("Resize", "Upsample") and m.attr(node, "mode", "nearest") != "nearest":
        raise Skip("numbers between bytes are computed", node)
    wide = FLOAT if node.op_type in _FLOATS_ONLY else _WIDER[dtype]
    carried = _CARRIED.get(
        node.op_type, tuple(range(len(node.inputs))) if node.op_type == "Concat" else (0,)
    )
    given = [
        g.op("Cast", value, to=int(wide)) if value is not None and index in carried else value
        for index, value in enumerate(node.inputs)
    ]
    outs = g.ops(node.op_type, *given, outputs=len(node.outputs), like=node)
    same = node.op_type in ("ArgMax", "ArgMin")
    return tuple(
        out if same or old.dtype != dtype else g.op("Cast", out, to=int(dtype))
        for out, old in zip(outs, node.outputs, strict=True)
    )


@exact(top_k)
def sort_top_k(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """TopK<sorted = 0>(x, k) -> TopK(x, k): any order was allowed, the sorted one is an order.

    Source: ONNX TopK-11.
    """
    if m.attr(top_k, "sorted", 1) or not refused(m, top_k):
        return None
    return tuple(g.ops("TopK", m[x], m[k], outputs=2, like=m[top_k], sorted=None))


@rule(affine)
def write_affine_grid(m: Match, g: Builder) -> ir.Value | None:
    """AffineGrid(theta, size) -> Reshape(MatMul(base, Transpose(theta))), base: the positions, a constant.

    theta: [N, 2, 3] or [N, 3, 4]; size: (N, C, H, W) or (N, C, D, H, W), constant.
    Source: ONNX AffineGrid-20.
    """
    node = m[affine]
    if not refused(m, affine):
        return None
    spatial = m.ints(grid_size)[2:]
    dtype = m.dtype(x)
    if dtype is None or np.prod(spatial, dtype=np.int64) > MAX_POSITIONS:
        raise Skip("an unknown type, or a grid too large for a constant", node)
    aligned = m.attr(affine, "align_corners", 0)
    if aligned and 1 in spatial:
        raise Skip("corners of a single position, which runtimes put at different places", node)
    lines = [_positions(size, bool(aligned)) for size in spatial]
    mesh = np.meshgrid(*lines, indexing="ij")[::-1]  # x first, then y, then z
    base = np.stack([*(each.reshape(-1) for each in mesh), np.ones(mesh[0].size)], axis=-1)
    product = g.op(
        "MatMul",
        g.const(base.astype(dtype.numpy())),
        g.op("Transpose", m[x], perm=[0, 2, 1]),
    )
    return g.op("Reshape", product, g.ints([-1, *spatial, len(spatial)]))


def _positions(size: int, aligned: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Where samples lie along one dimension, from -1 to 1."""
    if aligned:
        return np.linspace(-1.0, 1.0, size)
    return (2 * np.arange(size) + 1) / size - 1


@exact(layer_norm)
def drop_statistics(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """LayerNormalization with outputs that nobody reads -> with one output.

    Source: ONNX LayerNormalization-17: mean and inverse deviation are optional.
    """
    node = m[layer_norm]
    extra = node.outputs[1:]
    if not extra or any(v.uses() or v.is_graph_output() for v in extra):
        return None
    out = g.op("LayerNormalization", *node.inputs, like=node)
    return (out, *(None for _ in extra))


@exact(compress, opset=(9, 10_000))
def gather_what_is_kept(m: Match, g: Builder) -> ir.Value | None:
    """Compress(x, c) -> Gather(x, where c holds), for targets with NonZero.

    Source: ONNX Compress-11: without axis x is flattened; c may be shorter than the axis.
    """
    if not refused(m, compress):
        return None
    axis = m.attr(compress, "axis")
    data = m[x] if axis is not None else g.op("Reshape", m[x], g.ints([-1]))
    kept = g.op("Cast", m[y], to=int(FLOAT))  # parsers count numbers, not truth values
    found = g.op("Reshape", g.op("NonZero", kept), g.ints([-1]))
    return g.op("Gather", data, found, axis=0 if axis is None else axis)


@rule(power_pool, opset=(7, 10_000))
def write_power_pool(m: Match, g: Builder) -> ir.Value | None:
    """LpPool(x) -> (AveragePool(|x|^p) * n)^(1/p), n: the size of the window.

    Source: ONNX LpPool-18.
    """
    node = m[power_pool]
    if not refused(m, power_pool):
        return None
    if any(d != 1 for d in m.attr(power_pool, "dilations", ())) or m.attr(
        power_pool, "ceil_mode", 0
    ):
        raise Skip("dilations, or a size that is rounded up", node)
    dtype = m.dtype(x)
    if dtype is None:
        raise Skip("unknown element type", m[x])
    power = m.attr(power_pool, "p", 2)
    size = math.prod(m.attr(power_pool, "kernel_shape"))

    def number(value: float) -> ir.Value:
        return g.const(np.asarray(value, np.float64).astype(dtype.numpy()))

    raised = g.op("Pow", g.op("Abs", m[x]), number(power))
    mean = g.op(
        "AveragePool",
        raised,
        like=node,
        p=None,
        dilations=None,
        ceil_mode=None,
        count_include_pad=1,
    )
    total = g.op("Mul", mean, number(size))
    return g.op("Pow", total, number(1 / power))


@exact(resize, opset=(11, 10_000))
def resize_to_sizes(m: Match, g: Builder) -> ir.Value | None:
    """Resize(x, scales = sizes / Shape(x)) -> Resize(x, sizes): the sizes that the scales were computed from.

    Source: ONNX Resize-11: output = floor(input * scale).  PyTorch's exporter writes such quotients for sizes that
    depend on inputs.
    """
    if not refused(m, resize):
        return None
    sizes = _sizes(m, g, m[resize])
    return None if sizes is None else _resized(m, g, sizes)


def _resized(m: Match, g: Builder, sizes: ir.Value) -> ir.Value:
    node = m[resize]
    region = node.inputs[1] if len(node.inputs) > 1 else None
    return g.op("Resize", m[x], region, None, sizes, like=node)


def _sizes(m: Match, g: Builder, node: ir.Node) -> ir.Value | None:
    """The sizes, [rank], whose quotients by the dimensions of x the scales are; None where they are something else."""
    dims = m.dims(x)
    maker = m[scales].producer()
    if dims is None or maker is None:
        return None
    parts = list(maker.inputs) if maker.op_type == "Concat" else [m[scales]]
    found: list[ir.Value] = []
    place = 0
    for part in parts:
        length = None if part is None else m.dims(part)
        if part is None or length is None or len(length) != 1 or length[0].value is None:
            return None
        count = int(length[0].value)
        size = _size_of(m, g, part, place, count)
        if size is None:
            raise Skip(
                "the scales are computed while the model runs, and are no quotient of sizes", node
            )
        found.append(size)
        place += count
    if place != len(dims):
        return None
    return found[0] if len(found) == 1 else g.op("Concat", *found, axis=0)


def _size_of(m: Match, g: Builder, part: ir.Value, place: int, count: int) -> ir.Value | None:
    """Sizes of the dimensions from `place` on: those of x where the scale is 1, the dividend of a quotient else."""
    if values.fill(part) == 1.0:
        ends = (g.ints([place]), g.ints([place + count]))
        return g.op("Slice", g.op("Shape", m[x]), *ends, g.ints([0]))
    node = part.producer()
    if node is None or node.op_type != "Div" or node.domain:
        return None
    above, below = (_whole(value) for value in node.inputs[:2])
    if above is None or below is None:
        return None
    divisor = m.data(below)
    dims = m.known_dims(x)[place : place + count]
    if divisor is None or len(divisor.elements) != count:
        return None
    if any(a != b for a, b in zip(divisor.elements, dims, strict=True)):
        return None
    if above.dtype == ir.DataType.INT64:
        return above
    return g.op("Cast", above, to=int(ir.DataType.INT64))


def _whole(value: ir.Value | None) -> ir.Value | None:
    """The integers that a value is a Cast of."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Cast" or node.domain:
        return None
    source = node.inputs[0]
    return (
        source
        if source is not None and source.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        else None
    )


@rule(det)
def write_small_determinant(m: Match, g: Builder) -> ir.Value | None:
    """Det(x) -> the sum over the first row, of matrices of 2 and 3 rows.

    Source: ONNX Det-11; expansion by minors.
    """
    if not refused(m, det):
        return None
    rows = m.known_dims(x)[-1].value
    if rows not in (2, 3) or m.opset() < 10:
        raise Skip(f"a determinant of {rows} rows", m[det])

    def at(i: int, j: int) -> ir.Value:
        line = g.op("Gather", m[x], g.const(np.asarray(i, np.int64)), axis=-2)
        return g.op("Gather", line, g.const(np.asarray(j, np.int64)), axis=-1)

    def minor(columns: tuple[int, int], first: int) -> ir.Value:
        a, b = columns
        down = g.op("Mul", at(first, a), at(first + 1, b))
        return g.op("Sub", down, g.op("Mul", at(first, b), at(first + 1, a)))

    if rows == 2:
        return minor((0, 1), 0)
    total = g.op("Mul", at(0, 0), minor((1, 2), 1))
    total = g.op("Sub", total, g.op("Mul", at(0, 1), minor((0, 2), 1)))
    return g.op("Add", total, g.op("Mul", at(0, 2), minor((0, 1), 1)))


RULES: tuple[Rule, ...] = (
    write_equal_of_booleans,
    sort_top_k,
    move_wider_elements,
    drop_statistics,
    write_affine_grid,
    write_power_pool,
    gather_what_is_kept,
    resize_to_sizes,
    write_small_determinant,
)
