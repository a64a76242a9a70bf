"""Ranges from statistics: several classic methods, and the best of them by the error in the deployed format."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.calibrate.formats import Format, Parameters, parameters, round_trip
from graphopt.calibrate.statistics import Statistics

Wide: TypeAlias = npt.NDArray[np.float64]
Range: TypeAlias = tuple[float, float]

ENTROPY_BINS = 2048
ENTROPY_STEP = 4
FLOAT_LEVELS = 128
"""Codes of one sign that 8-bit floats have."""

NOTHING = 1e-4
"""What the entropy method takes for the probability of a level that holds nothing."""

PERCENTILES = (0.999, 0.9999, 0.99999)


class Method(enum.StrEnum):
    """How a range follows from statistics."""

    MIN_MAX = "min-max"
    MOVING_AVERAGE = "moving-average"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"
    BEST = "best"


@dataclasses.dataclass(frozen=True)
class Bins:
    """A histogram without its empty bins, in ascending order.

    Attributes:
        centers: of the bins.
        widths: of the bins.
        counts: elements in each.
    """

    centers: Wide
    widths: Wide
    counts: Wide

    @property
    def total(self) -> float:
        """How many elements there are."""
        return float(self.counts.sum())


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A range, the method that gave it, and what it costs.

    Attributes:
        parameters: scale and zero point.
        method: the method.
        noise: mean squared error in the deployed format over the mean square of the values.
        clipped: fraction of elements outside the range.
    """

    parameters: Parameters
    method: str
    noise: float
    clipped: float


def bins_of(found: Statistics) -> Bins:
    """The histogram as numbers; bins at the ends are cut at the exact minimum and maximum."""
    keys = np.flatnonzero(found.histogram).astype(np.uint32)
    edges = np.stack([keys << 16, (keys << 16) | 0xFFFF]).view(np.float32).astype(np.float64)
    low, high = np.sort(edges, axis=0)
    low, high = np.maximum(low, found.minimum), np.minimum(high, found.maximum)
    order = np.argsort(low, kind="stable")
    counts = found.histogram[keys].astype(np.float64)
    return Bins(((low + high) / 2)[order], np.maximum(high - low, 0)[order], counts[order])


def choose(
    found: Statistics, form: Format, method: Method = Method.BEST, factor: float = 1.0
) -> Chosen:
    """The parameters that `method` gives, its ends times `factor`; of a value that was never seen, those of zero."""
    if found.is_empty:
        return Chosen(parameters(0.0, 0.0, form), method.value, 0.0, 0.0)
    bins = bins_of(found)
    name, ends = method.value, _METHODS[method](found, bins, form) if method in _METHODS else None
    if ends is None:
        name, ends = _best(found, bins, form)
    if factor != 1.0:
        name = f"{name} times {factor:.3g}"
        ends = max(ends[0] * factor, found.minimum), min(ends[1] * factor, found.maximum)
    return _chosen(bins, ends, name, form)


def _best(found: Statistics, bins: Bins, form: Format) -> tuple[str, Range]:
    """The method of least squared error, and its range: entropy never is, and costs more than all others together."""
    tried = {
        each.value: _METHODS[each](found, bins, form)
        for each in (Method.MIN_MAX, Method.PERCENTILE, Method.MSE)
    }
    name = min(tried, key=lambda each: _chosen(bins, tried[each], each, form).noise)
    return name, tried[name]


def stated(found: Statistics, ends: Range, form: Format) -> Chosen:
    """The parameters of a range that the user states, and what it costs on the samples."""
    if found.is_empty:
        return Chosen(parameters(*ends, form), "stated", 0.0, 0.0)
    return _chosen(bins_of(found), ends, "stated", form)


def _chosen(bins: Bins, ends: Range, method: str, form: Format) -> Chosen:
    given = parameters(*ends, form)
    low, high = given.range
    half = given.scale / 2
    outside = bins.counts[(bins.centers < low - half) | (bins.centers > high + half)].sum()
    return Chosen(given, method, relative_noise(bins, given), float(outside) / bins.total)


def relative_noise(bins: Bins, given: Parameters) -> float:
    """Mean squared error of the format over the mean square of the values; 0 for values that are all zero."""
    power = float((bins.counts * bins.centers**2).sum())
    return squared_error(bins, given) / power if power > 0 else 0.0


def squared_error(bins: Bins, given: Parameters) -> float:
    """Sum over all elements of the squared error in the deployed format.

    Within a bin the values spread evenly; where the step is no wider than a bin, its own error is s^2/12.
    """
    distance = round_trip(bins.centers, given) - bins.centers
    low, high = given.range
    inside = (bins.centers >= low) & (bins.centers <= high)
    step = given.scale**2 / 12
    fine = distance**2 + np.where(inside, 0.0, bins.widths**2 / 12)
    coarse = inside & (bins.widths >= given.scale) & (not given.format.is_float)
    return float((bins.counts * np.where(coarse, step, fine)).sum())


def min_max(found: Statistics, _bins: Bins, _form: Format) -> Range:
    """The exact extremes."""
    return found.minimum, found.maximum


