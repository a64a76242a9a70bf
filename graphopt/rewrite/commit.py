"""Putting a replacement into a graph: the checks before, and the mutation that may not fail after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.operators import subgraphs
from graphopt.rewrite.context import Context, name_of
from graphopt.rewrite.rules import Facts, Skip

RULE_KEY = "graphopt.rule"
ORIGIN_KEY = "graphopt.from"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A graph in which rewrites happen.

    Attributes:
        graph: the graph.
        facts: what rules may ask about in it.
        is_function: a function body, which cannot hold initializers: constants become `Constant` nodes.
    """

    graph: ir.Graph
    facts: Facts
    is_function: bool

    def check(
        self, root: ir.Node, new: Sequence[ir.Value | None], tape: Builder, ctx: Context
    ) -> None:
        """Refuses replacements that would break the graph or its contract.

        Raises:
            Skip: with the reason.
        """
        if len(new) != len(root.outputs):
            raise Skip(f"{len(new)} replacements for {len(root.outputs)} outputs", root)
        if tape.nodes or tape.constants:
            ctx.shapes.preview(tape.nodes, tape.constants, self.graph)
        for old, value in zip(root.outputs, new, strict=True):
            if value is None:
                if old.uses() or old.is_graph_output():
                    raise Skip(f"no replacement for output {old.name!r}, which is used", root)
                continue
            _check_type(old, value, ctx)
            if old.is_graph_output():
                self._check_output(old, value, tape.nodes, new)

    def _check_output(
        self,
        old: ir.Value,
        value: ir.Value,
        built: Sequence[ir.Node],
        new: Sequence[ir.Value | None],
    ) -> None:
        """A graph output needs a producer of its own in its graph: it takes over the output's name."""
        producer = value.producer()
        local = producer is not None and (producer in built or producer.graph is self.graph)
        if not local and value in _inputs(old):
            raise Skip("", value)  # some node has to pass on a value from outside: this one may
        if not local or value.is_graph_output() or sum(v is value for v in new) > 1:
            raise Skip(
                f"graph output {old.name!r} needs a producer of its own in this graph", value
            )


def _inputs(value: ir.Value) -> Sequence[ir.Value | None]:
    """What the producer of a value reads."""
    producer = value.producer()
    return () if producer is None else producer.inputs


def _check_type(old: ir.Value, value: ir.Value, ctx: Context) -> None:
    if None not in (old.dtype, value.dtype) and old.dtype != value.dtype:
        raise Skip(f"replaces {old.dtype} by {value.dtype}", value)
    before, after = ctx.shapes.dims(old), ctx.shapes.dims(value)
    if before is None or after is None:
        return
    if len(before) != len(after):
        raise Skip(f"replaces rank {len(before)} by rank {len(after)}", value)
    for a, b in zip(before, after, strict=True):
        if a.is_static and b.is_static and a != b:
            raise Skip(f"replaces dims {_text(before)} by {_text(after)}", value)


def _text(dims: Iterable[object]) -> str:
    return "[" + ", ".join(map(str, dims)) + "]"


def commit(
    rule: str,
    root: ir.Node,
    new: Sequence[ir.Value | None],
    tape: Builder,
    site: Site,
    ctx: Context,
) -> list[ir.Node]:
    """Replaces `root` by what is on the tape; returns the nodes to look at again.

    All checks were made: nothing in here may fail.
    """
    users = [use.node for old in root.outputs for use in old.uses()]
    stale = _stale(root, new, ctx)
    _import_domains(tape.nodes, site, ctx)
    new = _place_constants(root, new, tape, site, ctx)
    _name(rule, root, tape, new, ctx)
    site.graph.insert_before(root, tape.nodes)
    for old, value in zip(root.outputs, new, strict=True):
        if value is not None:
            name = old.name
            take_over(old, value, fresh=value.producer() in tape.nodes)
            ctx.replaced(name, value.name)
    left = remove(root, ctx)
    ctx.shapes.placed(tape.nodes, (user for user in users if user.graph is not None), stale=stale)
    return [*tape.nodes, *left, *users]


def _stale(root: ir.Node, new: Sequence[ir.Value | None], ctx: Context) -> bool:
    """Whether more or other things are known of the replacements than of what they replace."""
    pairs = zip(root.outputs, new, strict=True)
    return any(value is not None and not ctx.shapes.agree(old, value) for old, value in pairs)


