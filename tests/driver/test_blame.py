"""The search for guilty rewrites, on replays that are made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import pytest

from graphopt.driver.attempt import Attempt
from graphopt.driver.blame import find_among, find_guilty
from graphopt.numerics import Numerics
from graphopt.rewrite import Gate, Rewrite

ALL = tuple(Rewrite("p", "r", str(index), Numerics.EXACT) for index in range(20))


@dataclasses.dataclass(frozen=True)
class Made:
    """Stands for an attempt: what it did."""

    rewrites: tuple[Rewrite, ...]


def replay(gate: Gate) -> Attempt:
    done: list[Rewrite] = []
    for each in ALL:
        if gate.allows(each, len(done)):
            done.append(each)
    return cast("Attempt", Made(tuple(done)))


def without(*guilty: int) -> Callable[[Attempt], bool]:
    return lambda made: not any(int(each.site) in guilty for each in made.rewrites)


@pytest.mark.parametrize("guilty", range(20))
def test_the_first_guilty_rewrite_is_found_in_few_replays(guilty: int) -> None:
    blame = find_guilty(replay, without(guilty, 19), Gate(), len(ALL))
    assert blame.rewrites == (ALL[guilty],)
    assert blame.replays <= 7


def test_no_rewrite_is_blamed_for_what_is_wrong_without() -> None:
    assert find_guilty(replay, lambda _: False, Gate(), len(ALL)).rewrites == ()


@pytest.mark.parametrize("guilty", [(3,), (7,), (3, 4), (3, 7), (3, 5, 7)])
def test_guilty_suspects_are_told_from_innocent_ones(guilty: tuple[int, ...]) -> None:
    blame = find_among(replay, without(*guilty), Gate(), ALL[3:8])
    assert blame is not None
    assert [int(each.site) for each in blame.rewrites] == list(guilty)


def test_innocent_suspects_give_nothing() -> None:
    assert find_among(replay, without(1), Gate(), ALL[3:8]) is None
    assert find_among(replay, without(1), Gate(), ()) is None
