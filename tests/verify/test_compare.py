"""Gates and metrics: each class accepts what it should and refuses its neighbour, in numbers that JSON can hold."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.numerics import Numerics
from graphopt.verify import metrics
from graphopt.verify.compare import (
    BF16,
    FP16,
    INT8,
    Budget,
    Hint,
    Origin,
    OutputReport,
    compare,
    merge,
    profile_for,
)

EXACT = profile_for(Numerics.EXACT)
REORDERED = profile_for(Numerics.REORDERED)


def f32(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("reference", "candidate", "passed"),
    [
        (f32(1, 2), f32(1, 2), True),
        (f32(1), np.nextafter(f32(1), f32(2)), False),
        (f32(0), f32(-0.0), False),
        (f32(np.nan), -f32(np.nan), True),
        (f32(np.inf), f32(-np.inf), False),
        (np.array([1, 2]), np.array([1, 3]), False),
        (np.array(["a", "b"], object), np.array(["a", "b"], object), True),
        (np.array(["a", "b"], object), np.array(["a", "c"], object), False),
        (np.array([True]), np.array([False]), False),
        (np.array(2.0), np.array(2.0), True),
        (np.zeros((0, 3)), np.zeros((0, 3)), True),
        (np.ones(2, ml_dtypes.bfloat16), np.ones(2, ml_dtypes.bfloat16), True),
        (
            np.full(1, np.nan, ml_dtypes.float8_e4m3fn),
            np.full(1, -np.nan, ml_dtypes.float8_e4m3fn),
            True,
        ),
    ],
)
def test_exact_means_the_same_bits(reference: Any, candidate: Any, passed: bool) -> None:
    report = compare("y", reference, candidate, EXACT)
    assert report.passed is passed
    assert report.equal is passed
    assert bool(report.why) is not passed


@pytest.mark.parametrize("profile", [EXACT, REORDERED, profile_for(Numerics.LOSSY, budget=INT8)])
@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (np.ones(2), "dtype float64, the reference has float32"),
        (np.ones((1, 2), np.float32), r"shape \[1, 2\], the reference has \[2\]"),
        ([f32(1, 1)], r"float32\[2\] against a sequence of 1"),
        (None, "against nothing"),
        ({1: 2.0}, r"against a map with keys \[1\]"),
        ("text", "against str"),
    ],
)
def test_no_profile_forgives_another_type(profile: Any, candidate: Any, why: str) -> None:
    report = compare("y", f32(1, 1), candidate, profile)
    assert not report.passed
    assert re.search(why, report.why)


def test_reordered_scales_with_the_tensor_and_the_element() -> None:
    reference = normal(1000)
    rms = metrics.root_mean_square(reference)
    near_zero = int(np.abs(reference).argmin())
    for size, passed in ((0.9e-5, True), (1.2e-5, False)):
        candidate = reference.astype(np.float64)
        candidate[near_zero] += size * rms
        assert compare("y", reference, candidate.astype(np.float32), REORDERED).passed is passed
    scaled = compare("y", reference * 1e-6, reference * 1e-6 * np.float32(1 + 1e-3), REORDERED)
    assert not scaled.passed
    assert "outside" in scaled.why


def test_depth_loosens_reordered_up_to_a_cap() -> None:
    assert profile_for(Numerics.REORDERED, depth=25).tolerance == pytest.approx(5e-5)
    assert profile_for(Numerics.REORDERED, depth=10**6).tolerance == 1e-4
    assert profile_for(Numerics.REORDERED, dtype=ir.DataType.FLOAT16).tolerance == 1e-3
    assert profile_for(Numerics.EXACT, depth=100).tolerance == 0


def test_non_finite_values_must_sit_in_the_same_places() -> None:
    reference = f32(1, np.nan, np.inf, -np.inf)
    almost = reference * np.float32(1 + 1e-7)
    assert compare("y", reference, almost, REORDERED).passed
    for wrong in (
        f32(1, np.nan, np.inf, np.inf),
        f32(1, 2, np.inf, -np.inf),
        f32(np.nan, np.nan, np.inf, -np.inf),
    ):
        report = compare("y", reference, wrong, REORDERED)
        assert not report.passed
        assert not report.nonfinite_equal
        assert "non-finite values differ; at" in report.why
    assert "at [1]" in compare("y", reference, f32(1, 2, np.inf, 0), REORDERED).why


def test_a_zero_reference_is_met_exactly_or_within_the_floor() -> None:
    zeros, noise = f32(0, 0), f32(1e-9, 0)
    missed = compare("y", zeros, noise, REORDERED)
    assert not missed.passed
    assert missed.max_over_rms is None
    assert missed.cosine == 0
    assert compare("y", zeros, noise, REORDERED, Hint(floor=1.0)).passed
    assert not compare("y", zeros, noise, profile_for(Numerics.LOSSY)).passed
    assert compare("y", zeros, noise, profile_for(Numerics.LOSSY), Hint(floor=1.0)).passed


def test_metrics_against_closed_forms() -> None:
    reference, candidate = np.array([3.0, 4.0, 0.0, 0.0]), np.array([3.0, 4.0, 0.0, 0.5])
    report = compare("y", reference, candidate, REORDERED)
    assert report.max_abs == 0.5
    assert report.max_over_rms == pytest.approx(0.2)
    assert report.sqnr_db == pytest.approx(20)
    assert report.cosine == pytest.approx(5 / math.sqrt(25.25))
    assert report.outside == 0.25
    assert report.argmax_agreement == 1


def test_metrics_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = normal(7, 11), normal(7, 11, seed=1)
    reference[3, 2] = np.nan
    whole = compare("y", reference, candidate, REORDERED)
    monkeypatch.setattr(metrics, "CHUNK", 5)
    parts = compare("y", reference, candidate, REORDERED)
    exact = {"max_abs", "outside", "nonfinite_equal", "why", "argmax_agreement", "topk_agreement"}
    for name in exact:
        assert getattr(parts, name) == getattr(whole, name)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)


def test_values_near_the_limits_of_float64_do_not_overflow() -> None:
    report = compare("y", np.array([1.7e308, 1.0]), np.array([-1.7e308, 1.0]), REORDERED)
    assert not report.passed
    assert report.max_abs is None
    assert compare("y", np.array([1.7e308]), np.array([1.7e308 * (1 - 1e-9)]), REORDERED).passed


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_ulps_count_representable_values(dtype: Any) -> None:
    one = np.ones(1, dtype)
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    assert metrics.ulps(one, (one + limits.eps * np.ones(1, dtype)).astype(dtype)) == (1, 1)
    assert metrics.ulps(np.zeros(1, dtype), -np.zeros(1, dtype)) == (0, 0)
    tiny = np.array([limits.smallest_subnormal]).astype(dtype)
    assert metrics.ulps(tiny, -tiny) == (2, 2)


def test_ulps_reach_from_end_to_end_and_say_nothing_of_integers() -> None:
    top = np.array([np.finfo(np.float64).max])
    distance = metrics.ulps(top, -top)
    assert distance is not None
    assert distance[1] == 2 * 0x7FEFFFFFFFFFFFFF
    assert metrics.ulps(np.ones(1, int), np.ones(1, int)) is None
    assert metrics.ulps(f32(np.nan), f32(np.nan)) is None


def test_rank_agreement_accepts_ties_of_the_reference() -> None:
    reference = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    candidate = np.array([[0.9, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert metrics.rank_agreement(reference, candidate) == (0.5, None)
    rows = np.arange(8.0)[None]
    swapped = rows[:, [0, 1, 3, 2, 4, 5, 6, 7]]
    best, top = metrics.rank_agreement(rows, swapped)
    assert best == 1
    assert top == pytest.approx(0.8)
    assert metrics.rank_agreement(np.ones((3, 1)), np.ones((3, 1))) == (None, None)
    assert metrics.rank_agreement(np.array([[np.nan, 1]]), np.array([[np.nan, 2]]))[0] == 1


@pytest.mark.parametrize(
    ("budget", "noise", "passed"),
    [
        (FP16, 1e-3, True),
        (FP16, 1e-2, False),
        (BF16, 1e-2, True),
        (BF16, 1e-1, False),
        (INT8, 5e-3, True),
        (INT8, 0.5, False),
        (Budget(cosine=0.999), 0.1, False),
        (Budget(sqnr_db=60), 1e-2, False),
        (Budget(), 10.0, True),
    ],
)
def test_lossy_keeps_its_budget(budget: Budget, noise: float, passed: bool) -> None:
    reference = normal(64, 10)
    candidate = reference + np.float32(noise) * normal(64, 10, seed=1).clip(-2, 2)
    report = compare("y", reference, candidate, profile_for(Numerics.LOSSY, budget=budget))
    assert report.passed is passed, report


def test_lossy_gates_on_the_class_chosen() -> None:
    reference = np.eye(4, dtype=np.float32) * np.float32(1e-3) + 1
    candidate = reference[::-1].copy()
    report = compare("y", reference, candidate, profile_for(Numerics.LOSSY, budget=INT8))
    assert "argmax agreement 0 < 0.99" in report.why


def test_positions_are_forgiven_between_equal_scores_only() -> None:
    scores = f32(1, 5, 5, 2)[None]
    hint = Hint(Origin.RANK, scores, axis=1)
    tie = compare("i", np.array([[1]]), np.array([[2]]), REORDERED, hint)
    assert tie.passed
    assert "equal within the tolerance" in tie.why
    assert not compare("i", np.array([[1]]), np.array([[2]]), EXACT, hint).passed
    for wrong in (3, 4, -1):
        assert not compare("i", np.array([[1]]), np.array([[wrong]]), REORDERED, hint).passed
    squeezed = compare("i", np.array([1]), np.array([2]), REORDERED, hint)
    assert squeezed.passed
    assert not compare("i", np.array([[1, 2]]), np.array([[2, 2]]), REORDERED, hint).passed
    assert compare("i", np.array([[1, 2]]), np.array([[2, 1]]), REORDERED, hint).passed
    assert not compare(
        "i", np.array([1, 1]), np.array([2, 2]), REORDERED, Hint(Origin.RANK, f32(1, 2, 3))
    ).passed


def test_rounded_integers_may_flip_now_and_then() -> None:
    codes = np.zeros(1000, np.uint8) + 7
    one, many, far = codes.copy(), codes + 1, codes.copy()
    one[3], far[3] = 8, 9
    rounded = Hint(Origin.ROUNDED)
    assert compare("q", codes, one.astype(np.uint8), REORDERED, rounded).passed
    assert not compare("q", codes, one, REORDERED).passed
    assert not compare("q", codes, one, EXACT, rounded).passed
    assert not compare("q", codes, many, REORDERED, rounded).passed
    assert not compare("q", codes, far, REORDERED, rounded).passed
    lossy = profile_for(Numerics.LOSSY, budget=Budget(sqnr_db=10, agreement=None))
    assert compare("q", codes, many, lossy, rounded).passed
    assert not compare("q", codes, codes + 100, lossy, rounded).passed


def test_lossy_tolerates_a_fraction_of_other_integers() -> None:
    labels = np.zeros(1000, np.int64)
    off = labels.copy()
    off[:5] = 3
    assert compare("l", labels, off, profile_for(Numerics.LOSSY, budget=INT8)).passed
    off[:50] = 3
    assert not compare("l", labels, off, profile_for(Numerics.LOSSY, budget=INT8)).passed
    assert not compare(
        "l", labels, off, profile_for(Numerics.LOSSY, budget=Budget(agreement=None))
    ).passed


def test_boxes_are_rows_in_any_order() -> None:
    rows = np.array([[0, 0, 1], [0, 0, 2]])
    boxes = Hint(Origin.BOXES)
    swapped = compare("b", rows, rows[::-1], REORDERED, boxes)
    assert swapped.passed
    assert swapped.why == "the same rows in another order"
    assert not compare("b", rows, rows[::-1], EXACT, boxes).passed
    fewer = compare("b", rows, rows[:1], REORDERED, boxes)
    assert not fewer.passed
    assert fewer.agreement == 0.5
    assert compare("b", rows[:0], rows[:0], REORDERED, boxes).passed


def test_nested_values_are_compared_leaf_by_leaf() -> None:
    assert compare("s", [f32(1), [f32(2)]], [f32(1), [f32(2)]], EXACT).passed
    assert compare("s", [], [], EXACT).passed
    assert compare("s", None, None, EXACT).passed
    assert compare("m", [{1: 0.5}], [{1: 0.5}], EXACT).passed
    broken = compare("s", [f32(1), f32(2, 3)], [f32(1), f32(2, 4)], EXACT)
    assert not broken.passed
    assert broken.elements == 3
    assert not compare("s", [f32(1)], [f32(1), f32(1)], EXACT).passed
    assert not compare("m", {1: 0.5}, {2: 0.5}, EXACT).passed
    inside = compare("m", [{1: 0.5}], [None], EXACT)
    assert inside.why == "[0]: a map with keys [1] against nothing"


def test_complex_numbers_are_pairs_of_reals() -> None:
    reference = np.array([1 + 1j, 2 + 2j], np.complex64)
    assert compare("c", reference, reference * np.complex64(1 + 1e-7), REORDERED).passed
    report = compare("c", reference, np.array([1 + 1j, 2 + 3j], np.complex64), REORDERED)
    assert report.max_abs == 1
    assert "at [1]" in report.why


def test_the_worst_of_several_reports() -> None:
    good = OutputReport(
        "y", passed=True, equal=True, elements=1, max_abs=0.0, max_over_rms=0.0, feed="a"
    )
    soso = dataclasses.replace(
        good, equal=False, max_abs=1.0, max_over_rms=0.1, sqnr_db=20.0, feed="b"
    )
    bad = dataclasses.replace(soso, passed=False, sqnr_db=40.0, why="because", feed="c")
    assert merge([good, soso]).feed == "b"
    worst = merge([good, soso, bad])
    assert (worst.passed, worst.why, worst.feed, worst.sqnr_db, worst.elements) == (
        False,
        "because",
        "c",
        20.0,
        3,
    )


def test_reports_are_json_without_nan() -> None:
    reference = f32(0, np.inf, np.nan)
    for candidate in (reference, f32(1, 2, 3), np.ones(1), [reference]):
        for profile in (EXACT, REORDERED, profile_for(Numerics.LOSSY)):
            text = json.dumps(
                dataclasses.asdict(compare("y", reference, candidate, profile)), allow_nan=False
            )
            assert json.loads(text)["name"] == "y"
