"""Transposed convolutions as plain ones, and that they are fitted after a cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.prune import Prune
from graphopt_passes.prune.channels import find_groups
from graphopt_passes.prune.channels import slimmed as cut_down
from graphopt_passes.prune.labels import propagate
from graphopt_passes.prune.layers import find_layers, find_turned
from graphopt_passes.prune.moments import inputs, output_size
from graphopt_passes.prune.reconstruct import divergence, outputs, reconstruct
from graphopt_passes.prune.slim import kept_indices

from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Calibration, Context, Options
from graphopt.targets import get_target
from tests.rewriting import parse

UPSCALING = """g (float[N,6,5,5] x) => (float[N,3,{size},{size}] y)
    <float[24,6,3,3] w1, float[24] b1, float[24,16,{kernel},{kernel}] w2, float[16] b2, float[3,16,1,1] w3> {{
    a = Conv<pads = [1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    t = ConvTranspose<{attributes}>(r, w2, b2)
    s = Relu(t)
    y = Conv(s, w3)
}}"""
TURNED_FORMS = [
    (10, 2, "strides = [2,2]"),
    (10, 4, "strides = [2,2], pads = [1,1,1,1]"),
    (10, 3, "strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]"),
    (5, 3, "pads = [1,1,1,1]"),
    (7, 2, "dilations = [2,2]"),
    (3, 1, "pads = [1,1,1,1]"),
]


@pytest.mark.parametrize(("size", "kernel", "attributes"), TURNED_FORMS)
def test_a_transposed_convolution_is_a_plain_one_of_what_is_spread(
    size: int, kernel: int, attributes: str
) -> None:
    model = load_model(parse(UPSCALING.format(size=size, kernel=kernel, attributes=attributes)))
    (layer,) = find_turned(model.graph)
    assert layer.window is not None
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 5)).astype(np.float32)
    model.graph.outputs[:] = [v for n in model.graph for v in n.outputs if v.name in ("r", "t")]
    (found,) = outputs(model, [{"x": x}])
    read, made = found["r"], found["t"]
    rows = inputs(read, layer.window, np.arange(2 * size * size))[0][:, :-1]
    bias = layer.bias_vector()
    assert bias is not None
    plain = rows @ layer.matrix()[0].T + bias
    np.testing.assert_allclose(
        plain.reshape(2, size, size, 16), np.moveaxis(made, 1, -1), rtol=1e-4, atol=1e-4
    )
    assert np.array_equal(layer.stored(layer.matrix()), layer.tensor.numpy())
    assert output_size((5, 5), layer.window) == (size, size)


def test_transposed_convolutions_are_fitted() -> None:
    text = UPSCALING.format(size=10, kernel=4, attributes="strides = [2,2], pads = [1,1,1,1]")
    dense = load_model(parse(text))
    labels = propagate(dense, Shapes(dense))
    layers = [*find_layers(dense.graph), *find_turned(dense.graph)]
    groups = [g for g in find_groups(layers, labels) if len(g.classes) == 24]
    keep = kept_indices(labels, frozenset(groups[0].classes[:8]))
    made = cut_down(dense, labels, frozenset(groups[0].classes[:8]))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((8, 6, 5, 5)).astype(np.float32)} for _ in range(8)]
    want = outputs(dense, feeds)
    before = divergence(want, made, feeds)
    old = np.array(made.graph.initializers["w2"].const_value.numpy())  # type: ignore[union-attr]
    reconstruct(dense, made, keep, feeds, 0)
    assert not np.array_equal(made.graph.initializers["w2"].const_value.numpy(), old)  # type: ignore[union-attr]
    assert divergence(want, made, feeds) < 0.9 * before


def test_a_transposed_convolution_of_stated_size_is_cut_but_not_fitted() -> None:
    text = UPSCALING.format(size=10, kernel=4, attributes="strides = [2,2], output_shape = [10,10]")
    (layer,) = find_turned(load_model(parse(text)).graph)
    assert layer.is_bound


def upscaling(attributes: str, size: int = 10) -> ir.Model:
    """A decoder of random weights."""
    model = load_model(parse(UPSCALING.format(size=size, kernel=4, attributes=attributes)))
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        assert value.shape is not None
        array = rng.standard_normal(value.shape.numpy()).astype(np.float32) / 5
        value.const_value = ir.Tensor(array, name=name)
    return model


def pruned(model: ir.Model, sparsity: str, samples: Path) -> Context:
    options = Options(sparsity=sparsity, calibration=Calibration(samples), trace_misses=True)
    ctx = Context(model, get_target("cpu"), options=options)
    Prune().run(model, ctx)
    return ctx


def zeros(model: ir.Model, name: str) -> float:
    held = model.graph.initializers[name].const_value
    assert held is not None
    return float((held.numpy() == 0).mean())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 6, 1, 1)) + 0.3 * rng.standard_normal((64, 6, 5, 5))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    return tmp_path / "x.npz"


def test_weights_of_transposed_convolutions_are_pruned_and_fitted(images: Path) -> None:
    form = "strides = [2,2], pads = [1,1,1,1]"
    feed = {"x": np.load(images)["x"]}
    want = outputs(upscaling(form), [feed])
    lost = {}
    for options in ("", ",method=magnitude,refit=no"):
        model = upscaling(form)
        pruned(model, f"0.7{options}", images)
        assert zeros(model, "w2") > 0.6
        lost[options] = divergence(want, model, [feed])
    assert lost[""] < 0.7 * lost[",method=magnitude,refit=no"]


@pytest.mark.parametrize(
    ("attributes", "sparsity", "reason"),
    [
        ('strides = [2,2], auto_pad = "SAME_UPPER"', "0.5", "states output_shape or auto_pad"),
        ("strides = [2,2], output_shape = [10,10]", "0.5", "states output_shape or auto_pad"),
        ("strides = [2,2], pads = [1,1,1,1]", "2:4", "no hardware reads 2:4"),
        ("strides = [2,2], pads = [1,1,1,1]", "0.5,dense=^w2", "stays dense: asked for"),
    ],
)
def test_transposed_convolutions_that_stay_dense_say_why(
    images: Path, attributes: str, sparsity: str, reason: str
) -> None:
    model = upscaling(attributes)
    ctx = pruned(model, sparsity, images)
    assert zeros(model, "w2") == 0
    assert any(reason in remark.reason for remark in ctx.remarks)


def test_a_narrow_transposed_convolution_that_makes_the_output_stays_dense() -> None:
    text = """g (float[N,64,4,4] x) => (float[N,3,8,8] y) <float[64,3,4,4] w> {
        y = ConvTranspose<strides = [2,2], pads = [1,1,1,1]>(x, w) }"""
    (layer,) = find_turned(load_model(parse(text)).graph)
    assert layer.dense == "it makes the output"
