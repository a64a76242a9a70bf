"""Which nodes go back to float32 so that the whole stays within its budget, found by experiment."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

TARGET = 0.75
"""Of the budget: what the experiments aim at, because the emitted graph rounds a little differently."""

MAX_RUNS = 96
MAX_PRUNED = 24
PRUNED = 4
"""Part of the experiments allowed that may go into lowering again, where that is more than `MAX_PRUNED`."""
ATTEMPTS = 8
"""Choices of what to raise that are tried between too few and enough, with the same measurements."""

AMPLIFIED = 0.5
"""Share of the gates that goes back to float32 from which on the model is said to amplify rounding."""


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
class Trait:
    """What is known of a gate before any experiment.

    Attributes:
        gain: what it saves in half, in any unit.
        kind: its operator: gates of one kind often err alike, and are measured together first.
    """

    gain: float = 1.0
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What experiments said.

    Attributes:
        raised: gates that go back to float32, with the reason.
        amplified: whether that is most of them, for the errors that they make.
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
    amplified: bool = False


@dataclasses.dataclass(frozen=True)
class _Block:
    """Gates that are measured together, and how bad they are when they alone are in half."""

    error: float
    places: tuple[int, ...]
    gain: float

    @property
    def price(self) -> float:
        """Error for each unit of gain."""
        return self.error**2 / self.gain


def refine(
    count: int,
    experiment: Experiment,
    *,
    limit: int = MAX_RUNS,
    raised: Mapping[int, str] | None = None,
    traits: Sequence[Trait] = (),
    target: float = TARGET,
) -> Refinement:
    """The gates to raise among `count`: those that err most for what they gain, and few.

    Overflow first, by bisection over prefixes: the first node whose rounding makes a non-finite value.  Then errors:
    independent roundings add up as a root of a sum of squares.  Blocks are split where most of the error comes from
    and, where that is nearly everywhere, where a half of a block may yet fit; then the blocks with the most error for
    their gain are raised until the rest is within the budget, and lowered again where that turns out to be too many.

    Args:
        count: how many gates there are.
        experiment: what they do.
        limit: of experiments, those made before included.
        raised: gates that are in float32 from the start.
        traits: of each gate; all the same without.
        target: of the budget, what the rest may take.
    """
    given = dict(raised or {})
    search = _Search(count, given, experiment, limit, traits or [Trait()] * count, target)
    before = search.survey()
    accepting = experiment.words()
    after = search.run(before)
    amplified = len(search.raised) - search.start > AMPLIFIED * count
    return Refinement(search.raised, before, after, experiment.runs, accepting, amplified)


@dataclasses.dataclass
class _Search:
    """One search: which gates are raised so far."""

    count: int
    raised: dict[int, str]
    experiment: Experiment
    limit: int
    traits: Sequence[Trait]
    target: float
    start: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Remembers how many gates are raised from the start."""
        self.start = len(self.raised)

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
        after = before
        while after > self.target and not self.is_spent and self.places:
            known = len(self.raised)
            self._raise_overflows()
            after = self.badness()
            if self.target < after < math.inf:
                self._lower_error(after)
            after = self.survey()
            if len(self.raised) == known:
                break
        while after > self.target and self.places:
            self._raise_worst()  # nothing left to find out with: the rest is cut by quarters
            after = self.survey()
        if before > self.target >= after and len(self.raised) > self.start:
            after = self._prune(after)
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

    def _lower_error(self, error: float) -> None:
        """Raises the blocks with the most error for what they gain, no more than it takes."""
        blocks, start = self._measured(error), self.raised
        order = sorted(blocks, key=lambda block: -block.price)

        def suffices(count: int) -> bool:
            self.raised = start | _raised(order[:count])
            return self.badness() <= self.target

        few, many, room = 0, len(_choice(blocks, self.target)), self.target
        while many < len(order) and not self.is_spent and not suffices(many):
            few, room = many, room / 2  # the sum of squares is a model, and wrong here
            many = max(many + 1, len(_choice(blocks, room)))
        for _ in range(ATTEMPTS):
            if many - few <= 1 or self.is_spent:
                break
            middle = (few + many) // 2
            few, many = (few, middle) if suffices(middle) else (middle, many)
        self.raised = start | _raised(order[:many])

    def _measured(self, error: float) -> list[_Block]:
        """Blocks that cover all places, measured alone, small where it matters.

        Where few gates make most of the error, halving finds them; else all are measured, in pieces as small as the
        experiments allow.
        """
        start = self.experiment.runs
        last = start + (self.limit - start) * 4 // 5  # leaves some to check the choice
        blocks = self._halved(self._by_kind(error), start + (last - start) // 3)
        wide = [block for block in blocks if len(block.places) > 1]
        if not any(block in wide for block in _choice(blocks, self.target)):
            return blocks
        size, room = sum(len(block.places) for block in wide), max(last - self.experiment.runs, 1)
        for block in wide:
            pieces = min(len(block.places), max(1, len(block.places) * room // size))
            if pieces > 1:
                blocks.remove(block)
                blocks += [self._alone(part) for part in _split(block.places, pieces)]
        return blocks

    def _by_kind(self, error: float) -> list[_Block]:
        """A block for each kind of gate; they need not be neighbours."""
        groups: dict[str, list[int]] = {}
        for place in self.places:
            groups.setdefault(self.traits[place].kind, []).append(place)
        if len(groups) == 1:
            return [self._block(self.places, error)]
        return [self._alone(group) for group in groups.values()]

    def _halved(self, blocks: list[_Block], last: int) -> list[_Block]:
        """The blocks, those halved again and again that have to be raised and err most."""
        while self.experiment.runs < last:
            chosen = [block for block in _choice(blocks, self.target) if len(block.places) > 1]
            if not chosen:
                break
            worst = max(chosen, key=lambda block: block.error)
            blocks.remove(worst)
            blocks += [self._alone(part) for part in _split(worst.places, 2)]
        return blocks

    def _alone(self, places: Sequence[int]) -> _Block:
        return self._block(places, self.alone(places))

    def _block(self, places: Sequence[int], error: float) -> _Block:
        return _Block(error, tuple(places), sum(self.traits[place].gain for place in places))

    def _raise_worst(self) -> None:
        """Raises the quarter of what is left that most of the error comes from."""
        parts = _split(self.places, 4)
        error, part = max((self.alone(part), part) for part in parts)
        self.raised |= _raised([self._block(part, error)])

    def _prune(self, before: float) -> float:
        """Lowers again what turned out not to be needed, the latest raised first; returns how bad that is."""
        known, most = dict(self.raised), max(MAX_PRUNED, self.limit // PRUNED)
        for place in list(reversed(known))[:most]:
            if self.experiment.runs >= self.limit + most:
                break
            reason = self.raised.pop(place)
            if self.badness() > self.target:
                self.raised[place] = reason
        after = self.survey() if len(self.raised) < len(known) else before
        if after > self.target:  # on a feed that experiments did not run on
            self.raised = known
        return min(after, before)


def _choice(blocks: Sequence[_Block], room: float) -> list[_Block]:
    """The blocks to raise so that the others together stay within `room`: the most error for the gain."""
    order = sorted(blocks, key=lambda block: block.price)
    total = 0.0
    for index, block in enumerate(order):
        total += block.error**2
        if total > room**2:
            return order[index:]
    return []


def _raised(blocks: Sequence[_Block]) -> dict[int, str]:
    return {place: _reason(block) for block in blocks for place in block.places}


def _reason(block: _Block) -> str:
    mates = len(block.places) - 1
    who = f"with {mates} others" if mates else "alone"
    return f"sensitivity: {who} it takes {block.error:.2g} of the budget"


def _split(places: Sequence[int], count: int) -> list[list[int]]:
    """The places in `count` runs of about the same length, none of them empty."""
    size = len(places)
    cuts = [size * index // count for index in range(count + 1)]
    return [list(places[a:b]) for a, b in itertools.pairwise(cuts) if a < b]
