"""How far two numeric arrays are apart, measured in float64, in chunks, over the positions finite in both."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

Array: TypeAlias = "np.ndarray[Any, Any]"

CHUNK = 1 << 20
"""Elements converted to float64 at a time: 8 MB a temporary, whatever the size of the output."""

TOP_K = 5


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Distances between a reference and a candidate of the same shape; RMS is the reference's.

    Attributes:
        max_abs: greatest |difference|.
        rms: of the reference.
        error_rms: of the difference.
        cosine: of the angle between the two; 1 when both are zero, 0 when one is.
        outside: fraction of elements further apart than the tolerance given.
        nonfinite_at: flat index where NaN, +inf and -inf first disagree, or None.
        worst_at: flat index of the greatest difference, or None without finite elements.
    """

    max_abs: float
    rms: float
    error_rms: float
    cosine: float
    outside: float
    nonfinite_at: int | None
    worst_at: int | None

    @property
    def max_over_rms(self) -> float:
        """max|d| / RMS(reference); 0 where nothing differs, infinite where a zero reference is missed."""
        return _ratio(self.max_abs, self.rms)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, 20 log10(RMS / RMS of the error); infinite where nothing differs."""
        return decibels(self.rms, self.error_rms)


def measure(reference: Array, candidate: Array, *, tolerance: float, floor: float) -> Metrics:
    """The metrics of two numeric arrays of one shape and dtype.

    An element is outside when |d| > tolerance * (max(RMS, floor) + |reference|).
    """
    ref, cand = _flat(reference), _flat(candidate)
    # Sums of squares are taken in units of the peak, so that float64 data near its limits cannot overflow.
    peak = max((_peak(r, c) for r, c, _ in _chunks(ref, cand)), default=0.0) or 1.0
    sums = np.zeros(5)
    max_abs, worst_at, nonfinite_at = 0.0, None, None
    for r, c, start in _chunks(ref, cand):
        if nonfinite_at is None:
            nonfinite_at = _first_class_difference(r, c, start)
        finite = np.isfinite(r) & np.isfinite(c)
        a, b = np.where(finite, r / peak, 0), np.where(finite, c / peak, 0)
        d = np.abs(a - b)
        sums += (np.dot(a, a), np.dot(b, b), np.dot(a, b), np.dot(d, d), np.count_nonzero(finite))
        at = int(d.argmax())
        if finite.any() and (worst_at is None or d[at] > max_abs):
            max_abs, worst_at = float(d[at]), start + at
    count = max(sums[4], 1.0)
    rms = math.sqrt(sums[0] / count) * peak
    bound = max(rms, floor)
    return Metrics(
        max_abs * peak,
        rms,
        math.sqrt(sums[3] / count) * peak,
        _cosine(*sums[:3]),
        _outside(ref, cand, tolerance, bound),
        nonfinite_at,
        worst_at,
    )


def same_bits(reference: Array, candidate: Array) -> int | None:
    """The flat index of the first element whose bits differ, or None; any NaN equals any NaN."""
    for start in range(0, reference.size, CHUNK):
        ref, cand = (a.reshape(-1)[start : start + CHUNK] for a in (reference, candidate))
        if ref.dtype.kind == "O":
            differs = ref != cand
        else:
            ref, cand = np.ascontiguousarray(ref), np.ascontiguousarray(cand)
            width = ref.dtype.itemsize
            differs = (ref.view(np.uint8) != cand.view(np.uint8)).reshape(-1, width).any(axis=1)
            if differs.any() and is_float(ref.dtype):
                differs &= ~(np.isnan(ref) & np.isnan(cand))
        if differs.any():
            return start + int(np.argmax(differs))
    return None


def ulps(reference: Array, candidate: Array) -> tuple[int, int] | None:
    """The 99th percentile and the maximum of the distance in units in the last place, or None.

    Counted in the arrays' own dtype over finite elements; beyond 2^20 elements on an even sample.
    """
    if not is_float(reference.dtype) or reference.dtype.kind == "c" or reference.size == 0:
        return None
    stride = -(-reference.size // CHUNK)
    ref, cand = (np.ascontiguousarray(a.reshape(-1)[::stride]) for a in (reference, candidate))
    finite = np.isfinite(ref) & np.isfinite(cand)
    if not finite.any():
        return None
    distance = _distance(_ordinal(ref[finite]), _ordinal(cand[finite]))
    return int(np.quantile(distance, 0.99, method="higher")), int(distance.max())


MAP_AXES = 4


def ranked_rows(array: Array) -> int:
    """How many rows are ranked, along the last axis; of maps [batch, classes, height, width] along the second.

    0 where that axis is too short to rank anything.
    """
    width = _ranked_last(array).shape[-1] if array.ndim else 0
    return array.size // width if width > 1 else 0


def _ranked_last(array: Array) -> Array:
    """The array with the axis that is ranked moved last: of maps, classes are fewer than places."""
    is_map = array.ndim == MAP_AXES and array.shape[1] < min(array.shape[2:])
    return np.moveaxis(array, 1, -1) if is_map else array


def rank_agreement(reference: Array, candidate: Array) -> tuple[float | None, float | None]:
    """Agreement of the greatest element and of the set of the five greatest, along the axis of `ranked_rows`.

    A candidate's choice counts as right when the reference scores it equal to its own choice. None
    where that axis is too short for the question to say anything.
    """
    if not ranked_rows(reference):
        return None, None
    reference, candidate = _ranked_last(reference), _ranked_last(candidate)
    width = reference.shape[-1]
    ref, cand = reference.reshape(-1, width), candidate.reshape(-1, width)
    step = max(1, CHUNK // width)
    best, top = 0.0, 0.0
    for start in range(0, len(ref), step):
        r, c = (_as_float64(a[start : start + step]) for a in (ref, cand))
        picked = np.take_along_axis(r, c.argmax(axis=1)[:, None], axis=1)[:, 0]
        best += np.count_nonzero(
            (picked == r.max(axis=1)) | (np.isnan(picked) & np.isnan(r).any(axis=1))
        )
        top += _top_overlap(r, c) if width > TOP_K else 0.0
    return float(best / len(ref)), top / len(ref) if width > TOP_K else None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether elements are floating-point or complex numbers, those of `ml_dtypes` included."""
    return dtype.kind in "fc" or (
        dtype.kind == "V" and dtype.names is None and "float" in dtype.name
    )


