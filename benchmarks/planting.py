"""What plants one wrong rewrite in a model: the pass, and the ways of changing a graph that kinds of faults share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import Numerics
from graphopt.ir import operators, scopes, values
from graphopt.rewrite import Context

Array: TypeAlias = npt.NDArray[Any]
Spoil: TypeAlias = Callable[["Planter", ir.Node], bool]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault: which operators it may strike, and how; `spoil` says whether it could."""

    name: str
    strikes: tuple[str, ...]
    spoil: Spoil
    within: str = ""  # only in bodies of this attribute


@dataclasses.dataclass
class Planter:
    """What faults change graphs with."""

    model: ir.Model
    ctx: Context

    def permit(self, kind: str, node: ir.Node) -> bool:
        return self.ctx.permit(kind, node, Numerics.REORDERED)

    def constant(self, array: Array, graph: ir.Graph) -> ir.Value:
        name = self.ctx.names.fresh("planted")
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array, name=name))])
        node.outputs[0].name = name
        node.outputs[0].dtype = ir.DataType.from_numpy(array.dtype)
        node.outputs[0].shape = ir.Shape(array.shape)
        first = next(iter(graph))
        graph.insert_before(first, [node])
        return node.outputs[0]

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value], **attributes: object
    ) -> ir.Value:
        attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]  # type: ignore[arg-type]
        node = ir.Node("", op, inputs, attrs)
        node.outputs[0].name = self.ctx.names.fresh("planted")
        assert before.graph is not None
        before.graph.insert_before(before, [node])
        return node.outputs[0]


@dataclasses.dataclass(frozen=True)
class Plant:
    """The faulty pass: strikes the middle one of the nodes that the fault can strike."""

    kind: Kind

    @property
    def name(self) -> str:
        return "planted"

    @property
    def numerics(self) -> Numerics:
        return Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        found = list(_candidates(model, self.kind))
        planter = Planter(model, ctx)
        middle = len(found) // 2
        for node in (*found[middle:], *reversed(found[:middle])):
            if node.graph is None:
                continue
            if not ctx.permit(self.kind.name, node, Numerics.REORDERED):
                return False
            struck = self.kind.spoil(planter, node)
            if struck:
                ctx.refresh()
                return True
            ctx.rewrites.pop()
        return False


def _candidates(model: ir.Model, kind: Kind) -> Iterator[ir.Node]:
    """Nodes of the main graph, or of bodies where the kind is for those: others may be there for no input at all."""
    for scope in scopes.all_graphs(model):
        if not (_is_within(scope, kind.within) if kind.within else scope.owner is None):
            continue
        for node in scope.graph:
            if node.op_type in kind.strikes or ("*" in kind.strikes and _is_plain(node)):
                yield node


def _is_within(scope: scopes.Scope, attribute: str) -> bool:
    owner = scope.owner
    held = None if owner is None else owner.attributes.get(attribute)
    return held is not None and held.value is scope.graph


def _is_plain(node: ir.Node) -> bool:
    out = node.outputs[0]
    return bool(node.inputs) and out.dtype is ir.DataType.FLOAT and not operators.subgraphs(node)


def set_attribute(node: ir.Node, name: str, value: object) -> bool:
    node.attributes[name] = ir.convenience.convert_attribute(name, value)  # type: ignore[arg-type]
    return True


def integer(node: ir.Node, name: str, default: int) -> int:
    held = node.attributes.get(name)
    return default if held is None else held.as_int()


def other_operator(name: str) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        node.op_type = name
        return True

    return spoil


def dropped(_: Planter, node: ir.Node) -> bool:
    """The node is gone: what it takes goes on."""
    source, out = node.inputs[0], node.outputs[0]
    if source is None or out.is_graph_output():
        return False
    out.replace_all_uses_with(source)
    return True


def swapped(a: int, b: int) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        if len(node.inputs) <= max(a, b) or node.inputs[a] is node.inputs[b]:
            return False
        first, second = node.inputs[a], node.inputs[b]
        node.replace_input_with(a, second)
        node.replace_input_with(b, first)
        return True

    return spoil


def in_shape(build: Callable[[Planter, ir.Node, ir.Value], ir.Value | None]) -> Spoil:
    """What reads the output reads something else, brought to the shape that the output has."""

    def shaped(planter: Planter, at: ir.Node, x: ir.Value) -> ir.Value | None:
        made = build(planter, at, x)
        return (
            None
            if made is None
            else planter.op(at, "Reshape", [made, planter.op(at, "Shape", [x])])
        )

    return at_output(shaped)


def without_input(index: int) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        if len(node.inputs) <= index or node.inputs[index] is None:
            return False
        node.replace_input_with(index, None)
        return True

    return spoil


def attribute(name: str, change: Callable[[ir.Node], object]) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        value = change(node)
        return value is not None and set_attribute(node, name, value)

    return spoil


def constant_input(index: int, change: Callable[[Array], Array | None]) -> Spoil:
    """The constant at an input becomes another one."""

    def spoil(planter: Planter, node: ir.Node) -> bool:
        if len(node.inputs) <= index or node.inputs[index] is None:
            return False
        held = node.inputs[index]
        tensor = values.constant(held) if held is not None else None
        if tensor is None or tensor.size == 0:
            return False
        array = np.array(tensor.numpy())
        changed = change(array.copy())
        if changed is None or np.array_equal(changed, array):
            return False
        assert node.graph is not None
        made = planter.constant(changed.astype(array.dtype), node.graph)
        node.replace_input_with(index, made)
        return True

    return spoil


