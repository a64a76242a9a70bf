"""The driver: which rule is tried where and when, what it refuses, what it says, and where it stops."""

from __future__ import annotations

import gc
import time

import onnx_ir as ir
import pytest

from graphopt.errors import PassError
from graphopt.ir.build import Builder
from graphopt.ir.check import violations
from graphopt.ir.model_file import model_to_bytes
from graphopt.numerics import Numerics
from graphopt.pipeline import RewritePass, run_pipeline
from graphopt.rewrite import (
    Context,
    Gate,
    Match,
    Op,
    Options,
    RemarkKind,
    Rewriter,
    Rule,
    Skip,
    Var,
    exact,
    rule,
)
from graphopt.rewrite.engine import Worklist
from graphopt.rewrite.index import UNSEEN
from graphopt.targets import get_target
from tests.rewriting import apply, check, parse

x = Var()
inner_relu = Op("Relu", x)


@exact(Op("Relu", inner_relu))
def merge_relus(m: Match, g: Builder) -> ir.Value:
    """Relu(Relu(x)) -> Relu(x)."""
    return g.op("Relu", m[x])


double_neg = Op("Neg", Op("Neg", x))


@exact(double_neg)
def drop_double_neg(m: Match, _g: Builder) -> ir.Value:
    """Neg(Neg(x)) -> x."""
    return m[x]


def model(text: str, opset: int = 18) -> ir.Model:
    return ir.from_proto(parse(text, opset=opset))


def context(m: ir.Model, gate: Gate | None = None, **options: object) -> Context:
    return Context(m, get_target("cpu"), Options(**options), gate or Gate())  # type: ignore[arg-type]


def rename(name: str, source: Rule, **changes: object) -> Rule:
    return Rule(name, source.pattern, source.build, **changes)  # type: ignore[arg-type]


def ops(m: ir.Model) -> list[str]:
    return [node.op_type for node in m.graph]


def test_rewrites_until_nothing_fires() -> None:
    check(
        (merge_relus,),
        "g (float[N] x) => (float[N] y) { a = Relu(x)  b = Relu(a)  c = Relu(b)  y = Relu(c) }",
        "g (float[N] x) => (float[N] y) { y = Relu(x) }",
    )


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_collection_is_put_off_and_then_as_it_was(was_on: bool) -> None:
    seen: list[bool] = []

    @exact(Op("Relu", inner_relu))
    def watches(_m: Match, _g: Builder) -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("a rule that fails")

    if not was_on:
        gc.disable()
    try:
        model = ir.from_proto(parse("g (float[2] v) => (float[2] y) { a = Relu(v) y = Relu(a) }"))
        with pytest.raises(Exception, match="a rule that fails"):
            Rewriter((watches,), Context(model, get_target("cpu"))).run(model)
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
    assert seen == [False]


def test_what_a_rewrite_enables_far_below_is_found() -> None:
    """Dropping Neg(Neg(x)) makes Exp(Log(Abs(x))) whole three nodes further on, in a pattern rooted there."""
    deep = Op("Relu", Op("Exp", Op("Log", Op("Abs", x))))

    @rule(deep)
    def collapse(m: Match, g: Builder) -> ir.Value:
        return g.op("Abs", m[x])

    check(
        (collapse, drop_double_neg),
        "g (float[N] x) => (float[N] y) { a = Abs(x)  n = Neg(a)  o = Neg(n)  l = Log(o)  e = Exp(l)  y = Relu(e) }",
        "g (float[N] x) => (float[N] y) { y = Abs(x) }",
        tolerance=1e-5,
    )


def test_a_use_that_dies_frees_the_match() -> None:
    """`a` has two readers until the dead Abs is gone."""
    m = model("g (float[N] x) => (float[N] y) { a = Relu(x)  y = Relu(a)  d = Abs(a) }")
    apply((merge_relus,), m)
    assert ops(m) == ["Relu"]


def test_rules_of_higher_benefit_go_first() -> None:
    tried: list[str] = []

    def noting(name: str, benefit: int) -> Rule:
        def build(_m: Match, _g: Builder) -> None:
            tried.append(name)

        return Rule(name, Op("Relu", x), build, benefit=benefit)

    apply(
        (noting("low", 1), noting("high", 9), noting("also-low", 1)),
        model("g (float[N] x) => (float[N] y) { y = Relu(x) }"),
    )
    assert tried == ["high", "low", "also-low"]


def test_only_rules_for_the_operator_are_tried() -> None:
    tried: list[str] = []

    def build(_m: Match, _g: Builder) -> None:
        tried.append("called")

    rules = (
        Rule("other", Op("Abs", x), build),
        Rule("domain", Op("Relu", x, domain="com.microsoft"), build),
    )
    apply(rules, model("g (float[N] x) => (float[N] y) { y = Relu(x) }"))
    assert tried == []


