"""More operators of com.microsoft as standard ones: integers, grouped heads, and small ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import contrib, contrib_heads, contrib_integers, contrib_plain
from graphopt_passes import contrib_transformers as transformers

from graphopt.numerics import Numerics
from graphopt.rewrite import RemarkKind
from tests.rewriting import apply, compare, make_feeds, parse, run

RULES = (*contrib_heads.RULES, *contrib_integers.RULES, *contrib_plain.RULES)
HEAD = '<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
BYTES = "float s = {0.0513}, uint8 z = {121}, float t = {0.0931}, uint8 u = {128}"
PAIR = "q = QuantizeLinear(x, s, z)"
END = "y = DequantizeLinear(r, t, u)"


def between(body: str, shape: str = "1,4,6,6") -> str:
    return f"g (float[{shape}] x) => (y) <{BYTES}> {{ {PAIR}  {body}  {END} }}"


SAME = {
    "sum": (between("r = com.microsoft.QLinearAdd(q, s, z, q, s, z, t, u)"), 18),
    "product": (between("r = com.microsoft.QLinearMul(q, s, z, q, s, z, t, u)"), 18),
    "sigmoid": (between("r = com.microsoft.QLinearSigmoid(q, s, z, t, u)"), 18),
    "leaky": (between("r = com.microsoft.QLinearLeakyRelu<alpha = 0.1>(q, s, z, t, u)"), 18),
    "pool": (
        between("r = com.microsoft.QLinearAveragePool<kernel_shape = [3, 3]>(q, s, z, t, u)"),
        18,
    ),
    "global pool": (between("r = com.microsoft.QLinearGlobalAveragePool(q, s, z, t, u)"), 18),
    "concatenation": (
        between("r = com.microsoft.QLinearConcat<axis = 1>(t, u, q, s, z, q, s, z)"),
        18,
    ),
    "choice": (
        between("c = Greater(x, s)  r = com.microsoft.QLinearWhere(c, q, s, z, q, s, z, t, u)"),
        18,
    ),
    "gemm": (
        "g (float[2,8] x) => (y) <"
        + BYTES
        + ", int8[5,8] w, int8 n = {0}, int32[5] b = {9, -7, 300, 0, 5}> "
        f"{{ {PAIR}  r = com.microsoft.QGemm<transB = 1>(q, s, z, w, t, n, b, t, u)  {END} }}",
        18,
    ),
    "dynamic product": (
        "g (float[N,8] x) => (y) <int8[8,5] w, float t = {0.03}, int8 n = {0}, float[5] b> "
        "{ y = com.microsoft.DynamicQuantizeMatMul(x, w, t, n, b) }",
        18,
    ),
    "product to floats": (
        "g (uint8[N,8] x) => (y) <int8[8,5] w, float s = {0.1}, float t = {0.03}, uint8 z = {7}, int8 n = {0}> "
        "{ y = com.microsoft.MatMulIntegerToFloat(x, w, s, t, z, n) }",
        18,
    ),
    "padding": (
        "g (float[2,3] x) => (y) <int64[1,4] p = {1, 0, 1, 2}, float v = {0.5}> { y = com.microsoft.Pad(x, p, v) }",
        18,
    ),
    "triangle": ("g (float[3,3] x) => (y) { y = com.microsoft.Trilu<upper = 0>(x) }", 18),
    "range": (
        "g () => (y) <float a = {0}, float b = {5}, float c = {2}> { y = com.microsoft.Range(a, b, c) }",
        18,
    ),
    "new axis": (
        "g (float[2,3] x) => (y) <int32 a = {-1}> { y = com.microsoft.ExpandDims(x, a) }",
        18,
    ),
    "new axis as an attribute": (
        "g (float[2,3] x) => (y) <int32 a = {-1}> { y = com.microsoft.ExpandDims(x, a) }",
        11,
    ),
    "unique": ("g (float[6] x) => (y, i, c) { y, i, c = com.microsoft.Unique(x) }", 18),
    "sampling": (
        "g (float[1,2,4,4] x, float[1,3,3,2] k) => (y) { y = com.microsoft.GridSample(x, k) }",
        18,
    ),
    "sampling with new names": (
        "g (float[1,2,4,4] x, float[1,3,3,2] k) => (y) { y = com.microsoft.GridSample(x, k) }",
        20,
    ),
    "gathering": (
        "g (float[2,3] x) => (y) <int64[2,1] i = {1, 0}> { y = com.microsoft.GatherND(x, i) }",
        18,
    ),
    "channels last": (
        "g (uint8[1,6,6,4] x) => (y) { y = com.microsoft.NhwcMaxPool<kernel_shape = [2, 2]>(x) }",
        18,
    ),
    "integer attention": (
        "g (float[2,3,8] x) => (y) <float s = {0.05}, uint8 z = {120}, int8[8,24] w, float[24] b, float t = {0.02}, "
        "int8 n = {0}> { q = QuantizeLinear(x, s, z)  "
        "y = com.microsoft.QAttention<num_heads = 2>(q, w, b, s, t, , z, n) }",
        18,
    ),
    "rotary": (
        "g (float[2,3,32] x) => (y) <int64[2,3] p = {0, 1, 2, 5, 6, 7}, float[64,4] c, float[64,4] d> "
        "{ y = com.microsoft.RotaryEmbedding(x, p, c, d) }",
        18,
    ),
    "rotary of heads, interleaved, from a place on": (
        "g (float[2,4,3,8] x) => (y) <int64[1] p = {5}, float[64,4] c, float[64,4] d> "
        "{ y = com.microsoft.RotaryEmbedding<interleaved = 1>(x, p, c, d) }",
        18,
    ),
}

KEPT = {
    "channels last": (
        between("r = com.microsoft.QLinearGlobalAveragePool<channels_last = 1>(q, s, z, t, u)"),
        18,
        "channels last",
    ),
    "an old Softmax": (
        between("r = com.microsoft.QLinearSoftmax<opset = 11>(q, s, z, t, u)"),
        18,
        "before 13",
    ),
    "alpha beside a bias": (
        "g (uint8[2,8] x) => (y) <" + BYTES + ", int8[8,5] w, int8 n = {0}, int32[5] b> "
        "{ y = com.microsoft.QGemm<alpha = 2.0>(x, s, z, w, t, n, b) }",
        18,
        "alpha beside a bias",
    ),
    "Trilu before the standard had it": (
        "g (float[3,3] x) => (y) { y = com.microsoft.Trilu(x) }",
        13,
        "since opset 14",
    ),
    "an inner Softmax": (
        "g (float[2,3,8] x) => (y) { y = com.microsoft.BiasSoftmax<axis = 1, is_inner_broadcast = 0>(x, x) }",
        18,
        "inner axis",
    ),
    "training": (
        "g (float[2,3] x) => (y) <float r = {0.5}, bool t = {1}> "
        "{ y, m = com.microsoft.BiasDropout(x, x, , r, t) }",
        18,
        "training mode",
    ),
    "packed batches": (
        "g (float[1,3,8] x) => (y) <int64[1,3] p, float[9,4] c> "
        "{ y = com.microsoft.RotaryEmbedding<is_packed_batching = 1>(x, p, c, c) }",
        18,
        "packed batches",
    ),
    "three dimensions of groups": (
        "g (float[1,4,8] x) => (y) <float[8] a> { y = com.microsoft.GroupNorm<groups = 2, activation = 0>(x, a, a) }",
        18,
        "four dimensions",
    ),
}


@pytest.mark.parametrize("case", list(SAME))
def test_the_numbers_stay(case: str) -> None:
    text, opset = SAME[case]
    proto = parse(HEAD.format(opset=opset) + text)
    model = ir.from_proto(proto)
    assert apply((*RULES, *contrib.RULES, *transformers.RULES), model, target="portable").rewrites
    assert not any(node.domain for node in model.graph)
    after = ir.to_proto(model)
    for seed in range(2):
        feed = make_feeds(proto, seed)
        compare(run(proto, feed), run(after, feed), Numerics.REORDERED, 2e-6)
    assert not apply(RULES, model, target="portable").rewrites


@pytest.mark.parametrize("case", list(SAME))
def test_targets_with_kernels_keep_them(case: str) -> None:
    text, opset = SAME[case]
    model = ir.from_proto(parse(HEAD.format(opset=opset) + text))
    assert not apply(RULES, model, target="cpu").rewrites


@pytest.mark.parametrize("case", list(KEPT))
def test_what_has_no_standard_form_stays(case: str) -> None:
    text, opset, reason = KEPT[case]
    model = ir.from_proto(parse(HEAD.format(opset=opset) + text))
    ctx = apply(RULES, model, target="portable")
    assert not ctx.rewrites
    reasons = [r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED]
    assert any(reason in each for each in reasons), reasons


HEADS = (
    "g (float[{b},S,{q}] q, float[{b},S,{k}] k, float[{b},S,{k}] v, float[{b},2,P,{d}] pk, float[{b},2,P,{d}] pv, "
    "int32[{b}] lens, int32 total) => (y, nk, nv) {tables} "
    "{{ y, nk, nv = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2{more}>"
    "(q, k, v, pk, pv, lens, total{angles}) }}"
)
TABLES = "<float[64,8] c, float[64,8] s>"


def heads(batch: int, size: int, more: str = "", *, rotary: bool = False) -> onnx.ModelProto:
    text = HEADS.format(
        b=batch,
        q=4 * size,
        k=2 * size,
        d=size,
        more=more,
        tables=TABLES if rotary else "",
        angles=", c, s" if rotary else "",
    )
    return parse(HEAD.format(opset=18) + text)


def feed_of(
    batch: int, new: int, past: int, size: int, lengths: list[int]
) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "q": draw(batch, new, 4 * size),
        "k": draw(batch, new, 2 * size),
        "v": draw(batch, new, 2 * size),
        "pk": draw(batch, 2, past, size),
        "pv": draw(batch, 2, past, size),
        "lens": np.asarray(lengths, np.int32) - 1,
        "total": np.asarray(max(lengths), np.int32),
    }


@pytest.mark.parametrize(
    ("batch", "new", "past", "lengths", "more"),
    [
        (2, 1, 4, [5, 5], ""),
        (2, 1, 4, [5, 3], ""),  # a row that is shorter
        (2, 3, 0, [3, 3], ""),  # a first prompt
        (1, 3, 8, [3], ""),  # a first prompt into a cache that has room
        (1, 1, 8, [5], ""),
        (1, 3, 4, [7], ", local_window_size = 3"),
        (1, 3, 4, [7], ", softcap = 2.0"),
        (1, 3, 4, [7], ", scale = 0.5"),
    ],
)
def test_grouped_heads_keep_their_cache(
    batch: int, new: int, past: int, lengths: list[int], more: str
) -> None:
    proto = heads(batch, 8, more)
    model = ir.from_proto(proto)
    assert apply(RULES, model, target="portable").rewrites
    feed = feed_of(batch, new, past, 8, lengths)
    compare(run(proto, feed), run(ir.to_proto(model), feed), Numerics.REORDERED, 2e-6)


@pytest.mark.parametrize("more", [", do_rotary = 1", ", do_rotary = 1, rotary_interleaved = 1"])
def test_grouped_heads_turn(more: str) -> None:
    proto = heads(1, 16, more, rotary=True)
    model = ir.from_proto(proto)
    assert apply(RULES, model, target="portable").rewrites
    for new, past, length in ((1, 4, 5), (3, 4, 7), (3, 0, 3)):
        feed = feed_of(1, new, past, 16, [length])
        compare(run(proto, feed), run(ir.to_proto(model), feed), Numerics.REORDERED, 2e-6)


@pytest.mark.parametrize("more", [", smooth_softmax = 1", ", qk_output = 1"])
def test_strange_settings_of_grouped_heads_stay(more: str) -> None:
    model = ir.from_proto(heads(1, 8, more))
    ctx = apply(RULES, model, target="portable")
    assert not ctx.rewrites
    assert any(more.strip(", ").split(" ")[0] in r.reason for r in ctx.remarks)


def test_packed_heads_without_a_cache() -> None:
    text = """g (float[1,S,64] x, int32[1] lens, int32 total) => (y, nk, nv) {
      y, nk, nv = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(x, , , , , lens, total) }"""
    proto = parse(HEAD.format(opset=18) + text)
    model = ir.from_proto(proto)
    assert apply(RULES, model, target="portable").rewrites
    x = np.random.default_rng(0).standard_normal((1, 5, 64)).astype(np.float32)
    feed = {"x": x, "lens": np.asarray([4], np.int32), "total": np.asarray(5, np.int32)}
    compare(run(proto, feed), run(ir.to_proto(model), feed), Numerics.REORDERED, 2e-6)


def group_norm(x: npt.NDArray[Any], groups: int) -> npt.NDArray[Any]:
    """Of channels last, without scale and shift, in float64."""
    wide = x.astype(np.float64)
    parted = wide.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = parted - parted.mean(axis=(1, 3), keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-3)
    return np.asarray(normed.reshape(x.shape))


def written(text: str) -> onnx.ModelProto:
    """Without a kernel for the original on the CPU: the rules' result alone."""
    model = ir.from_proto(parse(HEAD.format(opset=18) + text))
    assert apply((*RULES, *contrib.RULES), model, target="portable").rewrites
    assert not any(node.domain for node in model.graph)
    return ir.to_proto(model)


