"""Names of nodes, and of values that hide others."""

from __future__ import annotations

import onnx
import onnx.checker
import onnx_ir as ir
from graphopt_passes.naming import NameNodes

from graphopt.ir.check import violations
from graphopt.ir.scopes import all_graphs
from tests.rewriting import apply, parse


def named(text: str, names: dict[int, str] | None = None) -> ir.Model:
    """The model with some node names given by position, then the pass."""
    proto = parse(text)
    for index, name in (names or {}).items():
        proto.graph.node[index].name = name
    model = ir.from_proto(proto)
    apply((NameNodes(),), model)
    assert not list(violations(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not apply((NameNodes(),), model).rewrites, "not idempotent"
    return model


def node_names(model: ir.Model) -> list[str | None]:
    return [node.name for scope in all_graphs(model) for node in scope.graph]


def test_a_node_without_a_name_is_called_after_its_output() -> None:
    model = named("g (float[2] x) => (float[2] z) { y = Exp(x)  z = Neg(y) }", {1: "keep"})
    assert node_names(model) == ["y_Exp", "keep"]


def test_the_second_of_a_name_gets_another() -> None:
    model = named("g (float[2] x) => (float[2] z) { y = Exp(x)  z = Neg(y) }", {0: "n", 1: "n"})
    assert node_names(model) == ["n", "z_Neg"]


def test_a_name_that_is_taken_is_not_used_again() -> None:
    model = named(
        "g (float[2] x) => (float[2] z) { y = Exp(x)  y_Exp = Abs(y)  z = Neg(y_Exp) }",
        {1: "n", 2: "z_Neg"},
    )
    assert node_names(model) == ["y_Exp_1", "n", "z_Neg"]


def test_names_that_are_unique_stay() -> None:
    model = ir.from_proto(parse("g (float[2] x) => (float[2] z) { y = Exp(x)  z = Neg(y) }"))
    for node, name in zip(model.graph, "ab", strict=True):
        node.name = name
    assert not apply((NameNodes(),), model).rewrites


def test_names_within_branches_and_functions() -> None:
    model = named(
        """<ir_version: 9, opset_import: ["": 18, "l": 1]> g (float[2] x, bool c) => (float[2] y) {
           y = If(c) <then_branch = t () => (float[2] a) { a = l.f(x) }, else_branch = e () => (float[2] a) {
           a = Neg(x) }> }
           <domain: "l", opset_import: ["": 18]> f (p) => (q) { q = Abs(p) }"""
    )
    assert node_names(model) == ["y_If", "a_f", "a_Neg", "q_Abs"]


def test_a_value_that_hides_an_outer_one_is_renamed() -> None:
    """The loop's body calls its input x too: ONNX Runtime takes it, ONNX asks for another name."""
    model = named(
        """g (float[2] x, int64 m) => (float[2] y) { h = Exp(x)  y = Loop(m, , h) <body = b
           (int64 i, bool c, float[2] x) => (bool d, float[2] q) { d = Identity(c)  q = Add(x, x) }> }"""
    )
    body = model.graph[1].attributes["body"].as_graph()
    assert [value.name for value in body.inputs] == ["i", "c", "x_1"]


def test_the_same_model_gets_the_same_names() -> None:
    text = "g (float[2] x) => (float[2] z) { y = Exp(x)  y_Exp = Abs(y)  z = Neg(y_Exp) }"
    assert node_names(named(text)) == node_names(named(text))
