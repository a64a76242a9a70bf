"""Numbers for the symbolic dimensions of a model's inputs: consistent, several sets, with fallbacks."""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
from typing import TYPE_CHECKING

from graphopt.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from graphopt.runtime.specs import Dim, TensorSpec


class Sort(enum.Enum):
    """What a dimension counts; the values are the sizes of a typical run."""

    BATCH = 2
    PAST = 4
    LENGTH = 8
    SIDE = 64


@dataclasses.dataclass(frozen=True)
class DimSet:
    """One assignment of numbers to the free symbols of a model."""

    label: str
    sizes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{self.label} ({shown})" if shown else self.label


# What to try in place of a typical length or image side when the model does not run with it: powers of two,
# multiples of the strides of detectors, windows of audio models, then odd ones.
_LENGTHS = (
    2,
    16,
    32,
    64,
    128,
    256,
    512,
    1,
    576,
    1024,
    3,
    4,
    5,
    6,
    7,
    10,
    12,
    20,
    24,
    80,
    100,
    160,
    224,
    1536,
    4000,
)
_SIDES = (32, 96, 128, 224, 256, 320, 416, 512, 299, 28, 8, 1)
_LONG, _LONG_PAST, _LONGER = 37, 17, 131
EMPTY = "empty"
LONG, LONGER = "long", "longer"
"""Labels of what costs more than all other sets together."""

_PRIMES: Mapping[Sort, int] = {Sort.BATCH: 3, Sort.PAST: 5, Sort.LENGTH: 13, Sort.SIDE: 67}


