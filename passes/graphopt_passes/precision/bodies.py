"""What values inside If, Loop and Scan were seen to be: bodies are run by themselves, turn by turn.

No runtime shows values within a body.  Each body becomes a model of its own, whose inputs are its own and what it
captures; this module feeds it what the graph around it computed, as the operator would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir import operators, values
from graphopt.ir.model_file import model_to_bytes
from graphopt.ir.scopes import all_nodes, captures
from graphopt.runtime.session import Session, SessionOptions
from graphopt_passes.precision.legality import is_float

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Any]

MAX_TURNS = 64
"""Turns of a loop that are followed; of one that takes more, nothing is known."""

_SCAN_WITHOUT_BATCH = 9


@dataclasses.dataclass(frozen=True)
class Turn:
    """One run of one graph.

    Attributes:
        graph: the body.
        values: what it computed, and what it was given as its inputs, by name.
        feeds: what it was given, with what it captures.
    """

    graph: ir.Graph
    values: Arrays
    feeds: Arrays


def wanted_of(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the values of `graph` that its bodies need: operands of control flow, and what bodies capture."""
    found: dict[str, None] = {}
    for node in graph:
        for body in operators.subgraphs(node):
            outer = [v for v in (*node.inputs, *captures(body)) if v is not None]
            found |= {v.name: None for v in outer if v.name and not values.is_constant(v)}
    made = {v.name for node in graph for v in node.outputs} | {v.name for v in graph.inputs}
    return tuple(name for name in found if name in made)


