"""One session in which each node can be half or float32, chosen by a mask that is fed: no rebuild an experiment."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.ir.model_file import ExternalData, load_model, save_model
from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.runtime.session import Session, SessionOptions
from graphopt.verify import metrics
from graphopt.verify.compare import Budget, Hint, compare, profile_for
from graphopt_passes.precision.apply import narrowed
from graphopt_passes.precision.flow import SENTINEL, Masks
from graphopt_passes.precision.legality import is_float
from graphopt_passes.precision.plan import Decision, Kind
from graphopt_passes.precision.ranges import FLOOR, is_small
from graphopt_passes.precision.rescale import scaled_inputs

MASK = "graphopt_half_mask"
_FOCUS = 2
"""Feeds that experiments run on: those on which a survey of all was worst."""

Feed = Mapping[str, Any]


@dataclasses.dataclass
class Gates:
    """A session with gates, the reference outputs, and how bad a mask may be.

    Attributes:
        nodes: of the model, one a gate, in topological order.
        runs: how many experiments were made.
    """

    nodes: tuple[ir.Node, ...]
    runs: int = 0
    _session: Session | None = None
    _feeds: Sequence[Feed] = ()
    _reference: Sequence[Mapping[str, Any]] = ()
    _budget: Budget = dataclasses.field(default_factory=Budget)
    _focus: tuple[int, ...] = ()
    _seen: Budget = dataclasses.field(default_factory=Budget)

    @classmethod
    def of(
        cls,
        model: ir.Model,
        decisions: Mapping[ir.Node, Decision],
        half: ir.DataType,
        masks: Masks,
        feeds: Sequence[Feed],
        budget: Budget,
    ) -> Gates:
        """Gates for the nodes that the decisions make half, in the main graph and in bodies of control flow.

        Args:
            model: in float32.
            decisions: by node.
            half: the dtype.
            masks: what hides scores from a softmax.
            feeds: to judge on.
            budget: what is allowed.

        Raises:
            ModelError: ONNX Runtime refuses the model with gates.
        """
        gated = gated_nodes(model, decisions, masks.constants)
        copy = load_model(model)
        twins = dict(zip(_nodes(model), _nodes(copy), strict=True))
        builder = _Builder(copy, half, masks, len(gated))
        for index, node in enumerate(gated):
            builder.gate(index, twins[node], decisions[node])
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            file = save_model(copy, Path(folder) / "gated.onnx", external=ExternalData.SINGLE_FILE)[
                0
            ]
            session = Session(file, options=SessionOptions(prepack=is_small(model)))
        gates = cls(gated, 0, session, feeds, (), budget)
        gates._reference = [gates._run(feed, np.zeros(len(gated), np.bool_)) for feed in feeds]
        return gates

    def badness(self, low: Sequence[bool]) -> float:
        """The worst of all errors over what the budget allows, with nodes in half as `low` says; inf for non-finite."""
        self.runs += 1
        mask = np.asarray(low, np.bool_)
        worst = 0.0
        for index in self._focus:
            worst = max(worst, self._on(index, mask))
            if math.isinf(worst):
                break
        return worst

    def survey(self, low: Sequence[bool]) -> float:
        """As `badness`, on every feed; experiments go on with the feeds that were worst."""
        self.runs += 1
        self._seen = Budget(agreement=None)
        found = [self._on(index, np.asarray(low, np.bool_)) for index in range(len(self._feeds))]
        worst = sorted(range(len(found)), key=lambda index: -found[index])
        self._focus = tuple(dict.fromkeys((*worst[:_FOCUS], *self._focus)))[: 1 + _FOCUS]
        return max(found, default=0.0)

    def judge(self, session: Session) -> float:
        """How bad another model is that stands for the one with gates, on every feed."""
        return max(
            (
                self._excess(name, index, value)
                for index, feed in enumerate(self._feeds)
                for name, value in session.run(feed).items()
            ),
            default=0.0,
        )

    def words(self) -> str:
        """The budget, as one writes it, that accepts what the last survey found; "" where none does."""
        seen, parts = self._seen, []
        if seen.max_over_rms is not None:
            if math.isinf(seen.max_over_rms):
                return ""
            parts.append(f"max<={_up(seen.max_over_rms):.2g}")
        if seen.sqnr_db is not None:
            parts.append(f"sqnr>={math.floor(seen.sqnr_db - 1)}")
        return ",".join(parts)

    def _on(self, index: int, mask: np.ndarray[Any, Any]) -> float:
        results = self._run(self._feeds[index], mask)
        return max(
            (self._excess(name, index, value) for name, value in results.items()), default=0.0
        )

    def _run(self, feed: Feed, mask: np.ndarray[Any, Any]) -> dict[str, Any]:
        assert self._session is not None
        return self._session.run({**feed, MASK: mask})

    def _excess(self, name: str, index: int, value: object) -> float:
        reference = self._reference[index][name]
        if not isinstance(reference, np.ndarray) or not metrics.is_float(reference.dtype):
            return 0.0
        plain = metrics.root_mean_square(np.asarray(self._reference[0][name]))
        profile = profile_for(Numerics.LOSSY, budget=self._budget)
        report = compare(name, reference, value, profile, Hint(floor=plain * FLOOR))
        if not report.nonfinite_equal:
            self._seen = Budget(max_over_rms=math.inf)
            return math.inf
        self._seen = dataclasses.replace(
            self._seen,
            max_over_rms=max(self._seen.max_over_rms or 0.0, report.max_over_rms or 0.0),
            sqnr_db=min(
                [db for db in (self._seen.sqnr_db, report.sqnr_db) if db is not None], default=None
            ),
        )
        budget, parts = self._budget, [0.0]
        if budget.max_over_rms and report.max_over_rms:
            parts.append(report.max_over_rms / budget.max_over_rms)
        if budget.sqnr_db and report.sqnr_db is not None:
            parts.append(10 ** ((budget.sqnr_db - report.sqnr_db) / 20))
        if budget.cosine and report.cosine is not None and budget.cosine < 1:
            parts.append(math.sqrt(max(1 - report.cosine, 0) / (1 - budget.cosine)))
        return max(parts)


def _up(number: float) -> float:
    """A little more, in two digits."""
    return number * 1.2 + 1e-9


def gated_nodes(
    model: ir.Model, decisions: Mapping[ir.Node, Decision], masks: Set[ir.Value]
) -> tuple[ir.Node, ...]:
    """The nodes of any graph that have a gate: those in half, and those that would put a mask in."""
    return tuple(
        node
        for node in _nodes(model)
        if decisions[node].kind is Kind.LOW
        or (decisions[node].kind is Kind.FOLLOW and any(v in masks for v in node.inputs))
    )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of all graphs that can capture the mask."""
    for scope in all_graphs(model):
        if scope.function is None and scope.is_plain:
            yield from scope.graph