class Dims:
    """The symbols of some inputs, which of them are free, and what the others follow from."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        fixed: Mapping[str, int] | None = None,
        stated: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        """Reads the symbols.

        Args:
            specs: the inputs.
            fixed: sizes that somebody asked for.
            stated: sizes that the model demands, by input and axis.

        Raises:
            DataError: a symbol asked for is not one of the inputs'.
        """
        self._specs = specs
        self._expressions: dict[str, ast.expr] = {}
        self.sorts: dict[str, Sort] = {}
        for spec in specs:
            for axis, dim in enumerate(spec.shape or ()):
                self._note(spec, axis, dim)
        self._link_totals()
        self.fixed = self._demanded(stated or {}) | self._checked(fixed or {})

    def shape(self, spec: TensorSpec, dims: DimSet) -> tuple[int, ...] | None:
        """The shape of one input under an assignment; None where its rank is unknown."""
        if spec.shape is None:
            return None
        return tuple(self._size(spec, axis, dim, dims) for axis, dim in enumerate(spec.shape))

    def resolve(self, symbol: str, dims: DimSet) -> int | None:
        """The number that a symbol stands for, or None where no input has it."""
        sizes = dict(dims.sizes)
        if symbol in sizes:
            return sizes[symbol]
        expression = self._expressions.get(symbol) or _expression(symbol)
        return None if expression is None else _evaluate(expression, sizes)

    def first_choices(self) -> Iterator[DimSet]:
        """Assignments to look for a first one that runs, the most natural before the rest."""
        yield self._set("typical", {sort: sort.value for sort in Sort})
        if not self.sorts:
            return
        free = {sort for name, sort in self.sorts.items() if name not in self.fixed}
        if Sort.BATCH in free:
            yield self._set("typical", {sort: sort.value for sort in Sort} | {Sort.BATCH: 1})
        lengths = _LENGTHS if free & {Sort.LENGTH, Sort.PAST} else (Sort.LENGTH.value,)
        sides = _SIDES if Sort.SIDE in free else (Sort.SIDE.value,)
        for length in lengths:
            for side in sides if length == lengths[0] else sides[:1]:
                for batch in (2, 1) if Sort.BATCH in free else (1,):
                    yield self._set(
                        "typical",
                        {Sort.BATCH: batch, Sort.PAST: 4, Sort.LENGTH: length, Sort.SIDE: side},
                    )
        yield self._set("typical", dict.fromkeys(Sort, 1))

    def further(self, typical: DimSet) -> Iterator[tuple[DimSet, ...]]:
        """Further sets once one has run: for each, what to try in turn until one runs."""
        if not self.sorts:
            return
        base = dict(typical.sizes)
        ones = dict.fromkeys((Sort.BATCH, Sort.PAST, Sort.LENGTH), 1)
        yield self._variants(base, "ones", ones, {Sort.BATCH: 1})
        sides = {
            name: size * 3 // 2 for name, size in base.items() if self.sorts[name] is Sort.SIDE
        }
        no_sides: dict[Sort, int] = {
            sort: size for sort, size in _PRIMES.items() if sort is not Sort.SIDE
        }
        larger = self._variants(base | sides, "primes", no_sides) if sides else ()
        yield (
            *self._variants(base, "primes", _PRIMES),
            *larger,
            *self._variants(base, "primes", no_sides, {Sort.BATCH: 3}),
        )
        if Sort.PAST in self.sorts.values():
            yield self._variants(base, "empty past", {Sort.PAST: 0})

    def long(self, typical: DimSet) -> tuple[DimSet, ...]:
        """More of a batch and more steps than a typical run has."""
        steps = {Sort.LENGTH: _LONG, Sort.PAST: _LONG_PAST}
        base = dict(typical.sizes)
        tries = ({Sort.BATCH: 5} | steps, {Sort.BATCH: 1} | steps)
        twice = {
            name: 2 * size if self.sorts[name] is Sort.LENGTH else size
            for name, size in base.items()
        }
        return (
            *self._variants(base, LONG, *tries),
            *self._variants(twice, LONG, {Sort.BATCH: 5}),
            *self._variants(base, LONG, {Sort.BATCH: 5}),
        )

    def longer(self, typical: DimSet) -> tuple[DimSet, ...]:
        """More steps, or more behind, than eight bits with a sign can count."""
        base = dict(typical.sizes)
        has_past = Sort.PAST in self.sorts.values()
        counted = Sort.PAST if has_past else Sort.LENGTH
        known = [size for name, size in base.items() if self.sorts[name] is counted]
        if not known or max(known) > _LONG:
            return ()
        return self._variants(base, LONGER, {Sort.BATCH: 1, counted: _LONGER})

    def crowds(self, typical: DimSet) -> tuple[DimSet, ...]:
        """Many samples at once, where samples have no length that multiplies with them."""
        if set(self.sorts.values()) - {Sort.BATCH, Sort.SIDE}:
            return ()
        return self._variants(dict(typical.sizes), LONG, {Sort.BATCH: _LONG})

    def empty(self, typical: DimSet) -> tuple[DimSet, ...]:
        """No sample at all; no steps where there is no batch."""
        base = dict(typical.sizes)
        return self._variants(base, EMPTY, {Sort.BATCH: 0}, {Sort.LENGTH: 0})[:1]

    def seeking(self, typical: DimSet) -> Iterator[DimSet]:
        """Sets that may take another branch, where sizes decide that."""
        base = dict(typical.sizes)
        for size in (4, 16, 32, 64, 128, 256, 512):
            yield from self._variants(base, "seek", {Sort.LENGTH: size, Sort.PAST: size})
        for size in (4, 8, 16):
            yield from self._variants(base, "seek", {Sort.BATCH: size})
        for size in (32, 128, 224, 256):
            yield from self._variants(base, "seek", {Sort.SIDE: size})

    def _variants(
        self, base: dict[str, int], label: str, *changes: Mapping[Sort, int]
    ) -> tuple[DimSet, ...]:
        found = []
        for change in changes:
            sizes = {
                name: change.get(self.sorts[name], size) for name, size in base.items()
            } | self.fixed
            if sizes != base:
                found.append(DimSet(label, tuple(sizes.items())))
        return tuple(found)

    def _set(self, label: str, sizes: Mapping[Sort, int]) -> DimSet:
        chosen = {name: sizes[sort] for name, sort in self.sorts.items()} | self.fixed
        return DimSet(label, tuple(chosen.items()))

    def _note(self, spec: TensorSpec, axis: int, dim: Dim) -> None:
        if isinstance(dim, int):
            return
        name = dim if dim is not None else _anonymous(spec, axis)
        expression = _expression(name)
        if expression is not None:
            self._expressions[name] = expression
            for part in _symbols(expression):
                self.sorts.setdefault(part, _sort(part, spec, axis))
        elif name not in self.sorts:
            self.sorts[name] = _sort(name, spec, axis)

    def _link_totals(self) -> None:
        """A `total…` dimension is past plus present where the model has one symbol of each."""
        past = [name for name, sort in self.sorts.items() if sort is Sort.PAST]
        total = [name for name in self.sorts if "total" in name.lower()]
        present = [n for n, s in self.sorts.items() if s is Sort.LENGTH and n not in total]
        if len(past) == len(present) == 1:
            for name in total:
                expression = _expression(f"{past[0]} + {present[0]}")
                if expression is not None:
                    self._expressions[name] = expression
                    del self.sorts[name]

    def _checked(self, fixed: Mapping[str, int]) -> dict[str, int]:
        for name, size in fixed.items():
            if name not in self.sorts:
                known = ", ".join(f"'{symbol}'" for symbol in self.sorts) or "none"
                raise DataError(
                    f"No input has a dimension called '{name}' (asked to be {size}); the free dimensions are {known}."
                )
            if size < 0:
                raise DataError(
                    f"The dimension '{name}' cannot be {size}: give a number from 0 up."
                )
        return dict(fixed)

    def _demanded(self, stated: Mapping[tuple[str, int], int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for spec in self._specs:
            for axis, dim in enumerate(spec.shape or ()):
                name = dim if dim is not None else _anonymous(spec, axis)
                if (spec.name, axis) in stated and isinstance(name, str) and name in self.sorts:
                    found.setdefault(name, stated[spec.name, axis])
        return found

    def _size(self, spec: TensorSpec, axis: int, dim: Dim, dims: DimSet) -> int:
        if isinstance(dim, int):
            return dim
        size = self.resolve(dim if dim is not None else _anonymous(spec, axis), dims)
        return max(size, 0) if size is not None else 1


def _anonymous(spec: TensorSpec, axis: int) -> str:
    """The name of a dimension without one: leading ones are one batch, others belong to their input."""
    return "batch?" if axis == 0 and len(spec.shape or ()) > 1 else f"{spec.name}[{axis}]"


def _sort(name: str, spec: TensorSpec, axis: int) -> Sort:
    lowered, shape = name.lower(), spec.shape or ()
    if "past" in lowered or (re.search(r"past|cache", spec.name.lower()) and axis >= 2):
        return Sort.PAST
    if re.search(r"batch|^n$|^b$|^bs$", lowered):
        return Sort.BATCH
    if len(shape) == 4 and _is_side(shape, axis):
        return Sort.SIDE
    return Sort.BATCH if axis == 0 and len(shape) > 1 and lowered.startswith("unk") else Sort.LENGTH


def _is_side(shape: tuple[Dim, ...], axis: int) -> bool:
    """Whether an axis of a rank-4 input is the height or the width of an image."""
    channels = {1, 3, 4}
    return (axis in {2, 3} and shape[1] in channels) or (axis in {1, 2} and shape[3] in channels)


def _expression(text: str) -> ast.expr | None:
    """A sum or product of symbols, as exporters write derived dimensions; None for a plain name."""
    if not re.search(r"[+*]| - |//", text):
        return None
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return None
    return body if all(isinstance(part, _ALLOWED) for part in ast.walk(body)) else None


_ALLOWED = (ast.BinOp, ast.Name, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Load)


def _symbols(expression: ast.expr) -> list[str]:
    return [part.id for part in ast.walk(expression) if isinstance(part, ast.Name)]


def _evaluate(expression: ast.expr, sizes: Mapping[str, int]) -> int | None:
    if isinstance(expression, ast.Constant):
        return expression.value if isinstance(expression.value, int) else None
    if isinstance(expression, ast.Name):
        return sizes.get(expression.id)
    assert isinstance(expression, ast.BinOp)
    left, right = _evaluate(expression.left, sizes), _evaluate(expression.right, sizes)
    if left is None or right is None:
        return None
    if isinstance(expression.op, ast.Add):
        return left + right
    if isinstance(expression.op, ast.Sub):
        return left - right
    if isinstance(expression.op, ast.Mult):
        return left * right
    return left // right if right else None
