"""What patterns bind: operands, alternatives, constants, shared nodes, traces of what failed."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.rewrite import Either, Lit, Op, Var
from graphopt.rewrite.pattern import Binding, Pattern, Trace, walk

HEADER = '<ir_version: 9, opset_import: ["" : 18]>\n'


def graph(body: str, inputs: str = "float[2] x, float[2] z", constants: str = "") -> ir.Graph:
    held = f"<{constants}>" if constants else ""
    return ir.from_proto(
        onnx.parser.parse_model(f"{HEADER}g ({inputs}) => (float[2] y) {held} {{ {body} }}")
    ).graph


def bindings(pattern: Pattern, g: ir.Graph, trace: Trace | None = None) -> list[Binding]:
    return list(pattern.match(g.outputs[0], {}, trace))


def test_a_pattern_binds_nodes_and_values() -> None:
    g = graph("a = Abs(x)  y = Neg(a)")
    x = Var()
    inner = Op("Abs", x)
    outer = Op("Neg", inner)
    (env,) = bindings(outer, g)
    assert (env[x], env[inner], env[outer]) == (g.inputs[0], g[0], g[1])


@pytest.mark.parametrize(
    "pattern", [Op("Abs", Var()), Op("Neg", Var(), domain="my"), Op("Neg", Op("Neg", Var()))]
)
def test_other_operators_do_not_match(pattern: Op) -> None:
    assert not bindings(pattern, graph("a = Abs(x)  y = Neg(a)"))


def test_types_are_alternatives() -> None:
    assert bindings(Op("Relu|Neg", Var()), graph("y = Neg(x)"))


def test_one_variable_is_one_value() -> None:
    x = Var()
    assert bindings(Op("Add", x, x), graph("y = Add(x, x)"))
    assert not bindings(Op("Add", x, x), graph("y = Add(x, z)"))


def test_one_operator_is_one_node() -> None:
    a = Op("Abs", Var())
    assert bindings(Op("Add", a, a), graph("p = Abs(x)  y = Add(p, p)"))
    assert not bindings(Op("Add", a, a), graph("p = Abs(x)  q = Abs(x)  y = Add(p, q)"))


def test_operands_of_commutative_operators_are_tried_both_ways() -> None:
    a = Op("Abs", Var())
    x = Var()
    g = graph("p = Abs(x)  y = Add(z, p)")
    (env,) = bindings(Op("Add", a, x), g)
    assert env[x] is g.inputs[1]
    assert not bindings(Op("Sub", a, x), graph("p = Abs(x)  y = Sub(z, p)"))


def test_a_failure_further_on_tries_the_other_order() -> None:
    """Mul(s, t) may take either operand as s; only one leaves the other a Neg of the same value."""
    s = Var()
    pattern = Op("Mul", s, Op("Neg", s))
    g = graph("n = Neg(z)  y = Mul(n, z)")
    (env,) = bindings(pattern, g)
    assert env[s] is g.inputs[1]


def test_either_takes_the_first_option_that_fits() -> None:
    v, w = Var(), Var(const=True)
    relu = Op("Relu", v)
    choice = Either(relu, w)
    (env,) = bindings(Op("Neg", choice), graph("r = Relu(x)  y = Neg(r)"))
    assert relu in env
    assert w not in env
    (env,) = bindings(Op("Neg", choice), graph("y = Neg(w)", constants="float[2] w = {1, 2}"))
    assert relu not in env
    assert env[choice] is env[w]


def test_either_goes_back_to_the_next_option() -> None:
    """The first option binds, and what follows fails: the second must be tried."""
    v = Var()
    choice = Either(Op("Abs", v), v)
    g = graph("p = Abs(x)  q = Neg(p)  y = Mul(p, q)")
    (env,) = bindings(Op("Mul", choice, Op("Neg", v)), g)
    assert env[v] is g[0].outputs[0]


def test_either_twice_is_one_value() -> None:
    choice = Either(Op("Abs", Var()), Var())
    assert bindings(Op("Sub", choice, choice), graph("p = Abs(x)  y = Sub(p, p)"))
    assert not bindings(Op("Sub", choice, choice), graph("p = Abs(x)  y = Sub(p, x)"))


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        (Lit(2.0), True),
        (Lit(2.0000001), False),
        (Lit(2.0000001, tolerance=1e-6), True),
        (Lit(-2.0), False),
        (Var(const=True), True),
        (Var(), True),
    ],
)
def test_constants(pattern: Lit | Var, fits: bool) -> None:
    g = graph("y = Mul(x, w)", constants="float[2] w = {2, 2}")
    assert bool(bindings(Op("Mul", Var(), pattern), g)) == fits


def test_a_literal_is_every_element() -> None:
    g = graph("y = Mul(x, w)", constants="float[2] w = {2, 3}")
    assert not bindings(Op("Mul", Var(), Lit(2.0)), g)


def test_minus_zero_is_the_literal_zero() -> None:
    g = graph("y = Add(x, w)", constants="float[2] w = {-0.0, -0.0}")
    assert bindings(Op("Add", Var(), Lit(0.0)), g)


def test_a_default_of_an_input_is_no_constant() -> None:
    g = graph("y = Mul(x, z)", constants="float[2] z = {2, 2}")
    assert not bindings(Op("Sub|Mul", Var(), Var(const=True)), g)
    assert not bindings(Op("Sub|Mul", Var(), Lit(2.0)), g)


def test_a_constant_node_is_a_constant() -> None:
    g = graph("c = Constant <value_float = 2.0> ()  y = Mul(x, c)")
    assert bindings(Op("Mul", Var(), Lit(2.0)), g)


def test_optional_inputs() -> None:
    low, high = Var(optional=True), Var(optional=True)
    clip = Op("Clip", Var(), low, high)
    (env,) = bindings(clip, graph("y = Clip(x)"))
    assert (env[low], env[high]) == (None, None)
    g = graph("y = Clip(x, , z)")
    (env,) = bindings(clip, g)
    assert (env[low], env[high]) == (None, g.inputs[1])
    assert not bindings(Op("Clip", Var(), Var(), Var()), graph("y = Clip(x)"))


def test_further_inputs_need_an_ellipsis() -> None:
    g = graph("y = Concat <axis = 0> (x, z, x)")
    assert not bindings(Op("Concat", Var(), Var()), g)
    assert bindings(Op("Concat", Var(), ...), g)


def test_an_output_other_than_the_first() -> None:
    g = graph("a, b = Split <num_outputs = 2> (x)  y = Neg(b)")
    assert bindings(Op("Neg", Op("Split", Var(), output=1)), g)
    assert not bindings(Op("Neg", Op("Split", Var())), g)
    assert not bindings(Op("Neg", Op("Split", Var(), output=2)), g)


def test_a_graph_input_has_no_producer() -> None:
    assert not bindings(Op("Neg", Op("Abs", Var())), graph("y = Neg(x)"))


def test_walk_yields_each_operator_once() -> None:
    shared = Op("Abs", Var())
    left, right = Op("Neg", shared), Op("Relu", shared)
    root = Op("Add", left, Either(right, Op("Exp", Var())))
    assert [op.types[0] for op in walk(root)] == ["Add", "Neg", "Abs", "Relu", "Exp"]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (Op("Neg", Op("Abs", Op("Exp|Log", Var()))), "Exp|Log"),
        (Op("Neg", Op("Abs", Lit(1.0))), "the constant 1.0"),
        (Op("Neg", Op("Abs", Var(const=True))), "a constant"),
    ],
)
def test_a_trace_says_what_stopped_the_deepest_match(pattern: Op, wanted: str) -> None:
    g = graph("a = Abs(x)  y = Neg(a)")
    trace = Trace()
    assert not bindings(pattern, g, trace)
    assert (trace.depth, trace.culprit, trace.wanted) == (2, g.inputs[0], wanted)


def test_computed_is_what_is_no_constant() -> None:
    g = graph("y = Add(x, w)", constants="float[2] w = {1, 2}")
    computed = Var(computed=True)
    (env,) = bindings(Op("Add", Var(const=True), computed), g)
    assert env[computed] is g.inputs[0]
    assert not bindings(Op("Add", computed, Var(computed=True)), g)


@pytest.mark.parametrize(
    ("fed_by", "fits"), [("Abs", True), ("Neg|Abs", True), ("Neg", False), ("Add", False)]
)
def test_one_of_several_operators_has_to_feed_it(fed_by: str, fits: bool) -> None:
    g = graph("p = Abs(x)  y = Add(z, p)")
    pattern = Op("Add", ..., fed_by=fed_by)
    assert bool(bindings(pattern, g)) == fits
    assert (pattern.first(g[1]) is not None) == fits


one, two = Var(), Var()
FIRST = [
    Op("Clip", one),
    Op("Clip", one, ...),
    Op("Clip", one, two),
    Op("Clip", one, Var(optional=True), Var(const=True)),
    Op("Clip", one, Var(optional=True), Var(optional=True)),
    Op("Add", one, two),
    Op("Add", one, one),
    Op("Add", one, Var(const=True)),
    Op("Add", Var(const=True), Var(computed=True)),
    Op("Add", Op("Abs", one), two),
    Op("Add", Lit(1.0), two),
    Op("Add", one, ..., fed_by="Abs"),
    Op("Add"),
    Op("Add", ...),
]


@pytest.mark.parametrize("pattern", FIRST)
def test_the_first_binding_is_the_first_of_all(pattern: Op) -> None:
    """Shortcut or not: the same nodes and values, bound in the same order."""
    g = graph(
        "a = Add(x, z)  b = Add(w, x)  c = Add(x, x)  p = Abs(x)  d = Add(z, p)  e = Clip(x)  f = Clip(x, w)"
        "  h = Clip(x, , w)  i = Clip(x, w, z)  y = Sum(a, b, c, d, e, f, h, i)",
        constants="float w = {1}",
    )
    for node in g:
        if node.op_type in pattern.types:
            expected = next(pattern.match_node(node, {}), None)
            found = pattern.first(node)
            assert (found and list(found.items())) == (expected and list(expected.items()))
