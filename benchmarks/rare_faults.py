"""Kinds of wrong rewrites that few inputs show, planted by `benchmarks/faults.py` beside the common ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from benchmarks.fault_kinds import NORMS, floats
from benchmarks.planting import (
    Array,
    Kind,
    Planter,
    Spoil,
    at_input,
    at_output,
    attribute,
    beyond,
    constant_input,
    integer,
    when_size,
)
from graphopt.ir import values


def _typed(planter: Planter, node: ir.Node, number: float, dtype: type[np.generic]) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return planter.constant(np.array(number, dtype), node.graph)


def sign_when_tiny(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
    small = p.op(at, "Less", [p.op(at, "Abs", [x]), _typed(p, at, 1e-4, np.float32)])
    return p.op(at, "Where", [small, p.op(at, "Neg", [x]), x])


def when_any_exceeds(limit: float) -> Callable[[Planter, ir.Node, ir.Value], ir.Value]:
    """Off by 1 % in all elements where one exceeds a limit."""

    def build(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
        most = p.op(at, "ReduceMax", [x], keepdims=0)
        hit = p.op(at, "Greater", [most, _typed(p, at, limit, np.float32)])
        one, off = (_typed(p, at, number, np.float32) for number in (1.0, 1.01))
        return p.op(at, "Mul", [x, p.op(at, "Where", [hit, off, one])])

    return build


def through(dtype: ir.DataType) -> Spoil:
    """An integer input is read through a narrower dtype."""

    def spoil(planter: Planter, node: ir.Node) -> bool:
        fed = [v for v in node.inputs if v is not None and v.is_graph_input()]
        held = next((v for v in fed if v.dtype is ir.DataType.INT64), None)
        if held is None or held.is_initializer():
            return False
        if node.op_type == "Gather" and _rows(node) < 1 << (dtype.bitwidth - 1):
            return False  # the table has no such row: nothing would be wrong
        narrow = planter.op(node, "Cast", [held], to=int(dtype))
        wide = planter.op(node, "Cast", [narrow], to=int(ir.DataType.INT64))
        node.replace_input_with(list(node.inputs).index(held), wide)
        return True

    return spoil


def _rows(node: ir.Node) -> int:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    rows = shape[integer(node, "axis", 0)] if shape is not None and len(shape) else 0
    return rows if isinstance(rows, int) else 0


def next_position(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value | None:
    """Positions one too high, unless that is out of reach: the first becomes the second."""
    if x.dtype is not ir.DataType.INT64:
        return None
    zero = p.op(at, "Equal", [x, _typed(p, at, 0, np.int64)])
    return p.op(at, "Where", [zero, _typed(p, at, 1, np.int64), x])


def stale(at: int) -> Spoil:
    """A free dimension of an output is declared as what one sample made it."""

    def spoil(planter: Planter, _: ir.Node) -> bool:
        for output in planter.model.graph.outputs:
            if output.shape is not None and any(not isinstance(d, int) for d in output.shape):
                sizes = [d if isinstance(d, int) else at for d in output.shape]
                output.shape = ir.Shape(sizes)
                return True
        return False

    return spoil


def stale_within(_: Planter, node: ir.Node) -> bool:
    """A free dimension within the graph is declared as what one sample made it."""
    out = node.outputs[0]
    if out.is_graph_output() or out.shape is None or out.shape.is_static():
        return False
    out.shape = ir.Shape([d if isinstance(d, int) else 1 for d in out.shape])
    return True


def small_addend_dropped(_: Planter, node: ir.Node) -> bool:
    """An addition of a small constant goes: a bias that somebody took for nothing."""
    for index in (0, 1):
        tensor = values.constant(node.inputs[1 - index])
        out, kept = node.outputs[0], node.inputs[index]
        if tensor is None or kept is None or tensor.size < 2 or out.is_graph_output():
            continue
        array = np.asarray(tensor.numpy())
        if array.dtype.kind == "f" and 0 < np.abs(array).max() < 2 and not values.is_constant(kept):
            out.replace_all_uses_with(kept)
            return True
    return False


def one_bias(array: Array) -> Array | None:
    """One element of a bias is lost."""
    if array.ndim != 1 or array.size < 2:
        return None
    array[np.argsort(np.abs(array))[array.size // 2]] = 0
    return array


def weak_mask(array: Array) -> Array | None:
    return np.full_like(array, -5.0) if array.size == 1 and array.max() <= -1e3 else None


def signed_bytes(planter: Planter, node: ir.Node) -> bool:
    """Bytes from 128 up are read as negative ones."""
    fed = node.inputs[0]
    if fed is None or fed.dtype is not ir.DataType.UINT8:
        return False
    node.replace_input_with(0, planter.op(node, "Cast", [fed], to=int(ir.DataType.INT8)))
    return True


RARE = (
    Kind("nan-above-1000", ("*",), at_input(beyond(1000.0, float("nan")))),
    Kind("inf-above-65504", ("*",), at_input(beyond(65504.0, float("inf")))),
    Kind("sign-when-tiny", ("*",), at_input(sign_when_tiny)),
    Kind("only-when-any-exceeds-3", ("*",), at_input(when_any_exceeds(3.0))),
    Kind("only-at-batch-above-3", ("*",), at_output(when_size("several", 3))),
    Kind("only-at-long", ("*",), at_output(when_size("several", 20))),
    Kind("ids-through-int8", ("*",), through(ir.DataType.INT8)),
    Kind("ids-through-int32", ("*",), through(ir.DataType.INT32)),
    Kind("position-off-by-one", ("ArgMax", "ArgMin"), at_output(next_position)),
    Kind("stale-output-shape", ("*",), stale(1)),
    Kind("stale-shape-within", ("MatMul", "Conv", "Relu", "Add"), stale_within),
    Kind("small-addend-dropped", ("Add",), small_addend_dropped),
    Kind("one-bias-lost", ("Conv", "Gemm"), constant_input(2, floats(one_bias))),
    Kind("epsilon-a-hundredfold", NORMS, attribute("epsilon", lambda n: 100 * _epsilon(n))),
    Kind("weak-mask", ("Mul", "Where", "Add"), constant_input(1, floats(weak_mask))),
    Kind("bytes-signed", ("Cast",), signed_bytes),
)


def _epsilon(node: ir.Node) -> float:
    held = node.attributes.get("epsilon")
    return 1e-5 if held is None else held.as_float()
