"""The interpreter in torch against ONNX Runtime, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ModelError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.runtime.session import Session
from tests.rewriting import parse

torch = pytest.importorskip("torch", reason="distillation is tested where PyTorch is installed")

from graphopt.distill.interpret import Interpreter  # noqa: E402
from graphopt.distill.operators import OPERATORS  # noqa: E402

# (inputs, outputs, constants, nodes): one small model each; x has both signs, p is positive.
CASES = [
    ("float[2,6] x", "float[2,6]", "", "y = {op}(x)", op)
    for op in (
        *("Abs", "Atan", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "Identity", "Neg", "Relu"),
        *("Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Tanh", "HardSwish"),
        *("Mish", "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "HardSigmoid", "Gelu"),
        *("Round", "Softmax", "LogSoftmax", "Asinh", "ReduceMean", "ReduceMax", "ReduceSumSquare"),
        *("LpNormalization", "Reciprocal"),
    )
] + [
    ("float[2,6] x", "float[2,6]", "", text, text.split("(")[0].split("= ")[-1])
    for text in (
        "y = Add(x, x)",
        "a = Exp(x) y = Div(x, a)",
        "a = Exp(x) y = Log(a)",
        "a = Abs(x) y = Sqrt(a)",
        "a = Abs(x) b = Add(a, a) y = Pow(a, b)",
        "y = Max(x, x)",
        "a = Neg(x) y = Min(x, a)",
        "a = Neg(x) y = Mean(x, a)",
        "y = Sum(x, x, x)",
        "a = Neg(x) b = Greater(x, a) y = Where(b, x, a)",
        "a = Neg(x) b = Less(x, a) c = Not(b) y = Cast<to=1>(c)",
        "a = Tanh(x) y = Asin(a)",
        "a = Tanh(x) y = Acos(a)",
        "a = Tanh(x) y = Atanh(a)",
        "y = Clip(x)",
        "y = CumSum(x, one)",
        "y = Trilu(x)",
        "y = Dropout(x)",
        "a = Shape(x) y = Expand(x, a)",
        "a = Transpose(x) y = Transpose(a)",
        "y = Slice(x, zeros, sixes, axes01)",
        "a = Slice(x, last, first, axis1, minus) y = Tanh(a)",
        "a, b = Split<axis=1, num_outputs=2>(x) y = Concat<axis=1>(b, a)",
        "a = Unsqueeze(x, one1) y = Squeeze(a, one1)",
        "a = Flatten<axis=0>(x) b = Shape(x) y = Reshape(a, b)",
        "a = Gather<axis=1>(x, perm) y = Tanh(a)",
        "s = Shape(x) n = Gather(s, one) a = Cast<to=1>(n) y = Div(x, a)",
        "a = Tile(x, twos) y = Slice(a, zeros, sixes, axes01)",
        "a = Pad(x, pads) y = Slice(a, ones2, sevens, axes01)",
        "a = Range(zero, six, one) b = Cast<to=1>(a) y = Add(x, b)",
        "a = ConstantOfShape(sixes1) y = Add(x, a)",
        "a = GatherElements<axis=1>(x, places) b = Mul(x, half) y = Add(b, a)",
        "a, b = TopK<axis=1>(x, six1) y = Tanh(a)",
        "a = ArgMax<axis=1>(x) b = Cast<to=1>(a) y = Add(x, b)",
        "y = ScatterElements<axis=1>(x, places, x)",
        "y = ScatterND(x, rows, x)",
        "a = GatherND(x, rows) y = Tanh(a)",
        "a = OneHot(ids, six, values) b = Cast<to=1>(a) y = Add(x, b)",
        "a = ReduceSum<keepdims=1>(x, one1) y = Sub(x, a)",
        "a = ReduceL2<keepdims=1>(x, one1) y = Mul(x, a)",
        "a = ReduceLogSumExp<keepdims=1>(x, one1) y = Sub(x, a)",
        "a = ReduceMin<keepdims=1>(x, one1) y = Sub(x, a)",
        "a = ReduceL1<keepdims=1>(x, one1) y = Sub(x, a)",
        "a = ReduceProd<keepdims=1>(x, one1) y = Sub(x, a)",
        "y = PRelu(x, slope)",
        "y = MatMul(x, square)",
        "y = Gemm<alpha=0.5, transB=1>(x, square, slope)",
        "y = LayerNormalization(x, slope, slope)",
        'y = Einsum<equation="ij,jk->ik">(x, square)',
        "y = Mod<fmod=1>(x, slope)",
        "a = QuantizeLinear(x, scale, point) y = DequantizeLinear(a, scale, point)",
    )
]
CONSTANTS = """int64 one = {1}, int64 zero = {0}, int64 six = {6}, int64[1] one1 = {1}, int64[1] six1 = {6},
    int64[2] zeros = {0,0}, int64[2] sixes = {2,6}, int64[2] sixes1 = {2,6}, int64[2] axes01 = {0,1},
    int64[1] last = {5},
    int64[1] first = {-9}, int64[1] axis1 = {1}, int64[1] minus = {-1}, int64[6] perm = {5,4,3,2,1,0},
    int64[2] twos = {2,2}, int64[4] pads = {1,1,1,1}, int64[2] ones2 = {1,1}, int64[2] sevens = {3,7},
    int64[2,6] places = {5,4,3,2,1,0,0,1,2,3,4,5}, int64[2,1] rows = {1,0}, int64[2] ids = {3,5},
    float[2] values = {0.0,1.0}, float[6] slope, float[6,6] square, float half = {0.5}, float scale = {0.05},
    int8 point = {3}"""


IMAGES = [
    "y = Conv<pads=[1,1,1,1]>(x, w)",
    'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)',
    "y = Conv<pads=[0,1,1,0], dilations=[2,2]>(x, w, b)",
    "y = Conv<group=8, pads=[1,1,1,1]>(x, d)",
    "y = ConvTranspose<strides=[2,2], pads=[1,0,0,1], output_padding=[1,1]>(x, t)",
    "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)",
    "y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)",
    "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)",
    "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)",
    "y = GlobalAveragePool(x)",
    "y = GlobalMaxPool(x)",
    "y = BatchNormalization(x, b, b, b, v)",
    "y = InstanceNormalization(x, b, b)",
    "y = GroupNormalization<num_groups=4>(x, b, b)",
    "y = LRN<size=3>(x)",
    "y = DepthToSpace<blocksize=2>(x)",
    "y = SpaceToDepth<blocksize=7>(x)",
    'y = Resize<mode="nearest">(x, , scales)',
]
IMAGE_CONSTANTS = """float[4,8,3,3] w, float[4] b4, float[8] b, float[8] v, float[8,1,3,3] d, float[8,4,3,3] t,
    float[4] scales = {1.0,1.0,2.0,2.0}"""


def agree(text: str, feeds: Mapping[str, np.ndarray[Any, Any]], opset: int = 21) -> None:
    proto = parse(text, opset=opset)
    rng = np.random.default_rng(2)
    for tensor in proto.graph.initializer:
        if tensor.data_type == 1 and len(tensor.dims) and tensor.name not in ("values", "scales"):
            array = np.abs(rng.standard_normal(tuple(tensor.dims))).astype(np.float32) + 0.1
            tensor.ClearField("float_data")
            tensor.raw_data = array.tobytes()
    model = load_model(proto)
    want = Session(model_to_bytes(model)).run(feeds)
    got = Interpreter(model).run({n: torch.tensor(a) for n, a in feeds.items()}, {})
    for name, array in want.items():
        np.testing.assert_allclose(got[name].numpy(), array, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=[case[4] + str(i) for i, case in enumerate(CASES)])
def test_operators_compute_what_the_runtime_computes(case: tuple[str, str, str, str, str]) -> None:
    given, _, _, nodes, op = case
    text = nodes.format(op=op)
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    agree(f"g ({given}) => (float y) <{CONSTANTS}> {{ {text} }}", {"x": x})


@pytest.mark.parametrize("node", IMAGES)
def test_operators_on_images_compute_what_the_runtime_computes(node: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 8, 7, 7)).astype(np.float32)
    node = node.replace("(x, w, b)", "(x, w, b4)")
    agree(f"g (float[2,8,7,7] x) => (float y) <{IMAGE_CONSTANTS}> {{ {node} }}", {"x": x})


RECURRENT = """float[6] h0, float[2,5,12] wr, float[2,5,5] rr, float[2,10] br, float[2,15,12] wg, float[2,15,5] rg,
    float[2,30] bg, float[2,20,12] wl, float[2,20,5] rl, float[2,40] bl, float[2,15] pl, float[1,15,12] w1,
    float[1,15,5] r1, float[2,3,5] s"""


@pytest.mark.parametrize(
    "node",
    [
        'y, h = RNN<hidden_size=5, direction="bidirectional">(x, wr, rr, br)',
        'y, h = RNN<hidden_size=5, direction="bidirectional", activations=["Relu", "Tanh"]>(x, wr, rr)',
        'y, h = GRU<hidden_size=5, direction="bidirectional", linear_before_reset=1>(x, wg, rg, bg, , s)',
        'y, h = GRU<hidden_size=5, direction="bidirectional">(x, wg, rg, bg)',
        'y, h = GRU<hidden_size=5, direction="reverse">(x, w1, r1)',
        'y, h, c = LSTM<hidden_size=5, direction="bidirectional">(x, wl, rl, bl, , s, s)',
        'y, h, c = LSTM<hidden_size=5, direction="bidirectional">(x, wl, rl, bl, , s, s, pl)',
    ],
)
def test_recurrent_operators_compute_what_the_runtime_computes(node: str) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 12)).astype(np.float32)
    agree(f"g (float[4,3,12] x) => (float y, float h) <{RECURRENT}> {{ {node} }}", {"x": x})


HEADS = "float[2,3,3,4] past, float[3,6] mask, bool[3,3] seen = {1,0,0,1,1,0,1,1,1}, float[3,3] add, float[8,2] cos, "
HEADS += "float[8,2] sin, float[8,1] cos1, float[8,1] sin1, float[36] bias, int64[2,3] at = {3,1,0,7,2,5}, "
HEADS += "int64[1] from = {2}"


@pytest.mark.parametrize(
    "node",
    [
        "y = Attention<q_num_heads=3, kv_num_heads=3>(x, x, x)",
        "y = Attention<q_num_heads=3, kv_num_heads=3, is_causal=1, softcap=2.0>(x, x, x)",
        "y = Attention<q_num_heads=3, kv_num_heads=3>(x, x, x, seen)",
        "y = Attention<q_num_heads=3, kv_num_heads=3, scale=0.3>(x, x, x, add)",
        "y, k, v = Attention<q_num_heads=3, kv_num_heads=3, is_causal=1>(x, x, x, , past, past)",
        "y = RotaryEmbedding<num_heads=3>(x, cos, sin, at)",
        "y = RotaryEmbedding<num_heads=3, interleaved=1>(x, cos, sin, at)",
        "y = RotaryEmbedding<num_heads=3, rotary_embedding_dim=2>(x, cos1, sin1, at)",
        "y = com.microsoft.RotaryEmbedding(x, at, cos, sin)",
        "y = com.microsoft.RotaryEmbedding<interleaved=1>(x, from, cos, sin)",
        "y = com.microsoft.MultiHeadAttention<num_heads=3>(x, x, x, bias)",
        "y = com.microsoft.MultiHeadAttention<num_heads=3, unidirectional=1, scale=0.3>(x, x, x)",
        "c = CastLike(at, x) d = ReduceMean<keepdims=0>(c) y = Mul(x, d)",
    ],
)
def test_attention_computes_what_the_runtime_computes(node: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    text = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> g (float[2,3,12] x) => (float[2,3,12] y)'
    agree(f"{text} <{HEADS}> {{ {node} }}", {"x": x})


@pytest.mark.parametrize(
    "activation", ['"Relu"', '"Sigmoid"', '"LeakyRelu", activation_params=[0.2]', '"Tanh"']
)
def test_fused_convolutions_compute_what_the_runtime_computes(activation: str) -> None:
    node = f"y = com.microsoft.FusedConv<activation={activation}>(x, w, b4)"
    x = np.random.default_rng(0).standard_normal((2, 8, 7, 7)).astype(np.float32)
    text = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g (float[2,8,7,7] x) => (float y)'
    agree(f"{text} <{IMAGE_CONSTANTS}> {{ {node} }}", {"x": x})


CONTROL = {
    "if": """z = ReduceSum<keepdims=0>(x)  zero = Constant<value_float=0.0>()  c = Greater(z, zero)
        a = Mul(x, w)
        y = If(c) <then_branch = t () => (p) { p = Add(a, x) }, else_branch = e () => (p) { p = Mul(a, x) }>""",
    "loop": """n = Constant<value_int=3>()  go = Constant<value = bool {1}>()
        y, rows = Loop(n, go, x) <body = b (int64 i, bool c, float[2,6] s) => (bool d, float[2,6] t, float[2,6] r) {
            d = Identity(c)  t = Mul(s, w)  r = Add(t, x) }>""",
    "while": """n = Constant<value_int=9>()  go = Constant<value = bool {1}>()  two = Constant<value_int=2>()
        y = Loop(n, go, x) <body = b (int64 i, bool c, float[2,6] s) => (bool d, float[2,6] t) {
            d = Less(i, two)  t = Mul(s, w) }>""",
    "scan": """f = Constant<value_floats=[0.0,0.0]>()
        q, y = Scan<num_scan_inputs=1, scan_input_axes=[1], scan_input_directions=[1], scan_output_axes=[1],
            scan_output_directions=[1],
            body = b (float[2] s, float[2] c) => (float[2] t, float[2] r) { t = Add(s, c)  r = Tanh(t) }>(f, x)""",
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", list(CONTROL))
def test_control_flow_computes_what_the_runtime_computes(kind: str, sign: int) -> None:
    x = sign * np.abs(np.random.default_rng(0).standard_normal((2, 6))).astype(np.float32)
    agree(f"g (float[2,6] x) => (float[2,6] y) <float[6] w> {{ {CONTROL[kind]} }}", {"x": x})


def test_gradients_pass_through_branches() -> None:
    text = f"g (float[2,6] x) => (float[2,6] y) <float[6] w> {{ {CONTROL['if']} }}"
    weight = torch.ones(6, requires_grad=True)
    made = Interpreter(load_model(parse(text))).run({"x": torch.ones(2, 6)}, {"w": weight})
    made["y"].sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad == 2).all())


def test_loops_that_make_no_turn_have_no_rows() -> None:
    text = f"g (float[2,6] x) => (float[2,6] y) <float[6] w> {{ {CONTROL['loop']} }}"
    model = load_model(parse(text.replace("value_int=3", "value_int=0")))
    with pytest.raises(ModelError, match="does not know this form"):
        Interpreter(model).run({"x": torch.ones(2, 6)}, {})


@pytest.mark.parametrize(
    "node",
    [
        "y, h = GRU<hidden_size=5, clip=1.0>(x, w1, r1)",
        'y, h = GRU<hidden_size=5, activations=["Sigmoid", "Softsign"]>(x, w1, r1)',
        'y, h, c = LSTM<hidden_size=5, direction="bidirectional", input_forget=1>(x, wl, rl)',
    ],
)
def test_refuses_forms_of_recurrent_operators(node: str) -> None:
    text = f"g (float[4,3,12] x) => (float y, float h) <{RECURRENT}> {{ {node} }}"
    with pytest.raises(ModelError, match="does not know this form"):
        Interpreter(load_model(parse(text))).run({"x": torch.ones(4, 3, 12)}, {})


def test_knows_sixty_operators() -> None:
    assert len(OPERATORS) >= 60
