"""Operator tables: which operators a runtime's parser takes, with which element types, under which rules."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """One condition on a node.

    Attributes:
        check: what is asked: `attr-in`, `constant`, `dtype-in`, `rank-in` …; `graphopt.emit` knows how.
        source: who says so.
        attr: the attribute asked about, or "".
        input: the operand asked about, or None.
        values: what is allowed; what they mean depends on `check`.
        optional: whether the operand may be absent.
        warning: whether breaking the rule is only worth a word.
        when: (attribute, value): the rule holds for nodes with that value alone.
        dtypes: element types of the first operand that the rule holds for; () for all.
        fixed: whether the rule holds for an operand that is a constant alone.
        note: the rule in words.
    """

    check: str
    source: str
    attr: str = ""
    input: int | None = None
    values: tuple[Any, ...] = ()
    optional: bool = False
    warning: bool = False
    when: tuple[str, Any] | None = None
    dtypes: tuple[str, ...] = ()
    fixed: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Operator:
    """What a parser takes of one operator.

    Attributes:
        supported: whether it takes it at all.
        types: element types of its first operand; empty where the table does not say.
        observed: types that a parser took though its documentation does not list them.
        since: version of the runtime from which on it is taken; () where it always was.
        rules: conditions.
        restrictions: the documentation's own words.
        parsed: of how many models tried the parser took how many; None where nothing was tried.
    """

    supported: bool
    types: frozenset[str] = frozenset()
    observed: frozenset[str] = frozenset()
    since: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    restrictions: str = ""
    parsed: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class OperatorTable:
    """The operators of ai.onnx that a runtime's parser takes.

    Attributes:
        name: of the table.
        version: of the runtime.
        source: where the table comes from.
        operators: by name.
        strict: whether an operator that the table does not list is refused; otherwise it is only doubtful.
    """

    name: str
    version: str
    source: str
    operators: Mapping[str, Operator]
    strict: bool


@functools.cache
def operator_table(name: str) -> OperatorTable:
    """The packaged table called `name`: `tensorrt` or `openvino`."""
    body = json.loads((files("graphopt.targets") / "tables" / f"{name}.json").read_bytes())
    header = body["header"]
    found = {op: _operator(entry) for op, entry in body["operators"].items()}
    return OperatorTable(name, header["version"], header["source"], found, header["strict"])


def _operator(entry: Mapping[str, Any]) -> Operator:
    return Operator(
        supported=entry["supported"],
        types=frozenset(entry.get("types", ())),
        observed=frozenset(entry.get("observed", ())),
        since=tuple(entry.get("since", ())),
        rules=tuple(_rule(each) for each in entry.get("rules", ())),
        restrictions=entry.get("restrictions", ""),
        parsed=tuple(entry["parsed"]) if "parsed" in entry else None,
    )


def _rule(entry: Mapping[str, Any]) -> Rule:
    fields = dict(entry)
    fields["values"] = tuple(fields.get("values", ()))
    fields["dtypes"] = tuple(fields.get("dtypes", ()))
    if "when" in fields:
        fields["when"] = tuple(fields["when"])
    return Rule(**fields)
