"""Dimensions: integer polynomials over symbols, in canonical form.

A `Dim` is a sum of integer multiples of products of *atoms*. An atom is a symbol (one of the user's
`dim_param`s, the unknown size of one axis, or an unknown element of an integer tensor) or a call:
floor division, C division, maximum, minimum, broadcast of two sizes. Two dims are equal when their
canonical forms are; that form is strong enough for what exporters write (`4*n//4`, `n - n%4`,
`(n+3)//4*4`, `(past+seq)*64//(past+seq)`), and where it is not, the answer is a safe "not known
equal".

Assumed, and nowhere checked: a symbol that names a dimension is >= 0; a divisor is not 0 (runtimes
refuse both). Numbers are exact Python integers: wrapping is the business of who computes in int64.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias, Union

from graphopt.ir.shapes import polynomial

DimLike: TypeAlias = Union["Dim", int]
Bound: TypeAlias = int | None

_MAX_TERMS = 64  # beyond that a product stays a product: no exporter's arithmetic needs more


class Kind(enum.IntEnum):
    """Where a symbol comes from, which says what may be assumed of it."""

    USER = 0  # a dim_param of the model: >= 0
    AXIS = 1  # the size of one axis that nothing tells: >= 0
    ELEMENT = 2  # an element of an integer tensor that nothing tells: any integer
    FLAG = 3  # an element of a boolean tensor that nothing tells: 0 or 1


class Symbol(NamedTuple):
    """An unknown integer; `name` is unique among all symbols of a model."""

    name: str
    kind: Kind


class Call(NamedTuple):
    """A function of dims that is no polynomial; the arguments of a commutative one are a frozenset."""

    op: str
    args: tuple[Dim, ...] | frozenset[Dim]


class Dim:
    """An immutable integer polynomial; compares and hashes by its canonical form, and as the int it equals."""

    __slots__ = ("_bounds", "_hash", "_terms", "_value")

    _value: int | None
    _terms: polynomial.Terms
    _hash: int | None
    _bounds: tuple[Bound, Bound] | None

    def __init__(self, value: int = 0) -> None:
        self._value = value
        self._terms = {polynomial.ONE: value} if value else {}
        self._hash = None
        self._bounds = (value, value)

    @staticmethod
    def of(value: DimLike) -> Dim:
        """The dim that equals an integer; a dim is returned as it is."""
        if isinstance(value, Dim):
            return value
        return _SMALL[value] if 0 <= value < len(_SMALL) else Dim(int(value))

    @staticmethod
    def named(name: str, kind: Kind = Kind.USER) -> Dim:
        """The dim that is one symbol."""
        return _atom(Symbol(name, kind))

    @property
    def is_static(self) -> bool:
        """Whether the dim is a known integer."""
        return self._value is not None

    @property
    def value(self) -> int | None:
        """The integer that the dim is, or None."""
        return self._value

    @property
    def symbol(self) -> str | None:
        """The user's `dim_param` that the dim is exactly, or None."""
        atom = self._single_atom()
        return atom.name if isinstance(atom, Symbol) and atom.kind is Kind.USER else None

    @property
    def lower(self) -> Bound:
        """An integer that the dim cannot be less than, or None."""
        return self._interval()[0]

    @property
    def upper(self) -> Bound:
        """An integer that the dim cannot be greater than, or None."""
        return self._interval()[1]

    def symbols(self) -> frozenset[Symbol]:
        """Every symbol in the dim, those within calls included."""
        found: set[Symbol] = set()
        for monomial in self._terms:
            for atom, _ in monomial:
                if isinstance(atom, Symbol):
                    found.add(atom)
                else:
                    found.update(*(arg.symbols() for arg in atom.args))
        return frozenset(found)

    def is_named(self) -> bool:
        """Whether the user's `dim_param`s alone determine the dim (a known integer included)."""
        return all(symbol.kind is Kind.USER for symbol in self.symbols())

    def evaluate(self, known: Mapping[str, int]) -> int | None:
        """The integer at given values of the symbols, by name; None where one is missing."""
        total = 0
        for monomial, factor in self._terms.items():
            product: int = factor
            for atom, power in monomial:
                at = known.get(atom.name) if isinstance(atom, Symbol) else _evaluate(atom, known)
                if at is None:
                    return None
                product *= at**power
            total += product
        return total

    def differs(self, other: DimLike) -> bool:
        """Whether the two can be proven never to be equal."""
        gap = self - other
        return (gap.lower is not None and gap.lower > 0) or (
            gap.upper is not None and gap.upper < 0
        )

    def at_least(self, other: DimLike) -> bool:
        """Whether the dim can be proven never to be less than `other`."""
        low = (self - other).lower
        return low is not None and low >= 0

    def __add__(self, other: DimLike) -> Dim:
        other = Dim.of(other)
        if self._value is not None and other._value is not None:
            return Dim.of(self._value + other._value)
        return _from_terms(polynomial.add(self._terms, other._terms))

    def __sub__(self, other: DimLike) -> Dim:
        other = Dim.of(other)
        if self._value is not None and other._value is not None:
            return Dim.of(self._value - other._value)
        return _from_terms(polynomial.add(self._terms, other._terms, factor=-1))

    def __mul__(self, other: DimLike) -> Dim:
        other = Dim.of(other)
        if self._value is not None and other._value is not None:
            return Dim.of(self._value * other._value)
        if len(self._terms) * len(other._terms) > _MAX_TERMS:
            return _atom(Call("*", tuple(sorted((self, other), key=str))))
        return _from_terms(polynomial.multiply(self._terms, other._terms))

    def __floordiv__(self, other: DimLike) -> Dim:
        return _floordiv(self, Dim.of(other))

    def __mod__(self, other: DimLike) -> Dim:
        return self - Dim.of(other) * _floordiv(self, Dim.of(other))

    def __radd__(self, other: int) -> Dim:
        return self + other

    def __rsub__(self, other: int) -> Dim:
        return Dim.of(other) - self

    def __rmul__(self, other: int) -> Dim:
        return self * other

    def __rfloordiv__(self, other: int) -> Dim:
        return Dim.of(other) // self

    def __neg__(self) -> Dim:
        return self * -1

    def __int__(self) -> int:
        if self._value is None:
            raise ValueError(f"dimension {self} is not a known integer: ask is_static first")
        return self._value

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Dim):
            if self._value is not None or other._value is not None:
                return self._value == other._value
            return self._terms == other._terms
        return self._value == other if isinstance(other, int) else NotImplemented

    def __hash__(self) -> int:
        if self._hash is None:
            known = self._value
            self._hash = hash(frozenset(self._terms.items()) if known is None else known)
        return self._hash

    def __str__(self) -> str:
        if self._value is not None:
            return str(self._value)
        return polynomial.render(self._terms, _render)

    def __repr__(self) -> str:
        return f"Dim({self})"

    def _single_atom(self) -> polynomial.Atom | None:
        """The atom that the dim is exactly, or None."""
        if len(self._terms) != 1:
            return None
        ((monomial, factor),) = self._terms.items()
        if factor != 1 or len(monomial) != 1:
            return None
        ((atom, power),) = monomial
        return atom if power == 1 else None

    def _interval(self) -> tuple[Bound, Bound]:
        """The bounds, computed once."""
        if self._bounds is None:
            self._bounds = _bounds(self)
        return self._bounds


