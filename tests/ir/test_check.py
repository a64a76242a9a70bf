"""One broken model per invariant; models that are odd but sound stay unmentioned."""

from __future__ import annotations

from collections.abc import Callable

import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.ir.check import violations

HEADER = '<ir_version: 9, opset_import: ["" : 18]>\n'
CHAIN = (
    HEADER
    + "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Add(x, w)  b = Neg(a)  y = Relu(b) }"
)
BRANCH = (
    HEADER
    + """
g (float[1] x, bool c) => (float[1] y) {
  a = Abs(x)
  y = If(c) <then_branch = t () => (float[1] p) { p = Neg(a) }, else_branch = e () => (float[1] p) { p = Relu(a) }>
}"""
)
FUNCTION = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
g (float[1] x) => (float[1] y) { y = my.f(x) }
<domain: "my", opset_import: ["" : 18]>
f (a) => (b) { b = Neg(a) }
"""


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("text", [CHAIN, BRANCH, FUNCTION])
def test_sound_models_have_none(text: str) -> None:
    assert list(violations(model(text))) == []


def branch(m: ir.Model, name: str = "then_branch") -> ir.Graph:
    return next(n for n in m.graph if n.op_type == "If").attributes[name].as_graph()


def duplicate(m: ir.Model) -> None:
    m.graph[1].outputs[0].name = "a"


def shadow(m: ir.Model) -> None:
    graph = branch(m)
    graph[0].outputs[0].name = "a"


def unordered(m: ir.Model) -> None:
    first = m.graph[0]
    m.graph.remove(first)
    m.graph.append(first)


def removed(m: ir.Model) -> None:
    m.graph.remove(m.graph[0])


def out_of_scope(m: ir.Model) -> None:
    inner = branch(m)[0].outputs[0]
    m.graph[0].replace_input_with(0, inner)


def nameless(m: ir.Model) -> None:
    m.graph[0].outputs[0].name = None


def nameless_input(m: ir.Model) -> None:
    m.graph.inputs[0].name = None


def no_tensor(m: ir.Model) -> None:
    m.graph.initializers["w"].const_value = None


def misnamed(m: ir.Model) -> None:
    m.graph.initializers["w"]._name = "v"


def body_initializer(m: ir.Model) -> None:
    value = ir.Value(name="w", const_value=ir.tensor([1.0]))
    next(iter(m.functions.values())).graph.register_initializer(value)


def lost_output(m: ir.Model) -> None:
    m.graph.outputs[0] = ir.Value(name="ghost")


def double_input(m: ir.Model) -> None:
    m.graph.inputs.append(m.graph.inputs[0])


def wrong_graph(m: ir.Model) -> None:
    m.graph[0]._graph = None


def wrong_producer(m: ir.Model) -> None:
    m.graph[0].outputs[0]._producer = m.graph[1]


@pytest.mark.parametrize(
    ("text", "damage", "message"),
    [
        (CHAIN, duplicate, "main: 'a' is defined twice"),
        (
            BRANCH,
            shadow,
            "main/If (-> y): 'a' is defined twice, the first time in a graph around it",
        ),
        (CHAIN, unordered, "main: Neg (-> b) reads 'a', which is not defined before it"),
        (CHAIN, removed, "main: Neg (-> b) reads 'a', which is not defined before it"),
        (BRANCH, out_of_scope, "main: Abs (-> a) reads 'p', which is not defined before it"),
        (CHAIN, nameless, "main: a value in use has no name"),
        (CHAIN, nameless_input, "main: a value in use has no name"),
        (CHAIN, no_tensor, "main: initializer 'w' has no tensor"),
        (CHAIN, misnamed, "main: initializer 'w' calls itself 'v'"),
        (
            FUNCTION,
            body_initializer,
            "function my::f: a function body cannot hold initializers: ['w']",
        ),
        (CHAIN, lost_output, "main: output 'ghost' is not defined in reach"),
        (CHAIN, double_input, "main: input 'x' is listed twice"),
        (CHAIN, wrong_graph, "main: Add (-> a) does not know its graph"),
        (CHAIN, wrong_producer, "main: output 'a' of Add (-> a) names another producer"),
    ],
)
def test_each_violation_is_told(
    text: str, damage: Callable[[ir.Model], None], message: str
) -> None:
    broken = model(text)
    damage(broken)
    found = list(violations(broken))
    assert any(each.startswith(message) for each in found), found


def test_a_subgraph_input_may_hide_an_outer_value() -> None:
    text = (
        HEADER
        + """
    g (int64 n, bool c, float[1] v) => (float[1] y) {
      k = Abs(v)
      y = Loop(n, c, v) <body = b (int64 i, bool k, float[1] v) => (bool k2, float[1] w) {
        k2 = Identity(k)
        w = Neg(v) }>
      }"""
    )
    assert list(violations(model(text))) == []


def test_a_hidden_value_must_not_be_read() -> None:
    text = (
        HEADER
        + """
    g (int64 n, bool c, float[1] v) => (float[1] y) {
      y = Loop(n, c, v) <body = b (int64 i, bool k, float[1] v) => (bool k2, float[1] w) {
        k2 = Identity(k)
        w = Neg(v) }>
      }"""
    )
    broken = model(text)
    body = broken.graph[0].attributes["body"].as_graph()
    body[1].replace_input_with(0, broken.graph.inputs[2])
    (message,) = violations(broken)
    assert message.startswith(
        "main/Loop (-> y): Neg (-> w) reads 'v', which is not defined before it"
    )


def test_names_of_siblings_may_agree() -> None:
    assert list(violations(model(BRANCH))) == []


def test_a_hidden_name_is_visible_again_after_the_subgraph() -> None:
    text = (
        HEADER
        + """
    g (int64 n, bool c, float[1] v) => (float[1] y, float[1] z) {
      y = Loop(n, c, v) <body = b (int64 i, bool k, float[1] v) => (bool k2, float[1] w) {
        k2 = Identity(k)
        w = Neg(v) }>
      z = Abs(v)
      }"""
    )
    assert list(violations(model(text))) == []
