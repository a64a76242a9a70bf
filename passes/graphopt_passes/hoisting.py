"""Work that every turn of a loop repeats, done once ahead of it."""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import Scope, all_graphs, dependencies
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, name_of
from graphopt.rewrite.relink import mark

RULE = "hoist-invariant"

FREE = frozenset({"Constant", "Identity"})
"""Nothing is gained by computing these once."""

CHEAP = FREE | {"Flatten", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"}
"""No more work than the `Identity` that a result of the body would leave in its place."""

NEVER_FAILS = frozenset({"Shape", "Size", "Transpose"})
"""Whatever these get that a model may hold, they give a result."""

MAY_FAIL = frozenset({"BitShift", "Div", "Mod", "Pow"})
"""Elementwise, but not for every integer: divided by 0, shifted by more than there are bits."""


@dataclasses.dataclass(frozen=True)
class HoistInvariants:
    """Moves nodes that compute the same in every turn of a `Loop` or `Scan` ahead of it.

    Where it is not known that a turn is taken, only what cannot fail moves: a loop may be what keeps a model from
    computing something that it could not.

    Before:  y = Loop(m, , x) <body = (i, c, p) => (c, q) { t = Exp(k)  q = Add(p, t) }>
    After:   t = Exp(k)   y = Loop(m, , x) <body = (i, c, p) => (c, q) { q = Add(p, t) }>
    Changes numerics: exact.  Leaves alone: random and custom operators, branches of an If, which may not run.
    Source: ONNX Loop-1 .. 25, Scan-8 .. 25.
    """

    name: ClassVar[str] = "hoist-invariants"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        bodies = [
            scope
            for scope, _ in ctx.walk(model).parts
            if scope.owner is not None
            and scope.owner.op_type in ("Loop", "Scan")
            and scope.owner.domain in ("", "ai.onnx")
        ]
        if not bodies:
            return False
        hoister = _Hoister(model, ctx)
        changed = False
        for scope in reversed(bodies):  # inner loops first: what leaves one may leave the next
            changed = hoister.visit(scope) or changed
        return changed


class _Hoister:
    """Moves nodes out of bodies; renames what another graph calls the same."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self._ctx = ctx
        self._functions = frozenset(model.functions)
        self._counts: collections.Counter[str] = collections.Counter()
        for scope in all_graphs(model):
            graph = scope.graph
            defined = dict.fromkeys((*graph.inputs, *graph.initializers.values()))
            self._counts.update(v.name for v in defined if v.name)
            self._counts.update(v.name for node in graph for v in node.outputs if v.name)

    def visit(self, scope: Scope) -> bool:
        """Moves what it can out of one body."""
        assert scope.owner is not None
        inside = {*scope.graph.inputs, *scope.graph.initializers.values()}
        runs: bool | None = None
        changed = False
        for node in tuple(scope.graph):
            varies = any(value in inside for value in dependencies(node))
            if varies or not self._pays(node, scope):
                inside.update(node.outputs)
                continue
            if runs is None:
                runs = _takes_a_turn(scope.owner, scope.opsets, self._ctx)
            if not runs and not self._is_safe(node):
                self._ctx.missed(RULE, node, "may fail, and the loop may take no turn", scope.owner)
            elif self._ctx.permit(RULE, node):
                self._move(node, scope)
                changed = True
                continue
            inside.update(node.outputs)
        return changed

    def _pays(self, node: ir.Node, scope: Scope) -> bool:
        plain = not node.domain
        if plain and node.op_type in FREE:
            return False
        leaves = any(value.is_graph_output() for value in node.outputs)
        if plain and leaves and node.op_type in CHEAP:
            return False
        return operators.is_pure(node, scope.opsets, self._functions)

    def _is_safe(self, node: ir.Node) -> bool:
        """Whether a node gives a result whatever its inputs hold."""
        if node.domain or operators.subgraphs(node):
            return False
        if node.op_type in NEVER_FAILS:
            return True
        if node.op_type in MAY_FAIL and not all(_is_float(v) for v in node.inputs if v is not None):
            return False
        if any(v.dtype == ir.DataType.STRING for v in node.inputs if v is not None):
            return False  # a cast reads numbers
        if operators.is_elementwise_unary(node):
            return all(values.is_constant(v) for v in node.inputs[1:] if v is not None)
        if operators.is_elementwise(node) or node.op_type == "MatMul":
            return all(self._is_static(v) for v in (*node.inputs, *node.outputs) if v is not None)
        return False

    def _is_static(self, value: ir.Value) -> bool:
        """Whether all dims are known: then shape inference has seen that they fit."""
        dims = self._ctx.shapes.dims(value)
        return dims is not None and all(dim.is_static for dim in dims)

    def _move(self, node: ir.Node, scope: Scope) -> None:
        owner, body = scope.owner, scope.graph
        assert owner is not None
        outer = owner.graph
        assert outer is not None
        for value in node.outputs:
            if value.name and self._counts[value.name] > 1:
                self._counts[value.name] -= 1
                value.name = self._ctx.names.fresh(value.name)
        copies = [self._pass_on(value, node) for value in node.outputs if value.is_graph_output()]
        body.remove(node)
        outer.insert_before(owner, node)
        mark(node, RULE, name_of(owner), self._ctx)
        users = dict.fromkeys(use.node for value in node.outputs for use in value.uses())
        self._ctx.shapes.update([node, *copies, *users])

    def _pass_on(self, value: ir.Value, maker: ir.Node) -> ir.Node:
        """A result of a body needs a producer in it: an `Identity` of what has moved out."""
        body, base = maker.graph, f"{value.name}_Identity"
        assert body is not None
        node = ir.Node("", "Identity", [value], name=self._ctx.names.fresh(base))
        copy = node.outputs[0]
        copy.name, copy.type, copy.shape = self._ctx.names.fresh(base), value.type, value.shape
        mark(node, RULE, value.name or "", self._ctx)
        body.insert_before(maker, node)
        for index, output in enumerate(body.outputs):
            if output is value:
                body.outputs[index] = copy
        return node


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _takes_a_turn(owner: ir.Node, opsets: operators.Opsets, ctx: Context) -> bool:
    """Whether a loop is known to run its body at least once."""
    if owner.op_type == "Loop":
        limit, condition = (*owner.inputs, None, None)[:2]
        count = values.scalar(limit)
        begins = condition is None or values.scalar(condition) is True
        return begins and (limit is None or (count is not None and count >= 1))
    if (operators.opset(owner, opsets) or 0) < 9:
        return False
    count = operators.attribute(owner, "num_scan_inputs", 0)
    axes = operators.attribute(owner, "scan_input_axes", (0,) * count)
    for value, axis in zip(owner.inputs[len(owner.inputs) - count :], axes, strict=False):
        dims = None if value is None else ctx.shapes.dims(value)
        if dims is not None and -len(dims) <= axis < len(dims) and dims[axis].at_least(1):
            return True
    return False
