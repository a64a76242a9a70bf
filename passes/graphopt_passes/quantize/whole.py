"""Blocks for parsers that want them whole: TensorRT divides volumes by blocks, and packs two 4-bit numbers into a byte.

Source: onnx-tensorrt, onnxOpImporters.cpp (blocked DequantizeLinear); TensorRT's support matrix (INT4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from graphopt.rewrite import Context, name_of
from graphopt_passes.quantize.factors import factor_of, is_turned
from graphopt_passes.quantize.single_blocks import SIZES, Settings


def with_whole_blocks(
    nodes: Iterable[ir.Node], block: int, bits: int, said: Mapping[str, Settings], ctx: Context
) -> dict[str, Settings]:
    """What is said of each of these products, with the largest block up to the one wanted that divides its weight.

    Those that no block divides, or whose rows of 4 bits are odd, stay float, and that is said.
    """
    found = dict(said)
    for node in nodes:
        name = name_of(node)
        given = found[name]
        inner, last = _sizes(node)
        fitting = [s for s in SIZES if s <= (given.block or block) and inner % s == 0]
        odd = (given.bits or bits) == 4 and last % 2
        if fitting and not odd:
            found[name] = given.with_stated(Settings(block=fitting[-1]))
            continue
        why = (
            f"rows of {last} numbers of 4 bits are odd" if odd else f"no block divides {inner} rows"
        )
        ctx.missed(
            "quantize", node, f"stays float: '{ctx.target.name}' takes whole blocks, and {why}"
        )
        found[name] = given.with_stated(Settings(exclude=True))
    return found


def _sizes(node: ir.Node) -> tuple[int, int]:
    """What is summed over, and how long rows are in memory."""
    factor = factor_of(node)
    assert factor is not None
    rows, columns = factor.matrix.shape
    return rows, rows if is_turned(node) else columns
