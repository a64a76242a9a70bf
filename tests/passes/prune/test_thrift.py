"""How much what a channel saves counts beside its importance."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from graphopt_passes.prune.channels import Costs, Group, choose, expense, find_groups, weight_norms
from graphopt_passes.prune.labels import Labels, propagate
from graphopt_passes.prune.layers import find_layers
from graphopt_passes.prune.request import parse_sparsity

from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from tests.rewriting import parse

# One wide group of cheap channels, one narrow group of dear ones.
TEXT = """g (float[N,8] x) => (float[N,8] y)
    <float[8,64] a, float[64,8] b, float[8,6] c, float[6,256] d, float[256,8] e> {
    h = MatMul(x, a)  r = Relu(h)  i = MatMul(r, b)  s = Relu(i)
    j = MatMul(s, c)  t = Relu(j)  k = MatMul(t, d)  u = Relu(k)  y = MatMul(u, e) }"""


Facts: TypeAlias = "tuple[list[Group], Labels, Costs]"


@pytest.fixture
def facts() -> Facts:
    model = load_model(parse(TEXT))
    labels, layers = propagate(model, Shapes(model)), find_layers(model.graph)
    return find_groups(layers, labels), labels, Costs.of(layers, Shapes(model))


def test_expense_is_what_goes_through_one_channel(facts: Facts) -> None:
    groups, _, costs = facts
    dear = {len(group.classes): expense(group, costs) for group in groups}
    total = 8 * 64 + 64 * 8 + 8 * 6 + 6 * 256 + 256 * 8
    assert dear[64] == pytest.approx((8 + 8) / total)
    assert dear[6] == pytest.approx((8 + 256) / total)


def test_costs_are_weights_where_asked_for() -> None:
    text = "g (float[N,3,9,9] x) => (float[N,8,7,7] y) <float[8,3,3,3] w> { y = Conv(x, w) }"
    model = load_model(parse(text))
    layers = find_layers(model.graph)
    assert Costs.of(layers, Shapes(model)).total == 7 * 7 * 8 * 27
    by_weights = parse_sparsity("channels:0.5,by=parameters").by
    assert Costs.of(layers, Shapes(model), by_weights).total == 8 * 27


def test_thrift_takes_the_dear_ones_first_and_its_contrary_spares_them(facts: Facts) -> None:
    groups, labels, costs = facts
    narrow = next(group for group in groups if len(group.classes) == 6)
    left = []
    for thrift in (1.0, 0.0, -1.0):
        dear = {group: expense(group, costs) ** thrift for group in groups}
        dropped = choose(groups, weight_norms(groups), labels, costs, 0.3, dear)
        left.append(len(set(narrow.classes) - dropped))
    assert left[0] <= left[1] <= left[2]
    assert left[0] < left[2]
