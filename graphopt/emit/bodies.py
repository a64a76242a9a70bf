"""Operators that a runtime replaces by the function that defines them: what that function is made of."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir

from graphopt.emit.sites import Site
from graphopt.ir import operators
from graphopt.ir.model_file import load_model


def expanded(site: Site, *, whole: bool = True) -> ir.Model | None:
    """A model of the node's body: the operators that define the node's; None where types are missing to tell.

    Bodies depend on the types of operands and on attributes; onnx builds them.  With `whole`, operators in the body
    that have bodies themselves are replaced too, down to those that have none.
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
        given = all(proto.graph.node[0].input)
        body = _inlined(proto, site, whole=whole) if given else _instantiated(proto, site)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    if body is None:
        return None
    if any(each.op_type == node.op_type and each.domain == site.domain for each in body.graph.node):
        return None
    return load_model(body)


def _inlined(proto: onnx.ModelProto, site: Site, *, whole: bool) -> onnx.ModelProto:
    inferred = onnx.shape_inference.infer_shapes(proto)
    chosen = [] if whole else [(site.domain, site.node.op_type)]
    return onnx.inliner.inline_selected_functions(
        inferred, chosen, exclude=whole, inline_schema_functions=True
    )


def _instantiated(proto: onnx.ModelProto, site: Site) -> onnx.ModelProto | None:
    """The body of a node that leaves operands out, which onnx's inliner stumbles over."""
    node = proto.graph.node[0]
    schema: Any = operators.find_schema(node.op_type, site.opset, site.domain)
    versions = () if schema is None else schema.context_dependent_function_opset_versions
    fitting = [version for version in versions if version <= site.opset]
    if schema is None or not fitting:
        return None
    types = {info.name: info.type for info in proto.graph.input}
    kinds = [types.get(name, onnx.TypeProto()).SerializeToString() for name in node.input]
    found = onnx.FunctionProto.FromString(
        schema.get_context_dependent_function_with_opset_version(
            max(fitting), node.SerializeToString(), kinds
        )
    )
    body = onnx.ModelProto(ir_version=10, opset_import=found.opset_import)
    body.graph.name = "body"
    for formal, actual in zip(found.input, node.input, strict=False):
        if actual:
            body.graph.input.add(name=formal).type.CopyFrom(types[actual])
    left_out = set(found.input) - {info.name for info in body.graph.input}
    for each in found.node:
        inner = body.graph.node.add()
        inner.CopyFrom(each)
        inner.input[:] = ["" if name in left_out else name for name in each.input]
    for _, name in zip(node.output, found.output, strict=False):
        body.graph.output.add(name=name)
    return body
