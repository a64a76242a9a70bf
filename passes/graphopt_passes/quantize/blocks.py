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

CLIPS = (1.0, 0.925, 0.85, 0.775)
"""Shares of the range of a block that are tried; the one of least squared error is taken."""

CHUNK = 1 << 15
"""Elements that are worked on at once: they stay in the cache."""


def encode(rows: Array, block: int, bits: int, moments: Wide | None = None) -> tuple[Array, Array]:
    """Signed codes int8 [rows, K padded to whole blocks] and scales float32 [rows, blocks].

    The largest weight of a block becomes the least code, the longer end.

    Args:
        rows: float weights [rows, K], one output channel a row.
        block: elements that share a scale.
        bits: 4 or 8.
        moments: second moments of what the rows are multiplied with [K, K]; then rounding is by them (GPTQ).
    """
    count = -(-rows.shape[1] // block)
    codes = np.empty((len(rows), count * block), np.int8)
    scales = np.empty((len(rows), count), np.float32)
    step = max(CHUNK // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        codes[part], scales[part] = _nearest(rows[part], block, count, bits)
    if moments is not None and moments.shape[0] == rows.shape[1]:
        codes[:, : rows.shape[1]] = _by_moments(rows, codes, scales, moments, bits)
    return codes, scales


def _nearest(rows: Array, block: int, count: int, bits: int) -> tuple[Array, Array]:
    padded = np.zeros((len(rows), count * block), np.float32)
    padded[:, : rows.shape[1]] = rows
    blocks = padded.reshape(-1, block)
    low, _ = limits(bits)
    ends = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    peak = np.where(-ends[0] > ends[1], *ends)
    best = np.full((len(blocks), 1), np.inf, np.float32)
    scales, held = np.ones_like(best), np.empty_like(blocks)
    for clip in CLIPS if bits == 4 else CLIPS[:1]:
        tried = peak * np.float32(clip / low)
        tried[np.abs(tried) < np.finfo(np.float32).tiny] = 1
        lost = _codes(blocks, tried, bits, held)
        lost *= tried
        lost -= blocks
        error = np.einsum("bk,bk->b", lost, lost)[:, None]
        better = error < best
        np.copyto(best, error, where=better)
        np.copyto(scales, tried, where=better)
    codes = _codes(blocks, scales, bits, held).astype(np.int8)
    return codes.reshape(len(rows), -1), scales.reshape(len(rows), count)


def _codes(blocks: Array, scales: Array, bits: int, held: Array) -> Array:
    """The nearest codes, as floats, in `held`."""
    np.divide(blocks, scales, out=held)
    np.rint(held, out=held)
    return np.clip(held, *limits(bits), out=held)


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
    shifted = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return shifted if bits == 8 else shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def pack_blocks(
    matrix: Array, block: int, bits: int = 4, moments: Wide | None = None
) -> tuple[Array, Array]:
    """A matrix [K, N] for MatMulNBits: uint8 [N, ceil(K / block), block * bits / 8], scales [N * ceil(K / block)]."""
    codes, scales = encode(np.ascontiguousarray(matrix.T), block, bits, moments)
    shape = (matrix.shape[1], scales.shape[1], block * bits // 8)
    return packed(codes, bits).reshape(shape), scales.reshape(-1)
