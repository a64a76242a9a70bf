"""Leaves out of a model that is to be small where in the exporter's source each node came from."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind

RULE = "traces"

_PREFIXES = ("pkg.torch.",)
_KEYS = frozenset({"namespace"})


@dataclasses.dataclass(frozen=True)
class DropTraces:
    """Removes what torch.onnx notes on nodes and values: stack traces, source lines, names of modules.

    Before:  y = Conv(x, W)   pkg.torch.onnx.stack_trace = "File ..."
    After:   y = Conv(x, W)
    Changes numerics: not at all.  Leaves alone: all other metadata.  Runs where sparsity is asked for, or by name: of a
    model of a hundred thousand weights these notes are a fifth, and more than what 95 % zeros leave.
    """

    name: ClassVar[str] = "drop-traces"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    always: bool = False
    """Whether to run where no sparsity is asked for."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if not (self.always or ctx.options.sparsity):
            return False
        noted = [props for props in _all_props(model) if any(map(_is_trace, props))]
        site = model.graph.name or "main"
        if not noted or not ctx.permit(RULE, site, Numerics.EXACT):
            return False
        size = sum(_drop(props) for props in noted)
        reason = f"{size} bytes of notes of the exporter left out of {len(noted)} nodes and values"
        ctx.remark(RemarkKind.NOTE, RULE, site, reason)
        return True


def _all_props(model: ir.Model) -> list[MutableMapping[str, str]]:
    found: list[MutableMapping[str, str]] = []
    for scope in all_graphs(model):
        graph = scope.graph
        found += [value.metadata_props for value in graph.inputs]
        found += [value.metadata_props for value in graph.initializers.values()]
        for node in graph:
            found.append(node.metadata_props)
            found += [value.metadata_props for value in node.outputs]
    return found


def _is_trace(key: str) -> bool:
    return key.startswith(_PREFIXES) or key in _KEYS


def _drop(props: MutableMapping[str, str]) -> int:
    """Removes the notes; returns how many bytes they took."""
    keys = [key for key in props if _is_trace(key)]
    return sum(len(key.encode()) + len(props.pop(key).encode()) for key in keys)
