"""Inference of control flow: branches are merged, loop-carried values joined until nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

from graphopt.ir import operators
from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim, maximum
from graphopt.ir.shapes.facts import UNKNOWN, Dims, Facts
from graphopt.ir.shapes.query import Query, normalised

_MAX_ROUNDS = 16  # each round opens at least one dimension; more means a bug, and ends in "unknown"


class Bodies(Protocol):
    """What the rules below need of the engine: to give the inputs of a graph and to run it."""

    def run(self, graph: ir.Graph, inputs: Sequence[Facts], *, repeated: bool) -> Sequence[Facts]:
        """Infers a body from the facts of its inputs; returns those of its outputs."""

    def completed(self, value: ir.Value, given: Facts) -> Facts:
        """The facts with a symbol for each element of a small integer tensor that is not known."""

    def joined(self, value: ir.Value, a: Facts, b: Facts) -> Facts:
        """What two facts have in common; where they differ, symbols of `value`."""

    def is_outer(self, graph: ir.Graph, dim: Dim) -> bool:
        """Whether a dim means the same outside the repeated body as inside."""


def infer(q: Query, bodies: Bodies) -> Sequence[Facts] | None:
    """The facts of the outputs of a node that holds graphs, whose bodies are inferred on the way."""
    rules = {"If": _if, "Loop": _loop, "Scan": _scan, "SequenceMap": _sequence_map}
    rule = None if q.node.domain else rules.get(q.node.op_type)
    if rule is not None:
        return rule(q, bodies)
    for graph in operators.subgraphs(q.node):
        bodies.run(graph, [declared(value) for value in graph.inputs], repeated=True)
    return None


def declared(value: ir.Value) -> Facts:
    """The type that a value declares, without its shape."""
    return Facts(value.type)


def _if(q: Query, bodies: Bodies) -> Sequence[Facts]:
    condition = q.static(0)
    then_branch = _graph(q, "then_branch")
    else_branch = _graph(q, "else_branch")
    taken = bodies.run(then_branch, (), repeated=False)
    other = bodies.run(else_branch, (), repeated=False)
    if condition is not None and condition.size == 1:
        return taken if condition.reshape(-1)[0] else other
    pairs = zip(q.node.outputs, taken, other, strict=False)
    return [bodies.joined(value, a, b) for value, a, b in pairs]


def _graph(q: Query, name: str) -> ir.Graph:
    """A body.

    Raises:
        ValueError: the node lacks it.
    """
    held = q.operation.held(name)
    if held is None:
        raise ValueError(f"attribute {name} is absent")
    return held.as_graph()


def _loop(q: Query, bodies: Bodies) -> Sequence[Facts]:
    body = _graph(q, "body")
    carried = len(q.inputs) - 2
    condition = q.facts(1) if q.has(1) else _always()
    first = [condition, *(q.facts(2 + i) for i in range(carried))]
    state, results = _fixpoint(bodies, body, [_iteration()], first, ())
    kept = [_after(q, i, a, b) for i, (a, b) in enumerate(zip(first[1:], state[1:], strict=True))]
    trip = _trip_count(q, state[0])
    scans = results[1 + carried :]
    return kept + [
        _stacked(q, bodies, body, (carried + i, scan), trip, 0) for i, scan in enumerate(scans)
    ]


def _always() -> Facts:
    """The facts of a condition that is true."""
    data = facts.SymbolicData.of((1,), ir.DataType.BOOL)
    return facts.of_data(facts.SymbolicData(data.array.reshape(()), ir.DataType.BOOL))


def _iteration() -> Facts:
    """The facts of the number of the current iteration."""
    return facts.tensor(ir.DataType.INT64, ())


def _fixpoint(
    bodies: Bodies,
    body: ir.Graph,
    before: Sequence[Facts],
    first: Sequence[Facts],
    after: Sequence[Facts],
) -> tuple[Sequence[Facts], Sequence[Facts]]:
    """State that one more iteration leaves as it is, and the results of that iteration."""
    values = body.inputs[len(before) : len(before) + len(first)]
    state = [bodies.completed(value, given) for value, given in zip(values, first, strict=True)]
    results: Sequence[Facts] = ()
    for _ in range(_MAX_ROUNDS):
        results = bodies.run(body, (*before, *state, *after), repeated=True)
        rounds = zip(values, state, results, strict=False)
        joined = [bodies.completed(v, bodies.joined(v, a, b)) for v, a, b in rounds]
        if joined == state:
            return state, results
        state = joined
    unknown = [Facts(given.type) for given in first]
    return unknown, bodies.run(body, (*before, *unknown, *after), repeated=True)


def _after(q: Query, output: int, first: Facts, state: Facts) -> Facts:
    """The facts of a carried value after the loop: what no iteration changes.

    Symbols of the body stand for another number in each iteration and stay inside.
    """
    if first.dims is None or state.dims is None or len(first.dims) != len(state.dims):
        return Facts(state.type)
    pairs = enumerate(zip(first.dims, state.dims, strict=True))
    dims = tuple(a if a == b else q.fresh(output, axis) for axis, (a, b) in pairs)
    if not isinstance(state.type, ir.TensorType) and dims != first.dims:
        return Facts(state.type)
    return Facts(state.type, dims, first.data if first.data == state.data else None)


def _trip_count(q: Query, condition: Facts) -> Dim | None:
    """The number of iterations, where the limit is known and the condition cannot end the loop."""
    always = condition.data is not None and condition.data.item() == 1
    limit = q.data(0)
    count = None if limit is None else limit.item()
    return maximum((count, 0)) if always and isinstance(count, Dim) else None


def _stacked(
    q: Query, bodies: Bodies, body: ir.Graph, scan: tuple[int, Facts], trip: Dim | None, axis: int
) -> Facts:
    """The facts of a scan output: what each iteration gives, stacked along a new axis."""
    output, given = scan
    if given.dims is None:
        return Facts(given.type)
    rank = len(given.dims) + 1
    where = normalised(axis, rank)
    inner = list(given.dims)
    inner.insert(where, trip if trip is not None else q.fresh(output, where))
    dims = [
        dim if bodies.is_outer(body, dim) else q.fresh(output, i) for i, dim in enumerate(inner)
    ]
    return Facts(given.type, tuple(dims))


def _scan(q: Query, bodies: Bodies) -> Sequence[Facts] | None:
    body = _graph(q, "body")
    if q.version < 9:  # batched, with lengths: too rare to follow
        bodies.run(body, [declared(value) for value in body.inputs], repeated=True)
        return None
    count = q.attr("num_scan_inputs", 0)
    carried = len(q.inputs) - count
    axes: tuple[int, ...] = q.attr("scan_input_axes", (0,) * count)
    first = [q.facts(i) for i in range(carried)]
    slices, length = _scan_inputs(q, carried, axes)
    state, results = _fixpoint(bodies, body, (), first, slices)
    kept = [_after(q, i, a, b) for i, (a, b) in enumerate(zip(first, state, strict=True))]
    scans = results[carried:]
    out_axes: tuple[int, ...] = q.attr("scan_output_axes", (0,) * len(scans))
    return kept + [
        _stacked(q, bodies, body, (carried + i, scan), length, out_axes[i])
        for i, scan in enumerate(scans)
    ]


def _scan_inputs(q: Query, carried: int, axes: Sequence[int]) -> tuple[list[Facts], Dim | None]:
    """What an iteration sees of each scan input, and the number of iterations."""
    slices, length = [], None
    for i, axis in enumerate(axes):
        given = q.facts(carried + i)
        if given.dims is None:
            slices.append(Facts(given.type))
            continue
        where = normalised(axis, len(given.dims))
        size = given.dims[where]
        length = size if length is None or size.is_static else length
        slices.append(Facts(given.type, given.dims[:where] + given.dims[where + 1 :]))
    return slices, length


def _sequence_map(q: Query, bodies: Bodies) -> Sequence[Facts]:
    body = _graph(q, "body")
    inputs = [_element(given or UNKNOWN) for given in q.inputs]
    results = bodies.run(body, inputs, repeated=True)
    return [_sequence(bodies, body, given) for given in results]


def _element(given: Facts) -> Facts:
    """What one iteration sees of an input: an element of a sequence, or the tensor itself."""
    if isinstance(given.type, ir.SequenceType):
        return Facts(given.type.elem_type, given.dims)
    return given


def _sequence(bodies: Bodies, body: ir.Graph, given: Facts) -> Facts:
    """A sequence of what the iterations give; its dims where they are the same in each."""
    if given.type is None:
        return UNKNOWN
    dims: Dims | None = given.dims
    same = dims is not None and all(bodies.is_outer(body, dim) for dim in dims)
    return Facts(ir.SequenceType(given.type), dims if same else None)
