"""Budgets in words."""

from __future__ import annotations

import re

import pytest

from graphopt.errors import OptionError
from graphopt.targets import Precision
from graphopt.verify.budget import ASKED, budget_for, parse_budget, samples_for
from graphopt.verify.compare import FP16, Budget, Metric


def test_conditions_add_up() -> None:
    assert parse_budget("sqnr>=30dB, top1-agreement >= 0.99") == Budget(
        sqnr_db=30, argmax_agreement=0.99, agreement=None
    )
    assert parse_budget("max<=5e-2,cosine>=0.9") == Budget(
        max_over_rms=0.05, cosine=0.9, agreement=None
    )


@pytest.mark.parametrize("text", ["", "sqnr", "sqnr<=30", "psnr>=30", "sqnr>=1e", "sqnr>=30,"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--budget .* write sqnr>=DB"):
        parse_budget(text)


def test_precisions_have_defaults() -> None:
    assert budget_for(Precision.FP16, None) == FP16
    assert budget_for(Precision.FP32, None) is None
    quantised = budget_for(Precision.INT8, None)
    assert quantised is not None
    assert quantised.argmax_agreement is None
    assert budget_for(Precision.INT8, "sqnr>=40") == Budget(sqnr_db=40, agreement=None)


def test_a_metric_is_asked_of_outputs_and_feeds() -> None:
    metric = Metric("m:f", lambda outputs, feeds: outputs[0]["y"] + feeds[0]["x"], 0.5)
    assert metric.of([{"y": 1}], [{"x": 2}]) == 3.0


def test_a_metric_that_fails_is_named_with_the_outputs_that_there_are() -> None:
    metric = Metric("m:f", lambda outputs, _: outputs[0]["nope"], 0.5)
    with pytest.raises(OptionError, match=r"metric m:f fails: KeyError: 'nope'.*outputs: 'y', 'z'"):
        metric.of([{"y": 1, "z": 2}], [{}])


def test_a_metric_that_gives_nan_is_named() -> None:
    metric = Metric("m:f", lambda *_: float("nan"), 0.5)
    with pytest.raises(OptionError, match="metric m:f gives NaN on 2 samples"):
        metric.of([{"y": 1}] * 2, [{}] * 2)


@pytest.mark.parametrize("text", ["top1-agreement>=1.5", "cosine>=1.01", "agreement>=99"])
def test_a_share_above_one_can_never_be_met(text: str) -> None:
    with pytest.raises(OptionError, match=r"is at most 1, and .* can never be met"):
        parse_budget(text)
    assert parse_budget(re.sub(r"[\d.]+$", "1", text)) != Budget()


def test_a_metric_that_gives_no_number_is_named() -> None:
    metric = Metric("m:f", lambda *_: "high", 0.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="metric m:f fails: ValueError"):
        metric.of([{"y": 1}], [{}])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("sqnr>=30", 24),
        ("top1-agreement>=0.5", 24),
        ("top1-agreement>=0.98", 100),
        ("top1-agreement>=0.99", ASKED),
        ("top1-agreement>=1", ASKED),
    ],
)
def test_the_finer_a_budget_the_more_samples_it_is_asked_of(text: str, count: int) -> None:
    assert samples_for(parse_budget(text), 24) == count
    assert samples_for(None, 24) == 24


def test_functions_are_asked_of_many() -> None:
    metric = Metric("m:f", lambda _outputs, _feeds: 1.0, 0.5)
    assert samples_for(Budget(metric=metric), 24) == ASKED
