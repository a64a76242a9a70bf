"""Layers that add far more noise than they save time stay float although the budget is met."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from graphopt_passes.quantize.quality import Quality
from graphopt_passes.quantize.search import Search
from graphopt_passes.quantize.trials import Trial

NOISE = {"first": 6e-3, "second": 1e-3, "third": 1e-3}
SAVED = {"first": 5.0, "second": 15.0, "third": 15.0}
ALL = frozenset(NOISE)


def summed(sites: frozenset[str]) -> float:
    return sum(NOISE[name] for name in sites)


class Additive:
    """Time of layers adds up, and noise unless another sum is given; 100 in float."""

    def __init__(
        self,
        *,
        sqnr_db: float = 30.0,
        made_ns: float = 1e6,
        spread: Callable[[frozenset[str]], float] = summed,
        **options: Any,
    ) -> None:
        given = {"force": False, "budget": None, **options}
        self.ctx = SimpleNamespace(options=SimpleNamespace(**given))
        self.costs = SimpleNamespace(
            plain=lambda _whole: 100.0, gain=lambda sites, _whole: sum(SAVED[n] for n in sites)
        )
        self.whole, self.made_ns, self.sqnr_db, self.spread = ALL, made_ns, sqnr_db, spread
        self.mixed = SimpleNamespace(layers=frozenset())

    def placed(self, sites: frozenset[str]) -> frozenset[str]:
        return sites

    all_sites = placed

    def noise(self, sites: frozenset[str]) -> dict[str, float]:
        return {name: NOISE[name] for name in sites}

    def judged(self, sites: frozenset[str]) -> Trial:
        return Trial(sites, Quality(self.sqnr_db, passed=True))

    def is_enough(self, trial: Trial) -> bool:
        return bool(trial.sites)


def eased(
    monkeypatch: pytest.MonkeyPatch,
    cheapest: Callable[[frozenset[str]], frozenset[str]] = lambda sites: sites,
    **given: Any,
) -> list[frozenset[str]]:
    """What is tried, the best first."""
    monkeypatch.setattr(Search, "_cheapest", lambda _self, sites: cheapest(sites))
    trials: Any = Additive(**given)
    return [each.sites for each in Search(trials)._eased(trials.judged(ALL))]


def test_what_adds_most_of_the_noise_for_little_time_stays_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert eased(monkeypatch) == [
        {"second", "third"},
        {"third"},
        ALL,
    ]  # second best: if the clock refuses the best


@pytest.mark.parametrize(
    "given", [{"sqnr_db": 45.0}, {"budget": "sqnr>=20"}, {"force": True}, {"made_ns": 1e10}]
)
def test_no_more_is_bought_than_is_wanted(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    assert eased(monkeypatch, **given) == [ALL]


def test_noise_that_costs_too_much_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    even = {frozenset(ALL): 3.0}
    assert eased(monkeypatch, spread=lambda sites: even.get(sites, 2.9)) == [ALL]


def test_a_dear_step_is_taken_where_it_opens_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer alone is not worth its time; without it, the second costs all that is left of the noise."""

    def spread(sites: frozenset[str]) -> float:
        return {ALL: 1.0, frozenset({"second", "third"}): 0.95}.get(
            sites, 1e-3 if sites == {"third"} else 1.0
        )

    assert eased(monkeypatch, spread=spread) == [{"third"}, ALL]


def test_layers_that_were_kept_against_the_table_are_not_dropped_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the table would have dropped the third from the beginning."""
    found = eased(monkeypatch, cheapest=lambda sites: sites - {"third"})
    assert found[0] == {"second", "third"}
