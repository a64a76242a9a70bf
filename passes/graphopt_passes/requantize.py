"""Q/DQ pairs with zero points, as exporters for processors write them, in the form that TensorRT asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context

Array: TypeAlias = "np.ndarray[Any, Any]"
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
COPIES = frozenset(
    {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Identity"}
)
"""Operators that hand bytes on, so that their operand may as well be signed."""

_BYTES = (ir.DataType.UINT8, ir.DataType.INT8)
_LIMITS = {ir.DataType.UINT8: (0, 255), ir.DataType.INT8: (-128, 127)}


@dataclasses.dataclass(frozen=True)
class _Node:
    """A QuantizeLinear or DequantizeLinear with constant parameters; `points` are zeros where none are given."""

    node: ir.Node
    scale: Array
    points: Array
    dtype: ir.DataType

    @property
    def symmetric(self) -> bool:
        return self.dtype == ir.DataType.INT8 and not self.points.any()

    def same(self, other: _Node) -> bool:
        """Whether both mean the same numbers by the same bytes."""
        alike = self.dtype == other.dtype and np.array_equal(self.scale, other.scale)
        return alike and np.array_equal(self.points, other.points)

    def widened(self) -> Array:
        """The scale of signed bytes around 0 that reach as far."""
        low, high = (limit - self.points.astype(np.float64) for limit in _LIMITS[self.dtype])
        reach = np.maximum(np.abs(low), np.abs(high)) * self.scale.astype(np.float64)
        return np.asarray(reach / 127)


@dataclasses.dataclass(frozen=True)
class SymmetrizeQuantization:
    """Makes the bytes of Q/DQ pairs signed and their zero points 0, for targets that know no others.

    Before:  q = QuantizeLinear(x, s, 121)        y = DequantizeLinear(q, s, 121)        uint8
    After:   q = QuantizeLinear(x, s * 134 / 127, 0)  y = DequantizeLinear(q, s * 134 / 127, 0)  int8

    Weights are rounded anew, those of convolutions with a scale for each output channel; biases of 32 bits become
    floats; inputs and outputs of the model stay what they are, and the arithmetic is written out.  Changes numerics:
    lossy.  Leaves alone: targets with zero points, and models where bytes go elsewhere than through pairs and copies.
    Never without being asked for.
    Source: TensorRT documentation, explicit quantization.
    """

    name: ClassVar[str] = "symmetrize-quantization"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        style = ctx.target.qdq
        if style is None or style.zero_points:
            return False
        changed = False
        for scope in all_graphs(model):
            found = list(_pairs(scope.graph))
            for each in found:
                obstacle = _obstacle(each, found)
                if obstacle:
                    ctx.missed(self.name, each.node, obstacle)
                    break
            else:
                for each in found:
                    if _is_due(each) and ctx.permit(self.name, each.node, self.numerics):
                        _rewrite(each, ctx)
                        changed = True
        if changed:
            ctx.refresh()
        return changed


def _pairs(graph: ir.Graph) -> Iterator[_Node]:
    for node in graph:
        if (
            node.domain
            or node.op_type not in (QUANTIZE, DEQUANTIZE)
            or "block_size" in node.attributes
        ):
            continue
        scale = values.array(node.inputs[1])
        given = node.inputs[2] if len(node.inputs) > 2 else None
        points = values.array(given) if given is not None else None
        held = node.inputs[0] if node.op_type == DEQUANTIZE else node.outputs[0]
        dtype = given.dtype if given is not None else held.dtype if held is not None else None
        if scale is None or dtype is None or (given is not None and points is None):
            continue
        if dtype in (*_BYTES, ir.DataType.INT32):
            zero = np.zeros_like(scale, np.int32) if points is None else points.astype(np.int32)
            yield _Node(node, scale, zero, dtype)


def _is_due(each: _Node) -> bool:
    return not each.symmetric


def _obstacle(each: _Node, found: Iterable[_Node]) -> str:
    """Why the bytes of a pair cannot change; "" where they can."""
    if each.symmetric or each.dtype == ir.DataType.INT32:
        return ""
    known = {other.node: other for other in found}
    if each.node.op_type == QUANTIZE:
        readers = list(_readers(each.node.outputs[0]))
        strange = next((r for r in readers if r not in known), None)
        if _leaves(each.node.outputs[0]) and (readers or _way_out(each.node.outputs[0]) is None):
            return "its bytes leave the model and are read inside too"
        return "" if strange is None else f"its bytes are read by {strange.op_type}"
    source = _source(each.node.inputs[0])
    if source is None or values.is_constant(source) or source.is_graph_input():
        return ""
    maker = source.producer()
    if maker not in known or not known[maker].same(each):
        return "its bytes are made with another scale or zero point"
    return ""


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Who reads bytes, beyond copies."""
    for use in value.uses():
        if use.node.op_type in COPIES and not use.node.domain:
            yield from _readers(use.node.outputs[0])
        else:
            yield use.node


