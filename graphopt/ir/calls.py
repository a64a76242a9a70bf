"""Model-local functions call one another: never in a circle, and within reason."""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir import scopes

MAX_NODES = 1_000_000
"""With the functions written out, as runtimes do: a dozen times what the largest real models have."""

_Calls: TypeAlias = Counter[ir.OperatorIdentifier]


def check_calls(model: ir.Model, origin: str) -> None:
    """Checks that the calls of functions come to an end.

    A few functions, each of which calls the one before twice, are small as a file and endless once written out.

    Raises:
        ModelError: a function reaches itself, which ONNX forbids (onnx.proto, `ModelProto.functions`), or the model
            has more than `MAX_NODES` nodes where calls have given way to bodies.
    """
    bodies = {key: _operators(function.all_nodes()) for key, function in model.functions.items()}
    calls = {key: body.keys() & bodies.keys() for key, body in bodies.items()}
    sizes: dict[ir.OperatorIdentifier, int] = {}
    try:
        for key in graphlib.TopologicalSorter(calls).static_order():
            sizes[key] = _size(bodies[key], sizes)
    except graphlib.CycleError as error:
        circle = " <- ".join(f"{domain}:{name}" for domain, name, _ in error.args[1])
        raise ModelError(
            f"{origin}: functions call one another in a circle: {circle}; the model is invalid, export it again"
        ) from error
    if sizes and _size(_operators(scopes.all_nodes(model.graph)), sizes) > MAX_NODES:
        raise ModelError(
            f"{origin}: with its functions written out where they are called, the model has more than {MAX_NODES} "
            "nodes, which no runtime can take; the file is hostile, or its exporter went wrong"
        )


def _operators(nodes: Iterable[ir.Node]) -> _Calls:
    return Counter(node.op_identifier() for node in nodes)


def _size(body: _Calls, sizes: Mapping[ir.OperatorIdentifier, int]) -> int:
    """The nodes of a body once calls have given way to bodies."""
    return sum(count * sizes.get(operator, 1) for operator, count in body.items())
