"""Calls of model-local functions give way to the functions' bodies."""

from __future__ import annotations

import dataclasses
import graphlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir import operators
from graphopt.ir.scopes import Scope, all_graphs, nested
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, name_of, remove
from graphopt.rewrite.relink import mark, substitute

RULE = "inline-function"
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclasses.dataclass(frozen=True)
class InlineFunctions:
    """Puts the body of a model-local function where it is called, in the main graph and its subgraphs.

    Calls within bodies are inlined too; parameters of the function become the attributes of the call or their
    defaults.  A domain that only the function imports is imported by the model.

    Before:  y = local::Twice<n = 2>(x)     Twice<n>(a) => (b) { b = Repeat<times: int = @n>(a) }
    After:   y = Repeat<times = 2>(x)
    Changes numerics: exact.  Leaves alone: functions that call themselves; functions for another opset, where an
    operator that they use means something else in the model's.
    Source: onnx/docs/IR.md, "Functions".
    """

    name: ClassVar[str] = "inline-functions"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if not model.functions:
            return False
        refusals = _refusals(model)
        pending = [
            node
            for scope in all_graphs(model)
            if scope.function is None
            for node in scope.graph
            if node.op_identifier() in model.functions
        ][::-1]
        changed = False
        while pending:
            call = pending.pop()
            function = model.functions[call.op_identifier()]
            reason = refusals.get(call.op_identifier()) or _misfit(call, function)
            if reason:
                ctx.missed(RULE, call, reason)
            elif ctx.permit(RULE, call):
                imported = len(model.opset_imports)
                made = _inline(call, function, model, ctx)
                if len(model.opset_imports) > imported:  # what was free to choose no longer is
                    refusals = _refusals(model)
                inner = (each for node in made for each in _with_nested(node))
                calls = [node for node in inner if node.op_identifier() in model.functions]
                pending.extend(reversed(calls))
                changed = True
        return changed


def _refusals(model: ir.Model) -> dict[ir.OperatorIdentifier, str]:
    """The functions that cannot be inlined, with the reason."""
    reasons = dict.fromkeys(_recursive(model), "calls itself")
    for identifier, function in model.functions.items():
        clash = _clash(function, model)
        if clash:
            reasons[identifier] = clash
    return reasons


def _recursive(model: ir.Model) -> Iterator[ir.OperatorIdentifier]:
    """The functions that reach themselves."""
    calls = {
        identifier: {n.op_identifier() for n in function.all_nodes()} & set(model.functions)
        for identifier, function in model.functions.items()
    }
    while calls:
        sorter = graphlib.TopologicalSorter(calls)
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            cycle = set(error.args[1])
            yield from (identifier for identifier in calls if identifier in cycle)
            calls = {k: v - cycle for k, v in calls.items() if k not in cycle}
        else:
            return


def _clash(function: ir.Function, model: ir.Model) -> str:
    """Why the operators of a body would mean something else under the model's imports, or ""."""
    ours = model.opset_imports
    for node in function.all_nodes():
        version, here = operators.opset(node, function.opset_imports), operators.opset(node, ours)
        if here in (None, version) or version is None or node.op_identifier() in model.functions:
            continue
        then = operators.find_schema(node.op_type, version, node.domain)
        now = operators.find_schema(node.op_type, here or 0, node.domain)
        if then is None or now is None or then.since_version != now.since_version:
            return (
                f"its {operators.describe(node)} is of version {version} of domain {node.domain!r}, the model imports "
                f"{here}, where the operator is another; convert the function to that version"
            )
    return ""


def _misfit(call: ir.Node, function: ir.Function) -> str:
    """Why a call does not fit its function, or ""."""
    if len(call.inputs) > len(function.inputs) or len(call.outputs) > len(function.outputs):
        return (
            f"passes {len(call.inputs)} inputs and {len(call.outputs)} outputs to a function of "
            f"{len(function.inputs)} and {len(function.outputs)}"
        )
    if any(attribute.type in GRAPHS for attribute in call.attributes.values()):
        return "passes a graph as an attribute"
    bound = dict(zip(function.inputs, call.inputs, strict=False))
    absent = {value for value in function.inputs if bound.get(value) is None}
    for scope in nested(Scope(function.graph, function.opset_imports, function=function)):
        for value in scope.graph.outputs:
            if value in absent:
                return f"returns its input {value.name!r}, which the call leaves out"
    return ""


