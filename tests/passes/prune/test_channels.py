"""Which channels belong together, and that a model without them computes what the masked one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphopt_passes.prune.channels import (
    Costs,
    Group,
    choose,
    column_axis,
    find_groups,
    similarity,
    slimmed,
    weight_norms,
)
from graphopt_passes.prune.labels import propagate
from graphopt_passes.prune.layers import find_layers

from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.shapes import Shapes
from tests.rewriting import parse

RESIDUAL = """g (float[N,3,8,8] x) => (float[N,10] y)
    <float[16,3,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[16,1,3,3] w3, float[32,16,1,1] w4,
     float[128,10] w5> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w2, b2)
    s = Add(c, r)
    d = Conv<group=16, pads=[1,1,1,1]>(s, w3)
    e = Conv(d, w4)
    p = MaxPool<kernel_shape=[4,4], strides=[4,4]>(e)
    f = Flatten(p)
    y = Gemm(f, w5)
}"""
HEADS = """g (float[N,6,16] x) => (float[N,6,16] y)
    <float[16,32] wq, float[16,32] wk, float[16,32] wv, float[32,16] wo, int64[4] split = {0,6,4,8},
     int64[3] join = {0,6,32}> {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    q4 = Reshape(q, split)
    k4 = Reshape(k, split)
    v4 = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(q4)
    kt = Transpose<perm=[0,2,3,1]>(k4)
    vt = Transpose<perm=[0,2,1,3]>(v4)
    l = MatMul(qt, kt)
    p = Softmax<axis=-1>(l)
    o = MatMul(p, vt)
    ot = Transpose<perm=[0,2,1,3]>(o)
    oj = Reshape(ot, join)
    y = MatMul(oj, wo)
}"""
CONCAT = """g (float[2,3,6,6] x) => (float[2,4,6,6] y)
    <float[8,3,1,1] wa, float[16,3,1,1] wb, float[24] s, float[24] t, float[24] m, float[24] v, float[4,24,1,1] wc> {
    a = Conv(x, wa)
    b = Conv(x, wb)
    c = Concat<axis=1>(a, b)
    n = BatchNormalization(c, s, t, m, v)
    y = Conv(n, wc)
}"""

MULTIPLIED = """g (float[N,3,8,8] x) => (float[N,10,8,8] y)
    <float[16,3,3,3] w1, float[16] b1, float[32,1,3,3] w2, float[32] b2, float[10,32,1,1] w3> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    d = Conv<group=16, pads=[1,1,1,1]>(r, w2, b2)
    s = Relu(d)
    y = Conv(s, w3)
}"""


def groups_of(text: str) -> tuple[ir.Model, list[Group], Any]:
    model = load_model(parse(text))
    labels = propagate(model, Shapes(model))
    return model, find_groups(find_layers(model.graph), labels), labels


def masked(model: ir.Model, groups: list[Group], dropped: frozenset[int]) -> ir.Model:
    """The model with the columns that read dropped channels set to zero."""
    made = load_model(model)
    for group in groups:
        for root in dropped.intersection(group.classes):
            for layer, at in group.columns[root]:
                value = made.graph.initializers[layer.name]
                assert value.const_value is not None
                array = np.array(value.const_value.numpy())
                np.moveaxis(array, column_axis(layer), 0)[at] = 0
                value.const_value = ir.Tensor(array, name=layer.name)
    return made


def run(model: ir.Model, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = ort.InferenceSession(model_to_bytes(model), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


class TestLabels:
    def test_residual_sum_depthwise_and_flattened_image(self) -> None:
        _, groups, _ = groups_of(RESIDUAL)
        assert [len(group.classes) for group in groups] == [16, 32]
        assert {layer.name for layer, _ in groups[0].rows[groups[0].classes[0]]} == {
            "w1",
            "w2",
            "w3",
        }
        ((last, columns),) = groups[1].columns[groups[1].classes[3]]
        assert (last.name, columns.tolist()) == ("w5", [12, 13, 14, 15])

    def test_heads_of_decomposed_attention(self) -> None:
        _, (group,), _ = groups_of(HEADS)
        assert len(group.classes) == 4
        slices = {layer.name: at.tolist() for layer, at in group.rows[group.classes[1]]}
        assert slices == {name: list(range(8, 16)) for name in ("wq", "wk", "wv")}

    def test_concatenated_channels_stay_apart(self) -> None:
        _, groups, _ = groups_of(CONCAT)
        assert sorted(len(group.classes) for group in groups) == [8, 16]

    @pytest.mark.parametrize(
        "change",
        [
            ("r = Relu(a)", "r = LRN<size=3>(a)"),  # neighbours matter
            ("r = Relu(a)", "r = Softmax<axis=1>(a)"),
            ("r = Relu(a)", "z = ReduceSum(a, axes)  r = Add(a, z)"),
        ],
    )
    def test_freezes_what_sees_several_channels(self, change: tuple[str, str]) -> None:
        text = RESIDUAL.replace(*change).replace(
            "float[16] b1", "float[16] b1, int64[1] axes = {1}"
        )
        _, groups, _ = groups_of(text)
        assert [len(group.classes) for group in groups] == [32]

    def test_freezes_what_a_graph_output_shows(self) -> None:
        _, groups, _ = groups_of(
            RESIDUAL.replace("=> (float[N,10] y)", "=> (float[N,10] y, float[N,16,8,8] s)")
        )
        assert [len(group.classes) for group in groups] == [32]

    def test_freezes_the_hidden_size_of_a_layer_norm(self) -> None:
        text = """g (float[N,4] x) => (float[N,4] y) <float[4,32] w1, float[32] s, float[32] b, float[32,4] w2> {
            h = MatMul(x, w1)  n = LayerNormalization(h, s, b)  y = MatMul(n, w2) }"""
        assert groups_of(text)[1] == []


class TestSlimming:
    @pytest.mark.parametrize("text", [RESIDUAL, HEADS, CONCAT, MULTIPLIED])
    @pytest.mark.parametrize("share", [0.2, 0.5])
    def test_equals_the_masked_dense_model(self, text: str, share: float) -> None:
        model, groups, labels = groups_of(text)
        layers = find_layers(model.graph)
        scores = weight_norms(groups)
        dropped = choose(groups, scores, labels, Costs.of(layers, Shapes(model)), share)
        assert dropped
        shape = [2, *(int(str(d)) for d in list(model.graph.inputs[0].shape or ())[1:])]
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        want = run(masked(model, groups, dropped), x)
        small = slimmed(model, labels, dropped)
        np.testing.assert_allclose(run(small, x), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
        assert len(model_to_bytes(small)) < len(model_to_bytes(model))

    def test_leaves_the_channels_of_convolutions_in_eights(self) -> None:
        model, groups, labels = groups_of(RESIDUAL)
        costs = Costs.of(find_layers(model.graph), Shapes(model))
        dropped = choose(groups, weight_norms(groups), labels, costs, 0.4)
        left = [len(set(group.classes) - dropped) for group in groups]
        assert all(count % 8 == 0 and count for count in left)

    def test_similar_filters_score_low(self) -> None:
        model, groups, _ = groups_of(RESIDUAL)
        value = model.graph.initializers["w4"]
        assert value.const_value is not None
        array = np.array(value.const_value.numpy())
        array[:] = array[5]
        array[7] += 10
        value.const_value = ir.Tensor(array, name="w4")
        scores = similarity(groups)
        assert max(groups[1].classes, key=scores.__getitem__) == groups[1].classes[7]


def test_digits_networks_have_their_channels_found(zoo: Path) -> None:
    counts = {}
    for name in ("cnn0", "tf0"):
        model = load_model(zoo / "digits" / f"{name}.onnx")
        labels = propagate(model, Shapes(model))
        counts[name] = sorted(len(g.classes) for g in find_groups(find_layers(model.graph), labels))
    assert counts["cnn0"] == [32, 32, 64, 64, 64, 96]
    assert counts["tf0"] == [8, 8, 8, 192, 192, 192]
