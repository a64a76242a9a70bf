"""Patterns are plain data: a DAG of `Op`, `Var` and `Lit` objects that bind by identity.

Using one pattern object twice means "the same node" or "the same value", so shared subexpressions need no names and a
typo is a NameError.  Matching starts at the root and walks producers; it is a generator, so commutative operands,
alternatives and optional inputs backtrack for free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import TypeAlias

import onnx_ir as ir

from graphopt.ir import operators, values

Pattern: TypeAlias = "Var | Lit | Op | Either"
Binding: TypeAlias = Mapping["Var | Lit | Op | Either", ir.Value | ir.Node | None]
Inputs: TypeAlias = Sequence["Pattern | EllipsisType"]


@dataclasses.dataclass
class Trace:
    """The best partial match seen: how many nodes were bound, what was, and what stopped the next one."""

    depth: int = 0
    culprit: ir.Value | None = None
    wanted: str = ""
    env: Binding = dataclasses.field(default_factory=dict)

    def stop(self, env: Binding, value: ir.Value | None, wanted: str) -> None:
        """Records a failure to bind `value` after `env`, if no deeper one is known."""
        depth = sum(isinstance(bound, ir.Node) for bound in env.values())
        if depth > self.depth:
            self.depth, self.culprit, self.wanted, self.env = depth, value, wanted, env


@dataclasses.dataclass(frozen=True, eq=False)
class Var:
    """Any value: `const` wants one that no feed can change, `computed` any other; `optional` admits an absent input."""

    const: bool = False
    optional: bool = False
    computed: bool = False

    def match(
        self, value: ir.Value | None, env: Binding, trace: Trace | None = None
    ) -> Iterator[Binding]:
        """Yields `env` with this variable bound to `value`, if it may be."""
        if self in env:
            if env[self] is value:
                yield env
        elif value is None:
            if self.optional:
                yield {**env, self: None}
        elif self.takes(value):
            yield {**env, self: value}
        elif trace is not None and self.const:
            trace.stop(env, value, "a constant")

    def takes(self, value: ir.Value | None) -> bool:
        """Whether this variable alone, unbound as yet, may stand for `value`."""
        if value is None:
            return self.optional
        if self.const:
            return values.is_constant(value)
        return not (self.computed and values.is_constant(value))


@dataclasses.dataclass(frozen=True, eq=False)
class Lit:
    """A constant whose every element is `number`, within `tolerance` (absolute, relative to 1 + |number|)."""

    number: float
    tolerance: float = 0.0

    def match(
        self, value: ir.Value | None, env: Binding, trace: Trace | None = None
    ) -> Iterator[Binding]:
        """Yields `env` with this literal bound to `value`, if the constant has that value."""
        if value is None:
            return
        number = values.fill(value)
        if number is not None and abs(number - self.number) <= self.tolerance * (
            1 + abs(self.number)
        ):
            yield {**env, self: value}
        elif trace is not None:
            trace.stop(env, value, f"the constant {self.number}")


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Op:
    """An output of a node whose operator is one of `types`.

    Attributes:
        types: operator names, given as "Add|Sum".
        inputs: a pattern per input; a final `...` admits any further inputs.
        domain: operator domain, "" for ai.onnx.
        output: which output of the node the matched value is.
        shared: the node may have other uses, which keep it alive beside the rewrite.
        fed_by: operators one of which, of whatever domain, feeds the node, given as "Expand|Tile"; none: any or none.
        flat: the inputs where every one is a variable of its own, else None.
        takes_all: whether those are variables that take any value.
    """

    types: tuple[str, ...]
    inputs: tuple[Pattern, ...]
    open: bool
    domain: str
    output: int
    shared: bool
    fed_by: tuple[str, ...]
    flat: tuple[Var, ...] | None
    takes_all: bool

    def __init__(
        self,
        types: str,
        *inputs: Pattern | EllipsisType,
        domain: str = "",
        output: int = 0,
        shared: bool = False,
        fed_by: str = "",
    ) -> None:
        fixed = tuple(p for p in inputs if not isinstance(p, EllipsisType))
        object.__setattr__(self, "types", tuple(types.split("|")))
        object.__setattr__(self, "inputs", fixed)
        object.__setattr__(self, "open", len(fixed) < len(inputs))
        object.__setattr__(self, "domain", domain)
        object.__setattr__(self, "output", output)
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "fed_by", tuple(fed_by.split("|")) if fed_by else ())
        flat = tuple(p for p in fixed if isinstance(p, Var))
        is_flat = len(set(flat)) == len(fixed)
        object.__setattr__(self, "flat", flat if is_flat else None)
        asking = any(p.const or p.computed or p.optional for p in flat)
        object.__setattr__(self, "takes_all", is_flat and not asking)

    def match(
        self, value: ir.Value | None, env: Binding, trace: Trace | None = None
    ) -> Iterator[Binding]:
        """Yields every binding under which `value` is output `self.output` of a matching node."""
        node = value.producer() if value is not None else None
        if self in env:
            if node is not None and env[self] is node:
                yield env
        elif node is not None and self._heads(node) and value is node.outputs[self.output]:
            yield from self.match_node(node, env, trace)
        elif trace is not None:
            trace.stop(env, value, "|".join(self.types))

    def match_node(
        self, node: ir.Node, env: Binding, trace: Trace | None = None
    ) -> Iterator[Binding]:
        """Yields every binding of `node`'s inputs; the operator itself is known to fit."""
        width = len(self.inputs)
        if not self.open and len(node.inputs) > width and any(node.inputs[width:]):
            return
        if not self._is_fed(node):
            return
        env = {**env, self: node}
        for args in _orders(node, width):
            yield from _match_each(self.inputs, args, 0, env, trace)

    def first(self, node: ir.Node) -> Binding | None:
        """The first binding of `match_node` under nothing; None where there is none.

        Most patterns are flat, and most matches come to nothing: those are bound without a generator each.
        """
        inputs, flat = node.inputs, self.flat
        if flat is None or len(inputs) < len(flat) or (len(inputs) > len(flat) and not self.open):
            return next(self.match_node(node, {}), None)
        if self.fed_by and not self._is_fed(node):
            return None
        args = inputs[: len(flat)]
        if not self._takes(args):
            swaps = len(flat) == 2 and not self.takes_all and operators.is_commutative(node)
            args = args[::-1]
            if not swaps or not self._takes(args):
                return None
        env: dict[Pattern, ir.Value | ir.Node | None] = {self: node}
        env.update(zip(flat, args, strict=True))
        return env

    def _takes(self, args: Sequence[ir.Value | None]) -> bool:
        """Whether the inputs of a flat pattern may be bound to these."""
        if self.takes_all:
            return None not in args
        return all(map(Var.takes, self.flat or (), args))

    def _is_fed(self, node: ir.Node) -> bool:
        """Whether one of the operators that shall feed the node does."""
        return not self.fed_by or any(_is_from(value, self.fed_by) for value in node.inputs)

    def _heads(self, node: ir.Node) -> bool:
        return (
            node.op_type in self.types
            and node.domain == self.domain
            and self.output < len(node.outputs)
        )


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Either:
    """The first of several patterns that fits, in order; the others stay unbound."""

    options: tuple[Pattern, ...]

    def __init__(self, *options: Pattern) -> None:
        object.__setattr__(self, "options", options)

    def match(
        self, value: ir.Value | None, env: Binding, trace: Trace | None = None
    ) -> Iterator[Binding]:
        """Yields the bindings of each option in turn."""
        if self in env:
            if env[self] is value:
                yield env
            return
        for option in self.options:
            yield from option.match(value, {**env, self: value}, trace)


