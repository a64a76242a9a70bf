"""What goes into control flow and comes out of it: results that nobody reads, values that no turn changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import Scope, dependencies
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, is_dead, name_of, remove
from graphopt.rewrite.commit import take_over
from graphopt.rewrite.relink import mark, place_constant, substitute

SCAN_LISTS = ("scan_input_axes", "scan_input_directions")
SCAN_OUTPUT_LISTS = ("scan_output_axes", "scan_output_directions")


@dataclasses.dataclass(frozen=True)
class TrimControlFlow:
    """Takes out of `If`, `Loop` and `Scan` what need not pass through them.

    Results that nobody reads go, and with them what only they need: a carried value that feeds nothing but itself, a
    scanned input. A carried value that every turn hands on unchanged is read from outside instead. A result that is
    the same value of the outside in both branches, or the same constant, is taken from outside.

    Before:  a, b, c = Loop(m, , x, k, z) <body = (i, t, p, q, r) => (t, p2 = Add(p, q), q, r2 = Exp(r))>   c unused
    After:   a = Loop(m, , x) <body = (i, t, p) => (t, p2 = Add(p, k))>                                     b is k
    Changes numerics: exact.  Leaves alone: one scanned input of a Scan, which tells how many turns it takes; Scan
    before opset 9, which runs over batches.
    Source: ONNX If-1 .. 25, Loop-1 .. 25, Scan-9 .. 25.
    """

    name: ClassVar[str] = "trim-control-flow"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        while _trim_all(
            model, ctx
        ):  # what one loop no longer reads, another need no longer hand on
            changed = True
        return changed


def _trim_all(model: ir.Model, ctx: Context) -> bool:
    changed = False
    inner_first = [scope for scope, _ in ctx.walk(model).parts][
        ::-1
    ]  # what they free may go outside
    if all(scope.owner is None for scope in inner_first):
        return False
    for scope in inner_first:
        for node in tuple(scope.graph):
            if node.op_type in ("If", "Loop", "Scan") and node.domain in ("", "ai.onnx"):
                changed = _trim(node, scope, ctx) or changed
    return changed


def _trim(node: ir.Node, scope: Scope, ctx: Context) -> bool:
    if operators.has_references(node) or is_dead(node):
        return False
    if node.op_type == "If":
        changed = _share_results(node, scope, ctx)
        if is_dead(node):  # its results have given their names away: no runtime would take it
            remove(node, ctx)
            return True
        return _drop_branch_results(node, ctx) or changed
    ports = Ports.of(node, scope)
    if ports is None:
        return False
    unchanged = _unchanged(ports, ctx)
    idle = _idle(ports, unchanged)
    if not (idle or unchanged) or not ctx.permit("unused-loop-value", node):
        return False
    _apply(ports, unchanged, idle, ctx)
    return True


def _branches(node: ir.Node) -> tuple[ir.Graph, ...]:
    """Both branches of an If, or nothing where they do not fit it."""
    found = operators.subgraphs(node)
    fits = len(found) == 2 and all(len(each.outputs) == len(node.outputs) for each in found)
    return found if fits else ()


def _share_results(node: ir.Node, scope: Scope, ctx: Context) -> bool:
    """Reads from outside what both branches give alike."""
    graphs = _branches(node)
    if not graphs:
        return False
    changed = False
    for index, result in enumerate(node.outputs):
        if not (result.uses() or result.is_graph_output()):
            continue
        ends = [_through_identities(graph.outputs[index]) for graph in graphs]
        outer = ends[0] if ends[0] is ends[1] and not _is_inside(ends[0], graphs[0]) else None
        tensor = None if outer is not None else _same_constant(ends)
        if (outer is None and tensor is None) or not ctx.permit("equal-results", result):
            continue
        if outer is None:
            assert tensor is not None
            bound = result.is_graph_output() or (scope.function is not None and scope.owner is None)
            outer = place_constant(
                tensor, ctx.names.fresh(f"{name_of(result)}_const"), node, as_node=bound, ctx=ctx
            )
        users = dict.fromkeys(use.node for use in result.uses())
        made = substitute(result, outer, node, "equal-results", ctx)
        ctx.shapes.update([*([made] if made else []), *users])
        changed = True
    return changed


def _same_constant(ends: Sequence[ir.Value]) -> ir.TensorProtocol | None:
    """The tensor that two small constants both hold, bit by bit."""
    one, two = (values.constant(end) for end in ends)
    if one is None or two is None or one.dtype != two.dtype or one.dtype == ir.DataType.STRING:
        return None
    if tuple(one.shape.numpy()) != tuple(two.shape.numpy()) or values.size_bytes(one) > 1 << 16:
        return None
    return one if one.tobytes() == two.tobytes() else None


def _is_inside(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether a value is defined in a graph itself, which has no inputs."""
    producer = value.producer()
    if producer is not None:
        return producer.graph is graph
    return graph.initializers.get(value.name or "") is value or value in graph.inputs


