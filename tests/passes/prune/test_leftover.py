"""What channels cost their readers, and what a cut saves of the time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.prune.channels import find_groups, slimmed
from graphopt_passes.prune.clock import Clock
from graphopt_passes.prune.labels import propagate
from graphopt_passes.prune.layers import find_layers
from graphopt_passes.prune.leftover import can_tell, leftovers
from graphopt_passes.prune.slim import kept_indices
from graphopt_passes.prune.weights import dense_moments

from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from tests.rewriting import parse

PLAIN = """g (float[N,4,6,6] x) => (float[N,3,4,4] y)
    <float[8,4,1,1] w1, float[8] b1, float[3,8,3,3] w2, float[3] b2> {
    a = Conv(x, w1, b1)
    r = Relu(a)
    y = Conv(r, w2, b2)
}"""
DEPTHWISE = """g (float[1,3,16,16] x) => (float[1,8,16,16] y)
    <float[32,3,3,3] w1, float[32,1,3,3] w2, float[8,32,1,1] w3> {
    a = Conv<pads = [1,1,1,1]>(x, w1)
    r = Relu(a)
    d = Conv<group = 32, pads = [1,1,1,1]>(r, w2)
    y = Conv(d, w3)
}"""


def twice(model: ir.Model, one: int, other: int) -> ir.Model:
    """The model with random weights, one channel a multiple of another: its readers lose nothing with it."""
    rng = np.random.default_rng(1)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = rng.standard_normal(value.const_value.shape.numpy()).astype(np.float32)
        if name in ("w1", "b1"):
            array[other] = 2 * array[one]
        value.const_value = ir.Tensor(array, name=name)
    return model


def test_a_channel_that_another_can_stand_for_costs_nothing() -> None:
    model = twice(load_model(parse(PLAIN)), 2, 5)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((16, 4, 6, 6)).astype(np.float32)} for _ in range(5)]
    layers = find_layers(model.graph)
    (group,) = find_groups(layers, propagate(model, Shapes(model)))
    costs = leftovers([group], dense_moments(model, [layers[1]], feeds))
    ranked = sorted(group.classes, key=lambda root: costs[root])
    places = {group.classes.index(root) for root in ranked[:1]}
    assert places <= {2, 5}
    assert costs[ranked[0]] < 0.25 * costs[ranked[1]]
    assert costs[ranked[-1]] < 1.5  # a share of what the reader's output varies by


def test_what_nobody_can_tell_comes_last_of_all() -> None:
    model = load_model(parse(PLAIN))
    (group,) = find_groups(find_layers(model.graph), propagate(model, Shapes(model)))
    assert set(leftovers([group], {}).values()) == {1.0}


def test_grouped_layers_are_not_told_of() -> None:
    layers = find_layers(load_model(parse(DEPTHWISE)).graph)
    assert [can_tell(layer) for layer in layers] == [True, False, True]


@pytest.mark.parametrize(("block", "same"), [(16, True), (8, False)])
def test_a_part_of_a_block_saves_only_what_memory_takes(block: int, same: bool) -> None:
    model = load_model(parse(DEPTHWISE))
    shapes = Shapes(model)
    labels = propagate(model, shapes)
    (group,) = find_groups(find_layers(model.graph), labels)
    clock = Clock.of(model.graph, shapes, block)
    whole, keep = clock.left({}), kept_indices(labels, frozenset(group.classes[:8]))
    saved = 1 - clock.left(keep) / whole
    assert saved > 0
    assert (saved < 0.1) is same
    made = slimmed(model, labels, frozenset(group.classes[:8]))
    again = Clock.of(made.graph, Shapes(made), block).left({})
    assert again == pytest.approx(clock.left(keep))
