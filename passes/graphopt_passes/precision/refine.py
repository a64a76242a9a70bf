"""Which nodes go back to float32 so that the whole stays within its budget, found by experiment."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from typing import Protocol

TARGET = 0.85
"""Of the budget: what the experiments aim at, because the emitted graph rounds a little differently."""

MAX_RUNS = 96
MAX_PRUNED = 8
PARTS = 8
AMPLIFIED = "amplified: on these inputs rounding anywhere here exceeds the budget"


class Experiment(Protocol):
    """What refinement asks: how bad a choice of half nodes is, over what the budget allows."""

    runs: int

    def badness(self, low: Sequence[bool]) -> float:
        """At most 1 within the budget; inf where non-finite values appear or vanish."""

    def survey(self, low: Sequence[bool]) -> float:
        """The same, on everything there is to try."""


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What experiments said.

    Attributes:
        raised: gates that go back to float32, with the reason.
        before: badness with all in half.
        after: badness with `raised` in float32.
        runs: experiments made.
    """

    raised: dict[int, str]
    before: float
    after: float
    runs: int


def refine(count: int, experiment: Experiment) -> Refinement:
    """The gates to raise among `count`, few and those that matter most.

    Overflow first, by bisection over prefixes: the first node whose rounding makes a non-finite value.  Then errors:
    independent roundings add up as a root of a sum of squares, so blocks are split where most of it comes from.
    """
    low = [True] * count
    raised: dict[int, str] = {}
    before = after = experiment.survey(low)
    while after > TARGET and experiment.runs < MAX_RUNS and any(low):
        known = len(raised)
        _raise_overflows(low, raised, experiment)
        after = experiment.badness(low)
        if TARGET < after < math.inf and not _amplifies(low, raised, after, experiment):
            _lower_error(low, raised, after, experiment)
        after = experiment.survey(low)
        if len(raised) == known:
            break
    if before > TARGET >= after and AMPLIFIED not in raised.values():
        _prune(low, raised, experiment)
        after = experiment.survey(low)
    return Refinement(raised, before, after, experiment.runs)


def _raise_overflows(low: list[bool], raised: dict[int, str], experiment: Experiment) -> None:
    while experiment.runs < MAX_RUNS and any(low) and math.isinf(experiment.badness(low)):
        culprit = _first_overflow(low, experiment)
        low[culprit] = False
        raised[culprit] = "overflow: found by bisection"


def _first_overflow(low: Sequence[bool], experiment: Experiment) -> int:
    """The last node of the shortest prefix that makes a non-finite value; prefixes only get worse."""
    places = [index for index, flag in enumerate(low) if flag]
    good, bad = 0, len(places)
    while bad - good > 1:
        middle = (good + bad) // 2
        if math.isinf(experiment.badness(_only(places[:middle], len(low)))):
            bad = middle
        else:
            good = middle
    return places[bad - 1]


def _only(places: Sequence[int], count: int) -> list[bool]:
    kept = set(places)
    return [index in kept for index in range(count)]


def _amplifies(
    low: list[bool], raised: dict[int, str], error: float, experiment: Experiment
) -> bool:
    """Whether most parts of the model exceed the budget by themselves; then all parts but those that fit are raised.

    Searching single nodes in a model that amplifies every rounding would take as many runs as it has nodes.
    """
    places = [index for index, flag in enumerate(low) if flag]
    if error < PARTS or len(places) < 2 * PARTS or raised:
        return False
    parts = [
        places[i * len(places) // PARTS : (i + 1) * len(places) // PARTS] for i in range(PARTS)
    ]
    errors = [experiment.badness(_only(part, len(low))) for part in parts]
    if sum(each > 1 for each in errors) <= PARTS // 2:
        return False
    room = TARGET**2
    for each, part in sorted(zip(errors, parts, strict=True)):
        room -= each**2
        if room < 0:
            for place in part:
                low[place] = False
                raised[place] = AMPLIFIED
    return True


def _lower_error(
    low: list[bool], raised: dict[int, str], error: float, experiment: Experiment
) -> None:
    """Raises the nodes that most of the error comes from."""
    blocks = [(-error, [index for index, flag in enumerate(low) if flag])]
    while blocks and experiment.runs < MAX_RUNS:
        error, block = heapq.heappop(blocks)
        if len(block) > 1:
            middle = len(block) // 2
            for part in (block[:middle], block[middle:]):
                heapq.heappush(blocks, (-experiment.badness(_only(part, len(low))), part))
            continue
        low[block[0]] = False
        raised[block[0]] = f"sensitivity: alone it takes {-error:.2g} of the budget"
        total = sum(each**2 for each, _ in blocks)
        if total <= TARGET**2 and experiment.badness(low) <= TARGET:
            return


def _prune(low: list[bool], raised: dict[int, str], experiment: Experiment) -> None:
    """Lowers again what turned out not to be needed, the latest raised first."""
    for place in list(reversed(raised))[:MAX_PRUNED]:
        if experiment.runs >= MAX_RUNS:
            break
        low[place] = True
        if experiment.badness(low) <= TARGET:
            del raised[place]
        else:
            low[place] = False
