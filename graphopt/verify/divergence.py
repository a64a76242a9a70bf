"""Where two models part: the first value that both have and compute differently, and what feeds it.

Values are found again by name: a rewrite hands the name of what it replaces to its replacement, so a name that both
models have stands for the same quantity. Values of subgraphs and functions belong to the node that runs them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir import scopes
from graphopt.ir.model_file import ExternalData, load_model, save_model
from graphopt.runtime.session import Session, SessionOptions
from graphopt.verify.compare import OutputReport, compare

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
        operator: what computes it in the candidate.
        report: how it compares.
        boundary: values that both models have, on which they agree, and from which the value follows in either.
        region: names of the values between those and this one, in either model, this one included.
        spread: how many values after this one differ too.
        captured: the reference's numbers of the boundary and of the value.
    """

    value: str
    operator: str
    report: OutputReport
    boundary: tuple[str, ...]
    region: frozenset[str]
    spread: int
    captured: Mapping[str, Any]


def first_divergence(
    reference: Path, candidate: Path, feed: Feed, profile: Profile, scratch: Path
) -> Divergence | None:
    """The first value that differs on `feed`, in the candidate's order; None where none that both have does.

    Args:
        reference: the original's file.
        candidate: the file of what stands in its place.
        feed: inputs on which outputs differ.
        profile: when two values differ.
        scratch: a folder for working files.
    """
    graphs = [load_model(path) for path in (reference, candidate)]
    left, right = (_values(model.graph) for model in graphs)
    try:
        truth, reports = _side_by_side(graphs, feed, profile, scratch)
    except GraphoptError:
        return None
    wrong = [name for name, report in reports.items() if not report.passed]
    if not wrong:
        return None
    first = wrong[0]
    agreeing = {name for name in reports if reports[name].passed} | set(feed.values)
    parts = [_behind(values[first], agreeing) for values in (left, right)]
    boundary = tuple(dict.fromkeys(name for found, _ in parts for name in found))
    numbers = {**truth, **feed.values}
    producer = right[first].producer()
    return Divergence(
        first,
        producer.op_type if producer else "",
        reports[first],
        boundary,
        frozenset(name for _, region in parts for name in region),
        len(wrong) - 1,
        {name: numbers[name] for name in (*boundary, first)},
    )


def errors_along(
    reference: Path, candidate: Path, feed: Feed, profile: Profile, scratch: Path
) -> list[tuple[str, OutputReport]]:
    """Every value that both models have, in the candidate's order, with its operator and how it compares on `feed`.

    Raises:
        GraphoptError: one of the models cannot be run with its values shown.
    """
    graphs = [load_model(path) for path in (reference, candidate)]
    makers = {name: value.producer() for name, value in _values(graphs[1].graph).items()}
    _, reports = _side_by_side(graphs, feed, profile, scratch)
    return [
        (node.op_type if (node := makers[name]) else "", report) for name, report in reports.items()
    ]


def _side_by_side(
    graphs: Sequence[ir.Model], feed: Feed, profile: Profile, scratch: Path
) -> tuple[dict[str, Any], dict[str, OutputReport]]:
    """The first model's values that the second has too, and how the second's compare, in the second's order."""
    left, right = (_values(model.graph) for model in graphs)
    common = [name for name in right if name in left]
    truth = _tap(graphs[0], feed, common, scratch / "tapped-reference.onnx")
    found = _tap(graphs[1], feed, common, scratch / "tapped-candidate.onnx")
    reports = {name: compare(name, truth[name], found[name], profile) for name in common}
    return truth, reports


def agrees_at(
    reference: Divergence, model: ir.Model, feed: Feed, profile: Profile, scratch: Path
) -> bool:
    """Whether a candidate computes the value on which another one parted; False where it has no such value."""
    if reference.value not in _values(model.graph):
        return False
    try:
        found = _tap(model, feed, [reference.value], scratch / "tapped-probe.onnx")
    except GraphoptError:
        return False
    truth = reference.captured[reference.value]
    return compare(reference.value, truth, found[reference.value], profile).passed


def cut(model: ir.Model, found: Divergence) -> ir.Model:
    """The part of a model that computes the diverging value from the boundary, as a model of its own."""
    names = set(_values(model.graph)) | {value.name for value in model.graph.inputs}
    for name in found.boundary:
        _state_type(model.graph, name, found.captured[name])
    graph = ir.convenience.extract(
        model.graph, [name for name in found.boundary if name in names], [found.value]
    )
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
        region.append(current.name or "")
        producer = current.producer()
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


def _tap(model: ir.Model, feed: Feed, names: Sequence[str], file: Path) -> dict[str, Any]:
    """Values of the main graph on a feed.  The weights are put beside the file, so that tapping parses little."""
    path = save_model(model, file, external=ExternalData.SINGLE_FILE)[0]
    found: dict[str, Any] = {}
    for start in range(0, len(names), _AT_A_TIME):
        some = tuple(names[start : start + _AT_A_TIME])
        session = Session(path, options=SessionOptions(prepack=False, extra_outputs=some))
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
