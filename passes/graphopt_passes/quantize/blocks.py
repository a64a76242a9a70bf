"""Weights in 4 or 8 bits with a scale a block, and zero points where asked: as kernels for single tokens want them.

Source: com.microsoft MatMulNBits and GatherBlockQuantized, ONNX Runtime 1.31 (ContribOperators.md); ai.onnx
DequantizeLinear, opset 21.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt_passes.quantize import rounding

Array: TypeAlias = npt.NDArray[Any]
Wide: TypeAlias = npt.NDArray[np.float64]

CLIPS = {4: (1.0, 0.92, 0.84), 8: (1.0, 1.004, 0.996)}
"""Shares of the range of a block whose codes are tried, by bits, each with the scale of least squares for its codes."""

CLIPS_BOTH_ENDS = {4: (1.03, 0.97, 0.91), 8: (1.0, 1.005, 1.01)}
"""The same of a range with a zero point: each end is cut; steps a little longer lie otherwise beside the weights."""

CHUNK = 1 << 17
"""Elements that are worked on at once: they stay in the cache."""


LEAST_HALF = np.float32(2.0**-24)
"""The least positive number of float16."""

_TURNED = 256
"""Rows that are turned at once: their parts of a block stay in the nearest cache."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Weights in blocks: code less zero point, times scale.

    Attributes:
        codes: int8 [rows, K padded to whole blocks].
        scales: [rows, blocks], float16 where the rows are.
        zeros: int8 [rows, blocks]; None where all are 0.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None

    def decoded(self, width: int) -> Wide:
        """What comes back of the first `width` columns."""
        block = self.codes.shape[1] // self.scales.shape[1]
        codes = self.codes.astype(np.float64)
        if self.zeros is not None:
            codes -= np.repeat(self.zeros, block, axis=1)
        return np.asarray(codes * np.repeat(self.scales.astype(np.float64), block, axis=1))[
            :, :width
        ]


