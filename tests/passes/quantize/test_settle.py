"""Ways to quantise are kept where they lower the noise, by more than chance where they were chosen from many."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from graphopt_passes.quantize.quality import Change, Quality
from graphopt_passes.quantize.settle import _adopt
from graphopt_passes.quantize.styles import style_named
from graphopt_passes.quantize.trials import Trial, Trials

from graphopt.calibrate.samples import JUDGED
from graphopt.ir.model_file import load_model
from tests.rewriting import parse


@dataclasses.dataclass(frozen=True)
class Way:
    leads: tuple[float, ...]


class Judged:
    """Each way has its noise, a number a sample."""

    def __init__(self) -> None:
        self.facts, self.key = Way((1.0, 1.0, 1.0, 1.0)), "plain"
        self.notes: list[str] = []
        self.ctx = SimpleNamespace(remark=lambda *given: self.notes.append(given[-1]))

    def judged(self, sites: frozenset[str]) -> Trial:
        change = Change(0.01, 0.0)
        return Trial(sites, Quality(30.0, passed=True, change=change, leads=self.facts.leads))


@pytest.mark.parametrize(
    ("leads", "doubts", "kept"),
    [
        ((0.9, 0.9, 0.9, 0.9), 1.0, True),  # each sample is a little better
        ((0.4, 1.5, 0.5, 1.4), 0.0, True),  # on average 2 dB
        ((0.4, 1.5, 0.5, 1.4), 1.0, False),  # with an error of 4 dB
        ((1.1, 1.1, 1.1, 1.1), 0.0, False),
        ((0.99, 0.99, 0.99, 0.99), 0.0, False),  # too little
    ],
)
def test_what_lowers_the_noise_is_kept(leads: tuple[float, ...], doubts: float, kept: bool) -> None:
    trials: Any = Judged()
    _adopt(trials, frozenset({"a"}), Way(leads), "other", "another way", doubts)  # type: ignore[arg-type]
    assert (trials.facts == Way(leads)) == kept
    assert trials.key == ("plain other" if kept else "plain")
    assert bool(trials.notes) == kept


@pytest.mark.parametrize(("each_ns", "count"), [(0.0, 64), (1e6, 64), (1e7, 50), (1e9, JUDGED)])
def test_fast_models_are_judged_on_more_samples(each_ns: float, count: int) -> None:
    graph = load_model(parse("g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }", opset=18))
    costs = SimpleNamespace(plain=lambda _sites: each_ns)
    trials: Any = SimpleNamespace(model=graph, style=style_named("x86-vnni"), costs=costs)
    assert Trials._affordable(trials) == count
