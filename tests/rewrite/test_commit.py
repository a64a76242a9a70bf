"""Putting a replacement into a graph: what is refused before, what names and constants are like after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir.build import Builder
from graphopt.ir.check import violations
from graphopt.numerics import Numerics
from graphopt.rewrite import (
    ORIGIN_KEY,
    RULE_KEY,
    Context,
    Gate,
    Match,
    Op,
    Rewriter,
    Rule,
    Skip,
    Var,
    exact,
    rule,
)
from graphopt.targets import get_target
from tests.rewriting import apply, check, parse

x = Var()
relu = Op("Relu", x)


def replacing(build: Callable[[Match, Builder], object], pattern: Op = relu) -> Rule:
    return Rule("replace", pattern, build, Numerics.EXACT)  # type: ignore[arg-type]


def run(rules: Sequence[Rule], text: str) -> tuple[ir.Model, Context]:
    model = ir.from_proto(parse(text))
    ctx = apply(rules, model)
    assert not list(violations(model))
    return model, ctx


def reason(rules: Sequence[Rule], text: str) -> str:
    model = ir.from_proto(parse(text))
    before = [node.op_type for node in model.graph]
    ctx = apply(rules, model)
    assert not ctx.rewrites
    assert [node.op_type for node in model.graph] == before
    (remark,) = ctx.remarks
    return remark.reason


ONE = "g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"
TWO = "g (float[2,3] x) => (float[2,3] y) { a = Relu(x)  y = Neg(a) }"


def test_a_graph_output_keeps_its_name_and_declaration() -> None:
    @exact(Op("Neg", Op("Neg", relu)))
    def drop(m: Match, g: Builder) -> ir.Value:
        return g.op("Relu", m[x])

    model, _ = run(
        (drop,), "g (float[N] x) => (float[batch] y) { r = Relu(x)  a = Neg(r)  y = Neg(a) }"
    )
    (output,) = model.graph.outputs
    assert (output.name, output.shape) == ("y", ir.Shape(["batch"]))


def test_an_existing_value_takes_over_the_name_of_a_graph_output() -> None:
    inner = Op("Abs", x, shared=True)

    @exact(Op("Relu", inner))
    def drop(m: Match, _g: Builder) -> ir.Value:
        return m.out(inner)

    model, _ = run(
        (drop,),
        "g (float[N] x) => (float[N] y, float[N] z) { a = Abs(x)  y = Relu(a)  z = Neg(a) }",
    )
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert [(n.op_type, n.outputs[0].name) for n in model.graph] == [("Abs", "y"), ("Neg", "z")]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N] x) => (float[N] y) { n = Neg(x)  y = Neg(n) }",
        "g (float[N] x) => (float[N] y, float[N] a) { a = Abs(x)  n = Neg(a)  y = Neg(n) }",
    ],
    ids=["input", "output"],
)
def test_a_graph_output_needs_a_producer_of_its_own(text: str) -> None:
    @exact(Op("Neg", Op("Neg", x)))
    def drop(m: Match, _g: Builder) -> ir.Value:
        return m[x]

    assert reason((drop,), text).startswith(
        "graph output 'y' needs a producer of its own in this graph"
    )


def test_an_outer_value_cannot_be_the_output_of_a_branch() -> None:
    @exact(Op("Neg", Op("Neg", x)))
    def drop(m: Match, _g: Builder) -> ir.Value:
        return m[x]

    text = """g (float[2] x, bool c) => (float[2] y) {
      a = Abs(x)
      y = If(c) <then_branch = t () => (float[2] p) { n = Neg(a)  p = Neg(n) },
                 else_branch = e () => (float[2] q) { q = Relu(a) }>
    }"""
    assert reason((drop,), text).startswith("graph output 'p' needs a producer of its own")


def test_one_value_cannot_be_two_outputs() -> None:
    split = Op("Split", x)

    @exact(split)
    def merge(m: Match, g: Builder) -> Sequence[ir.Value]:
        half = g.op("Slice", m[x], g.ints([0]), g.ints([1]))
        return (half, half)

    text = "g (float[2] x) => (float[1] y, float[1] z) { y, z = Split <num_outputs = 2> (x) }"
    assert reason((merge,), text).startswith("graph output 'y' needs a producer of its own")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m, g: g.op("Cast", m[x], to=ir.DataType.DOUBLE), "replaces FLOAT by DOUBLE"),
        (lambda m, g: g.op("Flatten", m[x], axis=0), "replaces dims [2, 3] by [1, 6]"),
        (lambda m, g: g.op("Reshape", m[x], g.ints([6])), "replaces rank 2 by rank 1"),
        (lambda m, g: [g.op("Abs", m[x]), g.op("Neg", m[x])], "2 replacements for 1 outputs"),
        (lambda _m, _g: [None], "no replacement for output 'y', which is used"),
    ],
    ids=["dtype", "dims", "rank", "many", "none"],
)
def test_what_does_not_fit_is_refused(
    build: Callable[[Match, Builder], object], message: str
) -> None:
    assert reason((replacing(build),), ONE).startswith(message)


def test_dims_that_nobody_knows_are_no_reason() -> None:
    text = "g (float[N,M] x) => (float[K,3] y) { y = Relu(x) }"
    model, _ = run((replacing(lambda m, g: g.op("Abs", m[x])),), text)
    assert model.graph.outputs[0].shape == ir.Shape(["K", 3])


@pytest.mark.parametrize("end", ["checked", "skipped", "none", "gated"])
def test_a_rewrite_that_is_not_made_leaves_no_trace(end: str) -> None:
    """Nodes on the tape use values of the graph: left so, they would count as other uses for ever after."""

    def build(m: Match, g: Builder) -> ir.Value | None:
        new = g.op("Cast", m[x], to=ir.DataType.DOUBLE if end == "checked" else ir.DataType.FLOAT)
        if end == "skipped":
            raise Skip("late")
        return None if end == "none" else new

    model = ir.from_proto(parse(ONE))
    gate = Gate(limit=0) if end == "gated" else Gate()
    ctx = Context(model, get_target("cpu"), gate=gate)
    assert not Rewriter((replacing(build),), ctx).run(model)
    assert [use.node.op_type for use in model.graph.inputs[0].uses()] == ["Relu"]


def test_new_nodes_may_read_an_interior_node() -> None:
    inner = Op("Abs", x)

    @exact(Op("Relu", inner))
    def swap(m: Match, g: Builder) -> ir.Value:
        return g.op("Exp", m.out(inner))

    model, _ = run((swap,), "g (float[N] x) => (float[N] y) { a = Abs(x)  y = Relu(a) }")
    assert [n.op_type for n in model.graph] == ["Abs", "Exp"]


def test_new_nodes_say_where_they_come_from() -> None:
    def build(m: Match, g: Builder) -> ir.Value:
        return g.op("Neg", g.op("Abs", m[x]))

    model, _ = run((replacing(build),), "g (float[N] x) => (float[N] y) { [layer1] y = Relu(x) }")
    for node in model.graph:
        assert node.metadata_props == {RULE_KEY: "rules/replace", ORIGIN_KEY: "layer1"}
    assert [n.name for n in model.graph] == ["layer1_Abs", "layer1"]
    assert [n.outputs[0].name for n in model.graph] == ["y_Abs", "y"]


def test_unnamed_nodes_get_names_after_their_output() -> None:
    model, _ = run((replacing(lambda m, g: g.op("Abs", m[x])),), ONE)
    assert [n.name for n in model.graph] == ["y_Abs"]
    assert model.graph[0].metadata_props[ORIGIN_KEY] == "y"


def test_new_names_avoid_those_that_are_taken() -> None:
    def build(m: Match, g: Builder) -> ir.Value:
        return g.op("Neg", g.op("Abs", m[x]))

    text = "g (float[N] y_Abs) => (float[N] y) { y = Relu(y_Abs) }"
    model, _ = run((replacing(build),), text)
    assert model.graph[0].outputs[0].name == "y_Abs_2"


def test_doc_strings_and_metadata_of_a_value_go_over() -> None:
    model = ir.from_proto(parse(TWO))
    value = model.graph[0].outputs[0]
    value.doc_string, value.metadata_props["k"] = "doc", "v"
    apply((replacing(lambda m, g: g.op("Abs", m[x])),), model)
    kept = model.graph[0].outputs[0]
    assert (kept.name, kept.doc_string, kept.metadata_props) == ("a", "doc", {"k": "v"})


def test_constants_become_initializers_with_names_of_their_own() -> None:
    def build(m: Match, g: Builder) -> ir.Value:
        unused = g.const(np.float32(9))
        assert unused.name == "const"
        return g.op("Mul", m[x], g.const(np.float32(2), name="scale"))

    model, _ = run((replacing(build),), TWO)
    assert list(model.graph.initializers) == ["a_scale"]


def test_a_constant_of_a_branch_stays_in_it() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
      y = If(c) <then_branch = t () => (float[2] p) { p = Relu(x) },
                 else_branch = e () => (float[2] q) { q = Neg(x) }>
    }"""
    model, _ = run((replacing(lambda m, g: g.op("Mul", m[x], g.const(np.float32(2)))),), text)
    branch = model.graph[0].attributes["then_branch"].as_graph()
    assert list(branch.initializers) == ["p_const"]
    assert not model.graph.initializers


