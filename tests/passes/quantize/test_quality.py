"""Noise, expected changes of class, and when they are good enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphopt_passes.quantize.quality import Change, Quality, expected_change, powers, won
from graphopt_passes.quantize.static import QuantizeStatic

from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.rewrite import Calibration, Context, Options
from graphopt.targets import get_target
from graphopt.verify.budget import parse_budget
from tests.passes.quantize.test_static import IMAGES, RESIDUAL, varied

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(4000, 10)) * 3


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.3])
def test_expected_changes_are_those_that_happen(noise: float) -> None:
    found = SCORES + RNG.normal(size=SCORES.shape) * noise
    change = expected_change(SCORES, found)
    happened = (SCORES.argmax(axis=1) != found.argmax(axis=1)).mean()
    assert change is not None
    assert abs(change.flips - happened) < 0.25 * happened + 0.002


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_expected_losses_are_those_that_happen(noise: float) -> None:
    shares = np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)
    labels = (shares.cumsum(axis=1) < RNG.random((len(SCORES), 1))).sum(axis=1)
    found = [SCORES + RNG.normal(size=SCORES.shape) * noise for _ in range(20)]
    right = np.mean([(each.argmax(axis=1) == labels).mean() for each in found])
    change = expected_change(SCORES, found[0])
    assert change is not None
    lost = (SCORES.argmax(axis=1) == labels).mean() - right
    assert change.loss < 0.5 * change.flips
    assert abs(change.loss - lost) < 0.3 * lost + 0.003


def test_margins_of_further_samples_count() -> None:
    sure = SCORES[:8] + 50 * np.eye(10)[SCORES[:8].argmax(axis=1)]
    found = sure + RNG.normal(size=sure.shape) * 0.3
    alone, more = expected_change(sure, found), expected_change(sure, found, SCORES)
    assert alone is not None
    assert more is not None
    assert 0 < alone.flips < 0.005 < 0.01 < more.flips


@pytest.mark.parametrize(("rising", "most"), [(False, 1.3), (True, 2.0)])
def test_few_rows_near_a_tie_are_not_taken_for_many(*, rising: bool, most: float) -> None:
    # Leads between 0 and 10, even, or rarer the nearer to a tie: then more noise turns more than its share.
    rng = np.random.default_rng(5)

    def drawn(count: int) -> np.ndarray:
        even = rng.random(count)
        lead = 10 * even if not rising else np.sqrt(1 + 120 * even) - 1
        found = np.stack([lead, np.zeros(count), np.full(count, -20.0)], axis=1)
        turned = rng.random(count) < 0.5
        found[turned] = found[turned][:, [1, 0, 2]]
        return found

    many = drawn(200_000)
    noisy = many + rng.normal(size=many.shape) * 0.2
    happened = (many.argmax(axis=1) != noisy.argmax(axis=1)).mean()
    told = []
    for _ in range(40):
        rows = drawn(64)
        seen = rows[:16] + rng.normal(size=(16, 3)) * 0.2
        change = expected_change(rows[:16], seen, rows[16:])
        assert change is not None
        told.append(change.flips)
    assert 0.7 * happened < np.mean(told) < most * happened


def test_the_next_class_may_be_off_with_the_first() -> None:
    # The first two classes are alike, and off together; the others are off by themselves.
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(3000, 5)) + np.array([8, 8, 0, 0, 0])
    noise = rng.normal(size=rows.shape)
    noise[:, 1] = noise[:, 0] + 0.1 * noise[:, 1]
    found = rows + 0.3 * noise
    change = expected_change(rows, found)
    assert change is not None
    happened = (rows.argmax(axis=1) != found.argmax(axis=1)).mean()
    assert abs(change.flips - happened) < 0.4 * happened


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros((5, 4)) + np.arange(4),  # the same class for all
        RNG.normal(size=(200, 1000)) * 0.01,  # nothing is preferred
        RNG.normal(size=(5, 1)),
        RNG.normal(size=(2, 3, 4)),
    ],
)
def test_what_names_no_class_is_not_judged_by_classes(scores: np.ndarray) -> None:
    assert expected_change(scores, scores + 0.1) is None


def test_no_noise_changes_nothing() -> None:
    assert expected_change(SCORES, SCORES) == Change(0, 0)


@pytest.mark.parametrize(
    ("quality", "good"),
    [
        (Quality(31, passed=True), True),
        (Quality(29, passed=True), False),
        (Quality(40, passed=False), False),
        (Quality(25, passed=True, change=Change(0.0095, 0.001)), True),
        (Quality(25, passed=True, change=Change(0.0105, 0.001)), False),
        (Quality(25, passed=True, change=Change(0.0095, 0.003)), False),
        (Quality(19, passed=True, change=Change(0.0, 0.0)), False),
    ],
)
def test_what_is_good_enough(quality: Quality, *, good: bool) -> None:
    assert quality.is_good is good


METRIC = """
import numpy as np