def any_constant(change: Callable[[Array], Array | None]) -> Spoil:
    def spoil(planter: Planter, node: ir.Node) -> bool:
        return any(constant_input(i, change)(planter, node) for i in range(len(node.inputs)))

    return spoil


def at_output(build: Callable[[Planter, ir.Node, ir.Value], ir.Value | None]) -> Spoil:
    """What reads the node's output reads something made of it instead."""

    def spoil(planter: Planter, node: ir.Node) -> bool:
        out = node.outputs[0]
        users = list(out.uses())
        if node.graph is None:
            return False
        if not users and out.is_graph_output():
            return _at_end(planter, node.graph, out, build)
        if not any(user.node.graph is node.graph for user in users):
            return False
        # Before the first reader in the order of the graph.
        readers = {u.node for u in users}
        first = next(n for n in node.graph if n in readers)
        made = build(planter, first, out)
        if made is None:
            return False
        for use in users:
            use.node.replace_input_with(use.idx, made)
        return True

    return spoil


def _at_end(
    planter: Planter,
    graph: ir.Graph,
    out: ir.Value,
    build: Callable[[Planter, ir.Node, ir.Value], ir.Value | None],
) -> bool:
    """A body returns something made of what it returned; outputs of the model keep their names, and so their makers."""
    last = graph[len(graph) - 1]
    if graph is planter.model.graph:
        return False
    mark = ir.Node("", "Identity", [out], name=planter.ctx.names.fresh("mark"))
    mark.outputs[0].name = planter.ctx.names.fresh("planted")
    graph.insert_after(last, [mark])
    made = build(planter, mark, out)
    if made is None:
        return False
    made.type, made.shape = out.type, out.shape
    mark.replace_input_with(0, made)
    mark.outputs[0].type, mark.outputs[0].shape = out.type, out.shape
    places = [i for i, held in enumerate(graph.outputs) if held is out]
    for place in places:
        graph.outputs[place] = mark.outputs[0]
    return bool(places)


def at_input(build: Callable[[Planter, ir.Node, ir.Value], ir.Value | None]) -> Spoil:
    """A float input of the model is read through something."""

    def spoil(planter: Planter, node: ir.Node) -> bool:
        fed = [v for v in node.inputs if v is not None and v.is_graph_input()]
        if not fed or fed[0].dtype is not ir.DataType.FLOAT or fed[0].is_initializer():
            return False
        made = build(planter, node, fed[0])
        if made is None:
            return False
        node.replace_input_with(list(node.inputs).index(fed[0]), made)
        return True

    return spoil


def float_constant(planter: Planter, node: ir.Node, number: float) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return planter.constant(np.array(number, np.float32), node.graph)


def beyond(limit: float, then: float) -> Callable[[Planter, ir.Node, ir.Value], ir.Value]:
    """`then` wherever the magnitude exceeds a limit."""

    def build(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
        large = p.op(at, "Greater", [p.op(at, "Abs", [x]), float_constant(p, at, limit)])
        return p.op(at, "Where", [large, float_constant(p, at, then), x])

    return build


def clipped(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
    return p.op(at, "Clip", [x, float_constant(p, at, -10.0), float_constant(p, at, 10.0)])


def flushed(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
    small = p.op(at, "Less", [p.op(at, "Abs", [x]), float_constant(p, at, 1e-3)])
    return p.op(at, "Where", [small, float_constant(p, at, 0.0), x])


def rounded(dtype: ir.DataType) -> Callable[[Planter, ir.Node, ir.Value], ir.Value]:
    def build(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
        half = p.op(at, "Cast", [x], to=int(dtype))
        return p.op(at, "Cast", [half], to=int(ir.DataType.FLOAT))

    return build


def when_size(test: str, limit: int = 1) -> Callable[[Planter, ir.Node, ir.Value], ir.Value | None]:
    """Off by 1 % when a dimension is more than a limit, or odd."""

    def build(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value | None:
        if x.shape is None or all(isinstance(d, int) for d in x.shape):
            return None
        axis = next(i for i, d in enumerate(x.shape) if not isinstance(d, int))
        assert isinstance(at.graph, ir.Graph)
        # Shape has taken `start` and `end` since opset 15 only.
        place = p.constant(np.array([axis], np.int64), at.graph)
        size = p.op(at, "Gather", [p.op(at, "Shape", [x]), place], axis=0)
        if test == "several":
            hit = p.op(at, "Greater", [size, p.constant(np.array([limit], np.int64), at.graph)])
        else:
            odd = p.op(at, "Mod", [size, p.constant(np.array([2], np.int64), at.graph)])
            hit = p.op(at, "Equal", [odd, p.constant(np.array([1], np.int64), at.graph)])
        factor = p.op(at, "Where", [hit, float_constant(p, at, 1.01), float_constant(p, at, 1.0)])
        return p.op(at, "Mul", [x, factor])

    return build


def scaled(factor: float) -> Callable[[Planter, ir.Node, ir.Value], ir.Value]:
    return lambda p, at, x: p.op(at, "Mul", [x, float_constant(p, at, factor)])