@pytest.mark.parametrize(("opset", "count"), [(16, 2), (17, 1), (19, 1), (20, 2)])
def test_a_rule_holds_within_its_opsets(opset: int, count: int) -> None:
    m = model("g (float[N] x) => (float[N] y) { a = Relu(x)  y = Relu(a) }", opset)
    apply((rename("bounded", merge_relus, opset=(17, 19)),), m)
    assert len(m.graph) == count


def test_none_is_silent() -> None:
    silent = Rule("silent", Op("Relu", x), lambda _m, _g: None)
    ctx = apply((silent,), model("g (float[N] x) => (float[N] y) { y = Relu(x) }"))
    assert ctx.remarks == []


def test_a_skip_is_a_remark_with_reason_and_culprit() -> None:
    relu = Op("Relu", x)

    @rule(relu)
    def refuse(m: Match, _g: Builder) -> ir.Value:
        raise Skip("too blue", m[x])

    m = model("g (float[N] x) => (float[N] y) { [r] y = Relu(x) }")
    ctx = apply((refuse,), m)
    (remark,) = ctx.remarks
    assert (remark.kind, remark.pass_name, remark.rule) == (RemarkKind.MISSED, "rules", "refuse")
    assert (remark.node, remark.reason, remark.culprit) == ("y", "too blue", "x")


def test_a_remark_is_made_once() -> None:
    @rule(Op("Relu", x))
    def refuse(_m: Match, _g: Builder) -> ir.Value:
        raise Skip("no")

    m = model("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    ctx = context(m)
    for _ in range(3):
        run_pipeline(m, (RewritePass("p", (refuse,)),), ctx)
    assert len(ctx.remarks) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[N] x) => (float[N] y, float[N] z) { a = Relu(x)  y = Relu(a)  z = Abs(a) }",
            "interior value 'a' has other uses",
        ),
        (
            "g (float[N] x) => (float[N] y, float[N] a) { a = Relu(x)  y = Relu(a) }",
            "interior value 'a' is a graph output",
        ),
        (
            "g (float[2] x, bool c) => (float[2] y, float[2] k) { a = Relu(x)  y = Relu(a)"
            " k = If(c) <then_branch = t () => (float[2] p) { p = Neg(a) },"
            "           else_branch = e () => (float[2] p) { p = Abs(x) }> }",
            "interior value 'a' has other uses",
        ),
        (
            "g (float[2] x, bool c) => (float[2] y) { a = Relu(x)"
            " y = If(c) <then_branch = t () => (float[2] p) { p = Relu(a) },"
            "           else_branch = e () => (float[2] p) { p = Abs(x) }> }",
            "the match crosses a subgraph boundary",
        ),
    ],
    ids=["use", "output", "captured", "boundary"],
)
def test_an_interior_node_that_lives_on_stops_the_match(text: str, reason: str) -> None:
    ctx = check((merge_relus,), text, missed=reason, dims=(2,))
    assert not ctx.rewrites
    assert [(remark.reason, remark.culprit) for remark in ctx.remarks] == [(reason, "a")]


def test_a_shared_interior_node_stays_beside_the_rewrite() -> None:
    shared = Op("Relu", x, shared=True)
    merge = rename("merge", merge_relus)
    loose = Rule("merge", Op("Relu", shared), merge.build, Numerics.EXACT)
    check(
        (loose,),
        "g (float[N] x) => (float[N] y, float[N] z) { a = Relu(x)  y = Relu(a)  z = Abs(a) }",
        "g (float[N] x) => (float[N] y, float[N] z) { a = Relu(x)  y = Relu(x)  z = Abs(a) }",
    )


def test_subgraphs_and_functions_are_rewritten() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
    g (float[2] x, bool c) => (float[2] y) {
      f = my.twice(x)
      y = If(c) <then_branch = t () => (float[2] p) { q = Relu(f)  p = Relu(q) },
                 else_branch = e () => (float[2] p) { p = Abs(f) }>
    }
    <domain: "my", opset_import: ["" : 18]>
    twice (a) => (c) { b = Relu(a)  c = Relu(b) }
    """
    m = model(text)
    ctx = apply((merge_relus,), m)
    assert len(ctx.rewrites) == 2
    (function,) = m.functions.values()
    assert [n.op_type for n in function.graph] == ["Relu"]
    assert [n.op_type for n in m.graph[1].attributes["then_branch"].as_graph()] == ["Relu"]


def test_dead_nodes_are_removed() -> None:
    m = model("g (float[N] x) => (float[N] y) { a = Abs(x)  b = Neg(a)  y = Relu(x) }")
    ctx = context(m)
    assert Rewriter((), ctx).run(m)
    assert ops(m) == ["Relu"]
    assert not Rewriter((), ctx).run(m)


def test_a_dead_node_with_subgraphs_releases_what_it_captured() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
      a = Abs(x)
      d = If(c) <then_branch = t () => (float[2] p) {
            p = If(c) <then_branch = t2 () => (float[2] q) { q = Neg(a) },
                       else_branch = e2 () => (float[2] q) { q = Relu(a) }> },
          else_branch = e () => (float[2] p) { p = Abs(x) }>
      y = Relu(x)
    }"""
    m = model(text)
    apply((merge_relus,), m)
    assert ops(m) == ["Relu"]
    assert not list(violations(m))