def _import_domains(nodes: Iterable[ir.Node], site: Site, ctx: Context) -> None:
    """Imports the domains that `nodes` bring in, in the version that the target has.

    A function's body has imports of its own; the model needs them too, once the function is inlined.
    """
    new = {node.domain for node in nodes} - site.facts.opsets.keys()
    if not new:
        return
    functions = (function.opset_imports for function in ctx.model.functions.values())
    ours = (imports for imports in functions if imports is site.facts.opsets)
    for imports in (ctx.model.opset_imports, *ours):
        for domain in sorted(new):
            imports.setdefault(domain, ctx.target.domains.get(domain, 1))


def _place_constants(
    root: ir.Node, new: Sequence[ir.Value | None], tape: Builder, site: Site, ctx: Context
) -> Sequence[ir.Value | None]:
    """Gives the tape's constants a home: initializers, or `Constant` nodes in a function body.

    Returns the replacements: a constant among them may have become a node's output.
    """
    used = {*new, *(value for node in tape.nodes for value in node.inputs)}
    placed: dict[ir.Value | None, ir.Value] = {}
    for value in tape.constants:
        if value not in used:
            continue
        value.name = ctx.names.fresh(f"{name_of(root)}_{value.name}")
        if not site.is_function:
            site.graph.register_initializer(value)
            continue
        tensor = value.const_value
        assert tensor is not None
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=value.name)
        node.outputs[0].name = value.name
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        value.replace_all_uses_with(node.outputs[0])
        placed[value] = node.outputs[0]
        tape.nodes.insert(0, node)
    return [placed.get(value, value) for value in new]


def _name(
    rule: str, root: ir.Node, tape: Builder, new: Sequence[ir.Value | None], ctx: Context
) -> None:
    """Names the tape's nodes and values after the root, and says where they come from."""
    final = {value.producer() for value in new if value is not None}
    for node in tape.nodes:
        keeps = node in final and root.name
        node.name = (
            root.name if keeps else ctx.names.fresh(f"{root.name or name_of(root)}_{node.op_type}")
        )
        if keeps:
            final.discard(node)
            final = {None}  # only one node can keep the root's name
        for value in node.outputs:
            if value.name is None:
                value.name = ctx.names.fresh(f"{name_of(root)}_{node.op_type}")
        node.metadata_props.setdefault(RULE_KEY, f"{ctx.pass_name}/{rule}")
        node.metadata_props.setdefault(ORIGIN_KEY, root.name or name_of(root))


def take_over(old: ir.Value, value: ir.Value, *, fresh: bool) -> None:
    """Puts `value` where `old` was; a new value, or a graph output, keeps the old name and declaration."""
    is_output = old.is_graph_output()
    name = old.name
    if fresh or is_output:
        value.metadata_props.update(old.metadata_props)
        value.doc_string = value.doc_string or old.doc_string
    if is_output or (fresh and value.shape is None):
        value.type, value.shape = old.type, old.shape
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    if fresh or is_output:
        old.name = None
        value.name = name


def discard(tape: Builder, ctx: Context) -> None:
    """Undoes what building did to the model: new nodes count as users of the values that they read."""
    for node in reversed(tape.nodes):  # most rules that decline have built nothing
        ctx.forget(node)
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, None)


def is_dead(node: ir.Node) -> bool:
    """Whether no output of `node` is used or leaves its graph.

    ONNX operators have no other effect; one without outputs is a custom sink, and that is all it is there for.
    """
    outputs = node.outputs
    for value in outputs:  # spelt out: asked of every node of every turn
        if value.uses() or value.is_graph_output():
            return False
    return bool(outputs)


def remove(node: ir.Node, ctx: Context) -> list[ir.Node]:
    """Removes a node without uses; returns the producers that it leaves behind."""
    graph = node.graph
    assert graph is not None
    held = subgraphs(node)
    reads = _reads(node) if held else node.inputs
    makers = dict.fromkeys([value.producer() for value in reads if value is not None])
    for inner in held:
        _dissolve(inner)
    ctx.forget(node)
    graph.remove((node,), safe=True)  # in a tuple: onnx_ir takes longer to see that a node is none
    return [m for m in makers if m is not None and m.graph is not None]


def _dissolve(graph: ir.Graph) -> None:
    """Empties a subgraph whose owner goes: its nodes would otherwise keep outer values in use."""
    for node in graph:
        for inner in subgraphs(node):
            _dissolve(inner)
    graph.outputs.clear()
    graph.remove(tuple(graph), safe=True)


def _reads(node: ir.Node) -> Iterable[ir.Value]:
    """The inputs of `node` and of every node in its subgraphs."""
    yield from (v for v in node.inputs if v is not None)
    for graph in subgraphs(node):
        yield from graph.outputs
        for inner in graph:
            yield from _reads(inner)
