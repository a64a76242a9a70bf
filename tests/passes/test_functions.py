"""Calls of model-local functions."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphopt_passes.cleanup import RemoveDeadCode
from graphopt_passes.functions import InlineFunctions

from graphopt.ir.check import violations
from graphopt.pipeline import Step
from graphopt.rewrite import Context
from tests.rewriting import apply, make_feeds, parse, run, structure

STEPS: tuple[Step, ...] = (InlineFunctions(), RemoveDeadCode())
HEADER = '<ir_version: 10, opset_import: ["": 18, "l": 1]>\n'


def inline(text: str, *, exact: bool = True) -> tuple[ir.Model, Context]:
    """Inlines, checks, and compares the outputs."""
    proto = parse(HEADER + text)
    onnx.checker.check_model(proto)
    model = ir.from_proto(proto)
    ctx = apply(STEPS, model)
    assert not list(violations(model))
    got = ir.to_proto(model)
    onnx.checker.check_model(got, full_check=True)
    assert not apply(STEPS, model).rewrites
    if exact:
        for seed in (0, 1):
            feed = make_feeds(proto, seed)
            for a, b in zip(run(proto, feed), run(got, feed), strict=True):
                np.testing.assert_array_equal(a, b)
    return model, ctx


def same(model: ir.Model, text: str) -> None:
    assert structure(model) == structure(ir.from_proto(parse(text)))


def test_call_becomes_body() -> None:
    model, _ = inline(
        """g (float[N] x, float[N] z) => (float[N] y) { t = l.f(x, z) y = Neg(t) }
        <domain: "l", opset_import: ["": 18]> f (a, b) => (c) { d = Add(a, b) c = Exp(d) }"""
    )
    same(
        model, "g (float[N] x, float[N] z) => (float[N] y) { d = Add(x, z) t = Exp(d) y = Neg(t) }"
    )
    assert not model.functions
    assert dict(model.opset_imports) == {"": 18}
    assert [v.name for node in model.graph for v in node.outputs] == ["t_d", "t", "y"]


def test_output_of_the_call_is_a_graph_output() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18]> f (a) => (c) { c = Exp(a) }"""
    )
    same(model, "g (float[N] x) => (float[N] y) { y = Exp(x) }")


def test_function_that_returns_its_input() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y, float[N] z) { y, t = l.f(x) z = Exp(t) }
        <domain: "l", opset_import: ["": 18]> f (a) => (a, a2) { a2 = Neg(a) }""",
        exact=False,
    )
    same(
        model,
        "g (float[N] x) => (float[N] y, float[N] z) { t = Neg(x) y = Identity(x) z = Exp(t) }",
    )


def test_two_calls_get_names_of_their_own() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { t = l.f(x) y = l.f(t) }
        <domain: "l", opset_import: ["": 18]> f (a) => (c) { d = Exp(a) c = Neg(d) }"""
    )
    same(model, "g (float[N] x) => (float[N] y) { d = Exp(x) t = Neg(d) e = Exp(t) y = Neg(e) }")


def test_nested_calls() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18, "l": 1]> f (a) => (c) { d = l.h(a) c = l.h(d) }
        <domain: "l", opset_import: ["": 18]> h (a) => (c) { c = Exp(a) }"""
    )
    same(model, "g (float[N] x) => (float[N] y) { d = Exp(x) y = Exp(d) }")


def test_parameters_and_defaults() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { t = l.f<p = 0.5>(x) y = l.f<p = 0.5, q = 0.125>(t) }
        <domain: "l", opset_import: ["": 18]> f <p, q: float = 0.25> (a) => (c)
        { d = LeakyRelu<alpha: float = @p>(a) c = Elu<alpha: float = @q>(d) }"""
    )
    same(
        model,
        """g (float[N] x) => (float[N] y) { a = LeakyRelu<alpha = 0.5>(x) b = Elu<alpha = 0.25>(a)
        c = LeakyRelu<alpha = 0.5>(b) y = Elu<alpha = 0.125>(c) }""",
    )