def energy(outputs, feeds):
    assert len(outputs) == len(feeds)
    return float(np.mean([(each["y"] ** 2).mean() for each in outputs]))
"""


@pytest.mark.parametrize(("bound", "emitted"), [("0.0", True), ("1e9", False)])
def test_a_function_of_the_users_decides(tmp_path: Path, bound: str, *, emitted: bool) -> None:
    (tmp_path / "mine.py").write_text(METRIC)
    options = Options(
        calibration=Calibration(IMAGES), force=True, budget=f"{tmp_path}/mine.py:energy>={bound}"
    )
    model = load_model(varied(RESIDUAL))
    ctx = Context(model, get_target("cpu"), options, pass_name="quantize-static")
    assert QuantizeStatic().run(model, ctx) is emitted
    assert any("metric" in remark.reason for remark in ctx.remarks) is emitted


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mine.py:energy", "no module:function>=NUMBER"),
        ("mine.py:energy>=much", "no module:function>=NUMBER"),
        ("nowhere_at_all:f>=1", "nowhere_at_all"),
        ("math:pi>=1", "is no function"),
    ],
)
def test_a_metric_that_is_none_is_refused(text: str, error: str) -> None:
    with pytest.raises(OptionError, match=error):
        parse_budget(text)


def test_ways_are_compared_by_changes_where_outputs_name_classes() -> None:
    assert Quality(30, passed=True).merit_db == 30
    fewer = Quality(20, passed=True, change=Change(0.01, 0.001))
    more = Quality(25, passed=True, change=Change(0.02, 0.001))
    assert fewer.merit_db - more.merit_db == pytest.approx(6.02, abs=0.01)
    assert Quality(20, passed=True, change=Change(0.0, 0.0)).merit_db == float("inf")


def test_what_is_not_finite_on_either_side_does_not_count() -> None:
    wanted = np.array([3.0, np.inf, -np.inf, 1.0, np.nan], np.float32)
    found = np.array([2.0, np.inf, 5.0, -np.inf, 1.0], np.float32)
    assert powers(wanted, found) == (9.0, 1.0)


SOME, FEW = Change(0.01, 0.0), Change(0.005, 0.0)


def test_ways_are_compared_sample_by_sample_where_classes_are_named() -> None:
    """Two thirds of the samples are off by half as much, the rest as before; who is near a tie does not matter."""
    before = Quality(30.0, passed=True, change=FEW, leads=(1.0, 2.0, 3.0, 0.0))
    after = Quality(30.0, passed=True, change=SOME, leads=(0.5, 1.0, 3.0, 0.0))
    gain, error = won(before, after)
    assert gain == pytest.approx(20 * np.log10(2) * 2 / 3)
    assert error == pytest.approx(20 * np.log10(2) / 3)


@pytest.mark.parametrize("leads", [(), (1.0,)])
def test_ways_are_compared_by_merit_otherwise(leads: tuple[float, ...]) -> None:
    before = Quality(30.0, passed=True, leads=leads)
    assert won(before, Quality(33.0, passed=True, leads=leads)) == (3.0, 0.0)