def decibels(signal: float, noise: float) -> float:
    """20 log10(signal / noise); infinite without noise, minus infinity without signal."""
    if noise == 0:
        return math.inf
    return 20 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf


def root_mean_square(array: Array) -> float:
    """RMS over the finite elements, in float64; 0 without any."""
    total, count = 0.0, 0
    for r, _, _ in _chunks(_flat(array), _flat(array)):
        finite = r[np.isfinite(r)]
        with np.errstate(over="ignore"):
            total += float(np.dot(finite, finite))
        count += finite.size
    return math.sqrt(total / count) if count else 0.0


def _chunks(ref: Array, cand: Array) -> Iterator[tuple[Array, Array, int]]:
    for start in range(0, ref.size, CHUNK):
        stop = start + CHUNK
        yield _as_float64(ref[start:stop]), _as_float64(cand[start:stop]), start


def _flat(array: Array) -> Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _as_float64(array: Array) -> Array:
    return array.astype(np.float64)


def _peak(r: Array, c: Array) -> float:
    return max(float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0)) for a in (r, c))


def _first_class_difference(r: Array, c: Array, start: int) -> int | None:
    differs = (np.isnan(r) != np.isnan(c)) | ((np.isinf(r) | np.isinf(c)) & (r != c))
    differs &= ~(np.isnan(r) & np.isnan(c))
    return start + int(np.argmax(differs)) if differs.any() else None


def _outside(ref: Array, cand: Array, tolerance: float, bound: float) -> float:
    outside, total = 0, 0
    for r, c, _ in _chunks(ref, cand):
        finite = np.isfinite(r) & np.isfinite(c)
        # Halves keep the difference of two values near the float64 limits finite.
        a, b = r[finite] / 2, c[finite] / 2
        outside += int(np.count_nonzero(np.abs(a - b) > tolerance * (bound / 2 + np.abs(a))))
        total += a.size
    return outside / max(total, 1)


def _cosine(rr: float, cc: float, rc: float) -> float:
    if rr == 0 or cc == 0:
        return 1.0 if rr == cc else 0.0
    return float(min(1.0, max(-1.0, rc / math.sqrt(rr * cc))))


def _ratio(value: float, scale: float) -> float:
    if value == 0:
        return 0.0
    return value / scale if scale > 0 else math.inf


def _ordinal(array: Array) -> Array:
    """Floats as int64 in the same order, so that neighbours differ by one and -0 equals 0."""
    bits = array.view(f"i{array.dtype.itemsize}")
    return np.where(
        bits < 0, np.iinfo(bits.dtype).min - bits.astype(np.int64), bits.astype(np.int64)
    )


def _distance(a: Array, b: Array) -> Array:
    # Unsigned and wrapping: from -max to +max of float64 is more than int64 holds.
    high, low = np.maximum(a, b).astype(np.uint64), np.minimum(a, b).astype(np.uint64)
    return high - low


def _top_overlap(r: Array, c: Array) -> float:
    """Sum over rows of the fraction of the candidate's five best that the reference ranks that high."""
    threshold = np.partition(r, -TOP_K, axis=1)[:, -TOP_K]
    chosen = np.argpartition(c, -TOP_K, axis=1)[:, -TOP_K:]
    scores = np.take_along_axis(r, chosen, axis=1)
    fits = (scores >= threshold[:, None]) | np.isnan(scores)
    return float(fits.mean(axis=1).sum())
