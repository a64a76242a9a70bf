"""How long nodes take in float and on integers, from a table: the same answer on every run.

Source: single-threaded profiles of ONNX Runtime 1.31.1, models of the zoo and ResNet-50, Intel Sapphire Rapids (VNNI)
and AMD Zen 3 (AVX2).  What matters is which of two is faster and where a way between float and integers pays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from graphopt.calibrate.statistics import Statistics
from graphopt.ir import operators, values
from graphopt_passes.quantize.placement import Role, Site
from graphopt_passes.quantize.reading import columns_of


@dataclasses.dataclass(frozen=True)
class Rates:
    """Nanoseconds of one processor family, one thread.

    Attributes:
        product: of one float multiplication and addition in a convolution or matrix product.
        integer: of one in 8 bits.
        weight: of one float weight that is read for few rows.
    """

    product: float
    integer: float
    weight: float


RATES = {
    "x86-avx2": Rates(0.024, 0.0115, 0.10),
    "x86-vnni": Rates(0.0155, 0.0052, 0.08),
    "arm": Rates(0.040, 0.016, 0.12),
}

NODE = 4_000.0
INTEGER_NODE = 9_000.0
"""Nanoseconds of a node beside what its elements take."""

TAP, NARROW_TAP = 2.4, 8.0
"""Of one position and kernel tap that is copied for an integer convolution; of fewer than eight channels at a time."""

GROUP_TAP, GROUP = 9.5, 20.0
"""The same of a position, kernel tap and group of a convolution in groups, at least of a position and group."""

UNBLOCKED, GENERIC_TAP = 2.2, 15.0
"""How much longer float convolutions take along one or three axes, that no kernel knows blocks of channels for; and of
one position and kernel tap that is copied for an integer one."""

DEPTHWISE, DEPTHWISE_TAP, DEPTHWISE_LANE = 1.0, 4.0, 0.13
ENCODE, DECODE = 0.8, 1.4
"""Of one element between float and integers, in either direction; the layouts of the two differ."""

FEW_FILTERS, SMALL_IMAGE = 11.0, 3.0
"""Filters, and positions along an axis, at which a float convolution takes twice its time."""

PASSIVE, PASSIVE_INTEGER = 0.6, 0.35


def rates_of(style: str) -> Rates:
    """The rates of a style; of an unknown one those of the slowest x86."""
    return RATES.get(style.split(maxsplit=1)[0], RATES["x86-avx2"])


class Costs:
    """Predicted times of one model on one processor family."""

    def __init__(
        self,
        statistics: Mapping[str, Statistics],
        rates: Rates,
        decoded: Callable[[ir.Node], bool] = lambda _node: False,
        multiplied: frozenset[str] = frozenset(),
    ) -> None:
        """`decoded` says which nodes no integer kernel takes: they compute in float, from decoded weights.

        `multiplied` are names of values that are made for integers only: factors in front of products.
        """
        self._statistics, self._rates, self._decoded = statistics, rates, decoded
        self._multiplied = multiplied

    def elements(self, value: ir.Value | None) -> float:
        """Elements of a value in one sample, as observed."""
        found = self._statistics.get(value.name or "") if value is not None else None
        if found is None or found.samples == 0:
            shape = value.shape if value is not None else None
            return float(
                math.prod(d for d in shape or () if isinstance(d, int)) if shape is not None else 1
            )
        return found.elements / found.samples

    def gain(self, sites: Mapping[ir.Node, Site], whole: Mapping[ir.Node, Site]) -> float:
        """Nanoseconds a run that integers save at `sites`; what of `whole` is not among them stays float."""
        saved = 0.0
        for node, site in sites.items():
            saved += self._float(whole.get(node, site)) - self._integer(site)
        return saved - self._edges(sites)

    def plain(self, whole: Mapping[ir.Node, Site]) -> float:
        """Nanoseconds of all sites in float."""
        return sum(self._float(site) for site in whole.values())

    def beside(self, graph: ir.Graph, whole: Mapping[ir.Node, Site]) -> float:
        """Nanoseconds of the nodes that are no sites, which integers do not change, as far as sizes are known."""
        inside = {id(node) for node in whole} | {id(site.absorbed) for site in whole.values()}
        return sum(self._computed(node) for node in graph if id(node) not in inside)

    def _computed(self, node: ir.Node) -> float:
        if node.op_type == "Constant" or not node.outputs:
            return 0.0
        if node.outputs[0].name in self._multiplied:
            return 0.0
        elements = self.elements(node.outputs[0])
        shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
        depth = shape[-1] if node.op_type == "MatMul" and shape else 0
        each = depth * self._rates.product if isinstance(depth, int) else 0.0
        return max(each, PASSIVE) * elements + NODE

    def _edges(self, sites: Mapping[ir.Node, Site]) -> float:
        """What encoding and decoding between the two costs."""
        stored = {value: site for site in sites.values() for value in site.held}
        encoded: set[ir.Value] = set()
        total = 0.0
        for site in sites.values():
            for index in site.activations:
                value = site.node.inputs[index]
                if value is not None and value not in stored and value not in encoded:
                    encoded.add(value)
                    total += ENCODE * self.elements(value) + NODE
                    if value.name in self._multiplied:
                        total += PASSIVE * self.elements(value) + NODE
        for value, site in stored.items():
            outside = value.is_graph_output() or any(
                use.node not in sites and use.node is not site.absorbed for use in value.uses()
            )
            if outside:
                total += DECODE * self.elements(value) + NODE
        return total

    def _float(self, site: Site) -> float:
        if site.role is not Role.PRODUCT:
            return PASSIVE * self._all(site) + NODE
        if _depthwise(site.node):
            return DEPTHWISE * self.elements(site.result) + NODE
        work, weights = self._work(site)
        return (
            max(work * self._rates.product * self._shape(site), weights * self._rates.weight) + NODE
        )

    def _shape(self, site: Site) -> float:
        """How much slower a float convolution is for few filters, alone or in groups, a small image, or other axes."""
        tensor = values.constant(site.node.inputs[1])
        if site.node.op_type != "Conv" or tensor is None:
            return 1.0
        shape = tensor.shape.numpy()
        filters = max(int(shape[0]), 1)
        width = math.sqrt(max(self.elements(site.result) / filters, 1.0))
        few = FEW_FILTERS * operators.attribute(site.node, "group", 1) / filters
        return (1 + few + SMALL_IMAGE / width) * (1 if len(shape) == 4 else UNBLOCKED)

    def _all(self, site: Site) -> float:
        return sum(map(self.elements, site.results))

    def _made(self, site: Site) -> float:
        """Elements of what a site computes; of a dense product by what it reads, whose sizes are observed."""
        if site.role is not Role.PRODUCT or site.node.op_type == "Conv":
            return self._all(site)
        work, weights = self._work(site)
        tensor = values.constant(site.node.inputs[1])
        assert tensor is not None
        columns = columns_of(site.node)
        return work * columns / max(weights, 1.0)

    def _integer(self, site: Site) -> float:
        elements = self._made(site)
        if self._decoded(site.node):
            coded = self._work(site)[1] if site.role is Role.PRODUCT else 0.0
            return self._float(site) + DECODE * coded + (ENCODE + DECODE) * elements
        if site.role is not Role.PRODUCT:
            return PASSIVE_INTEGER * elements + NODE
        tensor = values.constant(site.node.inputs[1])
        assert tensor is not None
        shape = tensor.shape.numpy()
        taps = math.prod(shape[2:]) if site.node.op_type == "Conv" else 1
        positions = elements / max(int(shape[0]), 1)
        if _depthwise(site.node):
            lanes = DEPTHWISE_TAP + DEPTHWISE_LANE * int(shape[0])
            return positions * taps * lanes + INTEGER_NODE
        work, weights = self._work(site)
        copies = positions * _copied(site.node, tuple(int(d) for d in shape))
        product = max(work * self._rates.integer, weights * self._rates.weight / 4)
        return product + copies + 0.15 * elements + INTEGER_NODE

    def _work(self, site: Site) -> tuple[float, float]:
        """Multiplications in one sample, and weights."""
        node = site.node
        tensor = values.constant(node.inputs[1])
        assert tensor is not None
        if node.op_type == "Conv":
            each = math.prod(tensor.shape.numpy()[1:])
            return self.elements(site.result) * each, float(tensor.size)
        columns = columns_of(node)
        return self.elements(node.inputs[0]) * int(columns), float(tensor.size)


def _copied(node: ir.Node, shape: tuple[int, ...]) -> float:
    """Nanoseconds of one position that is copied for an integer convolution with a weight of these sizes."""
    if node.op_type != "Conv":
        return 0.0
    taps, group = math.prod(shape[2:]), operators.attribute(node, "group", 1)
    if group > 1:
        return float(group * max(taps * GROUP_TAP, GROUP))
    if taps == 1:
        return 0.0
    if len(shape) != 4:
        return taps * GENERIC_TAP
    return taps * (NARROW_TAP if shape[1] < 8 else TAP)


def _depthwise(node: ir.Node) -> bool:
    if node.op_type != "Conv":
        return False
    tensor = values.constant(node.inputs[1])
    group = operators.attribute(node, "group", 1)
    return tensor is not None and group > 1 and tensor.shape[1] == 1
