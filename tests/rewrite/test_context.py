"""What a run keeps of what its passes had to say."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.notes import QUANTIZATION
from graphopt.ir.scopes import Census
from graphopt.rewrite import Context, Gate, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse


def test_what_was_made_after_all_is_not_missed() -> None:
    """A rule that declines in one turn and fires in the next has nothing to say."""
    model = ir.from_proto(parse("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    ctx = Context(model, get_target("cpu"))
    ctx.pass_name = "p"
    ctx.missed("r", "a", "not yet")
    ctx.missed("r", "b", "never")
    ctx.missed("other", "a", "another rule")
    ctx.remark(RemarkKind.NOTE, "r", "a", "a note stays")
    assert ctx.permit("r", "a")
    ctx.settle_remarks()
    assert [remark.reason for remark in ctx.remarks] == ["never", "another rule", "a note stays"]


def test_a_census_holds_until_a_change_is_permitted() -> None:
    model = ir.from_proto(parse("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=1))
    ctx.census = census = Census(model)
    assert ctx.walk(model) is census
    assert ctx.permit("r", "a")
    assert ctx.walk(model) is not census
    ctx.census = census
    assert not ctx.permit("r", "b")
    assert ctx.walk(model) is census


def test_annotations_are_looked_for_while_there_are_any() -> None:
    model = ir.from_proto(parse("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    model.graph.inputs[0].meta[QUANTIZATION] = {"SCALE_TENSOR": "s"}
    ctx = Context(model, get_target("cpu"))
    assert ctx.annotated(model) == {"s"}
    del model.graph.inputs[0].meta[QUANTIZATION]
    assert not ctx.annotated(model)