def ceildiv(number: DimLike, by: DimLike) -> Dim:
    """`number / by` rounded up; `by` > 0."""
    by = Dim.of(by)
    return (Dim.of(number) + by - 1) // by


def truncdiv(number: DimLike, by: DimLike) -> Dim:
    """`number / by` rounded toward zero: what the ONNX operator Div does to integers."""
    number, by = Dim.of(number), Dim.of(by)
    if by.upper is not None and by.upper < 0:
        number, by = -number, -by
    quotient = number // by
    if (by.lower is not None and by.lower >= 0) or quotient * by == number:
        if quotient * by == number or number.at_least(0):
            return quotient
        if (-number).at_least(0):
            return -((-number) // by)
    return _atom(Call("div", (number, by)))


def maximum(dims: Iterable[DimLike]) -> Dim:
    """The greatest of one or more dims; those that another is proven to reach are dropped."""
    return _extreme("max", dims, lambda a, b: a.at_least(b))


def minimum(dims: Iterable[DimLike]) -> Dim:
    """The least of one or more dims."""
    return _extreme("min", dims, lambda a, b: b.at_least(a))


def broadcast(a: DimLike, b: DimLike) -> Dim:
    """The size of an axis after broadcasting: the one that is not 1 (they are equal otherwise)."""
    a, b = Dim.of(a), Dim.of(b)
    if a == b or a.value == 1:
        return b
    if b.value == 1 or a.is_static:
        return a
    if b.is_static:
        return b
    # An operand that is itself a broadcast joins in: the order of additions does not matter.
    operands = _standing({*_operands(a), *_operands(b)})
    if len(operands) == 1:
        return next(iter(operands))
    big = [dim for dim in operands if dim.lower is not None and dim.lower > 1]
    return min(big, key=str) if big else _atom(Call("broadcast", operands))


def is_cut_to(a: Dim, b: Dim) -> bool:
    """Whether a is b where they broadcast: a = b, or a = min(c, b), c > 1, the length of a table cut to b positions."""
    if a == b:
        return True
    atom = a._single_atom()  # noqa: SLF001 - this module is the class
    if not isinstance(atom, Call) or atom.op != "min" or b not in atom.args:
        return False
    return all(dim == b or (dim.value or 0) > 1 for dim in atom.args)


def _standing(operands: set[Dim]) -> frozenset[Dim]:
    """The operands of a broadcast without those that another stands for: `min(c, b)` or `max(b, 1)` beside b."""
    if len(operands) == 1:
        return frozenset(operands)
    return frozenset(
        a
        for a in operands
        if not any(
            a != b and (is_cut_to(a, b) or a in (maximum((b, 1)), maximum((b - 1, 0)) + 1))
            for b in operands
        )
    )


def product(dims: Iterable[DimLike]) -> Dim:
    """The product of dims; 1 for none."""
    result = _SMALL[1]
    for dim in dims:
        result = result * dim
    return result


def _operands(dim: Dim) -> Iterable[Dim]:
    """What a broadcast broadcasts, or the dim itself."""
    atom = dim._single_atom()  # noqa: SLF001 - this module is the class
    return atom.args if isinstance(atom, Call) and atom.op == "broadcast" else (dim,)


def _extreme(op: str, dims: Iterable[DimLike], wins: Callable[[Dim, Dim], bool]) -> Dim:
    """Maximum or minimum, with nested ones flattened and beaten operands dropped."""
    operands: dict[Dim, None] = {}
    for dim in map(Dim.of, dims):
        atom = dim._single_atom()  # noqa: SLF001
        nested = atom.args if isinstance(atom, Call) and atom.op == op else (dim,)
        operands.update(dict.fromkeys(nested))
    kept: list[Dim] = []
    for dim in operands:
        if not any(wins(other, dim) for other in kept):
            kept = [other for other in kept if not wins(dim, other)] + [dim]
    return kept[0] if len(kept) == 1 else _atom(Call(op, frozenset(kept)))


def _floordiv(number: Dim, by: Dim) -> Dim:
    """Floor division in canonical form."""
    if by.value is not None:
        return _floordiv_static(number, by.value)
    if number.value == 0:
        return number
    upper, lower = polynomial.cancel(number._terms, by._terms)  # noqa: SLF001
    number, by = _from_terms(upper), _from_terms(lower)
    if by.is_static:
        return _floordiv_static(number, int(by))
    whole, rest = polynomial.divide(upper, lower)
    if not rest:
        return _from_terms(whole)
    return _from_terms(whole) + _atom(Call("//", (_from_terms(rest), by)))


def _floordiv_static(number: Dim, by: int) -> Dim:
    """Floor division by an integer: whole parts leave, common factors cancel, nested divisions join."""
    if by < 0:
        number, by = -number, -by
    if by == 1:
        return number
    if by == 0:
        return _atom(Call("//", (number, Dim.of(0))))
    if number.value is not None:
        return Dim.of(number.value // by)
    whole, rest = polynomial.split(number._terms, by)  # noqa: SLF001
    common = math.gcd(by, *(factor for m, factor in rest.items() if m != polynomial.ONE))
    rest = {m: factor // common for m, factor in rest.items() if factor // common}
    remainder, by = _from_terms(rest), by // common
    if by == 1 or remainder.is_static:
        return _from_terms(whole) + (remainder if by == 1 else Dim.of(int(remainder) // by))
    if polynomial.is_negative(rest, _render):
        return _from_terms(whole) - _floordiv_static(by - 1 - remainder, by)
    return _from_terms(whole) + _joined_division(remainder, by)


def _joined_division(number: Dim, by: int) -> Dim:
    """`(p // a + c) // by` as `(p + a*c) // (a*by)`; any other number as it is."""
    offset = number._terms.get(polynomial.ONE, 0)  # noqa: SLF001
    atom = (number - offset)._single_atom()  # noqa: SLF001
    if isinstance(atom, Call) and atom.op == "//" and isinstance(atom.args, tuple):
        inner, divisor = atom.args
        if divisor.value:
            return _floordiv_static(inner + divisor * offset, divisor.value * by)
    return _atom(Call("//", (number, Dim.of(by))))


def _from_terms(terms: polynomial.Terms) -> Dim:
    """The dim of canonical terms."""
    if not terms:
        return _SMALL[0]
    if len(terms) == 1 and polynomial.ONE in terms:
        return Dim.of(terms[polynomial.ONE])
    dim = Dim.__new__(Dim)
    dim._value = dim._hash = dim._bounds = None  # noqa: SLF001
    dim._terms = terms  # noqa: SLF001
    return dim


def _atom(atom: polynomial.Atom) -> Dim:
    """The dim that is one atom."""
    return _from_terms({frozenset(((atom, 1),)): 1})


def _evaluate(call: Call, known: Mapping[str, int]) -> int | None:
    """The integer that a call gives, or None where a symbol or the divisor is missing."""
    args: list[int] = []
    for arg in call.args:
        at = arg.evaluate(known)
        if at is None:
            return None
        args.append(at)
    if call.op in ("//", "div"):
        number, by = args
        if by == 0:
            return None
        floor = number // by
        return floor + 1 if call.op == "div" and floor < 0 and floor * by != number else floor
    if call.op == "broadcast":
        return next((size for size in args if size != 1), 1)
    if call.op == "*":
        return math.prod(args)
    return max(args) if call.op == "max" else min(args)


def _bounds(dim: Dim) -> tuple[Bound, Bound]:
    """Bounds of a polynomial: of each term alone, or with one floor division replaced by its limits."""
    terms = dim._terms  # noqa: SLF001
    low, high = polynomial.interval(terms, _atom_bounds)
    for monomial, factor in terms.items():
        if low is not None and high is not None:
            break
        found = _division(monomial)
        if found is None or factor % found[1]:
            continue
        # A quotient times its divisor lies between number - by + 1 and number.
        number, by = found
        base = dim - _from_terms({monomial: factor})
        times = factor // by
        ends = (base + number * times, base + (number - by + 1) * times)
        low = ends[times > 0].lower if low is None else low
        high = ends[times < 0].upper if high is None else high
    return low, high


def _division(monomial: polynomial.Monomial) -> tuple[Dim, int] | None:
    """Number and divisor of a term that is one floor division by a positive integer, or None."""
    if len(monomial) != 1:
        return None
    ((atom, power),) = monomial
    if power != 1 or not isinstance(atom, Call) or atom.op != "//":
        return None
    number, by = tuple(atom.args)
    return (number, by.value) if by.value is not None and by.value > 0 else None


def _atom_bounds(atom: polynomial.Atom) -> tuple[Bound, Bound]:
    """What is known of one atom."""
    if isinstance(atom, Symbol):
        if atom.kind is Kind.ELEMENT:
            return None, None
        return 0, 1 if atom.kind is Kind.FLAG else None
    bounds = [(arg.lower, arg.upper) for arg in atom.args]
    lows, highs = [low for low, _ in bounds], [high for _, high in bounds]
    known_lows = [low for low in lows if low is not None]
    known_highs = [high for high in highs if high is not None]
    all_low = min(known_lows) if len(known_lows) == len(lows) else None
    all_high = max(known_highs) if len(known_highs) == len(highs) else None
    if atom.op == "max":
        return max(known_lows, default=None), all_high
    if atom.op == "min":
        return all_low, min(known_highs, default=None)
    if atom.op == "broadcast":
        return all_low, all_high
    if atom.op in ("//", "div") and all(low is not None and low >= 0 for low in lows):
        # A divisor is at least 1, so the quotient is no greater than the number.
        by = atom.args[1].value if isinstance(atom.args, tuple) else None
        return (lows[0] // by if by else 0), (highs[0] if not by else _div(highs[0], by))
    if atom.op == "*" and all_low is not None and all_low >= 0:
        return 0, None
    return None, None


def _div(bound: Bound, by: int) -> Bound:
    """A bound divided by a positive integer."""
    return None if bound is None else bound // by


def _render(atom: polynomial.Atom) -> str:
    """An atom as text."""
    if isinstance(atom, Symbol):
        return atom.name
    if isinstance(atom.args, tuple) and atom.op in ("//", "*"):
        left, right = (f"({arg})" if " " in str(arg) else str(arg) for arg in atom.args)
        return f"({left} {atom.op} {right})"
    texts = map(str, atom.args)
    ordered = texts if isinstance(atom.args, tuple) else sorted(texts)
    return f"{atom.op}({', '.join(ordered)})"


_SMALL = tuple(Dim(value) for value in range(1025))
