"""Matrices with more inputs than their moments could be kept for: fitted in parts, or from the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
from graphopt_passes.prune import moments, weights
from graphopt_passes.prune.channels import find_groups
from graphopt_passes.prune.channels import slimmed as cut_down
from graphopt_passes.prune.labels import propagate
from graphopt_passes.prune.layers import find_layers
from graphopt_passes.prune.reconstruct import divergence, outputs, reconstruct
from graphopt_passes.prune.request import Method
from graphopt_passes.prune.samples import Feeds
from graphopt_passes.prune.slim import kept_indices
from graphopt_passes.prune.solve import Goal
from graphopt_passes.prune.weights import prune_fitted

from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from tests.rewriting import parse

FLAT = """g (float[N,4,4,4] x) => (float[N,6] y)
    <float[16,4,3,3] w1, float[16] b1, float[6,256] w2, float[6] b2> {
    a = Conv<pads = [1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    f = Flatten(r)
    y = Gemm<transB = 1>(f, w2, b2)
}"""


@pytest.fixture
def feeds() -> Feeds:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((24, 4, 4, 4)).astype(np.float32)} for _ in range(8)]


def test_parts_divide_the_columns_and_leave_patterns_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, layer) = find_layers(load_model(parse(FLAT)).graph)
    assert moments.parts(layer) == 1
    monkeypatch.setattr(moments, "MAX_WIDTH", 100)
    assert moments.parts(layer) == 4
    monkeypatch.setattr(moments, "MAX_WIDTH", 5)
    assert moments.parts(layer) == 64


def test_a_wide_matrix_is_pruned_in_parts(monkeypatch: pytest.MonkeyPatch, feeds: Feeds) -> None:
    model = load_model(parse(FLAT))
    want = outputs(model, feeds)
    monkeypatch.setattr(moments, "MAX_WIDTH", 64)
    (_, layer) = find_layers(model.graph)
    errors = {}
    for fit in (True, False):
        (done,) = prune_fitted(model, {layer: Goal(768)}, feeds, Method.MAGNITUDE, fit=fit)
        made = load_model(model)
        made.graph.initializers["w2"].const_value = done.weight
        assert done.bias is not None
        assert done.bias.shape == (6,)
        assert abs(done.zeros - 0.5) < 0.01
        errors[fit] = divergence(want, made, feeds)
    assert errors[True] < errors[False]


def test_weights_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, feeds: Feeds) -> None:
    model = load_model(parse(FLAT))
    (_, layer) = find_layers(model.graph)
    monkeypatch.setattr(moments, "MAX_WIDTH", 64)
    (done,) = prune_fitted(model, {layer: Goal(4)}, feeds, Method.MAGNITUDE, fit=False)
    new, old = done.weight.numpy(), layer.tensor.numpy()
    assert (new == 0).sum() == 4  # one a part
    np.testing.assert_array_equal(new[new != 0], old[new != 0])
    assert done.bias is not None
    bias = layer.bias_vector()
    assert bias is not None
    np.testing.assert_allclose(done.bias, bias, rtol=1e-6)


def test_costs_of_removal_are_known_in_parts(monkeypatch: pytest.MonkeyPatch, feeds: Feeds) -> None:
    model = load_model(parse(FLAT))
    monkeypatch.setattr(moments, "MAX_WIDTH", 64)
    (_, layer) = find_layers(model.graph)
    known = weights.dense_moments(model, [layer], feeds)
    matrix = weights.in_parts(layer, layer.matrix())
    assert known["w2"].shape == (4, 65, 65)
    assert weights.removal_costs(matrix, known["w2"]).shape == (4, 6, 64)


def test_samples_give_the_fit_that_moments_give(
    monkeypatch: pytest.MonkeyPatch, feeds: Feeds
) -> None:
    dense = load_model(parse(FLAT))
    labels = propagate(dense, Shapes(dense))
    (group,) = find_groups(find_layers(dense.graph), labels)
    gone = frozenset(group.classes[:8])
    keep = kept_indices(labels, gone)
    want = outputs(dense, feeds)
    found = []
    for width in (4096, 64):
        monkeypatch.setattr(moments, "MAX_WIDTH", width)
        made = cut_down(dense, labels, gone)
        before = divergence(want, made, feeds)
        reconstruct(dense, made, keep, feeds, 0)
        assert divergence(want, made, feeds) < 0.9 * before
        found.append(made.graph.initializers["w2"].const_value.numpy())  # type: ignore[union-attr]
    scale = np.abs(found[0]).max()
    np.testing.assert_allclose(found[1], found[0], atol=2e-3 * scale)
