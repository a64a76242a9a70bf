"""An ONNX model as a function of torch tensors, so that its weights have gradients; importing this imports torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.distill.operators import MICROSOFT, ONLY_MICROSOFT, OPERATORS, Call, Operator, Tensor
from graphopt.distill.operators.elementwise import tensor_of
from graphopt.errors import ModelError
from graphopt.ir import operators, values

Watch = Callable[[str, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Step:
    """One node, ready to run.

    Attributes:
        site: operator and name, for messages.
        run: what it does.
        attributes: as Python values.
        reads: names of inputs, "" where one is left out.
        makes: names of outputs, "" where one is not used.
        opset: of its domain.
        dead: names that nothing reads after it.
    """

    site: str
    run: Operator
    attributes: Mapping[str, Any]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    opset: int
    dead: tuple[str, ...]


class Interpreter:
    """Runs the main graph of a model node by node.

    Raises:
        ModelError: an operator, or an element type of a constant, is not known; the message lists them.
    """

    def __init__(self, model: ir.Model) -> None:
        unknown = unsupported(model)
        if unknown:
            listed = ", ".join(f"{count} x {name}" for name, count in unknown.items())
            raise ModelError(
                f"{model.graph.name or 'the model'} cannot be distilled: the interpreter does not know {listed}. "
                "Distil before quantisation or fusion makes them, or leave --distill out"
            )
        self.inputs = tuple(value.name or "" for value in model.graph.inputs)
        self.outputs = tuple(value.name or "" for value in model.graph.outputs)
        self._steps = _steps(model, frozenset(self.outputs))
        self._constants = {
            name: _tensor(name, value.const_value)
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }

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
            watch: sees each value when it is made, and may give another to go on with.

        Raises:
            ModelError: a form of an operator is not known; the message names the node.
        """
        live: dict[str, Tensor] = {**self._constants, **weights, **feeds}
        for step in self._steps:
            made = _made(step, live)
            for name, tensor in zip(step.makes, made, strict=False):
                if name:
                    live[name] = tensor if watch is None else watch(name, tensor)
            for name in step.dead:
                live.pop(name, None)
        return {name: live[name] for name in self.outputs}


def unsupported(model: ir.Model) -> dict[str, int]:
    """Operators of the main graph that the interpreter does not know, with their counts."""
    found: Counter[str] = Counter()
    for node in model.graph:
        plain = not node.domain and node.op_type in OPERATORS and node.op_type not in ONLY_MICROSOFT
        contrib = node.domain == operators.MICROSOFT and node.op_type in MICROSOFT
        if not (plain or contrib) or operators.has_subgraph(node):
            found[node.op_type] += 1
    return dict(found)


def _tensor(name: str, tensor: ir.TensorProtocol) -> Tensor:
    try:
        return tensor_of(tensor.numpy())
    except NotImplementedError as error:
        raise ModelError(
            f"the constant {name!r} has {error}, which the interpreter of distillation does not know; distil before "
            "weights are packed, or leave --distill out"
        ) from error


def _steps(model: ir.Model, outputs: frozenset[str]) -> tuple[Step, ...]:
    nodes = list(model.graph)
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.name and not values.is_constant(value):
                last[value.name] = index
    made = []
    for index, node in enumerate(nodes):
        dead = tuple(
            name
            for name in dict.fromkeys(v.name for v in node.inputs if v is not None and v.name)
            if last.get(name) == index and name not in outputs
        )
        made.append(_step(model, node, dead))
    return tuple(made)


def _step(model: ir.Model, node: ir.Node, dead: tuple[str, ...]) -> Step:
    return Step(
        f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}",
        OPERATORS[node.op_type],
        {name: _plain(attribute) for name, attribute in node.attributes.items()},
        tuple("" if value is None else value.name or "" for value in node.inputs),
        tuple(value.name or "" for value in node.outputs),
        model.opset_imports.get(node.domain, 1),
        dead,
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
        made = step.run(call)
    except (NotImplementedError, RuntimeError, KeyError, IndexError) as error:
        raise ModelError(
            f"{step.site}: the interpreter of distillation does not know this form of it ({error}); leave --distill out"
        ) from error
    return made if isinstance(made, tuple) else (made,)
