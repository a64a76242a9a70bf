"""Which branches of `If` and which turns of `Loop` the feeds of a reference run take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, scopes, values
from graphopt.ir.build import Names
from graphopt.ir.shapes import Shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from graphopt.verify.feeds import Feed


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What decides which way control flow goes.

    Attributes:
        outer: conditions of the main graph, by value, and what each decides.
        inner: labels of conditions that graphs within nodes compute for themselves, in the order of `ways`.
        ways: name of the output that counts, for each of these, how often it was true and how often false.
        model: the model with that output; None where there are no such conditions.
    """

    outer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inner: tuple[str, ...] = ()
    ways: str = ""
    model: ir.Model | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What must be returned besides the outputs."""
        return (*self.outer, self.ways) if self.ways else tuple(self.outer)

    def without_inner(self) -> Conditions:
        """Those of the main graph alone."""
        return Conditions(self.outer)


def conditions(model: ir.Model) -> Conditions:
    """What decides which way the control flow of a model goes, functions aside; what no feed can change is left out.

    Args:
        model: is given a further output where graphs within nodes decide for themselves.
    """
    nodes = list(scopes.all_nodes(model.graph))
    if not any(_decider(node) is not None for node in nodes):
        return Conditions()
    facts = Shapes(model)
    settled = {value: way for node in nodes if (value := _decider(node)) is not None
               and (way := _settled(value, facts)) is not None}  # fmt: skip
    outer = {
        value.name: _label(node)
        for node in nodes
        if (value := _decider(node)) is not None
        and value.graph is model.graph
        and value not in settled
        and value.name
    }
    counter = _Counter(model.opset_imports.get("", 1), settled, Names.of(model))
    ways = counter.within(model.graph)
    if ways is None:
        return Conditions(outer)
    counts, labels = ways
    counts.type = ir.TensorType(ir.DataType.INT64)
    model.graph.outputs.append(counts)
    return Conditions(outer, tuple(labels), counts.name or "", model)


def _decider(node: ir.Node) -> ir.Value | None:
    """What decides whether a node goes one way or the other, if any feed might."""
    index = {"If": 0, "Loop": 1}.get(node.op_type)
    value = node.inputs[index] if index is not None and len(node.inputs) > index else None
    if value is None or node.domain or values.is_constant(value) or value.is_initializer():
        return None
    return value


def _settled(value: ir.Value, facts: Shapes) -> bool | None:
    """Which way a condition goes whatever is fed; None where that is open."""
    data = facts.data(value)
    array = None if data is None else data.static()
    return None if array is None or array.size != 1 else bool(array.reshape(-1)[0])


def _label(node: ir.Node, outer: str = "") -> str:
    inside = f" within {outer}" if outer else ""
    return f"{node.op_type} '{node.name or node.outputs[0].name}'{inside}"


class _Counter:
    """Makes the counts of what graphs within nodes decide outputs of those nodes."""

    def __init__(self, opset: int, settled: Mapping[ir.Value, bool], names: Names) -> None:
        self._opset = opset
        self._names = names
        self._settled = settled

    def within(self, graph: ir.Graph, outer: str = "") -> tuple[ir.Value, list[str]] | None:
        """Counts of the conditions within the nodes of a graph, as a value of that graph; None where there are none."""
        parts, labels = [], []
        for node in list(graph):
            found = self._through(node, _label(node, outer)) if _is_flow(node) else None
            if found is not None:
                parts.append(found[0])
                labels += found[1]
        return (self._joined(graph, parts), labels) if parts else None

    def _through(self, node: ir.Node, outer: str) -> tuple[ir.Value, list[str]] | None:
        """The counts of a node's graphs, as a new output of the node, summed over its turns."""
        graphs = operators.subgraphs(node)
        decider = _decider(node)
        way = None if decider is None else self._settled.get(decider)
        held = [
            None if way is not None and len(graphs) == 2 and _is_never(node, graph, way=way)
            else self._counted(graph, outer)
            for graph in graphs
        ]  # fmt: skip
        labels = [label for each in held if each is not None for label in each[1]]
        if not labels or node.graph is None:
            return None
        for graph, own in zip(graphs, held, strict=True):
            parts = []
            for other in held:
                if other is not None:
                    mine = other is own
                    parts.append(other[0] if mine else self._zeros(graph, 2 * len(other[1])))
            graph.outputs.append(_stated(self._joined(graph, parts)))
        # Outputs at the end that nobody reads may be left out, but not before one that somebody does.
        position = len(graphs[0].outputs) - (1 if node.op_type == "Loop" else 0)
        node.resize_outputs(position)
        made = node.outputs[-1]
        made.name = self._names.fresh("ways")
        if node.op_type == "If":
            return made, labels
        for name in ("scan_output_axes", "scan_output_directions"):
            if name in node.attributes:
                given = [*node.attributes[name].as_ints(), 0]
                node.attributes[name] = ir.AttrInt64s(name, given)
        return self._summed(node.graph, made), labels

    def _counted(self, graph: ir.Graph, outer: str) -> tuple[ir.Value, list[str]] | None:
        """What a graph decides by itself, and what is decided within its nodes."""
        own = {
            value: _label(node, outer)
            for node in graph
            if (value := _decider(node)) is not None
            and value not in self._settled
            and value.graph is graph
        }
        deeper = self.within(graph, outer)
        parts = [self._flags(graph, value) for value in own]
        labels = [*own.values(), *(deeper[1] if deeper else ())]
        if deeper is not None:
            parts.append(deeper[0])
        return (self._joined(graph, parts), labels) if parts else None

    def _flags(self, graph: ir.Graph, condition: ir.Value) -> ir.Value:
        """[1, 0] where a condition is true, [0, 1] where it is false."""
        one = self._constant(graph, [1])
        shaped = self._op(graph, "Reshape", [condition, one])
        ways = [shaped, self._op(graph, "Not", [shaped])]
        integer = int(ir.DataType.INT64)
        return self._joined(graph, [self._op(graph, "Cast", [each], to=integer) for each in ways])

    def _joined(self, graph: ir.Graph, parts: Sequence[ir.Value]) -> ir.Value:
        return self._op(graph, "Concat", parts, axis=0)

    def _zeros(self, graph: ir.Graph, count: int) -> ir.Value:
        return self._constant(graph, [0] * count)

    def _summed(self, graph: ir.Graph, counts: ir.Value) -> ir.Value:
        if self._opset >= 13:
            axes = self._constant(graph, [0])
            return self._op(graph, "ReduceSum", [counts, axes], keepdims=0)
        return self._op(graph, "ReduceSum", [counts], axes=[0], keepdims=0)

    def _constant(self, graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
        tensor = ir.tensor(np.asarray(numbers, np.int64))
        return self._op(graph, "Constant", [], value=tensor)

    def _op(
        self,
        graph: ir.Graph,
        op_type: str,
        inputs: Sequence[ir.Value],
        **attributes: int | list[int] | ir.TensorProtocol,
    ) -> ir.Value:
        attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs)
        node.outputs[0].name = self._names.fresh("ways")
        graph.append(node)
        return node.outputs[0]