def _source(value: ir.Value | None) -> ir.Value | None:
    """Where bytes come from, before copies."""
    while value is not None:
        maker = value.producer()
        if maker is None or maker.op_type not in COPIES or maker.domain:
            return value
        value = maker.inputs[0]
    return None


def _rewrite(each: _Node, ctx: Context) -> None:
    node, g = each.node, Builder()
    source, origin = node.inputs[0], _source(node.inputs[0])
    assert source is not None
    assert origin is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    held = values.array(source) if node.op_type == DEQUANTIZE else None
    if held is not None:
        _commit(node, node.outputs[0], _weight(g, each, held, axis), g, ctx)
    elif node.op_type == DEQUANTIZE and origin.is_graph_input():
        out = _read(g, each, origin, axis)
        for copy in _way_in(source):
            out = g.op(copy.op_type, out, *copy.inputs[1:], like=copy)
        _commit(node, node.outputs[0], out, g, ctx)
    elif node.op_type == QUANTIZE and _leaves(node.outputs[0]):
        way = _way_out(node.outputs[0]) or []
        out = source
        for copy in way:
            out = g.op(copy.op_type, out, *copy.inputs[1:], like=copy)
        last = way[-1].outputs[0] if way else node.outputs[0]
        _commit(way[-1] if way else node, last, _write(g, each, out, axis), g, ctx)
    else:
        scale = g.const(each.widened().astype(each.scale.dtype))
        zero = g.const(np.zeros_like(each.points, np.int8))
        out = g.op(node.op_type, source, scale, zero, like=node)
        for copy in _copies(node.outputs[0]) if node.op_type == QUANTIZE else ():
            copy.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        _commit(node, node.outputs[0], out, g, ctx)


def _way_in(value: ir.Value) -> list[ir.Node]:
    """The copies before a value, the first one first."""
    maker = value.producer()
    if maker is None or maker.op_type not in COPIES or maker.inputs[0] is None:
        return []
    return [*_way_in(maker.inputs[0]), maker]


def _way_out(value: ir.Value) -> list[ir.Node] | None:
    """The copies on the one way from a value to an output of the graph; None where there are others."""
    uses = tuple(value.uses())
    if value.is_graph_output():
        return None if uses else []
    if len(uses) != 1 or uses[0].node.op_type not in COPIES:
        return None
    rest = _way_out(uses[0].node.outputs[0])
    return None if rest is None else [uses[0].node, *rest]


def _leaves(value: ir.Value) -> bool:
    return value.is_graph_output() or any(_leaves(copy.outputs[0]) for copy in _next_copies(value))


def _next_copies(value: ir.Value) -> Iterator[ir.Node]:
    for use in value.uses():
        if use.node.op_type in COPIES and not use.node.domain:
            yield use.node


def _copies(value: ir.Value) -> Iterator[ir.Node]:
    for copy in _next_copies(value):
        yield copy
        yield from _copies(copy.outputs[0])


def _wide(numbers: Array, rank: int, axis: int) -> Array:
    """Parameters in the shape that broadcasts along their axis."""
    if numbers.size == 1 or rank == 0:
        return numbers.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return numbers.reshape(shape)


