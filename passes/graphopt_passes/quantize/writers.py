"""Writes products and look-ups with weights as integers into a graph, wherever in it they are.

Source: com.microsoft MatMulIntegerToFloat, MatMulNBits, GatherBlockQuantized, ONNX Runtime 1.31 (ContribOperators.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.rewrite import name_of
from graphopt_passes.quantize import blocks, rounding, weights
from graphopt_passes.quantize.factors import Factor, added, bias_row, factor_of, is_turned, times
from graphopt_passes.quantize.single_blocks import Settings

MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """How weights are written in blocks.

    Attributes:
        block: elements that share a scale.
        bits: of each, 4 or 8.
        form: contrib or qdq.
        scheme: symmetric, asymmetric (with zero points), or auto: what loses less of each weight.
        moments: second moments of the input of a product, by name of its output; of none, rounding is to nearest.
        single: other blocks, bits and schemes of single nodes, by name of their outputs.
        signed: whether scales may be negative: for kernels that are known, not for any parser.
        made: what second moments have rounded already, by node and kind: written again it must not take minutes again.
    """

    block: int
    bits: int = 4
    form: str = "contrib"
    scheme: str = "auto"
    moments: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    single: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    signed: bool = True
    made: dict[object, blocks.Encoded] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> tuple[int, int, str]:
        """What weights must have in common to be stored once."""
        return self.block, self.bits, self.scheme

    def of(self, name: str) -> Blocks:
        """The same for the node of this name."""
        said = self.single.get(name, Settings())
        return dataclasses.replace(
            self,
            block=said.block or self.block,
            bits=said.bits or self.bits,
            scheme=said.scheme or self.scheme,
        )

    def rounded(self, rows: np.ndarray, node: ir.Node) -> blocks.Encoded:
        """The weight of a product, one output channel a row, by second moments where they are known."""
        moments = self.moments.get(name_of(node))
        if moments is None:
            return self.encoded(rows)
        key = name_of(node), self.kind
        if key not in self.made:
            self.made[key] = self.encoded(rows, rounding.Moments.of(moments))
        return self.made[key]

    def encoded(self, rows: np.ndarray, known: rounding.Moments | None = None) -> blocks.Encoded:
        """A weight, one output channel a row."""
        if self.scheme == "auto":
            how = self.block, self.bits, known
            zero_points = blocks.wants_zero_points(rows, *how, signed=self.signed)
        else:
            zero_points = self.scheme == "asymmetric"
        return blocks.encode(
            rows, self.block, self.bits, known, zero_points=zero_points, signed=self.signed
        )


def write_dynamic(model: ir.Model, sites: frozenset[str], names: Names) -> None:
    """Replaces the products named by integer ones; each input is quantised once, however many read it."""
    encoded: dict[tuple[object, ir.Value], ir.Node] = {}
    for node in _named(model, sites):
        source, graph = node.inputs[0], node.graph
        assert source is not None
        assert isinstance(graph, ir.Graph)
        if (graph, source) not in encoded:
            encoder = ir.Node("", "DynamicQuantizeLinear", [source], num_outputs=3)
            encoder.name = names.fresh(f"{source.name}_quantize")
            for value, part in zip(encoder.outputs, ("q", "scale", "zero"), strict=True):
                value.name = names.fresh(f"{source.name}_{part}")
            graph.insert_before(node, encoder)
            encoded[graph, source] = encoder
        _integer_product(node, encoded[graph, source], names)
    model.opset_imports.setdefault(MICROSOFT, 1)


def _named(model: ir.Model, sites: frozenset[str]) -> list[ir.Node]:
    """The nodes of these names, in the main graph and in bodies."""
    return [node for graph in model.graphs() for node in graph if name_of(node) in sites]


def _integer_product(node: ir.Node, encoder: ir.Node, names: Names) -> None:
    array = _matrix(node)
    # 255: the whole range of bytes is in use, and pairs of products must not saturate 16 bits.
    packed = weights.pack(array.T, top_code=255)
    base = _named_or_weight(_factor(node).value)
    graph = node.graph
    assert graph is not None
    codes = _held(graph, names.fresh(f"{base}_q"), np.ascontiguousarray(packed.codes.T))
    scales = _held(graph, names.fresh(f"{base}_scale"), packed.scales)
    values_in = [encoder.outputs[0], codes, encoder.outputs[1], scales, encoder.outputs[2], None]
    _replace(node, "MatMulIntegerToFloat", [*values_in, _bias(node, names)], {}, names)


Parts: TypeAlias = list[ir.Value | None]
"""Codes, scales and zero points of a weight; None for zero points where there are none."""

Held: TypeAlias = dict[tuple[object, ...], Parts]
"""Weights that are written already: those who share one share it."""


def write_blocks(model: ir.Model, sites: frozenset[str], names: Names, how: Blocks) -> None:
    """Replaces the products and look-ups named by ones with weights in blocks."""
    held: Held = {}
    for node in _named(model, sites):
        each = how.of(name_of(node))
        if node.op_type == "Gather":
            _block_gather(node, names, each, held)
        elif how.form == "qdq":
            _block_decoded(node, names, each, held)
        else:
            _block_product(node, names, each, held)
    if how.form != "qdq":
        model.opset_imports.setdefault(MICROSOFT, 1)


def _once(
    node: ir.Node,
    weight: ir.Value | None,
    kind: object,
    held: Held,
    make: Callable[[], Parts],
) -> Parts:
    """The parts of the weight that a node reads, made for the first who asks for them so."""
    key = (node.graph, weight, kind)
    if key not in held:
        held[key] = make()
    return held[key]


def _block_product(node: ir.Node, names: Names, how: Blocks, held: Held) -> None:
    factor, array, graph = _factor(node), _matrix(node), node.graph
    assert isinstance(graph, ir.Graph)
    moments = how.moments.get(name_of(node))

    def make() -> Parts:
        made = blocks.pack_blocks(how.rounded(array.T, node), how.bits)
        return _held_parts(graph, _named_or_weight(factor.value), made, names, how)

    attributes = {
        "K": array.shape[0],
        "N": array.shape[1],
        "bits": how.bits,
        "block_size": how.block,
        "accuracy_level": 4,
    }
    kind = how.kind, factor.turned, times(node, "alpha"), id(moments)
    parts = _once(node, factor.value, kind, held, make)
    inputs = [node.inputs[0], *parts, None, _bias(node, names)]
    _replace(node, "MatMulNBits", inputs, attributes, names)


def _block_gather(node: ir.Node, names: Names, how: Blocks, held: Held) -> None:
    table, graph = values.array(node.inputs[0]), node.graph
    base = _named_or_weight(node.inputs[0])
    assert table is not None
    assert isinstance(graph, ir.Graph)

    def make() -> Parts:
        made = how.encoded(table)
        zeros = None if made.zeros is None else np.ascontiguousarray(made.zeros)
        if how.form == "qdq":
            laid = _laid(made.codes, zeros, how)
        else:
            packed = None if zeros is None else blocks.packed(zeros, how.bits)
            laid = blocks.packed(made.codes, how.bits), packed
        parts = laid[0], made.scales, laid[1]
        return _held_parts(graph, base, parts, names, how)

    parts = _once(node, node.inputs[0], (how.kind, "table"), held, make)
    if how.form == "qdq":
        node.replace_input_with(0, _decoded(base, parts, 1, node, names, how))
        return
    attributes = {
        "gather_axis": 0,
        "quantize_axis": 1,
        "block_size": how.block,
        "bits": how.bits,
    }
    inputs = [parts[0], node.inputs[1], *parts[1:]]
    _replace(node, "GatherBlockQuantized", inputs, attributes, names)


def _block_decoded(node: ir.Node, names: Names, how: Blocks, held: Held) -> None:
    """A DequantizeLinear with blocks in front of the product, as ai.onnx 21 has it."""
    factor, graph = _factor(node), node.graph
    array, base = factor.matrix, _named_or_weight(factor.value)  # a Gemm keeps alpha and beta
    assert isinstance(graph, ir.Graph)
    moments, turned = how.moments.get(name_of(node)), is_turned(node)

    def make() -> Parts:
        made = how.rounded(array.T, node)
        codes, scales, zeros = made.codes[:, : array.shape[0]], made.scales, made.zeros
        if not turned:
            codes, scales, zeros = codes.T, scales.T, None if zeros is None else zeros.T
        laid = _laid(codes, zeros, how)
        parts = laid[0], scales, laid[1]
        return _held_parts(graph, base, parts, names, how)

    parts = _once(node, factor.value, (how.kind, turned, factor.turned, id(moments)), held, make)
    axis = 1 if turned else 0
    node.replace_input_with(1, _decoded(base, parts, axis, node, names, how))


def _laid(
    codes: np.ndarray, zeros: np.ndarray | None, how: Blocks
) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and zero points for DequantizeLinear: signed where 0 is 0, else unsigned, as runtimes look for them."""
    if zeros is None:
        return np.asarray(codes.astype(ml_dtypes.int4 if how.bits == 4 else np.int8)), None
    kind, middle = (ml_dtypes.uint4 if how.bits == 4 else np.uint8), np.uint8(1 << (how.bits - 1))
    shifted = [np.ascontiguousarray(each).view(np.uint8) + middle for each in (codes, zeros)]
    return shifted[0].astype(kind), shifted[1].astype(kind)


