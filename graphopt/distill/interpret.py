"""An ONNX model as a function of torch tensors, so that its weights have gradients; importing this imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.distill.control_flow import CONTROL, Body
from graphopt.distill.operators import Call, Operator, Tensor, operator_of
from graphopt.distill.operators.elementwise import tensor_of
from graphopt.errors import ModelError
from graphopt.ir import values
from graphopt.ir.operators import describe
from graphopt.ir.scopes import Scope, dependencies, nested

Watch = Callable[[str, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Step:
    """One node, ready to run.

    Attributes:
        site: operator and name, for messages.
        kind: operator type.
        run: what it does; None of what runs `bodies`.
        attributes: as Python values.
        reads: names of inputs, "" where one is left out.
        makes: names of outputs, "" where one is not used.
        opset: of its domain.
        dead: names that nothing reads after it.
        bodies: graphs in its attributes.
    """

    site: str
    kind: str
    run: Operator | None
    attributes: Mapping[str, Any]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    opset: int
    dead: tuple[str, ...]
    bodies: Mapping[str, Program]


@dataclasses.dataclass(frozen=True)
class Program:
    """One graph, ready to run.

    Attributes:
        inputs: names.
        outputs: names.
        constants: initializers by name.
        steps: in order.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    steps: tuple[Step, ...]

    def run(
        self, around: Mapping[str, Tensor], given: Mapping[str, Tensor], watch: Watch | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs.

        Args:
            around: values of the graphs that this one lies in.
            given: inputs, and initializers that differ from those in the model.
            watch: sees each value when it is made, and may give another to go on with.

        Raises:
            ModelError: a form of an operator is not known; the message names the node.
        """
        live: dict[str, Tensor] = {**around, **self.constants, **given}
        for step in self.steps:
            made = _made(step, live)
            for name, tensor in zip(step.makes, made, strict=False):
                if name:
                    live[name] = tensor if watch is None else watch(name, tensor)
            for name in step.dead:
                live.pop(name, None)
        return tuple(live[name] for name in self.outputs)


class Interpreter:
    """Runs a model node by node.

    Raises:
        ModelError: an operator, or an element type of a constant, is not known; the message lists them.
    """

    def __init__(self, model: ir.Model) -> None:
        unknown = unsupported(model)
        if unknown:
            listed = ", ".join(f"{len(nodes)} x {describe(nodes[0])}" for nodes in unknown.values())
            raise ModelError(
                f"{model.graph.name or 'the model'} cannot be distilled: the interpreter does not know {listed}. "
                "Distil before quantisation or fusion makes them, or leave --distill out"
            )
        self._program = _program(model, model.graph)

    def run(
        self,
        feeds: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """The outputs by name.

        Args:
            feeds: inputs by name; those with a default may be left out.
            weights: initializers that differ from those in the model.
            watch: sees each value of the main graph when it is made, and may give another to go on with.

        Raises:
            ModelError: a form of an operator is not known; the message names the node.
        """
        made = self._program.run({}, {**weights, **feeds}, watch)
        return dict(zip(self._program.outputs, made, strict=True))


def unsupported(model: ir.Model) -> dict[str, list[ir.Node]]:
    """The nodes that the interpreter does not know, by operator; calls of local functions are not known."""
    found: dict[str, list[ir.Node]] = {}
    for scope in nested(Scope(model.graph, model.opset_imports)):
        for node in scope.graph:
            known = (node.domain == "" and node.op_type in CONTROL) or operator_of(node) is not None
            if not known:
                found.setdefault(node.op_type, []).append(node)
    return found


def _tensor(name: str, tensor: ir.TensorProtocol) -> Tensor:
    try:
        return tensor_of(tensor.numpy())
    except NotImplementedError as error:
        raise ModelError(
            f"the constant {name!r} has {error}, which the interpreter of distillation does not know; distil before "
            "weights are packed, or leave --distill out"
        ) from error


def _program(model: ir.Model, graph: ir.Graph) -> Program:
    outputs = tuple(value.name or "" for value in graph.outputs)
    constants = {
        name: _tensor(name, value.const_value)
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    inputs = tuple(value.name or "" for value in graph.inputs)
    return Program(inputs, outputs, constants, _steps(model, graph, frozenset(outputs)))


def _steps(model: ir.Model, graph: ir.Graph, outputs: frozenset[str]) -> tuple[Step, ...]:
    nodes = list(graph)
    reads = [
        tuple(v.name for v in dependencies(node) if v.name and not values.is_constant(v))
        for node in nodes
    ]
    last = {name: index for index, names in enumerate(reads) for name in names}
    made = []
    for index, node in enumerate(nodes):
        names = dict.fromkeys(reads[index])
        dead = tuple(name for name in names if last[name] == index and name not in outputs)
        made.append(_step(model, node, dead))
    return tuple(made)


def _step(model: ir.Model, node: ir.Node, dead: tuple[str, ...]) -> Step:
    plain = {n: a for n, a in node.attributes.items() if a.type != ir.AttributeType.GRAPH}
    return Step(
        f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}",
        node.op_type,
        operator_of(node),
        {name: _plain(attribute) for name, attribute in plain.items()},
        tuple("" if value is None else value.name or "" for value in node.inputs),
        tuple(value.name or "" for value in node.outputs),
        model.opset_imports.get(node.domain, 1),
        dead,
        {n: _program(model, a.as_graph()) for n, a in node.attributes.items() if n not in plain},
    )


def _plain(attribute: ir.Attr) -> Any:  # noqa: ANN401  attributes have any type
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().numpy()
    held = attribute.value
    if isinstance(held, bytes):
        return held.decode()
    return list(held) if isinstance(held, Sequence) and not isinstance(held, str) else held


def _made(step: Step, live: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    call = Call(
        tuple(live[name] if name else None for name in step.reads),
        step.attributes,
        step.opset,
        sum(1 for name in step.makes if name),
    )
    try:
        made = CONTROL[step.kind](call, _bodies(step, live)) if step.run is None else step.run(call)
    except (NotImplementedError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"{step.site}: the interpreter of distillation does not know this form of it ({error}); leave --distill out"
        ) from error
    return made if isinstance(made, tuple) else (made,)


def _bodies(step: Step, live: Mapping[str, Tensor]) -> dict[str, Body]:
    """The graphs of a node as functions, which see what is around them."""

    def body(program: Program) -> Body:
        return lambda given: program.run(live, dict(zip(program.inputs, given, strict=True)))

    return {name: body(program) for name, program in step.bodies.items()}
