"""Branches and loops that are decided before the model runs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.cleanup import RemoveDeadCode
from graphopt_passes.control_flow import InlineControlFlow

from graphopt.pipeline import Step
from graphopt.rewrite import Context, Gate
from graphopt.targets import get_target
from tests.rewriting import apply, check, parse, run

STEPS: tuple[Step, ...] = (InlineControlFlow(), RemoveDeadCode())


def branches(then: str, other: str, *, outputs: str = "y", cond: str = "c") -> str:
    return f"{outputs} = If({cond}) <then_branch = t {then}, else_branch = e {other}>"


@pytest.mark.parametrize(("truth", "kept"), [(1, "Exp"), (0, "Neg")])
def test_decided_branch_is_inlined(truth: int, kept: str) -> None:
    check(
        STEPS,
        f"g (float[N] x) => (float[N] y) <bool c = {{{truth}}}> {{"
        + branches("() => (float[N] a) { a = Exp(x) }", "() => (float[N] b) { b = Neg(x) }")
        + "}",
        f"g (float[N] x) => (float[N] y) {{ y = {kept}(x) }}",
    )


def test_undecided_branch_stays() -> None:
    check(
        STEPS,
        "g (float[N] x, bool c) => (float[N] y) {"
        + branches("() => (float[N] a) { a = Exp(x) }", "() => (float[N] b) { b = Neg(x) }")
        + "}",
    )


def test_initializers_of_the_branch_move_out() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y) <bool c = {1}> {"
        + branches(
            "() => (float[2] a) <float[2] w = {1, 2}> { a = Add(x, w) }",
            "() => (float[2] b) <float[2] v = {3, 4}> { b = Mul(x, v) }",
        )
        + "}",
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }",
    )


def test_names_of_siblings_do_not_clash() -> None:
    """Both Ifs use the names t and w inside; inlining the first puts them in sight of the second.

    ONNX Runtime 1.31 inlines the first one too, trips over the names, and cannot tell what is right.
    """
    model = ir.from_proto(
        parse(
            "g (float[2] x, bool d) => (float[2] y, float[2] z) <bool c = {1}> {"
            + branches(
                "() => (float[2] a) <float[2] w = {1, 2}> { t = Add(x, w) a = Exp(t) }",
                "() => (float[2] b) { b = Neg(x) }",
            )
            + branches(
                "() => (float[2] a2) <float[2] w = {3, 4}> { t = Mul(x, w) a2 = Exp(t) }",
                "() => (float[2] b2) { t = Neg(x) b2 = Exp(t) }",
                outputs="z",
                cond="d",
            )
            + "}"
        )
    )
    apply(STEPS, model)
    got = ir.to_proto(model)
    onnx.checker.check_model(got, full_check=True)
    feed = {"x": np.array([1, 2], np.float32), "d": np.array(True)}
    y, z = run(got, feed)
    np.testing.assert_allclose(y, np.exp([2.0, 4.0]), rtol=1e-6)
    np.testing.assert_allclose(z, np.exp([3.0, 8.0]), rtol=1e-6)


def test_nested_branches() -> None:
    inner = branches(
        "() => (float[2] p) { p = Exp(o) }", "() => (float[2] q) { q = Neg(o) }", outputs="a"
    )
    check(
        STEPS,
        "g (float[2] x) => (float[2] y) <bool c = {1}> { o = Abs(x) "
        + branches(f"() => (float[2] a) {{ {inner} }}", "() => (float[2] b) { b = Neg(x) }")
        + "}",
        "g (float[2] x) => (float[2] y) { o = Abs(x) y = Exp(o) }",
    )


def test_decided_branch_within_an_undecided_one() -> None:
    inner = branches(
        "() => (float[2] p) { p = Exp(x) }", "() => (float[2] q) { q = Neg(x) }", outputs="a"
    )
    check(
        STEPS,
        "g (float[2] x, bool d) => (float[2] y) <bool c = {0}> { "
        + branches(
            f"() => (float[2] a) {{ {inner} }}", "() => (float[2] b) { b = Abs(x) }", cond="d"
        )
        + "}",
        "g (float[2] x, bool d) => (float[2] y) { "
        + branches(
            "() => (float[2] a) { a = Neg(x) }", "() => (float[2] b) { b = Abs(x) }", cond="d"
        )
        + "}",
    )


def test_branch_that_returns_an_outer_value_or_a_constant() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y, float[2] z) <bool c = {1}> {"
        + branches(
            "() => (float[2] a, float[2] k) <float[2] w = {1, 2}> { a = Identity(x) k = Identity(w) }",
            "() => (float[2] b, float[2] l) { b = Neg(x) l = Exp(x) }",
            outputs="y, z",
        )
        + "}",
        "g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}> { y = Identity(x) z = Identity(w) }",
    )


def test_branch_whose_output_is_an_initializer() -> None:
    model = ir.from_proto(
        parse(
            "g (float[2] x) => (float[2] y) <bool c = {1}> {"
            + branches(
                "() => (float[2] w) <float[2] w = {1, 2}> { }", "() => (float[2] b) { b = Neg(x) }"
            )
            + "}"
        )
    )
    apply(STEPS, model)
    got = ir.to_proto(model)
    onnx.checker.check_model(got, full_check=True)
    np.testing.assert_array_equal(run(got, {"x": np.zeros(2, np.float32)})[0], [1, 2])


def test_one_value_for_two_outputs() -> None:
    model = ir.from_proto(
        parse(
            "g (float[2] x) => (float[2] y, float[2] z) <bool c = {1}> {"
            + branches(
                "() => (float[2] a, float[2] d) { a = Exp(x) d = Exp(x) }",
                "() => (float[2] b, float[2] l) { b = Neg(x) l = Exp(x) }",
                outputs="y, z",
            )
            + "}"
        )
    )
    branch = model.graph[0].attributes["then_branch"].as_graph()
    branch.outputs[1] = branch.outputs[0]
    apply(STEPS, model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [node.op_type for node in model.graph] == ["Exp", "Identity"]


def test_branch_in_a_function_body() -> None:
    model = ir.from_proto(
        parse(
            """<ir_version: 9, opset_import: ["": 18, "l": 1]> g (float[2] x) => (float[2] y) { y = l.f(x) }
            <domain: "l", opset_import: ["": 18]> f (a) => (r) { c = Constant<value = bool {1}>()
            r = If(c) <then_branch = t () => (p) { w = Constant<value_float = 2.0>() p = Mul(a, w) },
                       else_branch = e () => (q) { q = Neg(a) }> }"""
        )
    )
    apply(STEPS, model)
    assert [n.op_type for n in model.functions["l", "f", ""].graph] == ["Constant", "Mul"]


def loop(count: str, condition: str, body: str, *, carried: str = ", x", outputs: str = "y") -> str:
    return f"{outputs} = Loop({count}, {condition}{carried}) <body = b {body}>"


STEP = "(int64 i, bool ci, float[2] v) => (bool co, float[2] w) { co = Identity(ci) w = Add(v, v) }"


@pytest.mark.parametrize(
    ("count", "condition"),
    [("zero", "d"), ("m", "false"), ("negative", ""), ("", "false")],
)
def test_loop_that_never_runs(count: str, condition: str) -> None:
    check(
        STEPS,
        "g (float[2] x, int64 m, bool d) => (float[2] y) <int64 zero = {0}, int64 negative = {-3}, bool false = {0}> {"
        + loop(count, condition, STEP, outputs="t")
        + " y = Neg(t) }",
        "g (float[2] x, int64 m, bool d) => (float[2] y) { y = Neg(x) }",
    )


def test_scan_output_of_a_loop_that_never_runs_is_empty() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y, float[K,2] z) <int64 zero = {0}> {"
        + loop(
            "zero",
            "",
            "(int64 i, bool ci, float[2] v) => (bool co, float[2] w, float[2] s)"
            " { co = Identity(ci) w = Add(v, v) s = Neg(v) }",
            outputs="t, u",
        )
        + " y = Neg(t) z = Neg(u) }",
        "g (float[2] x) => (float[2] y, float[K,2] z) <float[0,2] e> { y = Neg(x) z = Neg(e) }",
    )


def test_scan_output_of_unknown_size_stays() -> None:
    check(
        STEPS,
        "g (float[N] x) => (float[K,N] z) <int64 zero = {0}, bool on = {1}> {"
        + loop(
            "zero",
            "on",
            "(int64 i, bool ci) => (bool co, float[N] s) { co = Identity(ci) s = Neg(x) }",
            carried="",
            outputs="u",
        )
        + " z = Neg(u) }",
        missed="never runs",
    )


def test_loop_of_one_turn() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y, float[K,2] z, int64[J] j) <int64 one = {1}> {"
        + loop(
            "one",
            "",
            "(int64 i, bool ci, float[2] v) => (bool co, float[2] w, float[2] s, int64 k)"
            " { co = Identity(ci) w = Add(v, v) s = Neg(w) k = Identity(i) }",
            outputs="y, z, j",
        )
        + "}",
        "g (float[2] x) => (float[2] y, float[K,2] z, int64[J] j)"
        " <int64[1] a = {0}, int64 turn = {0}, int64[1] b = {0}>"
        " { y = Add(x, x) s = Neg(y) k = Identity(turn) z = Unsqueeze(s, a) j = Unsqueeze(k, b) }",
    )


def test_loop_of_one_turn_in_an_old_opset() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[K,2] z) <int64 one = {1}, bool on = {1}> {"
        + loop(
            "one",
            "on",
            "(int64 i, bool ci) => (bool co, float[2] s) { co = Identity(ci) s = Neg(x) }",
            carried="",
            outputs="z",
        )
        + "}",
        "g (float[2] x) => (float[K,2] z) { s = Neg(x) z = Unsqueeze<axes = [0]>(s) }",
        opset=11,
    )


def test_loop_that_stops_itself_after_one_turn() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y) {"
        + loop(
            "",
            "",
            "(int64 i, bool ci, float[2] v) => (bool co, float[2] w)"
            " { co = Constant<value = bool {0}>() w = Add(v, v) }",
        )
        + "}",
        "g (float[2] x) => (float[2] y) { y = Add(x, x) }",
    )


def test_body_that_hands_a_value_through() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y, float[2] z) <int64 one = {1}> {"
        + loop(
            "one",
            "",
            "(int64 i, bool ci, float[2] v, float[2] u) => (bool co, float[2] w, float[2] u2)"
            " { co = Identity(ci) w = Add(v, u) u2 = Identity(u) }",
            carried=", x, x",
            outputs="y, z",
        )
        + "}",
        "g (float[2] x) => (float[2] y, float[2] z) { y = Add(x, x) z = Identity(x) }",
    )


@pytest.mark.parametrize(
    ("count", "condition"), [("m", ""), ("many", ""), ("one", "d"), ("", "d"), ("two", "d")]
)
def test_loop_of_unknown_or_many_turns_stays(count: str, condition: str) -> None:
    header = "g (float[2] x, int64 m, bool d) => (float[2] y) <int64 one = {1}, int64 two = {2}, int64 many = {1000}> {"
    model = ir.from_proto(parse(header + loop(count, condition, STEP) + "}"))
    assert not apply([InlineControlFlow()], model).rewrites


def test_loop_of_a_few_turns_is_written_out() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y) <int64 three = {3}> {"
        + loop(
            "three",
            "",
            "(int64 i, bool ci, float[2] v) => (bool co, float[2] w)"
            " { co = Identity(ci) f = Cast<to = 1>(i) w = Add(v, f) }",
        )
        + "}",
        "g (float[2] x) => (float[2] y) <int64 a = {0}, int64 b = {1}, int64 c = {2}> {"
        " f = Cast<to = 1>(a) u = Add(x, f) g = Cast<to = 1>(b) v = Add(u, g) h = Cast<to = 1>(c) y = Add(v, h) }",
    )


def test_loop_that_may_end_early_is_not_written_out() -> None:
    body = (
        "(int64 i, bool ci, float[2] v) => (bool co, float[2] w)"
        " { z = Constant<value = int64 {0}>() co = Equal(i, z) w = Add(v, v) }"
    )
    text = "g (float[2] x) => (float[2] y) <int64 three = {3}> {"
    model = ir.from_proto(parse(text + loop("three", "", body) + "}"))
    assert not apply([InlineControlFlow()], model).rewrites


STACKING = (
    "(int64 i, bool ci, float[2] v) => (bool co, float[2] w, float[2] s)"
    " { co = Identity(ci) w = Add(v, v) s = Neg(w) }"
)
STACKED = """a = Add(x, x)  s = Neg(a)  y = Add(a, a)  t = Neg(y)
    u = Unsqueeze(s, ax)  v = Unsqueeze(t, ax)  z = Concat<axis = 0>(u, v)"""


def test_loop_that_stacks_is_written_out() -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y, float[2,2] z) <int64 two = {2}> {"
        + loop("two", "", STACKING, outputs="y, z")
        + "}",
        f"g (float[2] x) => (float[2] y, float[2,2] z) <int64[1] ax = {{0}}> {{ {STACKED} }}",
    )


@pytest.mark.parametrize("opset", [11, 18])
def test_loop_that_stacks_for_nobody(opset: int) -> None:
    check(
        STEPS,
        "g (float[2] x) => (float[2] y) <int64 two = {2}> {"
        + loop("two", "", STACKING, outputs="y, z")
        + "}",
        "g (float[2] x) => (float[2] y) { a = Add(x, x)  y = Add(a, a) }",
        opset=opset,
    )


def test_loop_that_stacks_too_many_rows_stays() -> None:
    text = "g (float[2] x) => (float[2] y, float[30,2] z) <int64 many = {30}> {"
    model = ir.from_proto(parse(text + loop("many", "", STACKING, outputs="y, z") + "}"))
    assert not apply([InlineControlFlow()], model).rewrites


def scan(attributes: str = "", size: str = "2") -> str:
    return (
        f"g (float[2] x, float[{size},2] k) => (float[2] y, float[{size},2] z) {{ y, z = Scan<num_scan_inputs = 1"
        f"{attributes}, body = b (float[2] s, float[2] v) => (float[2] w, float[2] r)"
        f" {{ w = Add(s, v)  r = Neg(w) }}>(x, k) }}"
    )


ROWS = """g (float[2] x, float[2,2] k) => (float[2] y, float[2,2] z)
    <int64 i = {{{0}}}, int64 j = {{{1}}}, int64[1] ax = {{{axis}}}> {{
    a = Gather<axis = {axis}>(k, i)  w = Add(x, a)  r = Neg(w)  b = Gather<axis = {axis}>(k, j)  y = Add(w, b)
    q = Neg(y)  c = Unsqueeze({first}, ax)  d = Unsqueeze({last}, ax)  z = Concat<axis = {axis}>(c, d) }}"""


def test_scan_of_a_few_turns_is_written_out() -> None:
    check(STEPS, scan(), ROWS.format(0, 1, axis=0, first="r", last="q"))


def test_scan_from_the_end_along_other_axes() -> None:
    check(
        STEPS,
        scan(
            ", scan_input_axes = [1], scan_output_axes = [1], scan_input_directions = [1]"
            ", scan_output_directions = [1]"
        ),
        ROWS.format(1, 0, axis=1, first="q", last="r"),
    )


@pytest.mark.parametrize("size", ["T", "40", "3"])
def test_scan_of_unknown_or_many_turns_stays(size: str) -> None:
    """Three turns would take seven nodes more than the work itself: as much as the Scan costs."""
    model = ir.from_proto(parse(scan(size=size)))
    assert not apply([InlineControlFlow()], model).rewrites


def test_gate_keeps_a_scan() -> None:
    model = ir.from_proto(parse(scan()))
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=0))
    assert not InlineControlFlow().run(model, ctx)


def test_nodes_of_a_loop_that_is_written_out_get_names_of_their_own() -> None:
    """ONNX Runtime refuses two nodes of one name in one graph."""
    model = ir.from_proto(
        parse(
            "g (float[2] x) => (float[2] y) <int64 two = {2}> {" + loop("two", "", STEP) + "}",
        )
    )
    body = model.graph[0].attributes["body"].as_graph()
    for node, name in zip(body, ("pass_on", "double"), strict=True):
        node.name = name
    apply(STEPS, model)
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names)) == 2
    run(ir.to_proto(model), {"x": np.ones(2, np.float32)})
