"""What spares work must not show: the same bytes, rewrites and remarks without it, on random graphs."""

from __future__ import annotations

from unittest import mock

import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import PIPELINES
from hypothesis import HealthCheck, given, settings

from graphopt.ir import check
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.scopes import Census
from graphopt.ir.shapes import Shapes, engine
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Context, Options
from graphopt.rewrite.index import UNSEEN, Look, Looks
from graphopt.rewrite.pattern import Binding, Op
from graphopt.targets import get_target
from tests.property import graphs

COMMON = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False
)


def outcome(proto: onnx.ModelProto, target: str, *, trace: bool) -> tuple[object, ...]:
    """Everything that a run leaves behind."""
    model = load_model(proto)
    ctx = Context(model, get_target(target), Options(trace_misses=trace))
    runs = run_pipeline(model, PIPELINES[target, "fp32"], ctx)
    steps = [(run.name, run.changed, run.rewrites, run.nodes_after) for run in runs]
    return model_to_bytes(model), ctx.rewrites, ctx.remarks, steps


def first_of_all(self: Op, node: ir.Node) -> Binding | None:
    return next(self.match_node(node, {}), None)


def all_unseen(self: Looks) -> dict[ir.Node, Look | None]:
    return {node: UNSEEN for _, nodes in self.census.parts for node in nodes}


@pytest.mark.parametrize(("target", "trace"), [("cpu", False), ("cpu", True), ("tensorrt", False)])
@settings(COMMON, max_examples=40)
@given(proto=graphs.models())
def test_runs_without_shortcuts_end_alike(target: str, trace: bool, proto: onnx.ModelProto) -> None:
    expected = outcome(proto, target, trace=trace)
    with (
        mock.patch.object(Looks, "idle", return_value=()),
        mock.patch.object(Looks, "known", all_unseen),
        mock.patch.object(check, "_is_flawless", return_value=False),
        mock.patch.object(engine, "likeness_of", return_value=None),
        mock.patch.object(Op, "first", first_of_all),
        mock.patch.object(Context, "walk", lambda _self, model: Census(model)),
    ):
        assert outcome(proto, target, trace=trace) == expected


@settings(COMMON, max_examples=120)
@given(proto=graphs.models())
def test_nodes_that_look_alike_have_the_same_facts(proto: onnx.ModelProto) -> None:
    model = load_model(proto)
    found = Shapes(model)
    with mock.patch.object(engine, "likeness_of", return_value=None):
        expected = Shapes(model)
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    assert [found.facts(value) for value in values] == [expected.facts(value) for value in values]
