"""Every method in every format, against the same worked out on the values themselves."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.calibrate.formats import Format
from graphopt.calibrate.ranges import Method, choose
from graphopt.calibrate.statistics import Statistics, empty
from tests.calibrate.test_statistics import observe

RNG = np.random.default_rng(0)
SAMPLES = [(RNG.standard_t(5, size=8000) + 0.4).astype(np.float32) for _ in range(3)]
VALUES = np.concatenate(SAMPLES).astype(np.float64)
CODES = {
    "UINT8": (0, 255),
    "INT8": (-128, 127),
    "UINT16": (0, 65535),
    "INT16": (-32768, 32767),
    "UINT4": (0, 15),
    "INT4": (-8, 7),
    "FLOAT8E4M3FN": (-448, 448),
    "FLOAT8E5M2": (-57344, 57344),
}
NARROW = {"FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn, "FLOAT8E5M2": ml_dtypes.float8_e5m2}
FORMATS = list(itertools.product(CODES, (False, True)))


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    found = empty()
    for sample in SAMPLES:
        found = found.merged(observe(sample))
    return found


def affine(low: float, high: float, dtype: str, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of a range, by the definition."""
    first, last = CODES[dtype]
    if dtype in NARROW or (symmetric and first < 0):
        return max(-low, high) / last, 0
    if symmetric:
        middle = (last + 1) // 2
        return max(-low / middle, high / (last - middle)), middle
    scale = (high - low) / (last - first)
    return scale, round(first - low / scale)


def error(low: float, high: float, dtype: str, symmetric: bool) -> float:
    """Mean squared error of the values in a format."""
    (first, last), (scale, zero) = CODES[dtype], affine(low, high, dtype, symmetric)
    if dtype in NARROW:
        codes: Any = np.clip(VALUES / scale, first, last).astype(NARROW[dtype]).astype(float)
        return float(((codes * scale - VALUES) ** 2).mean())
    first = -last if symmetric and first < 0 else first
    back = (np.clip(np.rint(VALUES / scale) + zero, first, last) - zero) * scale
    return float(((back - VALUES) ** 2).mean())


def divergence_top(levels: int) -> float:
    """The threshold of least divergence, by the loop of the paper over 2048 bins."""
    peak = np.abs(VALUES).max()
    h = np.histogram(np.abs(VALUES), bins=2048, range=(0, peak))[0].astype(float)
    h[0] = h[1]
    best, top = np.inf, peak
    for size in range(min(levels, 2048), 2049, 4):
        p = h[:size].copy()
        p[-1] += h[size:].sum()
        q = np.zeros(size)
        for level in range(levels):
            part = slice(level * size // levels, (level + 1) * size // levels)
            filled = h[part] > 0
            q[part][filled] = h[part].sum() / max(filled.sum(), 1)
        p, q = p / p.sum(), q / q.sum()
        q[(q == 0) & (p > 0)] = 1e-4
        inside = p > 0
        value = float((p[inside] * np.log(p[inside] / q[inside])).sum())
        if value <= best:
            best, top = value, (size + 0.5) * peak / 2048
    return float(top)


@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_min_max_and_moving_average(statistics: Statistics, dtype: str, symmetric: bool) -> None:
    form = Format(ir.DataType[dtype], symmetric)
    means = [float(np.mean([end(sample) for sample in SAMPLES])) for end in (np.min, np.max)]
    for method, ends in (
        (Method.MIN_MAX, (VALUES.min(), VALUES.max())),
        (Method.MOVING_AVERAGE, means),
    ):
        given = choose(statistics, form, method).parameters
        scale, zero = affine(float(ends[0]), float(ends[1]), dtype, symmetric)
        assert given.scale == pytest.approx(scale, rel=1e-6)
        assert given.zero_point == zero


@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_percentile(statistics: Statistics, dtype: str, symmetric: bool) -> None:
    given = choose(statistics, Format(ir.DataType[dtype], symmetric), Method.PERCENTILE).parameters
    by_size = symmetric or dtype in NARROW
    if by_size:
        top = float(np.quantile(np.abs(VALUES), 0.9999, method="higher"))
        ends = -top, top
    else:
        ends = (
            float(np.quantile(VALUES, 0.00005, method="lower")),
            float(np.quantile(VALUES, 0.99995, method="higher")),
        )
    scale, zero = affine(*ends, dtype, symmetric)
    assert given.scale == pytest.approx(scale, rel=0.02)  # bins are up to 2^-7 wide
    assert abs(given.zero_point - zero) <= 1 + (CODES[dtype][1] - CODES[dtype][0]) * 0.01


@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_least_squares_and_the_best(statistics: Statistics, dtype: str, symmetric: bool) -> None:
    form = Format(ir.DataType[dtype], symmetric)
    found = {method: choose(statistics, form, method).parameters for method in Method}
    errors = {m: error(*given.range, dtype, symmetric) for m, given in found.items()}
    low, high = VALUES.min(), VALUES.max()
    grid = min(error(low * g, high * g, dtype, symmetric) for g in np.linspace(0.05, 1, 100))
    floor = VALUES.var() * 1e-9  # bins are wider than steps of 16 bits
    assert errors[Method.MSE] <= grid * 1.03 + floor
    assert errors[Method.BEST] <= min(errors.values()) * 1.03 + floor


@pytest.mark.parametrize(
    ("dtype", "symmetric", "levels"),
    [("INT8", True, 128), ("UINT8", False, 128), ("INT4", True, 8), ("UINT4", False, 8)],
)
def test_entropy(statistics: Statistics, dtype: str, symmetric: bool, levels: int) -> None:
    given = choose(statistics, Format(ir.DataType[dtype], symmetric), Method.ENTROPY).parameters
    top = divergence_top(levels)
    assert max(-given.range[0], given.range[1]) == pytest.approx(
        min(top, np.abs(VALUES).max()), rel=0.1
    )


def test_entropy_of_16_bits_clips_nothing(statistics: Statistics) -> None:
    form = Format(ir.DataType.INT16, symmetric=True)
    assert choose(statistics, form, Method.ENTROPY).clipped == 0
