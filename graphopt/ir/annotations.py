"""Quantization annotations: the one place where a model refers to a tensor by name alone."""

from __future__ import annotations

from graphopt.ir.scopes import Census

_KEY = "quant_parameter_tensor_names"  # where onnx_ir keeps the annotation of a value


def annotation_names(census: Census) -> frozenset[str]:
    """The tensors (scales, zero points) that the annotations of a model name: no pass may rename or remove them.

    Source: `GraphProto.quantization_annotation` of onnx.proto.
    """
    found: set[str] = set()
    for scope, nodes in census.parts:
        graph = scope.graph
        held = [*graph.inputs, *graph.initializers.values()]
        held.extend(value for node in nodes for value in node.outputs)
        for value in held:
            if _KEY in value.meta:
                found.update(value.meta[_KEY].values())
    return frozenset(found)
