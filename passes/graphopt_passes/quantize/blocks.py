"""Weights in 4 or 8 bits with a scale a block: as the kernels for single tokens want them.

Source: com.microsoft MatMulNBits and GatherBlockQuantized, ONNX Runtime 1.31 (ContribOperators.md); ai.onnx
DequantizeLinear, opset 21.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt_passes.quantize import rounding

Array: TypeAlias = npt.NDArray[Any]
Wide: TypeAlias = npt.NDArray[np.float64]

CLIPS = {4: (0.925, 0.85, 0.775), 8: (1.004, 0.996, 0.992)}
"""Shares of the range of a block that are tried, by bits; the one of least squared error is taken, or the whole."""

CHUNK = 1 << 16
"""Elements that are worked on at once: they stay in the cache."""


LEAST_HALF = np.float32(2.0**-24)
"""The least positive number of float16."""

_TURNED = 256
"""Rows that are turned at once: their parts of a block stay in the nearest cache."""


def encode(rows: Array, block: int, bits: int, moments: Wide | None = None) -> tuple[Array, Array]:
    """Signed codes int8 [rows, K padded to whole blocks] and scales [rows, blocks], float16 where the rows are.

    The largest weight of a block becomes the least code, the longer end.

    Args:
        rows: float weights [rows, K], one output channel a row.
        block: elements that share a scale.
        bits: 4 or 8.
        moments: second moments of what the rows are multiplied with [K, K]; then rounding is by them (GPTQ).
    """
    width = rows.shape[1]
    columns = np.asarray(rows.T, np.float32)  # a view: blocks lie along the first axis
    count = -(-width // block)
    if width % block:
        columns = np.concatenate([columns, np.zeros((-width % block, len(rows)), np.float32)])
    codes = np.empty_like(columns, np.int8)
    scales = np.empty((count, len(rows)), np.float32)
    half = rows.dtype == np.float16
    many = max(CHUNK // block, 1)
    work = np.empty(4 * block * many, np.float32)
    # Blocks lie along the first axis, those of one row along the second.
    parted, found = (
        each.reshape(count, block, len(rows)).transpose(1, 0, 2) for each in (columns, codes)
    )
    at_once = max(many // max(len(rows), 1), 1)
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        for start in range(0, len(rows), many):
            part = slice(start, start + many)
            scales[some, part] = _nearest(
                parted[:, some, part], found[:, some, part], bits, work, half
            )
    if moments is not None and len(moments) == width:
        codes[:width] = _by_moments(rows, codes.T, scales.T, moments, bits).T
    return codes.T, scales.T.astype(np.float16) if half else scales.T


def _nearest(columns: Array, codes: Array, bits: int, work: Array, half: bool) -> Array:
    """Puts the nearest codes of each column, one block, into `codes` [block, blocks, rows]; returns their scales.

    Errors are compared in units of the longer end: each step is one pass over what stays in the cache.
    """
    low, high = limits(bits)
    held, scaled = work[: 2 * columns.size].reshape(2, *columns.shape)
    if columns.strides[2] != columns.itemsize:
        for start in range(0, columns.shape[2], _TURNED):
            part = slice(start, start + _TURNED)
            held[:, :, part] = columns[:, :, part]
        columns = held
    least, most = columns.min(axis=0), columns.max(axis=0)
    peak = np.where(-least > most, least, most)
    peak[np.abs(peak) < np.finfo(np.float32).tiny] = low
    scales = peak / np.float32(low)
    np.multiply(columns, np.float32(low) / peak, out=scaled)
    flat = scaled.reshape(len(scaled), -1)
    scales = scales * _best_clips(flat, bits, work[2 * columns.size :]).reshape(peak.shape)
    if half:  # codes are those of the scale as it is stored
        stored = scales.astype(np.float16)
        scales = np.where(stored == 0, LEAST_HALF, stored.astype(np.float32))
    np.divide(columns, scales, out=scaled)
    np.rint(scaled, out=scaled)
    scaled.clip(low, high, out=codes, casting="unsafe")
    return np.asarray(scales)


def _best_clips(scaled: Array, bits: int, work: Array) -> Array:
    """The share of its range that loses the least of each column, whose longer end is `low`.

    What a clip takes from that end alone is known beforehand: only columns that lose more without it are tried.
    """
    low, high = limits(bits)
    rounded, other = work[: 2 * scaled.size].reshape(2, *scaled.shape)
    np.rint(scaled, out=rounded)
    np.minimum(rounded, np.float32(high), out=rounded)
    np.subtract(rounded, scaled, out=rounded)
    best = np.einsum("kb,kb->b", rounded, rounded)
    chosen: Array = np.ones_like(best)
    for clip in CLIPS[bits]:
        near = np.flatnonzero(best > np.float32((low * (1 - clip)) ** 2))
        every = 2 * len(near) > len(best)
        kept = slice(None) if every else near
        part = scaled if every else scaled[:, near]
        shrunk, found = other[:, : part.shape[1]], rounded[:, : part.shape[1]]
        np.multiply(part, np.float32(1 / clip), out=shrunk)
        np.rint(shrunk, out=found)
        found.clip(low, high, out=found)
        np.subtract(found, shrunk, out=found)
        error = np.einsum("kb,kb->b", found, found) * np.float32(clip**2)
        better = error < best[kept]
        best[kept] = np.where(better, error, best[kept])
        chosen[kept] = np.where(better, np.float32(clip), chosen[kept])
    return chosen


def _by_moments(rows: Array, codes: Array, scales: Array, moments: Wide, bits: int) -> Array:
    """Codes by compensation and refinement, where that loses less of the outputs than the nearest ones do."""
    wide, width = rows.astype(np.float64), rows.shape[1]
    steps = np.repeat(scales.astype(np.float64), codes.shape[1] // scales.shape[1], axis=1)
    steps, safe = steps[:, :width], rounding.damped(moments)
    nearest = codes[:, :width].astype(np.float64)
    made = rounding.compensate(wide, steps, safe, limits(bits))
    before = rounding.error(wide - nearest * steps, safe)
    better = rounding.error(wide - made * steps, safe) < before
    start = made if better else nearest
    return rounding.refine(wide, start, steps, safe, limits(bits)).astype(np.int8)


def limits(bits: int) -> tuple[int, int]:
    """The least and the greatest signed code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def packed(codes: Array, bits: int) -> Array:
    """Codes as unsigned bytes, zero in the middle; two of 4 bits share a byte, the low half first."""
    shifted = codes.view(np.uint8) + np.uint8(1 << (bits - 1))  # wraps around below zero
    return shifted if bits == 8 else shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def pack_blocks(
    matrix: Array, block: int, bits: int = 4, moments: Wide | None = None
) -> tuple[Array, Array]:
    """A matrix [K, N] for MatMulNBits: uint8 [N, ceil(K / block), block * bits / 8], scales [N * ceil(K / block)]."""
    codes, scales = encode(matrix.T, block, bits, moments)
    shape = (matrix.shape[1], scales.shape[1], block * bits // 8)
    return packed(codes, bits).reshape(shape), scales.reshape(-1)
