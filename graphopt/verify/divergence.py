"""Where two models part: the first value that both have and compute differently, and what feeds it.

Values are found again by name: a rewrite hands the name of what it replaces to its replacement, so a name that both
models have stands for the same quantity. Of a value that is gone, the engine keeps what was put in its place. Values of
subgraphs and functions belong to the node that runs them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir import scopes
from graphopt.ir.model_file import load_model
from graphopt.runtime.in_memory import model_session
from graphopt.verify.compare import OutputReport, compare
from graphopt.verify.kept import kept_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graphopt.verify.compare import Profile
    from graphopt.verify.feeds import Feed

_AT_A_TIME = 400
"""Values that one run brings to Python."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first value on which a candidate parts from the reference.

    Attributes:
        value: its name.
        stands: the name of what stands in its place in the candidate; mostly the same.
        operator: what computes it in the candidate.
        report: how it compares.
        boundary: values that both models have, on which they agree, and from which the value follows in either.
        region: names of the values between those and this one, in either model, this one included.
        spread: how many values after this one differ too.
        captured: the reference's numbers of the boundary and of the value.
    """

    value: str
    stands: str
    operator: str
    report: OutputReport
    boundary: tuple[str, ...]
    region: frozenset[str]
    spread: int
    captured: Mapping[str, Any]


@dataclasses.dataclass
class Truth:
    """A reference whose values are computed once for each feed, however many candidates are compared with them.

    Attributes:
        file: the reference.
        kept: folder of values that earlier runs gave; None to keep none.
        held: its values by feed.
    """

    file: Path
    kept: Path | None = None
    held: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def on(self, feed: Feed, graph: ir.Model) -> dict[str, Any]:
        """Every value of the main graph on a feed.

        Raises:
            GraphoptError: the reference cannot be run with its values shown.
        """
        if feed.name not in self.held:
            names = list(_values(graph.graph))
            kept = kept_values(self.kept, graph, names)
            found = None if kept is None else kept.find(feed.values)
            if found is None:
                found = _tap(graph, feed, names)
                if kept is not None:
                    kept.keep(feed.values, found)
            self.held[feed.name] = found
        return self.held[feed.name]


def first_divergence(
    reference: Truth,
    candidate: Path,
    feed: Feed,
    profile: Profile,
    became: Mapping[str, str] | None = None,
) -> Divergence | None:
    """The first value that differs on `feed`, in the candidate's order; None where none that both have does.

    Args:
        reference: the original.
        candidate: the file of what stands in its place.
        feed: inputs on which outputs differ.
        profile: when two values differ.
        became: values of the original that are gone, and what was put in their place.
    """
    graphs = [load_model(path) for path in (reference.file, candidate)]
    left, right = (_values(model.graph) for model in graphs)
    try:
        truth, reports = _side_by_side(reference, graphs, feed, profile, became or {})
    except GraphoptError:
        return None
    wrong = [name for name, (_, report) in reports.items() if not report.passed]
    if not wrong:
        return None
    first = wrong[0]
    stands, report = reports[first]
    passed = {name for name, (other, found) in reports.items() if found.passed and name == other}
    agreeing = passed | set(feed.values)
    parts = [_behind(values[name], agreeing) for values, name in ((left, first), (right, stands))]
    boundary = tuple(dict.fromkeys(name for found, _ in parts for name in found))
    numbers = {**truth, **feed.values}
    producer = right[stands].producer()
    return Divergence(
        first,
        stands,
        producer.op_type if producer else "",
        report,
        boundary,
        frozenset(name for _, region in parts for name in region),
        len(wrong) - 1,
        {name: numbers[name] for name in (*boundary, first)},
    )


def errors_along(
    reference: Truth, candidate: Path, feed: Feed, profile: Profile
) -> list[tuple[str, OutputReport]]:
    """Every value that both models have, in the candidate's order, with its operator and how it compares on `feed`.

    Raises:
        GraphoptError: one of the models cannot be run with its values shown.
    """
    graphs = [load_model(path) for path in (reference.file, candidate)]
    makers = {name: value.producer() for name, value in _values(graphs[1].graph).items()}
    _, reports = _side_by_side(reference, graphs, feed, profile, {})
    return [
        (node.op_type if (node := makers[name]) else "", report)
        for name, (_, report) in reports.items()
    ]


def _side_by_side(
    reference: Truth,
    graphs: Sequence[ir.Model],
    feed: Feed,
    profile: Profile,
    became: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, tuple[str, OutputReport]]]:
    """The first model's values, and by name what the second has for them and how that compares, in its order."""
    left, right = (_values(model.graph) for model in graphs)
    gone: dict[str, list[str]] = {}
    for name in left:
        stands = _now(name, became)
        if name not in right and stands in right:
            gone.setdefault(stands, []).append(name)
    pairs = [
        (name, other)
        for other in right
        for name in (*([other] if other in left else ()), *gone.get(other, ()))
    ]
    truth = reference.on(feed, graphs[0])
    found = _tap(graphs[1], feed, list(dict.fromkeys(other for _, other in pairs)))
    reports = {
        name: (other, compare(name, truth[name], found[other], profile)) for name, other in pairs
    }
    return truth, reports


