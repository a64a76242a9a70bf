"""Running a pipeline: order, repetition, what is recorded, and what happens to a pass that fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import onnx_ir as ir
import pytest

from graphopt.errors import ModelError, PassError
from graphopt.ir.scopes import Census
from graphopt.numerics import Numerics
from graphopt.pipeline import PassRun, Repeat, flatten, run_pipeline
from graphopt.rewrite import Context, Gate, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse

TEXT = "g (float[2] x) => (float[2] y) { a = Abs(x)  y = Neg(a) }"


@dataclasses.dataclass(frozen=True)
class Step:
    """Does what it is told, and says that it changed the model as often as it is told."""

    name: str
    action: Callable[[ir.Model, Context], object] = lambda _m, _c: None
    changes: int = 0
    numerics: ClassVar[Numerics] = Numerics.EXACT
    calls: list[str] = dataclasses.field(default_factory=list)

    def run(self, model: ir.Model, ctx: Context) -> bool:
        self.calls.append(self.name)
        self.action(model, ctx)
        return len([c for c in self.calls if c == self.name]) <= self.changes


def setup(gate: Gate | None = None) -> tuple[ir.Model, Context]:
    model = ir.from_proto(parse(TEXT))
    return model, Context(model, get_target("cpu"), gate=gate or Gate())


def raise_(error: Exception) -> Callable[[ir.Model, Context], object]:
    def action(_model: ir.Model, _ctx: Context) -> object:
        raise error

    return action


def test_passes_run_in_order_and_are_recorded() -> None:
    model, ctx = setup()

    def add(m: ir.Model, c: Context) -> None:
        assert c.pass_name == "first"
        c.permit("rule", "site")
        node = ir.Node("", "Relu", [m.graph.inputs[0]], name="r")
        node.outputs[0].name = "r"
        m.graph.append(node)

    runs = run_pipeline(model, (Step("first", add, 1), Step("second")), ctx)
    assert [(r.name, r.changed, r.rewrites, r.nodes_after) for r in runs] == [
        ("first", True, 1, 3),
        ("second", False, 0, 3),
    ]
    assert all(r.seconds >= 0 for r in runs)


def test_the_observer_sees_every_run() -> None:
    model, ctx = setup()
    seen: list[tuple[str, bool]] = []

    def observe(run: PassRun, m: ir.Model) -> None:
        seen.append((run.name, m is model))

    run_pipeline(model, (Step("a"), Repeat((Step("b"),))), ctx, observer=observe)
    assert seen == [("a", True), ("b", True)]


def test_a_group_stops_when_a_whole_turn_changes_nothing() -> None:
    model, ctx = setup()
    calls: list[str] = []
    group = Repeat((Step("a", changes=2, calls=calls), Step("b", calls=calls)))
    run_pipeline(model, (group,), ctx)
    assert calls == ["a", "b", "a", "b", "a"]
    assert not ctx.remarks


def test_a_group_that_does_not_settle_is_stopped_and_says_so() -> None:
    model, ctx = setup()
    calls: list[str] = []
    run_pipeline(
        model,
        (
            Repeat(
                (Step("a", changes=99, calls=calls), Step("b", calls=calls)), limit=3, name="tidy"
            ),
        ),
        ctx,
    )
    assert calls == ["a", "b"] * 3
    (remark,) = ctx.remarks
    assert (remark.kind, remark.pass_name, remark.rule) == (RemarkKind.NOTE, "tidy", "limit")
    assert remark.reason.startswith("still changing after 3 turns of a, b")


def test_flatten_opens_groups() -> None:
    a, b, c = (Step(name) for name in "abc")
    assert flatten((a, Repeat((b, c)), a)) == (a, b, c, a)


def test_a_pass_that_the_gate_leaves_out_does_not_run() -> None:
    model, ctx = setup(Gate(passes=frozenset({"a"})))
    step = Step("a", changes=1)
    (run,) = run_pipeline(model, (step,), ctx)
    assert (run.changed, run.rewrites, run.nodes_after) == (False, 0, 2)
    assert step.calls == []


def test_an_exception_becomes_a_pass_error_with_its_cause() -> None:
    model, ctx = setup()
    fault = ZeroDivisionError("by zero")
    with pytest.raises(
        PassError, match=r"pass bad raised ZeroDivisionError: by zero.*--disable bad"
    ) as caught:
        run_pipeline(model, (Step("bad", raise_(fault)),), ctx)
    assert caught.value.__cause__ is fault
    assert caught.value.pass_name == "bad"


def test_an_error_of_ours_goes_through() -> None:
    model, ctx = setup()
    with pytest.raises(ModelError, match="yours"):
        run_pipeline(model, (Step("a", raise_(ModelError("yours"))),), ctx)


def test_a_broken_invariant_becomes_a_pass_error() -> None:
    model, ctx = setup()

    def damage(m: ir.Model, _ctx: Context) -> None:
        m.graph[1].outputs[0].name = "a"

    with pytest.raises(
        PassError, match="pass bad left an invalid model: main: 'a' is defined twice"
    ) as caught:
        run_pipeline(model, (Step("bad", damage, 1),), ctx)
    assert caught.value.pass_name == "bad"


def test_at_most_three_violations_are_told() -> None:
    model, ctx = setup()

    def damage(m: ir.Model, _ctx: Context) -> None:
        for index in range(6):
            node = ir.Node("", "Relu", [m.graph.inputs[0]], name=f"n{index}")
            node.outputs[0].name = "a"
            m.graph.append(node)

    with pytest.raises(PassError) as caught:
        run_pipeline(model, (Step("bad", damage, 1),), ctx)
    assert str(caught.value).count("defined twice") == 3


def test_nodes_of_subgraphs_and_functions_count() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
    g (float[1] x, bool c) => (float[1] y) {
      f = my.f(x)
      y = If(c) <then_branch = t () => (float[1] p) { p = Neg(f) }, else_branch = e () => (float[1] q) { q = Relu(f) }>
    }
    <domain: "my", opset_import: ["" : 18]> f (a) => (b) { b = Neg(a) }
    """
    assert Census(ir.from_proto(parse(text))).size == 5


def test_a_pass_that_denies_what_it_did_is_checked_too() -> None:
    model, ctx = setup()

    def drop(m: ir.Model, _c: Context) -> None:
        last = m.graph[-1]
        m.graph.remove(last)

    with pytest.raises(PassError, match="pass sly left an invalid model"):
        run_pipeline(model, [Step("sly", drop)], ctx)
