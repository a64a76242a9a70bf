"""Cuts through grouped and transposed convolutions, Split, Slice and Expand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.prune.channels import Costs, Group, choose, find_groups, weight_norms
from graphopt_passes.prune.channels import slimmed as cut_down
from graphopt_passes.prune.labels import Labels, propagate
from graphopt_passes.prune.layers import Layer, find_layers, find_turned

from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt.ir.values import array
from tests.passes.prune.test_channels import masked, run
from tests.rewriting import parse

GROUPED = """g (float[N,3,8,8] x) => (float[N,8,8,8] y)
    <float[32,3,3,3] w1, float[32] b1, float[32,8,3,3] w2, float[32] b2, float[8,32,1,1] w3> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    c = Conv<pads=[1,1,1,1], group=4>(r, w2, b2)
    s = Relu(c)
    y = Conv(s, w3)
}"""
TURNED = """g (float[N,3,8,8] x) => (float[N,4,16,16] y)
    <float[32,3,1,1] w1, float[32,24,2,2] w2, float[24] b2, float[4,24,1,1] w3> {
    a = Conv(x, w1)
    r = Relu(a)
    c = ConvTranspose<strides=[2,2]>(r, w2, b2)
    s = Relu(c)
    y = Conv(s, w3)
}"""
SPLIT = """g (float[N,6] x) => (float[N,4] y) <float[6,32] w1, float[32] b1, float[16,4] w2> {
    h = Gemm(x, w1, b1)
    u, v = Split<axis=1, num_outputs=2>(h)
    s = Sigmoid(v)
    m = Mul(u, s)
    y = MatMul(m, w2)
}"""
SIZED = SPLIT.replace("float[32] b1,", "float[32] b1, int64[2] sizes = {16,16},").replace(
    "Split<axis=1, num_outputs=2>(h)", "Split<axis=1>(h, sizes)"
)
UNEVEN = """g (float[N,6] x) => (float[N,4] y)
    <float[6,32] w1, float[10,4] w2, float[22,4] w3, int64[2] sizes = {10,22}> {
    h = MatMul(x, w1)
    u, v = Split<axis=1>(h, sizes)
    p = MatMul(u, w2)
    q = MatMul(v, w3)
    y = Add(p, q)
}"""
SLICE = """g (float[N,6] x) => (float[N,4] y)
    <float[6,32] w1, float[20,4] w2, float[12,4] w3, int64[1] ax = {-1}, int64[1] lo = {0}, int64[1] mid = {-12},
     int64[1] hi = {9223372036854775807}> {
    h = MatMul(x, w1)
    u = Slice(h, lo, mid, ax)
    v = Slice(h, mid, hi, ax)
    p = MatMul(u, w2)
    q = MatMul(v, w3)
    y = Add(p, q)
}"""
OLD_SLICE = """g (float[N,6] x) => (float[N,4] y)
    <float[6,32] w1, float[20,4] w2, float[12,4] w3> {
    h = MatMul(x, w1)
    u = Slice<axes=[1], starts=[0], ends=[-12]>(h)
    v = Slice<axes=[1], starts=[-12], ends=[2147483647]>(h)
    p = MatMul(u, w2)
    q = MatMul(v, w3)
    y = Add(p, q)
}"""
EXPAND = """g (float[N,4,6] x) => (float[N,4,4] y)
    <float[6,32] w1, float[1,1,32] t, float[32,4] w2, int64[3] size = {1,4,32}> {
    h = MatMul(x, w1)
    e = Expand(t, size)
    s = Add(h, e)
    y = MatMul(s, w2)
}"""


def parts(text: str) -> tuple[ir.Model, list[Group], Labels, list[Layer]]:
    model = load_model(parse(text, opset=9 if text == OLD_SLICE else 18))
    labels = propagate(model, Shapes(model))
    layers = [*find_layers(model.graph), *find_turned(model.graph)]
    return model, find_groups(layers, labels), labels, layers


@pytest.mark.parametrize("text", [GROUPED, TURNED, SPLIT, SIZED, UNEVEN, SLICE, OLD_SLICE, EXPAND])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_equals_the_masked_dense_model(text: str, share: float) -> None:
    model, groups, labels, layers = parts(text)
    costs = Costs.of(layers, Shapes(model))
    dropped = choose(groups, weight_norms(groups), labels, costs, share)
    assert dropped
    shape = [2, *(int(str(d)) for d in list(model.graph.inputs[0].shape or ())[1:])]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    want = run(masked(model, groups, dropped), x)
    small = cut_down(model, labels, dropped)
    np.testing.assert_allclose(run(small, x), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_the_same_places_of_all_groups_go_together() -> None:
    model, groups, labels, _ = parts(GROUPED)
    assert [len(group.classes) for group in groups] == [8, 8]
    dropped = frozenset([groups[0].classes[3], groups[0].classes[5], groups[1].classes[0]])
    small = cut_down(model, labels, dropped)
    dims = {
        n: list(v.const_value.shape) for n, v in small.graph.initializers.items() if v.const_value
    }
    assert (dims["w1"], dims["w2"], dims["w3"]) == ([24, 3, 3, 3], [28, 6, 3, 3], [8, 28, 1, 1])
    (conv,) = [node for node in small.graph if "group" in node.attributes]
    assert conv.attributes["group"].as_int() == 4


def test_transposed_convolutions_make_and_read_channels() -> None:
    _, groups, _, _ = parts(TURNED)
    assert sorted(len(group.classes) for group in groups) == [24, 32]


def test_grouped_transposed_convolutions_stay_whole() -> None:
    text = TURNED.replace("strides=[2,2]", "strides=[2,2], group=2").replace(
        "float[32,24,2,2]", "float[32,12,2,2]"
    )
    assert parts(text)[1] == []


def test_sizes_of_a_split_are_stated_after_the_cut() -> None:
    model, groups, labels, _ = parts(UNEVEN)
    small = cut_down(model, labels, frozenset(groups[0].classes[:3]))
    (split,) = [node for node in small.graph if node.op_type == "Split"]
    sizes = array(split.inputs[1])
    assert sizes is not None
    assert sorted([10, 22]) != sorted(sizes.tolist())
    assert sizes.sum() == 29


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (SLICE, ("int64[1] ax = {-1}", "int64[1] ax = {-1}, int64[1] two = {2}")),
        (SPLIT, ("s = Sigmoid(v)", "s = Softmax<axis=1>(v)")),
    ],
)
def test_what_is_not_cut_channel_by_channel_stays_whole(text: str, change: tuple[str, str]) -> None:
    text = text.replace(*change)
    if "two" in text:
        text = text.replace("Slice(h, lo, mid, ax)", "Slice(h, lo, hi, ax, two)").replace(
            "float[20,4]", "float[16,4]"
        )
    assert parts(text)[1] == []