def test_group_norms_follow_their_definition() -> None:
    text = (
        "g (float[2,3,3,8] x, float[2,3,3,8] s) => (y, t) <float[8] a, float[8] b> "
        "{ y, t = com.microsoft.SkipGroupNorm<groups = 2, epsilon = 0.001, activation = 1>(x, a, b, s) }"
    )
    proto = written(text)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    feed = make_feeds(proto, 0)
    y, total = run(proto, feed)
    expected = group_norm(feed["x"] + feed["s"], 2) * held["a"] + held["b"]
    np.testing.assert_allclose(y, expected / (1 + np.exp(-expected)), atol=2e-6)
    np.testing.assert_array_equal(total, feed["x"] + feed["s"])


def test_group_norm_with_channels_first() -> None:
    text = (
        "g (float[2,8,3,3] x) => (y) <float[8] a, float[8] b> { y = com.microsoft.GroupNorm"
        "<groups = 2, epsilon = 0.001, activation = 0, channels_last = 0>(x, a, b) }"
    )
    proto = written(text)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    feed = make_feeds(proto, 0)
    last = np.moveaxis(feed["x"], 1, -1)
    expected = group_norm(last, 2) * held["a"] + held["b"]
    np.testing.assert_allclose(np.moveaxis(run(proto, feed)[0], 1, -1), expected, atol=2e-6)