def _is_flow(node: ir.Node) -> bool:
    return node.op_type in {"If", "Loop", "Scan"} and not node.domain


def _is_never(node: ir.Node, graph: ir.Graph, *, way: bool) -> bool:
    """Whether a graph is the branch that is never taken."""
    held = node.attributes.get("else_branch" if way else "then_branch")
    return held is not None and held.value is graph


def _stated(value: ir.Value) -> ir.Value:
    value.type = ir.TensorType(ir.DataType.INT64)
    return value


class Seen:
    """The ways that a model has gone on feeds so far.

    Args:
        found: what decides; see `conditions`.
        run: runs a feed and returns the outputs, conditions among them; None where the model refuses it.
        keep: is given the outputs of feeds that go a new way.
    """

    def __init__(
        self,
        found: Conditions,
        run: Callable[[Feed], dict[str, Any] | None],
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._found = found
        self._run = run
        self._keep = keep
        self._taken: set[tuple[str, bool]] = set()

    def note(self, outputs: Mapping[str, Any]) -> bool:
        """Notes which way each condition went; whether any went a new one."""
        before = len(self._taken)
        for name in self._found.outer:
            held = outputs.get(name)
            if isinstance(held, np.ndarray) and held.size == 1:
                self._taken.add((name, bool(held.reshape(())[()])))
        counts = outputs.get(self._found.ways)
        if isinstance(counts, np.ndarray):
            self._taken |= {
                (label, way)
                for label, pair in zip(self._found.inner, counts.reshape(-1, 2), strict=True)
                for way, count in zip((True, False), pair, strict=True)
                if count
            }
        return len(self._taken) > before

    def exist(self) -> bool:
        """Whether the model branches at all."""
        return bool(self._found.outer or self._found.inner)

    def missing(self) -> bool:
        """Whether some branch was never taken."""
        return len(self._taken) < 2 * (len(self._found.outer) + len(self._found.inner))

    def takes_new(self, feed: Feed) -> bool:
        """Whether a feed runs and goes a way that none before it went."""
        outputs = self._run(feed)
        if outputs is None or not self.note(outputs):
            return False
        self._keep(outputs)
        return True

    def untaken(self) -> list[str]:
        """The branches that no feed takes, in words; those within other nodes together."""
        outer = self._never_taken(self._found.outer)
        inner = self._never_taken({label: label for label in self._found.inner})
        if len(inner) <= 1:
            return outer + inner
        return [*outer, f"{len(inner)} branches within others, the first: {inner[0]}"]

    def _never_taken(self, known: Mapping[str, str]) -> list[str]:
        return [
            f"{where} with a condition that is {str(way).lower()}"
            for name, where in known.items()
            for way in (True, False)
            if (name, way) not in self._taken
        ]
