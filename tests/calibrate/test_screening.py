"""Samples that hold no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.calibrate.samples import Samples, read_samples
from graphopt.calibrate.screening import Screening
from graphopt.errors import DataError
from graphopt.rewrite import Calibration
from graphopt.runtime.specs import TensorSpec

SPECS = (TensorSpec("x", ir.DataType.FLOAT, (1, 2)), TensorSpec("n", ir.DataType.INT64, (1,)))


def samples(*rows: list[float], limit: int | None = None) -> Samples:
    feeds: list[dict[str, Any]] = [
        {"x": np.array([row], np.float32), "n": np.array([3])} for row in rows
    ]
    return read_samples(Calibration(feeds, limit=limit), SPECS)


def test_a_sample_with_nan_is_left_out_and_named() -> None:
    screening = Screening()
    found = screening.of(samples([1, 2], [np.nan, 2], [3, 4], [5, 6], limit=2)).first(9)
    assert [feed.name for feed in found] == ["sample 0", "sample 2"]
    assert screening.told() == (
        "elements of calibration samples are NaN or infinite: 1 in the input 'x' of 'sample 1'; the sample is left out",
    )


def test_a_sample_with_inf_is_left_out() -> None:
    assert len(Screening().of(samples([1, 2], [np.inf, 0])).first(9)) == 1


def test_a_mask_of_minus_inf_is_kept_and_named() -> None:
    screening = Screening()
    assert len(screening.of(samples([1, 2], [-np.inf, -np.inf])).first(9)) == 2
    assert screening.told() == (
        "elements of calibration samples are -inf: 2 in the input 'x' of 'sample 1'; taken for a mask, ranges leave it "
        "out",
    )


def test_many_are_counted() -> None:
    screening = Screening()
    assert len(screening.of(samples([1, 2], *[[np.nan, 0.0]] * 5)).first(9)) == 1
    (told,) = screening.told()
    assert "'sample 3' and in 2 more; these samples are left out" in told


def test_numbers_are_not_told_of() -> None:
    screening = Screening()
    assert len(screening.of(samples([1, 2], [3, 4])).first(9)) == 2
    assert screening.told() == ()


def nothing(*sizes: int) -> Samples:
    specs = (
        TensorSpec("x", ir.DataType.FLOAT, ("n", 2)),
        TensorSpec("p", ir.DataType.FLOAT, ("m",)),
    )
    feeds: list[dict[str, Any]] = [
        {"x": np.ones((size, 2), np.float32), "p": np.ones(0, np.float32)} for size in sizes
    ]
    return read_samples(Calibration(feeds), specs)


def test_samples_without_elements_are_left_out() -> None:
    """One empty input beside another that is not makes no empty sample: the past of a decoder."""
    screening = Screening()
    assert len(screening.of(nothing(1, 0, 2, 0)).first(9)) == 2
    assert screening.told() == (
        "calibration sample 'sample 1' and 1 more left out: no element in any input",
    )
    with pytest.raises(DataError, match="no calibration sample holds any element: 'sample 0'"):
        Screening().of(nothing(0, 0))


def test_a_model_without_inputs_has_samples() -> None:
    assert len(Screening().of(read_samples(Calibration([{}]), ())).first(9)) == 1


def test_nothing_but_nan_is_refused() -> None:
    with pytest.raises(
        DataError,
        match="every calibration sample holds NaN or infinities, first 'sample 0' in the input 'x'",
    ):
        Screening().of(samples([np.nan, 1], [1, np.inf]))
