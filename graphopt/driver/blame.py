"""Which rewrites broke the numbers: by what lies where the results part, else by a binary search over replays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

from graphopt.driver.attempt import Attempt
from graphopt.rewrite import Gate, Rewrite

Replay: TypeAlias = Callable[[Gate], Attempt]
IsRight: TypeAlias = Callable[[Attempt], bool]


LATEST = 3
"""How many of the latest suspects are left out one at a time, before halves are."""


@dataclasses.dataclass(frozen=True)
class Blame:
    """The rewrites without which the result is right, and how many replays it took to find them.

    `rewrites` is empty when the result is wrong without any rewrite.
    """

    rewrites: tuple[Rewrite, ...]
    replays: int


def find_among(
    replay: Replay, is_right: IsRight, gate: Gate, suspects: Sequence[Rewrite]
) -> Blame | None:
    """The fewest of some rewrites without which the result is right; None where it is wrong without all of them.

    The latest few are tried one at a time first: what came before them is then the same in every replay, also where a
    pass chooses its places by counting.  Then halves are left out in turn while one of them suffices; where both are
    needed, one rewrite after the other is taken back in. Source: delta debugging (Zeller and Hildebrandt, IEEE TSE
    2002), specialised to few culprits.
    """
    replays = 0

    def suffices(some: Sequence[Rewrite]) -> bool:
        nonlocal replays
        replays += 1
        return is_right(replay(gate.without_all(some)))

    left_out = list(suspects)
    latest = left_out[: -LATEST - 1 : -1] if len(left_out) > 2 else []
    alone = next((each for each in latest if suffices([each])), None)
    if alone is not None:
        return Blame((alone,), replays)
    if not left_out or not suffices(left_out):
        return None
    while len(left_out) > 1:
        middle = len(left_out) // 2
        # Later ones first: leaving out what a wrong rewrite builds upon would prevent that too.
        half = next((h for h in (left_out[middle:], left_out[:middle]) if suffices(h)), None)
        if half is None:
            break
        left_out = half
    if len(left_out) > 1:
        for each in list(left_out):
            fewer = [other for other in left_out if other is not each]
            if len(fewer) > 0 and suffices(fewer):
                left_out = fewer
    return Blame(tuple(left_out), replays)


def find_guilty(replay: Replay, is_right: IsRight, gate: Gate, count: int) -> Blame:
    """Finds the first of `count` rewrites after which the result is wrong.

    Args:
        replay: runs the pipeline under a gate.
        is_right: whether what a replay gave computes what the original does.
        gate: the gate of the failed attempt.
        count: rewrites of the failed attempt; it is known to be wrong.

    The search keeps "right after `low`, wrong after `high`", about log2(count) replays.  The idea is LLVM's
    opt-bisect-limit.
    """
    replays = 0

    def probe(limit: int) -> Attempt:
        nonlocal replays
        replays += 1
        return replay(dataclasses.replace(gate, limit=limit))

    low, high, wrong = 0, count, None
    while high - low > 1:
        middle = (low + high) // 2
        made = probe(middle)
        if is_right(made):
            low = middle
        else:
            high, wrong = middle, made
    # That nothing at all is right was taken for granted; it matters where nothing else was found to be.
    if low == 0 and not is_right(probe(0)):
        return Blame((), replays)
    guilty = wrong if wrong is not None and high == len(wrong.rewrites) else probe(high)
    return Blame(tuple(guilty.rewrites[high - 1 : high]), replays)


def find_silent(
    replay: Callable[[Gate], Attempt],
    is_right: Callable[[Attempt], bool],
    gate: Gate,
    names: Sequence[str],
) -> str | None:
    """Finds the first pass that breaks the result although no rewrite is permitted.

    Args:
        replay: runs the pipeline under a gate.
        is_right: whether what a replay gave computes what the original does.
        gate: the gate of the failed attempt.
        names: the passes in order; with all of them the result is known to be wrong.

    Returns:
        the pass, or None when the result is wrong without any pass.
    """
    unique = tuple(dict.fromkeys(names))

    def right_with(count: int) -> bool:
        held = gate.passes | set(unique[count:])
        return is_right(replay(dataclasses.replace(gate, limit=0, passes=held)))

    if not right_with(0):
        return None
    low, high = 0, len(unique)
    while high - low > 1:
        middle = (low + high) // 2
        if right_with(middle):
            low = middle
        else:
            high = middle
    return unique[high - 1]
