"""Reads means over the last axes and the epsilon beside them, and makes the scale that a normalisation starts with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match, Skip, Var
from graphopt_passes.constants import from_front, given_axes


def epsilon_of(m: Match, eps: Var, x: ir.Value) -> float:
    """What is added to a variance of `x`; 0 where nothing is.

    Raises:
        Skip: it is negative, or broadens the rank.
    """
    if eps not in m.env:
        return 0.0
    epsilon = m.scalar(eps)
    if epsilon < 0 or m.array(eps).ndim > len(m.known_dims(x)):
        raise Skip("epsilon is negative, or broadens the rank", m[eps])
    return epsilon


def trailing_axes(m: Match, node: ir.Node, x: ir.Value) -> tuple[int, ...] | None:
    """The axes of a reduction of `x`, where they are the last ones and stay as 1.

    Source: ReduceMean-1 (attribute), -18 (input).
    """
    rank = len(m.known_dims(x))
    held = given_axes(m, node, 18)
    if not held or not m.attr(node, "keepdims", 1):
        return None
    axes = from_front(held, rank)
    return axes if axes == tuple(range(rank - len(axes), rank)) else None


def scale_of_ones(
    g: Builder, dtype: ir.DataType | None, dims: list[Dim], culprit: ir.Value
) -> ir.Value:
    """A scale that leaves all as it is.

    Raises:
        Skip: its size is not known, or 0.
    """
    return filled(g, 1.0, dtype, dims, culprit)


def filled(
    g: Builder, number: float, dtype: ir.DataType | None, dims: list[Dim], culprit: ir.Value
) -> ir.Value:
    """A constant of `number`s.

    Raises:
        Skip: its size is not known, or 0, which kernels refuse.
    """
    if any(d == 0 for d in dims):
        raise Skip("the normalised axes are empty", culprit)
    if dtype is None or not all(d.is_static for d in dims):
        raise Skip("the size of the normalised axes is unknown", culprit)
    return g.const(np.full([int(d) for d in dims], number, dtype.numpy()), name="scale")