def _weight(g: Builder, each: _Node, held: Array, axis: int) -> ir.Value:
    """A constant: rounded anew to signed bytes; 32 bits become floats."""
    points = _wide(each.points, held.ndim, axis).astype(np.float64)
    scale = _wide(each.scale.astype(np.float64), held.ndim, axis)
    exact = (held.astype(np.float64) - points) * scale
    if each.dtype == ir.DataType.INT32:
        return g.const(exact.astype(each.scale.dtype))
    finer = each.scale.size == 1 and _is_filter(each.node)
    along = 0 if finer else axis
    split = finer or each.scale.size > 1
    rest = tuple(i for i in range(held.ndim) if i != along % held.ndim) if split else None
    reach = np.abs(exact).max(axis=rest)
    fresh = np.where(reach == 0, 1.0, reach / 127)
    fresh = fresh if split else fresh.reshape(each.scale.shape)
    rounded = np.rint(exact / _wide(fresh, held.ndim, along))
    return g.op(
        DEQUANTIZE,
        g.const(np.clip(rounded, -127, 127).astype(np.int8)),
        g.const(fresh.astype(each.scale.dtype)),
        g.const(np.zeros(fresh.shape, np.int8)),
        like=each.node,
        axis=along if split else None,
    )


def _is_filter(node: ir.Node) -> bool:
    """Whether a constant is the filter of convolutions alone, whose output channels are axis 0."""
    uses = tuple(node.outputs[0].uses())
    return bool(uses) and all(use.node.op_type == "Conv" and use.idx == 1 for use in uses)


def _read(g: Builder, each: _Node, source: ir.Value, axis: int) -> ir.Value:
    """(Cast(x) - zero point) * scale: bytes that enter the model, exactly."""
    rank = len(source.shape) if source.shape is not None else 0
    wide = g.op("Cast", source, to=int(ir.DataType.from_numpy(each.scale.dtype)))
    points = _wide(each.points, rank, axis).astype(each.scale.dtype)
    return g.op("Mul", g.op("Sub", wide, g.const(points)), g.const(_wide(each.scale, rank, axis)))


def _write(g: Builder, each: _Node, source: ir.Value, axis: int) -> ir.Value:
    """Cast(Clip(Round(x / scale) + zero point)): bytes that leave the model, exactly."""
    rank = len(source.shape) if source.shape is not None else 0
    points = _wide(each.points, rank, axis).astype(each.scale.dtype)
    rounded = g.op("Round", g.op("Div", source, g.const(_wide(each.scale, rank, axis))))
    moved = g.op("Add", rounded, g.const(points))
    low, high = (g.const(np.asarray(limit, each.scale.dtype)) for limit in _LIMITS[each.dtype])
    return g.op("Cast", g.op("Min", g.op("Max", moved, low), high), to=int(each.dtype))


def _commit(last: ir.Node, old: ir.Value, out: ir.Value, g: Builder, ctx: Context) -> None:
    """Puts new nodes in the place of `last`, and takes away what made bytes for it alone."""
    graph = last.graph
    assert graph is not None
    for value in g.constants:
        value.name = ctx.names.fresh(value.name or "const")
        graph.register_initializer(value)
    for made in g.nodes:
        made.name = ctx.names.fresh(f"{last.name or last.op_type}_{made.op_type}")
        for output in made.outputs:
            output.name = ctx.names.fresh(f"{old.name}_{made.op_type.lower()}")
    graph.insert_before(last, g.nodes)
    for use in old.uses():
        use.node.replace_input_with(use.idx, out)
    out.shape = old.shape
    for index, output in enumerate(graph.outputs):
        if output is old:
            out.type, name, old.name = old.type, old.name, None
            graph.outputs[index] = out
            out.name = name
    _remove(last)


def _remove(node: ir.Node | None) -> None:
    """Removes a node that nothing reads, and the copies and pairs before it that nothing reads then."""
    if node is None or node.graph is None:
        return
    if any(out.uses() or out.is_graph_output() for out in node.outputs):
        return
    before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    graph = node.graph
    graph.remove(node, safe=True)
    if before is not None and before.op_type in (*COPIES, QUANTIZE):
        _remove(before)
