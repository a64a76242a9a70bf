"""Names for what has none, and other names for what is called like something else."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.scopes import Census, Scope
from graphopt.numerics import Numerics
from graphopt.rewrite import Context

RULE = "name-nodes"


@dataclasses.dataclass(frozen=True)
class NameNodes:
    """Gives every node a name of its own, and values of subgraphs names that hide no value around them.

    A node without a name, or with the name of an earlier one, is called after its first output: profilers, converters
    and debuggers tell nodes apart by name, and a name that comes from a value is the same after the next rewrite.

    Before:  y = Add(x, x)    z [n] = Exp(y)    w [n] = Neg(z)     [name]
    After:   y [y_Add] = …    z [n] = …         w [w_Neg] = …
    Changes numerics: exact.  Leaves alone: names that are unique; inputs and outputs of the model and of functions;
    equal names of values in two branches, which ONNX allows; tensors that a quantization annotation names; initializers
    of subgraphs that hide an outer value, of which ONNX Runtime 1.31 reads the one or the other; values of graphs that
    custom operators hold, which may go by name.
    Source: onnx/docs/IR.md, "Names Within a Graph": values of a subgraph are to be called otherwise than outer ones.
    """

    name: ClassVar[str] = "name-nodes"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        census = ctx.walk(model)
        nameless = _nameless(census)
        changed = False
        if nameless and ctx.permit(RULE, model.graph.name or "main"):
            for node in nameless:
                node.name = ctx.names.fresh(_base(node))
            changed = True
        kept = ctx.annotated(model)
        for scope, _ in census.parts:
            if scope.parent is not None and scope.is_plain:
                changed = _unhide(scope, kept, ctx) or changed
        return changed


def _nameless(census: Census) -> list[ir.Node]:
    """The nodes without a name, or with that of an earlier node."""
    found: list[ir.Node] = []
    seen: set[str] = set()
    for _, nodes in census.parts:
        for node in nodes:
            if node.name and node.name not in seen:
                seen.add(node.name)
            else:
                found.append(node)
    return found


def _base(node: ir.Node) -> str:
    output = next((value.name for value in node.outputs if value.name), None)
    return f"{output}_{node.op_type}" if output else node.op_type


def _unhide(scope: Scope, kept: frozenset[str], ctx: Context) -> bool:
    """Renames the values of a subgraph that are called like one of a graph around it."""
    ours = [v for v in _defined(scope.graph) if v.name not in kept and not v.is_initializer()]
    if not ours:
        return False
    visible = _outer_names(scope)
    changed = False
    for value in ours:
        if value.name in visible and ctx.permit("hidden-name", value):
            value.name = ctx.names.fresh(value.name)
            changed = True
    return changed


def _defined(graph: ir.Graph) -> list[ir.Value]:
    """The values that a graph itself defines by name, once each."""
    held = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
    return [value for value in dict.fromkeys(held) if value.name]


def _outer_names(scope: Scope) -> set[str]:
    found: set[str] = set()
    outer = scope.parent
    while outer is not None:
        found.update(value.name for value in _defined(outer.graph) if value.name)
        outer = outer.parent
    return found
