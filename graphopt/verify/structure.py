"""The structure of a model as text that a person can review in a diff: no weights, no incidental names."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, scopes, values
from graphopt.runtime.specs import spec_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 8
"""Elements of a constant that are written out: enough for axes, pads and scalars."""


def op_histogram(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, in subgraphs and functions too, sorted by name."""
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for scope in scopes.all_graphs(model)
        for node in scope.graph
    )
    return dict(sorted(counts.items()))


def structure(model: ir.Model) -> str:
    """One line a node, in the order of the file; values are numbered as they are defined.

    Names of inputs and outputs of the model are part of its contract and stay. Constants are written where they
    are used: in full up to eight elements, else as dtype and shape.
    """
    writer = _Writer()
    lines = [
        f"opset {domain or 'ai.onnx'} {version}"
        for domain, version in sorted(model.opset_imports.items())
    ]
    lines += writer.graph(model.graph, "main", "")
    for function in model.functions.values():
        writer = _Writer()
        lines += writer.graph(function.graph, f"function {function.domain}::{function.name}", "")
    return "\n".join(lines) + "\n"


class _Writer:
    """Names values by the order of their definition, within one graph and all it holds."""

    def __init__(self) -> None:
        self._names: dict[ir.Value, str] = {}

    def graph(self, graph: ir.Graph, title: str, indent: str) -> Iterator[str]:
        main = title == "main"
        for value in (*graph.inputs, *(graph.outputs if main else ())):
            self._names.setdefault(value, repr(value.name) if main else self._fresh())
        inputs = ", ".join(f"{self._names[v]} {spec_of(v)}" for v in graph.inputs)
        yield f"{indent}{title} ({inputs})"
        for node in graph:
            yield from self._node(node, indent + "  ")
        outputs = ", ".join(self._use(value) for value in graph.outputs)
        yield f"{indent}  return {outputs}"

    def _node(self, node: ir.Node, indent: str) -> Iterator[str]:
        if node.op_type == "Constant" and not node.domain and values.is_constant(node.outputs[0]):
            return
        uses = ", ".join("" if value is None else self._use(value) for value in node.inputs)
        for output in node.outputs:
            self._names.setdefault(output, self._fresh() if output.name else "_")
        made = ", ".join(self._names[output] for output in node.outputs)
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        yield f"{indent}{made} = {kind}{_attributes(node)}({uses})"
        for graph in operators.subgraphs(node):
            yield from self.graph(graph, "body", indent + "  ")

    def _use(self, value: ir.Value) -> str:
        if value in self._names and not values.is_constant(value):
            return self._names[value]
        tensor = values.constant(value)
        if tensor is None:
            return self._names.setdefault(value, self._fresh())
        return _constant(tensor)

    def _fresh(self) -> str:
        return f"%{len(self._names)}"


def _attributes(node: ir.Node) -> str:
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    shown = [
        f"{name}={_attribute(attribute)}"
        for name, attribute in sorted(node.attributes.items())
        if attribute.type not in graphs
    ]
    return f"<{', '.join(shown)}>" if shown else ""


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type is ir.AttributeType.TENSOR:
        return _constant(attribute.as_tensor())
    if attribute.type is ir.AttributeType.FLOAT:
        return f"{attribute.as_float():.7g}"
    if attribute.type is ir.AttributeType.FLOATS:
        numbers = ", ".join(f"{number:.7g}" for number in attribute.as_floats()[:_SHOWN])
        more = ", …" if len(attribute.as_floats()) > _SHOWN else ""
        return f"[{numbers}{more}]"
    text = str(attribute.value)
    return text if len(text) <= 80 else text[:78] + "…"


def _constant(tensor: ir.TensorProtocol) -> str:
    kind = f"{tensor.dtype.name.lower()}[{','.join(str(dim) for dim in tensor.shape)}]"
    if tensor.size > _SHOWN:
        return kind
    array = np.asarray(tensor.numpy()).reshape(-1)
    if tensor.dtype.is_floating_point():
        shown = ", ".join(f"{float(number):.7g}" for number in array)
    else:
        shown = ", ".join(str(item) for item in array.tolist())
    return f"{kind}{{{shown}}}"