def test_sums_with_biases_follow_their_definitions() -> None:
    text = (
        "g (float[2,3,8] x, float[2,3,8] s) => (a, d, m) <float[8] b> { a = com.microsoft.BiasAdd(x, b, s)  "
        "d, k = com.microsoft.BiasDropout(x, b, s)  m = com.microsoft.BiasSoftmax<axis = 2, is_inner_broadcast = 0>"
        "(x, s) }"
    )
    proto = written(text)
    held = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    feed = make_feeds(proto, 0)
    added, dropped, weights = run(proto, feed)
    np.testing.assert_allclose(added, feed["x"] + held + feed["s"], atol=1e-6)
    np.testing.assert_array_equal(added, dropped)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)


def test_gated_halves_follow_their_definition() -> None:
    text = (
        "g (float[2,3,8] x) => (y, z) <float[8] b, float[8,6] w> "
        "{ y = com.microsoft.BiasSplitGelu(x, b)  z = com.microsoft.GemmFastGelu(x, w) }"
    )
    proto = written(text)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    feed = make_feeds(proto, 0)
    y, z = run(proto, feed)
    left, right = np.split((feed["x"] + held["b"]).astype(np.float64), 2, axis=-1)
    erf = np.vectorize(math.erf)
    np.testing.assert_allclose(y, left * right * 0.5 * (1 + erf(right / np.sqrt(2))), atol=2e-6)
    inner = feed["x"].astype(np.float64) @ held["w"]
    gate = np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3))
    np.testing.assert_allclose(z, 0.5 * inner * (1 + gate), atol=2e-5)


def test_channels_last_convolution_follows_its_definition() -> None:
    text = "g (float[1,5,5,2] x) => (y) <float[3,1,1,2] w> { y = com.microsoft.NhwcConv(x, w) }"
    proto = written(text)
    weights = onnx.numpy_helper.to_array(proto.graph.initializer[0]).reshape(3, 2)
    feed = make_feeds(proto, 0)
    np.testing.assert_allclose(run(proto, feed)[0], feed["x"] @ weights.T, atol=2e-6)
