"""A structural difference in words: headings with lines below, for a tree on a terminal or a list in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from graphopt.report.diff import ConstantChange, ModelDiff, NodeChange, Replacement, grouped

Section: TypeAlias = tuple[str, Sequence[str]]

_OPERATORS_SHOWN = 9


def diff_outline(found: ModelDiff, top: int | None = None) -> list[Section]:
    """The parts of a difference that are not empty, `top` lines of each; one part that says so if nothing differs."""
    if found.equal:
        return [(f"no difference: {found.matched} nodes match", ())]
    removed = sum(len(each.removed) for each in found.replacements)
    added = sum(len(each.added) for each in found.replacements)
    changes = grouped(found.replacements)
    sections: list[Section] = [
        (
            "inputs and outputs",
            [_line(f"{p.side} {p.name}", p.before, p.after) for p in found.ports],
        ),
        ("opsets", [_line(name, *pair) for name, pair in found.opsets.items()]),
        (
            "functions",
            [f"{name} {'added' if n > 0 else 'removed'}" for name, n in found.functions.items()],
        ),
        (
            f"nodes: {found.matched} match, {removed} removed, {added} added",
            _cut([_replacement(each, times) for each, times in changes], top),
        ),
        (
            f"operators: {found.before.nodes} → {found.after.nodes} nodes",
            _cut([_count(name, *pair) for name, pair in found.operators.items()], top),
        ),
    ]
    for kind, heading in _KINDS.items():
        lines = [_node(each) for each in found.nodes if each.kind == kind]
        sections.append((f"{heading}: {len(lines)}", _cut(lines, top)))
    constants = sorted(found.constants, key=lambda each: -(each.max_abs or 0.0))
    lines = [_constant(each) for each in constants]
    sections.append((f"changed constants: {len(lines)}", _cut(lines, top)))
    return [(heading, lines) for heading, lines in sections if lines]


_KINDS = {
    "attribute": "changed attributes",
    "type": "changed types",
    "input": "changed connections",
}


def _cut(lines: list[str], top: int | None) -> list[str]:
    if top is None or len(lines) <= top:
        return lines
    return [*lines[:top], f"… and {len(lines) - top} more"]


def _line(name: str, before: object, after: object) -> str:
    if before is None:
        return f"{name}: added, {after}"
    return f"{name}: {before} removed" if after is None else f"{name}: {before} → {after}"


def _count(name: str, before: int, after: int) -> str:
    return f"{name}: {before} → {after} ({after - before:+d})"


def _replacement(each: Replacement, times: int) -> str:
    often = f"{times} \N{MULTIPLICATION SIGN} " if times > 1 else ""
    if not each.added:
        what = f"removed: {_operators(each.removed)}"
    elif not each.removed:
        what = f"added: {_operators(each.added)}"
    else:
        what = f"{_operators(each.removed)} → {_operators(each.added)}"
    where = "" if each.graph == "main" else f" in {each.graph}"
    return f"{often}{what}   {'e.g. ' if times > 1 else ''}at {each.at!r}{where}"


def _operators(names: Iterable[str]) -> str:
    counts = Counter(names)
    shown = [name if n == 1 else f"{name}\N{MULTIPLICATION SIGN}{n}" for name, n in counts.items()]
    more = len(shown) - _OPERATORS_SHOWN
    return ", ".join(shown[:_OPERATORS_SHOWN]) + (f" and {more} more operators" if more > 0 else "")


def _node(each: NodeChange) -> str:
    where = "" if each.graph == "main" else f" in {each.graph}"
    name = f" {each.name!r}" if each.name else ""
    return _line(f"{each.operator}{name}{where} {each.what}", each.before, each.after)


def _constant(each: ConstantChange) -> str:
    if each.before != each.after:
        return f"{each.name!r} of {each.operator}: {each.before} → {each.after}"
    if each.max_abs is None:
        return f"{each.name!r} of {each.operator}: {each.before}, other contents"
    sqnr = "" if each.sqnr_db is None else f", SQNR {each.sqnr_db:.1f} dB"
    seen = f"{each.changed or 0:.1%} changed, max|d| {each.max_abs:.3g}{sqnr}"
    return f"{each.name!r} of {each.operator}: {each.before}, {seen}"
