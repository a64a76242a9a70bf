"""Which way control flow goes, also where graphs within nodes decide for themselves; loops that never end."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.numerics import Numerics
from graphopt.verify import reference
from graphopt.verify.branches import conditions
from graphopt.verify.verifier import ReferenceRun, VerifyOptions

HEAD = '<ir_version: 8, opset_import: ["" : {}]>'
REORDERED = VerifyOptions(Numerics.REORDERED)

NESTED = """g (float[n,4] x, bool c) => (float[n,4] y) {
  y = If (c) <
    then_branch = t () => (float[n,4] p) {
      m = ReduceMax<keepdims = 0>(x)
      k = Constant<value_float = 200.0>()
      d = Greater(m, k)
      p = If (d) <then_branch = tt () => (float[n,4] r) { r = {rare}(x) },
                  else_branch = te () => (float[n,4] s) { s = Cos(x) }>
    },
    else_branch = e () => (float[n,4] q) { q = Sin(x) }>
}"""

LOOPED = """g (float[n,4] x, int64 turns) => (float[n,4] y) {
  y = Loop(turns, , x) <body = b (int64 i, bool k, float[n,4] v) => (bool k2, float[n,4] w) {
    k2 = Identity(k)
    m = ReduceMax<keepdims = 0>(v)
    limit = Constant<value_float = 1.5>()
    d = Less(m, limit)
    w = If (d) <then_branch = tt () => (float[n,4] r) { r = Cos(v) },
                else_branch = te () => (float[n,4] s) { s = Sin(v) }> }>
}"""


def proto(text: str, opset: int = 17) -> bytes:
    return bytes(onnx.parser.parse_model(HEAD.format(opset) + text).SerializeToString())


@pytest.mark.parametrize("opset", [12, 17])
def test_a_condition_within_a_branch_is_watched_and_sought(opset: int) -> None:
    right = proto(NESTED.replace("{rare}", "Neg"), opset)
    run = ReferenceRun(right, thorough=True)
    assert not any("no inputs were found" in note for note in run.notes)
    assert any(feed.values["c"] and feed.values["x"].max() > 200 for feed in run.feeds)
    wrong = run.verify(proto(NESTED.replace("{rare}", "Abs"), opset), REORDERED)
    assert wrong.passed is False
    assert run.verify(right).passed


def test_an_inner_branch_that_nothing_takes_is_named() -> None:
    never = NESTED.replace("{rare}", "Neg").replace("ReduceMax<keepdims = 0>(x)", "{}")
    never = never.replace("m = {}", "q0 = Mul(x, x) n0 = Neg(q0) m = ReduceMax<keepdims = 0>(n0)")
    run = ReferenceRun(proto(never), thorough=True)
    (note,) = (note for note in run.notes if "no inputs were found" in note)
    assert "If 'p' within If 'y' with a condition that is true" in note


@pytest.mark.parametrize("opset", [12, 17])
def test_conditions_of_all_turns_of_a_loop_are_counted(opset: int) -> None:
    model = ir.from_proto(onnx.parser.parse_model(HEAD.format(opset) + LOOPED))
    found = conditions(model)
    assert found.inner == ("If 'w' within Loop 'y'",)
    data = ir.to_proto(model).SerializeToString()
    session = reference.open_session(data)
    x = np.array([[1.6, 0, 0, 0]], np.float32)
    for turns, ways in ((0, [0, 0]), (1, [0, 1]), (3, [2, 1])):
        outputs = session.run({"x": x, "turns": np.array(turns)})
        assert outputs[found.ways].tolist() == ways


def test_what_is_watched_gives_the_same_numbers() -> None:
    text = proto(NESTED.replace("{rare}", "Neg"))
    run = ReferenceRun(text, thorough=True)
    plain = ReferenceRun(text, list(run.feeds))
    for watched, alone in zip(run.outputs, plain.outputs, strict=True):
        np.testing.assert_array_equal(watched["y"], alone["y"])


def test_what_no_feed_can_change_is_not_watched() -> None:
    text = """g (float[2,n] x) => (float[2,n] y) {
      s = Shape<start = 0, end = 1>(x) two = Constant<value_ints = [2]>() c = Equal(s, two)
      y = If (c) <then_branch = t () => (float[2,n] p) { p = Cos(x) },
                  else_branch = e () => (float[2,n] q) {
                    m = ReduceMax<keepdims = 0>(x) d = Cast<to = 9>(m)
                    q = If (d) <then_branch = ee () => (float[2,n] r) { r = Neg(x) },
                                else_branch = ef () => (float[2,n] s0) { s0 = Sin(x) }> }>
    }"""
    found = conditions(ir.from_proto(onnx.parser.parse_model(HEAD.format(17) + text)))
    assert (found.outer, found.inner, found.model) == ({}, (), None)


ENDLESS = """g (float[2] x, float limit) => (float[2] y) <bool yes = {1}> {
  y = Loop(, yes, x) <body = b (int64 i, bool k, float[2] v) => (bool k2, float[2] w) {
    w = Cos(v) m = ReduceMax<keepdims = 0>(w) k2 = {} }> }"""


def test_a_loop_without_end_is_stopped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOOP_SECONDS", 0.2)
    run = ReferenceRun(proto(ENDLESS.replace("{}", "Identity(k)")), thorough=True)
    assert "a loop in it does not seem to end" in run.unverifiable
    assert len(run.dropped) == 1, "where the plain inputs do not come back, no others are tried"
    free = ENDLESS.replace("float[2]", "float[batch,seq]").replace("{}", "Identity(k)")
    several = ReferenceRun(proto(free), thorough=True).dropped
    stopped = sum("was stopped" in dropped.reason for dropped in several)
    assert stopped == reference.MAX_STOPPED < len(several)


def test_a_candidate_whose_loop_does_not_end_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOOP_SECONDS", 0.2)
    monkeypatch.setattr(reference, "PATIENCE", 0.0)
    run = ReferenceRun(proto(ENDLESS.replace("{}", "Greater(limit, limit)")), thorough=True)
    assert run.feeds
    found = run.verify(proto(ENDLESS.replace("{}", "Identity(k)")), REORDERED)
    assert found.passed is False
    assert "a loop in it does not seem to end" in found.reason


def test_a_model_that_would_end_the_process_is_not_run() -> None:
    text = f"""g (int64[2] x) => (int64[2] y) {{
      a = Constant<value_ints = [{-(2**63)}, 6]>() b = Constant<value_ints = [-1, 3]>()
      d = Div(a, b) y = Add(x, d) }}"""
    run = ReferenceRun(proto(text))
    assert "running the reference would end the process: Div" in run.unverifiable
    assert "divides the least integer by -1" in run.unverifiable
    assert ReferenceRun(proto(text.replace("[-1, 3]", "[-2, 3]"))).unverifiable == ""
