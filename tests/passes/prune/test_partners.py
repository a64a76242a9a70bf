"""The other summand of a residual sum: what it has lost, the layer makes up for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.prune.layers import Layer, find_layers
from graphopt_passes.prune.moments import Moments
from graphopt_passes.prune.request import Method
from graphopt_passes.prune.solve import Goal
from graphopt_passes.prune.streams import Streams, cut, partners
from graphopt_passes.prune.weights import grouped_by_source, prune_fitted

from graphopt.ir.model_file import load_model
from tests.rewriting import parse

BLOCK = """g (float[N,8,5,5] x) => (float[N,4,5,5] y)
    <float[16,8,3,3] w1, float[16] b1, float[8,16,1,1] w2, float[8] b2, float[8,8,1,1] w3, float[4,8,1,1] w4> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    c = Conv(r, w2, b2)
    d = Conv(x, w3)
    e = Add(c, d)
    y = Conv(e, w4)
}"""


def model_of(text: str) -> ir.Model:
    """The network with random weights."""
    proto = parse(text)
    rng = np.random.default_rng(3)
    for tensor in proto.graph.initializer:
        made = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.raw_data = made.tobytes()
    return load_model(proto)


def layers_of(model: ir.Model) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(model.graph)}


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((4, 8, 5, 5)).astype(np.float32)} for _ in range(6)]


def test_is_the_other_input_of_the_sum() -> None:
    layers = layers_of(model_of(BLOCK))
    found = {name: layer.partner for name, layer in layers.items()}
    assert found["w2"] is not None
    assert found["w2"].name == "d"
    assert found["w3"] is not None
    assert found["w3"].name == "c"
    assert found["w1"] is None
    assert found["w4"] is None


def test_lies_behind_the_bias() -> None:
    text = """g (float[N,8] x) => (float[N,8] y)
        <float[8,16] w1, float[16,8] w2, float[8] b> {
        a = MatMul(x, w1)
        r = Relu(a)
        c = MatMul(r, w2)
        d = Add(c, b)
        y = Add(x, d)
    }"""
    partner = layers_of(model_of(text))["w2"].partner
    assert partner is not None
    assert partner.name == "x"


@pytest.mark.parametrize("last", ["y = Mul(c, x)", "y = Add(c, other)"])
def test_is_no_factor_and_no_constant(last: str) -> None:
    text = f"""g (float[N,8] x) => (float[N,8] y)
        <float[8,8] w, float[1] other> {{ c = MatMul(x, w) {last} }}"""
    assert layers_of(model_of(text))["w"].partner is None


def test_a_shortcut_is_made_before_the_block_that_ends_beside_it() -> None:
    model = model_of(BLOCK)
    groups = grouped_by_source(model, find_layers(model.graph))
    beside = partners(groups)
    assert [[value.name for value in several] for several in beside] == [[], ["d"], []]
    pieces = cut(model.graph, [group[0].source for group in groups], beside)
    assert [node.outputs[0].name for node in pieces[1].nodes] == ["a", "r", "d"]
    assert "d" in pieces[1].alive
    streams = Streams(model, feeds())
    streams.run(pieces[0], {})
    streams.run(pieces[1], {})
    assert "d" in streams.dense[0]


def test_none_is_known_while_a_layer_in_it_is_still_to_be_fitted() -> None:
    text = """g (float[N,8] x) => (float[N,8] y)
        <float[8,8] w1, float[8,8] w2, float[8,8] w3, float[8,8] w4> {
        a = MatMul(x, w1)
        b = MatMul(a, w2)
        c = MatMul(x, w3)
        r = Relu(c)
        d = MatMul(r, w4)
        y = Add(b, d)
    }"""
    model = model_of(text)
    groups = grouped_by_source(model, find_layers(model.graph))
    names = [[layer.name for layer in group] for group in groups]
    assert names == [["w1", "w3"], ["w2"], ["w4"]]
    assert [[v.name for v in several] for several in partners(groups)] == [[], [], ["b"]]


class TestAim:
    def test_adds_what_was_lost_of_a_convolution(self) -> None:
        layer = layers_of(model_of(BLOCK))["w2"]
        rng = np.random.default_rng(0)
        x, gap = rng.standard_normal((2, 16, 5, 5)), rng.standard_normal((2, 8, 5, 5))
        plain, beside = Moments(layer, 1, 0), Moments(layer, 1, 0)
        plain.add(x, x)
        beside.add(x, x, gap)
        full = layer.matrix()[0]
        lost = np.einsum("nchw,nkhw->ck", gap, x)
        more = beside.aim(full, 0, 16) - plain.aim(full, 0, 16)
        np.testing.assert_allclose(more, lost, rtol=1e-9, atol=1e-9)

    def test_ignores_what_is_repeated_along_an_axis(self) -> None:
        layer = layers_of(model_of(BLOCK))["w2"]
        x = np.random.default_rng(0).standard_normal((2, 16, 5, 5))
        plain, beside = Moments(layer, 1, 0), Moments(layer, 1, 0)
        plain.add(x, x)
        beside.add(x, x, np.ones((2, 8, 1, 1)))
        full = layer.matrix()[0]
        np.testing.assert_array_equal(beside.aim(full, 0, 16), plain.aim(full, 0, 16))


def test_a_block_makes_up_for_its_shortcut() -> None:
    model = model_of(BLOCK)
    layers = layers_of(model)
    wanted = {layers["w2"]: Goal(), layers["w3"]: Goal(zeros=40)}
    done = {each.layer.name: each for each in prune_fitted(model, wanted, feeds(), Method.ADMM)}
    rest = np.concatenate([feed["x"] for feed in feeds()])
    lost = np.einsum("nchw,kc->nkhw", rest, layers["w3"].matrix()[0] - _matrix(done["w3"].weight))
    moved = _matrix(done["w2"].weight) - layers["w2"].matrix()[0]
    assert np.abs(moved).max() > 0.01
    hidden = _hidden(rest, layers["w1"])
    assert done["w2"].bias is not None
    shift = done["w2"].bias - layers["w2"].bias_vector()
    made = np.einsum("nchw,kc->nkhw", hidden, moved) + shift[:, None, None]
    assert np.linalg.norm(lost - made) < 0.9 * np.linalg.norm(lost)


def _matrix(tensor: ir.TensorProtocol) -> np.ndarray:
    made: np.ndarray = tensor.numpy().astype(np.float64)[:, :, 0, 0]
    return made


def _hidden(x: np.ndarray, layer: Layer) -> Any:
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    views = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    bias = layer.bias_vector()
    assert bias is not None
    made = np.einsum("nchwij,kcij->nkhw", views, layer.tensor.numpy()) + bias[:, None, None]
    return np.maximum(made, 0)
