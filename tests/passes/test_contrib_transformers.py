"""Attention and embeddings of com.microsoft as standard operators: the same numbers, nothing of that domain left."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import contrib_transformers

from graphopt.numerics import Numerics
from graphopt.rewrite import RemarkKind
from tests.rewriting import apply, compare, parse, run

HEAD = '<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
PACKED = "<float[8,24] w, float[24] b> "
EMBED = (
    "<float[9,8] words, float[7,8] places, float[2,8] kinds, float[8] ga, float[8] be> "
    "{ y, n = com.microsoft.EmbedLayerNormalization<epsilon = 0.001>(ids, seg, words, places, kinds, ga, be, mask) }"
)

SAME = {
    "attention": (
        "g (float[2,3,8] x) => (float[2,3,8] y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 2>(x, w, b) }",
        (12, 18),
    ),
    "attention with a mask": (
        "g (float[2,3,8] x, int32[2,3] m) => (float[2,3,8] y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 2, scale = 0.3>(x, w, b, m) }",
        (18,),
    ),
    "attention with a mask of pairs": (
        "g (float[2,3,8] x, int32[2,3,3] m) => (float[2,3,8] y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 4>(x, w, b, m) }",
        (18,),
    ),
    "attention to the past": (
        "g (float[2,N,8] x) => (float[2,N,8] y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 2, unidirectional = 1>(x, w, b) }",
        (18,),
    ),
    "attention with a bias": (
        "g (float[2,3,8] x, float[1,2,3,3] a) => (float[2,3,8] y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 2>(x, w, b, , , a) }",
        (18,),
    ),
    "attention of other sizes": (
        "g (float[2,3,8] x) => (float[2,3,4] y) <float[8,20] w, float[20] b> "
        "{ y = com.microsoft.Attention<num_heads = 2, qkv_hidden_sizes = [8, 8, 4]>(x, w, b) }",
        (18,),
    ),
    "attention with lengths": (
        "g (float[2,3,8] x, int32[2] m) => (float[2,3,8] y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 2>(x, w, b, m) }",
        (18,),
    ),
    "attention with a cache": (
        "g (float[2,3,8] x, float[2,2,2,5,4] p) => (float[2,3,8] y, float[2,2,2,8,4] z) "
        + PACKED
        + "{ y, z = com.microsoft.Attention<num_heads = 2, unidirectional = 1>(x, w, b, , p) }",
        (12, 18),
    ),
    "attention that begins a cache": (
        "g (float[2,3,8] x) => (float[2,3,8] y, float[2,2,2,3,4] z) "
        + PACKED
        + "{ y, z = com.microsoft.Attention<num_heads = 2, unidirectional = 1>(x, w, b) }",
        (18,),
    ),
    "heads with a cache": (
        "g (float[2,3,8] q, float[2,2,5,4] a, float[2,2,5,4] b) => (float[2,3,8] y, float[2,2,8,4] c, float[2,2,8,4] d)"
        "{ y, c, d = com.microsoft.MultiHeadAttention<num_heads = 2>(q, q, q, , , , a, b) }",
        (18,),
    ),
    "heads to another sequence": (
        "g (float[2,3,8] q, float[2,2,5,4] a, float[2,2,5,4] b) => (float[2,3,8] y)"
        "{ y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, a, b) }",
        (18,),
    ),
    "heads": (
        "g (float[2,3,8] q, float[2,5,8] k, float[2,5,8] v) => (float[2,3,8] y) <float[24] b> "
        "{ y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v, b) }",
        (12, 18),
    ),
    "heads with a mask and a bias": (
        "g (float[2,3,8] q, float[2,5,8] k, float[2,5,8] v, int32[2,5] m, float[1,2,3,5] a) => (float[2,3,8] y) "
        "{ y = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v, , m, a) }",
        (18,),
    ),
    "embeddings": (
        "g (int32[2,3] ids, int32[2,3] seg, int32[2,3] mask) => (float[2,3,8] y, int32[2] n) "
        + EMBED,
        (12, 18),
    ),
    "embeddings with places": (
        "g (int32[2,3] ids, int32[2,3] mask, int32[2,3] pos) => (float[2,3,8] y, int32[2] n) "
        "<float[9,8] words, float[7,8] places, float[8] ga, float[8] be> "
        "{ y, n = com.microsoft.EmbedLayerNormalization(ids, , words, places, , ga, be, mask, pos) }",
        (18,),
    ),
    "skip norm in parts": (
        "g (float[2,3,8] x, float[2,3,8] s) => (float[2,3,8] y, float[2,3,8] t) "
        "<float[8] ga, float[8] be, float[8] b> "
        "{ y, m, v, t = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(x, s, ga, be, b) }",
        (12,),
    ),
    "skip rms": (
        "g (float[2,3,8] x, float[2,3,8] s) => (float[2,3,8] y, float[2,3,8] t) <float[8] ga> "
        "{ y, m, v, t = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.001>(x, s, ga) }",
        (18, 23),
    ),
    "rms": (
        "g (float[2,3,8] x) => (float[2,3,8] y) <float[8] ga> "
        "{ y = SimplifiedLayerNormalization<epsilon = 0.001>(x, ga) }",
        (18,),
    ),
}

KEPT = {
    "a cache in place": (
        "g (float[2,3,8] x, float[2,2,2,9,4] p, int32[1] n) => (y, z) "
        + PACKED
        + "{ y, z = com.microsoft.Attention<num_heads = 2, past_present_share_buffer = 1>(x, w, b, , p, , n) }",
        "written in place",
    ),
    "begins and ends as a mask": (
        "g (float[2,3,8] x, int32[4] m) => (y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 2>(x, w, b, m) }",
        "a mask of rank 1",
    ),
    "rotary": (
        "g (float[2,3,8] x) => (y) "
        + PACKED
        + "{ y = com.microsoft.Attention<num_heads = 2, do_rotary = 1>(x, w, b) }",
        "rotary positions within",
    ),
    "packed heads": (
        "g (float[2,3,2,3,4] q) => (y) { y = com.microsoft.MultiHeadAttention<num_heads = 2>(q) }",
        "packed queries",
    ),
    "a cache of heads in place": (
        "g (float[2,3,8] q, float[2,2,9,4] p, int32[1] n) => (y, a, b) "
        "{ y, a, b = com.microsoft.MultiHeadAttention<num_heads = 2>(q, q, q, , , , p, p, n) }",
        "written in place",
    ),
    "a count without a mask": (
        "g (int32[2,3] ids, int32[2,3] seg) => (y, n) " + EMBED.replace(", mask)", ")"),
        "there is no mask",
    ),
    "mean of a skip norm": (
        "g (float[2,3,8] x) => (y, m) <float[8] ga> "
        "{ y, m = com.microsoft.SkipSimplifiedLayerNormalization(x, x, ga) }",
        "mean or deviation is used",
    ),
    "deviation of a norm": (
        "g (float[2,3,8] x) => (y, m) <float[8] ga> { y, m = SimplifiedLayerNormalization(x, ga) }",
        "the deviation is used",
    ),
    "a norm of another axis": (
        "g (float[2,3,8] x) => (y) <float[8] ga> { y = SimplifiedLayerNormalization<axis = 1>(x, ga) }",
        "other than the last",
    ),
}


def feeds(proto: onnx.ModelProto, seed: int) -> dict[str, Any]:
    """Floats from a normal distribution; masks and ids of 0 and 1, the first always kept."""
    draw = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for info in proto.graph.input:
        kind = info.type.tensor_type
        dims = [d.dim_value or 3 for d in kind.shape.dim]
        if kind.elem_type == onnx.TensorProto.FLOAT:
            found[info.name] = draw.standard_normal(dims).astype(np.float32)
        else:
            held = draw.integers(0, 2, dims).astype(np.int32)
            held[..., 0] = 1
            found[info.name] = held
    return found


def check_same(proto: onnx.ModelProto, tolerance: float = 4e-6) -> ir.Model:
    model = ir.from_proto(proto)
    ctx = apply(contrib_transformers.RULES, model, target="portable")
    assert ctx.rewrites, [remark.reason for remark in ctx.remarks]
    assert not any(node.domain for node in model.graph)
    after = ir.to_proto(model)
    for seed in range(2):
        feed = feeds(proto, seed)
        compare(run(proto, feed), run(after, feed), Numerics.REORDERED, tolerance)
    assert not apply(contrib_transformers.RULES, model, target="portable").rewrites
    return model


@pytest.mark.parametrize("case", [(name, opset) for name in SAME for opset in SAME[name][1]])
def test_the_numbers_stay(case: tuple[str, int]) -> None:
    name, opset = case
    check_same(parse(HEAD.format(opset=opset) + SAME[name][0]))


@pytest.mark.parametrize("case", list(SAME))
def test_targets_with_kernels_keep_them(case: str) -> None:
    text, opsets = SAME[case]
    model = ir.from_proto(parse(HEAD.format(opset=opsets[0]) + text))
    assert not apply(contrib_transformers.RULES, model, target="cpu").rewrites


@pytest.mark.parametrize("case", list(KEPT))
def test_what_has_no_standard_form_stays(case: str) -> None:
    text, reason = KEPT[case]
    model = ir.from_proto(parse(HEAD.format(opset=18) + text))
    ctx = apply(contrib_transformers.RULES, model, target="portable")
    assert not ctx.rewrites
    reasons = [r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED]
    assert any(reason in each for each in reasons), reasons


def nbits(zeros: bool, **attributes: int) -> onnx.ModelProto:
    """A MatMulNBits of 5 columns and 32 rows in blocks of 16."""
    draw = np.random.default_rng(5)
    made: dict[str, np.ndarray[Any, Any]] = {
        "w": draw.integers(0, 256, (5, 2, 8)).astype(np.uint8),
        "s": draw.uniform(0.5, 1, 10).astype(np.float32),
    }
    if zeros:
        made["z"] = draw.integers(0, 256, 5).astype(np.uint8)
    settings: dict[str, Any] = {"K": 32, "N": 5, "bits": 4, "block_size": 16, **attributes}
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *made],
        ["y"],
        domain="com.microsoft",
        **settings,
    )
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 32])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 5])],
        [onnx.numpy_helper.from_array(array, name) for name, array in made.items()],
    )
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize("zeros", [False, True])
def test_weights_of_four_bits_are_dequantised_in_blocks(zeros: bool) -> None:
    model = check_same(nbits(zeros), 2e-5)
    (node,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    held = node.inputs[0]
    assert held is not None
    assert held.dtype == (ir.DataType.UINT4 if zeros else ir.DataType.INT4)
    assert len(node.inputs) == (3 if zeros else 2)


def test_eight_bits_stay() -> None:
    model = ir.from_proto(nbits(False, bits=8))
    ctx = apply(contrib_transformers.RULES, model, target="portable")
    assert not ctx.rewrites
    assert any("4 bits" in remark.reason for remark in ctx.remarks)
