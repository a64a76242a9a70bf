"""Gradients by rule against differences of what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphopt_passes.prune.layers import Array
from graphopt_passes.prune.tuning import Network

from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes

SPATIAL = "float[N, 6, 7, 5] x"
FLAT = "float[N, 4, 6] x"

# What comes between x and y: nodes, and the constants that they read.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "conv": (SPATIAL, "h = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": (4, 6, 3, 3), "b": (4,)}),
    "conv steps": (
        SPATIAL,
        "h = Conv<strides=[2,1], dilations=[1,2], pads=[1,0,0,2]>(x, w)",
        {"w": (4, 6, 3, 2)},
    ),
    "conv same": (
        SPATIAL,
        'h = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, w)',
        {"w": (4, 6, 4, 3)},
    ),
    "conv valid": (SPATIAL, 'h = Conv<auto_pad="VALID">(x, w)', {"w": (4, 6, 2, 2)}),
    "grouped": (SPATIAL, "h = Conv<group=2, pads=[1,1,1,1]>(x, w)", {"w": (4, 3, 3, 3)}),
    "depthwise": (
        SPATIAL,
        "h = Conv<group=6, strides=[2,2], pads=[1,1,1,1]>(x, w)",
        {"w": (6, 1, 3, 3)},
    ),
    "depthwise large": (
        "float[N, 2, 21, 19] x",
        "h = Conv<group=2, dilations=[2,1], pads=[1,2,3,0]>(x, w, b)",
        {"w": (2, 1, 3, 3), "b": (2,)},
    ),
    "pools": (
        SPATIAL,
        "a = Conv(x, w) b = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(a) "
        "h = AveragePool<kernel_shape=[2,2], pads=[1,0,0,1], count_include_pad=1>(b)",
        {"w": (6, 6, 1, 1)},
    ),
    "pool up": (
        SPATIAL,
        "a = Conv(x, w) b = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(a) "
        "c = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(b) h = GlobalAveragePool(c)",
        {"w": (6, 6, 1, 1)},
    ),
    "norm": (
        SPATIAL,
        "a = Conv(x, w) h = BatchNormalization(a, s, t, m, v)",
        {"w": (6, 6, 1, 1), "s": (6,), "t": (6,), "m": (6,), "v": "positive"},
    ),
    "layer norm": (
        FLAT,
        "a = MatMul(x, w) h = LayerNormalization(a, s, t)",
        {"w": (6, 6), "s": (6,), "t": (6,)},
    ),
    "rms norm": (
        FLAT,
        "a = MatMul(x, w) h = RMSNormalization(a, s)",
        {"w": (6, 6), "s": (6,)},
    ),
    "attention": (
        FLAT,
        "q = MatMul(x, w) k = MatMul(x, u) h = Attention<q_num_heads=2, kv_num_heads=1>(q, k, k)",
        {"w": (6, 6), "u": (6, 3)},
    ),
    "attention masked": (
        FLAT,
        "q = MatMul(x, w) h = Attention<q_num_heads=2, kv_num_heads=2, is_causal=1, scale=0.3>(q, x, q, f)",
        {"w": (6, 6), "f": (4, 4)},
    ),
    "products": (
        FLAT,
        "a = MatMul(x, w) b = MatMul(u, a) c = Softmax(b) d = Mul(c, a) e = Sub(d, b) h = Div(e, v)",
        {"w": (6, 6), "u": (4, 4), "v": "positive"},
    ),
    "shapes": (
        FLAT,
        "a = MatMul(x, w) b = Transpose<perm=[0,2,1]>(a) p, q = Split<axis=1, num_outputs=2>(b) "
        "c = Concat<axis=2>(p, q, q) d = Slice(c, one, minus, two) r = Reshape(d, shape) "
        "e = Gather<axis=1>(r, picks) f = ReduceMean<keepdims=0>(e, one) g = Unsqueeze(f, one) "
        "i = Squeeze(g, one) j = ReduceSum(i, one) h = Expand(j, wide)",
        {
            "w": (6, 6),
            "one": [1],
            "minus": [-1],
            "two": [2],
            "shape": [0, 6, -1],
            "picks": [[3, 0], [0, 5]],
            "wide": [1, 4, 1],
        },
    ),
    "gemm": (
        "float[N, 6] x",
        "h = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)",
        {"w": (3, 6), "b": (3,)},
    ),
    "gemm turned": ("float[N, 6] x", "a = Gemm(x, w) h = Gemm<transA=1>(a, a)", {"w": (6, 3)}),
    "vectors": ("float[N, 6] x", "a = MatMul(x, w) h = MatMul(a, v)", {"w": (6, 5), "v": (5,)}),
    "chosen": (
        FLAT,
        "a = MatMul(x, w) h = Where(c, a, x)",
        {"w": (6, 6), "c": "flags"},
    ),
    "log softmax": (FLAT, "a = MatMul(x, w) h = LogSoftmax<axis=1>(a)", {"w": (6, 6)}),
    "padded": (
        SPATIAL,
        "a = Conv(x, w) h = Pad(a, p)",
        {"w": (4, 6, 1, 1), "p": [0, 2, 1, 0, 1, 3, 0, 2]},
    ),
    "padded and cut": (
        SPATIAL,
        "a = Conv(x, w) h = Pad(a, p, , k)",
        {"w": (4, 6, 1, 1), "p": [-2, 1, 3, -1], "k": [2, -3]},
    ),
    "mirrored": (
        SPATIAL,
        'a = Conv(x, w) h = Pad<mode="reflect">(a, p)',
        {"w": (4, 6, 1, 1), "p": [0, 0, 2, 1, 0, 0, 3, 4]},
    ),
    "repeated at the edge": (
        SPATIAL,
        'a = Conv(x, w) b = Pad<mode="edge">(a, p) h = Pad<mode="wrap">(b, p)',
        {"w": (4, 6, 1, 1), "p": [0, 1, 2, 0, 0, 0, 1, 2]},
    ),
    "power": (FLAT, "a = MatMul(x, w) h = Pow(a, k)", {"w": (6, 6), "k": [3.0]}),
}
ELEMENTWISE = {
    "Relu": "",
    "LeakyRelu": "<alpha=0.2>",
    "Elu": "",
    "Sigmoid": "",
    "HardSigmoid": "",
    "HardSwish": "",
    "Tanh": "",
    "Softplus": "",
    "Gelu": "",
    'Gelu<approximate="tanh">': "",
    "com.microsoft.QuickGelu": "<alpha=1.5>",
    "Erf": "",
    "Exp": "",
    "Neg": "",
    "Abs": "",
}
CASES |= {
    name: (FLAT, f"a = MatMul(x, w) h = {name}{options}(a)", {"w": (6, 6)})
    for name, options in ELEMENTWISE.items()
}
CASES |= {
    "clip": (
        FLAT,
        "a = MatMul(x, w) h = Clip(a, low, high)",
        {"w": (6, 6), "low": "low", "high": "high"},
    ),
    "positive": (
        FLAT,
        "a = MatMul(x, w) b = Mul(a, a) c = Add(b, v) d = Sqrt(c) e = Log(c) f = Reciprocal(c) h = Sum(d, e, f)",
        {"w": (6, 6), "v": "positive"},
    ),
}


def _constant(shape: Any, rng: np.random.Generator) -> Array:
    if shape == "positive":
        return rng.uniform(0.5, 1.5, 6).astype(np.float32)
    if shape == "flags":
        return np.asarray(rng.random((4, 6)) < 0.5)
    if shape in ("low", "high"):
        return np.array(-0.7 if shape == "low" else 0.9, np.float32)
    if isinstance(shape, list):
        return np.array(shape, np.float32 if isinstance(shape[0], float) else np.int64)
    return np.asarray(rng.normal(0, 0.5, shape), np.float32)


def _model(head: str, body: str, constants: dict[str, Any], opset: int = 23) -> ir.Model:
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> g ({head}) => (float[a] y) '
        f"{{ {body} y = Identity(h) }}"
    )
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    for name, shape in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(_constant(shape, rng), name))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    model = load_model(proto)
    Shapes(model)  # as a run does: they are written into the model
    return model


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_slopes(name: str) -> None:
    head, body, constants = CASES[name]
    check_slopes(_model(head, body, constants), head, constants)


OLD = {
    "by default of two axes": ("float[N, 6] x", "a = MatMul(x, w) h = Softmax(a)"),
    "last of three": (FLAT, "a = MatMul(x, w) h = Softmax<axis=-1>(a)"),
    "logarithm": ("float[N, 6] x", "a = MatMul(x, w) h = LogSoftmax<axis=1>(a)"),
}


@pytest.mark.parametrize("name", OLD)
def test_old_softmax_along_the_last_axis_is_as_the_new_one(name: str) -> None:
    head, body = OLD[name]
    constants = {"w": (6, 6)}
    model = _model(head, body, constants, opset=12)
    check_slopes(model, head, constants)


def test_old_pads_are_attributes() -> None:
    constants = {"w": (4, 6, 1, 1)}
    body = "a = Conv(x, w) h = Pad<pads=[0, 0, 1, 2, 0, 1, -1, 0]>(a)"
    check_slopes(_model(SPATIAL, body, constants, opset=10), SPATIAL, constants)


@pytest.mark.parametrize("body", ["h = Softmax(a)", "h = Softmax<axis=1>(a)"])
def test_old_softmax_over_several_axes_has_no_rule(body: str) -> None:
    model = _model(FLAT, f"a = MatMul(x, w) {body}", {"w": (6, 6)}, opset=12)
    feed = {"x": np.ones((3, 4, 6), np.float32)}
    assert Network(model, ["w"], feed).stopped.startswith("Softmax")


def check_slopes(model: ir.Model, head: str, constants: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    dims = [int(d) if d.strip().isdigit() else 3 for d in head[6 : head.index("]")].split(",")]
    feed = {"x": rng.normal(size=dims).astype(np.float32)}
    weights = {
        key: tensor.numpy()
        for key, shape in constants.items()
        if isinstance(shape, tuple) and key in "wubst"
        if (tensor := model.graph.initializers[key].const_value) is not None
    }
    network = Network(model, list(weights), feed)
    assert network.stopped == ""
    made = network.run(feed, weights)
    towards = {"y": rng.normal(size=made["y"].shape).astype(np.float32)}
    found = network.gradients(made, weights, towards)
    assert set(found) == set(weights)
    for key, weight in weights.items():
        step = rng.normal(size=weight.shape) * 3e-3
        ends = [
            float(
                np.sum(
                    network.run(feed, weights | {key: (weight + s * step).astype(np.float32)})[
                        "y"
                    ].astype(np.float64)
                    * towards["y"]
                )
            )
            for s in (1, -1)
        ]
        want, got = (ends[0] - ends[1]) / 2, float(np.sum(found[key] * step))
        assert found[key].shape == weight.shape
        assert got == pytest.approx(want, rel=0.02, abs=2e-4 * np.sqrt(made["y"].size))