def _through_identities(value: ir.Value) -> ir.Value:
    """The value that a chain of Identity passes on."""
    while (node := value.producer()) is not None and node.op_type == "Identity" and not node.domain:
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value


def _drop_branch_results(node: ir.Node, ctx: Context) -> bool:
    """Takes the results that nobody reads out of both branches."""
    graphs = _branches(node)
    kept = [i for i, v in enumerate(node.outputs) if v.uses() or v.is_graph_output()]
    if not graphs or len(kept) == len(node.outputs) or not ctx.permit("unused-result", node):
        return False
    for graph in graphs:
        outputs = [graph.outputs[index] for index in kept]
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        _sweep(graph, ctx)
    _rebuild(node, node.inputs, kept, {}, ctx)
    return True


def _sweep(graph: ir.Graph, ctx: Context) -> None:
    """Removes the nodes of a graph that nobody reads any more."""
    for node in reversed(tuple(graph)):
        if is_dead(node):
            remove(node, ctx)


def _rebuild(
    node: ir.Node,
    inputs: Sequence[ir.Value | None],
    kept: Sequence[int],
    changed: Mapping[str, Any],
    ctx: Context,
) -> ir.Node:
    """Replaces a node by one with other inputs and fewer outputs, which takes its bodies over."""
    graph = node.graph
    assert graph is not None
    attributes = [a for a in node.attributes.values() if a.name not in changed]
    attributes += [
        ir.convenience.convert_attribute(name, held)
        for name, held in changed.items()
        if held is not None
    ]
    for held in tuple(node.attributes):  # removing the old node must not empty the bodies
        del node.attributes[held]
    new = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        attributes,
        num_outputs=len(kept),
        version=node.version,
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    mark(new, "unused-result", name_of(node), ctx)
    graph.insert_before(node, new)
    users = dict.fromkeys(use.node for index in kept for use in node.outputs[index].uses())
    for index, value in zip(kept, new.outputs, strict=True):
        take_over(node.outputs[index], value, fresh=True)
    remove(node, ctx)
    ctx.shapes.update([new, *users])
    return new


@dataclasses.dataclass(frozen=True, eq=False)
class Port:
    """A value that a loop hands from turn to turn.

    Attributes:
        index: of the node's input, and of the body's.
        given: what it is before the first turn.
        enters: what a turn gets.
        leaves: what a turn hands on; its index among the body's outputs is `index` less `offset`.
        result: what it is after the last turn.
    """

    index: int
    given: ir.Value | None
    enters: ir.Value
    leaves: ir.Value
    result: ir.Value


@dataclasses.dataclass(frozen=True, eq=False)
class Ports:
    """A Loop or Scan, opened.

    Attributes:
        node: the node.
        body: its graph.
        opsets: the imports that rule it.
        carried: the values handed from turn to turn.
        head: how many body outputs come before those (a Loop's condition).
        scans: the indices of the node's outputs that stack a value of each turn.
        scanned: the indices of the node's inputs that are taken apart, a piece a turn.
    """

    node: ir.Node
    body: ir.Graph
    opsets: operators.Opsets
    carried: tuple[Port, ...]
    head: int
    scans: range
    scanned: range

    @staticmethod
    def of(node: ir.Node, scope: Scope) -> Ports | None:
        """The opened node, or None where its parts do not fit together or it is a Scan over batches."""
        bodies = operators.subgraphs(node)
        if len(bodies) != 1:
            return None
        body, total = bodies[0], len(node.inputs)
        if node.op_type == "Scan":
            if (operators.opset(node, scope.opsets) or 0) < 9:
                return None
            first, head, end = 0, 0, total - operators.attribute(node, "num_scan_inputs", 0)
        else:
            first, head, end = 2, 1, max(total, 2)
        count = end - first
        fits = (
            count >= 0
            and len(body.inputs) == max(total, first)
            and len(body.outputs) == len(node.outputs) + head
            and len(node.outputs) >= count
            and not any(value.is_initializer() for value in body.inputs)
        )
        if not fits:
            return None
        carried = tuple(
            Port(
                first + i,
                node.inputs[first + i],
                body.inputs[first + i],
                body.outputs[head + i],
                node.outputs[i],
            )
            for i in range(count)
        )
        scans = range(count, len(node.outputs))
        return Ports(node, body, scope.opsets, carried, head, scans, range(end, total))


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _unchanged(ports: Ports, ctx: Context) -> list[Port]:
    """The carried values that are before and after every turn what they were before the first."""
    found = []
    for port in ports.carried:
        last = _through_identities(port.leaves)
        if port.given is None or (last is not port.enters and last is not port.given):
            continue
        if (
            None not in (port.enters.dtype, port.given.dtype)
            and port.enters.dtype != port.given.dtype
        ):
            ctx.missed(
                "unused-loop-value", ports.node, "the body declares another type than it gets"
            )
            continue
        found.append(port)
    return found


