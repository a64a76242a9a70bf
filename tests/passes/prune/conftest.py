"""What tests of pruning share."""

from __future__ import annotations

import pytest
from graphopt_passes.prune import tuning


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training of what stays is cut short: it takes seconds, and most tests are about something else."""
    monkeypatch.setattr(tuning, "STEPS", tuning.JUDGED)
    monkeypatch.setattr(tuning, "FAR_STEPS", tuning.JUDGED)
