"""The share of rows with the same greatest element is that of all feeds: one feed may hold a single row."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.numerics import Numerics
from graphopt.verify import metrics
from graphopt.verify.compare import Budget, OutputReport, compare, merge, profile_for
from graphopt.verify.shares import held, share_of, without_share

GATE = profile_for(Numerics.LOSSY, budget=Budget(argmax_agreement=0.75))


def reports(wrong: int, count: int = 4) -> list[OutputReport]:
    """One row a feed, of which some have another greatest element."""
    plain = np.array([[0.1, 0.9]])
    found = [plain[:, ::-1] if index < wrong else plain for index in range(count)]
    return [compare("y", plain, each.copy(), without_share(GATE)) for each in found]


def test_rows_of_all_feeds_count() -> None:
    assert share_of(reports(1)) == 0.75
    assert all(report.passed for report in held(reports(1), GATE))
    assert merge(reports(1)).argmax_agreement == 0.75


def test_too_few_fail_on_the_worst_feed() -> None:
    found = held(reports(2), GATE)
    assert [report.passed for report in found] == [False, True, True, True]
    assert found[0].why == "argmax agreement 0.5 < 0.75 over 4 rows"


@pytest.mark.parametrize("budget", [Budget(), Budget(sqnr_db=0)])
def test_without_a_share_nothing_is_held(budget: Budget) -> None:
    gate = profile_for(Numerics.LOSSY, budget=budget)
    assert without_share(gate) is gate
    assert all(report.passed for report in held(reports(4), gate))


def test_what_is_no_row_is_not_counted() -> None:
    single = compare("y", np.ones((3, 1)), np.zeros((3, 1)), without_share(GATE))
    assert share_of([single]) is None
    assert held([single], GATE) == [single]


def test_maps_are_ranked_by_class() -> None:
    """Of [batch, classes, height, width] along the classes, which are fewer than places; else along the last axis."""
    scores = np.zeros((1, 3, 4, 5))
    scores[:, 1] = 1
    other = scores.copy()
    other[0, 2, 0, 0] = 2
    assert metrics.ranked_rows(scores) == 20
    assert metrics.rank_agreement(scores, other)[0] == 0.95
    assert metrics.ranked_rows(np.zeros((1, 9, 4, 5))) == 36
    assert metrics.ranked_rows(np.zeros((2, 1))) == metrics.ranked_rows(np.array(1.0)) == 0
