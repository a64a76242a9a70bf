"""Which nodes go back to float32 so that the whole stays within its budget, found by experiment."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

TARGET = 0.85
"""Of the budget: what the experiments aim at, because the emitted graph rounds a little differently."""

MAX_RUNS = 96
MAX_PRUNED = 24
PARTS = 8
AMPLIFIED = "amplified: on these inputs rounding here alone takes"


class Experiment(Protocol):
    """What refinement asks: how bad a choice of half nodes is, over what the budget allows."""

    runs: int

    def badness(self, low: Sequence[bool]) -> float:
        """At most 1 within the budget; inf where non-finite values appear or vanish."""

    def survey(self, low: Sequence[bool]) -> float:
        """The same, on everything there is to try."""

    def words(self) -> str:
        """What the last survey found, as a budget that would accept it; "" where none would."""


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What experiments said.

    Attributes:
        raised: gates that go back to float32, with the reason.
        before: badness with all in half.
        after: badness with `raised` in float32.
        runs: experiments made.
        accepting: the budget that would accept all in half, or "".
    """

    raised: dict[int, str]
    before: float
    after: float
    runs: int
    accepting: str = ""


def refine(
    count: int,
    experiment: Experiment,
    *,
    limit: int = MAX_RUNS,
    raised: Mapping[int, str] | None = None,
) -> Refinement:
    """The gates to raise among `count`, few and those that matter most.

    Overflow first, by bisection over prefixes: the first node whose rounding makes a non-finite value.  Then errors:
    independent roundings add up as a root of a sum of squares, so blocks are split where most of it comes from.

    Args:
        count: how many gates there are.
        experiment: what they do.
        limit: of experiments, those made before included.
        raised: gates that are in float32 from the start.
    """
    search = _Search(count, dict(raised or {}), experiment, limit)
    before = search.survey()
    accepting = experiment.words()
    after = search.run(before)
    return Refinement(search.raised, before, after, experiment.runs, accepting)


@dataclasses.dataclass
class _Search:
    """One search: which gates are raised so far."""

    count: int
    raised: dict[int, str]
    experiment: Experiment
    limit: int
    _blocks: list[tuple[float, list[int]]] = dataclasses.field(default_factory=list)

    @property
    def low(self) -> list[bool]:
        """The gates in half."""
        return [index not in self.raised for index in range(self.count)]

    @property
    def places(self) -> list[int]:
        """Their indices."""
        return [index for index in range(self.count) if index not in self.raised]

    @property
    def is_spent(self) -> bool:
        """Whether no more experiments may be made."""
        return self.experiment.runs >= self.limit

    def survey(self) -> float:
        """How bad the present choice is on every feed."""
        return self.experiment.survey(self.low)

    def badness(self) -> float:
        """How bad it is on the feeds that matter most."""
        return self.experiment.badness(self.low)

    def alone(self, places: Sequence[int]) -> float:
        """How bad it is when these gates alone are in half."""
        kept = set(places)
        return self.experiment.badness([index in kept for index in range(self.count)])

    def run(self, before: float) -> float:
        """Raises gates until the rest is within the budget; returns how bad that is."""
        after, start = before, len(self.raised)
        amplified = False
        while after > TARGET and not self.is_spent and self.places:
            known = len(self.raised)
            self._raise_overflows()
            after = self.badness()
            if TARGET < after < math.inf:
                amplified = amplified or self._amplifies(after)
                if not amplified:
                    self._lower_error(after)
                elif len(self.raised) == known:
                    self._raise_worst()
            after = self.survey()
            if len(self.raised) == known:
                break
        while after > TARGET and self.places:
            self._raise_worst()  # nothing left to find out with: the rest is cut by halves
            after = self.survey()
        if before > TARGET >= after and not amplified and len(self.raised) > start:
            self._prune()
            after = self.survey()
        return after

    def _raise_overflows(self) -> None:
        while not self.is_spent and self.places and math.isinf(self.badness()):
            self.raised[self._first_overflow()] = "overflow: found by bisection"

    def _first_overflow(self) -> int:
        """The last gate of the shortest prefix that makes a non-finite value; prefixes only get worse."""
        places = self.places
        good, bad = 0, len(places)
        while bad - good > 1:
            middle = (good + bad) // 2
            if math.isinf(self.alone(places[:middle])):
                bad = middle
            else:
                good = middle
        return places[bad - 1]

    def _amplifies(self, error: float) -> bool:
        """Whether most parts of the model exceed the budget by themselves; then only blocks that fit stay in half.

        Searching single nodes in a model that amplifies every rounding would raise one after the other.
        """
        if error < PARTS or len(self.places) < 2 * PARTS or self.raised:
            return False
        parts = _split(self.places, PARTS)
        if sum(self.alone(part) > 1 for part in parts) <= PARTS // 2:
            return False
        self._keep_quiet_blocks()
        return True

    def _keep_quiet_blocks(self) -> None:
        """Keeps the blocks in half that together stay within the budget, the quietest first."""
        count = max(PARTS, min(len(self.places), (self.limit - self.experiment.runs) * 3 // 4))
        blocks = _split(self.places, count)
        room = TARGET**2
        for error, block in sorted((self.alone(block), block) for block in blocks):
            room -= error**2
            if room < 0:
                self._raise(block, f"{AMPLIFIED} {error:.2g} of the budget")

    def _raise_worst(self) -> None:
        """Raises the quarter of what is left that most of the error comes from."""
        parts = _split(self.places, 4)
        error, part = max((self.alone(part), part) for part in parts)
        self._raise(part, f"sensitivity: together with others it takes {error:.2g} of the budget")

    def _raise(self, places: Sequence[int], reason: str) -> None:
        self.raised |= dict.fromkeys(places, reason)

    def _lower_error(self, error: float) -> None:
        """Raises the nodes that most of the error comes from."""
        self._blocks = self._blocks or [(-error, self.places)]
        while self._blocks and not self.is_spent:
            error, block = heapq.heappop(self._blocks)
            block = [place for place in block if place not in self.raised]
            if len(block) > 1:
                for part in _split(block, 2):
                    heapq.heappush(self._blocks, (-self.alone(part), part))
                continue
            self._raise(block, f"sensitivity: alone it takes {-error:.2g} of the budget")
            if block and self.badness() <= TARGET:
                return

    def _prune(self) -> None:
        """Lowers again what turned out not to be needed, the latest raised first."""
        for place in list(reversed(self.raised))[:MAX_PRUNED]:
            if self.experiment.runs >= self.limit + MAX_PRUNED:
                break
            reason = self.raised.pop(place)
            if self.badness() > TARGET:
                self.raised[place] = reason


def _split(places: Sequence[int], count: int) -> list[list[int]]:
    """The places in `count` runs of about the same length, none of them empty."""
    size = len(places)
    cuts = [size * index // count for index in range(count + 1)]
    return [list(places[a:b]) for a, b in itertools.pairwise(cuts) if a < b]
