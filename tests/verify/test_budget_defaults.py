"""What each precision promises where the user says nothing."""

from __future__ import annotations

from graphopt.targets import Precision
from graphopt.verify.budget import budget_for, parse_budget
from graphopt.verify.compare import FP16


def test_precisions_have_defaults() -> None:
    assert budget_for(Precision.FP16, None) == FP16
    assert budget_for(Precision.FP32, None) is None
    quantised = budget_for(Precision.INT8, None)
    assert quantised is not None
    assert quantised.argmax_agreement is None
    assert budget_for(Precision.INT8, "sqnr>=40") == parse_budget("sqnr>=40")


def test_top1_agreement_is_the_rank_of_classes() -> None:
    assert parse_budget("top1-agreement>=0.99").argmax_agreement == 0.99
