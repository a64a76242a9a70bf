"""What a pass left behind: bytes of constants and arithmetic, counted when a report was asked for."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.ir import scopes, values
from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt.report.cost import macs
from graphopt.report.facts import stored_tensors


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model on its way.

    Attributes:
        name: the pass that it comes from; "" for the model as it was read.
        nodes: subgraphs and functions included.
        parameter_bytes: of all constants, as dense tensors.
        flops: two for each multiply-accumulate, free dimensions taken as one, each body counted once.
        uncounted: products whose dimensions are not known.
    """

    name: str
    nodes: int
    parameter_bytes: int
    flops: int
    uncounted: int = 0


def stage(name: str, model: ir.Model) -> Stage:
    """Counts a model; it is not changed."""
    copy = load_model(model)
    shapes = Shapes(copy)
    nodes = [node for scope in scopes.all_graphs(copy) for node in scope.graph]
    flops = uncounted = 0
    for node in nodes:
        cost = macs(node, shapes.dims)
        number = (
            None if cost is None else cost.evaluate({symbol.name: 1 for symbol in cost.symbols()})
        )
        flops += 2 * (number or 0)
        uncounted += number is None
    size = sum(values.size_bytes(tensor) for _, tensor in stored_tensors(copy))
    return Stage(name, len(nodes), size, flops, uncounted)