@dataclasses.dataclass(frozen=True)
class Idle:
    """What a loop need not do: carried values, inputs taken apart and outputs stacked for nothing."""

    carried: tuple[Port, ...]
    scanned: tuple[int, ...]
    scans: tuple[int, ...]

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.carried or self.scanned or self.scans)


def _idle(ports: Ports, unchanged: Sequence[Port]) -> Idle:
    """The ports on which nothing depends that anybody reads."""
    body, outputs = ports.body, ports.node.outputs
    candidates = [port for port in ports.carried if port not in unchanged]
    live = [port for port in candidates if _is_read(port.result)]
    roots = list(body.outputs)[: ports.head]
    roots += [port.leaves for port in live]
    roots += [body.outputs[ports.head + i] for i in ports.scans if _is_read(outputs[i])]
    while True:
        needed = _needed(body, roots)
        found = [port for port in candidates if port not in live and port.enters in needed]
        if not found:
            break
        live += found
        roots += [port.leaves for port in found]
    scanned = [i for i in ports.scanned if body.inputs[i] not in needed]
    if len(scanned) == len(ports.scanned):
        scanned = scanned[1:]  # one must say how many turns there are
    return Idle(
        tuple(port for port in candidates if port not in live),
        tuple(scanned),
        tuple(i for i in ports.scans if not _is_read(outputs[i])),
    )


def _needed(body: ir.Graph, roots: Iterable[ir.Value]) -> set[ir.Value]:
    """Everything within a body that some values depend on; what has no outputs runs in any case."""
    pending = list(roots)
    for node in body:
        if not node.outputs:
            pending.extend(dependencies(node))
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None and producer.graph is body:
            pending.extend(dependencies(producer))
    return seen


def _apply(ports: Ports, unchanged: Sequence[Port], idle: Idle, ctx: Context) -> None:
    """Takes ports out of the body, then out of the node."""
    node, body = ports.node, ports.body
    gone = sorted(port.index for port in (*unchanged, *idle.carried))
    first = ports.carried[0].index if ports.carried else 0
    lost = {index - first for index in gone} | set(idle.scans)
    outputs = list(body.outputs)
    body.outputs.clear()
    body.outputs.extend(v for i, v in enumerate(outputs) if i - ports.head not in lost)
    _sweep(body, ctx)
    for port in unchanged:
        _read_outside(port, ports, ctx)
    for index in sorted((*gone, *idle.scanned), reverse=True):
        del body.inputs[index]
    for port in unchanged:
        assert port.given is not None
        if _is_read(port.result):
            users = dict.fromkeys(use.node for use in port.result.uses())
            made = substitute(port.result, port.given, node, "unchanged-value", ctx)
            ctx.shapes.update([*([made] if made else []), *users])
    inputs = [v for i, v in enumerate(node.inputs) if i not in (*gone, *idle.scanned)]
    while inputs and inputs[-1] is None:
        inputs.pop()
    kept = [i for i in range(len(node.outputs)) if i not in lost]
    if kept:
        _rebuild(node, inputs, kept, _scan_attributes(ports, idle), ctx)
    else:
        remove(node, ctx)


def _read_outside(port: Port, ports: Ports, ctx: Context) -> None:
    """Puts the value that is given before the first turn where the body reads what the last turn handed on."""
    body, given = ports.body, port.given
    assert given is not None
    users = dict.fromkeys(use.node for use in port.enters.uses())
    made = []
    for index, value in enumerate(body.outputs):
        if value is port.enters:  # a result needs a producer within the body
            node = ir.Node("", "Identity", [given], name=ctx.names.fresh(f"{value.name}_Identity"))
            end = node.outputs[0]
            end.name, end.type, end.shape = (
                ctx.names.fresh(f"{value.name}_copy"),
                value.type,
                value.shape,
            )
            mark(node, "unchanged-value", value.name or "", ctx)
            body.append(node)
            body.outputs[index] = end
            made.append(node)
    port.enters.replace_all_uses_with(given)
    ctx.shapes.update([*made, *(user for user in users if user.graph is not None)])


def _scan_attributes(ports: Ports, idle: Idle) -> dict[str, Any]:
    """The attributes of a Scan that count its inputs and outputs, where those change."""
    if ports.node.op_type != "Scan":
        return {}
    changed: dict[str, Any] = {}
    dropped = {i - ports.scanned.start for i in idle.scanned}
    if dropped:
        changed["num_scan_inputs"] = len(ports.scanned) - len(dropped)
        changed.update(_shortened(ports.node, SCAN_LISTS, dropped))
    lost = {i - ports.scans.start for i in idle.scans}
    if lost:
        changed.update(_shortened(ports.node, SCAN_OUTPUT_LISTS, lost))
    return changed


def _shortened(node: ir.Node, names: Sequence[str], dropped: set[int]) -> dict[str, Any]:
    """Attributes of one element a port, without those of some ports; None for one that has none left."""
    found: dict[str, Any] = {}
    for name in names:
        held = node.attributes.get(name)
        if held is not None:
            kept = [each for i, each in enumerate(held.as_ints()) if i not in dropped]
            found[name] = kept or None
    return found
