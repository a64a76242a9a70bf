"""Why a node of the result is as it is: its dtype and the reason, what was rewritten there, and what was not."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable

import onnx_ir as ir

from graphopt.ir.scopes import all_graphs
from graphopt.report.run import RunReport

DECIDED = ("half", "float32")
"""Rules of remarks that say what a node computes in."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a run has to say about one node.

    Attributes:
        node: its name, or that of its first output.
        sentences: why it is as it is, the most telling first.
    """

    node: str
    sentences: tuple[str, ...]


def explain(report: RunReport, model: ir.Model, pattern: str) -> tuple[Explanation, ...]:
    """What the run says about the nodes that `pattern` names; one that says what is there instead where none is.

    Args:
        report: of the run.
        model: the result.
        pattern: name of a node or of an output of one, with `*` and `?`.
    """
    places = _places(report, model)
    found = [name for name in places if fnmatch.fnmatchcase(name, pattern)]
    if found:
        return tuple(Explanation(name, _sentences(report, name, places[name])) for name in found)
    close = difflib.get_close_matches(pattern, list(places), 3)
    hint = f"; close to it: {', '.join(close)}" if close else ""
    return (Explanation(pattern, (f"no node or value is called so{hint}",)),)


def _places(report: RunReport, model: ir.Model) -> dict[str, frozenset[str]]:
    """Every name one may ask for, and the names under which the run speaks of that place."""
    found: dict[str, frozenset[str]] = {}
    for scope in all_graphs(model):
        for node in scope.graph:
            outputs = frozenset(value.name for value in _given(node) if value.name)
            for name in (node.name, *outputs):
                if name:
                    found[name] = outputs | {name}
    for each in (*(r.node for r in report.remarks), *(r.site for r in report.rewrites)):
        if each:
            found.setdefault(each, frozenset((each,)))
    return found


def _given(node: ir.Node) -> list[ir.Value]:
    """What a node gives, under the names that casts behind it took over too."""
    casts = [use.node for v in node.outputs for use in v.uses() if use.node.op_type == "Cast"]
    return [*node.outputs, *(value for cast in casts for value in cast.outputs)]


def _sentences(report: RunReport, name: str, names: frozenset[str]) -> tuple[str, ...]:
    said = [each for each in report.remarks if each.node in names]
    decided = [f"{each.rule}: {each.reason}" for each in said if each.rule in DECIDED]
    made = [
        f"rewritten by {each.pass_name}/{each.rule}, {each.numerics.name.lower()}"
        for each in report.rewrites
        if each.site in names
    ]
    others = [
        f"{each.kind.value} by {each.pass_name}/{each.rule}: {each.reason}"
        for each in said
        if each.rule not in DECIDED
    ]
    back = [
        f"left out {each.pass_name}/{each.rule}: {each.reason}"
        for each in report.rolled_back
        if each.site in names
    ]
    found = (*decided, *back, *_unique(made), *others)
    return found or (f"nothing was decided or changed at {name}",)


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
