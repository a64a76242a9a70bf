"""Walks over main graph, subgraphs and functions; captures, order, liveness."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.ir import scopes

MODEL = """<ir_version: 8, opset_import: ["":18, "f":1]>
g (float[N] x, bool c) => (float[N] y) {
  t = Relu(x)
  d = Abs(t)
  y = If (c) <
    then_branch = a () => (o) { o = If (c) <then_branch = p () => (q) { q = f.twice(t) },
    else_branch = r () => (s) { s = Neg(x) }> }, else_branch = b () => (u) { u = Abs(t) }>
}
<opset_import: ["":17], domain: "f"> twice (v) => (w) { w = Add(v, v) }"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_onnx_text(MODEL)


def test_every_graph_comes_with_path_and_imports(model: ir.Model) -> None:
    found = {scope.path: scope.opsets[""] for scope in scopes.all_graphs(model)}
    assert list(found) == [
        "main",
        "main/If (-> y)",
        "main/If (-> y)/If (-> o)",
        "function f::twice",
    ]
    assert found["function f::twice"] == 17
    assert [scope.graph.name for scope in scopes.all_graphs(model)][:5] == ["g", "a", "p", "r", "b"]


def test_all_nodes_visits_inner_nodes_after_their_holder(model: ir.Model) -> None:
    kinds = [node.op_type for node in scopes.all_nodes(model.graph)]
    assert kinds == ["Relu", "Abs", "If", "If", "twice", "Neg", "Abs"]


def test_captures_reach_through_nested_graphs(model: ir.Model) -> None:
    then_branch = model.graph[2].attributes["then_branch"].as_graph()
    assert {value.name for value in scopes.captures(then_branch)} == {"c", "t", "x"}
    assert {value.name for value in scopes.dependencies(model.graph[2])} == {"c", "t", "x"}


def test_sort_respects_captures_and_leaves_sorted_graphs_alone(model: ir.Model) -> None:
    graph = model.graph
    relu, branch = graph[0], graph[2]
    order = list(graph)
    scopes.sort(graph)
    assert list(graph) == order
    graph.remove(relu)
    graph.insert_after(branch, relu)
    assert not scopes.is_sorted(graph)
    scopes.sort(graph)
    assert scopes.is_sorted(graph)
    assert list(graph).index(relu) < list(graph).index(branch)


def test_topological_orders_a_selection_stably(model: ir.Model) -> None:
    relu, absolute, branch = model.graph
    assert scopes.topological([branch, absolute, relu]) == [relu, branch, absolute]


def test_cycles_are_refused(model: ir.Model) -> None:
    relu, absolute, _ = model.graph
    relu.replace_input_with(0, absolute.outputs[0])
    with pytest.raises(ModelError, match="cycle"):
        scopes.sort(model.graph)
    with pytest.raises(ModelError, match="cycle"):
        scopes.topological(model.graph)


def test_dead_nodes_have_no_use_at_all(model: ir.Model) -> None:
    relu, absolute, branch = model.graph
    assert scopes.is_dead(absolute)
    assert not scopes.is_dead(relu)
    assert not scopes.is_dead(branch)


def test_a_census_is_every_graph_with_its_nodes(model: ir.Model) -> None:
    census = scopes.Census(model)
    walked = [(scope.path, tuple(scope.graph)) for scope in scopes.all_graphs(model)]
    assert [(scope.path, nodes) for scope, nodes in census.parts] == walked
    assert census.size == sum(len(nodes) for _, nodes in walked) == 8
