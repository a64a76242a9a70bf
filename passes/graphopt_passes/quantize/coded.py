"""Weights in any element type, with or without zero points: 16, 8 and 4 bits, 8-bit floats; a scale a row."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibrate.formats import LEAST_SCALE, Format
from graphopt_passes.quantize.weights import Packed

Array: TypeAlias = npt.NDArray[Any]
Wide: TypeAlias = npt.NDArray[np.float64]

CLIPS = (1.0, 0.9, 0.8, 0.7)
"""Shares of the range of a row that are tried with few codes; the one of least squared error is taken."""

FEW_CODES = 16


def pack_as(
    rows: Array,
    kind: ir.DataType,
    *,
    symmetric: bool = True,
    shared: bool = False,
    one: bool = False,
    least: Array | None = None,
) -> Packed:
    """Codes with one scale a row, and a zero point unless symmetric; a row of zeros gets the scale 1.

    Args:
        rows: float weights [rows, columns].
        kind: element type of the codes.
        symmetric: whether 0 is the middle of the codes.
        shared: whether all rows take one scale and one zero point, that of all weights together.
        one: whether rows share a zero point, but not the scale: ONNX Runtime's QLinearConv takes one alone.
        least: scales that must be reached: [rows].
    """
    form = Format(kind, symmetric=symmetric)
    wide = rows.astype(np.float64)
    low = np.minimum(wide.min(axis=1, initial=0.0), 0.0)
    high = np.maximum(wide.max(axis=1, initial=0.0), 0.0)
    if shared:
        low[:], high[:] = low.min(initial=0.0), high.max(initial=0.0)
    is_short = not form.is_float and form.codes[1] - form.codes[0] < FEW_CODES
    best = np.full(len(rows), np.inf)
    codes = np.empty(rows.shape, kind.numpy())
    scales, zeros = np.ones(len(rows), np.float32), np.zeros(len(rows), np.int64)
    for clip in CLIPS if is_short and not shared else CLIPS[:1]:
        steps, middle = _steps(low * clip, high * clip, form, together=one)
        found, steps, error = _coded(wide, steps, middle, form, kind, least)
        better = error < best
        best[better], codes[better], scales[better] = error[better], found[better], steps[better]
        zeros[better] = middle[better]
    power = float((wide**2).sum())
    noise = float(best.sum()) / power if power > 0 else 0.0
    held = zeros.astype(kind.numpy()) if zeros.any() else None
    return Packed(codes, scales, noise, 0, zeros=held)


def _coded(
    wide: Wide, steps: Wide, middle: Wide, form: Format, kind: ir.DataType, least: Array | None
) -> tuple[Array, Array, Wide]:
    """Codes by these scales, the scales as they are stored, and the squared error of each row."""
    if least is not None:
        steps = np.where(steps > 0, np.maximum(steps, least), steps)
    stored = np.where(steps > 0, np.maximum(steps, LEAST_SCALE), 1.0).astype(np.float32)
    scaled = wide / stored[:, None]
    scaled = scaled if form.is_float else np.rint(scaled) + middle[:, None]
    found = np.clip(scaled, *form.codes).astype(kind.numpy())
    back = (found.astype(np.float64) - middle[:, None]) * stored[:, None]
    return found, stored, ((back - wide) ** 2).sum(axis=1)


def _steps(low: Wide, high: Wide, form: Format, *, together: bool) -> tuple[Wide, Wide]:
    """Scales and zero points by which each row fits; 0 for a row of zeros."""
    first, last = form.codes
    if form.symmetric or form.is_float:
        middle = 0 if form.is_float or first < 0 else (first + last + 1) // 2
        steps = np.maximum(low / (first - middle), high / (last - middle))
        return steps, np.full(len(low), float(middle))
    if together:
        return _one_zero(low, high, form)
    steps = (high - low) / (last - first)
    safe = np.where(steps > 0, steps, 1.0)
    return steps, np.clip(np.rint(first - low / safe), first, last)


def _one_zero(low: Wide, high: Wide, form: Format) -> tuple[Wide, Wide]:
    """The zero point by which all rows together take the shortest steps, and these."""
    first, last = form.codes
    tried = np.unique(np.rint(np.linspace(first, last, 256)))
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(low[:, None] < 0, -low[:, None] / (tried - first), 0.0)
        above = np.where(high[:, None] > 0, high[:, None] / (last - tried), 0.0)
    steps = np.maximum(below, above)
    chosen = int(np.argmin((steps**2).sum(axis=0)))
    return steps[:, chosen], np.full(len(low), tried[chosen])
