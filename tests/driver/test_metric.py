"""A function of the user's in the budget is asked of the file in the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt.driver import metric
from graphopt.rewrite import Calibration, Options
from graphopt.targets import Precision, get_target
from graphopt.verify.verifier import Status, Verification
from tests.passes.quantize.test_static import IMAGES, RESIDUAL, varied

MINE = """
def count(outputs, feeds):
    assert len(outputs) == len(feeds)
    return len(outputs) + float(outputs[0]["y"].sum() * 0)
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return f"{path}:count"


@pytest.mark.parametrize(("bound", "status"), [(4, Status.PASSED), (5, Status.FAILED)])
def test_the_file_must_hold_the_metric(
    tmp_path: Path, mine: str, bound: int, status: Status
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(varied(RESIDUAL).SerializeToString())
    options = Options(calibration=Calibration(IMAGES), budget=f"{mine}>={bound}")
    plain = Verification(Status.PASSED, "lossy")
    found = metric.held(plain, file, get_target("cpu"), Precision.INT8, options)
    assert found.status is status
    assert found.metrics[0].value == 4
    assert ("asked for >= 5" in found.reason) is (status is Status.FAILED)


def test_without_a_metric_nothing_is_asked(tmp_path: Path) -> None:
    options = Options(calibration=Calibration(IMAGES), budget="sqnr>=20")
    given = Verification(Status.PASSED, "lossy")
    file = tmp_path / "none.onnx"
    assert metric.held(given, file, get_target("cpu"), Precision.INT8, options) is given


def test_a_run_reports_it(mine: str) -> None:
    feeds = [{"x": np.asarray(each["x"])} for each in IMAGES]
    result = graphopt.optimize(
        varied(RESIDUAL), precision="int8", calibration=feeds, budget=f"{mine}>=4", force=True
    )
    assert result.report.verification is not None
    assert [each.value for each in result.report.verification.metrics] == [4]
