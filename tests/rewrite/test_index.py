"""Which rules are tried at a node: all that could match, and few that could not."""

from __future__ import annotations

import itertools

import onnx_ir as ir
import pytest

from graphopt.ir.build import Builder
from graphopt.ir.scopes import Census
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Var
from graphopt.rewrite.index import Looks, RuleIndex, sight_of
from tests.rewriting import parse

BODY = """
    g (float[2] x, float[2] a = {1, 2}) => (float[2] y, float[2] z)
    <float[2] w = {1, 2}, float one = {1}>
    {
        r = Relu(x)  n = Neg(x)  c = Constant<value_float = 1.0>()
        s1 = Add(r, w)  s2 = Add(w, r)  s3 = Add(r, n)  s4 = Add(x, c)  s5 = Add(x, a)  s6 = Sub(r, w)
        k1 = Clip(x, one)  k2 = Clip(x, , one)  k3 = Clip(x)
        y = Sum(s1, s2, s3, s4, s5, s6, k1, k2, k3)  z = Abs(y)
    }
"""
x, w = Var(), Var(const=True)
relu = Op("Relu", x)
PATTERNS = (
    Op("Add", relu, w),
    Op("Add", relu, Op("Neg", x)),
    Op("Add", x, Lit(1.0)),
    Op("Add", Either(Op("Neg", x), w), Var()),
    Op("Sub", w, relu),
    Op("Sub", relu, w),
    Op("Clip", x, w),
    Op("Clip", x, Var(optional=True), w),
    Op("Clip", x),
    Op("Clip", x, ...),
    Op("Sum|Abs", ...),
    Op("Add", Var(computed=True), Var(computed=True)),
    Op("Add", ..., fed_by="Neg"),
)


def build(_m: Match, _g: Builder) -> None:
    return None


def graph() -> ir.Graph:
    return ir.from_proto(parse(BODY)).graph


RULES = tuple(Rule(f"rule-{i}", pattern, build) for i, pattern in enumerate(PATTERNS))


@pytest.mark.parametrize("keep", [False, True])
def test_what_matches_is_a_candidate(keep: bool) -> None:
    index = RuleIndex(RULES, keep_near_misses=keep)
    matched = 0
    for node, each in itertools.product(graph(), RULES):
        fits = node.op_type in each.pattern.types and any(each.pattern.match_node(node, {}))
        matched += fits
        assert not fits or each in index.candidates(node, 18), (node.name, each.name)
    assert matched > 12


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("s1", [0, 2, 3]),
        ("s2", [0, 2, 3]),
        ("s3", [1, 3, 11, 12]),
        ("s4", [2, 3, 11]),
        ("s5", [11]),  # callers may replace `a`
        ("s6", [5]),
        ("k1", [6, 9]),
        ("k2", [7, 9]),
        ("k3", [8, 9]),
        ("z", [10]),
    ],
)
def test_what_cannot_match_is_none(output: str, names: list[int]) -> None:
    node = next(n for n in graph() if n.outputs[0].name == output)
    found = RuleIndex(RULES, keep_near_misses=False).candidates(node, 18)
    assert [RULES.index(each) for each in found] == names


def test_missing_constants_stay_candidates_where_near_misses_are_told() -> None:
    node = next(n for n in graph() if n.outputs[0].name == "s3")  # Add(Relu, Neg): no constant
    index = RuleIndex(RULES[:1], keep_near_misses=True)
    assert index.candidates(node, 18) == RULES[:1]
    assert not RuleIndex(RULES[:1], keep_near_misses=False).candidates(node, 18)


def test_opset_and_benefit() -> None:
    node = next(n for n in graph() if n.outputs[0].name == "z")
    old = Rule("old", Op("Abs", x), build, opset=(1, 17))
    low = Rule("low", Op("Abs", x), build)
    high = Rule("high", Op("Abs", x), build, benefit=2)
    index = RuleIndex((old, low, high), keep_near_misses=False)
    assert index.candidates(node, 18) == (high, low)
    assert index.candidates(node, 17) == (high, old, low)
    assert sight_of(node) == ("Sum",)


def test_looks_name_every_node_that_may_be_left_unvisited() -> None:
    """Idle are those without candidates; dead nodes are not, because they have to be removed."""
    model = ir.from_proto(parse(BODY.replace("z = Abs(y)", "z = Abs(y)  dead = Exp(x)")))
    rules = (Rule("a", Op("Add", relu, w), build), Rule("b", Op("Abs", x), build))
    index = RuleIndex(rules, keep_near_misses=False)
    looks = Looks(Census(model))
    idle = set(looks.idle(looks.calling(index)))
    for node in model.graph:
        called = bool(index.candidates(node, 18)) or node.op_type == "Exp"
        assert (node in idle) == (not called), node.name
    assert {node.outputs[0].name for node in set(model.graph) - idle} == {"s1", "s2", "z", "dead"}


def test_looks_are_those_that_each_node_has_by_itself() -> None:
    text = BODY.replace("z = Abs(y)", "z = Abs(y)  dead = Exp(x)")
    model = ir.from_proto(parse(text))
    known = Looks(Census(model)).known()
    assert list(known) == list(model.graph)
    for node, look in known.items():
        alive = (node.op_type, node.domain, sight_of(node))
        assert look == (None if node.op_type == "Exp" else alive), node.name