FUNCTION = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
g (float[2] x) => (float[2] y) { y = my.f(x) }
<domain: "my", opset_import: ["" : 18]>
f (a) => (c) { b = Relu(a)  c = Neg(b) }
"""


def test_a_constant_of_a_function_body_is_a_node() -> None:
    model, _ = run((replacing(lambda m, g: g.op("Mul", m[x], g.const(np.float32(2)))),), FUNCTION)
    (function,) = model.functions.values()
    assert [n.op_type for n in function.graph] == ["Constant", "Mul", "Neg"]
    assert not function.graph.initializers
    names = [n.name for n in function.graph]
    assert len(set(names)) == 3


def test_a_constant_of_a_branch_in_a_function_is_an_initializer_there() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
    g (float[2] x, bool c) => (float[2] y) { y = my.f(x, c) }
    <domain: "my", opset_import: ["" : 18]>
    f (a, c) => (b) { b = If(c) <then_branch = t () => (float[2] p) { p = Relu(a) },
                                 else_branch = e () => (float[2] q) { q = Neg(a) }> }
    """
    model, _ = run((replacing(lambda m, g: g.op("Mul", m[x], g.const(np.float32(2)))),), text)
    (function,) = model.functions.values()
    assert len(function.graph[0].attributes["then_branch"].as_graph().initializers) == 1


