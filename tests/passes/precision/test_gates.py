"""Gates in every graph of a model, and the look at the graph that would be emitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.precision import settle
from graphopt_passes.precision.flow import flow_of
from graphopt_passes.precision.gates import Gates
from graphopt_passes.precision.legality import Legality
from graphopt_passes.precision.plan import Facts, Kind, decide_all, gather
from graphopt_passes.precision.refine import refine

from graphopt.rewrite import Context
from graphopt.targets import get_target
from graphopt.verify.compare import Budget
from tests.passes.precision.casting import cast, normal, reasons
from tests.rewriting import parse

HALF = ir.DataType.FLOAT16
X = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
TRUE = np.array(True)

LOOP = (
    "g (float[4,16] x) => (float[4,16] y) <float[16,16] w>"
    "{ t = Constant<value_int=200>() c = Constant<value=bool {1}>()"
    "  y = Loop(t, c, x) <body = l (int64 i, bool p, float[4,16] s) => (bool o, float[4,16] n)"
    "  { o = Identity(p) m = Add(s, x) n = Tanh(m) }> }"
)
BRANCHES = (
    "g (float[4,16] x, bool c) => (float[4,16] y) <float[16,16] w>"
    "{ h = MatMul(x, w) y = If(c) <then_branch = t () => (float[4,16] a)"
    "    { p = Mul(h, big) q = Mul(p, p) r = Sqrt(q) a = Div(r, big) },"
    "  else_branch = e () => (float[4,16] b) { b = Identity(h) }> }"
)
SCAN = (
    "g (float[4,16] x) => (float[4,16] y) <float[16,16] w, float[16] z>"
    "{ last, y = Scan<num_scan_inputs=1, body = b (float[16] s, float[16] e) => (float[16] o, float[16] p)"
    "  { o = Add(s, e) p = MatMul(o, w) }>(z, x) }"
)


def gated(text: str, feeds: Mapping[str, Any], **constants: Any) -> tuple[ir.Model, Facts, Gates]:
    """A model of which nobody knows ranges, with a gate at each node that schema and target let be half."""
    proto = parse(text, opset=18)
    for name, array in constants.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(proto)
    target = get_target("cuda")
    ctx = Context(model, target)
    _ = ctx.shapes
    facts = gather(model, Legality(target, HALF, model.opset_imports), {}, flow_of(model))
    names = [v.name or "" for g in model.graphs() for node in g for v in node.outputs]
    facts.forced = dict.fromkeys(names, Kind.LOW.value)
    decisions = decide_all(model, facts)
    gates = Gates.of(model, decisions, HALF, facts.masks, [feeds], Budget(max_over_rms=0.01))
    return model, facts, gates


@pytest.mark.parametrize(
    ("text", "feeds", "expected"),
    [
        (LOOP, {"x": X}, ["m", "n"]),
        (BRANCHES, {"x": X, "c": TRUE}, ["h", "p", "q", "r", "a"]),
        (SCAN, {"x": X}, ["o", "p"]),
    ],
)
def test_bodies_have_gates_that_round(
    text: str, feeds: dict[str, Any], expected: list[str]
) -> None:
    _, _, gates = gated(text, feeds, **({"big": np.float32(2)} if "big" in text else {}))
    assert [node.outputs[0].name for node in gates.nodes] == expected
    count = len(expected)
    assert gates.survey([False] * count) == 0
    assert 0 < gates.survey([True] * count) < 10
    alone = [gates.badness([i == j for j in range(count)]) for i in range(count)]
    assert all(error > 0 for error in alone)


def test_an_overflow_inside_a_branch_is_localised() -> None:
    _, _, gates = gated(BRANCHES, {"x": X, "c": TRUE}, big=np.float32(2000))
    found = refine(len(gates.nodes), gates)
    assert {gates.nodes[index].outputs[0].name for index in found.raised} == {"q", "r"}
    assert found.after <= 1


def test_the_branch_that_is_not_taken_makes_no_error() -> None:
    _, _, gates = gated(BRANCHES, {"x": X, "c": np.array(False)}, big=np.float32(2000))
    assert gates.survey([True] * 5) < 1


def test_a_long_sum_inside_a_loop_goes_back_to_float32() -> None:
    text = LOOP.replace(
        "m = Add(s, x) n = Tanh(m)", "e = MatMul(x, w) m = Add(s, e) n = Identity(m)"
    )
    _, ctx, _ = cast(
        text.replace("200", "1000").replace("w>", "z>"), constants={"w": normal(16, 16)}
    )
    assert "sensitivity" in reasons(ctx)["m"]
    assert "e" not in reasons(ctx)


def test_a_graph_that_errs_more_than_the_experiments_said_is_raised_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gates hold, and what would be emitted does not, once."""
    judged: list[float] = []

    def judge(*_: object) -> float:
        judged.append(2.0 if not judged else 0.1)
        return judged[-1]

    monkeypatch.setattr(Gates, "judge", judge)
    text = "g (float[4,16] x) => (float[4,16] y) <float[16,16] w, float[16,16] v> { a = MatMul(x, w) y = MatMul(a, v) }"
    constants = {"w": normal(16, 16), "v": normal(16, 16)}
    cast(text.replace(" <float[16,16] w, float[16,16] v>", ""), constants=constants)
    assert judged == [2.0, 0.1]
    assert settle.STRICTER[0] < settle.EMITTED
