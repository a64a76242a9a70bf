"""ir.Model <-> onnx_graphsurgeon graph, node by node; weights are shared, never written out.

graphsurgeon has no place for much of what a model says (metadata, doc strings of nodes, sequence and optional types,
training information, defaults of inputs).  `from_surgeon` takes all that from the model that the graph was made from,
for whatever still has its name; the script's graph decides on everything that graphsurgeon can express.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.util import misc

from graphopt.errors import ModelError
from graphopt.ir import operators
from graphopt.ir.surgeon_model import from_surgeon
from graphopt.ir.surgeon_values import PLAIN, Description, share

__all__ = ["from_surgeon", "to_surgeon"]


def to_surgeon(model: ir.Model) -> gs.Graph:
    """A graphsurgeon graph of the model; its constants refer to the model's tensors.

    An initializer that is also a graph input is a default that a feed may replace: it becomes an input, not a constant.

    Raises:
        ModelError: graphsurgeon cannot hold the model: overloaded functions, attributes that are lists of graphs.
    """
    functions = [_to_function(function) for function in model.functions.values()]
    graph = _to_graph(model.graph, {}, model.opset_imports)
    return gs.Graph(
        graph.nodes,
        graph.inputs,
        graph.outputs,
        name=model.graph.name or "graph",
        doc_string=model.graph.doc_string or "",
        opset=model.opset_imports.get("", gs.Graph.DEFAULT_OPSET),
        import_domains=_imports(model.opset_imports),
        producer_name=model.producer_name or "",
        producer_version=model.producer_version or "",
        functions=functions,
        ir_version=model.ir_version,
    )


def _imports(opsets: Mapping[str, int]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.OperatorSetIdProto(domain=domain, version=opsets[domain]) for domain in opsets]


def _to_function(function: ir.Function) -> gs.Function:
    if function.overload:
        raise ModelError(
            f"function {function.domain}::{function.name} has the overload {function.overload!r}, which "
            "graphsurgeon cannot tell apart: inline the functions before this pass"
        )
    graph = _to_graph(function.graph, {}, function.opset_imports)
    attributes = {
        attr.name: None
        if attr.value is None
        else _to_attribute(attr, {}, function.opset_imports, "")
        for attr in function.attributes.values()
    }
    return gs.Function(
        function.name,
        function.domain,
        nodes=graph.nodes,
        inputs=graph.inputs,
        outputs=graph.outputs,
        doc_string=function.doc_string or "",
        opset=function.opset_imports.get("", gs.Graph.DEFAULT_OPSET),
        import_domains=_imports(function.opset_imports),
        attrs=attributes,
    )


def _to_graph(
    graph: ir.Graph, outer: Mapping[ir.Value, gs.Tensor], opsets: Mapping[str, int]
) -> gs.Graph:
    tensors: dict[ir.Value, gs.Tensor] = dict(outer)
    for value in graph.initializers.values():
        if not value.is_graph_input() and value.const_value is not None:
            tensors[value] = share(value.const_value, value.name or "")
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs if v.name)):
        tensors[value] = Description.of_value(value).variable(value.name or "")
    nodes = [_to_node(node, tensors, opsets) for node in graph]
    return gs.Graph(
        nodes,
        [tensors[value] for value in graph.inputs],
        [tensors[value] for value in graph.outputs],
        name=graph.name or "graph",
        doc_string=graph.doc_string or "",
        opset=opsets.get("", gs.Graph.DEFAULT_OPSET),
        import_domains=_imports(opsets),
    )


def _to_node(
    node: ir.Node, tensors: Mapping[ir.Value, gs.Tensor], opsets: Mapping[str, int]
) -> gs.Node:
    if node.overload:
        raise ModelError(
            f"{operators.describe(node)} calls the overload {node.overload!r}, which graphsurgeon cannot say: "
            "inline the functions before this pass"
        )
    where = operators.describe(node)
    return gs.Node(
        node.op_type,
        node.name or "",
        {a.name: _to_attribute(a, tensors, opsets, where) for a in node.attributes.values()},
        [gs.Variable.empty() if v is None else tensors[v] for v in node.inputs],
        [tensors[v] if v.name else gs.Variable.empty() for v in node.outputs],
        node.domain or None,
    )


def _to_attribute(
    attr: ir.Attr,
    tensors: Mapping[ir.Value, gs.Tensor],
    opsets: Mapping[str, int],
    where: str,
) -> Any:  # noqa: ANN401
    """The attribute's value as graphsurgeon has it; what it has no type for is carried as it is."""
    if attr.is_ref():
        kind = misc.convert_from_onnx_attr_type(int(attr.type))
        return gs.Node.AttributeRef(attr.ref_attr_name, kind)
    match attr.type:
        case ir.AttributeType.TENSOR:
            return share(attr.as_tensor(), attr.as_tensor().name or "")
        case ir.AttributeType.GRAPH:
            return _to_graph(attr.as_graph(), tensors, opsets)
        case ir.AttributeType.GRAPHS:
            raise ModelError(
                f"attribute {attr.name!r} of {where} is a list of graphs, which graphsurgeon cannot hold; leave this "
                "pass out for this model"
            )
        case kind if kind in PLAIN:
            return list(attr.value) if isinstance(attr.value, tuple) else attr.value
    return attr