def _is_from(value: ir.Value | None, types: Sequence[str]) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type in types


def _orders(node: ir.Node, width: int) -> Iterator[Sequence[ir.Value | None]]:
    inputs = node.inputs
    args: Sequence[ir.Value | None] = inputs
    if len(inputs) != width:
        args = [*inputs[:width], *[None] * (width - len(inputs))]
    yield args
    if width == 2 and operators.is_commutative(node):
        yield args[::-1]


def _match_each(
    patterns: Sequence[Pattern],
    args: Sequence[ir.Value | None],
    at: int,
    env: Binding,
    trace: Trace | None,
) -> Iterator[Binding]:
    """Yields the bindings of the patterns from that position on."""
    if at == len(patterns):
        yield env
        return
    for deeper in patterns[at].match(args[at], env, trace):
        yield from _match_each(patterns, args, at + 1, deeper, trace)


def walk(pattern: Pattern) -> Iterator[Op]:
    """Every `Op` of a pattern, the root first, each once."""
    seen: set[int] = set()
    stack: list[Pattern] = [pattern]
    while stack:
        top = stack.pop()
        if id(top) in seen:
            continue
        seen.add(id(top))
        if isinstance(top, Op):
            yield top
            stack.extend(reversed(top.inputs))
        elif isinstance(top, Either):
            stack.extend(reversed(top.options))


def least(pattern: Pattern, env: Binding | None = None) -> frozenset[int]:
    """The nodes, by identity, of the shortest spelling that a pattern takes: of each `Either` the smallest option.

    Of an `Either` of which `env` binds an option, that one.
    """
    if isinstance(pattern, Either):
        taken = [option for option in pattern.options if env and option in env]
        return min((least(option, env) for option in taken or pattern.options), key=len)
    if not isinstance(pattern, Op):
        return frozenset()
    return frozenset((id(pattern),)).union(*(least(operand, env) for operand in pattern.inputs))
