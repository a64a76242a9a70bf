"""What exporters really write: small layers out of torch 2.13, by TorchScript and torch.export, and what is left.

Files are named after the layer, the exporter (ts, dy), its opset, `h` for half precision and `d` for dynamic axes;
large weights are drawn by the parser of the tests.
"""

from __future__ import annotations

import collections
from pathlib import Path

import onnx_ir as ir
import pytest

import graphopt
from graphopt.numerics import Numerics
from tests.rewriting import compare, make_feeds, parse, run

FOLDER = Path(__file__).with_name("exports")
LEFT = {
    "bertemb_ts17": "Add Gather*2 LayerNormalization Sum",
    "bloom_ts17d": "Add*2 And Attention Cast*2 CumSum Flatten Gather*5 LayerNormalization*2 LessOrEqual"
    " MatMul*2 Max Mul*3 Range*2 Reshape*7 Shape*2 Squeeze*2 Sub Unsqueeze*5 Where",
    "cache_ts17": "Add*4 Attention MatMul*4 Reshape*4",
    "codegen_ts17d": "Add And Attention Cast Div Expand*2 Flatten Gather*3 LayerNormalization LessOrEqual"
    " MatMul*2 Mul Range*2 Reshape*5 RotaryEmbedding*2 Shape*3 Split*2 Squeeze*2 Unsqueeze*4"
    " Where",
    "convbn_dy20": "Conv*2 HardSwish QuickGelu",
    "cross_dy20": "Add*4 Attention MatMul*4",
    "dec_layer_dy20": "Add*5 Attention*2 LayerNormalization*3 MatMul*7 Relu Slice*5 Sum*3",
    "decoder_sdpa_ts17d": "Add*2 Cast*3 Concat Cos Expand*3 GroupQueryAttention MatMul*7 Min Mul*3"
    " QuickGelu RMSNormalization*2 Range RotaryEmbedding*2 Shape*2 Sin Squeeze*2 Sub Unsqueeze*3",
    "eager_alibi_ts17d": "Add*3 Attention MatMul*4 Shape Slice*2",
    "eager_causal_ts17d": "Add*4 Cast*2 Expand GroupQueryAttention MatMul*4 Min Mul Shape*2 Squeeze"
    " Sub",
    "eager_einsum_dy20": "Add*3 Attention MatMul*4",
    "eager_gpt2min_ts17d": "Add*3 Cast*2 Expand GroupQueryAttention MatMul*4 Min Mul Shape*2 Squeeze"
    " Sub",
    "eager_sm32_dy20": "Add*5 Attention MatMul*4 Max ReduceMax Sub",
    "eager_sm32_ts13": "Add*5 Attention MatMul*4 Max ReduceMax Sub",
    "enc_layer_dy20": "Add*3 Attention Gelu LayerNormalization*2 MatMul*4 Slice*3 Sum*2",
    "focus_ts17": "Conv Gather QuickGelu SpaceToDepth",
    "gelu_new_dy20": "Gelu",
    "gelu_new_ts13": "FastGelu",
    "gptj_ts17d": "Add And Attention Cast Expand*2 Flatten Gather*2 GatherElements LayerNormalization"
    " LessOrEqual MatMul*4 Max Mul Range*2 Reshape RotaryEmbedding*2 Shape*3 Split Squeeze*2"
    " Tile Unsqueeze*4 Where",
    "hardswish_py_ts17": "HardSigmoid Mul",
    "ln_cf_dy20": "LayerNormalization Transpose*2",
    "ln_cf_ts13": "LayerNormalization Transpose*2",
    "ln_tf_ts13": "LayerNormalization",
    "mha_dy20": "Add Attention MatMul*2 Slice*3",
    "mha_pad_ts17": "Add*3 Attention Expand MatMul*2 Max ReduceMax Reshape Slice*3 Sub Where",
    "mha_ts17": "Add*2 Attention MatMul*2 Slice*3",
    "mha_weights_dy23": "Add Attention MatMul*2 Slice*3",
    "mha_weights_ts13": "Add*2 Attention MatMul*2 Slice*3",
    "mish_py_dy20": "Mul Softplus Tanh",
    "mobilebert_ts17d": "Add*3 And Attention Cast Concat ConstantOfShape Flatten Gather*4 GreaterOrEqual MatMul*6"
    " Mul Pad*2 Range*2 Reshape Shape*3 Slice*3 Squeeze*2 Unsqueeze*3 Where",
    "mpt_ts17d": "Add And Attention Cast*2 Flatten Gather*2 LayerNormalization LessOrEqual MatMul*2 Max"
    " Mul Range*2 Reshape Shape*2 Slice*4 Squeeze*2 Sub Unsqueeze*4 Where*2",
    "openai_gpt_ts17d": "Add*3 Attention Cast*2 Gather*2 MatMul*2 Max Mul ReduceMax Shape Slice*3 Split Sub*2"
    " Unsqueeze Where",
    "packed_chunk_dy20": "Add*2 Attention MatMul*2 Split",
    "packed_index_ts17": "Add*2 Attention MatMul*2 Slice*3",
    "packed_unbind_dy20h": "Add*2 Attention MatMul*2 Slice*3",
    "packed_unbind_ts17": "Add*2 Attention MatMul*2 Split",
    "pixelshuffle_ts13": "DepthToSpace",
    "pixelunshuffle_ts17d": "Gather SpaceToDepth",
    "resgn_dy20": "Add*4 Conv*2 Gemm InstanceNormalization*2 Mul*2 QuickGelu*3 Reshape*4 Unsqueeze",
    "resgn_ts17": "Add*4 Conv*2 Gemm InstanceNormalization*2 Mul*2 QuickGelu*3 Reshape*4 Unsqueeze",
    "rms_hf_dy20": "RMSNormalization",
    "rms_hf_dy20h": "RMSNormalization",
    "rope_half_ts17d": "Add*4 Attention Cast Concat Cos Expand*2 MatMul*4 Mul Range RotaryEmbedding*2"
    " Shape*2 Sin Squeeze Unsqueeze*3",
    "rope_halves_ts17d": "Concat Cos Expand*2 Reshape*3 RotaryEmbedding Shape*2 Sin Slice"
    " Transpose",
    "rope_inter_dy20": "Add*4 Attention MatMul*4 RotaryEmbedding*2",
    "sdpa_bool_dy20": "Add*4 Attention MatMul*4 Max Where",
    "sdpa_causal_dy23": "Add*4 GroupQueryAttention MatMul*4",
    "sdpa_causal_ts17d": "Add*4 Cast*2 Expand GroupQueryAttention MatMul*4 Min Mul Shape*2 Squeeze"
    " Sub",
    "sdpa_dy20": "Add*4 Attention MatMul*4",
    "sdpa_dy20h": "Add*4 Attention MatMul*4",
    "sdpa_dy23": "Add*4 Attention MatMul*4",
    "sdpa_float_dy23": "Add*4 Attention MatMul*4",
    "sdpa_float_ts17": "Add*5 Attention MatMul*4 Max ReduceMax Sub",
    "sdpa_gqa_dy20": "Add*4 Attention MatMul*4",
    "sdpa_repkv_ts17": "Add*4 Attention MatMul*4",
    "sdpa_ts17": "Add*4 Attention MatMul*4",
    "softplus_dy20": "Softplus",
    "swin_dy20": "Add*5 Attention Gelu LayerNormalization*2 MatMul*4 Reshape*4 Slice*3 Sum"
    " Transpose*2",
    "swin_shift_dy20": "Add*5 Attention Concat*4 Gelu LayerNormalization*2 MatMul*4 Reshape*4 Slice*11"
    " Sum Transpose*2",
    "swin_ts17": "Add*5 Attention Gelu LayerNormalization*2 MatMul*4 Reshape*4 Split Sum"
    " Transpose*2",
    "t5_dy20": "Attention MatMul*4",
    "t5_ts13": "Add*2 Attention Cast MatMul*4 Max Mul ReduceMax Sub*2 Unsqueeze",
    "xglm_ts17d": "Add*2 And Attention Cast Flatten Gather*3 LayerNormalization LessOrEqual MatMul*4 Max"
    " Mul*2 Range*2 Reshape*3 Shape*2 Squeeze*2 Sum Unsqueeze*4 Where",
    "xlm_ts17d": "Attention Cast Equal Expand Gather*2 LayerNormalization MatMul*4 Mul Reshape Shape*2"
    " Slice Sum Unsqueeze Where",
}
"""What is left on the CPU."""


def _made(name: str, target: str) -> tuple[str, graphopt.Result]:
    proto = parse((FOLDER / f"{name}.onnxtxt").read_text())
    made = graphopt.optimize(proto, target=target, verify="off")
    counts = collections.Counter(node.op_type for node in made.model.graph)
    return " ".join(f"{k}*{n}" if n > 1 else k for k, n in sorted(counts.items())), made


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.iterdir()))
def test_exported_layer_fuses(name: str) -> None:
    text, made = _made(name, "cpu")
    assert text == LEFT[name]
    proto = parse((FOLDER / f"{name}.onnxtxt").read_text())
    feed = make_feeds(proto, 0, dim=16)
    half = name.endswith("h")
    got = run(ir.to_proto(made.model), feed)
    compare(run(proto, feed), got, Numerics.REORDERED, 2e-2 if half else 2e-5)


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
@pytest.mark.parametrize("name", ["sdpa_dy20", "cross_dy20", "mha_dy20", "sdpa_gqa_dy20"])
def test_attention_fuses_on_other_targets(name: str, target: str) -> None:
    assert "Attention" in _made(name, target)[0].split()
