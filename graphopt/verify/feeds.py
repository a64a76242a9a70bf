"""Inputs to compare models on: structured random ones, made to suit what each input is for."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.runtime.specs import Kind, TensorSpec, input_specs
from graphopt.verify import draws
from graphopt.verify.dims import Dims, DimSet
from graphopt.verify.draws import Draws
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

_OVERRIDE_BYTES = 1 << 26  # overriding larger defaults would only test the copying of weights


class Masks(enum.Enum):
    """What masks hide."""

    NOTHING = "all ones"
    TAILS = "prefix masks"
    ONE_ROW = "one row masked"
    FUTURE = "causal masks"


@dataclasses.dataclass(frozen=True)
class Variation:
    """What one feed does differently from the plain one."""

    name: str = "normal"
    scale: float = 1.0
    masks: Masks = Masks.NOTHING
    choice: int = 0
    override: bool = False
    stream: int = 0


_SCALED = (Variation("zeros", 0.0), Variation("large", 30.0), Variation("tiny", 1e-4))


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


def find_feeds(
    model: ir.Model,
    refuses: Callable[[Feed], str | None],
    *,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    specs: Sequence[TensorSpec] | None = None,
    amend: Callable[[Feed], Feed] | None = None,
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

    Raises:
        DataError: `dims` names a dimension that no input has.
    """
    maker = _Maker(model, seed, dims, specs)
    search = _Search(maker, refuses, amend)
    typical = search.first(maker.dims.first_choices())
    if typical is None:
        return FoundFeeds((), tuple(search.dropped))
    for variation in maker.variations(typical):
        search.attempt(typical, variation)
    for candidates in maker.dims.further(typical):
        chosen = search.first(candidates)
        if chosen is not None and maker.has_masks:
            search.attempt(chosen, Variation(Masks.TAILS.value, masks=Masks.TAILS))
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

    def attempt(self, dims: DimSet, variation: Variation) -> bool:
        """Whether one feed runs; it is kept if so, else dropped with the reason."""
        name = f"{variation.name}, {dims}" if dims.sizes else variation.name
        limit = MAX_ELEMENTS if self._maker.can_shrink(dims) else MAX_LEAST_ELEMENTS
        if self._maker.elements(dims) > limit:
            self.dropped.append(Dropped(name, f"more than {limit} elements"))
            return False
        feed = Feed(name, self._maker.feed(dims, variation))
        if self._amend is not None:
            feed = self._amend(feed)
        reason = self._refuses(feed)
        if reason is not None:
            self.dropped.append(Dropped(name, reason))
            return False
        self.feeds.append(feed)
        return True


class _Maker:
    """Makes the values of every input for a set of dimensions and a variation."""

    def __init__(
        self,
        model: ir.Model,
        seed: int,
        fixed: Mapping[str, int] | None,
        specs: Sequence[TensorSpec] | None,
    ) -> None:
        declared = input_specs(model)
        runtime = {spec.name: spec for spec in specs or ()}
        self._specs = tuple(
            runtime.get(spec.name, spec) if spec.kind is Kind.OPAQUE else spec for spec in declared
        )
        self._seed = seed
        self._roles = input_roles(model)
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
        request = _Request(spec.dtype, shape, role, bound, variation)
        if spec.kind in {Kind.SEQUENCE, Kind.OPTIONAL_SEQUENCE}:
            return [_array(request, stream) for _ in range(3)]
        if spec.kind in {Kind.MAP, Kind.SEQUENCE_OF_MAPS}:
            one = _map(spec, stream)
            return one if spec.kind is Kind.MAP else [one]
        return _array(request, stream)

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


