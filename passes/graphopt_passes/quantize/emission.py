"""Writes a placement into a graph: Q and DQ around values, integer weights and biases."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.formats import Format, Parameters, parameters
from graphopt.calibrate.ranges import Chosen
from graphopt.ir import operators, values
from graphopt.ir.build import Names
from graphopt_passes.quantize import weights
from graphopt_passes.quantize.facts import Facts, Layer
from graphopt_passes.quantize.placement import (
    Allow,
    Role,
    Site,
    clip_bounds,
    place,
    residual_inputs,
)
from graphopt_passes.quantize.styles import Style


def candidates(graph: ir.Graph, style: Style, allow: Allow) -> tuple[str, ...]:
    """Names of all values that a placement may quantise: those to be observed."""
    sites = place(graph, style, allow)
    found: dict[str, None] = {}
    for site in sites.values():
        for index in site.activations:
            value = site.node.inputs[index]
            assert value is not None
            found[value.name or ""] = None
        if site.stores:
            found[site.result.name or ""] = None
    for node, index in [] if style.stores_outputs else residual_inputs(graph, sites):
        value = node.inputs[index]
        assert value is not None
        found[value.name or ""] = None
    return tuple(found)


def quantize(
    model: ir.Model, facts: Facts, allow: Allow, names: Names, body: ir.Graph | None = None
) -> list[Layer]:
    """Quantises the main graph of `model` in place, or one of its bodies; returns what was done, a layer each."""
    return _Emitter(model, facts, allow, names, body).run()


class _Emitter:
    """One emission: parameters first, then nodes."""

    def __init__(
        self,
        model: ir.Model,
        facts: Facts,
        allow: Allow,
        names: Names,
        body: ir.Graph | None,
    ) -> None:
        self.model, self.facts, self.names = model, facts, names
        self.graph = model.graph if body is None else body
        self.style = facts.style
        self.sites = place(self.graph, facts.style, allow, model.opset_imports.get("", 0))
        self.domain = "" if model.graph.opset_imports.get("", 0) >= 13 else "com.microsoft"
        self.parameters: dict[ir.Value, Parameters] = {}
        self.methods: dict[ir.Value, Chosen] = {}
        self.decoded: dict[ir.Value, ir.Value] = {}
        self.layers: list[Layer] = []
        self.observed: dict[ir.Value, str] = {}
        self.origins: dict[ir.Value, ir.Value] = {}

    def run(self) -> list[Layer]:
        if not self.sites:
            return []
        identities = [] if self.style.stores_outputs else residual_inputs(self.graph, self.sites)
        self._decide()
        for site in self.sites.values():
            self._rewrite(site)
        for node, index in identities:
            self._replace(node, index)
        if self.domain:
            self.model.opset_imports.setdefault(self.domain, 1)
        return self.layers

    def _decide(self) -> None:
        """Parameters of every quantised value; values that only move share one."""
        narrow = self._seven_bits() if self.style.saturates else frozenset()
        for site in self.sites.values():
            for index in site.activations:
                self._choose(_input(site, index), narrow)
            if not site.stores:
                continue
            if site.role is Role.MOVE:
                source = _input(site, 0)
                self.parameters[site.result] = self.parameters[source]
                self.methods[site.result] = self.methods[source]
                self.observed[site.result] = site.result.name or ""
            else:
                self._choose(site.result, narrow)
        self._unify()

    def _choose(self, value: ir.Value, narrow: frozenset[ir.Value]) -> None:
        if value not in self.parameters:
            self.observed[value] = value.name or ""
            chosen = self.facts.choice(self.observed[value], 7 if value in narrow else None)
            self.parameters[value], self.methods[value] = chosen.parameters, chosen

    def _unify(self) -> None:
        """Operands of a Concat take its scale where nobody else reads them and no Relu hangs on their zero point."""
        for site in self.sites.values():
            if site.role is not Role.CONCAT:
                continue
            shared = self.parameters[site.result]
            first = shared.format.codes[0]
            for index in site.activations:
                value = _input(site, index)
                maker = next((s for s in self.sites.values() if s.result is value), None)
                if maker is None or maker.role is Role.MOVE or len(value.uses()) > 1:
                    continue
                if maker.absorbed is None or shared.zero_point == first:
                    self.parameters[value] = shared

    def _seven_bits(self) -> frozenset[ir.Value]:
        """Activations to store in 7 bits, because that costs less than coarser weights in all their products."""
        readers: dict[ir.Value, list[Site]] = {}
        fixed: set[ir.Value] = set()
        for site in self.sites.values():
            if site.role is Role.MOVE:
                fixed.update((_input(site, 0), site.result))
            if site.role is Role.CONCAT:
                fixed.update(_input(site, i) for i in site.activations)
            bounds = clip_bounds(site.absorbed) if site.absorbed is not None else None
            if bounds is not None and np.isfinite(bounds[1]):
                fixed.add(site.result)  # the runtime drops a Clip only where all codes lie within
            if site.role is Role.PRODUCT and self._may_saturate(site):
                readers.setdefault(_input(site, 0), []).append(site)
        return frozenset(
            value
            for value, used in readers.items()
            if value not in fixed and self._pays(value, used)
        )

    def _pays(self, value: ir.Value, readers: list[Site]) -> bool:
        name = value.name or ""
        extra = self.facts.choice(name, 7).noise - self.facts.choice(name).noise
        coarser = [
            weights.pack(rows, top_code=255).noise - weights.pack(rows, top_code=None).noise
            for rows in (_rows(site.node)[0] for site in readers)
        ]
        return extra < sum(coarser) / len(coarser)

    @staticmethod
    def _may_saturate(site: Site) -> bool:
        """Whether pairs of products are added in 16 bits: not in the kernel for depthwise convolutions."""
        group = operators.attribute(site.node, "group", 1)
        return not (site.node.op_type == "Conv" and group > 1 and _rows(site.node)[2] == group)

    def _rewrite(self, site: Site) -> None:
        for index in site.activations:
            self._replace(site.node, index)
        if site.role is Role.PRODUCT:
            self._weights(site)
        elif site.role is Role.POINTWISE:
            for index, value in enumerate(site.node.inputs):
                if value is not None and values.is_constant(value):
                    site.node.replace_input_with(index, self._constant(value, site))
        if site.stores:
            self._store(site.result)
        if site.role is not Role.PRODUCT:
            stored = self.methods[site.result]
            self.layers.append(
                Layer(
                    _name(site.node), site.node.op_type, stored.method, stored.clipped, stored.noise
                )
            )

    def _replace(self, node: ir.Node, index: int) -> None:
        """Makes an input of a node read the decoded value."""
        value = node.inputs[index]
        assert value is not None
        if value in self.origins:
            return  # its maker has stored it already
        if value not in self.decoded:
            self._choose(value, frozenset())
            self._quantise(value, after=None)
        node.replace_input_with(index, self.decoded[value])

    def _store(self, value: ir.Value) -> None:
        """Makes every reader of a value read what was stored; a graph output keeps its name."""
        uses = value.uses()
        maker = value.producer()
        assert maker is not None
        self._quantise(value, after=maker)
        decoded = self.decoded[value]
        for node, index in uses:
            node.replace_input_with(index, decoded)
        for position, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[position] = decoded
                name, value.name = value.name, self.names.fresh(f"{value.name}_float")
                decoded.name = name

    def _quantise(self, value: ir.Value, after: ir.Node | None) -> None:
        base = value.name or "value"
        given = self.parameters[value]
        scale, zero = self._pair(base, np.float32(given.scale), given)
        encode = self._node("QuantizeLinear", [value, scale, zero], f"{base}_q")
        encode.outputs[0].type = ir.TensorType(given.format.dtype)
        decode = self._node("DequantizeLinear", [encode.outputs[0], scale, zero], f"{base}_dq")
        decode.outputs[0].type = value.type
        for node in (encode, decode):
            node.outputs[0].shape = value.shape
        maker = after or value.producer()
        if maker is not None and maker.graph is self.graph:  # a body may read what is made outside
            self.graph.insert_after(maker, [encode, decode])
        else:
            self.graph.insert_before(self.graph[0], [encode, decode])
        self.decoded[value] = decode.outputs[0]
        self.origins[decode.outputs[0]] = value

    def _pair(
        self, base: str, scale: np.ndarray | np.float32, given: Parameters
    ) -> tuple[ir.Value, ir.Value]:
        zero = np.asarray(given.zero_point, given.format.dtype.numpy())
        return self._held(f"{base}_scale", np.asarray(scale)), self._held(f"{base}_zero", zero)

    def _held(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array)
        value = ir.Value(
            name=self.names.fresh(name),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def _node(
        self, op_type: str, inputs: list[ir.Value], name: str, axis: int | None = None
    ) -> ir.Node:
        given = [] if axis is None else [ir.AttrInt64("axis", axis)]
        node = ir.Node(self.domain, op_type, inputs, given, name=self.names.fresh(f"{name}_node"))
        node.outputs[0].name = self.names.fresh(name)
        return node

    def _constant(self, value: ir.Value, site: Site) -> ir.Value:
        """A constant operand of Add or Mul, stored in the element type of the activations."""
        array = values.array(value)
        assert array is not None
        form = Format(self.style.activation, self.style.symmetric)
        low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
        from_range = parameters(low, high, form)
        first, last = form.codes
        codes = np.rint(array.astype(np.float64) / from_range.scale) + from_range.zero_point
        return self._decode(
            value,
            np.clip(codes, first, last).astype(form.dtype.numpy()),
            np.asarray(from_range.scale, np.float32),
            np.asarray(from_range.zero_point, form.dtype.numpy()),
            site.node,
        )

    def _decode(
        self,
        value: ir.Value | None,
        codes: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        before: ir.Node,
        axis: int | None = None,
    ) -> ir.Value:
        base = (value.name if value is not None else None) or f"{_name(before)}_bias"
        held = [
            self._held(f"{base}_q", codes),
            self._held(f"{base}_scale", scale),
            self._held(f"{base}_zero", zero),
        ]
        node = self._node("DequantizeLinear", held, f"{base}_dq", axis)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(codes.shape)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _weights(self, site: Site) -> None:
        node, shape = site.node, _shape(site.node)
        rows, axis, _ = _rows(node)
        source = self.origins[_input(site, 0)]
        given = self.parameters[source]
        bias_value = node.inputs[2] if len(node.inputs) > 2 else None
        bias = values.array(bias_value)
        bias = None if bias is None else bias.reshape(-1).astype(np.float64)
        hazard = self.style.saturates and self._may_saturate(site)
        least = (
            weights.least_scales(bias, given.scale, rows.shape[1])
            if self.style.integer_bias
            else None
        )
        top = given.format.codes[1] if hazard else None
        said = self.facts.overrides.of(_name(node), node.name or "")
        packed = weights.pack(rows, top_code=top, least=least, shared=said.per_channel is False)
        if top is None:  # what must not saturate keeps its codes
            packed = self.facts.refine(_name(node), rows, packed)
        weight = node.inputs[1]
        assert weight is not None
        codes = _unrows(packed.codes, axis, shape)
        zero = np.zeros(len(packed.scales), np.int8)
        node.replace_input_with(1, self._decode(weight, codes, packed.scales, zero, node, axis))
        bias = self._corrected(node, rows, packed, bias, source, math.prod(shape[2:]))
        if bias is not None:
            self._bias(node, bias_value, bias, given, packed)
        chosen = self.methods[source]
        self.layers.append(
            Layer(
                _name(node),
                node.op_type,
                chosen.method,
                chosen.clipped,
                chosen.noise,
                packed.noise,
                packed.raised,
                packed.refined,
            )
        )

    def _corrected(
        self,
        node: ir.Node,
        rows: np.ndarray,
        packed: weights.Packed,
        bias: np.ndarray | None,
        source: ir.Value,
        taps: int,
    ) -> np.ndarray | None:
        """The bias with what the rounding of the weights takes on average; that of a MatMul is the Add behind it."""
        found = self.facts.statistics.get(self.observed[source])
        if found is None:
            return bias
        is_conv = node.op_type == "Conv"
        group = operators.attribute(node, "group", 1) if is_conv else 1
        shift = weights.bias_shift(
            rows, packed, found.channel_means(1 if is_conv else -1), taps, group
        )
        if node.op_type == "MatMul":
            self._give_back(node, np.zeros(rows.shape[0]) if shift is None else shift)
            return None
        if shift is None:
            return bias
        return shift if bias is None else bias + shift

    def _give_back(self, node: ir.Node, shift: np.ndarray) -> None:
        """Adds the shift to the bias that alone reads a MatMul; where there is none, nothing is given back.

        A vector would make a Gemm of the two in the runtime, before it looks at Q and DQ, if it knows all sizes; with
        an axis more than it takes for a bias, they stay apart.
        """
        found = _bias_behind(node, len(shift))
        if found is None:
            return
        user, index, array = found
        held = (array + shift).astype(np.float32)
        shape = user.outputs[0].shape
        apart = self.style.stores_outputs and user.op_type == "Add"
        if apart and shape is not None and len(shape) > 2:
            held = held.reshape(*[1] * (len(shape) - 1), -1)
        user.replace_input_with(index, self._held(f"{_name(node)}_bias", held))

    def _bias(
        self,
        node: ir.Node,
        value: ir.Value | None,
        bias: np.ndarray,
        given: Parameters,
        packed: weights.Packed,
    ) -> None:
        if not self.style.integer_bias:
            stored = self._held(f"{_name(node)}_bias", bias.astype(np.float32))
        else:
            codes, scales = weights.pack_bias(bias, given.scale, packed.scales)
            zero = np.zeros(len(scales), np.int32)
            stored = self._decode(value, codes, scales, zero, node, 0)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, stored)


def _bias_behind(node: ir.Node, size: int) -> tuple[ir.Node, int, np.ndarray] | None:
    """What adds a constant vector to the output of a MatMul, and nothing else reads it: node, operand, vector."""
    output = node.outputs[0]
    uses = tuple(output.uses())
    if output.is_graph_output() or len(uses) != 1 or uses[0].node.graph is not node.graph:
        return None
    user, index = uses[0].node, uses[0].idx
    if (user.domain, user.op_type) == ("", "Add"):
        bias = 1 - index
    elif user.domain == "com.microsoft" and user.op_type in BIASES and index == 0:
        bias = BIASES[user.op_type]
    else:
        return None
    array = values.array(user.inputs[bias]) if len(user.inputs) > bias else None
    if array is None or array.shape != (size,):
        return None
    return user, bias, array.astype(np.float64)


BIASES = {"BiasGelu": 1, "FastGelu": 1, "SkipLayerNormalization": 4}
"""Fused operators that add a vector to their first input: which operand it is."""


def _input(site: Site, index: int) -> ir.Value:
    value = site.node.inputs[index]
    assert value is not None
    return value


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or node.name or ""


def _shape(node: ir.Node) -> tuple[int, ...]:
    weight = values.constant(node.inputs[1])
    assert weight is not None
    return tuple(weight.shape.numpy())


def _rows(node: ir.Node) -> tuple[np.ndarray, int, int]:
    """The weight with one row an output channel, the axis of the channels, and how many there are."""
    array = values.array(node.inputs[1])
    assert array is not None
    if node.op_type == "Conv":
        return array.reshape(array.shape[0], -1), 0, array.shape[0]
    if node.op_type == "Gemm" and operators.attribute(node, "transB", 0):
        return array, 0, array.shape[0]
    return array.T, 1, array.shape[1]


def _unrows(codes: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes of `_rows` in the layout of the weight, whose channels lie on `axis`."""
    return codes.reshape(shape) if axis == 0 else np.ascontiguousarray(codes.T)