def _held_parts(
    graph: ir.Graph,
    base: str,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    names: Names,
    how: Blocks,
) -> Parts:
    ends = (f"q{how.bits}", "scales", "zeros")
    return [
        None if array is None else _held(graph, names.fresh(f"{base}_{end}"), array)
        for array, end in zip(parts, ends, strict=True)
    ]


def _decoded(
    base: str, parts: Parts, axis: int, before: ir.Node, names: Names, how: Blocks
) -> ir.Value:
    codes, scales = parts[:2]
    assert codes is not None
    assert scales is not None
    given = [ir.AttrInt64("axis", axis), ir.AttrInt64("block_size", how.block)]
    inputs = [part for part in parts if part is not None]
    decode = ir.Node("", "DequantizeLinear", inputs, given, num_outputs=1)
    decode.name = names.fresh(f"{base}_decode")
    value = decode.outputs[0]
    value.name = names.fresh(f"{base}_decoded")
    value.type, value.shape = scales.type, codes.shape
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, decode)
    return value


def _named_or_weight(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or "weight"


def _factor(node: ir.Node) -> Factor:
    factor = factor_of(node)
    assert factor is not None
    return factor


def _matrix(node: ir.Node) -> np.ndarray:
    """The weight as [K, N], times alpha."""
    array, alpha = _factor(node).matrix, times(node, "alpha")
    return array if alpha == 1 else np.asarray(array * array.dtype.type(alpha))


def _bias(node: ir.Node, names: Names) -> ir.Value | None:
    """The bias of a Gemm as a vector, times beta; None where it is another."""
    row = bias_row(node)
    if row is None:
        return None
    value = node.inputs[2]
    assert value is not None
    tensor = values.constant(value)
    if tensor is not None and tensor.shape == row.shape and times(node, "beta") == 1:
        return value
    assert node.graph is not None
    return _held(node.graph, names.fresh(f"{value.name}_flat"), row)


def _held(graph: ir.Graph | ir.Function, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array))
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    assert isinstance(graph, ir.Graph)
    graph.register_initializer(value)
    return value


def _replace(
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, int],
    names: Names,
) -> None:
    """Puts another operator in the place of a node; its output keeps name, type and shape."""
    while inputs[-1] is None:
        inputs.pop()
    given = [ir.AttrInt64(name, number) for name, number in attributes.items()]
    made = ir.Node(MICROSOFT, op_type, inputs, given, num_outputs=1)
    made.name = names.fresh(f"{name_of(node)}_{op_type}")
    old, new = node.outputs[0], made.outputs[0]
    graph, further = node.graph, added(node)
    assert isinstance(graph, ir.Graph)
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, made)
    if further is not None:
        new.name = names.fresh(f"{old.name}_product")
        plus = ir.Node("", "Add", [new, further], name=names.fresh(f"{name_of(node)}_Add"))
        new = plus.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(node, plus)
    for user, index in old.uses():
        user.replace_input_with(index, new)
    for position, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[position] = new
    name, old.name = old.name, None
    graph.remove(node, safe=True)
    new.name = name
