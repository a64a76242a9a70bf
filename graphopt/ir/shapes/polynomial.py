"""Arithmetic on polynomials with integer coefficients: dictionaries from monomial to coefficient.

A monomial is a frozenset of (atom, power); the empty one stands for 1. No coefficient is 0, so
equal polynomials are equal dictionaries. What an atom is, is the caller's business: it is hashable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Atom: TypeAlias = Any
Monomial: TypeAlias = frozenset[tuple[Atom, int]]
Terms: TypeAlias = Mapping[Monomial, int]
Bound: TypeAlias = int | None

ONE: Monomial = frozenset()


def add(a: Terms, b: Terms, *, factor: int = 1) -> Terms:
    """`a + factor * b`."""
    result = dict(a)
    for monomial, coefficient in b.items():
        total = result.get(monomial, 0) + factor * coefficient
        if total:
            result[monomial] = total
        else:
            del result[monomial]
    return result


def multiply(a: Terms, b: Terms) -> Terms:
    """`a * b`."""
    result: dict[Monomial, int] = {}
    for left, x in a.items():
        for right, y in b.items():
            monomial = _times(left, right)
            total = result.get(monomial, 0) + x * y
            if total:
                result[monomial] = total
            else:
                del result[monomial]
    return result


def split(terms: Terms, by: int) -> tuple[Terms, Terms]:
    """`whole`, `rest` with `terms == by * whole + rest`; `by` > 0.

    The constant of `rest` is in [0, by); any other coefficient keeps its sign and is less than
    `by`.
    """
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, coefficient in terms.items():
        times = (
            coefficient // by
            if monomial == ONE
            else int(math.copysign(1, coefficient)) * (abs(coefficient) // by)
        )
        if times:
            whole[monomial] = times
        if left := coefficient - times * by:
            rest[monomial] = left
    return whole, rest


def cancel(number: Terms, by: Terms) -> tuple[Terms, Terms]:
    """Both divided by the greatest monomial and integer that divide every term of both."""
    everything = [*number, *by]
    common = dict(everything[0])
    for monomial in everything[1:]:
        powers = dict(monomial)
        common = {a: min(p, powers[a]) for a, p in common.items() if a in powers}
    factor = math.gcd(*number.values(), *by.values())
    shared = frozenset(common.items())
    if factor == 1 and not shared:
        return number, by
    return _divided(number, shared, factor), _divided(by, shared, factor)


def divide(number: Terms, by: Terms) -> tuple[Terms, Terms]:
    """`whole`, `rest` with `number == whole * by + rest`: exact division, or only by a single term.

    Where `by` has several terms and does not divide `number`, `whole` is 0.
    """
    if len(by) == 1:
        return _divide_by_term(number, *next(iter(by.items())))
    order = _order(number, by)
    lead = max(by, key=order)
    whole: Terms = {}
    rest = number
    for _ in range(len(number) * len(by) + 1):
        if not rest:
            return whole, rest
        top = max(rest, key=order)
        monomial = _over(top, lead)
        if monomial is None or rest[top] % by[lead]:
            break
        step = {monomial: rest[top] // by[lead]}
        whole = add(whole, step)
        rest = add(rest, multiply(step, by), factor=-1)
    return {}, number


def interval(terms: Terms, bounds: Callable[[Atom], tuple[Bound, Bound]]) -> tuple[Bound, Bound]:
    """Bounds of the sum, given the bounds of atoms; None stands for unbounded."""
    low: Bound = 0
    high: Bound = 0
    for monomial, coefficient in terms.items():
        ends = _monomial_interval(monomial, bounds)
        under, over = ends if coefficient > 0 else ends[::-1]
        low = None if low is None or under is None else low + coefficient * under
        high = None if high is None or over is None else high + coefficient * over
    return low, high


def is_negative(terms: Terms, name: Callable[[Atom], str]) -> bool:
    """Whether the first term that is not constant has a negative coefficient (first by its text)."""
    monomials = [monomial for monomial in terms if monomial != ONE]
    if len(monomials) == 1:
        return terms[monomials[0]] < 0
    return terms[min(monomials, key=lambda m: _text(m, name))] < 0


def render(terms: Terms, name: Callable[[Atom], str]) -> str:
    """The polynomial as text; terms in alphabetical order, the constant last."""
    ordered = sorted(terms.items(), key=lambda item: (item[0] == ONE, _text(item[0], name)))
    text = ""
    for monomial, coefficient in ordered:
        body = _text(monomial, name)
        size = abs(coefficient)
        term = str(size) if monomial == ONE else body if size == 1 else f"{size}*{body}"
        sign = (" - " if text else "-") if coefficient < 0 else (" + " if text else "")
        text += sign + term
    return text or "0"


def _times(a: Monomial, b: Monomial) -> Monomial:
    """The product of two monomials."""
    if not a or not b:
        return a or b
    powers = dict(a)
    for atom, power in b:
        powers[atom] = powers.get(atom, 0) + power
    return frozenset(powers.items())


def _over(a: Monomial, b: Monomial) -> Monomial | None:
    """The quotient of two monomials, or None where `b` does not divide `a`."""
    powers = dict(a)
    for atom, power in b:
        left = powers.get(atom, 0) - power
        if left < 0:
            return None
        if left:
            powers[atom] = left
        else:
            del powers[atom]
    return frozenset(powers.items())


def _divided(terms: Terms, shared: Monomial, factor: int) -> Terms:
    """Terms divided by a monomial and an integer that divide each of them."""
    result: dict[Monomial, int] = {}
    for monomial, coefficient in terms.items():
        quotient = _over(monomial, shared)
        assert quotient is not None, "the shared monomial divides every term"
        result[quotient] = coefficient // factor
    return result


def _divide_by_term(number: Terms, term: Monomial, coefficient: int) -> tuple[Terms, Terms]:
    """Division by one term: what it divides, and the rest."""
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, factor in number.items():
        quotient = _over(monomial, term)
        if quotient is None or factor % coefficient:
            rest[monomial] = factor
        else:
            whole[quotient] = factor // coefficient
    return whole, rest


def _order(*polynomials: Terms) -> Callable[[Monomial], tuple[int, ...]]:
    """A monomial order (lexicographic on the powers of atoms, numbered as they occur)."""
    atoms: dict[Atom, None] = {}
    for terms in polynomials:
        for monomial in terms:
            atoms.update((atom, None) for atom, _ in monomial)
    numbered = tuple(atoms)

    def key(monomial: Monomial) -> tuple[int, ...]:
        powers = dict(monomial)
        return tuple(powers.get(atom, 0) for atom in numbered)

    return key


def _monomial_interval(
    monomial: Monomial, bounds: Callable[[Atom], tuple[Bound, Bound]]
) -> tuple[Bound, Bound]:
    """Bounds of a product: of one atom whatever its sign, of several where none is negative."""
    if len(monomial) == 1:
        ((atom, power),) = monomial
        if power == 1:
            return bounds(atom)
    low: Bound = 1
    high: Bound = 1
    for atom, power in monomial:
        under, over = bounds(atom)
        if under is None or under < 0:
            return (0, None) if power % 2 == 0 and len(monomial) == 1 else (None, None)
        low = low * under**power
        high = None if high is None or over is None else high * over**power
    return low, high


def _text(monomial: Monomial, name: Callable[[Atom], str]) -> str:
    """A monomial as text, atoms in alphabetical order."""
    powers = ((name(atom), power) for atom, power in monomial)
    return "*".join(text if power == 1 else f"{text}**{power}" for text, power in sorted(powers))