def test_absent_parameter_leaves_the_attribute_to_its_operator() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18]> f <p> (a) => (c) { c = LeakyRelu<alpha: float = @p>(a) }""",
        exact=False,
    )
    same(model, "g (float[N] x) => (float[N] y) { y = LeakyRelu(x) }")


def test_parameter_of_an_inner_call() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { y = l.f<p = 0.5>(x) }
        <domain: "l", opset_import: ["": 18, "l": 1]> f <p> (a) => (c) { c = l.h<q: float = @p>(a) }
        <domain: "l", opset_import: ["": 18]> h <q> (a) => (c) { c = Elu<alpha: float = @q>(a) }"""
    )
    same(model, "g (float[N] x) => (float[N] y) { y = Elu<alpha = 0.5>(x) }")


def test_absent_optional_input() -> None:
    model, _ = inline(
        """g (float[N] x, float hi) => (float[N] y) { y = l.f(x, , hi) }
        <domain: "l", opset_import: ["": 18]> f (a, lo, hi, more) => (c) { c = Clip(a, lo, hi) }"""
    )
    same(model, "g (float[N] x, float hi) => (float[N] y) { y = Clip(x, , hi) }")


def test_unused_output_of_a_call() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18]> f (a) => (c, d) { c = Exp(a) d = Neg(c) }""",
        exact=False,
    )
    same(model, "g (float[N] x) => (float[N] y) { y = Exp(x) }")


def test_subgraphs_in_the_body_are_copied() -> None:
    model, _ = inline(
        """g (bool c, float[N] x) => (float[N] y) { t = l.f(c, x) y = l.f(c, t) }
        <domain: "l", opset_import: ["": 18]> f (k, a) => (r)
        { s = Neg(a) r = If(k) <then_branch = t () => (p) { one = Constant<value_float = 1.0>() p = Add(s, one) },
                                else_branch = e () => (q) { q = Mul(s, a) }> }"""
    )
    assert [node.op_type for node in model.graph] == ["Neg", "If", "Neg", "If"]


def test_calls_in_branches() -> None:
    model, _ = inline(
        """g (bool c, float[N] x) => (float[N] y) {
            y = If(c) <then_branch = t () => (float[N] p) { p = l.f(x) },
                       else_branch = e () => (float[N] q) { q = Neg(x) }> }
        <domain: "l", opset_import: ["": 18]> f (a) => (c) { d = Exp(a) c = Neg(d) }"""
    )
    branch = model.graph[0].attributes["then_branch"].as_graph()
    assert [node.op_type for node in branch] == ["Exp", "Neg"]


def test_function_with_the_name_of_an_operator() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { y = l.Relu(x) }
        <domain: "l", opset_import: ["": 18]> Relu (a) => (c) { c = Exp(a) }"""
    )
    same(model, "g (float[N] x) => (float[N] y) { y = Exp(x) }")


def test_overloads_are_told_apart() -> None:
    proto = parse(
        HEADER
        + """g (float[N] x) => (float[N] y) { t = l.f(x) y = l.f(t) }
        <domain: "l", opset_import: ["": 18]> f (a) => (c) { c = Exp(a) }"""
    )
    other = proto.functions.add()
    other.CopyFrom(proto.functions[0])
    other.overload, proto.graph.node[1].overload = "v2", "v2"
    other.node[0].op_type = "Neg"
    model = ir.from_proto(proto)
    apply(STEPS, model)
    same(model, "g (float[N] x) => (float[N] y) { t = Exp(x) y = Neg(t) }")


def test_compatible_version_is_inlined() -> None:
    model, _ = inline(
        """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 17]> f (a) => (c) { c = Exp(a) }""",
    )
    same(model, "g (float[N] x) => (float[N] y) { y = Exp(x) }")
    assert model.opset_imports[""] == 18


def declined(text: str, reason: str) -> None:
    model = ir.from_proto(parse(HEADER + text))
    ctx = apply([InlineFunctions()], model)
    assert not ctx.rewrites
    assert reason in ctx.remarks[0].reason


def test_operator_of_another_version_is_declined() -> None:
    declined(
        """g (float[2,3] x) => (float[2] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 17]> f (a) => (c) { c = ReduceMax<axes = [1], keepdims = 0>(a) }""",
        "version 17",
    )


def test_recursion_is_declined() -> None:
    declined(
        """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18, "l": 1]> f (a) => (c) { c = l.h(a) }
        <domain: "l", opset_import: ["": 18, "l": 1]> h (a) => (c) { c = l.f(a) }""",
        "calls itself",
    )


