"""Near misses: what is told of a pattern that fits in part, and what is not."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.rewrite import Either, Op, Options, Rule, Var
from graphopt.rewrite.pattern import walk
from tests.rewriting import apply, parse

x = Var()


def model(text: str) -> ir.Model:
    return ir.from_proto(parse(text))


NEAR = "g (float[2] x) => (float[2] y) { a = Abs(x)  b = Neg(a)  y = Relu(b) }"


def near(pattern: Op, *, trace: bool = True) -> list[str]:
    wanted = Rule("wanted", pattern, lambda m, _g: m[x])
    ctx = apply((wanted,), model(NEAR), options=Options(trace_misses=trace))
    return [remark.reason for remark in ctx.remarks]


def test_a_near_miss_is_told_when_asked_for() -> None:
    pattern = Op("Relu", Op("Neg", Op("Exp", x)))
    assert near(pattern) == ["matched 2 of 3 nodes; stopped at Abs 'a' where Exp was wanted"]
    assert near(pattern, trace=False) == []


def test_a_near_miss_at_an_input() -> None:
    assert near(Op("Relu", Op("Neg", Op("Abs", Op("Exp", x))))) == [
        "matched 3 of 4 nodes; stopped at input 'x' where Exp was wanted"
    ]


def test_less_than_half_of_the_shortest_spelling_is_no_near_miss() -> None:
    short, long = Op("Exp", x), Op("Exp", Op("Log", Op("Tan", Op("Sin", x))))
    assert near(Op("Relu", Op("Neg", long))) == []
    assert near(Op("Relu", Op("Neg", Either(long, short))))[0].startswith("matched 2 of 3 nodes")


def test_a_near_miss_counts_the_spelling_that_it_went() -> None:
    long, short = Op("Abs", Op("Log", Op("Tan", x))), Op("Exp", x)
    assert near(Op("Relu", Op("Neg", Either(short, long)))) == [
        "matched 3 of 5 nodes; stopped at input 'x' where Log was wanted"
    ]


ANY, OTHER = Var(), Var()


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (Op("Mul", Op("Add", Op("Exp", ANY), OTHER), x), False),
        (Op("Mul", Op("Add", Op("Sub", Op("Exp", ANY), OTHER), x), x), True),
        (Op("Mul", Op("Relu", Op("Exp", ANY)), OTHER), True),
    ],
)
def test_two_operators_that_any_model_is_full_of_are_no_near_miss(pattern: Op, told: bool) -> None:
    first = (
        "c = Relu(z) y = Mul(c, x)" if "Relu" in _types(pattern) else "b = Add(a, x) y = Mul(b, x)"
    )
    text = f"g (float[2] x, float[2] z) => (float[2] y, float[2] a) {{ a = Sub(z, x) {first} }}"
    wanted = Rule("wanted", pattern, lambda m, _g: m[x])
    found = apply((wanted,), model(text), options=Options(trace_misses=True))
    assert bool(found.remarks) is told


def _types(pattern: Op) -> set[str]:
    return {kind for op in walk(pattern) for kind in op.types}


def test_a_near_miss_at_a_node_that_went_is_not_told() -> None:
    """Another rule made something of it after all."""
    wanted = Rule("wanted", Op("Neg", Op("Abs", Op("Exp", ANY))), lambda m, _g: m[ANY])
    made = Rule("made", Op("Relu", Op("Neg", Op("Abs", x))), lambda m, g: g.op("Exp", m[x]))
    ctx = apply((wanted, made), model(NEAR), options=Options(trace_misses=True))
    assert [each.rule for each in ctx.rewrites] == ["made"]
    assert ctx.remarks == []
    assert apply((wanted,), model(NEAR), options=Options(trace_misses=True)).remarks


def test_a_near_miss_at_an_absent_input() -> None:
    text = "g (float[2] x) => (float[2] y) { b = Clip(x)  y = Relu(b) }"
    pattern = Op("Relu", Op("Clip", x, Op("Abs", Var()), Var(optional=True)))
    wanted = Rule("wanted", pattern, lambda m, _g: m[x])
    ctx = apply((wanted,), model(text), options=Options(trace_misses=True))
    assert [r.reason for r in ctx.remarks] == [
        "matched 2 of 3 nodes; stopped at an absent input where Abs was wanted"
    ]


def test_a_root_alone_is_no_near_miss() -> None:
    assert near(Op("Relu", Op("Neg|Exp", Var(const=True)))) == [
        "matched 2 of 2 nodes; stopped at Abs 'a' where a constant was wanted"
    ]
    assert near(Op("Neg", Var(const=True))) == []
