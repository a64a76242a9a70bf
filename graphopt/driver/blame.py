"""Which rewrite broke the numbers: a binary search over how many rewrites a replay may make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from graphopt.driver.attempt import Attempt
from graphopt.rewrite import Gate, Rewrite


@dataclasses.dataclass(frozen=True)
class Blame:
    """The first rewrite with which the result is wrong, and how many replays it took to find.

    `rewrite` is None when the result is wrong without any rewrite: loading or writing is at fault.
    """

    rewrite: Rewrite | None
    replays: int


def find_guilty(
    replay: Callable[[Gate], Attempt],
    is_right: Callable[[Attempt], bool],
    gate: Gate,
    count: int,
) -> Blame:
    """Finds the first of `count` rewrites after which the result is wrong.

    Args:
        replay: runs the pipeline under a gate.
        is_right: whether what a replay gave computes what the original does.
        gate: the gate of the failed attempt.
        count: rewrites of the failed attempt; it is known to be wrong.

    The search keeps "right after `low`, wrong after `high`", about log2(count) replays.  The idea is LLVM's
    opt-bisect-limit.
    """

    def probe(limit: int) -> Attempt:
        return replay(dataclasses.replace(gate, limit=limit))

    replays = 1
    if not is_right(probe(0)):
        return Blame(None, replays)
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        replays += 1
        if is_right(probe(middle)):
            low = middle
        else:
            high = middle
    guilty = probe(high)
    return Blame(guilty.rewrites[high - 1], replays + 1)
