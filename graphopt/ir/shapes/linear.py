"""Shapes of matrix products, convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim, DimLike, ceildiv, minimum, truncdiv
from graphopt.ir.shapes.elementwise import broadcast_dims
from graphopt.ir.shapes.facts import Dims, Facts
from graphopt.ir.shapes.query import Query, Rules

_INT32 = ir.DataType.INT32


def matmul_dims(a: Dims | None, b: Dims | None) -> Dims | None:
    """The dimensions of the NumPy-style product of two tensors, or None."""
    if not a or not b:
        return None
    left = a if len(a) > 1 else (Dim.of(1), *a)
    right = b if len(b) > 1 else (*b, Dim.of(1))
    batch = broadcast_dims((left[:-2], right[:-2]))
    if batch is None:
        return None
    rows = left[-2:-1] if len(a) > 1 else ()
    columns = right[-1:] if len(b) > 1 else ()
    return (*batch, *rows, *columns)


def _matmul(q: Query) -> Sequence[Facts]:
    return [facts.tensor(q.dtype(0), matmul_dims(q.dims(0), q.dims(1)))]


def _matmul_integer(q: Query) -> Sequence[Facts]:
    return [facts.tensor(_INT32, matmul_dims(q.dims(0), q.dims(1)))]


def _qlinear_matmul(q: Query) -> Sequence[Facts]:
    return [facts.tensor(q.dtype(7), matmul_dims(q.dims(0), q.dims(3)))]


def _gemm(q: Query) -> Sequence[Facts]:
    a, b = q.dims(0), q.dims(1)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return [facts.tensor(q.dtype(0), q.unknown_dims(2))]
    rows = a[1] if q.attr("transA", 0) else a[0]
    columns = b[0] if q.attr("transB", 0) else b[1]
    return [facts.tensor(q.dtype(0), (rows, columns))]


def _einsum(q: Query) -> Sequence[Facts] | None:
    equation = q.attr("equation", "").replace(" ", "")
    terms, _, result = equation.partition("->")
    operands = terms.split(",")
    shapes = [q.dims(i) for i in range(len(q.inputs))]
    if "..." in equation or "->" not in equation or len(operands) != len(shapes):
        return None
    sizes: dict[str, Dim] = {}
    for letters, dims in zip(operands, shapes, strict=True):
        if dims is None or len(dims) != len(letters):
            return None
        for letter, dim in zip(letters, dims, strict=True):
            known = sizes.get(letter)
            sizes[letter] = dim if known is None or known == 1 or dim.is_static else known
    return [facts.tensor(q.dtype(0), [sizes[letter] for letter in result])]


def windows(q: Query, spatial: Dims, kernel: Sequence[DimLike], *, ceil: bool = False) -> Dims:
    """The number of positions of a sliding window along each spatial axis."""
    count = len(spatial)
    ones = (1,) * count
    strides: tuple[int, ...] = q.attr("strides", ones)
    dilations: tuple[int, ...] = q.attr("dilations", ones)
    pads: tuple[int, ...] = q.attr("pads", (0,) * (2 * count))
    auto = q.attr("auto_pad", "NOTSET")
    result = []
    for i, size in enumerate(spatial):
        reach = (Dim.of(kernel[i]) - 1) * dilations[i] + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            result.append(ceildiv(size, strides[i]))
            continue
        around = pads[i] + pads[i + count] if auto == "NOTSET" else 0
        free = size + around - reach
        if free.upper is not None and free.upper < 0:  # runtimes truncate: one position, or none
            positions = truncdiv(free, strides[i]) + 1
        else:
            positions = (ceildiv(free, strides[i]) if ceil else free // strides[i]) + 1
        if ceil:
            positions = _without_window_in_padding(positions, size, strides[i], pads[i], around)
        result.append(positions)
    return tuple(result)


def _without_window_in_padding(
    positions: Dim, size: Dim, stride: int, before: int, around: int
) -> Dim:
    """Rounded-up positions, less the last one where its window would start in the padding at the end."""
    before = before if around else 0
    last_start = (positions - 1) * stride
    if (size + before - 1).at_least(last_start):
        return positions
    if size.is_static and last_start.is_static:
        return positions - 1
    # floor((size + before - 1) / stride) + 1 is the number of starts before the padding.
    return minimum((positions, (size + before - 1) // stride + 1))


def _convolution(q: Query, weight: int, dtype: ir.DataType | None) -> Sequence[Facts]:
    """The rule of a convolution whose weights are input `weight`."""
    given, kernel = q.dims(0), q.dims(weight)
    if given is None or kernel is None:
        return [facts.tensor(dtype, _partial(q, given, kernel, kernel[0] if kernel else None))]
    shape = tuple(map(Dim.of, q.attr("kernel_shape", ()))) or kernel[2:]
    return [facts.tensor(dtype, (given[0], kernel[0], *windows(q, given[2:], shape)))]


def _partial(
    q: Query, given: Dims | None, weight: Dims | None, channels: Dim | None
) -> Dims | None:
    """The dims of a convolution whose input's or weights' are unknown: the result has the rank of either."""
    known = given or weight
    if known is None:
        return None
    batch, features, *spatial = q.unknown_dims(len(known))
    return (given[0] if given else batch, features if channels is None else channels, *spatial)


def _conv(q: Query) -> Sequence[Facts]:
    return _convolution(q, 1, q.dtype(0))


def _conv_integer(q: Query) -> Sequence[Facts]:
    return _convolution(q, 1, _INT32)


def _qlinear_conv(q: Query) -> Sequence[Facts]:
    return _convolution(q, 3, q.dtype(7))


def _conv_transpose(q: Query) -> Sequence[Facts]:
    given, weight = q.dims(0), q.dims(1)
    if given is None or weight is None:
        known = weight[1] * q.attr("group", 1) if weight else None
        return [facts.tensor(q.dtype(0), _partial(q, given, weight, known))]
    channels = weight[1] * q.attr("group", 1)
    kernel = tuple(map(Dim.of, q.attr("kernel_shape", ()))) or weight[2:]
    return [facts.tensor(q.dtype(0), (given[0], channels, *_enlarged(q, given[2:], kernel)))]


def _enlarged(q: Query, spatial: Dims, kernel: Dims) -> Dims:
    """The spatial dimensions of a transposed convolution."""
    count = len(spatial)
    wanted: tuple[int, ...] = q.attr("output_shape", ())
    if wanted:
        return tuple(map(Dim.of, wanted[-count:]))
    strides: tuple[int, ...] = q.attr("strides", (1,) * count)
    dilations: tuple[int, ...] = q.attr("dilations", (1,) * count)
    extra: tuple[int, ...] = q.attr("output_padding", (0,) * count)
    pads: tuple[int, ...] = q.attr("pads", (0,) * (2 * count))
    auto = q.attr("auto_pad", "NOTSET")
    result = []
    for i, size in enumerate(spatial):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            result.append(size * strides[i])
            continue
        around = pads[i] + pads[i + count] if auto == "NOTSET" else 0
        reach = (kernel[i] - 1) * dilations[i] + 1
        result.append((size - 1) * strides[i] + extra[i] + reach - around)
    return tuple(result)


def _pool(q: Query) -> Sequence[Facts]:
    given = q.dims(0)
    kernel: tuple[int, ...] = q.attr("kernel_shape", ())
    if given is None:
        dims: Dims | None = None
    else:
        moved = windows(q, given[2:], kernel, ceil=bool(q.attr("ceil_mode", 0)))
        dims = (*given[:2], *moved)
    return [facts.tensor(q.dtype(0), dims), facts.tensor(ir.DataType.INT64, dims)]


def _global_pool(q: Query) -> Sequence[Facts]:
    given = q.dims(0)
    if given is None:
        return [facts.tensor(q.dtype(0), None)]
    return [facts.tensor(q.dtype(0), (*given[:2], *(1,) * (len(given) - 2)))]


RULES: Rules = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvInteger": _conv_integer,
    "QLinearConv": _qlinear_conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GlobalLpPool": _global_pool,
}
