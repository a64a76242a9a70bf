"""Shapes of ONNX Runtime's own operators: what is inferred is what it computes, at every size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.ir.shapes import Shapes
from tests.ir.shape_truth import lies, run_all
from tests.rewriting import parse

HEAD = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]> '
SIZES = ({"B": 1, "S": 3, "T": 2, "H": 5, "P": 4}, {"B": 2, "S": 4, "T": 5, "H": 3, "P": 1})
Q8 = "float s = {0.1}, uint8 z = {3}"

# Inputs, weights, nodes; the dims of the last node's first output.
CASES = {
    "BiasGelu": ("float[B,S,8] x", "float[8] b", "y = com.microsoft.BiasGelu(x, b)", "B,S,8"),
    "FastGelu": ("float[B,S,8] x", "", "y = com.microsoft.FastGelu(x)", "B,S,8"),
    "Trilu": ("float[B,S,T] x", "", "y = com.microsoft.Trilu(x)", "B,S,T"),
    "FusedMatMul": ("float[B,S,4] x, float[B,T,4] k", "", "y = com.microsoft.FusedMatMul<transB=1>(x, k)", "B,S,T"),
    "FusedMatMul of a transposed": (
        "float[B,4,S] x, float[4,T] k", "", "y = com.microsoft.FusedMatMul<transA=1>(x, k)", "B,S,T"),
    "FusedMatMul of batches inside": (
        "float[S,B,4] x, float[B,4,T] k", "", "y = com.microsoft.FusedMatMul<transBatchA=1>(x, k)", "?"),
    "SimplifiedLayerNormalization": (
        "float[B,S,8] x", "float[8] g", "y, r = SimplifiedLayerNormalization<axis=-1>(x, g)", "B,S,8"),
    "SkipLayerNormalization": (
        "float[B,S,8] x, float[B,S,8] r", "float[8] g",
        "y, m, v, t = com.microsoft.SkipLayerNormalization(x, r, g)", "B,S,8"),
    "SkipSimplifiedLayerNormalization": (
        "float[B,S,8] x, float[B,S,8] r", "float[8] g",
        "y, , , t = com.microsoft.SkipSimplifiedLayerNormalization(x, r, g)", "B,S,8"),
    "EmbedLayerNormalization": (
        "int32[B,S] i, int32[B,S] j, int32[B,S] k", "float[9,8] w, float[9,8] p, float[9,8] t, float[8] g, float[8] b",
        "y, m = com.microsoft.EmbedLayerNormalization(i, j, w, p, t, g, b, k)", "B,S,8"),
    "Attention": (
        "float[B,S,8] x", "float[8,24] w, float[24] b", "y = com.microsoft.Attention<num_heads=2>(x, w, b)", "B,S,8"),
    "Attention with a past": (
        "float[B,S,8] x, float[2,B,2,P,4] q", "float[8,24] w, float[24] b",
        "y, p = com.microsoft.Attention<num_heads=2, unidirectional=1>(x, w, b, , q)", "B,S,8"),
    "Attention of other sizes": (
        "float[B,S,8] x", "float[8,20] w, float[20] b",
        "y = com.microsoft.Attention<num_heads=2, qkv_hidden_sizes=[8,8,4]>(x, w, b)", "B,S,4"),
    "MultiHeadAttention": (
        "float[B,S,8] x, float[B,T,8] k, float[B,T,4] v", "",
        "y = com.microsoft.MultiHeadAttention<num_heads=2>(x, k, v)", "B,S,4"),
    "MultiHeadAttention of heads": (
        "float[B,S,8] x, float[B,2,T,4] k, float[B,2,T,4] v", "",
        "y = com.microsoft.MultiHeadAttention<num_heads=2>(x, k, v)", "B,S,8"),
    "MultiHeadAttention with presents": (
        "float[B,S,8] x, float[B,S,8] k, float[B,S,8] v, float[B,2,P,4] pk, float[B,2,P,4] pv", "",
        "y, a, b = com.microsoft.MultiHeadAttention<num_heads=2>(x, k, v, , , , pk, pv)", "B,S,8"),
    "GroupQueryAttention": (
        "float[B,S,32] x, float[B,S,16] k, float[B,S,16] v, int32[B] n, int32 t", "",
        "y, a, b = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>(x, k, v, , , n, t)", "B,S,32"),
    "GroupQueryAttention of packed": (
        "float[B,S,64] x, int32[B] n, int32 t", "",
        "y, a, b = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>(x, , , , , n, t)", "B,S,32"),
    "MatMulNBits": (
        "float[B,S,16] x", "uint8[6,1,8] w, float[6] c",
        "y = com.microsoft.MatMulNBits<K=16, N=6, bits=4, block_size=16>(x, w, c)", "B,S,6"),
    "MatMulIntegerToFloat": (
        "uint8[B,S,4] x", "uint8[4,6] w, float s = {0.1}",
        "y = com.microsoft.MatMulIntegerToFloat(x, w, s, s)", "B,S,6"),
    "DynamicQuantizeMatMul": (
        "float[B,S,4] x", "uint8[4,6] w, float s = {0.1}", "y = com.microsoft.DynamicQuantizeMatMul(x, w, s)", "B,S,6"),
    "QLinearAdd": (
        "uint8[B,S,4] x, uint8[S,1] a", Q8, "y = com.microsoft.QLinearAdd(x, s, z, a, s, z, s, z)", "B,S,4"),
    "QLinearSigmoid": ("uint8[B,S] x", Q8, "y = com.microsoft.QLinearSigmoid(x, s, z, s, z)", "B,S"),
    "QLinearAveragePool": (
        "uint8[B,3,S,9] x", Q8,
        "y = com.microsoft.QLinearAveragePool<kernel_shape=[2,2], strides=[1,2]>(x, s, z, s, z)", "B,3,S - 1,4"),
    "QLinearAveragePool of channels last": (
        "uint8[B,8,9,3] x", Q8,
        "y = com.microsoft.QLinearAveragePool<kernel_shape=[2,2], channels_last=1>(x, s, z, s, z)", "?"),
    "QLinearGlobalAveragePool": (
        "uint8[B,3,S,T] x", Q8, "y = com.microsoft.QLinearGlobalAveragePool(x, s, z, s, z)", "B,3,1,1"),
    "QLinearGlobalAveragePool of channels last": (
        "uint8[B,S,T,3] x", Q8,
        "y = com.microsoft.QLinearGlobalAveragePool<channels_last=1>(x, s, z, s, z)", "B,1,1,3"),
    "QLinearConcat": (
        "uint8[B,S] x, uint8[B,T] a", Q8, "y = com.microsoft.QLinearConcat<axis=1>(s, z, x, s, z, a, s, z)", "B,S + T"),
    "ExpandDims": ("float[B,S] x", "int32 a = {1}", "y = com.microsoft.ExpandDims(x, a)", "B,1,S"),
    "ExpandDims at the end": ("float[B,S] x", "int32 a = {-1}", "y = com.microsoft.ExpandDims(x, a)", "B,S,1"),
}  # fmt: skip


def feeds(proto: onnx.ModelProto, sizes: dict[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in proto.graph.input:
        held = info.type.tensor_type
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in held.shape.dim]
        dtype = ir.DataType(held.elem_type).numpy()
        found[info.name] = np.ones(shape, dtype)
    if "t" in found:  # of GroupQueryAttention: the last position of each sequence, and their length
        found["n"] = np.full_like(found["n"], sizes["S"] - 1)
        found["t"] = np.asarray(sizes["S"], np.int32)
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_inferred_is_what_the_runtime_computes(case: str) -> None:
    inputs, weights, body, dims = CASES[case]
    proto = parse(f"{HEAD} g ({inputs}) => (y) <{weights}> {{ {body} }}")
    model = ir.from_proto(proto)
    shapes = Shapes(model)
    found = shapes.dims(model.graph.outputs[0])
    known = "?" if found is None else ",".join(map(str, found))
    assert known == dims or (dims == "?" and "," in known)
    for sizes in SIZES:
        assert lies(model, shapes, run_all(proto, feeds(proto, sizes))) == []
