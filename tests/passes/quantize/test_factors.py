"""Weights behind a Transpose, scaled by alpha, shared with tables: stored in integers; and why others stay float."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphopt_passes.quantize.weight_only import QuantizeDynamic, QuantizeWeights
from graphopt_passes.quantize.writers import Blocks, write_blocks, write_dynamic

from graphopt.ir.build import Names
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from tests.passes.quantize.test_weight_only import context, sqnr, varied
from tests.rewriting import parse, run

X = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
SCALED = {
    "Gemm<alpha=0.5,beta=2.0>(x, w, b)": "float[96,160] w, float[160] b",
    "Gemm<transB=1,alpha=-3.0,beta=0.0>(x, w, b)": "float[160,96] w, float[160] b",
    "Gemm<beta=0.5>(x, w, b)": "float[96,160] w, float[1] b",
    "Gemm(x, w, b)": "float[96,160] w, float[1,160] b",
    "com.microsoft.FusedMatMul<alpha=0.25,transB=1>(x, w)": "float[160,96] w",
    "com.microsoft.FusedMatMul<alpha=4.0>(x, w)": "float[96,160] w",
}


def written(proto: onnx.ModelProto, form: str) -> onnx.ModelProto:
    model = load_model(proto)
    names = Names.of(model)
    if form == "dynamic":
        write_dynamic(model, frozenset("y"), names)
    else:
        write_blocks(model, frozenset("ey"), names, Blocks(32, 8, form))
    assert not list(violations(model))
    return to_proto(model)


def product(call: str, held: str) -> onnx.ModelProto:
    head = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
    return varied(f"{head}g (float[4,96] x) => (float[4,160] y) <{held}> {{ y = {call} }}")


@pytest.mark.parametrize("form", ["contrib", "qdq", "dynamic"])
@pytest.mark.parametrize("call", SCALED)
def test_factors_of_products_are_kept(call: str, form: str) -> None:
    proto = product(call, SCALED[call])
    after = written(proto, form)
    kinds = {node.op_type for node in after.graph.node}
    wanted = {
        "contrib": "MatMulNBits",
        "qdq": "DequantizeLinear",
        "dynamic": "MatMulIntegerToFloat",
    }
    assert wanted[form] in kinds
    assert sqnr(run(proto, {"x": X})[0], run(after, {"x": X})[0]) > 33


@pytest.mark.parametrize("form", ["contrib", "qdq", "dynamic"])
@pytest.mark.parametrize("shape", ["4,160", "4,1", "160", "1", "1,1"])
def test_what_a_gemm_adds_is_added(form: str, shape: str) -> None:
    text = f"g (float[4,96] x, float[{shape}] b) => (float[4,160] y) <float[96,160] w> {{ y = Gemm(x, w, b) }}"
    proto = varied(text, 21)
    after = written(proto, form)
    feed = {"x": X, "b": np.full([int(d) for d in shape.split(",")], 30, np.float32)}
    assert sqnr(run(proto, feed)[0] - 30, run(after, feed)[0] - 30) > 33


def test_a_column_of_constants_is_no_row() -> None:
    held = "float[96,160] w, float[160,1] b"
    text = f"g (float[160,96] x) => (float[160,160] y) <{held}> {{ y = Gemm(x, w, b) }}"
    proto = varied(text, 21)
    feed = {"x": np.random.default_rng(1).normal(size=(160, 96)).astype(np.float32)}
    assert sqnr(run(proto, feed)[0], run(written(proto, "contrib"), feed)[0]) > 33


TIED = """g (int64[n] i) => (float[n,300] y) <float[300,96] t> {
 e = Gather(t, i)  u = Transpose<perm=[1,0]>(t)  y = MatMul(e, u) }"""


@pytest.mark.parametrize("form", ["contrib", "qdq", "dynamic"])
def test_a_table_that_is_turned_and_multiplied_with(form: str) -> None:
    proto = varied(TIED, 21)
    after = written(proto, form)
    feed = {"i": np.array([0, 7, 299, 7], np.int64)}
    assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > 33


def test_both_uses_of_tied_embeddings_are_stored_in_blocks() -> None:
    model = load_model(varied(TIED, 21))
    assert QuantizeWeights(least=1).run(model, context(model))
    kinds = [node.op_type for node in model.graph]
    assert "GatherBlockQuantized" in kinds
    assert "MatMulNBits" in kinds


@pytest.mark.parametrize(("text", "why"), [
    ("g (float[4,n,96] x) => (float[4,n,160] y) <float[4,96,160] w> { y = MatMul(x, w) }", "3 axes"),
    ("g (float[96,n] x) => (float[n,160] y) <float[96,160] w> { y = Gemm<transA=1>(x, w) }", "transA"),
    ("g (float[96,n] x) => (float[160,n] y) <float[160,96] w> { y = MatMul(w, x) }", "left operand"),
    ("g (float[n,96] x, float[n,160] b) => (float[n,160] y) <float[96,160] w> { y = Gemm<beta=2.0>(x, w, b) }", "beta"),
    ("g (double[n,96] x) => (double[n,160] y) <double[96,160] w> { y = MatMul(x, w) }", "of double"),
])  # fmt: skip
@pytest.mark.parametrize("each", [QuantizeDynamic(least=1), QuantizeWeights(least=1)])
def test_what_stays_float_is_told(
    text: str, why: str, each: QuantizeDynamic | QuantizeWeights
) -> None:
    model = load_model(parse(text))
    ctx = context(model)
    assert not each.run(model, ctx)
    assert any(told.node == "y" and why in told.reason for told in ctx.remarks)


@pytest.mark.parametrize(("text", "why"), [
    ("g (int64[n] i) => (float[n,100] y) <float[300,100] t> { y = Gather(t, i) }", "rows of 100 are no whole"),
    ("g (int64[n] i) => (float[96,n] y) <float[96,300] t> { y = Gather<axis=1>(t, i) }", "no rows"),
    ("g (int64[n] i) => (float[n,96] y, float[300,96] z) <float[300,96] t> { y = Gather(t, i)  z = Neg(t) }", "others"),
])  # fmt: skip
def test_tables_that_stay_float_are_told(text: str, why: str) -> None:
    model = load_model(parse(text))
    ctx = context(model)
    assert not QuantizeWeights(least=1).run(model, ctx)
    assert any(told.node == "y" and why in told.reason for told in ctx.remarks)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("each", [QuantizeDynamic(least=1), QuantizeWeights(least=1)])
def test_weights_that_are_no_numbers_stay_float(
    value: float, each: QuantizeDynamic | QuantizeWeights
) -> None:
    proto = product("MatMul(x, w)", "float[96,160] w")
    array = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array[3, 4] = value
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    model = load_model(proto)
    ctx = context(model)
    assert not each.run(model, ctx)
    assert any("NaN or infinities" in told.reason for told in ctx.remarks)


@pytest.mark.parametrize("each", [QuantizeDynamic(least=1), QuantizeWeights(least=1)])
def test_weights_of_zeros_stay_float(each: QuantizeDynamic | QuantizeWeights) -> None:
    proto = product("MatMul(x, w)", "float[96,160] w")
    zeros = np.zeros((96, 160), np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(zeros, "w"))
    model = load_model(proto)
    ctx = context(model)
    assert not each.run(model, ctx)
    assert any("its weight is 0 throughout" in told.reason for told in ctx.remarks)
