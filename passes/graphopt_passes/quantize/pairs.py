"""Writes Q and DQ into a graph, with the constants that they read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.formats import Parameters
from graphopt.ir.build import Names
from graphopt.rewrite import name_of
from graphopt_passes.quantize.kinds import domain_of
from graphopt_passes.quantize.placement import ABSORBED, PRODUCTS, QUANTISED
from graphopt_passes.quantize.shield import maxed


class Pairs:
    """What is written into one graph.

    Attributes:
        graph: where to.
        names: for what is made.
        kinds: element types in use so far.
        stored: scale and zero point of what was decoded.
    """

    def __init__(self, graph: ir.Graph, names: Names, opset: int, *, shielded: bool = True) -> None:
        """Writes for a runtime; `shielded` from what ONNX Runtime does on its own account."""
        self.graph, self.names, self._opset, self._shielded = graph, names, opset, shielded
        self.kinds: set[ir.DataType] = set()
        self.stored: dict[ir.Value, Parameters] = {}

    def needs_domain(self) -> bool:
        """Whether some of it is of com.microsoft."""
        return any(domain_of(kind, self._opset) for kind in self.kinds)

    def behind(self, value: ir.Value, given: Parameters, maker: ir.Node | None) -> ir.Value:
        """A value that was stored, by Q and DQ behind the node that makes it."""
        base, kind = value.name or "value", given.format.dtype
        before = value.producer()
        if self._shielded and before is not None and _is_looked_through(before, kind):
            maker = maxed(value, self.names)
            self.graph.insert_after(before, maker)
            value = maker.outputs[0]
        scale, zero = self._pair(base, given)
        encode = self.node("QuantizeLinear", [value, scale, zero], f"{base}_q", kind)
        encode.outputs[0].type = ir.TensorType(kind)
        decode = self._decoding(encode.outputs[0], scale, zero, base, given)
        for node in (encode, decode):
            node.outputs[0].shape = value.shape
        if maker is not None and maker.graph is self.graph:  # a body may read what is made outside
            self.graph.insert_after(maker, [encode, decode])
        else:
            self.graph.insert_before(self.graph[0], [encode, decode])
        return decode.outputs[0]

    def part_from_moves(self) -> None:
        """Keeps moves from codes that they have no kernels for: the runtime takes a DQ in front of them behind them."""
        for value, given in self.stored.items():
            readers = [] if _has_kernels(given.format.dtype) else value.uses()
            for node, index in [use for use in readers if use.node.op_type in _LOOKED_THROUGH]:
                same = maxed(value, self.names)
                self.graph.insert_before(node, same)
                node.replace_input_with(index, same.outputs[0])

    def decoded(self, codes: ir.Value, like: ir.Value, given: Parameters) -> ir.Value:
        """Codes that a node makes of others, decoded behind it by scale and zero point of what `like` was."""
        source, maker = like.producer(), codes.producer()
        assert source is not None
        assert maker is not None
        scale, zero = source.inputs[1:]
        assert scale is not None
        assert zero is not None
        decode = self._decoding(codes, scale, zero, codes.name or "value", given)
        decode.outputs[0].shape = codes.shape
        self.graph.insert_after(maker, decode)
        return decode.outputs[0]

    def _decoding(
        self, codes: ir.Value, scale: ir.Value, zero: ir.Value, base: str, given: Parameters
    ) -> ir.Node:
        kind = given.format.dtype
        decode = self.node("DequantizeLinear", [codes, scale, zero], f"{base}_dq", kind)
        decode.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self.stored[decode.outputs[0]] = given
        return decode

    def _pair(self, base: str, given: Parameters) -> tuple[ir.Value, ir.Value]:
        scale = np.asarray(given.scale, np.float32)
        zero = np.asarray(given.zero_point, given.format.dtype.numpy())
        return self.held(f"{base}_scale", scale), self.held(f"{base}_zero", zero)

    def held(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant."""
        tensor = ir.tensor(array)
        value = ir.Value(
            name=self.names.fresh(name),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        kind: ir.DataType,
        axis: int | None = None,
    ) -> ir.Node:
        """A Q or DQ of the domain that has the type."""
        given = [] if axis is None else [ir.AttrInt64("axis", axis)]
        self.kinds.add(kind)
        domain = domain_of(kind, self._opset)
        node = ir.Node(domain, op_type, inputs, given, name=self.names.fresh(f"{name}_node"))
        node.outputs[0].name = self.names.fresh(name)
        return node

    def constant(
        self,
        value: ir.Value | None,
        codes: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        before: ir.Node,
        axis: int | None = None,
    ) -> ir.Value:
        """Constant codes, decoded in front of a node; of no value, its bias."""
        base = (value.name if value is not None else None) or f"{name_of(before)}_bias"
        held = [
            self.held(f"{base}_q", codes),
            self.held(f"{base}_scale", scale),
            self.held(f"{base}_zero", zero),
        ]
        kind = ir.DataType.from_numpy(codes.dtype)
        node = self.node("DequantizeLinear", held, f"{base}_dq", kind, axis)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(codes.shape)
        self.graph.insert_before(before, node)
        return node.outputs[0]


def _is_looked_through(node: ir.Node, kind: ir.DataType) -> bool:
    """Whether the runtime does to a node in front of Q what is right for bytes alone.

    It takes a Relu away whose QuantizeLinear has a zero point of 0, also of a float with a sign; it makes sums of bytes
    and moves of what is stored in floats or 4 bits, for which there are no kernels.
    """
    if _has_kernels(kind):
        return False
    passive = QUANTISED - PRODUCTS
    return node.op_type in passive or (node.op_type in ABSORBED and not kind.is_integer())


_LOOKED_THROUGH = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"})


def _has_kernels(kind: ir.DataType) -> bool:
    """Whether the runtime knows what not to fuse around a type: what it cannot add in 16 bits, it leaves in float."""
    return kind.is_integer() and kind.bitwidth >= 8
