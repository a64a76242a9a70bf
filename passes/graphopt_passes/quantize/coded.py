"""Weights in element types that no integer kernel multiplies: 16 and 4 bits, 8-bit floats; a scale a row."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibrate.formats import LEAST_SCALE, Format
from graphopt_passes.quantize.weights import Packed

Array: TypeAlias = npt.NDArray[Any]

CLIPS = (1.0, 0.9, 0.8, 0.7)
"""Shares of the range of a row that are tried with few codes; the one of least squared error is taken."""

FEW_CODES = 16


def pack_as(rows: Array, kind: ir.DataType, *, shared: bool = False) -> Packed:
    """Symmetric codes, one scale a row; a row of zeros gets the scale 1.

    Args:
        rows: float weights [rows, columns].
        kind: element type of the codes.
        shared: whether all rows take the greatest scale of any.
    """
    form = Format(kind, symmetric=True)
    top = form.codes[1]
    wide = rows.astype(np.float64)
    peaks = np.abs(wide).max(axis=1, initial=0.0)
    if shared:
        peaks = np.full_like(peaks, peaks.max(initial=0.0))
    clips = CLIPS if not form.is_float and 2 * top < FEW_CODES and not shared else CLIPS[:1]
    best = np.full(len(rows), np.inf)
    codes = np.empty(rows.shape, kind.numpy())
    scales = np.ones(len(rows), np.float32)
    for clip in clips:
        stored = np.where(peaks > 0, np.maximum(peaks * clip / top, LEAST_SCALE), 1.0)
        steps = stored.astype(np.float32)
        scaled = np.clip(wide / steps[:, None], -top, top)
        found = (scaled if form.is_float else np.rint(scaled)).astype(kind.numpy())
        error = ((found.astype(np.float64) * steps[:, None] - wide) ** 2).sum(axis=1)
        better = error < best
        best[better], codes[better], scales[better] = error[better], found[better], steps[better]
    power = float((wide**2).sum())
    return Packed(codes, scales, float(best.sum()) / power if power > 0 else 0.0, 0)