def test_a_constant_may_stand_for_an_output() -> None:
    shape = Op("Shape", x)

    @exact(shape)
    def fold(m: Match, g: Builder) -> ir.Value:
        return g.ints([dim.value or 0 for dim in m.known_dims(x)], name="dims")

    check(
        (fold,),
        "g (float[2,3] x) => (int64[2] y) { s = Shape(x)  y = Neg(s) }",
        "g (float[2,3] x) => (int64[2] y) <int64[2] s = {2, 3}> { y = Neg(s) }",
    )


def test_a_constant_may_stand_for_an_output_in_a_function() -> None:
    def build(_m: Match, g: Builder) -> ir.Value:
        return g.const(np.ones(2, np.float32))

    model, _ = run((replacing(build),), FUNCTION)
    (function,) = model.functions.values()
    assert [n.op_type for n in function.graph] == ["Constant", "Neg"]
    assert function.graph[0].outputs[0].name == "b"


def test_several_outputs_are_replaced_at_once() -> None:
    split = Op("Split", x)

    @exact(split)
    def slices(m: Match, g: Builder) -> Sequence[ir.Value]:
        return [g.op("Slice", m[x], g.ints([start]), g.ints([start + 1])) for start in (0, 1)]

    check(
        (slices,),
        "g (float[2] x) => (float[1] y, float[1] z) { a, z = Split <num_outputs = 2> (x)  y = Neg(a) }",
        "g (float[2] x) => (float[1] y, float[1] z) "
        "<int64[1] o = {0}, int64[1] p = {1}, int64[1] q = {1}, int64[1] r = {2}>"
        " { a = Slice(x, o, p)  z = Slice(x, q, r)  y = Neg(a) }",
    )


def test_an_unused_output_needs_no_replacement() -> None:
    top = Op("TopK", x, ...)

    @rule(top)
    def values_only(m: Match, g: Builder) -> Sequence[ir.Value | None]:
        return [g.op("Sort1", m[x], domain="test"), None]

    text = "g (float[4] x) => (float[1] y) <int64[1] k = {1}> { v, i = TopK(x, k)  y = Neg(v) }"
    model, _ = run((values_only,), text)
    assert [n.op_type for n in model.graph] == ["Sort1", "Neg"]


def test_a_domain_that_a_rewrite_brings_in_is_imported() -> None:
    model, _ = run((replacing(lambda m, g: g.op("QuickGelu", m[x], domain="com.microsoft")),), TWO)
    assert model.opset_imports["com.microsoft"] == 1


def test_shapes_of_new_values_are_known() -> None:
    model, ctx = run((replacing(lambda m, g: g.op("Abs", m[x])),), TWO)
    dims = ctx.shapes.dims(model.graph[0].outputs[0])
    assert dims is not None
    assert [d.value for d in dims] == [2, 3]


def test_a_captured_value_is_replaced_inside_too() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
      a = Relu(x)
      y = If(c) <then_branch = t () => (float[2] p) { p = Neg(a) },
                 else_branch = e () => (float[2] q) { q = Abs(a) }>
    }"""
    model, _ = run((replacing(lambda m, g: g.op("Exp", m[x])),), text)
    branch = model.graph[1].attributes["then_branch"].as_graph()
    assert branch[0].inputs[0] is model.graph[0].outputs[0]
