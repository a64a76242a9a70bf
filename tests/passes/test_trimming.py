"""Results of control flow that nobody reads, values that no turn changes, results that both branches share."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.trimming import TrimControlFlow

from graphopt.ir.check import violations
from graphopt.pipeline import Step
from graphopt.rewrite import Context, Gate
from graphopt.targets import get_target
from tests.rewriting import check, parse

STEPS: tuple[Step, ...] = (TrimControlFlow(),)


def test_result_of_an_if_that_nobody_reads() -> None:
    check(
        STEPS,
        """g (float[N] x, bool c) => (float[N] y) { u, v = If(c) <
             then_branch = t () => (float[N] a, float[N] b) { a = Exp(x)  b = Neg(x) },
             else_branch = e () => (float[N] p, float[N] q) { p = Abs(x)  r = Sign(x)  q = Ceil(r) }>
           y = Relu(v) }""",
        """g (float[N] x, bool c) => (float[N] y) { v = If(c) <
             then_branch = t () => (float[N] b) { b = Neg(x) },
             else_branch = e () => (float[N] q) { r = Sign(x)  q = Ceil(r) }>
           y = Relu(v) }""",
    )


def test_if_whose_results_are_all_read_stays() -> None:
    check(
        STEPS,
        """g (float[N] x, bool c) => (float[N] u, float[N] v) { u, v = If(c) <
             then_branch = t () => (float[N] a, float[N] b) { a = Exp(x)  b = Neg(x) },
             else_branch = e () => (float[N] p, float[N] q) { p = Abs(x)  q = Sign(x) }> }""",
    )


def test_value_that_both_branches_return() -> None:
    check(
        STEPS,
        """g (float[N] x, bool c) => (float[N] y, float[N] v) { h = Exp(x)  u, v = If(c) <
             then_branch = t () => (float[N] a, float[N] b) { a = Identity(h)  b = Neg(x) },
             else_branch = e () => (float[N] p, float[N] q) { i = Identity(h)  p = Identity(i)  q = Sign(x) }>
           y = Relu(u) }""",
        """g (float[N] x, bool c) => (float[N] y, float[N] v) { h = Exp(x)  v = If(c) <
             then_branch = t () => (float[N] b) { b = Neg(x) },
             else_branch = e () => (float[N] q) { q = Sign(x) }>
           y = Relu(h) }""",
    )


@pytest.mark.parametrize(("other", "shared"), [("1, 2", True), ("1, 3", False)])
def test_constant_that_both_branches_return(other: str, shared: bool) -> None:
    before = f"""g (float[2] x, bool c) => (float[2] y, float[2] v) {{ u, v = If(c) <
             then_branch = t () => (float[2] a, float[2] b) {{ a = Constant<value = float[2] {{1, 2}}>()  b = Neg(x) }},
             else_branch = e () => (float[2] p, float[2] q) {{ p = Constant<value = float[2] {{{other}}}>()
                                                              q = Sign(x) }}>
           y = Add(x, u) }}"""
    after = """g (float[2] x, bool c) => (float[2] y, float[2] v) <float[2] u = {1, 2}> { v = If(c) <
             then_branch = t () => (float[2] b) { b = Neg(x) },
             else_branch = e () => (float[2] q) { q = Sign(x) }>
           y = Add(x, u) }"""
    check(STEPS, before, after if shared else None)


def test_shared_result_that_is_an_output_of_the_model() -> None:
    check(
        STEPS,
        """g (float[N] x, bool c) => (float[N] u, float[N] v) { u, v = If(c) <
             then_branch = t () => (float[N] a, float[N] b) { a = Identity(x)  b = Neg(x) },
             else_branch = e () => (float[N] p, float[N] q) { p = Identity(x)  q = Sign(x) }> }""",
        """g (float[N] x, bool c) => (float[N] u, float[N] v) { u = Identity(x)  v = If(c) <
             then_branch = t () => (float[N] b) { b = Neg(x) },
             else_branch = e () => (float[N] q) { q = Sign(x) }> }""",
    )


def loop(inputs: str, results: str, body: str, *, before: str = "", after: str = "") -> str:
    return (
        "g (float[2] x, float[2] k, int64 m) => (float[2] y) {"
        f"{before} {results} = Loop({inputs}) <body = b {body}> {after} }}"
    )


STEP = "(int64 i, bool c, float[2] p) => (bool d, float[2] q) { d = Identity(c)  q = Add(p, k) }"


def test_carried_value_that_feeds_only_itself() -> None:
    check(
        STEPS,
        loop(
            "m, , x, k",
            "y, u",
            "(int64 i, bool c, float[2] p, float[2] r) => (bool d, float[2] q, float[2] s)"
            "{ d = Identity(c)  q = Add(p, k)  t = Exp(r)  s = Add(t, p) }",
        ),
        loop("m, , x", "y", STEP),
    )


def test_carried_value_that_another_needs_stays() -> None:
    check(
        STEPS,
        loop(
            "m, , x, k",
            "y, u",
            "(int64 i, bool c, float[2] p, float[2] r) => (bool d, float[2] q, float[2] s)"
            "{ d = Identity(c)  q = Add(p, r)  s = Mul(r, x) }",
        ),
    )


def test_carried_value_that_ends_the_loop_stays() -> None:
    check(
        STEPS,
        loop(
            "m, , x, m",
            "y, u",
            "(int64 i, bool c, float[2] p, int64 r) => (bool d, float[2] q, int64 s)"
            "{ d = Less(i, r)  q = Add(p, k)  s = Add(r, i) }",
        ),
    )


def test_carried_value_that_no_turn_changes_is_read_from_outside() -> None:
    check(
        STEPS,
        loop(
            "m, , x, k",
            "y, u",
            "(int64 i, bool c, float[2] p, float[2] r) => (bool d, float[2] q, float[2] s)"
            "{ d = Identity(c)  q = Add(p, r)  s = Identity(r) }",
        ),
        loop("m, , x", "y", STEP),
    )


def test_result_of_a_value_that_no_turn_changes_is_the_value() -> None:
    check(
        STEPS,
        loop(
            "m, , x, k",
            "w, u",
            "(int64 i, bool c, float[2] p, float[2] r) => (bool d, float[2] q, float[2] s)"
            "{ d = Identity(c)  q = Add(p, r)  s = Identity(k) }",
            after="y = Mul(w, u)",
        ),
        loop("m, , x", "w", STEP, after="y = Mul(w, k)"),
    )


def test_values_that_change_places_stay() -> None:
    check(
        STEPS,
        loop(
            "m, , x, k",
            "w, u",
            "(int64 i, bool c, float[2] p, float[2] r) => (bool d, float[2] q, float[2] s)"
            "{ d = Identity(c)  q = Identity(r)  s = Identity(p) }",
            after="y = Sub(w, u)",
        ),
    )


def test_unchanged_value_that_is_stacked_keeps_a_producer_in_the_body() -> None:
    model = ir.from_proto(
        parse(
            "g (float[2] x, float[2] k, int64 m) => (float[2] y, float[T,2] z) {"
            "y, u, z = Loop(m, , x, k) <body = b (int64 i, bool c, float[2] p, float[2] r)"
            " => (bool d, float[2] q, float[2] s, float[2] w)"
            "{ d = Identity(c)  q = Add(p, r)  s = Identity(r)  w = Identity(r) }> }"
        )
    )
    body = model.graph[0].attributes["body"].as_graph()
    body.outputs[3] = body.inputs[3]  # a turn gives back what it gets, without a node
    body.remove(list(body)[3], safe=True)
    check(
        STEPS,
        onnx.printer.to_text(ir.to_proto(model)),
        "g (float[2] x, float[2] k, int64 m) => (float[2] y, float[T,2] z) {"
        "y, z = Loop(m, , x) <body = b (int64 i, bool c, float[2] p) => (bool d, float[2] q, float[2] w)"
        "{ d = Identity(c)  q = Add(p, k)  w = Identity(k) }> }",
    )


def test_stacked_output_that_nobody_reads() -> None:
    check(
        STEPS,
        loop(
            "m, , x",
            "y, z",
            "(int64 i, bool c, float[2] p) => (bool d, float[2] q, float[2] w)"
            "{ d = Identity(c)  q = Add(p, k)  w = Exp(p) }",
        ),
        loop("m, , x", "y", STEP),
    )


def scan(inputs: str, results: str, count: int, body: str, attributes: str = "") -> str:
    return (
        "g (float[2] s, float[T,2] x, float[2,T] z) => (float[2] y, float[T,2] w) {"
        f"{results} = Scan<num_scan_inputs = {count} {attributes}, body = b {body}>({inputs}) }}"
    )


def test_ports_of_a_scan() -> None:
    check(
        STEPS,
        scan(
            "s, s, x, z",
            "y, u, v, w",
            2,
            "(float[2] a, float[2] b, float[2] i, float[2] j) => (float[2] c, float[2] d, float[2] o, float[2] p)"
            "{ c = Add(a, i)  d = Exp(b)  o = Neg(j)  p = Mul(c, i) }",
            ", scan_input_axes = [0, 1], scan_input_directions = [1, 0], scan_output_axes = [1, 0]"
            ", scan_output_directions = [0, 1]",
        ),
        scan(
            "s, x",
            "y, w",
            1,
            "(float[2] a, float[2] i) => (float[2] c, float[2] p) { c = Add(a, i)  p = Mul(c, i) }",
            ", scan_input_axes = [0], scan_input_directions = [1], scan_output_axes = [0]"
            ", scan_output_directions = [1]",
        ),
    )


def test_the_input_that_says_how_many_turns_a_scan_takes_stays() -> None:
    check(
        STEPS,
        scan(
            "s, x",
            "y, w",
            1,
            "(float[2] a, float[2] i) => (float[2] c, float[2] p) { c = Exp(a)  p = Neg(a) }",
        ),
    )


def test_state_of_a_scan_that_no_turn_changes() -> None:
    check(
        STEPS,
        scan(
            "s, s, x",
            "y, u, w",
            1,
            "(float[2] a, float[2] b, float[2] i) => (float[2] c, float[2] d, float[2] p)"
            "{ c = Add(a, i)  d = Identity(b)  p = Mul(c, b) }",
        ),
        scan(
            "s, x",
            "y, w",
            1,
            "(float[2] a, float[2] i) => (float[2] c, float[2] p) { c = Add(a, i)  p = Mul(c, s) }",
        ),
    )


def test_gate_keeps_everything() -> None:
    text = loop(
        "m, , x, k",
        "y, u",
        "(int64 i, bool c, float[2] p, float[2] r) => (bool d, float[2] q, float[2] s)"
        "{ d = Identity(c)  q = Add(p, k)  s = Exp(r) }",
    )
    model = ir.from_proto(parse(text))
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=0))
    assert not TrimControlFlow().run(model, ctx)
    assert not list(violations(model))


def test_what_does_not_fit_together_is_left_alone() -> None:
    """A body with a default for what it carries, and a Scan of opset 8, which runs over batches."""
    model = ir.from_proto(parse(loop("m, , x", "y", STEP)))
    body = model.graph[0].attributes["body"].as_graph()
    del body.outputs[1]
    ctx = Context(model, get_target("cpu"))
    assert not TrimControlFlow().run(model, ctx)


def test_if_whose_results_all_come_from_outside_goes() -> None:
    check(
        STEPS,
        """g (float[N] x, bool c) => (float[N] u) { u, v = If(c) <
             then_branch = t () => (float[N] a, float[N] b) { a = Identity(x)  b = Neg(x) },
             else_branch = e () => (float[N] p, float[N] q) { p = Identity(x)  q = Sign(x) }> }""",
        "g (float[N] x, bool c) => (float[N] u) { u = Identity(x) }",
    )