def _inline(call: ir.Node, function: ir.Function, model: ir.Model, ctx: Context) -> list[ir.Node]:
    """Replaces a call by a copy of the body; returns the new nodes.  All checks were made."""
    graph = call.graph
    assert graph is not None
    copier = _Copier(call, function, ctx)
    made = [copier.node(node) for node in function]
    for domain, version in function.opset_imports.items():
        model.opset_imports.setdefault("" if domain == "ai.onnx" else domain, version)
    graph.insert_before(call, made)
    users = dict.fromkeys(use.node for old in call.outputs for use in old.uses())
    extra = []
    for old, inner in zip(call.outputs, function.outputs, strict=False):
        new = copier.values[inner]
        if (old.uses() or old.is_graph_output()) and new is not None:
            extra.append(_replace_output(old, new, call, made, ctx))
    remove(call, ctx)
    ctx.shapes.update([*made, *filter(None, extra), *users])
    return made


def _replace_output(
    old: ir.Value, new: ir.Value, call: ir.Node, made: list[ir.Node], ctx: Context
) -> ir.Node | None:
    """Puts a result of the body where the call's output was; it keeps the caller's name, as far as it can."""
    bound = old.is_graph_output() or new.is_graph_output()
    keeps = not bound and new.producer() in set(made)
    name = old.name
    identity = substitute(old, new, call, RULE, ctx)
    if keeps and name:
        old.name, new.name = None, name
    return identity


def _with_nested(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for graph in operators.subgraphs(node):
        for inner in graph:
            yield from _with_nested(inner)


class _Copier:
    """Copies the body of one call: values renamed, parameters resolved, nothing shared but tensors."""

    def __init__(self, call: ir.Node, function: ir.Function, ctx: Context) -> None:
        self._ctx = ctx
        self._origin = name_of(call)
        self._parameters = _parameters(call, function)
        self.values: dict[ir.Value, ir.Value | None] = dict.fromkeys(function.inputs)
        self.values.update(zip(function.inputs, call.inputs, strict=False))

    def node(self, node: ir.Node) -> ir.Node:
        """A copy of a node whose inputs have been copied."""
        inputs = [None if value is None else self.values[value] for value in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            [a for a in map(self._attribute, node.attributes.values()) if a is not None],
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=self._ctx.names.fresh(f"{self._origin}_{node.name or node.op_type}"),
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            self._value(old, new)
        mark(copy, RULE, self._origin, self._ctx)
        return copy

    def _value(self, old: ir.Value, new: ir.Value) -> None:
        """Names a copy.  Its dims are inferred anew: a symbol of the body is not the model's symbol of that name."""
        new.name = self._ctx.names.fresh(f"{self._origin}_{old.name}") if old.name else ""
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
        self.values[old] = new

    def _attribute(self, held: ir.Attr) -> ir.Attr | None:
        """The attribute with parameters resolved; None where the call leaves the parameter out."""
        if held.ref_attr_name is not None:
            given = self._parameters.get(held.ref_attr_name)
            return None if given is None else ir.Attr(held.name, given.type, given.value)
        if held.type == ir.AttributeType.GRAPH:
            return ir.AttrGraph(held.name, self._graph(held.as_graph()))
        if held.type == ir.AttributeType.GRAPHS:
            return ir.AttrGraphs(held.name, [self._graph(graph) for graph in held.as_graphs()])
        return held

    def _graph(self, graph: ir.Graph) -> ir.Graph:
        inputs = [self._loose(value) for value in graph.inputs]
        initializers = [self._loose(value) for value in graph.initializers.values()]
        nodes = [self.node(node) for node in graph]
        outputs = [self._output(value) for value in graph.outputs]
        return ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            doc_string=graph.doc_string,
            name=graph.name,
            metadata_props=dict(graph.metadata_props),
        )

    def _output(self, value: ir.Value) -> ir.Value:
        copy = self.values[value]
        assert copy is not None, "_misfit declines calls whose absent input leaves a subgraph"
        copy.type, copy.shape = copy.type or value.type, copy.shape or value.shape
        return copy

    def _loose(self, value: ir.Value) -> ir.Value:
        """A copy of an input or initializer of a subgraph."""
        known = self.values.get(value)
        if known is not None:
            return known
        copy = ir.Value(type=value.type, shape=value.shape, const_value=value.const_value)
        self._value(value, copy)
        return copy


def _parameters(call: ir.Node, function: ir.Function) -> Mapping[str, ir.Attr]:
    """What the call gives the function's parameters, defaults included; those without a value are left out."""
    found = {a.name: a for a in function.attributes.values() if a.value is not None}
    found.update({a.name: a for a in call.attributes.values()})
    return found
