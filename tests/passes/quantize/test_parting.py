"""Gemm with more than a bias and FusedMatMul: the product in integers, what is added in float."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.fusion import read_fusion
from graphopt_passes.quantize.placement import is_product

from graphopt.ir.model_file import load_model
from graphopt.rewrite import RemarkKind
from graphopt.verify.feed_files import Feed
from tests.passes.quantize.test_mixed import quantised
from tests.passes.quantize.test_static import ops, quantized, rows, sqnr, varied
from tests.rewriting import parse

RNG = np.random.default_rng(3)
FEEDS = [{"x": RNG.normal(size=(6, 16)).astype(np.float32)} for _ in range(4)]
HEAD = """g (float[6,16] x) => (float[6,A] y)
<float[16,12] w, float[12,16] t, float[12] b, float[1,12] row, float[6,12] all, float[6,1] column, float[1] one> { """

PARTED = [
    "c = Sin(x)  d = Slice(c, zero, twelve, axis)  y = Gemm(x, w, d)",
    "c = Sin(x)  d = Slice(c, zero, twelve, axis)  e = Gemm<alpha=0.5, beta=2.0>(x, w, d)  y = Sin(e)",
    "c = Sin(x)  d = Slice(c, zero, twelve, axis)  y = Gemm<transB=1, beta=-1.0>(x, t, d)",
    "y = Gemm<beta=0.5>(x, w, all)",
    "y = Gemm(x, w, column)",
    "y = Gemm(x, w, one)",
]
WHOLE = [
    "y = Gemm<alpha=0.25>(x, w, b)",
    "y = Gemm<alpha=2.0, beta=3.0>(x, w, row)",
    "y = Gemm<alpha=-1.0, transB=1>(x, t)",
]
CUTS = "zero = Constant<value_ints=[0]>()  twelve = Constant<value_ints=[12]>()  axis = Constant<value_ints=[1]>()  "
TIED = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[6,16] x, int64[3] i) => (float[6,12] y, float[3,16] e) <float[12,16] t> {
 s = Sin(x)  y = com.microsoft.FusedMatMul<alpha=0.5, transB=1>(s, t)  e = Gather(t, i) }"""


def check(proto: onnx.ModelProto) -> None:
    model, layers = quantized(proto, FEEDS, "x86-vnni")
    assert [layer.op_type for layer in layers] == ["Gemm"]
    assert sqnr(proto, model, FEEDS[0]) > 30
    everything = [value.name or "" for node in model.graph for value in node.outputs]
    fusion = read_fusion(model, everything)
    assert not fusion.leftovers
    assert "QGemm" in fusion.kernels.values()
    assert Judgement(load_model(proto), [Feed("0", FEEDS[0])]).agreement(model) > 100


@pytest.mark.parametrize("body", PARTED)
def test_what_is_no_bias_is_added_behind(body: str) -> None:
    proto = varied(HEAD + CUTS + body + " }")
    check(proto)
    assert "Add" in ops(quantized(proto, FEEDS)[0])


@pytest.mark.parametrize("body", WHOLE)
def test_factors_go_into_weight_and_bias(body: str) -> None:
    proto = varied(HEAD + body + " }")
    check(proto)
    assert "Add" not in ops(quantized(proto, FEEDS)[0])


def test_a_column_as_long_as_there_are_channels_is_no_bias() -> None:
    text = "g (float[12,16] x) => (float[12,12] y) <float[16,12] w, float[12,1] c> { y = Gemm(x, w, c) }"
    proto = varied(text)
    feeds = [{"x": RNG.normal(size=(12, 16)).astype(np.float32)} for _ in range(4)]
    model, _ = quantized(proto, feeds, "x86-vnni")
    assert "Add" in ops(model)
    assert sqnr(proto, model, feeds[0]) > 30


def test_a_number_is_the_bias_of_one_channel() -> None:
    text = "g (float[6,16] x) => (float[6,1] y) <float[16,1] w, float c> { y = Gemm<beta=2.0>(x, w, c) }"
    proto = varied(text)
    model, _ = quantized(proto, FEEDS, "x86-vnni")
    assert "Add" not in ops(model)
    assert sqnr(proto, model, FEEDS[0]) > 30


def test_a_parted_sum_is_what_others_read() -> None:
    body = "c = Sin(x)  d = Slice(c, zero, twelve, axis)  e = Gemm(x, w, d)  f = Relu(e)  y = MatMul(f, t) }"
    proto = varied(HEAD + CUTS + body)
    model, layers = quantized(proto, FEEDS, "x86-vnni")
    assert [layer.op_type for layer in layers] == ["Gemm", "MatMul"]
    assert sqnr(proto, model, FEEDS[0]) > 30
    assert not read_fusion(model, ["e", "e_float", "y"]).leftovers


def test_the_table_tells_the_kernel_of_the_product() -> None:
    _, ctx = quantised(varied(HEAD + CUTS + PARTED[0] + " }"), FEEDS, style="x86-vnni")
    row = rows(ctx)["y"]
    assert (row.operator, row.kernel) == ("Gemm", "QGemm")


def test_a_turned_table_is_read_in_bytes_by_the_product_alone() -> None:
    proto = varied(TIED)
    feeds = [{**feed, "i": np.array([0, 5, 11], np.int64)} for feed in FEEDS]
    model, ctx = quantised(proto, feeds, style="x86-vnni")
    assert "FusedMatMul" not in ops(model)
    assert model.graph.initializers["t"].dtype is ir.DataType.FLOAT
    assert sqnr(proto, model, feeds[0]) > 30
    assert rows(ctx)["y"].kernel == "MatMulIntegerToFloat"


@pytest.mark.parametrize("how", ["transA=1", "transBatchB=1"])
def test_other_turns_are_declined(how: str) -> None:
    text = TIED.replace("transB=1", how).replace("float[12,16] t", "float[16,12] t")
    node = next(n for n in load_model(parse(text)).graph if n.domain)
    assert not is_product(node)


def test_what_no_kernel_takes_is_told() -> None:
    body = "a = Sin(w)  b2 = MatMul(x, a)  c = MatMul(x, w)  y = Add(b2, c) }"
    _, ctx = quantised(varied(HEAD + body), FEEDS, style="x86-vnni")
    told = {each.node: each.reason for each in ctx.remarks if each.kind is RemarkKind.MISSED}
    assert "weight" in told["b2"]
