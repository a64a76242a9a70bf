"""The searches for the guilty, on runs that are played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from graphopt.driver.attempt import Attempt
from graphopt.driver.blame import find_among, find_guilty, find_silent
from graphopt.numerics import Numerics
from graphopt.rewrite import Gate, Rewrite

REWRITES = [Rewrite("p", "r", f"v{i}", Numerics.EXACT) for i in range(20)]


def replay(gate: Gate) -> Attempt:
    """What a pipeline of the twenty rewrites makes of a gate; passes a, b and c ask for nothing."""
    made: list[Rewrite] = []
    for rewrite in REWRITES:
        if gate.allows(rewrite, len(made)):
            made.append(rewrite)
    ran = [name for name in "abc" if name not in gate.passes]
    return cast("Attempt", SimpleNamespace(rewrites=tuple(made), ran=ran))


def right_without(*bad: int) -> Any:
    return lambda made: not {REWRITES[i] for i in bad} & set(made.rewrites)


@pytest.mark.parametrize("bad", [0, 1, 9, 18, 19])
def test_the_one_guilty_rewrite_is_found(bad: int) -> None:
    blame = find_guilty(replay, right_without(bad), Gate(), len(REWRITES))
    assert blame.rewrites == (REWRITES[bad],)
    assert blame.replays <= 7


def test_of_several_the_first_is_found() -> None:
    assert find_guilty(replay, right_without(5, 11), Gate(), 20).rewrites == (REWRITES[5],)


def test_what_the_gate_leaves_out_is_not_searched() -> None:
    gate = Gate().without(REWRITES[5])
    assert find_guilty(replay, right_without(5, 11), gate, 19).rewrites == (REWRITES[11],)


def test_wrong_without_any_rewrite_blames_none() -> None:
    assert find_guilty(replay, lambda _made: False, Gate(), 20).rewrites == ()
    assert find_guilty(replay, lambda _made: False, Gate(), 0).rewrites == ()


@pytest.mark.parametrize("bad", [(3,), (0, 9), (4, 5)])
def test_the_fewest_of_some_suspects(bad: tuple[int, ...]) -> None:
    blame = find_among(replay, right_without(*bad), Gate(), REWRITES[:10])
    assert blame is not None
    assert blame.rewrites == tuple(REWRITES[i] for i in bad)


def test_what_a_guilty_rewrite_builds_upon_is_not_blamed() -> None:
    """Without 3 there would be no 6: leaving out either mends the result, and 6 is wrong."""

    def dependent(gate: Gate) -> Attempt:
        made = list(replay(gate).rewrites)
        kept = [r for r in made if r != REWRITES[6] or REWRITES[3] in made]
        return cast("Attempt", SimpleNamespace(rewrites=tuple(kept)))

    blame = find_among(dependent, right_without(6), Gate(), REWRITES[2:8])
    assert blame is not None
    assert blame.rewrites == (REWRITES[6],)


def test_suspects_who_are_innocent() -> None:
    assert find_among(replay, right_without(15), Gate(), REWRITES[:10]) is None
    assert find_among(replay, right_without(15), Gate(), []) is None


@pytest.mark.parametrize("bad", "abc")
def test_the_silent_pass_is_found(bad: str) -> None:
    def is_right(made: Any) -> bool:
        return bad not in made.ran and not made.rewrites

    assert find_silent(replay, is_right, Gate(), ["a", "b", "c", "a"]) == bad


def test_no_silent_pass_is_blamed_for_what_loading_did() -> None:
    assert find_silent(replay, lambda _made: False, Gate(), ["a", "b"]) is None