def encode(
    rows: Array,
    block: int,
    bits: int,
    moments: rounding.Moments | None = None,
    *,
    zero_points: bool = False,
    signed: bool = True,
) -> Encoded:
    """The rows in blocks.

    Without zero points the largest weight of a block becomes the least code, the longer end, by a scale with a sign.

    Args:
        rows: float weights [rows, K], one output channel a row.
        block: elements that share a scale.
        bits: 4 or 8.
        moments: second moments of what the rows are multiplied with, K of them; then rounding is by them (GPTQ).
        zero_points: whether blocks have one, so that their range need not be the same both ways.
        signed: whether scales may be negative.
    """
    form = _Form(bits, rows.dtype == np.float16, signed)
    made = _nearest_blocks(rows, block, form, zero_points=zero_points)
    if moments is None or len(moments.damped) != rows.shape[1]:
        return made
    return _by_moments(rows, made, moments, bits)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How codes and scales are stored: bits of a code, whether scales are halves, and may be negative."""

    bits: int
    half: bool
    signed: bool


def _nearest_blocks(rows: Array, block: int, form: _Form, *, zero_points: bool) -> Encoded:
    """The rows in blocks, each weight by itself."""
    width = rows.shape[1]
    columns = np.asarray(rows.T, np.float32)  # a view: blocks lie along the first axis
    count = -(-width // block)
    if width % block:
        columns = np.concatenate([columns, np.zeros((-width % block, len(rows)), np.float32)])
    codes = np.empty_like(columns, np.int8)
    scales = np.empty((count, len(rows)), np.float32)
    zeros = np.zeros((count, len(rows)), np.int8) if zero_points else None
    many = max(CHUNK // block, 1)
    work = np.empty(3 * min(block * many, columns.size), np.float32)
    # Blocks lie along the first axis, those of one row along the second.
    parted, found = (
        each.reshape(count, block, len(rows)).transpose(1, 0, 2) for each in (columns, codes)
    )
    at_once = max(many // max(len(rows), 1), 1)
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        for start in range(0, len(rows), many):
            part = slice(start, start + many)
            own = None if zeros is None else zeros[some, part]
            scales[some, part] = _nearest(
                parted[:, some, part], found[:, some, part], own, form, work
            )
    stored = scales.T.astype(np.float16) if form.half else scales.T
    return Encoded(codes.T, stored, None if zeros is None else zeros.T)


def _nearest(columns: Array, codes: Array, zeros: Array | None, form: _Form, work: Array) -> Array:
    """Puts the nearest codes of each column, one block, into `codes` [block, blocks, rows]; returns their scales.

    Errors are compared in steps of the whole range: each is one pass over what stays in the cache.
    """
    bits, (low, high) = form.bits, limits(form.bits)
    held, scaled = work[: 2 * columns.size].reshape(2, *columns.shape)
    if columns.strides[2] != columns.itemsize:
        for start in range(0, columns.shape[2], _TURNED):
            part = slice(start, start + _TURNED)
            held[:, :, part] = columns[:, :, part]
        columns = held
    if zeros is not None:
        steps = _both_ended(columns, bits, zeros)
    else:
        steps = _one_ended(columns, low) if form.signed else _positive(columns, bits)
    np.multiply(columns, 1 / steps, out=scaled)
    flat, offset = scaled.reshape(len(scaled), -1), np.zeros(1, np.float32)
    if zeros is not None:
        offset = zeros.astype(np.float32).reshape(-1)
    ends = low - offset, high - offset  # of codes less zero point
    clips = (CLIPS if zeros is None else CLIPS_BOTH_ENDS)[bits]
    longer = _best_steps(flat, ends, clips, work[2 * columns.size :][: columns.size])
    scales = steps * longer.reshape(steps.shape)
    if form.half:  # codes are those of the scale as it is stored
        stored = scales.astype(np.float16)
        scales = np.where(stored == 0, LEAST_HALF, stored.astype(np.float32))
    np.divide(columns, scales, out=scaled)
    if zeros is not None:
        scaled += zeros
    np.rint(scaled, out=scaled)
    scaled.clip(low, high, out=codes, casting="unsafe")
    return np.asarray(scales)


def _one_ended(columns: Array, low: int) -> Array:
    """Steps by which the longer end of each block is the least code; negative where that is the positive one."""
    least, most = columns.min(axis=0), columns.max(axis=0)
    peak = np.where(-least > most, least, most)
    peak[np.abs(peak) < np.finfo(np.float32).tiny] = low
    return np.asarray(peak / np.float32(low))


def _positive(columns: Array, bits: int) -> Array:
    """The least positive steps by which both ends of each block are codes."""
    low, high = limits(bits)
    steps = np.maximum(
        columns.max(axis=0) / np.float32(high), columns.min(axis=0) / np.float32(low)
    )
    steps[steps < np.finfo(np.float32).tiny] = 1
    return np.asarray(steps)


def _both_ended(columns: Array, bits: int, zeros: Array) -> Array:
    """Steps by which the range of each block, 0 in it, takes all codes; puts the code of 0 into `zeros`."""
    low, high = limits(bits)
    least, most = (
        np.minimum(columns.min(axis=0), np.float32(0)),
        np.maximum(columns.max(axis=0), np.float32(0)),
    )
    steps = most / np.float32(high - low) - least / np.float32(high - low)
    steps[steps < np.finfo(np.float32).tiny] = 1
    np.clip(np.rint(low - least / steps), low, high, out=zeros, casting="unsafe")
    return np.asarray(steps)


def _best_steps(
    scaled: Array, ends: tuple[Array, Array], clips: tuple[float, ...], work: Array
) -> Array:
    """The steps that lose the least of each column [block, columns], itself in steps of its whole range.

    Codes q of weights w lose the least with the step <w, q> / <q, q>: <w, w> - <w, q>^2 / <q, q> is what is left then.
    """
    codes, (first, last) = work.reshape(scaled.shape), ends
    kept = np.zeros(scaled.shape[1], np.float32)
    chosen: Array = np.ones_like(kept)
    for clip in clips:
        shrunk = scaled if clip == 1 else np.multiply(scaled, np.float32(1 / clip), out=codes)
        np.rint(shrunk, out=codes)
        if clip <= 1:  # longer steps leave nothing outside
            _clip(codes, first, last)
        along = np.einsum("kb,kb->b", scaled, codes)
        power = np.maximum(np.einsum("kb,kb->b", codes, codes), 1)  # whole numbers; 0 of zeros
        explained = along**2 / power
        better = explained > kept
        np.copyto(kept, explained, where=better)
        np.copyto(chosen, along / power, where=better)
    return chosen


def _clip(codes: Array, first: Array, last: Array) -> None:
    """Puts what lies outside at the ends."""
    if first.size == 1:
        np.clip(codes, first.item(), last.item(), out=codes)  # one pass
    else:
        np.minimum(codes, last, out=codes)
        np.maximum(codes, first, out=codes)


def _by_moments(rows: Array, made: Encoded, moments: rounding.Moments, bits: int) -> Encoded:
    """The same with codes by compensation and refinement, where they lose less of the outputs than the nearest do."""
    wide, width = rows.astype(np.float64), rows.shape[1]
    block = made.codes.shape[1] // made.scales.shape[1]
    steps = np.repeat(made.scales.astype(np.float64), block, axis=1)[:, :width]
    zeros = np.zeros((1, 1)) if made.zeros is None else np.repeat(made.zeros, block, axis=1)
    zeros = zeros[:, :width].astype(np.float64)
    bounds = limits(bits)[0] - zeros, limits(bits)[1] - zeros
    nearest = made.codes[:, :width] - zeros
    passed_on = rounding.compensate(wide, steps, moments, bounds)
    before = rounding.error(wide - nearest * steps, moments.damped)
    better = rounding.error(wide - passed_on * steps, moments.damped) < before
    start = passed_on if better else nearest
    found = rounding.refine(wide, start, steps, moments.damped, bounds) + zeros
    made.codes[:, :width] = found
    return made


SAMPLED = 1 << 14
"""Weights of a matrix, whole rows evenly spread, that are stored both ways to see which loses less."""


def wants_zero_points(
    rows: Array,
    block: int,
    bits: int,
    moments: rounding.Moments | None = None,
    *,
    signed: bool = True,
) -> bool:
    """Whether zero points lower the squared error of what is stored by a larger share than they add bytes.

    Of the weights, or of what they make of inputs with these second moments.
    """
    some = rows[:: max(rows.size // SAMPLED, 1)]
    known = moments if moments is not None and len(moments.damped) == rows.shape[1] else None
    if known is None and some.shape[1] % block == 0:  # blocks by themselves lie in one piece
        some = np.ascontiguousarray(some.reshape(-1, block).T).T
    exact = some.astype(np.float64)
    lost = []
    for zero_points in (False, True):
        made = encode(some, block, bits, known, zero_points=zero_points, signed=signed)
        gone = exact - made.decoded(some.shape[1])
        lost.append(float((gone**2).sum()) if known is None else rounding.error(gone, known.damped))
    stored = block * bits + 8 * rows.dtype.itemsize
    return lost[1] * (1 + bits / stored) < lost[0]


def limits(bits: int) -> tuple[int, int]:
    """The least and the greatest signed code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def packed(codes: Array, bits: int) -> Array:
    """Codes as unsigned bytes, zero in the middle; two of 4 bits share a byte, the low half first."""
    shifted = codes.view(np.uint8) + np.uint8(1 << (bits - 1))  # wraps around below zero
    if bits == 8:
        return shifted
    if shifted.shape[-1] % 2:
        shifted = np.concatenate([shifted, np.full_like(shifted[..., :1], 8)], axis=-1)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def pack_blocks(made: Encoded, bits: int) -> tuple[Array, Array, Array | None]:
    """For MatMulNBits: codes uint8 [N, ceil(K / block), block * bits / 8], scales [N * blocks], zero points or None.

    Zero points are uint8 [N * blocks] for 8 bits, [N * ceil(blocks / 2)] for 4.
    """
    many, blocks = made.scales.shape
    codes = packed(made.codes, bits).reshape(many, blocks, -1)
    zeros = None if made.zeros is None else packed(np.ascontiguousarray(made.zeros), bits)
    return codes, made.scales.reshape(-1), None if zeros is None else zeros.reshape(-1)