def _now(name: str, became: Mapping[str, str]) -> str:
    """What stands for a value after all replacements."""
    seen = {name}
    while (after := became.get(name)) is not None and after not in seen:
        seen.add(after)
        name = after
    return name


def agrees_at(
    reference: Divergence,
    model: ir.Model,
    feed: Feed,
    profile: Profile,
    became: Mapping[str, str] | None = None,
) -> bool:
    """Whether a candidate computes the value on which another one parted; False where it has no such value.

    Only the part between the boundary and the value is run, where the candidate still has that boundary.  `became` says
    what the candidate has in place of values that are gone from it.
    """
    held = _values(model.graph)
    name = reference.value
    stands = name if name in held else _now(name, became or {})
    if stands not in held:
        return False
    reference = dataclasses.replace(reference, stands=stands)
    truth = reference.captured[name]
    try:
        part = cut(model, reference)
        found = model_session(part).run(
            {v.name or "": reference.captured[v.name or ""] for v in part.graph.inputs}
        )
    except (GraphoptError, ValueError):  # ValueError: the boundary does not cut the value off
        try:
            found = {name: _tap(model, feed, [stands])[stands]}
        except GraphoptError:
            return False
    return compare(name, truth, found[name], profile).passed


def cut(model: ir.Model, found: Divergence) -> ir.Model:
    """The part of a model that computes the diverging value from the boundary, as a model of its own."""
    names = set(_values(model.graph)) | {value.name for value in model.graph.inputs}
    for name in found.boundary:
        _state_type(model.graph, name, found.captured[name])
    output = found.value if found.value in names else found.stands
    graph = ir.convenience.extract(
        model.graph, [name for name in found.boundary if name in names], [output]
    )
    graph.outputs[0].name = found.value
    for name in found.boundary:
        if name not in names:  # the other model's region needs it: both shall take the same inputs
            graph.inputs.append(_typed(ir.Value(name=name), found.captured[name]))
    _typed(graph.outputs[0], found.captured[found.value])
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        functions=list(model.functions.values()),
    )


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    """What the nodes of the main graph compute, by name, in their order."""
    return {
        value.name: value
        for node in graph
        for value in node.outputs
        if value.name and node.op_type != "Constant"
    }


def _behind(value: ir.Value, agreeing: set[str]) -> tuple[list[str], list[str]]:
    """The agreeing values from which one follows, and the values between."""
    boundary: list[str] = []
    region: list[str] = []
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        producer = current.producer()
        # A rewrite is on record under the first output of its node, whichever of them is followed here.
        made = [current] if producer is None else [*producer.outputs]
        region += [value.name or "" for value in made]
        for needed in _needs(producer) if producer is not None else ():
            if needed in seen:
                continue
            seen.add(needed)
            if needed.name in agreeing:
                boundary.append(needed.name or "")
            elif needed.producer() is not None:
                stack.append(needed)
    return boundary, region


def _needs(node: ir.Node) -> Sequence[ir.Value]:
    """Inputs of a node and what its subgraphs capture."""
    return scopes.dependencies(node)


def _tap(model: ir.Model, feed: Feed, names: Sequence[str]) -> dict[str, Any]:
    """Values of the main graph on a feed."""
    found: dict[str, Any] = {}
    for start in range(0, len(names), _AT_A_TIME):
        some = tuple(names[start : start + _AT_A_TIME])
        session = model_session(model, some)
        takes = {spec.name for spec in session.inputs}
        fed = {name: value for name, value in feed.values.items() if name in takes}
        found |= session.run(fed, some)
    return found


def _state_type(graph: ir.Graph, name: str, captured: object) -> None:
    value = next((v for v in graph.inputs if v.name == name), None) or _values(graph).get(name)
    if value is not None:
        _typed(value, captured)


def _typed(value: ir.Value, captured: object) -> ir.Value:
    """States dtype and shape as captured, where that is a tensor."""
    if isinstance(captured, np.ndarray):
        kind = captured.dtype
        dtype = ir.DataType.STRING if kind.kind in "OUS" else ir.DataType.from_numpy(kind)
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(captured.shape)
    return value
