"""Models with one trap each for half precision, and inputs that spring it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.rewriting import parse

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Hazard:
    """One trap.

    Attributes:
        text: the graph, in ONNX text form.
        feeds: inputs that spring it.
        constants: initializers that are not all ones.
        opset: of ai.onnx.
    """

    text: str
    feeds: dict[str, Array]
    constants: dict[str, Array] = dataclasses.field(default_factory=dict)
    opset: int = 17

    def proto(self) -> onnx.ModelProto:
        """The model, checked."""
        model = parse(self.text, opset=self.opset)
        for name, array in self.constants.items():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        onnx.checker.check_model(model, full_check=True)
        return model


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def number(value: float) -> Array:
    return np.array(value, np.float32)


W16 = normal(16, 16, scale=0.25, seed=1)
X = {"x": normal(4, 16)}
AXIS1 = np.array([1], np.int64)

HAZARDS: dict[str, Hazard] = {
    "scan_accumulates_ids": Hazard(
        "g (int64[5] ids, float[4,16] x) => (float[5] s, float[4,16] y) {"
        " f = Cast<to=1>(ids) z0 = Constant<value_float=0.0>()"
        " last, s = Scan<num_scan_inputs=1, body = b (float acc, float e) => (float o, float p)"
        "   { o = Add(acc, e) p = Identity(o) }>(z0, f) y = MatMul(x, w) }",
        {"ids": np.array([3001, 4003, 5, 2049, 7]), **X},
        {"w": W16},
    ),
    "scan_gives_ids_back": Hazard(
        "g (int64[5] ids, float[4,16] x) => (int64[5] s, float[4,16] y) {"
        " f = Cast<to=1>(ids) z0 = Constant<value_float=0.0>()"
        " last, r = Scan<num_scan_inputs=1, body = b (float acc, float e) => (float o, float p)"
        "   { o = Add(acc, e) p = Mul(o, two) }>(z0, f) s = Cast<to=7>(r) y = MatMul(x, w) }",
        {"ids": np.array([3001, 4003, 5, 2049, 7]), **X},
        {"w": W16, "two": number(2)},
    ),
    "range_of_float_positions": Hazard(
        "g (float[L,16] x) => (float[L,16] y) {"
        " s = Shape<start=0,end=1>(x) n = Squeeze(s) f = Cast<to=1>(n) z = Constant<value_float=0.0>()"
        " o = Constant<value_float=1.0>() r = Range(z, f, o) u = Unsqueeze(r, axis) p = Mul(u, freq)"
        " c = Cos(p) h = MatMul(x, w) y = Add(h, c) }",
        {"x": normal(3000, 16)},
        {"w": W16, "freq": (10000.0 ** (-np.arange(16) / 16)).astype(np.float32), "axis": AXIS1},
    ),
    "qdq_with_a_small_scale": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " h = MatMul(x, w) q = QuantizeLinear(h, s, p) d = DequantizeLinear(q, s, p)"
        " k = Mul(d, big) y = MatMul(k, v) }",
        X,
        {
            "w": W16 * np.float32(1e-6),
            "s": number(1e-8),
            "p": np.array(0, np.int8),
            "big": number(1e6),
            "v": W16,
        },
        13,
    ),
    "an_initializer_is_an_output": Hazard(
        "g (float[4,16] x) => (float[4,16] y, float[16,16] w) { y = MatMul(x, w) }", X, {"w": W16}
    ),
    "an_input_is_an_output": Hazard(
        "g (float[4,16] x) => (float[4,16] x, float[4,16] y) { y = MatMul(x, w) }", X, {"w": W16}
    ),
    "one_value_is_two_outputs": Hazard(
        "g (float[4,16] x) => (float[4,16] y, float[4,16] z) { y = MatMul(x, w) z = Identity(y) }",
        X,
        {"w": W16},
    ),
    "casts_that_are_there_already": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " h = Cast<to=10>(x) m = MatMul(h, w) f = Cast<to=1>(m) r = Cast<to=10>(f) t = Tanh(r)"
        " g = Cast<to=1>(t) y = MatMul(g, v) }",
        X,
        {"w": W16.astype(np.float16), "v": W16},
    ),
    "a_round_trip_through_integers": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " m = MatMul(x, w) b = Mul(m, k) i = Cast<to=6>(b) f = Cast<to=1>(i) y = Div(f, k) }",
        X,
        {"w": W16, "k": number(5000)},
    ),
    "a_mask_from_a_comparison": Hazard(
        "g (int64[2,8] m, float[2,8] x) => (float[2,8] y) {"
        " f = Cast<to=1>(m) o = Sub(one, f) n = Mul(o, low) h = MatMul(x, w) s = Add(h, n)"
        " y = Softmax<axis=-1>(s) }",
        {"m": np.array([[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8]), "x": normal(2, 8)},
        {"w": normal(8, 8), "one": number(1), "low": number(float(np.finfo(np.float32).min))},
    ),
    "masks_added_twice": Hazard(
        "g (bool[4,4] a, bool[4,4] b, float[4,4] x) => (float[4,4] y) {"
        " p = Where(a, zero, low) q = Where(b, zero, low) m = Add(p, q) h = MatMul(x, w) s = Add(h, m)"
        " y = Softmax<axis=-1>(s) }",
        {"a": np.tri(4, dtype=bool), "b": np.array([[1, 1, 1, 0]] * 4, bool), "x": normal(4, 4)},
        {"w": normal(4, 4), "zero": number(0), "low": number(-1e9)},
    ),
    "an_epsilon_that_vanishes": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " h = MatMul(x, w) q = Mul(h, h) s = ReduceSum(q, axis) n = Sqrt(s) d = Add(n, eps) y = Div(h, d) }",
        {"x": np.concatenate([normal(3, 16), np.zeros((1, 16), np.float32)])},
        {"w": W16, "eps": number(1e-12), "axis": np.array([-1])},
        13,
    ),
    "variance_of_large_numbers": Hazard(
        "g (float[4,64] x) => (float[4,64] y) {"
        " h = MatMul(x, w) m = ReduceMean<axes=[-1]>(h) d = Sub(h, m) q = Mul(d, d)"
        " v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) r = Sqrt(e) y = Div(d, r) }",
        {"x": normal(4, 64)},
        {"w": normal(64, 64, scale=60), "eps": number(1e-5)},
    ),
    "softmax_written_out": Hazard(
        "g (float[4,64] x) => (float[4,64] y) {"
        " h = MatMul(x, w) e = Exp(h) s = ReduceSum(e, axis) y = Div(e, s) }",
        {"x": normal(4, 64)},
        {"w": normal(64, 64, scale=0.5), "axis": np.array([-1])},
    ),
    "a_sum_of_many": Hazard(
        "g (float[2,4096] x) => (float[2,8] y) {"
        " r = Relu(x) s = ReduceSum<keepdims=1>(r, axis) n = Div(s, k) y = MatMul(n, w) }",
        {"x": np.abs(normal(2, 4096, scale=40)) + 20},
        {"w": normal(1, 8), "k": number(4096), "axis": np.array([-1])},
        13,
    ),
    "a_growing_residual": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " a = MatMul(x, w) b = Mul(a, k) c = Add(b, x) d = MatMul(c, w) e = Mul(d, k) f = Add(e, c)"
        " y = LayerNormalization(f, s, t) }",
        X,
        {
            "w": W16,
            "k": number(400),
            "s": np.ones(16, np.float32),
            "t": np.zeros(16, np.float32),
        },
    ),
    "weights_far_below_a_half": Hazard(
        "g (float[2,3,8,8] x) => (float[2,4,8,8] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) s = Mul(c, k) y = Relu(s) }",
        {"x": normal(2, 3, 8, 8, scale=10)},
        {"w": normal(4, 3, 3, 3, scale=1e-8), "k": number(3e6)},
    ),
    "large_inputs_over_a_large_constant": Hazard(
        "g (float[4,16] x) => (float[4,16] y) { a = Div(x, k) y = MatMul(a, w) }",
        {"x": normal(4, 16, scale=1e4)},
        {"w": normal(16, 16), "k": number(5e4)},
    ),
    "small_weights_and_large_inputs": Hazard(
        "g (float[4,16] x) => (float[4,16] y) { a = MatMul(x, w) y = Mul(a, k) }",
        {"x": normal(4, 16, scale=100)},
        {"w": normal(16, 16, scale=1e-8), "k": number(1e4)},
    ),
    "weights_of_two_sizes": Hazard(
        "g (float[4,16] x) => (float[4,16] y) { h = MatMul(x, w) t = Mul(h, k) y = Tanh(t) }",
        X,
        {
            "w": W16 * np.where(np.arange(16) % 2, 1e-9, 1.0).astype(np.float32),
            "k": np.where(np.arange(16) % 2, 1e9, 1.0).astype(np.float32),
        },
    ),
    "weights_beyond_a_half": Hazard(
        "g (float[4,16] x) => (float[4,16] y) { h = MatMul(x, w) t = Mul(h, k) y = Tanh(t) }",
        X,
        {"w": W16 * np.float32(1e6), "k": number(1e-6)},
    ),
    "a_ratio_of_small_numbers": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " a = MatMul(x, w) p = Exp(a) t = Mul(p, tiny) s = ReduceSum(t, axis) y = Div(t, s) }",
        X,
        {"w": W16, "tiny": number(1e-9), "axis": np.array([-1])},
    ),
    "a_reciprocal_of_a_small_number": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " a = MatMul(x, w) q = Mul(a, a) s = Mul(q, tiny) e = Add(s, tinier) r = Reciprocal(e) y = Mul(r, tiny) }",
        X,
        {"w": W16, "tiny": number(1e-7), "tinier": number(1e-8)},
    ),
    "a_loop_that_counts_in_floats": Hazard(
        "g (float[4,16] x) => (float n, float[4,16] y) {"
        " t = Constant<value_int=3000>() c = Constant<value=bool {1}>() z = Constant<value_float=0.0>()"
        " n, a = Loop(t, c, z, x) <body = b (int64 i, bool p, float s, float[4,16] h)"
        "   => (bool q, float u, float[4,16] k) { q = Identity(p) u = Add(s, one) k = Identity(h) }>"
        " y = MatMul(a, w) }",
        X,
        {"w": W16, "one": number(1)},
    ),
    "a_loop_that_overflows_inside": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " t = Constant<value_int=3>() c = Constant<value=bool {1}>()"
        " y = Loop(t, c, x) <body = b (int64 i, bool p, float[4,16] h) => (bool q, float[4,16] k)"
        "   { q = Identity(p) m = MatMul(h, w) e = Mul(m, big) f = Mul(e, e) g = Sqrt(f) k = Div(g, big) }> }",
        X,
        {"w": W16, "big": number(2000)},
    ),
    "a_branch_that_overflows": Hazard(
        "g (float[4,16] x, bool c) => (float[4,16] y) {"
        " h = MatMul(x, w) y = If(c) <then_branch = t () => (float[4,16] a)"
        "   { e = Mul(h, big) f = Mul(e, e) r = Sqrt(f) a = Div(r, big) },"
        "   else_branch = e () => (float[4,16] b) { b = MatMul(h, w) }> }",
        {**X, "c": np.array(True)},
        {"w": W16, "big": number(2000)},
    ),
    "an_outer_value_in_nested_bodies": Hazard(
        "g (float[4,16] x, bool c, bool d) => (float[4,16] y) {"
        " h = MatMul(x, w) y = If(c) <then_branch = t () => (float[4,16] a)"
        "   { i = If(d) <then_branch = u () => (float[4,16] p) { p = Tanh(h) },"
        "     else_branch = v () => (float[4,16] q) { q = MatMul(x, w) }> a = MatMul(i, w) },"
        "   else_branch = e () => (float[4,16] b) { b = Identity(h) }> }",
        {**X, "c": np.array(True), "d": np.array(False)},
        {"w": W16},
    ),
    "a_sequence_of_floats": Hazard(
        "g (float[4,16] x) => (float[8,16] y) {"
        " a = MatMul(x, w) b = Tanh(a) s = SequenceConstruct(a, b) e = SequenceAt(s, one) f = MatMul(e, w)"
        " t = SequenceInsert(s, f) u = SequenceErase(t, one) y = ConcatFromSequence<axis=0>(u) }",
        X,
        {"w": W16, "one": np.array(1)},
    ),
    "an_optional_output_between": Hazard(
        "g (float[4,16] x) => (float[4,16] y, float[4,1] m) {"
        " h = MatMul(x, w) y, m, i = LayerNormalization(h, s, t) }",
        X,
        {"w": W16, "s": np.ones(16, np.float32), "t": np.zeros(16, np.float32)},
    ),
    "an_omitted_output": Hazard(
        'g (float[5,1,16] x) => (float[1,1,8] h, float[5,1,1,8] r) { r, "", c = LSTM<hidden_size=8>(x, w, v)'
        " h = Tanh(c) }",
        {"x": normal(5, 1, 16)},
        {"w": normal(1, 32, 16, scale=0.2), "v": normal(1, 32, 8, scale=0.2)},
    ),
    "pooling_with_indices": Hazard(
        "g (float[1,4,8,8] x) => (float[1,4,4,4] y, int64[1,4,4,4] i) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) y, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c) }",
        {"x": normal(1, 4, 8, 8)},
        {"w": normal(4, 4, 3, 3, scale=0.2)},
    ),
    "boxes_that_are_suppressed": Hazard(
        "g (float[1,6,4] b, float[1,2,6] s) => (int64[N,3] y, float[1,2,6] t) {"
        " c = MatMul(b, e) t = Sigmoid(s) y = NonMaxSuppression(c, t, k, iou, thr) }",
        {
            "b": np.sort(np.random.default_rng(3).random((1, 6, 4)) * 3000, -1).astype(np.float32),
            "s": normal(1, 2, 6),
        },
        {
            "e": np.eye(4, dtype=np.float32),
            "k": np.array([3]),
            "iou": np.array([0.5], np.float32),
            "thr": np.array([0.2], np.float32),
        },
    ),
    "resize_with_float_scales": Hazard(
        "g (float[1,3,9,9] x) => (float[1,4,N,M] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) s = Shape(c) f = Cast<to=1>(s) k = Div(t, f)"
        ' y = Resize<mode="nearest">(c, "", k) }',
        {"x": normal(1, 3, 9, 9)},
        {
            "w": normal(4, 3, 3, 3, scale=0.2),
            "t": np.array([1, 4, 27, 18], np.float32),
        },
    ),
    "doubles_in_the_middle": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " h = MatMul(x, w) d = Cast<to=11>(h) e = Mul(d, k) f = Cast<to=1>(e) y = MatMul(f, w) }",
        X,
        {"w": W16, "k": np.array(1.5, np.float64)},
    ),
    "logits_that_are_compared": Hazard(
        "g (float[4,16] x) => (bool[4,16] b, int64[4,3] i) {"
        " h = MatMul(x, w) b = Greater(h, t) v, i = TopK<axis=-1>(h, k) }",
        X,
        {"w": W16, "t": number(0.1), "k": np.array([3])},
    ),
    "a_constant_of_a_shape": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " s = Shape(x) z = ConstantOfShape<value = float[1] {0.5}>(s) a = MatMul(x, w) b = Mul(a, z)"
        " y = MatMul(b, w) }",
        X,
        {"w": W16},
    ),
    "a_table_of_large_embeddings": Hazard(
        "g (int64[4] i) => (float[4,16] y) { e = Gather(t, i) s = Mul(e, k) y = MatMul(s, w) }",
        {"i": np.array([0, 3, 5, 7])},
        {"t": normal(8, 16, scale=1e6), "k": number(1e-6), "w": W16},
    ),
    "cancellation_of_large_numbers": Hazard(
        "g (float[4,16] x) => (float[4,16] y) {"
        " a = MatMul(x, w) b = Add(a, k) c = Sub(b, k) y = MatMul(c, w) }",
        X,
        {"w": W16, "k": number(4000)},
    ),
}


def unnamed() -> onnx.ModelProto:
    """A network whose nodes have no names, with a function and a Constant in it."""
    model = HAZARDS["a_constant_of_a_shape"].proto()
    for node in model.graph.node:
        node.name = ""
    return model


def shared_by_blocked_and_free() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A weight that a product reads and an operator without half arithmetic too."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("CumSum", ["w", "ax"], ["cs"]),
        helper.make_node("MatMul", ["a", "cs"], ["b"]),
        helper.make_node("Det", ["w"], ["d"]),
        helper.make_node("Mul", ["b", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])],
        [
            numpy_helper.from_array(W16 + np.eye(16, dtype=np.float32), "w"),
            numpy_helper.from_array(np.array(0), "ax"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model, X
