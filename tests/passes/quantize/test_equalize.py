"""Channels scaled together: the function stays, ranges meet, and what cannot carry a factor is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphopt_passes.quantize import equalize
from graphopt_passes.quantize.lanes import trace

from graphopt.calibrate.statistics import Statistics
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model, to_proto
from tests.calibrate.test_statistics import observe
from tests.passes.quantize.test_static import varied
from tests.rewriting import parse, run

BOUNDS = {"lo": 0.0, "hi": 6.0}
RNG = np.random.default_rng(0)
CHAIN = """
g (float[1,4,8,8] x) => (float[1,5,8,8] y)
<float[8,4,3,3] w1, float[8] b1, float[5,8,1,1] w2> {
 c = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(c)  y = Conv(r, w2)
}
"""


def uneven(text: str, name: str = "w1", *, bias: str = "b1") -> onnx.ModelProto:
    """The model with rows of one weight that differ by a factor of 1000."""
    proto = varied(text)
    for held in proto.graph.initializer:
        if held.name in BOUNDS:
            held.CopyFrom(
                onnx.numpy_helper.from_array(np.array(BOUNDS[held.name], np.float32), held.name)
            )
        if held.name in (name, bias):
            array = onnx.numpy_helper.to_array(held)
            factors = np.logspace(-3, 0, len(array), dtype=np.float32)
            scaled = array * factors.reshape(-1, *[1] * (array.ndim - 1))
            held.CopyFrom(onnx.numpy_helper.from_array(scaled, held.name))
    return onnx.shape_inference.infer_shapes(proto)


def statistics(proto: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, Statistics]:
    names = [name for node in proto.graph.node for name in node.output]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = dict(zip(names, run(tapped, feed), strict=True))
    return {name: observe(array) for name, array in found.items()}


def feed_of(proto: onnx.ModelProto) -> dict[str, Any]:
    held = proto.graph.input[0]
    shape = [d.dim_value for d in held.type.tensor_type.shape.dim]
    return {held.name: RNG.normal(size=shape).astype(np.float32)}


def scaled(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Any]]:
    feed = feed_of(proto)
    model = load_model(proto)
    plan = equalize.plan(model.graph, statistics(proto, feed))
    assert plan
    equalize.apply(model.graph, plan, Names.of(model))
    return to_proto(model), feed


@pytest.mark.parametrize(
    "text",
    [
        CHAIN,
        CHAIN.replace("r = Relu(c)", "r = MaxPool<kernel_shape=[1,1]>(c)"),
        "g (float[1,4,8,8] x) => (float[1,5] y) <float[8,4,3,3] w1, float[8] b1, float[288,5] w2> {"
        " c = Conv(x, w1, b1)  r = Relu(c)  f = Flatten(r)  y = Gemm(f, w2) }",
        "g (float[1,4,8,8] x) => (float[1,8,6,6] y)"
        "<float[8,4,1,1] w1, float[8] b1, float[8,1,3,3] d, float[8,8,1,1] w2>"
        "{ c = Conv(x, w1, b1)  r = Relu(c)  y = Conv<group=8>(r, d) }",
        "g (float[1,4,8,8] x) => (float[1,5,8,8] y)"
        "<float[8,4,1,1] w1, float[8] b1, float[8,4,1,1] w3, float[5,16,1,1] w2>"
        "{ c = Conv(x, w1, b1)  e = Conv(x, w3)  j = Concat<axis=1>(c, e)  y = Conv(j, w2) }",
        "g (float[1,4,8,8] x) => (float[1,5,8,8] y)"
        "<float[8,4,1,1] w1, float[8] b1, float[8,4,1,1] w3, float[5,8,1,1] w2>"
        "{ c = Conv(x, w1, b1)  e = Conv(x, w3)  s = Add(c, e)  r = Relu(s)  y = Conv(r, w2) }",
        "g (float[1,6,16] x) => (float[1,6,5] y) <float[16] w1, float[16] b1, float[16,5] w2>"
        "{ n = LayerNormalization(x, w1, b1)  y = MatMul(n, w2) }",
    ],
)
def test_the_function_stays(text: str) -> None:
    proto = uneven(text)
    after, feed = scaled(proto)
    expected, found = run(proto, feed)[0], run(after, feed)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_quiet_channels_become_louder() -> None:
    proto = uneven(CHAIN)
    before = statistics(proto, feed_of(proto))["r"].channel_ranges(1)
    after, feed = scaled(proto)
    ranges = statistics(after, feed)["r"].channel_ranges(1)
    assert before is not None
    assert ranges is not None
    assert np.ptp(np.log(ranges[1])) < np.ptp(np.log(before[1])) / 1.5


def test_channels_are_compared_by_peak_or_by_power() -> None:
    proto = varied(CHAIN)
    feed = feed_of(proto)
    feed["x"][..., :1, :1] *= 50  # few large elements: peaks say something else than powers
    graph = load_model(onnx.shape_inference.infer_shapes(uneven(CHAIN))).graph
    seen = statistics(uneven(CHAIN), feed)
    plans = [equalize.plan(graph, seen, measure) for measure in equalize.Measure]
    assert all(plans)
    assert not np.allclose(plans[0][0].factors, plans[1][0].factors)


def test_a_clip_lets_through_what_stays_below_its_bound() -> None:
    text = CHAIN.replace("<float[8,4,3,3]", "<float lo = {0.0}, float hi = {6.0}, float[8,4,3,3]")
    proto = uneven(text.replace("Relu(c)", "Clip(c, lo, hi)"))
    after, feed = scaled(proto)
    np.testing.assert_allclose(run(after, feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        CHAIN.replace("(float[1,5,8,8] y)", "(float[1,5,8,8] y, float[1,8,8,8] r)"),
        CHAIN.replace("Relu(c)", "Sigmoid(c)"),
        CHAIN.replace(
            "y = Conv(r, w2)", "t = Tanh(r)  z = Conv(r, w2)  m = ReduceMean(t)  y = Add(z, m)"
        ),
        "g (float[1,8,8,8] x) => (float[1,8,8,8] y) <float[8,8,1,1] w>"
        "{ c = Conv(x, w)  r = Relu(c)  y = Conv(r, w) }",
    ],
)
def test_what_others_read_is_left_alone(text: str) -> None:
    proto = uneven(text) if "w1" in text else parse(text)
    assert not trace(load_model(proto).graph)[1]
