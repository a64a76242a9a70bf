"""Foreign passes as ours: asked for at the gate, moved into the same model, told apart from those that did nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from graphopt.errors import PassError
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.numerics import Numerics
from graphopt.pipeline import Pass, run_pipeline
from graphopt.pipeline.adapters import (
    FunctionPass,
    OnnxIrPass,
    RulesPass,
    Snapshot,
    SurgeonPass,
    replace_contents,
)
from graphopt.pipeline.registry import load_pass
from graphopt.rewrite import Context, Gate, Op, Var, exact
from graphopt.targets import get_target
from tests.rewriting import parse, run

TEXT = "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Mul(x, w)  b = Neg(a)  y = Relu(b) }"


def model() -> ir.Model:
    return load_model(parse(TEXT))


def apply(step: Pass, m: ir.Model, gate: Gate | None = None) -> tuple[bool, Context]:
    ctx = Context(m, get_target("cpu"), gate=gate or Gate())
    (done,) = run_pipeline(m, (step,), ctx)
    return done.changed, ctx


def surgeon(function: Callable[[gs.Graph], gs.Graph | None]) -> SurgeonPass:
    return SurgeonPass("mine", function, "gs:module:mine")


def to_abs(graph: gs.Graph) -> None:
    graph.nodes[1].op = "Abs"


def copied(graph: gs.Graph) -> gs.Graph:
    graph = graph.copy()
    to_abs(graph)
    return graph


def abs_in_place(m: ir.Model) -> None:
    m.graph[1].op_type = "Abs"


def abs_in_clone(m: ir.Model) -> ir.Model:
    new = m.clone()
    abs_in_place(new)
    return new


class InPlace(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        abs_in_place(model)
        return ir.passes.PassResult(model, modified=False)  # not true, and nobody relies on it


class Functional(ir.passes.FunctionalPass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(abs_in_clone(model), modified=True)


STEPS = [
    surgeon(to_abs),
    surgeon(copied),
    FunctionPass("mine", abs_in_place, "ir:m:o"),
    FunctionPass("mine", abs_in_clone, "ir:m:o"),
    OnnxIrPass("mine", InPlace(), "ir:m:o"),
    OnnxIrPass("mine", Functional(), "ir:m:o"),
]
IDS = ["surgeon", "surgeon-copy", "function", "function-new", "onnx-ir", "onnx-ir-new"]


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_the_same_model_holds_the_result(step: Pass) -> None:
    m = model()
    weight = m.graph.initializers["w"].const_value
    changed, ctx = apply(step, m)
    assert changed
    assert [node.op_type for node in m.graph] == ["Mul", "Abs", "Relu"]
    assert m.graph.initializers["w"].const_value is weight
    assert [(r.rule, r.site, r.numerics) for r in ctx.rewrites] == [
        ("mine", "model", Numerics.REORDERED)
    ]
    np.testing.assert_array_equal(run(to_proto(m), {"x": np.array([1, -1], np.float32)})[0], [1, 2])


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_the_gate_is_asked(step: Pass) -> None:
    m = model()
    changed, ctx = apply(step, m, Gate(limit=0))
    assert not changed
    assert not ctx.rewrites
    assert m.graph[1].op_type == "Neg"


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_shapes_and_names_are_taken_anew(step: Pass) -> None:
    m = model()
    ctx = Context(m, get_target("cpu"))
    shapes = ctx.shapes
    step.run(m, ctx)
    assert ctx.shapes is not shapes
    assert ctx.shapes.dims(m.graph.outputs[0]) is not None


@pytest.mark.parametrize(
    "step",
    [
        surgeon(lambda _graph: None),
        surgeon(lambda graph: graph.copy()),
        FunctionPass("mine", lambda _model: None, ""),
        FunctionPass("mine", lambda _model: True, ""),
        FunctionPass("mine", lambda m: m, ""),
        FunctionPass("mine", lambda m: m.clone(), ""),
        OnnxIrPass("mine", common.RemoveUnusedNodesPass(), ""),
    ],
)
def test_what_changes_nothing_says_so(step: Pass) -> None:
    m = model()
    assert not apply(step, m)[0]
    assert not list(violations(m))


def test_a_changed_weight_is_a_change() -> None:
    def scale(graph: gs.Graph) -> None:
        graph.tensors()["w"].values *= 2

    m = model()
    assert apply(surgeon(scale), m)[0]
    tensor = m.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [2, 4]


def wrong(_given: Any) -> Any:
    return "yes"


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (surgeon(wrong), "an onnx_graphsurgeon.Graph or None"),
        (FunctionPass("mine", wrong, ""), "an onnx_ir.Model, a bool or None"),
    ],
)
def test_a_wrong_result_is_named(step: Pass, expected: str) -> None:
    with pytest.raises(PassError, match=f"pass mine returned a str, expected {expected}") as caught:
        apply(step, model())
    assert caught.value.pass_name == "mine"


def test_a_script_that_breaks_the_graph_leaves_the_model_alone() -> None:
    def cut(graph: gs.Graph) -> None:
        graph.nodes.pop(0)

    m = model()
    with pytest.raises(PassError, match=r"pass mine: main: Neg .* reads 'a', which no node of the"):
        apply(surgeon(cut), m)
    assert len(m.graph) == 3


def test_a_script_that_raises_is_a_pass_error() -> None:
    def fail(_graph: gs.Graph) -> None:
        raise KeyError("lost")

    with pytest.raises(PassError, match="pass mine raised KeyError: 'lost'"):
        apply(surgeon(fail), model())


def test_a_bad_result_of_a_function_is_caught_by_the_invariants() -> None:
    def duplicate(m: ir.Model) -> None:
        m.graph[0].outputs[0].name = "y"

    with pytest.raises(PassError, match="left an invalid model: main: 'y' is defined twice"):
        apply(FunctionPass("mine", duplicate, ""), model())


def test_rules_of_a_user_run() -> None:
    x = Var()

    @exact(Op("Neg", x))
    def to_neg_of_copy(m: Any, g: Any) -> ir.Value:
        return g.op("Abs", m[x])  # type: ignore[no-any-return]

    m = model()
    step = RulesPass("mine", (to_neg_of_copy,), "m:o")
    assert step.numerics is Numerics.EXACT
    assert apply(step, m)[0]
    assert m.graph[1].op_type == "Abs"


def test_a_script_in_a_file_runs_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import onnx_graphsurgeon as gs\n"
        "def drop_relu(graph: gs.Graph) -> gs.Graph:\n"
        "    (node,) = [n for n in graph.nodes if n.op == 'Relu']\n"
        "    node.op = 'Identity'\n"
        "    return graph.cleanup().toposort()\n"
    )
    step = load_pass(f"{path}:drop_relu")
    assert isinstance(step, SurgeonPass)
    m = model()
    assert apply(step, m)[0]
    assert [n.op_type for n in m.graph] == ["Mul", "Neg", "Identity"]


def test_everything_a_model_holds_is_replaced() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "my" : 1], producer_name: "p", producer_version: "1",
      domain: "d", model_version: 3, doc_string: "text">
    g (float[1] x) => (float[1] y) { y = my.f(x) }
    <domain: "my", opset_import: ["" : 18]> f (a) => (b) { b = Neg(a) }
    """
    old, new = model(), load_model(parse(text))
    new.metadata_props["k"], new.meta["m"] = "v", 1
    old.metadata_props["stale"], old.meta["stale"] = "v", 1
    expected = to_proto(new).SerializeToString()
    replace_contents(old, new)
    assert to_proto(old).SerializeToString() == expected
    assert (old.metadata_props, dict(old.meta)) == ({"k": "v"}, {"m": 1})


def test_a_model_may_be_replaced_by_itself() -> None:
    m = model()
    m.metadata_props["k"] = "v"
    replace_contents(m, m)
    assert m.metadata_props == {"k": "v"}
    assert len(m.graph) == 3


def test_a_snapshot_sees_a_large_weight_that_was_exchanged() -> None:
    proto = parse("g (float[4096] x) => (float[4096] y) <float[4096] w> { y = Mul(x, w) }")
    m = load_model(proto)
    before = Snapshot.of(m)
    assert Snapshot.of(m) == before
    m.graph.initializers["w"].const_value = ir.tensor(np.zeros(4096, np.float32))
    assert Snapshot.of(m) != before
    assert before != "something else"
