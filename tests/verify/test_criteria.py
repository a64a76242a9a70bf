"""Limits for single outputs and metrics of the user's: what they accept, what they refuse, and how they are written."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx.parser
import pytest

from graphopt import VerifyError, optimize
from graphopt.errors import OptionError
from graphopt.numerics import Numerics
from graphopt.verify.compare import Budget
from graphopt.verify.criteria import IGNORE, Criteria, Metric, load_metric, parse_gates
from graphopt.verify.verifier import ReferenceRun, VerifyOptions

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
TEXT = "g (float[4] x) => (float[4] y, float[4] z) <float k = {K}> { y = Mul(x, k) z = Abs(x) }"


def model(k: str = "2") -> bytes:
    return bytes(
        onnx.parser.parse_model(HEAD + TEXT.replace("{K}", f"{{{k}}}")).SerializeToString()
    )


def verdict(criteria: Criteria, k: str = "2.01") -> Any:
    options = VerifyOptions(Numerics.REORDERED, criteria=criteria)
    return ReferenceRun(model()).verify(model(k), options)


@pytest.mark.parametrize(
    ("limit", "passed"), [("sqnr>=40", True), ("sqnr>=60", False), ("ignore", True)]
)
def test_an_output_has_limits_of_its_own(limit: str, *, passed: bool) -> None:
    found = verdict(Criteria(parse_gates({"y": limit})))
    assert found.passed is passed
    assert verdict(Criteria(parse_gates({"z": limit}))).passed is False


def test_a_limit_for_an_output_that_there_is_not_is_refused() -> None:
    with pytest.raises(OptionError, match=r"no output 'q'.*the outputs are y, z"):
        verdict(Criteria(parse_gates(["q=ignore"])))


def test_limits_are_read() -> None:
    assert parse_gates(["y=sqnr>=40,cosine>=0.9", "z = ignore"]) == {
        "y": Budget(sqnr_db=40, cosine=0.9, agreement=None),
        "z": IGNORE,
    }
    for wrong in ("y", "=sqnr>=40", "y=", "y=what>=3"):
        with pytest.raises(OptionError):
            parse_gates([wrong])


@pytest.fixture
def mine() -> Iterator[types.ModuleType]:
    module = types.ModuleType("metric_of_mine")
    sys.modules["metric_of_mine"] = module
    yield module
    del sys.modules["metric_of_mine"]


def worst_ratio(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> float:
    ones = reference["y"] != 0
    return float(np.max(candidate["y"][ones] / reference["y"][ones], initial=1.0))


def test_a_metric_judges_besides_the_gates(mine: types.ModuleType) -> None:
    mine.worst = worst_ratio  # type: ignore[attr-defined]
    loose = parse_gates({"y": "ignore"})
    kept = verdict(Criteria(loose, (load_metric("metric_of_mine:worst<=1.02"),)))
    assert kept.passed
    assert kept.metrics[0].value == pytest.approx(1.005)
    assert kept.metrics[0].limit == "<= 1.02"
    refused = verdict(Criteria(loose, (load_metric("metric_of_mine:worst <= 1.001"),)))
    assert refused.passed is False
    assert "metric metric_of_mine:worst on feed" in refused.reason


def yes(_ours: Mapping[str, Any], _theirs: Mapping[str, Any]) -> bool:
    return True


def no(_ours: Mapping[str, Any], _theirs: Mapping[str, Any]) -> bool:
    return False


def test_a_metric_may_say_yes_or_no() -> None:
    loose = parse_gates({"y": "ignore"})
    for said in (True, False):
        metric = Metric("mine", yes if said else no)
        assert verdict(Criteria(loose, (metric,))).passed is said
    assert not Metric("mine", worst_ratio, least=0.5).accepts(float("nan"))


def test_a_metric_that_fails_is_an_error_of_its_own() -> None:
    metric = Metric("mine", lambda ours, _: ours["no such output"])
    with pytest.raises(OptionError, match="the metric mine fails on feed 'normal': KeyError"):
        verdict(Criteria(metrics=(metric,)))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nothing", "write module:function"),
        ("no_such_module:f", "cannot be loaded"),
        ("math:no_such", "cannot be loaded"),
        ("math:pi", "not a function"),
        ("math:sqrt>=.", "is not a number"),
    ],
)
def test_what_is_no_metric_is_refused(text: str, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        load_metric(text)


def test_a_run_keeps_to_them() -> None:
    report = optimize(model(), metric=Metric("mine", worst_ratio, most=1.0001)).report
    assert report.verification.metrics[0].passed
    with pytest.raises(VerifyError):
        optimize(model(), metric=Metric("mine", worst_ratio, most=0.9))
    with pytest.raises(OptionError, match="no output 'q'"):
        optimize(model(), gates={"q": "ignore"})
