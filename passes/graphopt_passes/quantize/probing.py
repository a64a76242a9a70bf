"""Ranges of single values by what they do to the outputs of the model.

The squared error of a value says little of what an outlier is worth: one value of lprnet wants a range that clips a
thousandth of it, the last ones of a classifier want every extreme.  So each value is stored in 8 bits by itself, in a
model that is float elsewhere, and the range is kept that disturbs the outputs the least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibrate.formats import Parameters
from graphopt.calibrate.ranges import Method
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.runtime.session import OptimizationLevel, Session
from graphopt.verify.feed_files import Feed
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.quality import leads_off, powers

Wide: TypeAlias = npt.NDArray[np.float64]

METHODS = (Method.BEST, Method.MIN_MAX, Method.PERCENTILE, Method.MOVING_AVERAGE)
"""Ranges that a search starts from."""

FACTORS = (0.5, 0.8, 1.25)
"""What the ends are multiplied with from one trial to the next: at first in strides, that chance does not hide."""

SEARCHED = 0.02
"""Share of all noise from which on a value is worth a search."""

STEPS = 6
"""How often the ends of one value are moved in one direction."""

SURE, LEAST = 1.5, 0.03
"""Standard errors, and share of what there was, by which noise must fall for another range to be taken."""

TRIALS = 3.0
"""How often each sample is run for each value, on average: what a probe takes."""


@dataclasses.dataclass(frozen=True)
class Ranging:
    """How the range of one value is found."""

    method: Method
    factor: float = 1.0


Resolve = Callable[[str, Ranging], Parameters]
"""The parameters of a value under a ranging."""


class Probe:
    """The model with a switch at each value that lets it through as it is, or as it comes back from 8 bits."""

    def __init__(
        self, model: ir.Model, names: Sequence[str], feeds: Iterable[Feed], *, classes: bool
    ) -> None:
        self.classes = classes
        clone = load_model(model)
        self.switches = _switched(clone, names)
        with on_disk(clone) as path:
            self.session = Session(path, level=OptimizationLevel.ALL)
        self.feeds = [feed.values for feed in feeds]
        self.plain = [self._run(values, {}) for values in self.feeds]

    def noise(self, stored: Mapping[str, Parameters]) -> Wide:
        """Amplitude of the noise of each sample, summed over the outputs, with these values in 8 bits."""
        names = list(self.plain[0]) if self.plain else []
        found = [self._run(values, stored) for values in self.feeds]
        total = np.zeros(len(self.feeds))
        for name in names:
            pairs = [
                (ours[name], theirs[name]) for ours, theirs in zip(self.plain, found, strict=True)
            ]
            total += leads_off(pairs) if self.classes else _relative(pairs)
        return total

    def _run(self, values: Mapping[str, Any], stored: Mapping[str, Parameters]) -> dict[str, Any]:
        given = dict(values)
        for name, (switch, scale, zero) in self.switches.items():
            found = stored.get(name)
            given[switch] = np.asarray(found is not None)
            given[scale] = np.asarray(1.0 if found is None else found.scale, np.float32)
            given[zero] = np.asarray(0 if found is None else _unsigned(found), np.uint8)
        return self.session.run(given)


def _relative(pairs: Sequence[tuple[Any, Any]]) -> Wide:
    """Noise of each sample over the mean signal."""
    each = np.array([powers(*pair) for pair in pairs])
    signal = each[:, 0].mean()
    return np.sqrt(each[:, 1] / signal) if signal > 0 else np.zeros(len(each))


def search(probe: Probe, names: Sequence[str], resolve: Resolve) -> dict[str, Ranging]:
    """How to find the ranges of those values whose noise matters, where that lowers it."""
    start = Ranging(Method.BEST)
    noise = {name: probe.noise({name: resolve(name, start)}) for name in names}
    least = SEARCHED * sum(each.sum() for each in noise.values())
    found: dict[str, Ranging] = {}
    for name in names:
        if noise[name].sum() <= least:
            continue

        def asked(each: Ranging, name: str = name) -> Wide:
            return probe.noise({name: resolve(name, each)})

        best = _line(asked, noise[name])
        if best != start:
            found[name] = best
    return found


def _line(noise: Callable[[Ranging], Wide], plain: Wide) -> Ranging:
    """The best method, then its ends moved inwards or outwards, as long as that helps beyond chance."""
    start = best = Ranging(Method.BEST)
    tried = {start: plain}
    for each in map(Ranging, METHODS[1:]):
        tried[each] = noise(each)
        if _is_less(tried[each], tried[start]) and tried[each].sum() < tried[best].sum():
            best = each
    for factor in FACTORS:
        for _ in range(STEPS):
            further = dataclasses.replace(best, factor=best.factor * factor)
            if further in tried:
                break
            tried[further] = noise(further)
            if not _is_less(tried[further], tried[best]):
                break
            best = further
    return best


def _is_less(noise: Wide, other: Wide) -> bool:
    """Whether noise is less, by more than chance: samples vary, and a range shall serve those to come."""
    saved = other - noise
    spread = float(np.sqrt(((saved - saved.mean()) ** 2).sum()))
    return float(saved.sum()) > max(SURE * spread, LEAST * float(other.sum()))


def _unsigned(given: Parameters) -> int:
    """The zero point of the same codes counted from zero."""
    return given.zero_point + (128 if given.format.dtype is ir.DataType.INT8 else 0)


def _switched(model: ir.Model, names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Puts a switch behind each value; returns the inputs that work it: whether, scale, zero point."""
    graph, fresh, wanted = model.graph, Names.of(model), frozenset(names)
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    found = {}
    for value in values:
        name = value.name  # an output hands its name on
        if name in wanted:
            found[name] = _switch(graph, value, fresh)
    return found


def _switch(graph: ir.Graph, value: ir.Value, fresh: Names) -> tuple[str, str, str]:
    uses = tuple(value.uses())
    scalar = ir.Shape([])
    kinds = (ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.UINT8)
    switch, scale, zero = (
        ir.Value(name=fresh.fresh(f"{value.name}_{part}"), type=ir.TensorType(kind), shape=scalar)
        for part, kind in zip(("stored", "scale", "zero"), kinds, strict=True)
    )
    graph.inputs.extend([switch, scale, zero])
    encode = ir.Node("", "QuantizeLinear", [value, scale, zero])
    decode = ir.Node("", "DequantizeLinear", [encode.outputs[0], scale, zero])
    through = ir.Node("", "Identity", [value])
    branches = [
        ir.AttrGraph(name, _branch(nodes, fresh))
        for name, nodes in (("then_branch", [encode, decode]), ("else_branch", [through]))
    ]
    chosen = ir.Node("", "If", [switch], branches)
    result = chosen.outputs[0]
    result.name, result.type, result.shape = (
        fresh.fresh(f"{value.name}_chosen"),
        value.type,
        value.shape,
    )
    for node, index in uses:
        node.replace_input_with(index, result)
    maker = value.producer()
    if maker is not None:
        graph.insert_after(maker, chosen)
    else:
        graph.insert_before(graph[0], chosen)
    for position, output in enumerate(graph.outputs):
        if output is value and maker is not None:
            graph.outputs[position] = result
            result.name, value.name = value.name, result.name
    return switch.name or "", scale.name or "", zero.name or ""


def _branch(nodes: Sequence[ir.Node], fresh: Names) -> ir.Graph:
    for node in nodes:
        node.outputs[0].name = fresh.fresh("probed")
    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=fresh.fresh("probe"))
