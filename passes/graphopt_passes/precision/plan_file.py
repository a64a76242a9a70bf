"""The precision plan as a file: dtype and reason of each node, found by structure when the model is exported anew."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.ir import values
from graphopt.ir.scopes import all_graphs
from graphopt.rewrite import Context, RemarkKind
from graphopt.rewrite.context import name_of
from graphopt_passes.precision.plan import Decision, Kind

SCHEMA = 1
DTYPES = frozenset({*(kind.value for kind in Kind), "float8"})
_REASONS = {
    Kind.LOW: "nothing speaks against it",
    Kind.FOLLOW: "takes the dtype that comes",
    Kind.BODY: "control flow: float32 at its boundary, its bodies are decided node by node",
}
_SCALARS = (
    ir.AttributeType.INT,
    ir.AttributeType.INTS,
    ir.AttributeType.FLOAT,
    ir.AttributeType.FLOATS,
    ir.AttributeType.STRING,
)


def keys(model: ir.Model) -> dict[ir.Node, str]:
    """A key for every node that depends on what is computed, not on names: equal places are numbered in order."""
    known: dict[ir.Value, str] = {}
    for index, value in enumerate(model.graph.inputs):
        known[value] = f"input {index}"
    found: dict[ir.Node, str] = {}
    seen: Counter[str] = Counter()
    for scope in all_graphs(model):
        for index, value in enumerate(scope.graph.inputs):
            known.setdefault(value, f"{scope.path.count('/')} input {index}")
        for node in scope.graph:
            digest = _digest(node, known)
            seen[digest] += 1
            found[node] = f"{digest}-{seen[digest]}"
            for index, value in enumerate(node.outputs):
                known[value] = f"{digest} {index}"
    return found


def _digest(node: ir.Node, known: Mapping[ir.Value, str]) -> str:
    parts = ["::".join(node.op_identifier())]
    parts += [_operand(value, known) for value in node.inputs]
    parts += sorted(f"{a.name}={a.value!r}" for a in node.attributes.values() if a.type in _SCALARS)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _operand(value: ir.Value | None, known: Mapping[ir.Value, str]) -> str:
    if value is None:
        return ""
    tensor = values.constant(value)
    if tensor is not None:
        return f"{tensor.dtype.name}{list(tensor.shape)}"
    return known.get(value, "?")


def write_plan(path: Path, model: ir.Model, decisions: Mapping[ir.Node, Decision]) -> None:
    """Writes the decisions for the nodes of `model`, as it is before the cast, to be read, edited and used again.

    Raises:
        OptionError: the file cannot be written.
    """
    said = {
        node: (decision.kind.value, decision.reason or _REASONS.get(decision.kind, ""))
        for node, decision in decisions.items()
        if decision.kind is not Kind.FIXED
    }
    write_dtypes(path, keys(model), said)


def write_dtypes(
    path: Path, places: Mapping[ir.Node, str], said: Mapping[ir.Node, tuple[str, str]]
) -> None:
    """Writes dtype and reason of some nodes.

    Args:
        path: the file.
        places: the keys of the nodes, before anything was rewritten.
        said: dtype and reason.

    Raises:
        OptionError: the file cannot be written.
    """
    nodes = [
        {
            "key": places[node],
            "node": name_of(node),
            "operator": node.op_type,
            "dtype": dtype,
            "reason": reason,
        }
        for node, (dtype, reason) in said.items()
    ]
    body = json.dumps({"schema": SCHEMA, "nodes": nodes}, indent=1) + "\n"
    try:
        path.write_text(body, encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"cannot write the precision plan {path}: {error.strerror}; give another file"
        ) from error


def read_plan(path: Path, model: ir.Model, ctx: Context) -> dict[str, str]:
    """What a plan says of the nodes of `model`: `float32` or `half`, by output name.

    Raises:
        OptionError: the file is no plan, or fits no node of the model.
    """
    wanted = planned_dtypes(path, model, ctx)
    return {name_of(node): kind for node, kind in wanted.items() if kind in (Kind.HIGH, Kind.LOW)}


def planned_dtypes(path: Path, model: ir.Model, ctx: Context) -> dict[ir.Node, str]:
    """The dtype that a plan gives each node of `model` that it knows: float32, half, float8, follow, body.

    Nodes that are only in the plan, or only in the model, are named in a warning.

    Raises:
        OptionError: as `read_plan`.
    """
    listed, places = _listed(path), keys(model)
    wanted = {n: str(listed[key]["dtype"]) for n, key in places.items() if key in listed}
    if listed and not wanted:
        raise OptionError(
            f"precision plan {path}: none of its {len(listed)} nodes is in the model; it was written for another one"
        )
    known = set(places.values())
    lost = [str(each.get("node", key)) for key, each in listed.items() if key not in known]
    if lost:
        some = ", ".join(lost[:_NAMED]) + (" …" if len(lost) > _NAMED else "")
        reason = (
            f"{len(lost)} of {len(listed)} nodes of {path} are not in the model ({some}): what it says of them is "
            "lost, and what is in their place is decided anew. Write a new plan with --save-plan, or give the model "
            "that this one was written for"
        )
        ctx.remark(RemarkKind.WARNING, "plan", "", reason)
    return wanted


_NAMED = 5
"""Nodes that a warning names."""


def _listed(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        listed = {entry["key"]: entry for entry in body["nodes"]}
        unknown = {str(entry["dtype"]) for entry in listed.values()} - DTYPES
    except OSError as error:
        raise OptionError(
            f"cannot read the precision plan {path}: {error.strerror}; give the file that --save-plan wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"{path} is no precision plan ({error!r}): it must be JSON with nodes, each with key and dtype"
        ) from error
    if unknown:
        words, known = ", ".join(sorted(unknown)), ", ".join(sorted(DTYPES))
        raise OptionError(f"precision plan {path}: unknown dtype {words}; write one of {known}")
    return listed