class _Builder:
    """Puts gates into a copy of the model; bodies of control flow capture the mask."""

    def __init__(self, model: ir.Model, half: ir.DataType, masks: Masks, count: int) -> None:
        self._graph = model.graph
        self._half = half
        self._masks = {value.name for value in masks.constants}
        self._bounded = {value.name for value in masks.finite - masks.constants}
        self._names = Names.of(model)
        self._mask = ir.Value(
            name=MASK, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([count])
        )
        self._graph.inputs.append(self._mask)
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._homes: dict[ir.Value, ir.Graph] = {}
        self._graphs = [scope.graph for scope in all_graphs(model)]
        for scope in all_graphs(model):
            for value in (*scope.graph.inputs, *scope.graph.initializers.values()):
                self._homes[value] = scope.graph
            for node in scope.graph:
                for value in node.outputs:
                    value.shape = None  # what a model states may be wrong, and the runtime plans its buffers by it
        self._weights = is_small(model)

    def gate(self, index: int, node: ir.Node, decision: Decision) -> None:
        """Rounds what the node reads and gives, where its element of the mask is true."""
        slots, shift = decision.slots, decision.shift
        scaled = scaled_inputs(node) if shift else ()
        number = self._constant(np.asarray(index, np.int64), "gate")
        choice = self._before(node, "Gather", [self._mask, number])
        for place, value in enumerate(node.inputs):
            if value is None or not slots.inputs[place] or not is_float(value):
                continue
            if values.is_constant(value) and not self._weights and value.name not in self._masks:
                continue
            rounded = self._rounded_anew(value, shift) if place in scaled else self._round(value)
            chosen = self._before(node, "Where", [choice, rounded, value])
            node.replace_input_with(place, chosen)
        for place, value in enumerate(node.outputs):
            if slots.outputs[place] and value.name:
                self._gate_output(node, choice, value, shift)

    def _gate_output(self, node: ir.Node, choice: ir.Value, value: ir.Value, shift: int) -> None:
        users = value.uses()
        scaled = self._least(node, self._scaled(node, value, shift), value.name)
        anchor = scaled.producer() or node
        narrow = self._after(anchor, "Cast", [scaled], to=int(self._half))
        wide = self._after(_producer(narrow), "Cast", [narrow], to=int(ir.DataType.FLOAT))
        wide = self._scaled(_producer(wide), wide, -shift)
        chosen = self._after(_producer(wide), "Where", [choice, wide, value])
        chosen.type = value.type
        if not shift:
            self._rounded[chosen] = wide  # for readers in half, where this node is in float32
        for use in users:
            use.node.replace_input_with(use.idx, chosen)
        if any(output is value for output in self._graph.outputs):
            chosen.name, value.name = value.name, self._names.fresh(f"{value.name}_raw")
            chosen.shape = value.shape
        for graph in self._graphs:  # bodies may give back a value of the graph around them
            for place, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[place] = chosen

    def _round(self, value: ir.Value) -> ir.Value:
        """The value rounded, computed once."""
        if value not in self._rounded:
            self._rounded[value] = self._rounded_anew(value)
        return self._rounded[value]

    def _least(self, anchor: ir.Node, value: ir.Value, name: str | None) -> ir.Value:
        """The value, no lower than what masks in half where it carries a mask."""
        if name not in self._bounded:
            return value
        least = self._constant(np.array(SENTINEL[self._half], np.float32), "gate_least")
        return self._after(anchor, "Max", [value, least])

    def _scaled(self, anchor: ir.Node, value: ir.Value, shift: int) -> ir.Value:
        if not shift:
            return value
        scale = self._constant(np.array(2.0**shift, np.float32), "gate_scale")
        return self._after(anchor, "Mul", [value, scale])

    def _rounded_anew(self, value: ir.Value, shift: int = 0) -> ir.Value:
        tensor = values.constant(value)
        if tensor is not None:
            masks = value.name in self._masks
            half = narrowed(tensor, self._half, masks=masks, shift=shift).numpy()
            back = np.ldexp(half.astype(np.float32), -shift)
            return self._constant(back, f"{value.name}_rounded")
        producer = value.producer()
        if producer is not None:
            value = self._least(producer, value, value.name)
            producer = _producer(value)
            narrow = self._after(producer, "Cast", [value], to=int(self._half))
        else:
            narrow = self._first(self._homes[value], "Cast", [value], to=int(self._half))
        return self._after(_producer(narrow), "Cast", [narrow], to=int(ir.DataType.FLOAT))

    def _constant(self, array: np.ndarray[Any, Any], hint: str) -> ir.Value:
        tensor = ir.Tensor(array)
        value = ir.Value(
            name=self._names.fresh(hint),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def _node(self, op_type: str, inputs: list[ir.Value], attributes: dict[str, int]) -> ir.Node:
        name = self._names.fresh(f"gate_{op_type}")
        held = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        node = ir.Node("", op_type, inputs, held, name=name)
        node.outputs[0].name = name
        return node

    def _before(self, anchor: ir.Node, op_type: str, inputs: list[ir.Value]) -> ir.Value:
        node = self._node(op_type, inputs, {})
        _home(anchor).insert_before(anchor, node)
        return node.outputs[0]

    def _after(
        self, anchor: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: int
    ) -> ir.Value:
        node = self._node(op_type, inputs, attributes)
        _home(anchor).insert_after(anchor, node)
        return node.outputs[0]

    def _first(
        self, graph: ir.Graph, op_type: str, inputs: list[ir.Value], **attributes: int
    ) -> ir.Value:
        """A node at the head of a graph."""
        node = self._node(op_type, inputs, attributes)
        graph.insert_before(next(iter(graph)), node)
        return node.outputs[0]


def _home(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
