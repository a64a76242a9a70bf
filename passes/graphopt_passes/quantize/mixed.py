"""Layers and values that a recipe wants in other element types than the rest.

A layer in 16 bits reads and stores 16 bits; others that read the same value get it in 8 bits behind it:
    x -> Q16 -> DQ16 -> layer
                DQ16 -> Q8 -> DQ8 -> other layer
No kernel multiplies 16-bit integers: the layer computes in float between what was stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from graphopt.rewrite import name_of
from graphopt_passes.quantize.kinds import BYTES
from graphopt_passes.quantize.overrides import Override, Overrides, operator_of
from graphopt_passes.quantize.placement import Role, Site, is_passive, place
from graphopt_passes.quantize.styles import Style


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """What a recipe says of the layers of one graph, by name.

    Attributes:
        layers: names of those in element types that no integer kernel takes; they stay where they are wanted.
        weights: element types of weights, by name of the layer.
        values: what is said of a value by who reads or makes it; what is said of the value itself goes before.
        stated: names of sums, pools and moves that were named in full, and are stored so wherever they stand.
    """

    layers: frozenset[str] = frozenset()
    weights: Mapping[str, ir.DataType] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    stated: frozenset[str] = frozenset()


def mixed_of(graph: ir.Graph, style: Style, overrides: Overrides, opset: int) -> Mixed:
    """What the overrides say of the layers of a graph."""
    if not overrides.rules:
        return Mixed()
    stated = _stated(graph, overrides, opset) if style.stores_outputs else frozenset()
    sites = place(graph, style, lambda _node: True, opset, stated)
    stored = {value for site in sites.values() for value in site.held}
    layers: set[str] = set()
    weights: dict[str, ir.DataType] = {}
    found: dict[str, Override] = {}
    for node, site in sites.items():
        said = overrides.of(node.name or "", name_of(node), *_results(site), operator_of(node))
        is_kept = site.role is Role.PRODUCT or name_of(node) in stated or _is_passed_on(said)
        if said.exclude or not is_kept:
            continue
        read = [value for index in site.activations if (value := node.inputs[index]) is not None]
        kinds = {said.dtype, said.weight} - BYTES - {None}
        if said.dtype not in BYTES and said.dtype is not None:
            for value in (*read, *site.held):
                _add(found, value, Override(dtype=said.dtype))
        else:
            for value in site.held:  # under the name that it has in front of its activation, too
                _add(found, value, _of_value(overrides.of(name_of(node), *_results(site))))
            for value in read:
                _add(found, value, _of_reader(overrides, node, site))
        if site.role is Role.PRODUCT and said.weight is not None:
            weights[name_of(node)] = said.weight
        alone = [overrides.of(v.name or "").dtype for v in read if v not in stored]
        if kinds or any(kind is not None and kind not in BYTES for kind in alone):
            layers.add(name_of(node))
    return Mixed(frozenset(layers), weights, found, stated)


def _stated(graph: ir.Graph, overrides: Overrides, opset: int) -> frozenset[str]:
    """Nodes beside products that a rule names in full, in an element type that no kernel computes in.

    A pattern speaks of what lies between integers only: it may hold for more than was thought of.
    """
    wanted = {pattern for pattern, said in overrides.rules if said.dtype not in (None, *BYTES)}
    found = set()
    for node in graph:
        names = {node.name or "", *(value.name or "" for value in node.outputs)}
        if names.isdisjoint(wanted) or not is_passive(node, opset):
            continue
        if not overrides.of(*sorted(names)).exclude:
            found.add(name_of(node))
    return frozenset(found)


def _is_passed_on(said: Override) -> bool:
    """Whether what lies between products may be stored so: the runtime takes others for bytes."""
    return said.dtype is None or (said.dtype.is_integer() and said.dtype.bitwidth >= 8)


def _of_reader(overrides: Overrides, node: ir.Node, site: Site) -> Override:
    """What a name of a node or its operator says of what it reads; a name of its result speaks of that."""
    results = {name_of(node), *_results(site)}
    names = {node.name or ""} - results - {""}
    rules = tuple(
        (pattern, said)
        for pattern, said in overrides.rules
        if not overrides.hits(pattern, *results)
    )
    return _of_value(dataclasses.replace(overrides, rules=rules).of(*names, operator_of(node)))


def _of_value(said: Override) -> Override:
    """What of an override is about values."""
    return dataclasses.replace(
        said, exclude=None, weight=None, per_channel=None, symmetric_weights=None
    )


def _results(site: Site) -> tuple[str, ...]:
    return tuple(value.name or "" for value in site.results)


def _add(found: dict[str, Override], value: ir.Value, said: Override) -> None:
    if said != Override():
        name = value.name or ""
        found[name] = found.get(name, Override()).with_stated(said)
