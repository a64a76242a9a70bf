"""Latency: what is counted and how ratios are taken, on made-up and real times."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from graphopt.runtime import measure as timing
from graphopt.runtime.session import Session

TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'


def test_each_session_runs_as_often_as_the_others() -> None:
    session = Session(onnx.parser.parse_model(TEXT).SerializeToString())
    feeds = {"x": np.ones(2, np.float32)}
    first, second = timing.measure([session, session], [feeds, feeds], seconds=0, min_rounds=4)
    assert first.rounds == second.rounds == 4
    assert first.ratio == 1
    assert second.wall_ms > 0


def test_ratios_are_medians_over_rounds() -> None:
    rounds = [[(4.0, 2.0), (2.0, 1.0)], [(8.0, 2.0), (2.0, 0.0)], [(2.0, 2.0), (1.0, 2.0)]]
    latency = timing._latency(rounds, 1)
    assert latency.ratio == 2
    assert latency.cpu_ratio == pytest.approx(1.5)
    assert latency.wall_ms == 2
    assert latency.wall_spread_ms == pytest.approx(0.5)


def test_one_round_has_no_spread_and_a_clock_that_stands_still_no_ratio() -> None:
    latency = timing._latency([[(1.0, 0.0)]], 0)
    assert latency.wall_spread_ms == 0
    assert latency.cpu_ratio == 1


@pytest.mark.parametrize(("count", "skipped"), [(1, 0), (5, 0), (6, 0), (9, 1), (20, 5), (100, 39)])
def test_the_interval_of_a_median_leaves_out_what_chance_allows(count: int, skipped: int) -> None:
    """From tables of the sign test at 95 %."""
    assert timing._skipped(count) == skipped
    low, high = timing._interval([float(i) for i in range(count)])
    assert (low, high) == (skipped, count - 1 - skipped)


def test_no_ratio_has_no_interval() -> None:
    assert timing._interval([]) == (1.0, 1.0)
