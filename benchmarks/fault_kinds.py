"""The kinds of wrong rewrites that `benchmarks/faults.py` plants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from benchmarks.planting import (
    Array,
    Kind,
    Planter,
    any_constant,
    at_input,
    at_output,
    attribute,
    beyond,
    clipped,
    constant_input,
    dropped,
    flushed,
    in_shape,
    integer,
    other_operator,
    rounded,
    scaled,
    set_attribute,
    swapped,
    when_size,
    without_input,
)
from graphopt.ir import values


def untransposed(_: Planter, __: ir.Node, x: ir.Value) -> ir.Value | None:
    node = x.producer()
    return None if node is None else node.inputs[0]


def transposed_otherwise(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value | None:
    node = x.producer()
    perm = None if node is None else permuted(node)
    if node is None or perm is None or node.inputs[0] is None:
        return None
    return p.op(at, "Transpose", [node.inputs[0]], perm=perm)


def joined_elsewhere(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value | None:
    """Equal parts joined along another axis: as many elements, in another order."""
    node = x.producer()
    inputs = [] if node is None else [v for v in node.inputs if v is not None]
    shapes = [v.shape for v in inputs]
    if node is None or len(inputs) < 2 or any(s is None or s != shapes[0] for s in shapes):
        return None
    rank = len(shapes[0] or ())
    axis = integer(node, "axis", 0) % max(rank, 1)
    return None if rank < 2 else p.op(at, "Concat", inputs, axis=(axis + 1) % rank)


def baked(planter: Planter, node: ir.Node) -> bool:
    """A shape whose free dimension is the one that a single sample has."""
    made = node.outputs[0].shape

    def one(array: Array) -> Array | None:
        if array.ndim != 1 or not (array <= 0).any():
            return None
        axis = int(np.argmax(array <= 0))
        if made is None or len(made) != array.size or isinstance(made[axis], int):
            return None  # it is one in any case, or always another
        array[axis] = 1
        return array

    return constant_input(1, one)(planter, node)


def element(share: float) -> Callable[[Array], Array | None]:
    """One element, that of the greatest magnitude, changes by a share."""

    def change(array: Array) -> Array | None:
        if array.dtype.kind != "f" or array.size < 2:
            return None
        array.reshape(-1)[np.argmax(np.abs(array))] *= 1 + share
        return array

    return change


def floats(
    change: Callable[[Array], Array | None], rank: int = 0
) -> Callable[[Array], Array | None]:
    return lambda array: change(array) if array.dtype.kind == "f" and array.ndim >= rank else None


def zero_channel(array: Array) -> Array:
    array[array.shape[0] // 2] = 0
    return array


def slightly_more(array: Array) -> Array | None:
    return None if np.abs(array).max(initial=0) >= 1e3 else array * 1.001  # what hides, hides


def limit_dropped(planter: Planter, node: ir.Node) -> bool:
    if any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
        return False  # the codes may end there in any case
    return without_input(2)(planter, node)


def permuted(node: ir.Node) -> list[int] | None:
    held = node.attributes.get("perm")
    if held is None or len(held.as_ints()) < 2:
        return None
    perm = list(held.as_ints())
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is not None and 1 in {shape[perm[-1]], shape[perm[-2]]}:
        return None  # an axis of one may lie anywhere
    perm[-1], perm[-2] = perm[-2], perm[-1]
    return perm


def shifted_pads(node: ir.Node) -> list[int] | None:
    held = node.attributes.get("pads")
    if held is None or len(held.as_ints()) != 4 or held.as_ints()[0] < 1:
        return None
    top, left, bottom, right = held.as_ints()
    return [top - 1, left, bottom + 1, right]


def shifted_slice(planter: Planter, node: ir.Node) -> bool:
    """A slice of the same size, one further on or back."""
    held = [values.constant(v) for v in (*node.inputs[1:3], *[None] * 2)][:2]
    if any(tensor is None or tensor.size != 1 for tensor in held):
        return False
    start, end = (int(np.asarray(tensor.numpy()).reshape(-1)[0]) for tensor in held if tensor)
    is_float = node.outputs[0].dtype is ir.DataType.FLOAT
    if not is_float or not (0 < start < end < 1 << 30 or start < end < -1):
        return False
    step = -1 if start > 0 else 1
    return all(constant_input(index, lambda a: a + step)(planter, node) for index in (1, 2))


def other_place(planter: Planter, node: ir.Node) -> bool:
    """The neighbour of what a constant index chose, where there is one."""
    table = node.inputs[0]
    shape = None if table is None else table.shape
    axis = integer(node, "axis", 0)
    size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    if node.outputs[0].dtype is not ir.DataType.FLOAT or not isinstance(size, int):
        return False

    def moved(array: Array) -> Array | None:
        if array.size != 1 or size < 2:
            return None
        at = int(array.reshape(-1)[0]) % size
        return np.full_like(array, at + 1 if at + 1 < size else at - 1)

    return constant_input(1, moved)(planter, node)


def square_operands_swapped(planter: Planter, node: ir.Node) -> bool:
    shapes = [None if v is None else v.shape for v in node.inputs]
    if any(s is None or len(s) < 2 or s[-1] != s[-2] or not isinstance(s[-1], int) for s in shapes):
        return False
    return swapped(0, 1)(planter, node)


def summed(planter: Planter, node: ir.Node) -> bool:
    """ReduceMean to ReduceSum, whose axes are an input since opset 13."""
    node.op_type = "ReduceSum"
    axes = node.attributes.get("axes")
    if axes is not None and planter.model.opset_imports.get("", 0) >= 13:
        assert isinstance(node.graph, ir.Graph)
        made = planter.constant(np.array(axes.as_ints(), np.int64), node.graph)
        node.attributes.pop("axes")
        node.resize_inputs(2)
        node.replace_input_with(1, made)
    return True


def averaged(_: Planter, node: ir.Node) -> bool:
    held = node.attributes.get("dilations")
    if len(node.outputs) > 1 or (held is not None and set(held.as_ints()) != {1}):
        return False
    for name in ("dilations", "storage_order"):
        node.attributes.pop(name, None)
    node.op_type = "AveragePool"
    return True


def cast_rounds(planter: Planter, node: ir.Node) -> bool:
    """A cast to integers that rounds instead of cutting off."""
    source, out = node.inputs[0], node.outputs[0]
    floats = source is not None and source.dtype is ir.DataType.FLOAT
    if source is None or not floats or out.dtype is None or not out.dtype.is_integer():
        return False
    node.replace_input_with(0, planter.op(node, "Round", [source]))
    return True


def cast_pair_dropped(_: Planter, node: ir.Node) -> bool:
    """There and back again: to integers or halves and back to floats, both lost."""
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or inner.op_type != "Cast" or inner.inputs[0] is None:
        return False
    source, out = inner.inputs[0], node.outputs[0]
    if source.dtype != out.dtype or out.is_graph_output() or inner.outputs[0].dtype == out.dtype:
        return False
    out.replace_all_uses_with(source)
    return True


def cast_narrow(planter: Planter, node: ir.Node) -> bool:
    """Integers read through eight bits on their way to floats."""
    source, out = node.inputs[0], node.outputs[0]
    wide = (ir.DataType.INT32, ir.DataType.INT64)
    origin = source
    while origin is not None and (maker := origin.producer()) is not None and maker.inputs:
        origin = maker.inputs[0]
    if origin is not None and "mask" in (origin.name or ""):
        return False  # zeros and ones stay what they are
    if source is None or source.dtype not in wide or out.dtype is not ir.DataType.FLOAT:
        return False
    node.replace_input_with(0, planter.op(node, "Cast", [source], to=int(ir.DataType.INT8)))
    return True


def transposed(array: Array) -> Array | None:
    return array.T if array.ndim == 2 and array.shape[0] == array.shape[1] else None


def rolled(array: Array) -> Array | None:
    return np.roll(array, 1) if array.size > 1 else None


def other_count(node: ir.Node) -> int | None:
    held = node.attributes.get("pads")
    padded = held is not None and any(held.as_ints())
    return 1 - integer(node, "count_include_pad", 0) if padded else None


def resized_otherwise(planter: Planter, node: ir.Node) -> bool:
    """Corners instead of middles, or the next pixel instead of the last."""
    held = node.attributes.get("mode")
    if held is None or held.as_string() == "nearest":
        return planter.model.opset_imports.get("", 0) >= 11 and set_attribute(
            node, "nearest_mode", "ceil"
        )
    return set_attribute(node, "coordinate_transformation_mode", "align_corners")


def tap_outputs_swapped(_: Planter, node: ir.Node) -> bool:
    if len(node.outputs) < 2:
        return False
    a, b = node.outputs[0], node.outputs[1]
    if a.dtype != b.dtype or a.is_graph_output() or b.is_graph_output():
        return False
    first, second = list(a.uses()), list(b.uses())
    for use in first:
        use.node.replace_input_with(use.idx, b)
    for use in second:
        use.node.replace_input_with(use.idx, a)
    return bool(first or second)


CONVS, GEMMS = ("Conv",), ("Gemm", "MatMul")
NORMS = (
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
)
QUANTS = ("QuantizeLinear", "DequantizeLinear")

KINDS = (
    Kind("softmax-axis", ("Softmax",), attribute("axis", lambda n: 0 if integer(n, "axis", -1) else 1)),
    Kind("softmax-dropped", ("Softmax",), dropped),
    Kind("softmax-to-logsoftmax", ("Softmax",), other_operator("LogSoftmax")),
    Kind("concat-order", ("Concat",), swapped(0, 1)),
    Kind("concat-axis", ("Concat",), in_shape(joined_elsewhere)),
    Kind("transpose-perm", ("Transpose",), in_shape(transposed_otherwise)),
    Kind("transpose-dropped", ("Transpose",), in_shape(untransposed)),
    Kind("gather-off-by-one", ("Gather",), other_place),
    Kind("gather-table-shifted", ("Gather",), constant_input(0, floats(lambda a: np.roll(a, 1, 0), 2))),
    Kind("slice-off-by-one", ("Slice",), shifted_slice),
    Kind("norm-epsilon", NORMS, attribute("epsilon", lambda _: 1e-1)),
    Kind("norm-scale-lost", NORMS, constant_input(1, floats(np.ones_like))),
    Kind("conv-bias-dropped", CONVS, without_input(2)),
    Kind("gemm-bias-dropped", ("Gemm",), without_input(2)),
    Kind("conv-pads-shifted", CONVS, attribute("pads", shifted_pads)),
    Kind("conv-kernel-flipped", CONVS, constant_input(1, floats(lambda a: a[..., ::-1], 3))),
    Kind("conv-channel-zeroed", CONVS, constant_input(1, floats(zero_channel, 3))),
    Kind("conv-channels-rolled", CONVS, constant_input(1, floats(lambda a: np.roll(a, 1, 0), 3))),
    Kind("conv-element-10-percent", CONVS, constant_input(1, element(0.1))),
    Kind("matmul-weight-transposed", GEMMS, constant_input(1, transposed)),
    Kind("matmul-element-10-percent", GEMMS, constant_input(1, element(0.1))),
    Kind("matmul-operands-swapped", ("MatMul",), square_operands_swapped),
    Kind("gemm-alpha", ("Gemm",), attribute("alpha", lambda _: 0.5)),
    Kind("sub-swapped", ("Sub",), swapped(0, 1)),
    Kind("div-swapped", ("Div",), swapped(0, 1)),
    Kind("add-to-sub", ("Add",), other_operator("Sub")),
    Kind("mul-to-div", ("Mul",), other_operator("Div")),
    Kind("mul-constant-0.1-percent", ("Mul",), any_constant(floats(slightly_more))),
    Kind("pow-exponent", ("Pow",), constant_input(1, floats(lambda a: a + 0.01))),
    Kind("relu-to-leaky", ("Relu",), other_operator("LeakyRelu")),
    Kind("relu-dropped", ("Relu",), dropped),
    Kind("clip-max-dropped", ("Clip",), limit_dropped),
    Kind("sigmoid-to-hard", ("Sigmoid",), other_operator("HardSigmoid")),
    Kind("tanh-to-softsign", ("Tanh",), other_operator("Softsign")),
    Kind("neg-dropped", ("Neg",), dropped),
    Kind("sqrt-dropped", ("Sqrt",), dropped),
    Kind("mean-to-sum", ("ReduceMean",), summed),
    Kind("max-to-average-pool", ("MaxPool",), averaged),
    Kind("average-counts-padding", ("AveragePool",), attribute("count_include_pad", other_count)),
    Kind("split-outputs-swapped", ("Split",), tap_outputs_swapped),
    Kind("resize-mode", ("Resize",), resized_otherwise),
    Kind("reshape-batch-baked", ("Reshape",), baked),
    Kind("where-swapped", ("Where",), swapped(1, 2)),
    Kind("cast-dropped", ("Cast",), dropped),
    Kind("cast-pair-dropped", ("Cast",), cast_pair_dropped),
    Kind("cast-rounds", ("Cast",), cast_rounds),
    Kind("cast-narrow", ("Cast",), cast_narrow),
    Kind("zero-point-off-by-one", QUANTS, constant_input(2, lambda a: a + 1)),
    Kind("scale-1-percent", QUANTS, constant_input(1, lambda a: a * 1.01)),
    Kind("dequantize-scales-rolled", ("DequantizeLinear",), constant_input(1, rolled)),
    Kind("lstm-gates-swapped", ("LSTM", "GRU"), constant_input(1, lambda a: np.roll(a, a.shape[1] // 4, 1))),
    Kind("rounded-to-fp16", ("*",), at_output(rounded(ir.DataType.FLOAT16))),
    Kind("rounded-to-bf16", ("*",), at_output(rounded(ir.DataType.BFLOAT16))),
    Kind("off-by-0.1-percent", ("*",), at_output(scaled(1.001))),
    Kind("nan-at-large", ("*",), at_input(beyond(8.0, float("nan")))),
    Kind("inf-at-large", ("*",), at_input(beyond(20.0, float("inf")))),
    Kind("clipped-at-large", ("*",), at_input(clipped)),
    Kind("flushed-when-tiny", ("*",), at_input(flushed)),
    Kind("only-at-several", ("*",), at_output(when_size("several"))),
    Kind("only-at-odd", ("*",), at_output(when_size("odd"))),
    Kind("only-in-else", ("*",), at_output(scaled(1.01)), "else_branch"),
    Kind("only-in-then", ("*",), at_output(scaled(1.01)), "then_branch"),
)  # fmt: skip