def moving_average(found: Statistics, _bins: Bins, _form: Format) -> Range:
    """Means over samples of the extremes of each."""
    return found.mean_range


def percentile(found: Statistics, bins: Bins, form: Format, share: float = PERCENTILES[1]) -> Range:
    """The range that holds `share` of the elements; symmetric formats go by magnitude."""
    if form.symmetric or form.is_float:
        top = _quantile(np.abs(bins.centers), bins.widths, bins.counts, share)
        top = min(top, max(-found.minimum, found.maximum))
        return -top, top
    tail = (1 - share) / 2
    low = -_quantile(-bins.centers, bins.widths, bins.counts, 1 - tail)
    high = _quantile(bins.centers, bins.widths, bins.counts, 1 - tail)
    return max(low, found.minimum), min(high, found.maximum)


def _quantile(centers: Wide, widths: Wide, counts: Wide, share: float) -> float:
    """The right edge of the bin in which the share is reached."""
    order = np.argsort(centers, kind="stable")
    reached = np.cumsum(counts[order])
    index = min(int(np.searchsorted(reached, share * reached[-1])), len(order) - 1)
    return float(centers[order][index] + widths[order][index] / 2)


def mse_range(found: Statistics, bins: Bins, form: Format) -> Range:
    """The range of least squared error: both ends scaled together, then each alone, then finer."""
    low, high = min(found.minimum, 0.0), max(found.maximum, 0.0)

    def error(ends: Range) -> float:
        return squared_error(bins, parameters(*ends, form))

    best = _search(
        error, (low, high), np.linspace(0.05, 1.0, 48), lambda e, g: (e[0] * g, e[1] * g)
    )
    if form.symmetric or form.is_float:
        return _search(error, best, np.linspace(0.97, 1.03, 13), lambda e, g: (e[0] * g, e[1] * g))
    for steps in (np.linspace(0.6, 1.4, 33), np.linspace(0.96, 1.04, 9)):
        best = _search(error, best, steps, lambda e, g: (e[0], min(e[1] * g, high)))
        best = _search(error, best, steps, lambda e, g: (max(e[0] * g, low), e[1]))
    return best


def _search(
    error: Callable[[Range], float],
    start: Range,
    factors: Wide,
    move: Callable[[Range, float], Range],
) -> Range:
    tried = [start, *(move(start, float(factor)) for factor in factors)]
    return min(tried, key=error)


def entropy(found: Statistics, bins: Bins, form: Format) -> Range:
    """The range of least Kullback-Leibler divergence between the values and their levels (TensorRT, GTC 2017).

    Levels are those of magnitudes: 128 of 8 bits, 8 of 4; 16 bits resolve every bin, so that nothing is clipped.
    """
    peak = max(-found.minimum, found.maximum)
    if peak <= 0:
        return 0.0, 0.0
    index = np.minimum(np.abs(bins.centers) / peak * ENTROPY_BINS, ENTROPY_BINS - 1).astype(
        np.int64
    )
    counts = np.zeros(ENTROPY_BINS)
    np.add.at(counts, index, bins.counts)
    counts[0] = counts[1]  # the spike at zero after a ReLU would drown the rest
    first, last = form.codes
    levels = FLOAT_LEVELS if form.is_float else min((last - first + 2) // 2, ENTROPY_BINS)
    top = (_entropy_bin(counts, levels) + 0.5) * peak / ENTROPY_BINS
    return max(found.minimum, -top), min(found.maximum, top)


def _entropy_bin(counts: Wide, levels: int) -> int:
    """How many bins to keep; prefix sums make a candidate cost `levels`, not the number of bins."""
    ends = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0.0], np.cumsum(counts > 0)])
    own = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    total = ends[-1]
    if total == 0:
        return len(counts)
    best, chosen = np.inf, len(counts)
    for size in range(levels, len(counts) + 1, ENTROPY_STEP):
        cuts = np.arange(levels + 1) * size // levels
        sums, held = np.diff(ends[cuts]), np.diff(filled[cuts])
        outside, last = total - ends[size], counts[size - 1]
        mass = sums.copy()
        divergence = own[size] - _x_log_x(last) + _x_log_x(last + outside)
        if last > 0:
            mass[-1] += outside
        elif outside > 0:  # what is clipped lands where the quantised distribution has nothing
            divergence -= outside * np.log(NOTHING * max(ends[size], 1.0))
        inner = held > 0
        divergence -= (mass[inner] * np.log(sums[inner] / held[inner])).sum()
        value = divergence / total - np.log(total) + np.log(max(ends[size], 1e-300))
        if value <= best:
            best, chosen = value, size
    return chosen


def _x_log_x(x: Wide | np.float64) -> Wide:
    return np.asarray(np.where(x > 0, x * np.log(np.maximum(x, 1e-300)), 0.0))


_METHODS: dict[Method, Callable[[Statistics, Bins, Format], Range]] = {
    Method.MIN_MAX: min_max,
    Method.MOVING_AVERAGE: moving_average,
    Method.PERCENTILE: percentile,
    Method.ENTROPY: entropy,
    Method.MSE: mse_range,
}
