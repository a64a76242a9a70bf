"""What TensorRT refuses, written in what it takes: the same numbers, nothing refused, nothing touched elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphopt_passes import bodies, integers, lowering
from graphopt_passes.cleanup import RemoveDeadCode
from graphopt_passes.fold import FoldConstants

from graphopt.emit.legality import check_legality
from graphopt.emit.parsers import DECOMPOSED, WHOLE
from graphopt.ir.model_file import load_model, to_proto
from graphopt.numerics import Numerics
from graphopt.pipeline import RewritePass
from graphopt.rewrite import RemarkKind
from graphopt.targets import get_target
from tests.rewriting import apply, compare, make_feeds, parse, run

RULES = (*lowering.RULES, *integers.RULES, *bodies.RULES)
STEPS = (RewritePass("decompose", RULES), FoldConstants(), RemoveDeadCode())
HEAD = '<ir_version: {ir}, opset_import: ["" : {opset}]>\n'
PAIR = "float s = {0.11}, uint8 z = {121}, float t = {0.07}, uint8 u = {3}, int8 o = {0}, uint8 c = {128}"

SAME = {
    "a loss": (
        "g (float[3,5] x, int64[3] t) => (y) { y = NegativeLogLikelihoodLoss(x, t) }",
        17,
    ),
    "centred crop": (
        "g (float[2,9,9] x) => (y) <int64[2] n = {6, 12}> { y = CenterCropPad<axes = [1, 2]>(x, n) }",
        18,
    ),
    "attention with a cap": (
        "g (float[1,2,3,8] q, float[1,2,4,8] k) => (y) { y = Attention<softcap = 5.0>(q, k, k) }",
        23,
    ),
    "attention with a cache": (
        "g (float[1,2,3,8] q, float[1,2,P,8] p) => (y, k, v) { y, k, v = Attention(q, q, q, , p, p) }",
        23,
    ),
    "equal booleans": ("g (bool[4] x, bool[4] y) => (z) { z = Equal(x, y) }", 18),
    "padded booleans": ("g (bool[2,3] x) => (y) <int64[4] p = {0, 1, 1, 0}> { y = Pad(x, p) }", 18),
    "joined bytes": ("g (uint8[2,3] x) => (y) { y = Concat<axis = 0>(x, x) }", 18),
    "the largest bytes": (
        "g (uint8[1,2,4,4] x) => (y) { y = MaxPool<kernel_shape = [2, 2]>(x) }",
        18,
    ),
    "unsorted TopK": (
        "g (float[2,9] x) => (y) <int64[1] k = {3}> "
        "{ v, i = TopK<sorted = 0>(x, k)  y = ReduceSum(v) }",
        18,
    ),
    "a grid": (
        "g (float[2,2,3] x) => (y) <int64[4] n = {2, 1, 3, 5}> { y = AffineGrid(x, n) }",
        20,
    ),
    "an aligned grid in space": (
        "g (float[1,3,4] x) => (y) <int64[5] n = {1, 1, 2, 4, 3}> { y = AffineGrid<align_corners = 1>(x, n) }",
        20,
    ),
    "a pool of cubes": (
        "g (float[1,2,6,6] x) => (y) { y = LpPool<kernel_shape = [2, 3], strides = [2, 1], pads = [1, 1, 0, 1], p = 3>"
        "(x) }",
        18,
    ),
    "what is kept": ("g (float[4,2] x, bool[4] c) => (y) { y = Compress<axis = 0>(x, c) }", 18),
    "what is kept of all": ("g (float[2,2] x, bool[3] c) => (y) { y = Compress(x, c) }", 18),
    "statistics that nobody reads": (
        "g (float[2,8] x) => (y) <float[8] w> { y, m = LayerNormalization(x, w) }",
        18,
    ),
    "a determinant of two": ("g (float[5,2,2] x) => (y) { y = Det(x) }", 18),
    "a determinant of three": ("g (float[3,3] x) => (y) { y = Det(x) }", 18),
    "resized by a quotient of sizes": (
        "g (float[1,2,H,W] x, float[1,3,A,B] z) => (y) <int64[1] i = {2}, int64[1] j = {4}, float[2] one = {1, 1}> { "
        "a = Shape(z)  b = Slice(a, i, j)  c = Shape(x)  d = Slice(c, i, j)  e = Cast<to = 1>(b)  f = Cast<to = 1>(d)  "
        'q = Div(e, f)  s = Concat<axis = 0>(one, q)  y = Resize<mode = "nearest">(x, , s) }',
        18,
    ),
    "pairs": (
        f"g (float[2,3,4] x) => (y) <{PAIR}> "
        "{ q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        18,
    ),
    "pairs around 128": (
        f"g (float[2,3,4] x) => (y) <{PAIR}> "
        "{ q = QuantizeLinear(x, s, c)  y = DequantizeLinear(q, s, c) }",
        18,
    ),
    "moved bytes": (
        f"g (float[2,3,4] x) => (y) <{PAIR}> "
        "{ q = QuantizeLinear(x, s, z)  r = Transpose<perm = [2, 0, 1]>(q)  y = DequantizeLinear(r, s, z) }",
        18,
    ),
    "bytes in and out": (
        f"g (uint8[2,3] x) => (y) <{PAIR}> "
        "{ f = DequantizeLinear(x, s, z)  h = Tanh(f)  y = QuantizeLinear(h, t, u) }",
        18,
    ),
    "constant bytes": (
        f"g (float[4,3] x) => (y) <{PAIR}, uint8[3,2] w> {{ f = DequantizeLinear(w, s, z)  y = MatMul(x, f) }}",
        18,
    ),
    "constant bytes by channel": (
        "g (float[4,3] x) => (y) <uint8[3,2] w, float[2] s, uint8[2] z = {7, 9}> "
        "{ f = DequantizeLinear(w, s, z)  y = MatMul(x, f) }",
        18,
    ),
    "constant bytes in blocks": (
        "g (float[1,4] x) => (y) <uint8[4,2] w, float[2,2] s, uint8[2,2] z = {7, 9, 1, 2}> "
        "{ f = DequantizeLinear<axis = 0, block_size = 2>(w, s, z)  y = MatMul(x, f) }",
        21,
    ),
    "a bias of 32 bits": (
        "g (float[4,3] x) => (y) <int32[3] b = {5, -9, 70000}, float s = {0.01}> "
        "{ f = DequantizeLinear(b, s)  y = Add(x, f) }",
        18,
    ),
    "scales that are fed": (
        f"g (float[2,3] x, float k) => (y) <{PAIR}> "
        "{ a = Abs(k)  q = QuantizeLinear(x, a, z)  y = DequantizeLinear(q, a, z) }",
        18,
    ),
    "scales by channel": (
        "g (float[2,3] x) => (y) <float[3] s, uint8[3] z = {7, 9, 200}> "
        "{ q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        18,
    ),
    "words of 16 bits": (
        "g (float[2,3] x) => (y) <float s = {0.001}, uint16 z = {30000}> "
        "{ q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        21,
    ),
    "halves": (
        "g (float16[2,3] x) => (y) <float k = {0.05}, uint8 z = {120}> { s = Cast<to = 10>(k)  "
        "q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        19,
    ),
    "a convolution": (
        f"g (uint8[1,2,5,5] x) => (y) <{PAIR}, int8[3,2,3,3] w, int32[3] b = {{7, -8, 100}}> "
        "{ y = QLinearConv<pads = [1, 1, 1, 1]>(x, s, z, w, t, o, t, u, b) }",
        18,
    ),
    "a convolution by channel": (
        f"g (uint8[1,2,5,5] x) => (y) <{PAIR}, int8[3,2,3,3] w, float[3] v, int8[3] n = {{0, 0, 0}}> "
        "{ y = QLinearConv(x, s, z, w, v, n, t, u) }",
        18,
    ),
    "a product": (
        f"g (uint8[4,3] x) => (y) <{PAIR}, int8[3,5] w> {{ y = QLinearMatMul(x, s, z, w, t, o, t, u) }}",
        18,
    ),
    "ConvInteger": (
        f"g (uint8[1,2,5,5] x) => (y) <{PAIR}, uint8[3,2,3,3] w> {{ y = ConvInteger(x, w, z, u) }}",
        18,
    ),
    "MatMulInteger": (
        f"g (uint8[4,3] x) => (y) <{PAIR}, uint8[3,5] w> {{ y = MatMulInteger(x, w, z, u) }}",
        18,
    ),
    "MatMulInteger without zero points": (
        "g (uint8[4,3] x) => (y) <int8[3,5] w> { y = MatMulInteger(x, w) }",
        18,
    ),
    "bytes of a range that is measured": (
        "g (float[4,3] x) => (y) <uint8[3,5] w> "
        "{ q, s, z = DynamicQuantizeLinear(x)  p = MatMulInteger(q, w, z)  f = Cast<to = 1>(p)  y = Mul(f, s) }",
        18,
    ),
}

KEPT = {
    "a determinant of four": ("g (float[4,4] x) => (y) { y = Det(x) }", 18, "4 rows"),
    "linear resizing of bytes": (
        'g (uint8[1,1,4,4] x) => (y) <float[4] s = {1, 1, 2, 2}> { y = Resize<mode = "linear">(x, , s) }',
        18,
        "between bytes",
    ),
    "a huge grid": (
        "g (float[1,2,3] x) => (y) <int64[4] n = {1, 1, 4000, 4000}> { y = AffineGrid(x, n) }",
        20,
        "too large",
    ),
    "a pool that is rounded up": (
        "g (float[1,2,6,6] x) => (y) { y = LpPool<kernel_shape = [2, 2], p = 3, ceil_mode = 1>(x) }",
        18,
        "rounded up",
    ),
    "corners of one position": (
        "g (float[1,2,3] x) => (y) <int64[4] n = {1, 1, 1, 4}> { y = AffineGrid<align_corners = 1>(x, n) }",
        20,
        "single position",
    ),
    "scales that are fed to Resize": (
        "g (float[1,1,H,W] x, float[2] f) => (y) <float[2] one = {1, 1}> "
        "{ s = Concat<axis = 0>(one, f)  y = Resize(x, , s) }",
        18,
        "no quotient of sizes",
    ),
    "a row of zero points": (
        "g (uint8[2,3] x) => (y) <uint8[3,5] w, uint8[2] z = {1, 2}> { y = MatMulInteger(x, w, z) }",
        18,
        "one zero point a row",
    ),
    "words that are fed in blocks": (
        "g (uint8[4,2] w) => (y) <float[2,2] s, uint8[2,2] z = {1, 2, 3, 4}> "
        "{ y = DequantizeLinear<axis = 0, block_size = 2>(w, s, z) }",
        21,
        "blocks",
    ),
}


def refused(model: ir.Model) -> list[str]:
    return [f.reason for f in check_legality(model, get_target("tensorrt")).refused if f.node]


def fed(proto: onnx.ModelProto, seed: int) -> dict[str, npt.NDArray[Any]]:
    feeds = make_feeds(proto, seed)
    rng = np.random.default_rng(seed)
    for name, value in feeds.items():
        if value.dtype == np.uint8:
            feeds[name] = rng.integers(0, 256, value.shape, np.uint8)
    return feeds


def model_of(text: str, opset: int) -> onnx.ModelProto:
    return parse(HEAD.format(opset=opset, ir=10 if opset > 19 else 9) + text)


@pytest.mark.parametrize("case", list(SAME))
def test_the_numbers_stay_and_the_target_takes_it(case: str) -> None:
    proto = model_of(*SAME[case])
    assert refused(load_model(proto)) or case == "statistics that nobody reads"
    model = load_model(proto)
    ctx = apply(STEPS, model, target="tensorrt")
    assert ctx.rewrites
    assert not refused(model)
    after = to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    for seed in range(2):  # a weight that is a constant now meets another kernel
        feed = fed(proto, seed)
        compare(run(proto, feed), run(after, feed), Numerics.REORDERED, 2e-6)
    assert not apply(STEPS, model, target="tensorrt").rewrites


@pytest.mark.parametrize("case", list(SAME))
def test_targets_that_take_it_keep_it(case: str) -> None:
    if case == "statistics that nobody reads":
        return
    model = load_model(model_of(*SAME[case]))
    assert not apply(RULES, model, target="cpu").rewrites


@pytest.mark.parametrize("case", list(KEPT))
def test_what_cannot_be_written_otherwise_stays(case: str) -> None:
    text, opset, reason = KEPT[case]
    model = load_model(model_of(text, opset))
    ctx = apply(RULES, model, target="tensorrt")
    assert refused(model)
    reasons = [r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED]
    assert any(reason in each for each in reasons), reasons


def test_bytes_around_128_stay_integers() -> None:
    model = load_model(model_of(*SAME["pairs around 128"]))
    apply(STEPS, model, target="tensorrt")
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear"]


def test_symmetric_products_become_pairs() -> None:
    """int8 without zero points is what explicit quantisation fuses."""
    text = """g (float[1,2,5,5] x) => (y)
    <float s = {0.11}, int8 o = {0}, int8[3,2,3,3] w, float t = {0.07}, int32[3] b> {
      q = QuantizeLinear(x, s, o)  r = QLinearConv(q, s, o, w, t, o, t, o, b)  y = DequantizeLinear(r, t, o) }"""
    model = load_model(model_of(text, 18))
    apply(STEPS, model, target="tensorrt")
    assert not refused(model)
    ops = [node.op_type for node in model.graph]
    assert ops.count("QuantizeLinear") == 2
    assert "Conv" in ops
    assert "Round" not in ops


def test_what_a_check_offers_is_what_the_rules_look_for() -> None:
    looked = {op for rule in (*lowering.RULES, *bodies.RULES) for op in rule.pattern.types}
    assert looked >= DECOMPOSED
    assert {op for rule in integers.RULES for op in rule.pattern.types} >= WHOLE
