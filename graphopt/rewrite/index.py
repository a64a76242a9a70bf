"""Which rules may fit a node, told from its operator and from what feeds it, before anything is matched."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import onnx_ir as ir

from graphopt.ir import operators
from graphopt.ir.scopes import Census
from graphopt.rewrite.pattern import Either, Lit, Op, Pattern
from graphopt.rewrite.rules import Rule

Sight: TypeAlias = tuple[str, ...]
"""What feeds each input of a node: an operator, or one of the words below."""

Look: TypeAlias = tuple[str, str, Sight]
"""Operator and domain of a node, and what feeds it."""

UNSEEN: Look = ("", "", ())
"""The look of a node that has changed since anybody looked."""

ABSENT, GIVEN, WEIGHT = "", "<", "#"  # no operator has an empty name
_MAYBE_CONSTANT = frozenset({WEIGHT, "Constant"})


class RuleIndex:
    """Rules by the operator of their root, in order of benefit.

    Nodes that look alike (same operator, inputs from the same kinds of operators) are many, and what may fit one of
    them may fit all: the answer is kept for the next.

    Args:
        rules: the rules.
        keep_near_misses: also gives rules whose constants are certain to be missing, because it will be told how far
            they matched.
    """

    def __init__(self, rules: Iterable[Rule], *, keep_near_misses: bool) -> None:
        self._by_root: dict[tuple[str, str], list[Rule]] = collections.defaultdict(list)
        for rule in sorted(rules, key=lambda r: -r.benefit):
            for op_type in rule.pattern.types:
                self._by_root[op_type, rule.pattern.domain].append(rule)
        self._keep_near_misses = keep_near_misses
        self._known: dict[int, dict[Look, Sequence[Rule]]] = {}

    def candidates(self, node: ir.Node, opset: int) -> Sequence[Rule]:
        """The rules that may fit `node` at that opset of ai.onnx; those left out cannot."""
        root = node.op_type, node.domain
        return self.fitting((*root, sight_of(node)), opset) if root in self._by_root else ()

    def fitting(self, look: Look, opset: int) -> Sequence[Rule]:
        """The rules that may fit nodes that look like that, at that opset of ai.onnx."""
        known = self._known.get(opset)
        if known is None:
            known = self._known[opset] = {}
        found = known.get(look)
        if found is None:
            found = known[look] = self._fitting(look, opset)
        return found

    def _fitting(self, look: Look, opset: int) -> Sequence[Rule]:
        op_type, domain, sight = look
        rules = self._by_root.get((op_type, domain), ())
        now = (rule for rule in rules if rule.opset[0] <= opset <= rule.opset[1])
        if self._keep_near_misses:
            return tuple(rule for rule in now if _may_nearly_fit(rule.pattern, sight))
        swaps = operators.commutes(op_type, domain)
        return tuple(rule for rule in now if _may_fit(rule.pattern, sight, swaps=swaps))


class Looks:
    """How each node of a model looks, as long as nobody changes it: passes after one another ask the same.

    Attributes:
        census: the graphs and nodes.
    """

    def __init__(self, census: Census) -> None:
        self.census = census
        words, used = _Words(census), _used(census)
        self._looks: list[list[Look | None]] = [
            [
                None
                if outputs and used.isdisjoint(outputs)
                else (op_type, domain, tuple([words[value] for value in inputs]))
                for op_type, domain, inputs, outputs in rows
            ]
            for rows in census.rows
        ]
        self._kinds = [frozenset(looks) for looks in self._looks]

    def calling(self, index: RuleIndex) -> list[frozenset[Look | None]]:
        """The looks of each graph's nodes that a rule of `index` may fit, and that of dead nodes."""
        return [
            frozenset(k for k in kinds if k is None or index.fitting(k, scope.opsets.get("", 0)))
            for (scope, _), kinds in zip(self.census.parts, self._kinds, strict=True)
        ]

    def idle(self, calling: Iterable[frozenset[Look | None]]) -> Iterator[ir.Node]:
        """The nodes that do not look as one of these."""
        for (_, nodes), looks, wanted in zip(self.census.parts, self._looks, calling, strict=True):
            yield from (n for n, look in zip(nodes, looks, strict=True) if look not in wanted)

    def known(self) -> dict[ir.Node, Look | None]:
        """How each node looks; None of a dead one."""
        parts = zip(self.census.parts, self._looks, strict=True)
        pairs = (zip(nodes, looks, strict=True) for (_, nodes), looks in parts)
        return dict(itertools.chain.from_iterable(pairs))


class _Words(dict[ir.Value | None, str]):
    """What feeds those who read a value; told of the values of nodes at once, of the others when asked."""

    def __init__(self, census: Census) -> None:
        super().__init__({v: row[0] for rows in census.rows for row in rows for v in row[3]})

    def __missing__(self, value: ir.Value | None) -> str:
        word = self[value] = _word_of(value)
        return word


def _used(census: Census) -> set[ir.Value | None]:
    """The values that a node reads or a graph returns."""
    used = {value for rows in census.rows for row in rows for value in row[2]}
    for scope, _ in census.parts:
        used.update(scope.graph.outputs)
    return used


def sight_of(node: ir.Node) -> Sight:
    """What feeds each input of a node."""
    return tuple([_word_of(value) for value in node.inputs])


def _word_of(value: ir.Value | None) -> str:
    """What feeds the nodes that read a value."""
    if value is None:
        return ABSENT
    producer = value.producer()
    if producer is not None:
        return producer.op_type
    # An initializer that callers may replace is no weight.
    return WEIGHT if value.is_initializer() and not value.is_graph_input() else GIVEN


def _may_nearly_fit(pattern: Op, sight: Sight) -> bool:
    """Whether operators of every kind that `pattern` wants to see feed the node, in any order."""
    if pattern.fed_by and not any(word in pattern.fed_by for word in sight):
        return False
    return all(any(t in sight for t in p.types) for p in pattern.inputs if isinstance(p, Op))


def _may_fit(pattern: Op, sight: Sight, *, swaps: bool) -> bool:
    """Whether each input may be what `pattern` wants there; where operands swap, in one of two orders."""
    width = len(pattern.inputs)
    if pattern.fed_by and not any(word in pattern.fed_by for word in sight):
        return False
    if not pattern.open and any(word != ABSENT for word in sight[width:]):
        return False
    words = (*sight[:width], *[ABSENT] * (width - len(sight)))
    orders = (words, words[::-1]) if swaps and width == 2 else (words,)
    return any(all(map(_may_be, pattern.inputs, order)) for order in orders)


def _may_be(pattern: Pattern, word: str) -> bool:
    """Whether a value that `word` tells of may be what `pattern` wants."""
    if isinstance(pattern, Op):
        return word in pattern.types
    if isinstance(pattern, Either):
        return any(_may_be(option, word) for option in pattern.options)
    if isinstance(pattern, Lit):
        return word in _MAYBE_CONSTANT
    if word == ABSENT:
        return pattern.optional
    if pattern.computed:
        return word != WEIGHT
    return not pattern.const or word in _MAYBE_CONSTANT