class Bodies:
    """The bodies of a model, made runnable once.

    Args:
        model: typed; it is not changed.

    Attributes:
        endless: bodies of loops that took more turns than are followed.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self.endless: set[ir.Graph] = set()
        self._sessions: dict[ir.Graph, Session | None] = {}

    def turns(self, graph: ir.Graph, known: Arrays) -> Iterator[Turn]:
        """Every run of every body in `graph`, bodies in bodies included; what cannot be run is left out.

        Args:
            graph: whose values are known.
            known: values of `graph` and of the graphs around it, by name.
        """
        for node in graph:
            bodies = operators.subgraphs(node)
            if not bodies:
                continue
            try:
                turns = list(self._node_turns(node, bodies, known))
            except (GraphoptError, KeyError, IndexError):
                continue  # a branch that does not suit these values, or values that nobody knows
            for turn in turns:
                yield turn
                yield from self.turns(turn.graph, {**known, **turn.values})

    def _node_turns(
        self, node: ir.Node, bodies: Sequence[ir.Graph], known: Arrays
    ) -> Iterator[Turn]:
        if node.op_type == "If":
            yield from self._branches(bodies, known)
        elif node.op_type == "Loop":
            yield from self._loop(node, bodies[0], known)
        elif node.op_type == "Scan":
            yield from self._scan(node, bodies[0], known)

    def _branches(self, bodies: Sequence[ir.Graph], known: Arrays) -> Iterator[Turn]:
        """Both branches: later inputs may take the other one."""
        for body in bodies:
            try:
                yield self._run(body, {}, known)
            except (GraphoptError, KeyError):
                continue

    def _loop(self, node: ir.Node, body: ir.Graph, known: Arrays) -> Iterator[Turn]:
        operands = [_value(v, known) for v in node.inputs]
        trips = int(operands[0].reshape(())) if operands[0] is not None else None
        goes_on = operands[1] is None or bool(operands[1].reshape(()))
        state, names = operands[2:], [v.name or "" for v in body.outputs]
        found, turn = [], 0
        while goes_on and (trips is None or turn < trips):
            if turn >= MAX_TURNS:
                self.endless.add(body)
                return
            given = [np.array(turn, np.int64), np.array(True), *state]
            done = self._run(body, _named(body, given), known)
            found.append(done)
            results = done.values
            goes_on = bool(results[names[0]].reshape(()))
            state = [results[name] for name in names[1 : 1 + len(state)]]
            turn += 1
        yield from found

    def _scan(self, node: ir.Node, body: ir.Graph, known: Arrays) -> Iterator[Turn]:
        if (operators.opset(node, self._model.opset_imports) or 0) < _SCAN_WITHOUT_BATCH:
            return
        count = node.attributes["num_scan_inputs"].as_int()
        operands = [_value(v, known) for v in node.inputs]
        state, scanned = operands[: len(operands) - count], operands[len(operands) - count :]
        axes = _ints(node, "scan_input_axes", count)
        backward = _ints(node, "scan_input_directions", count)
        names = [v.name or "" for v in body.outputs]
        length = scanned[0].shape[axes[0]]
        found = []
        for turn in range(min(length, MAX_TURNS)):
            places = [length - 1 - turn if flag else turn for flag in backward]
            slices = [np.take(a, p, x) for a, p, x in zip(scanned, places, axes, strict=True)]
            done = self._run(body, _named(body, [*state, *slices]), known)
            found.append(done)
            state = [done.values[name] for name in names[: len(state)]]
        if length <= MAX_TURNS:
            yield from found

    def _run(self, body: ir.Graph, given: Arrays, known: Arrays) -> Turn:
        """All values of a body that matter, given its own inputs and those of the graphs around it."""
        if body not in self._sessions:
            self._sessions[body] = self._session(body)
        session = self._sessions[body]
        if session is None:
            raise KeyError(body.name or "")
        feeds = dict(given)
        for value in captures(body):
            feeds[value.name or ""] = _value(value, known)
        feeds = {spec.name: feeds[spec.name] for spec in session.inputs if spec.name in feeds}
        results = {**given, **session.run(feeds)}
        for value in body.outputs:  # one that nothing in the body makes
            if value.name not in results:
                results[value.name or ""] = _value(value, known)
        return Turn(body, results, feeds)

    def _session(self, body: ir.Graph) -> Session | None:
        """A body as a model of its own; None where not all that it reads is a tensor of known type."""
        outer = [v for v in captures(body) if v.name]
        if any(_type_of(v) is None for v in (*body.inputs, *outer)):
            return None
        made = {v.name for node in body for v in node.outputs if v.name}
        graph = standalone(body)
        model = ir.Model(graph, ir_version=self._model.ir_version)
        graph.opset_imports.update(self._model.opset_imports)
        floats = [v.name for node in body for v in node.outputs if is_float(v) and v.name]
        wanted = [name for name in wanted_of(body) if name in made]
        tapped = tuple(dict.fromkeys((*floats, *wanted)))
        try:
            return Session(model_to_bytes(model), options=SessionOptions(extra_outputs=tapped))
        except GraphoptError:
            return None


def _named(body: ir.Graph, given: Sequence[Any]) -> dict[str, Any]:
    return {v.name or "": array for v, array in zip(body.inputs, given, strict=True)}


def _value(value: ir.Value | None, known: Arrays) -> Any:  # noqa: ANN401
    """The array of a value: a constant's own, or what is known.

    Raises:
        KeyError: neither.
    """
    if value is None:
        return None
    tensor = values.constant(value)
    return known[value.name or ""] if tensor is None else tensor.numpy()


def _type_of(value: ir.Value) -> ir.DataType | None:
    tensor = values.constant(value)
    if tensor is not None:
        return tensor.dtype
    return value.dtype if isinstance(value.type, ir.TensorType) else None


def standalone(body: ir.Graph) -> ir.Graph:
    """A copy of a body in which what it captures is an input; no input states a shape, which turns may change."""
    graph = body.clone(allow_outer_scope_values=True)
    for value in graph.inputs:
        value.shape = None
    for outer in captures(graph):
        kind = _type_of(outer)
        assert kind is not None
        given = ir.Value(name=outer.name, type=ir.TensorType(kind))
        graph.inputs.append(given)
        for node in all_nodes(graph):
            for index, operand in enumerate(node.inputs):
                if operand is outer:
                    node.replace_input_with(index, given)
            for inner in operators.subgraphs(node):
                _replace_output(inner, outer, given)
    made = {value for node in graph for value in node.outputs}
    kept = [value for value in graph.outputs if value in made]
    del graph.outputs[:]
    graph.outputs.extend(dict.fromkeys(kept))
    return graph


def _replace_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new


def _ints(node: ir.Node, name: str, count: int) -> list[int]:
    held = node.attributes.get(name)
    return [0] * count if held is None else list(held.as_ints())