def test_a_captured_value_that_is_a_branch_output_is_released() -> None:
    m = model(
        "g (float[2] x, bool c) => (float[2] y) { a = Abs(x)  y = Relu(x)"
        " d = If(c) <then_branch = t () => (float[2] p) { p = Neg(x) },"
        "           else_branch = e () => (float[2] q) { q = Neg(x) }> }"
    )
    branch = m.graph[2].attributes["then_branch"].as_graph()
    branch.outputs[0] = m.graph[0].outputs[0]
    assert Rewriter((), context(m)).run(m)
    assert ops(m) == ["Relu"]


def test_rules_that_never_end_are_named() -> None:
    @exact(Op("Relu", x))
    def again(m: Match, g: Builder) -> ir.Value:
        return g.op("Relu", m[x])

    m = model("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    ctx = context(m)
    ctx.pass_name = "looping"
    with pytest.raises(
        PassError,
        match=r"no fixed point within 10 rewrites; the last rule was again at 'y'.*--disable looping/again",
    ):
        Rewriter((again,), ctx, budget=10).run(m)


CHAIN = "g (float[N] x) => (float[N] y) { a = Relu(x)  b = Relu(a)  c = Relu(b)  y = Relu(c) }"


@pytest.mark.parametrize(
    ("gate", "left"),
    [
        (Gate(), 1),
        (Gate(limit=0), 4),
        (Gate(limit=2), 2),
        (Gate(rules=frozenset({("p", "merge-relus")})), 4),
        (Gate(rules=frozenset({("q", "merge-relus")})), 1),
        (Gate(passes=frozenset({"p"})), 4),
        (Gate(sites=frozenset({("p", "merge-relus", "y")})), 2),
        (Gate().without_pass("p"), 4),
    ],
    ids=["open", "limit0", "limit2", "rule", "other-pass", "pass", "site", "without-pass"],
)
def test_the_gate_decides(gate: Gate, left: int) -> None:
    m = model(CHAIN)
    ctx = context(m, gate)
    run_pipeline(m, (RewritePass("p", (merge_relus,)),), ctx)
    assert len(m.graph) == left
    assert len(ctx.rewrites) == 4 - left


def test_a_gate_leaves_out_a_site_and_then_the_rule() -> None:
    m = model(CHAIN)
    ctx = context(m)
    run_pipeline(m, (RewritePass("p", (merge_relus,)),), ctx)
    last = ctx.rewrites[-1]
    once = Gate().without(last)
    assert once.sites == {(last.pass_name, last.rule, last.site)}
    assert once.without(last).rules == {("p", "merge-relus")}


def test_rewrites_are_on_record() -> None:
    m = model(CHAIN)
    ctx = context(m)
    before = ctx.numerics
    run_pipeline(m, (RewritePass("p", (rename("loose", merge_relus),)),), ctx)
    assert {(r.pass_name, r.rule, r.numerics) for r in ctx.rewrites} == {
        ("p", "loose", Numerics.REORDERED)
    }
    assert (before, ctx.numerics) == (Numerics.EXACT, Numerics.REORDERED)


def test_two_runs_give_the_same_bytes() -> None:
    w, b = Var(const=True), Var(const=True)
    product = Op("Mul", x, w)

    @rule(Op("Add", product, b))
    def split(m: Match, g: Builder) -> ir.Value:
        half = g.op("Sub", m[x], g.const(m.array(b) / m.array(w) * -1, name="shift"))
        return g.op("Mul", half, g.const(m.array(w)))

    text = (
        "g (float[3] x) => (float[3] y) <float[3] w, float[3] b>"
        " { p = Mul(x, w)  q = Add(p, b)  r = Mul(q, w)  y = Add(r, b) }"
    )
    results = []
    for _ in range(2):
        m = model(text)
        assert len(apply((split,), m).rewrites) == 2
        results.append(model_to_bytes(m))
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_chain_of_50000_is_rewritten(capsys: pytest.CaptureFixture[str]) -> None:
    """Linear: prints the time of a rewrite for two lengths; a test asserts no time."""
    for length in (5_000, 50_000):
        m = relu_chain(length)
        ctx = context(m)
        started = time.process_time()
        Rewriter((merge_relus,), ctx).run(m)
        each = (time.process_time() - started) / (length - 1)
        with capsys.disabled():
            print(f"\n{length} nodes: {each * 1e3:.3f} ms a rewrite")  # noqa: T201
        assert len(m.graph) == 1
        assert len(ctx.rewrites) == length - 1


def relu_chain(length: int) -> ir.Model:
    kind = ir.TensorType(ir.DataType.FLOAT)
    start = value = ir.Value(name="x", type=kind, shape=ir.Shape(["N", 4]))
    nodes = []
    for index in range(length):
        node = ir.Node("", "Relu", [value], name=f"n{index}")
        value = node.outputs[0]
        value.name, value.type, value.shape = f"v{index}", kind, ir.Shape(["N", 4])
        nodes.append(node)
    graph = ir.Graph([start], [value], nodes=nodes, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=9)


def test_a_subgraph_that_a_rule_makes_is_rewritten_too() -> None:
    """A graph that came with a rewrite was not there when the turn began."""
    cond = Var()
    plain = Op("If", cond)

    @exact(plain)
    def exchange(m: Match, g: Builder) -> ir.Value | None:
        producer = m[cond].producer()
        if producer is not None and producer.op_type == "Not":
            return None
        then, other = (
            m.attr(plain, name).clone(allow_outer_scope_values=True)
            for name in ("then_branch", "else_branch")
        )
        return g.op("If", g.op("Not", m[cond]), then_branch=other, else_branch=then)

    text = """g (float[2] x, bool c) => (float[2] y) {
      y = If(c) <then_branch = t () => (float[2] p) { q = Relu(x)  p = Relu(q) },
                 else_branch = e () => (float[2] r) { r = Abs(x) }>
    }"""
    m = model(text)
    ctx = apply((rename("exchange", exchange, benefit=2), merge_relus), m)
    assert [r.rule for r in ctx.rewrites] == ["exchange", "merge-relus"]
    assert not list(violations(m))
    assert len(m.graph[1].attributes["else_branch"].as_graph()) == 1


axes, repeats = Var(const=True), Var(const=True)
scaled_cast = Op("Cast", Op("Tile", x, repeats))


@exact(scaled_cast)
def swap_cast_and_tile(m: Match, g: Builder) -> ir.Value | None:
    """Cast(Tile(x, r)) -> Tile(Cast(x), r): as good as any to read integers and an attribute."""
    if max(m.ints(repeats)) < 2:
        return None
    return g.op("Tile", g.op("Cast", m[x], to=m.attr(scaled_cast, "to")), m[repeats])


def test_rules_read_integers_and_attributes() -> None:
    text = "g (float[N] x) => (double[M] y) <int64[1] r = {{{}}}> {{ {} }}"
    check(
        (swap_cast_and_tile,),
        text.format(2, "t = Tile(x, r) y = Cast<to = 11>(t)"),
        text.format(2, "t = Cast<to = 11>(x) y = Tile(t, r)"),
    )
    check((swap_cast_and_tile,), text.format(1, "t = Tile(x, r) y = Cast<to = 11>(t)"))


def test_a_parameter_of_a_function_has_no_value_for_a_rule() -> None:
    model = ir.from_onnx_text("""<ir_version: 9, opset_import: ["" : 18, "l" : 1]>
    g (float[N] x) => (double[M] y) { y = l.F<k = 11>(x) }
    <domain: "l", opset_import: ["" : 18]> F <k> (a) => (b)
    { r = Constant<value_ints = [2]>()  t = Tile(a, r)  b = Cast<to: int = @k>(t) }""")
    ctx = apply((swap_cast_and_tile,), model)
    assert not ctx.rewrites
    assert "attribute to is a parameter of the enclosing function" in [
        r.reason for r in ctx.remarks
    ]


def test_nodes_wait_in_order_with_the_look_they_had_unless_pushed() -> None:
    nodes = [ir.Node("", kind, []) for kind in ("Abs", "Neg", "Exp", "Log")]
    ir.Graph([], [], nodes=nodes, name="g")
    look = ("Abs", "", ())
    work = Worklist(dict(zip(nodes, (look, None, look, look), strict=True)), idle=nodes[2:])
    found = []
    for node, seen in work:
        found.append((node.op_type, seen))
        if node is nodes[0] and seen is look:
            work.push([nodes[1], nodes[2], nodes[0]])  # what waits keeps its place, idle or not
    expected = [("Abs", look), ("Neg", UNSEEN), ("Exp", UNSEEN), ("Abs", UNSEEN)]
    assert found == expected
