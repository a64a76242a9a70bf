"""Ranges against brute force on the values themselves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.calibrate.formats import Format, parameters, round_trip
from graphopt.calibrate.ranges import Method, bins_of, choose, percentile
from graphopt.calibrate.statistics import empty
from graphopt.errors import OptionError
from tests.calibrate.test_statistics import observe

U8 = Format(ir.DataType.UINT8)
S8 = Format(ir.DataType.INT8, symmetric=True)
RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=8000).astype(np.float32)
HEAVY = RNG.standard_t(3, size=8000).astype(np.float32)


def true_error(x: np.ndarray, low: float, high: float, form: Format) -> float:
    wide = x.astype(np.float64)
    return float(((round_trip(wide, parameters(low, high, form)) - wide) ** 2).sum())


@pytest.mark.parametrize(
    ("dtype", "symmetric", "codes"),
    [
        (ir.DataType.UINT8, False, (0, 255)),
        (ir.DataType.INT8, True, (-127, 127)),
        (ir.DataType.INT8, False, (-128, 127)),
        (ir.DataType.UINT16, False, (0, 65535)),
        (ir.DataType.INT16, True, (-32767, 32767)),
        (ir.DataType.INT4, True, (-7, 7)),
        (ir.DataType.UINT4, False, (0, 15)),
        (ir.DataType.FLOAT8E4M3FN, True, (-448, 448)),
    ],
)
def test_codes_and_zero(dtype: ir.DataType, symmetric: bool, codes: tuple[int, int]) -> None:
    form = Format(dtype, symmetric)
    assert form.codes == codes
    given = parameters(-1.0, 3.0, form)
    assert round_trip(np.zeros(1), given)[0] == 0
    assert given.scale == float(np.float32(given.scale)) > 0


def test_seven_bits_halve_the_codes() -> None:
    assert Format(ir.DataType.UINT8, bits=7).codes == (0, 127)
    assert Format(ir.DataType.INT8, symmetric=True, bits=7).codes == (-63, 63)


def test_a_positive_range_starts_at_the_first_code() -> None:
    assert parameters(0.5, 6.0, U8).zero_point == 0


def test_nothing_but_zeros_keeps_a_positive_scale() -> None:
    assert parameters(0.0, 0.0, U8).scale == 1.0
    assert choose(empty(), U8).parameters.scale == 1.0
    assert choose(observe(np.zeros(8, np.float32)), S8).noise == 0.0


def test_a_format_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot quantise to float"):
        Format(ir.DataType.FLOAT)


@pytest.mark.parametrize("form", [U8, S8, Format(ir.DataType.INT4, symmetric=True)])
@pytest.mark.parametrize("x", [NORMAL, HEAVY, np.abs(NORMAL)], ids=["normal", "t3", "half"])
def test_the_least_error_is_found(form: Format, x: np.ndarray) -> None:
    chosen = choose(observe(x), form, Method.MSE)
    found = true_error(x, *chosen.parameters.range, form)
    grid = np.linspace(0.02, 1, 200)
    best = min(true_error(x, float(x.min()) * g, float(x.max()) * g, form) for g in grid)
    assert found <= best * 1.03


def test_the_best_is_never_worse_than_each_method() -> None:
    found = observe(HEAVY)
    best = choose(found, U8)
    assert all(best.noise <= choose(found, U8, m).noise for m in Method if m is not Method.BEST)


def test_percentiles_hold_the_share() -> None:
    found = observe(NORMAL)
    low, high = percentile(found, bins_of(found), U8, 0.99)
    inside = np.mean((low <= NORMAL) & (high >= NORMAL))
    assert 0.99 <= inside < 0.993


def test_entropy_cuts_the_tail_that_min_max_keeps() -> None:
    x = np.concatenate([NORMAL, [400.0]]).astype(np.float32)
    assert choose(observe(x), S8, Method.ENTROPY).parameters.range[1] < 60
    assert choose(observe(x), S8, Method.MIN_MAX).parameters.range[1] == pytest.approx(400)


def test_moving_average_is_the_mean_of_the_extremes() -> None:
    found = observe(np.array([-1, 2], np.float32)).merged(observe(np.array([-3, 4], np.float32)))
    assert found.mean_range == (-2.0, 3.0)
    low, high = choose(found, U8, Method.MOVING_AVERAGE).parameters.range
    assert low == pytest.approx(-2, abs=0.02)
    assert high == pytest.approx(3, abs=0.02)


def test_what_is_clipped_is_told() -> None:
    x = np.concatenate([np.zeros(98), [1.0, 100.0]]).astype(np.float32)
    found = observe(x)
    assert choose(found, U8, Method.MIN_MAX).clipped == 0.0
    assert choose(found, U8, Method.MOVING_AVERAGE).clipped == 0.0
