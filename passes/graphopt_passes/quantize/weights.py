"""Weights and biases as integers: per channel, without saturation, with the mean error moved into the bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt_passes.quantize import rounding

Wide: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = npt.NDArray[Any]

PAIR_LIMIT = 32767
"""What the sum of two products of bytes may reach before vpmaddubsw saturates (AVX2 without VNNI)."""

BIAS_LIMIT = 2**31 - 1
HEADROOM = 255 * 127
"""What one product may add to an int32 accumulator that starts from the bias."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight in integers with a scale a row.

    Attributes:
        codes: int8, or another element type [rows, columns].
        scales: float32 [rows].
        noise: squared error over squared weights.
        raised: rows whose scale was raised so that nothing saturates.
        refined: whether the codes were chosen by second moments.
        zeros: zero points, of the type of the codes [rows]; None where all are 0.
    """

    codes: Array
    scales: Array
    noise: float
    raised: int
    refined: bool = False
    zeros: Array | None = None

    def decoded(self, rows: slice = slice(None), columns: slice = slice(None)) -> Array:
        """What comes back of some of it."""
        codes, scales = self.codes[rows, columns], self.scales[rows, None]
        if self.zeros is None:
            return codes * scales
        return (codes.astype(np.float32) - self.zeros[rows, None].astype(np.float32)) * scales


def pack(
    rows: Array, *, top_code: int | None, least: Array | None = None, shared: bool = False
) -> Packed:
    """Symmetric int8, one scale a row, 127 for the largest weight.

    Args:
        rows: float weights [rows, columns].
        top_code: the largest activation code, where two products must fit 16 bits; None where they need not.
        least: scales that must be reached, for biases to fit: [rows].
        shared: whether all rows take the greatest scale of any.

    A row saturates in the worst case when its two largest weights of one sign, times the largest activation, pass
    32767; then its scale is raised to the least that avoids it.  A row of zeros gets the scale 1.
    """
    rows = _unfolded(rows)
    peak = _peaks(rows)
    scales = peak / 127
    raised = 0
    if top_code is not None and rows.shape[1] > 1:
        room = PAIR_LIMIT // max(top_code, 1) - 1  # rounding may lift the pair by one in all
        needed = _largest_pair(rows) / room
        raised = int((needed > scales).sum())
        scales = np.maximum(scales, needed)
    if least is not None:
        scales = np.maximum(scales, least)
    if shared:
        scales = np.full_like(scales, scales.max(initial=0.0))
    stored = np.where(scales > 0, np.maximum(scales, 2.0**-100), 1.0).astype(np.float32)
    codes, noise = _rounded(rows, stored)
    return Packed(codes, stored, noise, raised)


CHUNK = 1 << 16
"""Weights that are worked on at once: they stay in the cache."""


def _chunks(rows: Array) -> Iterator[slice]:
    step = max(CHUNK // max(rows.shape[1], 1), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _unfolded(rows: Array) -> Array:
    """The same rows, turned in memory where they are short: NumPy works along what is contiguous."""
    is_short = rows.shape[1] < _SHORT and rows.flags.c_contiguous
    return np.ascontiguousarray(rows.T).T if is_short else rows


_SHORT = 64

_MANY_PARTS = 8
"""Parts of a weight from which on its noise is told from some of them."""


def _peaks(rows: Array) -> Wide:
    """The largest magnitude of each row."""
    found = np.zeros(len(rows))
    if rows.T.flags.c_contiguous:
        for part in _chunks(rows.T):
            near = rows.T[part]
            np.maximum(found, np.maximum(near.max(axis=0), -near.min(axis=0)), out=found)
        return found
    for part in _chunks(rows):
        near = rows[part]
        if near.size:
            found[part] = np.maximum(near.max(axis=1), -near.min(axis=1))
    return found


def _rounded(rows: Array, scales: Array) -> tuple[Array, float]:
    """The nearest codes, laid out as the weights are, and their squared error over squared weights.

    Of large weights the error is that of every fourth part: rows, or columns, evenly spread.
    """
    turned = rows.T.flags.c_contiguous
    laid = rows.T if turned else rows
    codes = np.empty(laid.shape, np.int8)
    lost = np.zeros(len(rows), np.float64)
    power = 0.0
    steps = scales[None, :] if turned else scales[:, None]
    parts = list(_chunks(laid))
    every = 4 if len(parts) >= _MANY_PARTS else 1
    for index, part in enumerate(parts):
        weights = np.ascontiguousarray(laid[part], np.float32)
        scaled = weights / (steps if turned else steps[part])
        found = np.rint(scaled)  # within 127: no scale is below a 127th of the greatest
        codes[part] = found
        if index % every:
            continue
        found -= scaled
        if turned:
            lost += np.einsum("kr,kr->r", found, found)
        else:
            lost[part] = np.einsum("rk,rk->r", found, found)
        power += float(np.vdot(weights, weights))
    error = float(lost @ scales.astype(np.float64) ** 2)
    return codes.T if turned else codes, error / power if power > 0 else 0.0


def refined(rows: Array, packed: Packed, moments: Wide) -> Packed:
    """The same scales with the codes that lose the least of the outputs."""
    wide, steps = rows.astype(np.float64), packed.scales[:, None].astype(np.float64)
    codes = rounding.refine(
        wide, packed.codes.astype(np.float64), steps, rounding.damped(moments), (-127, 127)
    )
    lost, power = codes * steps - wide, float((wide**2).sum())
    noise = float((lost**2).sum()) / power if power > 0 else 0.0
    return dataclasses.replace(packed, codes=codes.astype(np.int8), noise=noise, refined=True)


def _largest_pair(rows: Array) -> Wide:
    """Per row, the largest sum of two weights of one sign, in magnitude."""
    turned = rows.T.flags.c_contiguous
    laid = rows.T if turned else rows
    found = []
    for part in _chunks(laid):
        weights = laid[part] if turned else laid[part].T
        ends = _two_greatest(weights, np.maximum, np.minimum)
        others = _two_greatest(weights, np.minimum, np.maximum)
        found.append(np.stack([*ends, *(-each for each in others)]))
    # Pairs may lie in two chunks of one row.
    best = _two_of_all(np.stack(found)) if turned else np.concatenate(found, axis=1)
    sums = np.maximum(best[0::2], 0) + np.maximum(best[1::2], 0)
    return np.asarray(sums.max(axis=0), np.float64)


def _two_of_all(found: Array) -> Array:
    """The two greatest of each sign of what the chunks found: [chunks, 4, rows] to [4, rows]."""
    chunks, _, count = found.shape
    ends = found.reshape(chunks, 2, 2, count).transpose(1, 0, 2, 3).reshape(2, 2 * chunks, count)
    return np.asarray(np.sort(ends, axis=1)[:, :-3:-1].reshape(4, count))


def _two_greatest(weights: Array, greater: np.ufunc, lesser: np.ufunc) -> tuple[Array, Array]:
    """The greatest along the first axis, and the next; 0 where there is none: halves are compared with each other."""
    first, second = weights, None
    while len(first) > 1:
        half, spare = len(first) // 2, len(first) % 2
        one, other = first[:half], first[half : 2 * half]
        next_best = lesser(one, other)
        if second is not None:
            greater(next_best, second[:half], out=next_best)
            greater(next_best, second[half : 2 * half], out=next_best)
        if spare:
            alone = second[-1:] if second is not None else np.zeros_like(first[-1:])
            next_best = np.concatenate([next_best, alone])
            first = np.concatenate([greater(one, other), first[-1:]])
        else:
            first = greater(one, other)
        second = next_best
    return first[0], second[0] if second is not None else np.zeros_like(first[0])


def least_scales(bias: Array | None, input_scale: float, columns: int) -> Array | None:
    """Scales that weights must have for the bias to fit into int32 beside the products: [rows]."""
    if bias is None:
        return None
    room = BIAS_LIMIT - HEADROOM * min(columns, 1 << 15)
    return np.abs(bias.astype(np.float64)) * 1.0001 / (input_scale * room)


def pack_bias(bias: Array, input_scale: float, scales: Array) -> tuple[Array, Array]:
    """The bias in int32 and its scales, those of the products: s_x * s_w."""
    product = (np.float32(input_scale) * scales.astype(np.float32)).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / product.astype(np.float64))
    return np.clip(codes, -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32), product


def signs(bias: Array) -> tuple[Array, Array, Array]:
    """The bias as signs, with its magnitudes for scales: exactly what it is.

    ONNX Runtime makes int32 of a float bias between Q and DQ, whatever their type, and an integer convolution of all
    three, which it then refuses for types that its kernels lack; what is decoded from int8 it leaves alone.
    """
    held = bias.astype(np.float32)
    codes = np.sign(held).astype(np.int8)
    return codes, np.where(held == 0, np.float32(1), np.abs(held)), np.zeros(len(held), np.int8)


def bias_shift(
    rows: Array, packed: Packed, means: Array | None, taps: int, group: int
) -> Wide | None:
    """What the rounding of the weights takes from each output on average; added to the bias, it is given back.

    db_c = sum_k (W - Wq)[c, k] E[x_k]; for a convolution each channel counts once a tap (exact away from borders).

    Args:
        rows: float weights [rows, channels of a group * taps].
        packed: the same in integers.
        means: of the input channels: [group * channels of a group].
        taps: kernel positions.
        group: groups of a convolution.
    """
    if means is None:
        return None
    width = rows.shape[1] // taps
    if means.shape != (group * width,):
        return None
    each = np.repeat(means.reshape(group, width).astype(np.float32), taps, axis=1)
    shift = np.zeros(len(rows))
    if rows.T.flags.c_contiguous and group == 1:
        for part in _chunks(rows.T):
            lost = rows.T[part] - packed.decoded(columns=part).T
            shift += np.einsum("kr,k->r", lost, each[0, part])
        return shift
    step = len(rows) // group
    for index in range(group):
        own = slice(index * step, (index + 1) * step)
        for part in _chunks(rows[own]):
            within = slice(own.start + part.start, min(own.start + part.stop, own.stop))
            lost = rows[within] - packed.decoded(within)
            shift[within] = np.einsum("rk,k->r", lost, each[index])
    return shift
