"""A factor for each channel in front of products, where nothing before them could carry it.

What a residual sum reads too, and what comes out of GELU or an attention, cannot be scaled where it is made; a few of
its channels may be a hundred times as large as the rest, and one range for all then rounds the rest to nothing.

Before:  q = MatMul(x, Wq)    k = MatMul(x, Wk)    r = SkipLayerNormalization(x, ...)
After:   e = Mul(x, s)    q = MatMul(e, Wq / s)    k = MatMul(e, Wk / s)    r = SkipLayerNormalization(x, ...)

Source: Xiao et al. 2022 (SmoothQuant), with the multiplication written out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.statistics import Statistics
from graphopt.ir.build import Names
from graphopt.rewrite import name_of
from graphopt_passes.quantize import equalize
from graphopt_passes.quantize.equalize import Reading, Scaling, Wide
from graphopt_passes.quantize.lanes import Lane, Reader, Space
from graphopt_passes.quantize.placement import Role, Site

HALVED = 0.5
"""What the predicted noise of the products must fall to: a multiplication takes time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inlet:
    """One value that products read channel by channel multiplied.

    Attributes:
        value: its name.
        result: name of the product with the factors.
        readers: names of the matrix products that read it.
        factors: of its last axis.
    """

    value: str
    result: str
    readers: tuple[str, ...]
    factors: Wide


def plan(
    sites: Mapping[ir.Node, Site], statistics: Mapping[str, Statistics], names: Names
) -> tuple[Inlet, ...]:
    """The values that want factors, by what closed forms say of the noise of the products that read them."""
    stored = {value for site in sites.values() for value in site.held}
    read: dict[ir.Value, list[ir.Node]] = {}
    for node, site in sites.items():
        source = node.inputs[0]
        if site.role is not Role.PRODUCT or node.op_type == "Conv" or source is None:
            continue
        if source not in stored and source.dtype is ir.DataType.FLOAT:
            read.setdefault(source, []).append(node)
    found = []
    for value, nodes in read.items():
        factors = _factors(value, nodes, statistics)
        if factors is not None:
            name = value.name or ""
            readers = tuple(name_of(node) for node in nodes)
            found.append(Inlet(name, names.fresh(f"{name}_evened"), readers, factors))
    return tuple(found)


def _factors(
    value: ir.Value, nodes: Sequence[ir.Node], statistics: Mapping[str, Statistics]
) -> Wide | None:
    """What to multiply the channels with, or None where that would not pay."""
    known = statistics.get(value.name or "")
    ends = None if known is None else known.channel_ranges(-1)
    if ends is None:
        return None
    peaks = np.maximum(-ends[0], ends[1])
    if peaks.max(initial=0.0) <= 0:
        return None
    space = Space(len(peaks))
    lanes = {value: Lane((space,), -1)}
    readings = [Reading.of(Reader(node, 0, 1), lanes, statistics, {}) for node in nodes]
    whole = [each for each in readings if each is not None]
    if len(whole) < len(readings):
        return None
    free = np.full(len(peaks), np.inf)
    return equalize.best_factors(space, whole, peaks / peaks.max(), free, HALVED)


def insert(graph: ir.Graph, inlets: Sequence[Inlet], sites: Collection[str], names: Names) -> None:
    """Multiplies what those products read that are among `sites`, and takes it back in their weights."""
    nodes = {name_of(node): node for node in graph} if inlets else {}
    taken_back: list[Scaling] = []
    for inlet in inlets:
        readers = [nodes[name] for name in inlet.readers if name in sites]
        if not readers:
            continue
        scaled = _multiplied(graph, inlet, readers, names)
        for node in readers:
            factors = equalize.taken_back(Reader(node, 0, 1), 1 / inlet.factors)
            taken_back.append(Scaling(name_of(node), 1, factors))
            node.replace_input_with(0, scaled)
    equalize.apply(graph, taken_back, names)


def _multiplied(
    graph: ir.Graph, inlet: Inlet, readers: Sequence[ir.Node], names: Names
) -> ir.Value:
    """The value times its factors, in front of the first of those who read it."""
    value = readers[0].inputs[0]
    assert value is not None
    assert value.name == inlet.value
    factors = inlet.factors.astype(np.float32)
    held = ir.Value(
        name=names.fresh(f"{inlet.result}_by"),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(factors.shape),
        const_value=ir.tensor(factors),
    )
    graph.register_initializer(held)
    node = ir.Node("", "Mul", [value, held], name=names.fresh(f"{inlet.result}_node"))
    result = node.outputs[0]
    result.name, result.type, result.shape = inlet.result, value.type, value.shape
    first = next(each for each in graph if each in readers)
    graph.insert_before(first, node)
    return result
