"""Products too narrow for the integer kernels of a runtime that nobody can time here.

Source: what NVIDIA ModelOpt leaves in float for TensorRT (graph_utils.py, partitioning.py): vectors times matrices, and
fewer than 16 channels but for first layers and whole blocks of 8.  Not measured.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir import operators
from graphopt_passes.quantize.placement import is_product
from graphopt_passes.quantize.reading import is_turned, shape_of

BLOCK = 8
"""Channels that lie together."""


def why_narrow(node: ir.Node, least: int) -> str:
    """Why integers gain nothing at a product, of which `least` channels are wanted; empty where nothing is known."""
    if not least or not is_product(node):
        return ""
    if node.op_type == "Conv":
        return _narrow_filters(node, least)
    inner, columns = _sizes(node)
    if columns == 1 or _rows(node.inputs[0]) == 1:
        return "a vector times a matrix reads weights, whatever multiplies them"
    if inner < least or columns < least:
        return f"{inner} x {columns} weights are less than the {least} x {least} that are multiplied at once"
    return ""


def _sizes(node: ir.Node) -> tuple[int, int]:
    """Of a matrix product: what is summed over, and columns."""
    first, second = shape_of(node)
    return (second, first) if is_turned(node) else (first, second)


def _rows(value: ir.Value | None) -> int | None:
    """How many rows a product reads in all; None where that is not fixed."""
    if value is None or value.shape is None:
        return None
    rows = 1
    for size in tuple(value.shape)[:-1]:
        if not isinstance(size, int):
            return None
        rows *= size
    return rows


def _narrow_filters(node: ir.Node, least: int) -> str:
    shape, group = shape_of(node), operators.attribute(node, "group", 1)
    made, read, window = shape[0], shape[1] * group, shape[2:]
    if made >= least and read >= least:
        return ""
    if group > 1:
        taken = made % BLOCK == 0 and all(size >= 3 for size in window)
    else:
        wide = max(made, read) >= least or _is_first(node)
        taken = wide and (made % BLOCK == 0 or read % BLOCK == 0) and len(set(window)) == 1
    return "" if taken else f"{read} channels in and {made} out are too few for blocks of {least}"


def _is_first(node: ir.Node) -> bool:
    """Whether no product lies between an input of the model and this one."""
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if is_product(maker):
            return False
        value = maker.inputs[0] if maker.inputs else None
    return True
