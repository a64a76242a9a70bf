"""Each kind of rule of the operator tables: a model that keeps it, and one that breaks it."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from graphopt.emit.findings import Legality, Verdict
from graphopt.emit.legality import check_legality
from graphopt.ir.model_file import load_model
from graphopt.targets import get_target

HEAD = '<ir_version: 9, opset_import: ["" : {opset}]>\n'

QUANTIZE = (
    "g (float[2,4] x) => (float[2,4] y) <{consts}> "
    "{{ q = QuantizeLinear{axis}(x, s, z)  y = DequantizeLinear{axis}(q, s, z) }}"
)
GOOD_SCALE = "float s = {0.5}, int8 z = {0}"
VECTOR = "float[4] s = {1, 1, 1, 1}, int8[4] z = {0, 0, 0, 0}"
IF = (
    "g (bool c, float[2,2] x) => (float[M,K] y) {{ y = If(c) <"
    "then_branch = t () => (float[A,B] {a}) {{ {a} = Relu(x) }}, "
    "else_branch = e () => (b) {{ {b} }}> }}"
)


def check(text: str, *, opset: int = 18, target: str = "tensorrt") -> Legality:
    proto = onnx.parser.parse_model(HEAD.format(opset=opset) + text)
    return check_legality(load_model(proto), get_target(target))


KEPT = {
    "reduce axes constant": (
        "g (float[2,4] x) => (y) <int64[1] a = {1}> { y = ReduceSum(x, a) }",
        18,
    ),
    "reduce axes from a static shape": (
        "g (float[2,4] x) => (y) <int64[1] a = {1}> { b = Identity(a)  y = ReduceSum(x, b) }",
        18,
    ),
    "sorted TopK": (
        "g (float[2,9] x) => (y, i) <int64[1] k = {3}> { y, i = TopK(x, k) }",
        18,
    ),
    "linear resize by constant scales": (
        'g (float[1,1,4,4] x) => (y) <float[4] s = {1, 1, 2, 2}> { y = Resize<mode = "linear">(x, , s) }',
        18,
    ),
    "symmetric Q/DQ": (QUANTIZE.format(consts=GOOD_SCALE, axis=""), 18),
    "fmod of floats": ("g (float[4] x) => (y) { y = Mod<fmod = 1>(x, x) }", 18),
    "float Range": (
        "g () => (y) <float zero = {0}, float one = {1}> { y = Range(zero, one, one) }",
        18,
    ),
    "Range of integers": (
        "g (int64 x) => (y) <int64 one = {1}> { y = Range(x, one, one) }",
        18,
    ),
    "scales and zero points that are fed": (
        "g (float[2,4] x, float s, int8 z) => (y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        18,
    ),
    "resize by scales of some axes": (
        "g (float[1,1,4,4] x) => (y) <float[2] s = {2, 2}> { y = Resize<axes = [2, 3]>(x, , s) }",
        18,
    ),
    "lengths of sequences in float32": (
        "g (float[3,2,4] x, float[1,8,4] w, float[1,8,2] r, int32[2] s) => (y) "
        "{ y = LSTM<hidden_size = 2>(x, w, r, , s) }",
        18,
    ),
    "a mask, and no causal one": (
        "g (float[1,2,3,8] q, float[3,3] m) => (y) { y = Attention(q, q, q, m) }",
        23,
    ),
    "a causal mask alone": (
        "g (float[1,2,3,8] q) => (y) { y = Attention<is_causal = 1>(q, q, q) }",
        23,
    ),
    "a window of everything": (
        "g (float[1,2,3,8] q) => (y) { y = Attention<left_window_size = -1>(q, q, q) }",
        24,
    ),
    "a type that was seen to parse": (
        "g (bfloat16[1,1,4,4] x, bfloat16[1,4,4,2] i) => (y) { y = GridSample(x, i) }",
        18,
    ),
    "attention of equal heads": (
        "g (float[1,2,3,8] q, float[1,2,3,8] k, float[1,2,3,8] v) => (y) { y = Attention(q, k, v) }",
        23,
    ),
    "INT8 arithmetic parses": ("g (int8[4] x) => (y) { y = Add(x, x) }", 18),
    "branches alike": (IF.format(a="a", b="b = Neg(x)"), 18),
}

BROKEN = {
    "constant": (
        "g (float[2,4] x, int64[1] a) => (y) { y = ReduceSum(x, a) }",
        "computed while the model runs",
    ),
    "attr-in": (
        "g (float[2,9] x) => (y, i) <int64[1] k = {3}> { y, i = TopK<sorted = 0>(x, k) }",
        "sorted = 0",
    ),
    "constant-below": (
        "g (float[2,9000] x) => (y, i) <int64[1] k = {3840}> { y, i = TopK(x, k) }",
        "must be below 3840",
    ),
    "resize": (
        "g (float[1,1,4,4] x, float[4] s) => (y) { y = Resize(x, , s) }",
        "computed while the model runs",
    ),
    "constant floats": (
        "g (float x) => (y) <float one = {1}> { y = Range(x, one, one) }",
        "must fold",
    ),
    "absent": (
        "g (float[1,2,3,8] q, float[3,3] m) => (y) { y = Attention<is_causal = 1>(q, q, q, m) }",
        "takes one of them",
    ),
    "absent past": (
        "g (float[1,2,3,8] q, float[1,2,3,8] p) => (y) { y = Attention(q, q, q, , p, p) }",
        "past_key is unsupported",
    ),
    "absent for halves": (
        "g (float16[3,2,4] x, float16[1,8,4] w, float16[1,8,2] r, int32[2] s) => (y) "
        "{ y = LSTM<hidden_size = 2>(x, w, r, , s) }",
        "input 4 ('s') is given",
    ),
    "mask-fits": (
        "g (float[1,2,3,8] q, float[3,2] m) => (y) { y = Attention(q, q, q, m) }",
        "the mask ends in 2, the keys are 3",
    ),
    "mask of integers": (
        "g (float[1,2,3,8] q, int32[3,3] m) => (y) { y = Attention(q, q, q, m) }",
        "input 3 is INT32",
    ),
    "window": (
        "g (float[1,2,3,8] q) => (y) { y = Attention<left_window_size = 2>(q, q, q) }",
        "knows no window",
    ),
    "rank-from": ("g (float[4] x) => (y) { y = ArgMax(x) }", "has rank 1"),
    "reduction": (
        "g (float[4] x, int64[2] i, float[2] u) => (y) "
        '{ y = ScatterElements<reduction = "add">(x, i, u) }',
        "reduction = 'add'",
    ),
    "same-dtypes": (
        "g (float16[2,4] x, float[4] s) => (y) { y = LayerNormalization(x, s) }",
        "FLOAT, FLOAT16",
    ),
    "attr-all": (
        "g (float[1,1,8,8] x) => (y) { y = MaxPool<kernel_shape = [2, 2], dilations = [2, 2]>(x) }",
        "dilations = [2, 2]",
    ),
    "outputs-at-most": (
        "g (float[1,1,8,8] x) => (y, i) { y, i = MaxPool<kernel_shape = [2, 2]>(x) }",
        "output 'i'",
    ),
    "dtype-in": (
        "g (float16 x) => (y) <float16 one = {15360}> { y = Range(x, one, one) }",
        "FLOAT16",
    ),
    "dtype-in when": ("g (float[4] x) => (y) { y = Mod(x, x) }", "input 0 is FLOAT"),
    "dtype-not-in": (
        "g (bfloat16[4] x) => (y) { y = HardSwish(x) }",
        "input 0 is BFLOAT16",
    ),
    "types": ("g (int64[4] x) => (y) { y = Sin(x) }", "input 0 is INT64"),
    "unknown type": ("g (uint16[4] x) => (y) { y = Add(x, x) }", "does not know"),
    "rank-pair-not": (
        "g (float[4] x, float[2,4,3] w) => (y) { y = MatMul(x, w) }",
        "ranks 1 and 3",
    ),
    "rank-in": ("g (float[4] x) => (y) { y = EyeLike(x) }", "has rank 1"),
    "static-shape": ("g (float[N,4] x) => (y) { y = EyeLike(x) }", "dynamic dimensions"),
    "attr-absent": (
        "g (float[1,2,3,8] q) => (y) { y = Attention<softmax_precision = 1>(q, q, q) }",
        "softmax_precision",
    ),
    "same-head-size": (
        "g (float[1,2,3,8] q, float[1,2,3,6] v) => (y) { y = Attention(q, q, v) }",
        "head sizes 8 of Q and K, 6 of V",
    ),
    "same-head-size of three": (
        "g (float[1,3,16] q, float[1,3,12] v) => (y) "
        "{ y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, q, v) }",
        "head sizes 8 of Q and K, 6 of V",
    ),
    "attr-matches": (
        'g (float[2,4] x) => (y) { y = Einsum<equation = "Ij->jI">(x) }',
        "does not match",
    ),
    "attr-halves": (
        "g (float[1,2,3] x, float[2,4,3] w, float[2,4,4] r) => (y) "
        '{ y = RNN<hidden_size = 4, direction = "bidirectional", activations = ["Tanh", "Relu"]>(x, w, r) }',
        "forward and reverse differ",
    ),
    "constant-is": (
        "g (float[4] x, bool t) => (y) <float r = {0.5}> { y = Dropout(x, r, t) }",
        "not a constant",
    ),
    "all-zero": (
        QUANTIZE.format(consts="float s = {0.5}, int8 z = {3}", axis=""),
        "zero point 3.0 is not 0",
    ),
    "all-positive": (
        QUANTIZE.format(consts="float s = {0.0}, int8 z = {0}", axis=""),
        "must be positive",
    ),
    "uint8": (
        QUANTIZE.format(consts="float s = {0.5}, uint8 z = {0}", axis=""),
        "UINT8",
    ),
    "per-tensor-activation": (
        QUANTIZE.format(consts=VECTOR, axis="<axis = 1>"),
        "one scale a channel",
    ),
    "scale-length": (
        "g () => (y) <int8[3,4] w = {0,1,2,3,4,5,6,7,8,9,10,11}, float[4] s = {1, 1, 1, 1}> "
        "{ y = DequantizeLinear<axis = 0>(w, s) }",
        "4 scales for 3 channels",
    ),
    "axis-written": (
        "g () => (y) <int8[3,4] w = {0,1,2,3,4,5,6,7,8,9,10,11}, float[4] s = {1, 1, 1, 1}> "
        "{ y = DequantizeLinear(w, s) }",
        "TensorRT takes axis 0",
    ),
    "bias": (
        "g () => (y) <int32[2] w = {1, 2}, float s = {1}> { y = DequantizeLinear(w, s) }",
        "INT32",
    ),
    "not supported": ("g (float[2,2] x) => (y) { y = Det(x) }", "Det is not supported"),
}
OPSETS = {
    "attr-absent": 23,
    "same-head-size": 23,
    "same-head-size of three": 23,
    "absent": 23,
    "absent past": 23,
    "mask-fits": 23,
    "mask of integers": 23,
    "window": 24,
}


@pytest.mark.parametrize("case", list(KEPT))
def test_rules_that_hold(case: str) -> None:
    text, opset = KEPT[case]
    assert not check(text, opset=opset).refused


@pytest.mark.parametrize("case", list(BROKEN))
def test_rules_that_are_broken(case: str) -> None:
    text, words = BROKEN[case]
    reasons = [fault.reason for fault in check(text, opset=OPSETS.get(case, 18)).refused]
    assert any(words in reason for reason in reasons), reasons


def test_scales_in_half_precision_need_opset_19() -> None:
    text = "g () => (y) <int8[2] w = {1, 2}, float16 s = {15360}> { y = DequantizeLinear(w, s) }"
    assert any("needs opset 19" in fault.reason for fault in check(text, opset=13).refused)
    assert not check(text, opset=19).refused


def test_four_bit_data_come_in_pairs() -> None:
    text = "g (int4[1,3] w) => (y) <float s = {1}> { y = DequantizeLinear(w, s) }"
    assert any("odd last dimension" in fault.reason for fault in check(text, opset=21).refused)


def test_float64_is_narrowed_with_a_warning() -> None:
    found = check("g (double[4] x) => (y) { y = Relu(x) }")
    assert found.verdict is Verdict.WARNING
    assert found.fixes == ("cast-doubles",)


def test_contrib_operators_are_not_the_parsers() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1, "trt.plugins" : 1]>'
        "g (float[4] x) => (y) { a = com.microsoft.Gelu(x)  y = trt.plugins.Mine(a) }"
    )
    gelu, mine = check_legality(load_model(proto), get_target("tensorrt")).refused
    assert gelu.fix == "expand-contrib"
    assert "plugin" in mine.remedy


def test_a_loop_that_changes_a_rank_is_refused() -> None:
    text = (
        "g (float[2] x) => (y) <int64 n = {2}, bool c = {1}> { y = Loop(n, c, x) <body = b "
        "(int64 i, bool d, float[2] s) => (bool e, t) "
        "{ e = Identity(d)  k = Constant<value_ints = [0]>()  t = Unsqueeze(s, k) }> }"
    )
    assert any("changes its rank" in fault.reason for fault in check(text).refused)


@pytest.mark.parametrize(
    ("text", "opset", "words"),
    [
        (KEPT["scales and zero points that are fed"][0], 18, "0 is computed with"),
        (KEPT["resize by scales of some axes"][0], 18, "all 4 axes"),
        (KEPT["a type that was seen to parse"][0], 18, "documentation does not list"),
        (IF.format(a="b", b="b = Neg(x)"), 18, "both branches call an output 'b'"),
        (
            IF.format(a="a", b="k = Constant<value_ints = [0]>() b = Unsqueeze(x, k)"),
            18,
            "have ranks 2 and 3",
        ),
        (
            "g (float[1,2,3,8] q, int64[1] n) => (y) { y = Attention(q, q, q, , , , n) }",
            24,
            "compare the numbers",
        ),
    ],
)
def test_what_parses_and_is_doubtful_is_said(text: str, opset: int, words: str) -> None:
    found = check(text, opset=opset)
    assert found.verdict is Verdict.WARNING
    assert any(words in each.reason for each in found.findings)


def test_four_bit_activations_may_have_a_scale_a_channel() -> None:
    text = (
        "g (float[4,2] x, int4[4] z) => (y) <float[4] s = {1, 1, 1, 1}> "
        "{ q = QuantizeLinear<axis = 0>(x, s, z)  y = DequantizeLinear<axis = 0>(q, s, z) }"
    )
    refused = check(text, opset=21).refused
    assert not any("one scale a channel" in fault.reason for fault in refused)
