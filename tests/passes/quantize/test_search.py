"""Layers that add far more noise than they save time stay float although the budget is met."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from graphopt_passes.quantize import search
from graphopt_passes.quantize.quality import Quality
from graphopt_passes.quantize.search import Search
from graphopt_passes.quantize.trials import GAIN, TIMED, Trial, timed

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
        self.mixed, self.on_host = SimpleNamespace(layers=frozenset()), True

    def placed(self, sites: frozenset[str]) -> frozenset[str]:
        return sites

    all_sites = fused = placed

    def predicted(self, sites: frozenset[str]) -> float:
        return 100.0 / (100.0 - sum(SAVED[name] for name in sites))

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


class Worth(Additive):
    """What the table and the clock say of all choices."""

    def __init__(self, predicted: float, ratio: float, **options: Any) -> None:
        super().__init__(**options)
        self.table, self.clock, self.asked, self.said = predicted, ratio, 0, [""]
        self.scalings, self.inlets, self.is_timed = (), (), True

    def predicted(self, sites: frozenset[str]) -> float:
        return self.table if sites else 1.0

    def ratio(self, sites: frozenset[str]) -> float:
        self.asked += 1
        return self.clock if sites else 0.0

    def say(self, text: str) -> None:
        self.said.append(text)

    def chosen(self, sites: frozenset[str]) -> bool:
        return self.ctx.options.force or self.predicted(sites) >= GAIN


def searched(monkeypatch: pytest.MonkeyPatch, trials: Any) -> Trial:
    """What is chosen where all layers are fused and within the budget."""
    monkeypatch.setattr(search, "fuse", lambda _trials, allowed: allowed)
    monkeypatch.setattr(search, "settle", lambda _trials, _fused: None)
    monkeypatch.setattr(Search, "_cheapest", lambda _self, sites: sites)
    monkeypatch.setattr(Search, "_choices", lambda _self, sites: [sites] * trials.chosen(sites))
    monkeypatch.setattr(Search, "_explain", lambda *_given: None)
    return Search(trials).best(ALL)


@pytest.mark.parametrize(
    ("predicted", "clock", "raced", "told"),
    [
        (GAIN - 0.02, 2.0, False, "1.03x the speed of float here, by the table"),
        (0.9, 2.0, False, "no layer would be faster"),
        (GAIN + 0.1, GAIN - 0.01, True, "1.04x the speed of float here by the clock (1.15x by the"),
    ],
)
def test_little_gain_is_not_worth_other_numbers(
    monkeypatch: pytest.MonkeyPatch, predicted: float, clock: float, raced: bool, told: str
) -> None:
    trials = Worth(predicted, clock)
    assert not searched(monkeypatch, trials).sites
    assert bool(trials.asked) == raced
    assert told in trials.said[-1]
    assert "--force" in trials.said[-1]


def test_enough_gain_by_both_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert searched(monkeypatch, Worth(GAIN, GAIN)).sites


def test_little_gain_is_taken_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    assert searched(monkeypatch, Worth(0.5, 0.5, force=True)).sites == ALL


@pytest.mark.parametrize(
    ("turns", "worth"),
    [
        ([1.2] * 5, True),
        ([1.2, 0.7, 1.2, 1.2, 1.2], True),  # a busy moment
        ([1.06, 1.04, 1.07, 1.02], False),  # a median of 1.05: near the bound
        ([1.02, 1.2, 1.04], False),
        ([0.9, 0.9], False),
    ],
)
def test_all_turns_but_one_must_say_that_it_is_faster(turns: list[float], worth: bool) -> None:
    left = iter(turns)
    assert (timed(lambda: next(left)) >= GAIN) == worth
    assert len(turns) - len(list(left)) <= TIMED


def test_what_is_no_longer_fused_without_its_neighbours_stays_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All three are fused together; without the first, the second is not."""
    trials: Any = Worth(1.5, 1.5)
    trials.fused = lambda sites: sites if sites == ALL else sites - {"second"}
    monkeypatch.setattr(Search, "_choices", lambda _self, _fused: [ALL])
    easier = [trials.judged(ALL - {"first"}), trials.judged(ALL)]
    monkeypatch.setattr(Search, "_eased", lambda _self, _trial: easier)
    monkeypatch.setattr(Search, "_explain", lambda _self, _best, _wanted: None)
    assert searched(monkeypatch, trials).sites == {"third"}
    trials.fused = lambda sites: sites if sites == ALL else frozenset()
    assert searched(monkeypatch, trials).sites == ALL
