"""Cleaning that changes nothing but what is there: IR version, `Constant` nodes, dead parts."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import onnx.defs
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import Scope, all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind, is_dead, remove

MAIN_DOMAINS = frozenset({"", "ai.onnx"})


@dataclasses.dataclass(frozen=True)
class UpgradeIr:
    """Makes the initializers of an IR 3 model constants.

    Before IR version 4 every initializer had to be listed as a graph input as well, and no runtime let a feed replace
    it. From version 4 on, listing it means "a default that a feed may replace".

    Before:  ir_version 3, inputs x, w, initializers w
    After:   ir_version 4, inputs x,    initializers w
    Changes numerics: exact.  Leaves alone: IR version 4 and later, whose listed initializers may be overridden.
    Source: onnx/docs/IR.md, "Graphs"; ONNX Runtime treats initializers as constant below IR 4.
    """

    name: ClassVar[str] = "upgrade-ir"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if model.ir_version >= 4:
            _note_overridable(model, ctx)
            return False
        if not ctx.permit("upgrade-ir", model.graph.name or "main"):
            return False
        inputs = model.graph.inputs
        freed = [value for value in inputs if value.is_initializer()]
        kept = [value for value in inputs if not value.is_initializer()]
        inputs.clear()
        inputs.extend(kept)
        model.ir_version = 4
        if not model.opset_imports:  # IR 1 and 2 knew no imports: the first opset was implied
            model.opset_imports[""] = 1
        if freed:
            ctx.refresh()
        return True


def _note_overridable(model: ir.Model, ctx: Context) -> None:
    """Says how many initializers are none to us: whoever exported them as inputs seldom meant it."""
    count = sum(value.is_initializer() for value in model.graph.inputs)
    if count:
        reason = (
            f"{count} initializers are graph inputs too, so a feed may override them and nothing folds or fuses them; "
            "if no caller does, --freeze-defaults makes constants of them"
        )
        ctx.remark(RemarkKind.NOTE, "overridable-default", "", reason)


@dataclasses.dataclass(frozen=True)
class FreezeDefaults:
    """Makes the overridable defaults of inputs constants, for models whose callers never override them.

    From IR version 4 on, an initializer that is a graph input too is a default: a feed may replace it, so nothing
    folds it or fuses it. Old exporters wrote every weight that way. Whoever knows that no caller feeds them puts this
    pass in front of the pipeline (`--freeze-defaults`, or `prepend = ["freeze-defaults"]` in a recipe); it is in no
    pipeline by itself, because the result takes fewer inputs than the original.

    Before:  ir_version 6, inputs x, w, initializers w
    After:   ir_version 6, inputs x,    initializers w
    Changes numerics: exact, for callers that leave the defaults alone.  Leaves alone: inputs without a default.
    Source: onnx/docs/IR.md, "Graphs".
    """

    name: ClassVar[str] = "freeze-defaults"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    drops_defaults: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        inputs = model.graph.inputs
        frozen = {
            value
            for value in inputs
            if value.is_initializer() and ctx.permit("freeze-default", value)
        }
        if not frozen:
            return False
        kept = [value for value in inputs if value not in frozen]
        inputs.clear()
        inputs.extend(kept)
        model.ir_version = max(model.ir_version, 4)
        told = f"{len(frozen)} overridable defaults became constants: no feed can replace them any more"
        ctx.remark(RemarkKind.NOTE, "freeze-default", "", told)
        ctx.refresh()
        return True


@dataclasses.dataclass(frozen=True)
class LiftConstants:
    """Turns `Constant` nodes into initializers of the same name.

    Every spelling counts: value, value_float(s), value_int(s), value_string(s), sparse_value.

    Before:  c = Constant<value = t>()   y = Add(x, c)
    After:   initializer c = t           y = Add(x, c)
    Changes numerics: exact.  Leaves alone: function bodies, which cannot hold initializers; graph outputs, which need
    a producer.
    Source: ONNX Constant-1 .. 25.
    """

    name: ClassVar[str] = "lift-constants"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for scope, nodes in ctx.walk(model).parts:
            if scope.function is not None:
                continue
            gone = [node for node in nodes if _lift(node, scope.graph, ctx)]
            scope.graph.remove(gone, safe=True)
            changed = changed or bool(gone)
        if changed:
            ctx.refresh()  # one inference over the whole model costs less than an update for each constant
        return changed


def _lift(node: ir.Node, graph: ir.Graph, ctx: Context) -> bool:
    """Puts an initializer where the output of a `Constant` node was; whether the node may go now."""
    if node.op_type != "Constant" or node.domain:
        return False
    old = node.outputs[0]
    tensor = values.constant(old)
    if tensor is None or old.is_graph_output() or not old.name:
        return False
    if not ctx.permit("lift-constant", node):
        return False
    new = ir.Value(
        name=old.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
        doc_string=old.doc_string,
        metadata_props=old.metadata_props,
    )
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    old.name = None
    graph.register_initializer(new)
    return True


@dataclasses.dataclass(frozen=True)
class LiftSubgraphConstants:
    """Moves the initializers of branches and loop bodies to the main graph.

    There, equal ones meet, nodes that read them are seen to be equal or to be the same in every turn, and tools that
    look for weights find them.  One whose name a sibling uses too gets a new one.

    Before:  y = If(c) <then_branch = { initializers w   t = Add(x, w) }, …>
    After:   initializers w   y = If(c) <then_branch = { t = Add(x, w) }, …>
    Changes numerics: exact.  Leaves alone: initializers that a subgraph returns or takes as defaults of its inputs;
    those that a quantization annotation names; those that hide a value of a graph around them, of which ONNX Runtime
    1.31 reads the one or the other; function bodies, which cannot hold initializers; graphs of custom operators, which
    may look for weights in them.
    Source: onnx/docs/IR.md, "Graphs": a subgraph sees the values of the graphs around it.
    """

    name: ClassVar[str] = "lift-subgraph-constants"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        scopes = [scope for scope, _ in ctx.walk(model).parts]
        inner = [s for s in scopes if s.parent is not None and s.graph.initializers]
        inner = [scope for scope in inner if scope.function is None and scope.is_plain]
        if not inner:
            return False
        annotated = ctx.annotated(model)
        counts = Counter(value.name for scope in all_graphs(model) for value in _named(scope.graph))
        changed = False
        for scope in inner:
            kept = annotated | _outer_names(scope)
            for value in tuple(scope.graph.initializers.values()):
                bound = value.is_graph_output() or value.is_graph_input() or value.name in kept
                if not bound and ctx.permit("lift-subgraph-constant", value):
                    _lift_out(value, scope.graph, model.graph, counts, ctx)
                    changed = True
        return changed


def _named(graph: ir.Graph) -> Iterator[ir.Value]:
    """The values that a graph itself defines by name."""
    yield from dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    yield from (value for node in graph for value in node.outputs if value.name)


def _outer_names(scope: Scope) -> set[str | None]:
    """The names of the values around a graph."""
    found: set[str | None] = set()
    outer = scope.parent
    while outer is not None:
        found.update(value.name for value in _named(outer.graph))
        outer = outer.parent
    return found


def _lift_out(
    value: ir.Value, graph: ir.Graph, main: ir.Graph, counts: Counter[str | None], ctx: Context
) -> None:
    del graph.initializers[value.name or ""]
    if counts[value.name] > 1:
        counts[value.name] -= 1
        value.name = ctx.names.fresh(value.name or "constant")
    main.register_initializer(value)


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode:
    """Removes what no graph output depends on.

    Dead are: nodes, in every graph; optional outputs that nobody reads (they are omitted); initializers; model-local
    functions; opset imports.

    Before:  y, mask = Dropout(x)   d = Exp(x)   initializers w (unused)
    After:   y = Dropout(x)
    Changes numerics: exact.  Leaves alone: graph inputs, used or not; initializers that are graph inputs or that a
    quantization annotation names; custom operators without outputs; the import of ai.onnx; models without outputs;
    outputs whose presence means something (BatchNormalization before opset 14).
    """

    name: ClassVar[str] = "remove-dead-code"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if not model.graph.outputs:  # all of it would be dead, and no runtime takes an empty graph
            return False
        steps = (
            _remove_nodes,
            _omit_outputs,
            _remove_initializers,
            _remove_functions,
            _drop_imports,
        )
        changes = [step(model, ctx) for step in steps]
        return any(changes)


def _remove_nodes(model: ir.Model, ctx: Context) -> bool:
    """Users come before producers in the reversed walk, inner graphs before outer ones: one sweep is enough."""
    changed = False
    nodes = [node for _, nodes in ctx.walk(model).parts for node in nodes]
    for node in reversed(nodes):
        if node.graph is not None and is_dead(node) and ctx.permit("dead-node", node):
            remove(node, ctx)
            changed = True
    return changed


def _omit_outputs(model: ir.Model, ctx: Context) -> bool:
    changed = False
    for scope, nodes in ctx.walk(model).parts:
        for node in nodes:
            if len(node.outputs) > 1:
                changed = _omit(node, scope, ctx) or changed
    return changed


def _omit(node: ir.Node, scope: Scope, ctx: Context) -> bool:
    """Omits the optional outputs of a node that nobody reads; names say absence in the middle, length at the end."""
    optional = _omittable(node, scope.opsets)
    idle = [
        value
        for index, value in enumerate(node.outputs)
        if index < len(optional) and optional[index] and _is_idle(value)
    ]
    named = [value for value in idle if value.name]
    trailing = 0
    for value in reversed(node.outputs):
        if value not in idle:
            break
        trailing += 1
    trailing = min(trailing, len(node.outputs) - 1)
    if not (named or trailing) or not ctx.permit("unused-output", node):
        return False
    for value in named:
        value.name = ""
    node.resize_outputs(len(node.outputs) - trailing)
    return True


def _is_idle(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output()


def _omittable(node: ir.Node, opsets: operators.Opsets) -> tuple[bool, ...]:
    """Which outputs of a node may be left out without changing the others."""
    version = operators.opset(node, opsets) or 0
    if node.op_type == "BatchNormalization" and version < 14:
        return ()  # the number of outputs chose between training and inference
    if operators.has_references(node):
        return ()
    return _optional_outputs(node.op_type, version, node.domain)


@functools.lru_cache(maxsize=1024)
def _optional_outputs(op_type: str, version: int, domain: str) -> tuple[bool, ...]:
    schema = operators.find_schema(op_type, version, domain)
    if schema is None:
        return ()
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return tuple(output.option == optional for output in schema.outputs)


def _remove_initializers(model: ir.Model, ctx: Context) -> bool:
    kept = ctx.annotated(model)
    changed = False
    for scope, _ in ctx.walk(model).parts:
        for name, value in tuple(scope.graph.initializers.items()):
            needed = value.uses() or value.is_graph_output() or value.is_graph_input()
            if not needed and name not in kept and ctx.permit("unused-initializer", value):
                del scope.graph.initializers[name]
                changed = True
    return changed


def _remove_functions(model: ir.Model, ctx: Context) -> bool:
    if not model.functions:
        return False
    live = _reachable(model)
    changed = False
    for identifier in tuple(model.functions):
        if identifier not in live and ctx.permit("unused-function", "::".join(identifier[:2])):
            for node in reversed(tuple(model.functions[identifier].graph)):
                ctx.shapes.forget(node)
            del model.functions[identifier]
            changed = True
    return changed


def _reachable(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """The functions that the main graph calls, directly or through others."""
    live: set[ir.OperatorIdentifier] = set()
    pending = [model.graph]
    while pending:
        for node in pending.pop().all_nodes():
            called = node.op_identifier()
            if called in model.functions and called not in live:
                live.add(called)
                pending.append(model.functions[called].graph)
    return live


def _drop_imports(model: ir.Model, ctx: Context) -> bool:
    """Imports without an operator; the model keeps those of its functions, which share its versions."""
    used = set(MAIN_DOMAINS)
    changed = False
    if not model.functions and used.issuperset(model.opset_imports):
        return False
    for function in model.functions.values():
        domains = MAIN_DOMAINS | {node.domain for node in function.all_nodes()}
        changed = _keep_imports(function.opset_imports, domains, f"{function.name}", ctx) or changed
        used |= domains | {function.domain}
    used |= {node.domain for node in model.graph.all_nodes()}
    return _keep_imports(model.opset_imports, used, "model", ctx) or changed


def _keep_imports(
    imports: dict[str, int], used: set[str] | frozenset[str], owner: str, ctx: Context
) -> bool:
    dropped = [d for d in imports if d not in used and ctx.permit("unused-import", f"{owner}/{d}")]
    for domain in dropped:
        del imports[domain]
    return bool(dropped)
