"""Carries out decisions: one walk in topological order, one cast a value and dtype, boundaries kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context
from graphopt.rewrite.relink import mark
from graphopt_passes.precision.flow import SENTINEL, Masks
from graphopt_passes.precision.legality import is_float
from graphopt_passes.precision.limits import LIMITS
from graphopt_passes.precision.plan import Decision, Kind
from graphopt_passes.precision.rescale import scaled_inputs

RULE = "cast"
LOSSY = Numerics.LOSSY
_FLOAT = ir.DataType.FLOAT


class Emission:
    """Rewrites one model in place.

    Args:
        model: in float32; its graphs are sorted.
        decisions: by node; nodes that are not listed stay in float32.
        half: the dtype of the decisions.
        masks: what hides scores from a softmax.
        ctx: the run.
    """

    def __init__(
        self,
        model: ir.Model,
        decisions: Mapping[ir.Node, Decision],
        half: ir.DataType,
        masks: Masks,
        ctx: Context,
    ) -> None:
        self._model = model
        self._decisions = decisions
        self._half = half
        self._masks = masks
        self._infinite = masks.carriers - masks.constants - masks.finite
        self._ctx = ctx
        self._low: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._homes: dict[ir.Value, ir.Graph] = {}
        self._constants: dict[ir.Value, None] = {}

    def run(self) -> None:
        """Casts what the decisions say."""
        self._graph(self._model.graph)
        for index, value in enumerate(tuple(self._model.graph.outputs)):
            self._output(index, value)
        self._drop_unused()

    def _graph(self, graph: ir.Graph) -> None:
        for value in (*graph.inputs, *graph.initializers.values()):
            self._homes[value] = graph
        for node in tuple(graph):
            decision = self._decisions.get(node, Decision(Kind.HIGH))
            if operators.has_subgraph(node):
                self._body(node)
            elif decision.kind is Kind.FIXED:
                continue
            elif node.op_type == "Cast" and not node.domain:
                self._cast_node(node, decision)
            else:
                self._node(node, decision)

    def _node(self, node: ir.Node, decision: Decision) -> None:
        low = decision.kind is Kind.LOW or (
            decision.kind is Kind.FOLLOW
            and (any(value in self._low for value in node.inputs) or self._is_wanted(node))
        )
        # What a half would make of a mask that is float32 here, and of a row that is masked throughout, nobody knows.
        cut = any(v in self._infinite and v not in self._low for v in node.inputs)
        if low and cut:
            self._ctx.missed(
                RULE,
                node,
                "a mask that it reads stays float32, and infinities go into it",
            )
        low = low and not cut and self._ctx.permit(RULE, node, LOSSY)
        slots = decision.slots
        for index, value in enumerate(node.inputs):
            if value is None or not (is_float(value) or value in self._low):
                continue
            wanted = self._half if low and slots.inputs[index] else _FLOAT
            if low and decision.shift and index in scaled_inputs(node):
                node.replace_input_with(index, self._converted(value, decision.shift))
            else:
                self._read(node, index, value, wanted)
        for index, value in enumerate(node.outputs):
            if low and slots.outputs[index]:
                self._narrow(value)
        if low and decision.shift:
            self._scale_back(node, decision.shift)

    def _is_wanted(self, node: ir.Node) -> bool:
        """Whether a node that only reads constants gives something that others take in half."""
        floats = [value for value in node.inputs if is_float(value)]
        if not floats or not all(_is_convertible(value) for value in floats):
            return False
        return self._goes_into_halves(node)

    def _goes_into_halves(self, node: ir.Node) -> bool:
        """Whether some node in half reads what this one gives, moved perhaps."""
        for reader in dict.fromkeys(use.node for value in node.outputs for use in value.uses()):
            decision = self._decisions.get(reader, Decision(Kind.HIGH))
            if decision.kind is Kind.LOW:
                return True
            if decision.kind is Kind.FOLLOW and self._goes_into_halves(reader):
                return True
        return False

    def _scale_back(self, node: ir.Node, shift: int) -> None:
        """Lets all readers of a scaled product read the product, in float32."""
        made = node.outputs[0]
        uses, name = made.uses(), made.name or ""
        made.name = self._ctx.names.fresh(f"{name}_scaled")
        out = self._scaled(self._get(made, _FLOAT), -shift)
        out.name = name
        for use in uses:
            use.node.replace_input_with(use.idx, out)
        for scope in all_graphs(self._model):
            for index, value in enumerate(scope.graph.outputs):
                if value is made:
                    scope.graph.outputs[index] = out

    def _scaled(self, value: ir.Value, shift: int) -> ir.Value:
        """A float32 value times a power of two, computed where it is made."""
        graph, name = self._home(value), self._ctx.names.fresh(f"{value.name}_scaled")
        factor = self._constant(graph, np.array(2.0**shift, np.float32), f"{name}_scale")
        node = ir.Node("", "Mul", [value, factor], name=name)
        out = node.outputs[0]
        out.name, out.type, out.shape = name, ir.TensorType(_FLOAT), value.shape
        mark(node, RULE, value.name or "", self._ctx)
        self._insert(node, value)
        return out

    def _insert(self, node: ir.Node, value: ir.Value) -> None:
        """Puts a node right behind the value that it reads."""
        producer, graph = value.producer(), self._home(value)
        if producer is not None:
            graph.insert_after(producer, node)
        elif (first := next(iter(graph), None)) is not None:
            graph.insert_before(first, node)
        else:
            graph.append(node)

    def _constant(self, graph: ir.Graph, array: np.ndarray[Any, Any], hint: str) -> ir.Value:
        tensor = ir.Tensor(array)
        value = ir.Value(
            name=self._ctx.names.fresh(hint),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        graph.register_initializer(value)
        self._homes[value] = graph
        return value

    def _cast_node(self, node: ir.Node, decision: Decision) -> None:
        """A cast reads what comes; one to float32 makes halves where the decision says so."""
        made = node.outputs[0]
        if decision.kind is Kind.LOW and self._ctx.permit(RULE, node, LOSSY):
            node.attributes["to"] = ir.AttrInt64("to", int(self._half))
            self._narrow(made)

    def _body(self, node: ir.Node) -> None:
        """Control flow is float32 at its boundary, but for what both branches of an If give in half."""
        for index, value in enumerate(node.inputs):
            if value in self._low and value is not None:
                self._read(node, index, value, _FLOAT)
        bodies = operators.subgraphs(node)
        for body in bodies:
            self._graph(body)
        low = self._branch_halves(node, bodies)
        for body in bodies:
            for index, value in enumerate(body.outputs):
                if value in self._low and index not in low:
                    body.outputs[index] = self._get(value, _FLOAT)
        for index in low:
            self._narrow(node.outputs[index])

    def _branch_halves(self, node: ir.Node, bodies: tuple[ir.Graph, ...]) -> set[int]:
        if node.op_type != "If" or node.domain:
            return set()
        return {
            index
            for index in range(len(node.outputs))
            if all(
                body.outputs[index] in self._low and self._home(body.outputs[index]) is body
                for body in bodies
            )
        }

    def _read(self, node: ir.Node, index: int, value: ir.Value, wanted: ir.DataType) -> None:
        found = self._get(value, wanted)
        if found is not value:
            node.replace_input_with(index, found)

    def _get(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The value in the wanted dtype."""
        if (wanted is self._half) == (value in self._low):
            return value
        key = (value, wanted)
        if key not in self._casts:
            convertible = _is_convertible(value)
            self._casts[key] = self._converted(value) if convertible else self._cast(value, wanted)
        return self._casts[key]

    def _converted(self, value: ir.Value, shift: int = 0) -> ir.Value:
        """A copy of a constant in half; the original goes when nobody reads it any more."""
        self._constants[value] = None
        tensor = value.const_value
        assert tensor is not None
        narrow = ir.Value(
            name=self._ctx.names.fresh(f"{value.name}_{self._half.name.lower()}"),
            type=ir.TensorType(self._half),
            shape=value.shape,
            const_value=narrowed(
                tensor, self._half, masks=value in self._masks.constants, shift=shift
            ),
        )
        home = self._home(value)
        home.register_initializer(narrow)
        self._homes[narrow] = home
        return narrow

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """A cast right behind the value, in the graph that makes it: never inside a loop that only reads it."""
        if wanted is self._half and value in self._masks.finite:
            value = self._bounded(value)
        name = self._ctx.names.fresh(f"{value.name}_{wanted.name.lower()}")
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(wanted))], name=name)
        out = node.outputs[0]
        out.name, out.type, out.shape = name, ir.TensorType(wanted), value.shape
        mark(node, RULE, value.name or "", self._ctx)
        self._insert(node, value)
        return out

    def _bounded(self, value: ir.Value) -> ir.Value:
        """A mask in float32, no lower than what masks in half: rows that are masked throughout stay finite."""
        graph, name = self._home(value), self._ctx.names.fresh(f"{value.name}_bounded")
        least = np.array(SENTINEL[self._half], np.float32)
        node = ir.Node("", "Max", [value, self._constant(graph, least, f"{name}_least")], name=name)
        out = node.outputs[0]
        out.name, out.type, out.shape = name, ir.TensorType(_FLOAT), value.shape
        mark(node, RULE, value.name or "", self._ctx)
        self._insert(node, value)
        return out

    def _home(self, value: ir.Value) -> ir.Graph:
        producer = value.producer()
        graph = self._homes.get(value) if producer is None else producer.graph
        assert graph is not None
        return graph

    def _narrow(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self._half)
        self._low.add(value)

    def _output(self, index: int, value: ir.Value) -> None:
        """Gives an output of the model its own dtype back, under its own name."""
        if value not in self._low:
            return
        graph = self._model.graph
        wide = self._get(value, _FLOAT)
        if not wide.is_graph_output():
            name = value.name
            value.name = self._ctx.names.fresh(f"{name}_{self._half.name.lower()}")
            wide.name = name
        graph.outputs[index] = wide

    def _drop_unused(self) -> None:
        for value in self._constants:
            home = self._homes.get(value)
            unused = not value.uses() and not value.is_graph_output() and not value.is_graph_input()
            if home is not None and value.is_initializer() and unused:
                del home.initializers[value.name or ""]


def _is_convertible(value: ir.Value | None) -> bool:
    """Whether a copy of the value in half can be written into the file."""
    return value is not None and value.is_initializer() and values.is_constant(value)


def narrowed(
    tensor: ir.TensorProtocol, half: ir.DataType, *, masks: bool, shift: int = 0
) -> ir.TensorProtocol:
    """The tensor in half, made when it is written, so that a large model is never held twice.

    Args:
        tensor: float32.
        half: FLOAT16 or BFLOAT16.
        masks: elements below the range stand for minus infinity and become `SENTINEL`.
        shift: the exponent of the power of two to scale by.
    """

    def convert() -> ir.TensorProtocol:
        array = np.asarray(tensor.numpy(), np.float32)
        if masks:
            below = np.isfinite(array) & (array < -LIMITS[half].greatest)
            array = np.where(below, np.float32(SENTINEL[half]), array)
        if shift:
            array = np.ldexp(array, shift)
        with np.errstate(over="ignore"):
            return ir.Tensor(np.asarray(array.astype(half.numpy())), dtype=half)

    if tensor.size <= _SMALL:
        return convert()
    return ir.LazyTensor(convert, dtype=half, shape=ir.Shape(tensor.shape.numpy()))


_SMALL = 1 << 16
