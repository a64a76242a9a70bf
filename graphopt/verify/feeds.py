"""Inputs to compare models on: structured random ones, made to suit what each input is for."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.runtime.specs import Kind, TensorSpec, input_specs
from graphopt.verify import draws
from graphopt.verify.arrays import Masks, Request, Spread, Variation, make_array, make_map
from graphopt.verify.dims import Dims, DimSet
from graphopt.verify.domains import decides_sizes, input_domains
from graphopt.verify.draws import Draws
from graphopt.verify.empties import takes_empty
from graphopt.verify.feed_files import Feed, read_feeds
from graphopt.verify.roles import Role, Use, input_roles
from graphopt.verify.stated import stated_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from graphopt.verify.draws import Array

__all__ = ["Dropped", "Feed", "FoundFeeds", "find_feeds", "make_feeds", "read_feeds"]

MAX_ELEMENTS = 1 << 22
"""Of all inputs of one feed: beyond, a set of dimensions is not tried if a smaller one could be."""

MAX_LEAST_ELEMENTS = 1 << 28
"""Of the smallest feed that a model takes: beyond, none is made."""

MAX_ATTEMPTS = 64
"""Sets of dimensions tried before a model is given up as one that no generated feed can run."""

_CROWD_ELEMENTS = 1 << 17  # of all inputs: so many samples at once are cheap

_SAMPLES = 10  # streams from here on are further samples

_OVERRIDE_BYTES = 1 << 26  # overriding larger defaults would only test the copying of weights


MAX_SEEKS = 40
"""Feeds tried for the sake of a branch that no other feed takes."""

LARGE = "large"
_SCALED = (Variation("zeros", 0.0), Variation(LARGE, 30.0), Variation("tiny", 1e-4))

HUGE = "huge"
_SMALL = Variation("small", 2e-3)
_STRESS = (Variation(HUGE, 1e5), _SMALL, Variation("unit", spread=Spread.UNIT))
"""Beyond what half precision holds; small, but not lost beside a bias; as images and probabilities are, not below zero.
"""

STRESS = frozenset((*(variation.name for variation in _SCALED), HUGE, _SMALL.name))
"""Names of feeds that no user would make."""

_SHIFTS = tuple(
    sign * size for size in (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 1e4) for sign in (1, -1)
)


class Branches(Protocol):
    """Which ways a model has gone on the feeds so far."""

    def exist(self) -> bool:
        """Whether the model branches at all."""

    def missing(self) -> bool:
        """Whether some branch was never taken."""

    def takes_new(self, feed: Feed) -> bool:
        """Whether a feed runs and takes one that no feed before it took."""


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A generated feed that the original model refuses, and its words."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class FoundFeeds:
    """Feeds that the original model runs with, and those that it does not."""

    feeds: tuple[Feed, ...]
    dropped: tuple[Dropped, ...]


def make_feeds(
    model: ir.Model, *, seed: int = 0, dims: Mapping[str, int] | None = None
) -> list[Feed]:
    """Structured random feeds, as natural as the graph allows; none of them has been run.

    Each input draws from its own stream, keyed by seed and name, so feeds do not change when inputs
    are reordered. Floats are N(0, 1), once each all zero, large and tiny; ids stay within the tables
    they index; masks hide nothing, tails, a row, the future; symbolic dimensions are consistent over
    the inputs and come in several sets.

    Args:
        model: the original; only its graph is read, not its weights.
        seed: another seed gives other numbers in the same places.
        dims: sizes for symbolic dimensions that must be those.

    Raises:
        DataError: `dims` names a dimension that no input has.
    """
    return list(find_feeds(model, lambda _: None, seed=seed, dims=dims).feeds)


def find_feeds(  # noqa: PLR0913  what is known of the inputs, by keyword only
    model: ir.Model,
    refuses: Callable[[Feed], str | None],
    *,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    specs: Sequence[TensorSpec] | None = None,
    amend: Callable[[Feed], Feed] | None = None,
    thorough: bool = False,
    branches: Branches | None = None,
) -> FoundFeeds:
    """Feeds as `make_feeds` gives, each run through `refuses`; refused dimensions are replaced by others.

    Args:
        model: the original.
        refuses: runs one feed; says why it cannot be run, or None. Called once for each feed, so it may keep
            the outputs.
        seed: of the random numbers.
        dims: sizes for symbolic dimensions that must be those.
        specs: the inputs as the runtime sees them, where it knows more than the graph (map keys).
        amend: changes a feed before it is run, to what somebody knows of the inputs.
        thorough: more of what finds faults and of what nobody would calibrate on: huge numbers, numbers in [0, 1),
            where consumers expect them and where they should not be, around thresholds; long and empty dimensions.
        branches: looks for feeds that take the branches of `If` and `Loop` that no other feed takes; None for none.

    Raises:
        DataError: `dims` names a dimension that no input has.
    """
    maker = _Maker(model, seed, dims, specs, thorough=thorough)
    search = _Search(maker, refuses, amend)
    typical = search.first(maker.dims.first_choices())
    if typical is None:
        return FoundFeeds((), tuple(search.dropped))
    for variation in maker.variations(typical):
        search.attempt(typical, variation)
    for candidates in maker.further(typical):
        chosen = search.first(candidates)
        if chosen is not None and maker.has_masks:
            search.attempt(chosen, Variation(Masks.TAILS.value, masks=Masks.TAILS))
    if branches is not None and branches.exist():
        search.seek(branches, typical)
    return FoundFeeds(tuple(search.feeds), tuple(search.dropped))


class _Search:
    """Feeds tried so far, those that ran and those that did not."""

    def __init__(
        self,
        maker: _Maker,
        refuses: Callable[[Feed], str | None],
        amend: Callable[[Feed], Feed] | None,
    ) -> None:
        self._amend = amend
        self._maker = maker
        self._refuses = refuses
        self._tried: set[tuple[tuple[str, int], ...]] = set()
        self.feeds: list[Feed] = []
        self.dropped: list[Dropped] = []

    def first(self, candidates: Iterator[DimSet] | tuple[DimSet, ...]) -> DimSet | None:
        """The first set of dimensions that runs."""
        for count, dims in enumerate(candidates):
            if count >= MAX_ATTEMPTS:
                break
            if dims.sizes in self._tried:
                continue
            self._tried.add(dims.sizes)
            if any(self.attempt(dims, variation) for variation in self._maker.plain()):
                return dims
        return None

    def seek(self, branches: Branches, typical: DimSet) -> None:
        """Keeps feeds that take a branch which no other one takes, until none is missing.

        Numbers off the scale are tried with the other sign too: they may take the other branch.
        """
        for variation in self._maker.turned():
            self.attempt(typical, variation)
        tries = [(typical, variation) for variation in self._maker.seeking()]
        tries += [(dims, Variation()) for dims in self._maker.dims.seeking(typical)]
        for dims, variation in tries[:MAX_SEEKS]:
            if not branches.missing():
                return
            if self._maker.elements(dims) > MAX_ELEMENTS:
                continue
            feed = self._made(dims, variation)
            if branches.takes_new(feed):
                self.feeds.append(feed)

    def attempt(self, dims: DimSet, variation: Variation) -> bool:
        """Whether one feed runs; it is kept if so, else dropped with the reason."""
        name = _name(dims, variation)
        limit = MAX_ELEMENTS if self._maker.can_shrink(dims) else MAX_LEAST_ELEMENTS
        if self._maker.elements(dims) > limit:
            self.dropped.append(Dropped(name, f"more than {limit} elements"))
            return False
        feed = self._made(dims, variation)
        reason = self._refuses(feed)
        if reason is not None:
            self.dropped.append(Dropped(name, reason))
            return False
        self.feeds.append(feed)
        return True

    def _made(self, dims: DimSet, variation: Variation) -> Feed:
        feed = Feed(_name(dims, variation), self._maker.feed(dims, variation))
        return feed if self._amend is None else self._amend(feed)


def _name(dims: DimSet, variation: Variation) -> str:
    return f"{variation.name}, {dims}" if dims.sizes else variation.name


class _Maker:
    """Makes the values of every input for a set of dimensions and a variation."""

    def __init__(
        self,
        model: ir.Model,
        seed: int,
        fixed: Mapping[str, int] | None,
        specs: Sequence[TensorSpec] | None,
        *,
        thorough: bool,
    ) -> None:
        declared = input_specs(model)
        runtime = {spec.name: spec for spec in specs or ()}
        self._specs = tuple(
            runtime.get(spec.name, spec) if spec.kind is Kind.OPAQUE else spec for spec in declared
        )
        self._seed = seed
        self._thorough = thorough
        self._roles = input_roles(model)
        self._domains = input_domains(model)
        self._decides_sizes = decides_sizes(model)
        self._may_be_empty = thorough and takes_empty(model)
        self._defaults = {value.name or "": value for value in model.graph.inputs}
        required = [spec for spec in self._specs if not spec.overridable]
        self.dims = Dims(required, fixed, stated_sizes(model))
        uses = {self._roles[spec.name].use for spec in self._specs if not spec.overridable}
        self.has_masks = bool(uses & {Use.MASK, Use.ADDITIVE_MASK})
        self._has_flags = bool(uses & {Use.FLAG, Use.CHOICE})

    def plain(self) -> Iterator[Variation]:
        """Variations to look for dimensions with: some choices go with some dimensions only."""
        yield Variation()
        if self._has_flags:
            yield Variation("choice 1", choice=1)

    def variations(self, dims: DimSet) -> Iterator[Variation]:
        """What else to try with dimensions that run."""
        numbers = [spec for spec in self._specs if self._scales(spec)]
        yield from _SCALED if numbers else (Variation("other numbers", stream=1),)
        yield from self._thoroughly(numbers) if self._thorough else ()
        if (
            self._thorough
            and numbers
            and not self.dims.sorts
            and self.elements(dims) <= _CROWD_ELEMENTS
        ):
            # One sample at a time, and no more of them: what is dead on one may be alive on another.
            yield from (Variation(f"sample {n}", stream=_SAMPLES + n) for n in range(2, 6))
            yield Variation("sparse", spread=Spread.SPARSE)
        if self.has_masks:
            yield Variation(Masks.TAILS.value, masks=Masks.TAILS)
            yield Variation(Masks.ONE_ROW.value, masks=Masks.ONE_ROW)
            if any(self._is_square(spec, dims) for spec in self._specs):
                yield Variation(Masks.FUTURE.value, masks=Masks.FUTURE)
        for choice in range(1, self._choices()):
            yield Variation(f"choice {choice}", choice=choice)
        if any(spec.kind.optional for spec in self._specs):
            yield Variation("optionals absent", stream=-1)
        if any(self._overrides(spec) for spec in self._specs):
            yield Variation("defaults overridden", override=True)

    def _thoroughly(self, numbers: Sequence[TensorSpec]) -> Iterator[Variation]:
        """What stresses a model without telling how it is used."""
        domains = [self._domains[spec.name] for spec in numbers]
        halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if numbers:
            yield from (v for v in _STRESS if v.name != HUGE or numbers[0].dtype not in halves)
        if any(domain.usual for domain in domains):
            yield Variation("usual", spread=Spread.USUAL)
        if any(domain.limited for domain in domains):
            yield Variation("anywhere", spread=Spread.ANYWHERE)
        if any(self._roles[spec.name].choices for spec in numbers):
            yield Variation("turning", spread=Spread.TURNING)
        if any(self._is_wide(spec) for spec in self._specs):
            yield Variation("wide integers", wide=True)

    def turned(self) -> Iterator[Variation]:
        """The large ones, turned around."""
        if any(self._scales(spec) for spec in self._specs):
            yield Variation("large", -30.0)
            yield Variation(HUGE, -1e5)

    def seeking(self) -> Iterator[Variation]:
        """What may take another branch: other numbers, and numbers elsewhere on the line."""
        for stream in range(1, 5):
            yield Variation(f"other numbers {stream}", stream=stream)
        if any(self._scales(spec) for spec in self._specs):
            for shift in _SHIFTS:
                yield Variation(f"around {shift:g}", scale=max(1.0, abs(shift) / 8), shift=shift)

    def further(self, typical: DimSet) -> Iterator[tuple[DimSet, ...]]:
        """Further sets of dimensions: for each, what to try in turn until one runs."""
        yield from self.dims.further(typical)
        if not self._thorough:
            return
        yield self.dims.long(typical)
        yield self.dims.longer(typical)
        yield tuple(d for d in self.dims.crowds(typical) if self.elements(d) <= _CROWD_ELEMENTS)
        if self._may_be_empty:
            yield self.dims.empty(typical)

    def can_shrink(self, dims: DimSet) -> bool:
        """Whether some dimension could be smaller."""
        return any(size > 1 and name not in self.dims.fixed for name, size in dims.sizes)

    def elements(self, dims: DimSet) -> int:
        """Elements of all inputs together."""
        required = [spec for spec in self._specs if not spec.overridable]
        return sum(math.prod(self.dims.shape(spec, dims) or ()) for spec in required)

    def feed(self, dims: DimSet, variation: Variation) -> dict[str, Any]:
        """The values of every input that must be fed, and of the overridable ones where varied."""
        fed = [
            s
            for s in self._specs
            if not s.overridable or (variation.override and self._overrides(s))
        ]
        return {spec.name: self._value(spec, dims, variation) for spec in fed}

    def _value(self, spec: TensorSpec, dims: DimSet, variation: Variation) -> Any:  # noqa: ANN401
        stream = Draws(
            self._seed, f"{spec.name}#{variation.stream}" if variation.stream else spec.name
        )
        if spec.overridable:
            return self._overridden(spec, stream)
        if spec.kind.optional and variation.stream < 0:
            return None
        shape = self.dims.shape(spec, dims)
        role = self._roles[spec.name]
        bound = self._bound(role, dims)
        if shape is None:
            # The rank is unknown: a square matrix is what most operators take, products of inputs too.
            shape = (4, 4)
        request = Request(
            spec.dtype,
            shape,
            role,
            bound,
            variation,
            self._domains[spec.name],
            spec.name in self._decides_sizes,
        )
        if spec.kind in {Kind.SEQUENCE, Kind.OPTIONAL_SEQUENCE}:
            return [make_array(request, stream) for _ in range(3)]
        if spec.kind in {Kind.MAP, Kind.SEQUENCE_OF_MAPS}:
            one = make_map(spec, stream)
            return one if spec.kind is Kind.MAP else [one]
        return make_array(request, stream)

    def _bound(self, role: Role, dims: DimSet) -> int | None:
        resolved = [b if isinstance(b, int) else self.dims.resolve(b, dims) for b in role.bounds]
        known = [bound for bound in resolved if bound is not None]
        if known:
            return min(known)
        # A table whose length nobody states has at least one row.
        return 1 if role.use is Use.INDEX else None

    def _overridden(self, spec: TensorSpec, stream: Draws) -> Array:
        default = self._defaults[spec.name].const_value
        assert default is not None, "only inputs with a default are overridable"
        array = np.asarray(default.numpy())
        noise = 1 + 0.25 * stream.normal(array.shape)
        return draws.cast(array.astype(np.float64) * noise, spec.dtype)

    def _overrides(self, spec: TensorSpec) -> bool:
        """Whether a default may be replaced by other numbers without breaking the model: floats only."""
        if not spec.overridable or not spec.dtype.is_floating_point():
            return False
        default = self._defaults[spec.name].const_value
        return default is not None and 0 < default.nbytes <= _OVERRIDE_BYTES

    def _scales(self, spec: TensorSpec) -> bool:
        use = self._roles[spec.name].use
        return use is Use.NUMBER and spec.dtype.is_floating_point() and not spec.overridable

    def _is_wide(self, spec: TensorSpec) -> bool:
        """Whether an integer input may hold any number."""
        is_number = self._roles[spec.name].use is Use.NUMBER and not spec.overridable
        free = is_number and spec.name not in self._decides_sizes
        return free and spec.dtype.is_integer() and spec.dtype.bitwidth > 8

    def _choices(self) -> int:
        """How many ways there are to choose constants and conditions, all inputs at once; at most five."""
        counts = [1]
        for spec in self._specs:
            role = self._roles[spec.name]
            if role.use is Use.FLAG:
                counts.append(2)
            elif role.choices and not spec.overridable:
                counts.append(len(role.choices))
        return min(max(counts), 5)

    def _is_square(self, spec: TensorSpec, dims: DimSet) -> bool:
        shape = self.dims.shape(spec, dims) or ()
        masks = {Use.MASK, Use.ADDITIVE_MASK}
        return (
            self._roles[spec.name].use in masks and len(shape) >= 2 and shape[-1] == shape[-2] > 1
        )
