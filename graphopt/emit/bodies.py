"""Operators that a runtime replaces by the function that defines them: what that function is made of."""

from __future__ import annotations

import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir

from graphopt.emit.sites import Site
from graphopt.ir import operators
from graphopt.ir.model_file import load_model


def expanded(site: Site) -> ir.Model | None:
    """A model of the node's body: the operators that define the node's; None where types are missing to tell.

    Bodies depend on the types of operands and on attributes; onnx builds them.
    """
    node = site.node
    if operators.has_subgraph(node) or operators.has_references(node):
        return None
    proto = onnx.ModelProto(ir_version=10)
    proto.opset_import.add(domain="", version=site.opset)
    if site.domain:
        proto.opset_import.add(domain=site.domain, version=site.opset)
    for value in dict.fromkeys(v for v in node.inputs if v is not None):
        known = site.shapes.facts(value).type or value.type
        if known is None or not value.name:
            return None
        typed = ir.Value(name=value.name, type=known, shape=value.shape)
        proto.graph.input.append(ir.serde.serialize_value(typed))
    proto.graph.node.append(ir.serde.serialize_node(node))
    proto.graph.name = "body"
    for output in node.outputs:
        if output.name:
            proto.graph.output.add(name=output.name)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
        body = onnx.inliner.inline_selected_functions(
            inferred, [], exclude=True, inline_schema_functions=True
        )
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    if any(each.op_type == node.op_type and each.domain == site.domain for each in body.graph.node):
        return None
    return load_model(body)
