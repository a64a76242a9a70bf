"""Layers that add far more noise than they save time stay float although the budget is met."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from graphopt_passes.quantize.quality import Quality
from graphopt_passes.quantize.search import Search
from graphopt_passes.quantize.trials import Trial

NOISE = {"first": 6e-3, "second": 1e-3, "third": 1e-3}
SAVED = {"first": 5.0, "second": 15.0, "third": 15.0}


class Additive:
    """Noise and time of layers add up; 100 in float."""

    def __init__(self, *, sqnr_db: float = 30.0, made_ns: float = 1e6, **options: Any) -> None:
        given = {"force": False, "budget": None, **options}
        self.ctx = SimpleNamespace(options=SimpleNamespace(**given))
        self.costs = SimpleNamespace(
            plain=lambda _whole: 100.0, gain=lambda sites, _whole: sum(SAVED[n] for n in sites)
        )
        self.whole, self.made_ns, self.sqnr_db = frozenset(NOISE), made_ns, sqnr_db

    def placed(self, sites: frozenset[str]) -> frozenset[str]:
        return sites

    all_sites = placed

    def noise(self, sites: frozenset[str]) -> dict[str, float]:
        return {name: NOISE[name] for name in sites}

    def spread(self, sites: frozenset[str]) -> float:
        return sum(NOISE[name] for name in sites)

    def judged(self, sites: frozenset[str]) -> Trial:
        return Trial(sites, Quality(self.sqnr_db, passed=True))

    def is_enough(self, trial: Trial) -> bool:
        return bool(trial.sites)


def eased(monkeypatch: pytest.MonkeyPatch, **given: Any) -> frozenset[str]:
    monkeypatch.setattr(Search, "_cheapest", lambda _self, sites: sites)
    trials: Any = Additive(**given)
    return Search(trials)._eased(trials.judged(frozenset(NOISE))).sites


def test_what_adds_most_of_the_noise_for_little_time_stays_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert eased(monkeypatch) == {"second", "third"}


@pytest.mark.parametrize(
    "given", [{"sqnr_db": 45.0}, {"budget": "sqnr>=20"}, {"force": True}, {"made_ns": 1e10}]
)
def test_no_more_is_bought_than_is_wanted(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    assert eased(monkeypatch, **given) == frozenset(NOISE)