@dataclasses.dataclass(frozen=True)
class _Request:
    """What one array must be."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    role: Role
    bound: int | None
    variation: Variation


def _array(request: _Request, stream: Draws) -> Array:
    dtype, use = request.dtype, request.role.use
    if dtype is ir.DataType.STRING:
        return _strings(request, stream)
    if use is Use.FLAG or (dtype is ir.DataType.BOOL and not request.shape):
        return draws.cast(np.full(request.shape, request.variation.choice % 2 == 0), dtype)
    if use in {Use.MASK, Use.ADDITIVE_MASK} and request.shape:
        return _mask(request)
    if dtype is ir.DataType.BOOL:
        return np.asarray(stream.uniform(request.shape) < 0.5)
    if use is Use.NUMBER:
        return _numbers(request, stream)
    return draws.cast(_integers(request, stream), dtype)


def _numbers(request: _Request, stream: Draws) -> Array:
    """Plain numbers: floats N(0, 1) times the scale; small integer dtypes over their whole range."""
    dtype, scale = request.dtype, request.variation.scale
    if dtype in {ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}:
        parts = stream.normal((2, *request.shape)) * scale
        return np.asarray(parts[0] + 1j * parts[1]).astype(dtype.numpy())
    if dtype.is_floating_point():
        return draws.cast(stream.normal(request.shape) * scale, dtype)
    low, high = draws.integer_range(dtype)
    if dtype.bitwidth <= 8:
        return draws.cast(stream.integers(request.shape, low, high + 1), dtype)
    return draws.cast(stream.integers(request.shape, max(low, -8), 9), dtype)


def _integers(request: _Request, stream: Draws) -> Array:
    """Numbers that mean something to the model: ids, counts, constants it compares with."""
    shape, role = request.shape, request.role
    if role.use in {Use.SHAPE, Use.RESHAPE}:
        # Ones suit every Expand; with one free axis, every Reshape.
        target = np.ones(shape, np.int64)
        if role.use is Use.RESHAPE and shape:
            target.reshape(-1)[:1] = -1
        return target
    if role.use is Use.AXIS:
        return np.arange(math.prod(shape)).reshape(shape)
    if role.use is Use.POSITIVE:
        return (
            0.5 + stream.uniform(shape)
            if request.dtype.is_floating_point()
            else np.ones(shape, np.int64)
        )
    if role.use is Use.INDEX:
        return _sprinkled(stream.integers(shape, 0, max(request.bound or 1, 1)), request)
    if role.use is Use.LENGTH:
        return stream.integers(shape, 1, max(request.bound or 1, 1) + 1)
    if role.choices and math.prod(shape) > 1:
        # Elements of a table compared one by one (padding, bytes): numbers around the constants, and those.
        low, high = int(min(0, *role.choices)), int(max(role.choices))
        return _sprinkled(stream.integers(shape, low, high + 1), request)
    if role.choices:
        return np.full(shape, role.choices[request.variation.choice % len(role.choices)])
    return stream.integers(shape, 1, 4) if math.prod(shape) > 1 else np.full(shape, 2)


def _sprinkled(array: Array, request: _Request) -> Array:
    """The array with the constants that the model looks for (padding ids, say) put in at the end of rows."""
    choices = [c for c in request.role.choices if c < (request.bound or math.inf)]
    if request.role.use is Use.INDEX:
        choices = [c for c in choices if c >= 0]
    if choices and array.ndim and array.shape[-1] > 2:
        array[..., -1] = choices[request.variation.choice % len(choices)]
    return array


def _mask(request: _Request) -> Array:
    """One keeps and zero hides; in an additive mask zero keeps and a large negative number hides."""
    keep = _kept(request.shape, request.variation.masks)
    if request.role.use is Use.MASK:
        return draws.cast(keep, request.dtype)
    return draws.cast(np.where(keep, 0.0, -1e4), request.dtype)


def _kept(shape: tuple[int, ...], masks: Masks) -> Array:
    keep = np.ones(shape, np.bool_)
    width = shape[-1]
    if masks is Masks.FUTURE and len(shape) >= 2:
        return keep & np.tril(np.ones(shape[-2:], np.bool_))
    if masks is Masks.ONE_ROW:
        keep[0 if len(shape) > 1 else slice(0, 1)] = False
    if masks is Masks.TAILS:
        # Row r keeps a prefix: half of the width, then three quarters, then all but one …
        rows = np.arange(shape[0]) if len(shape) > 1 else np.zeros(1, np.int64)
        lengths = np.maximum(1, width - width // (rows + 2))
        kept = np.arange(width) < lengths.reshape(-1, *[1] * (len(shape) - 1))
        keep &= kept.reshape(width) if len(shape) == 1 else kept
    return keep


_WORDS = ("", "a", "B", "the quick brown fox", "über", "0", "-1.5", "日本")


def _strings(request: _Request, stream: Draws) -> Array:
    words = (*request.role.words, *_WORDS)
    picks = stream.integers(request.shape, 0, len(words))
    return np.array([words[pick] for pick in picks.reshape(-1)], object).reshape(request.shape)


def _map(spec: TensorSpec, stream: Draws) -> dict[int | str, Any]:
    keys: Sequence[int | str] = _WORDS[1:4] if spec.key is ir.DataType.STRING else (0, 1, 2)
    if spec.dtype is ir.DataType.STRING:
        return dict(zip(keys, _WORDS[1:], strict=False))
    numbers = draws.cast(stream.normal((len(keys),)), spec.dtype).tolist()
    return dict(zip(keys, numbers, strict=True))
