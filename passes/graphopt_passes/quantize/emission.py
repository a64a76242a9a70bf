"""Writes a placement into a graph: Q and DQ around values, integer weights and biases."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.formats import Format, Parameters, parameters
from graphopt.calibrate.ranges import Chosen
from graphopt.ir import operators, values
from graphopt.ir.build import Names
from graphopt.rewrite import name_of
from graphopt_passes.quantize import weights
from graphopt_passes.quantize.coded import pack_as
from graphopt_passes.quantize.facts import Facts, Layer
from graphopt_passes.quantize.kinds import BYTES, INTEGERS, least_ir_version
from graphopt_passes.quantize.moves import point_at, reads_codes
from graphopt_passes.quantize.overrides import Override, operator_of
from graphopt_passes.quantize.pairs import Pairs
from graphopt_passes.quantize.parting import make_plain, part
from graphopt_passes.quantize.placement import (
    Allow,
    Role,
    Site,
    clip_bounds,
    place,
    residual_inputs,
)
from graphopt_passes.quantize.reading import (
    addend_of,
    bias_behind,
    bias_of,
    rows_of,
    shape_of,
    unrows,
)
from graphopt_passes.quantize.shield import shield
from graphopt_passes.quantize.styles import MICROSOFT
from graphopt_passes.quantize.unify import unify_joined, unify_operands

BEYOND = 1.125
"""How far values may go beyond what samples reached before products of 7 bits saturate."""


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
        opset = model.graph.opset_imports.get("", 0)
        self.sites = place(self.graph, facts.style, allow, opset, facts.mixed.stated)
        self.pairs = Pairs(self.graph, names, opset, shielded=self.style.stores_outputs)
        self.parameters: dict[ir.Value, Parameters] = {}
        self.methods: dict[ir.Value, Chosen] = {}
        self.decoded: dict[ir.Value, ir.Value] = {}
        self.layers: list[Layer] = []
        self.observed: dict[ir.Value, str] = {}
        self.origins: dict[ir.Value, ir.Value] = {}
        self.converted: dict[ir.Value, ir.Value] = {}
        self.moved: list[ir.Node] = []
        self.plain = frozenset(s.node for s in self.sites.values() if self._is_plain(s))

    def run(self) -> list[Layer]:
        if not self.sites:
            return []
        identities = [] if self.style.stores_outputs else residual_inputs(self.graph, self.sites)
        self._decide(identities)
        for site in self.sites.values():
            self._rewrite(site)
        for node, index in identities:
            self._replace(node, index)
        self._drop_unread()
        if self.style.stores_outputs:
            self.pairs.part_from_moves()
        contrib = self.style.contrib
        shielded = self.style.stores_outputs and shield(self.graph, self.names, contrib=contrib)
        if shielded or self.pairs.needs_domain():
            self.model.opset_imports.setdefault(MICROSOFT, 1)
        self.model.ir_version = max(self.model.ir_version, least_ir_version(self.pairs.kinds))
        return self.layers

    def _decide(self, identities: Sequence[tuple[ir.Node, int]]) -> None:
        """Parameters of every quantised value; values that only move share one."""
        narrow = self._seven_bits() if self.style.saturates else frozenset()
        for site in self.sites.values():
            for index in site.activations:
                self._choose(_input(site, index), narrow)
            if not site.stores:
                continue
            read = self._chosen(site, 0) if site.role is Role.MOVE else None
            for value in site.results:
                if read is not None and read.parameters.format.dtype is self._kind(value):
                    self.parameters[value], self.methods[value] = read.parameters, read
                    self.observed[value] = value.name or ""
                else:
                    self._choose(value, narrow)
        for node, index in identities:
            self._choose(_operand(node, index), narrow)
        if self.style.stores_outputs:
            unify_operands(self.sites, self.parameters)
        else:
            said = self.facts.said
            free = {
                v: p for v, p in self.parameters.items() if said(self.observed[v]) == Override()
            }
            unify_joined(self.graph, free)
            self.parameters.update(free)

    def _kind(self, value: ir.Value) -> ir.DataType:
        return self.facts.kind(self.observed.get(value, value.name or ""))

    def _converts(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether a node reads in 8 bits what is stored for others in an element type without kernels."""
        is_other = name_of(node) not in self.facts.mixed.layers and self.style.activation in BYTES
        return is_other and self._kind(value) not in BYTES

    def _chosen(self, site: Site, index: int) -> Chosen:
        """An activation as a site reads it."""
        value = _input(site, index)
        if self._converts(site.node, value):
            return self.facts.choice(self.observed[value], dtype=self.style.activation)
        return self.methods[value]

    def _is_plain(self, site: Site) -> bool:
        """Whether all that a site reads and stores is of 8 bits, as integer kernels want it."""
        kinds = [self._kind(_input(site, i)) for i in site.activations]
        if self.style.activation in BYTES and name_of(site.node) not in self.facts.mixed.layers:
            kinds = []  # what is stored otherwise is converted first
        kinds += map(self._kind, site.held)
        kinds += [self.facts.weight(name_of(site.node))] if site.role is Role.PRODUCT else []
        return all(kind in BYTES for kind in kinds)

    def _choose(self, value: ir.Value, narrow: frozenset[ir.Value]) -> None:
        if value not in self.parameters:
            self.observed[value] = value.name or ""
            chosen = self.facts.choice(self.observed[value], 7 if value in narrow else None)
            self.parameters[value], self.methods[value] = chosen.parameters, chosen

    def _seven_bits(self) -> frozenset[ir.Value]:
        """Activations to store in 7 bits, because that costs less than coarser weights in all their products."""
        readers: dict[ir.Value, list[Site]] = {}
        fixed: set[ir.Value] = set()
        for site in self.sites.values():
            if site.role is Role.MOVE:
                fixed.update((_input(site, 0), *site.results))
            if site.role is Role.CONCAT:
                fixed.update(_input(site, i) for i in site.activations)
            bounds = clip_bounds(site.absorbed) if site.absorbed is not None else None
            if bounds is not None and np.isfinite(bounds[1]):
                fixed.add(site.result)  # the runtime drops a Clip only where all codes lie within
            if site.role is Role.PRODUCT and self._may_saturate(site) and site.node in self.plain:
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
            for rows in (rows_of(site.node)[0] for site in readers)
        ]
        return extra < sum(coarser) / len(coarser)

    def _may_saturate(self, site: Site) -> bool:
        """Whether pairs of products are added in 16 bits: of signed weights, but for depthwise convolutions."""
        group = operators.attribute(site.node, "group", 1)
        apart = site.node.op_type == "Conv" and group > 1 and rows_of(site.node)[2] == group
        return not apart and self.facts.weight(name_of(site.node)) is ir.DataType.INT8

    def _rewrite(self, site: Site) -> None:
        name = name_of(site.node)  # an output of the model gives its own to what is decoded
        for index in site.activations:
            self._replace(site.node, index)
        if site.role is Role.PRODUCT:
            self._weights(site)
        elif site.role is Role.POINTWISE:
            for index, value in enumerate(site.node.inputs):
                if value is not None and values.is_constant(value):
                    site.node.replace_input_with(index, self._constant(value, site))
        if site.role is Role.MOVE and site.node in self.plain and reads_codes(site.node):
            self._move(site)
        else:
            for value in site.held:
                self._store(value)
        if site.role is not Role.PRODUCT:
            stored = self.methods[site.result]
            self.layers.append(
                Layer(
                    name,
                    site.node.op_type,
                    stored.method,
                    stored.clipped,
                    stored.noise,
                    activations=stored.parameters.format.dtype.name.lower(),
                )
            )

    def _replace(self, node: ir.Node, index: int) -> None:
        """Makes an input of a node read the decoded value."""
        value = node.inputs[index]
        assert value is not None
        value = self.origins.get(value, value)  # its maker may have stored it already
        if self._converts(node, value):
            node.replace_input_with(index, self._narrowed(value))
            return
        if value not in self.decoded:
            self._quantise(value, after=None)
        node.replace_input_with(index, self.decoded[value])

    def _narrowed(self, value: ir.Value) -> ir.Value:
        """A value in 8 bits, beside the element type in which layers read it that were singled out.

        Not behind that: the runtime makes one of two pairs in a row, by rules that are right for bytes.
        """
        if value not in self.converted:
            chosen = self.facts.choice(self.observed[value], dtype=self.style.activation)
            given = chosen.parameters
            self.converted[value] = self.pairs.behind(value, given, value.producer())
            self.origins[self.converted[value]] = value
        return self.converted[value]

    def _store(self, value: ir.Value) -> None:
        """Makes every reader of a value read what was stored; a graph output keeps its name."""
        uses = value.uses()
        maker = value.producer()
        assert maker is not None
        converting = all(n in self.sites and self._converts(n, value) for n, _ in uses)
        if uses and converting and not value.is_graph_output():
            return  # nobody reads it as it would be stored
        self._quantise(value, after=maker)
        self._read_stored(value, uses)

    def _move(self, site: Site) -> None:
        """Makes a node read codes, and others what it makes of them decoded."""
        like = _input(site, 0)
        decode = like.producer()
        assert decode is not None
        codes, _, zero = decode.inputs
        assert codes is not None
        assert zero is not None
        point_at(site.node, codes, zero)
        for value in site.results:
            uses = value.uses()
            value.type = codes.type
            if not uses and not value.is_graph_output():
                continue
            self.decoded[value] = self.pairs.decoded(value, like, self.parameters[value])
            self.origins[self.decoded[value]] = value
            self._read_stored(value, uses)
        self.moved.append(decode)

    def _drop_unread(self) -> None:
        """Takes out what decoded codes that nothing but moving nodes read."""
        for decode in self.moved:
            output = decode.outputs[0]
            if decode.graph is not None and not output.uses() and not output.is_graph_output():
                self.graph.remove(decode, safe=True)

    def _read_stored(self, value: ir.Value, uses: Collection[tuple[ir.Node, int]]) -> None:
        decoded = self.decoded[value]
        for node, index in uses:
            node.replace_input_with(index, decoded)
        for position, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[position] = decoded
                name, value.name = value.name, self.names.fresh(f"{value.name}_float")
                decoded.name = name

    def _quantise(self, value: ir.Value, after: ir.Node | None) -> None:
        maker = after or value.producer()
        self.decoded[value] = self.pairs.behind(value, self.parameters[value], maker)
        self.origins[self.decoded[value]] = value

    def _constant(self, value: ir.Value, site: Site) -> ir.Value:
        """A constant operand of Add or Mul, stored in the element type of the other operand."""
        array = values.array(value)
        assert array is not None
        form = Format(
            self._given(site.node, site.activations[0]).format.dtype, self.style.symmetric
        )
        low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
        from_range = parameters(low, high, form)
        first, last = form.codes
        codes = array.astype(np.float64) / from_range.scale
        codes = codes if form.is_float else np.rint(codes) + from_range.zero_point
        return self.pairs.constant(
            value,
            np.clip(codes, first, last).astype(form.dtype.numpy()),
            np.asarray(from_range.scale, np.float32),
            np.asarray(from_range.zero_point, form.dtype.numpy()),
            site.node,
        )

    def _given(self, node: ir.Node, index: int) -> Parameters:
        """Scale and zero point of what a node reads."""
        value = node.inputs[index]
        assert value is not None
        return self.pairs.stored[value]

    def _weights(self, site: Site) -> None:
        node, shape = site.node, shape_of(site.node)
        rows, axis, _ = rows_of(node)
        source = self.origins[_input(site, 0)]
        given, chosen = self._given(node, 0), self.methods[source]
        if chosen.parameters.format.dtype is not given.format.dtype:
            chosen = self.facts.choice(self.observed[source], dtype=given.format.dtype)
        bias_value = node.inputs[2] if len(node.inputs) > 2 else None
        bias, addend = bias_of(node), addend_of(node)
        beta = make_plain(node)
        if addend is not None:
            bias_value = None
            node.resize_inputs(2)
        packed = self._packed(site, rows, bias, given)
        weight = node.inputs[1]
        assert weight is not None
        node.replace_input_with(1, self._weight(node, weight, packed, axis, shape))
        bias = self._corrected(node, rows, packed, bias, source, math.prod(shape[2:]))
        if bias is None and node.op_type != "MatMul" and node not in self.plain:
            bias = np.zeros(len(packed.scales))
        if bias is not None:
            self._bias(site, bias_value, bias, given, packed)
        self.layers.append(self._told(node, chosen, packed, given))
        if addend is not None:
            part(node, addend, beta, self.pairs)

    def _told(
        self, node: ir.Node, chosen: Chosen, packed: weights.Packed, given: Parameters
    ) -> Layer:
        """What was done to a product."""
        return Layer(
            name_of(node),
            node.op_type,
            chosen.method,
            chosen.clipped,
            chosen.noise,
            packed.noise,
            packed.raised,
            packed.refined,
            given.format.dtype.name.lower(),
            ir.DataType.from_numpy(packed.codes.dtype).name.lower(),
        )

    def _weight(
        self,
        node: ir.Node,
        weight: ir.Value,
        packed: weights.Packed,
        axis: int,
        shape: tuple[int, ...],
    ) -> ir.Value:
        """The decoded weight; of 8-bit floats scaled aside: the runtime would make an integer MatMul, and refuse it."""
        codes = unrows(packed.codes, axis, shape)
        kinds = {self._given(node, 0).format.dtype, ir.DataType.from_numpy(codes.dtype)}
        zero = np.zeros(len(packed.scales), codes.dtype) if packed.zeros is None else packed.zeros
        if node.op_type != "MatMul" or not self.style.stores_outputs or kinds <= INTEGERS:
            return self.pairs.constant(weight, codes, packed.scales, zero, node, axis)
        one, none = np.float32(1), np.zeros((), codes.dtype)
        plain = self.pairs.constant(weight, codes, np.asarray(one), none, node)
        scales = self.pairs.held(f"{weight.name}_scales", packed.scales)
        times = ir.Node("", "Mul", [plain, scales], name=self.names.fresh(f"{weight.name}_times"))
        result = times.outputs[0]
        result.name = self.names.fresh(f"{weight.name}_scaled")
        result.type, result.shape = plain.type, plain.shape
        self.graph.insert_before(node, times)
        return result

    def _packed(
        self, site: Site, rows: np.ndarray, bias: np.ndarray | None, given: Parameters
    ) -> weights.Packed:
        """The weight in integers: for kernels as they need it (what could saturate keeps its codes), else nearest."""
        name, kind = name_of(site.node), self.facts.weight(name_of(site.node))
        names = name, site.node.name or "", operator_of(site.node)
        said = self.facts.overrides.of(*names)
        shared, plain = said.per_channel is False, site.node in self.plain
        hazard = plain and self.style.saturates and self._may_saturate(site)
        bounded = plain and self.style.integer_bias
        least = weights.least_scales(bias, given.scale, rows.shape[1]) if bounded else None
        symmetric = self.facts.symmetric_weight(*names)
        if kind is not ir.DataType.INT8 or not symmetric:
            one = plain and site.node.op_type == "Conv"
            return pack_as(rows, kind, symmetric=symmetric, shared=shared, one=one, least=least)
        top = self._top_code(_input(site, 0), given) if hazard else None
        packed = weights.pack(rows, top_code=top, least=least, shared=shared)
        return packed if hazard else self.facts.refine(name, rows, packed)

    def _top_code(self, decoded: ir.Value, given: Parameters) -> int:
        """The largest code that meets a weight: 7 bits are a range, not a bound, and codes with a sign get 128 more.

        Source: ONNX Runtime 1.31.1, qdq_s8_to_u8.cc; QuantizeLinear clips at the bounds of its type alone.
        """
        if given.format.dtype is not ir.DataType.UINT8:
            return 255
        last = given.format.codes[1]
        found = self.facts.statistics.get(self.observed[self.origins[decoded]])
        if given.format.bits is None or found is None or not math.isfinite(found.maximum):
            return last
        reached = found.maximum * BEYOND / given.scale + given.zero_point
        return int(min(max(math.ceil(reached), last), 255))

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
        found = bias_behind(node, len(shift))
        if found is None:
            return
        user, index, array = found
        held = (array + shift).astype(np.float32)
        shape = user.outputs[0].shape
        apart = self.style.stores_outputs and user.op_type == "Add"
        if apart and shape is not None and len(shape) > 2:
            held = held.reshape(*[1] * (len(shape) - 1), -1)
        user.replace_input_with(index, self.pairs.held(f"{name_of(node)}_bias", held))

    def _bias(
        self,
        site: Site,
        value: ir.Value | None,
        bias: np.ndarray,
        given: Parameters,
        packed: weights.Packed,
    ) -> None:
        node = site.node
        if self.style.stores_outputs and node not in self.plain:
            codes, scales, zero = weights.signs(bias)
            stored = self.pairs.constant(value, codes, scales, zero, node, 0)
        elif not self.style.integer_bias:
            stored = self.pairs.held(f"{name_of(node)}_bias", bias.astype(np.float32))
        else:
            codes, scales = weights.pack_bias(bias, given.scale, packed.scales)
            zero = np.zeros(len(scales), np.int32)
            stored = self.pairs.constant(value, codes, scales, zero, node, 0)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, stored)


def _input(site: Site, index: int) -> ir.Value:
    return _operand(site.node, index)


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
