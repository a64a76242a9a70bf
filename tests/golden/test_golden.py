"""The repository's own golden cases: real models, optimised as users would, compared in numbers and structure."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.driver.golden import golden_optimizer
from graphopt.verify.golden import check_case
from graphopt.verify.golden_folder import find_cases, find_orphans

ROOT = Path(__file__).resolve().parents[2] / "golden"
CASES = find_cases(ROOT)

MAX_BYTES = 1 << 20


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case_holds(case: Path) -> None:
    report = check_case(case, golden_optimizer())
    assert report.passed, "\n".join(report.failures)


def test_every_file_belongs_to_a_case() -> None:
    assert find_orphans(ROOT, CASES) == ()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_cases_stay_small(case: Path) -> None:
    data = [path for path in case.rglob("*") if path.is_file() and path.name != "model.onnx"]
    assert sum(path.stat().st_size for path in data) <= MAX_BYTES