def test_function_beside_a_recursive_one_is_inlined() -> None:
    model = ir.from_proto(
        parse(
            HEADER
            + """g (float[N] x) => (float[N] y) { t = l.f(x) y = l.k(t) }
        <domain: "l", opset_import: ["": 18, "l": 1]> f (a) => (c) { c = l.f(a) }
        <domain: "l", opset_import: ["": 18, "l": 1]> k (a) => (c) { d = Exp(a) c = l.f(d) }"""
        )
    )
    apply([InlineFunctions()], model)
    assert [node.op_type for node in model.graph] == ["f", "Exp", "f"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [("y = l.f(x, x)", "passes 2 inputs"), ("y, z = l.f(x)", "2 outputs")],
)
def test_calls_that_do_not_fit_are_declined(call: str, reason: str) -> None:
    declined(
        f"""g (float[N] x) => (float[N] y) {{ {call} }}
        <domain: "l", opset_import: ["": 18]> f (a) => (c) {{ c = Exp(a) }}""",
        reason,
    )


def test_absent_input_that_is_returned_is_declined() -> None:
    declined(
        """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18]> f (a, b) => (b) { c = Exp(a) }""",
        "returns its input 'b'",
    )


def test_graph_as_attribute_is_declined() -> None:
    proto = parse(
        HEADER
        + """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18]> f <body> (a) => (c) { c = Exp(a) }"""
    )
    inner = onnx.parser.parse_graph("i () => (float r) { r = Constant<value_float = 1.0>() }")
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))
    model = ir.from_proto(proto)
    ctx = apply([InlineFunctions()], model)
    assert "graph as an attribute" in ctx.remarks[0].reason


def test_domain_of_the_body_is_imported() -> None:
    model = ir.from_proto(
        parse(
            HEADER
            + """g (float[N] x) => (float[N] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18, "far": 3]> f (a) => (c) { c = far.op(a) }"""
        )
    )
    apply(STEPS, model)
    assert dict(model.opset_imports) == {"": 18, "far": 3}


def test_second_version_of_a_new_domain_is_declined() -> None:
    model = ir.from_proto(
        parse(
            HEADER
            + """g (float[N] x) => (float[N] y) { t = l.f(x) y = l.h(t) }
        <domain: "l", opset_import: ["": 18, "far": 3]> f (a) => (c) { c = far.op(a) }
        <domain: "l", opset_import: ["": 18, "far": 4]> h (a) => (c) { c = far.op(a) }"""
        )
    )
    ctx = apply([InlineFunctions()], model)
    assert [node.op_type for node in model.graph] == ["op", "h"]
    assert "version 4 of domain 'far'" in ctx.remarks[0].reason


def test_bodies_of_loops_within_a_function_are_copied() -> None:
    """The inputs of a subgraph belong to one copy of it."""
    model, _ = inline(
        """g (float[2] x) => (float[2] y, float[2] z) { y = l.f(x) z = l.f(y) }
        <domain: "l", opset_import: ["": 18]> f (a) => (r) {
          n = Constant<value_int = 3>()
          r = Loop(n, , a) <body = b (int64 i, bool c, float[2] u) => (bool d, float[2] w) {
            d = Identity(c)  k = Cast<to = 1>(i)  w = Add(u, k) }> }""",
    )
    bodies = [node.attributes["body"].as_graph() for node in model.graph if node.op_type == "Loop"]
    assert len(bodies) == 2
    names = [value.name for body in bodies for value in body.inputs]
    assert len(set(names)) == len(names) == 6


def test_initializers_of_graphs_within_a_function_are_copied() -> None:
    text = """g (bool c, float[2] x) => (float[2] y, float[2] z) { y = l.f(c, x) z = l.f(c, y) }
        <domain: "l", opset_import: ["": 18]> f (c, a) => (r) {
          r = If(c) <then_branch = t () => (float[2] p) <float h = {0.5}> { p = Mul(a, h) },
                     else_branch = e () => (float[2] q) { q = Neg(a) }> }"""
    model, _ = inline(text, exact=False)
    names = [list(node.attributes["then_branch"].as_graph().initializers) for node in model.graph]
    assert len(names) == 2
    assert len({*names[0], *names[1]}) == 2
    feed = {"c": np.array(True), "x": np.array([1, 3], np.float32)}
    before = parse(
        HEADER + text
    )  # anew: onnx_ir writes new names of tensors into the proto they came from
    for a, b in zip(run(before, feed), run(ir.to_proto(model), feed), strict=True):
        np.testing.assert_array_equal(a, b)
