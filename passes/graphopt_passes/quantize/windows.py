"""Which layers to round by second moments, and what each of them reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from graphopt.calibrate.moments import POSITIONS, Wanted, Window
from graphopt.ir import operators, values
from graphopt_passes.quantize.placement import Role, Site
from graphopt_passes.quantize.reading import is_turned

WIDEST = 1280
"""Columns of a weight from which on its moments cost more than they win."""

MEMORY_BYTES = 1 << 28
WORK = float(1 << 35)
"""What all moments of a model may take: bytes, and multiplications."""


def windows(
    sites: Mapping[ir.Node, Site], elements: Callable[[ir.Value | None], float]
) -> dict[str, Wanted]:
    """What to collect by name of the layer, as many layers as memory and time allow, in order."""
    found: dict[str, Wanted] = {}
    memory, work = 0, 0.0
    for node, site in sites.items():
        each = _wanted(node) if site.role is Role.PRODUCT else None
        tensor = values.constant(node.inputs[1]) if each is not None else None
        if each is None or tensor is None:
            continue
        rows = _rows(node, tensor)
        columns = tensor.size // max(rows, 1)
        positions = min(elements(site.result) / max(rows, 1), POSITIONS)
        memory += 0 if each in found.values() else 24 * columns**2
        work += (rows + 32 * positions) * columns**2
        if columns > WIDEST or memory > MEMORY_BYTES or work > WORK:
            break
        found[node.outputs[0].name or node.name or ""] = each
    return found


def _rows(node: ir.Node, tensor: ir.TensorProtocol) -> int:
    shape = tensor.shape.numpy()
    first = node.op_type == "Conv" or is_turned(node)
    return int(shape[0 if first else 1])


def _wanted(node: ir.Node) -> Wanted | None:
    source = node.inputs[0]
    if source is None or not source.name:
        return None
    if node.op_type != "Conv":
        return Wanted(source.name)
    tensor = values.constant(node.inputs[1])
    padding = operators.attribute(node, "auto_pad", "NOTSET")
    if tensor is None or operators.attribute(node, "group", 1) != 1 or padding != "NOTSET":
        return None
    kernel = tuple(int(d) for d in tensor.shape.numpy()[2:])
    ones, zeros = (1,) * len(kernel), (0,) * (2 * len(kernel))
    return Wanted(
        source.name,
        Window(
            kernel,
            tuple(operators.attribute(node, "strides", ones)),
            tuple(operators.attribute(node, "dilations", ones)),
            tuple(operators.attribute(node, "pads", zeros)),
        ),
    )
