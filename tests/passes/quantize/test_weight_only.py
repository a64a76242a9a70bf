"""Dynamic quantisation and 4-bit weights: numbers against float, formats against their definition, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphopt_passes.quantize import blocks, rounding
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.weight_only import QuantizeDynamic, QuantizeWeights

from graphopt.errors import OptionError
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.rewrite import Calibration, Context, Gate, Options
from graphopt.targets import get_target
from tests.rewriting import parse, run

PAIR = """g (float[n,6,96] x) => (float[n,6,160] y, float[n,6,128] z) <float[96,160] w, float[96,128] v> {
 y = MatMul(x, w)  z = MatMul(x, v) }"""
GEMM = "g (float[4,96] x) => (float[4,160] y) <float[160,96] w, float[1,160] b> { y = Gemm<transB=1>(x, w, b) }"
X = np.random.default_rng(0).normal(size=(2, 6, 96)).astype(np.float32)


def varied(text: str, opset: int = 18) -> onnx.ModelProto:
    proto = parse(text, opset=opset)
    rng = np.random.default_rng(1)
    for tensor in proto.graph.initializer:
        drawn = rng.normal(size=tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    return proto


def context(model: Any, **options: Any) -> Context:
    given = Options(**{"force": True, **options})
    return Context(model, get_target("cpu"), given, pass_name="quantize")


def changed(proto: onnx.ModelProto, each: QuantizeDynamic | QuantizeWeights) -> onnx.ModelProto:
    model = load_model(proto)
    assert each.run(model, context(model))
    assert not list(violations(model))
    return to_proto(model)


def sqnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))


def test_products_of_one_input_share_its_quantisation() -> None:
    proto = varied(PAIR)
    after = changed(proto, QuantizeDynamic(least=1))
    kinds = [node.op_type for node in after.graph.node]
    assert kinds == ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"]
    for a, b in zip(run(proto, {"x": X}), run(after, {"x": X}), strict=True):
        assert sqnr(a, b) > 30


@pytest.mark.parametrize(
    ("each", "least"), [(QuantizeDynamic(least=1), 30), (QuantizeWeights(least=1), 15)]
)
def test_a_gemm_keeps_its_bias(each: QuantizeDynamic | QuantizeWeights, least: float) -> None:
    proto = varied(GEMM)
    after = changed(proto, each)
    feed = {"x": X.reshape(-1, 96)[:4]}
    assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > least


@pytest.mark.parametrize("block", [16, 32, 128])
def test_blocks_are_read_as_they_are_written(block: int) -> None:
    proto = varied(PAIR)
    after = changed(proto, QuantizeWeights(block=block, least=1, scheme="symmetric"))
    assert {node.op_type for node in after.graph.node} == {"MatMulNBits"}
    w = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    made = blocks.encode(w.T, block, 4)
    packed, scales, _ = blocks.pack_blocks(made, 4)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(160, -1).astype(np.float32) - 8
    decoded = (codes.reshape(-1, block) * scales[:, None]).reshape(160, -1)[:, :96].T
    np.testing.assert_allclose(decoded.T, made.decoded(96), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_less(np.abs(decoded - w).max(), np.abs(w).max() / 3)
    got = run(after, {"x": X})[0]
    assert sqnr(X @ decoded, got) > 30


def test_small_weights_stay_float() -> None:
    model = load_model(varied(PAIR))
    ctx = context(model)
    assert not QuantizeDynamic(least=1 << 20).run(model, ctx)
    assert "nothing to quantise" in ctx.remarks[0].reason


def test_an_old_opset_is_declined() -> None:
    model = load_model(varied(PAIR, 10))
    ctx = context(model)
    assert not QuantizeDynamic(least=1).run(model, ctx)
    assert "opset 11" in ctx.remarks[0].reason


def test_a_budget_out_of_reach_leaves_float() -> None:
    model = load_model(varied(PAIR))
    ctx = context(model, budget="sqnr>=200")
    assert not QuantizeDynamic(least=1).run(model, ctx)
    assert "outside the budget" in ctx.remarks[0].reason


def test_other_bits_of_the_same_weights_are_judged_anew() -> None:
    model = load_model(varied(PAIR))
    ctx = context(model, budget="sqnr>=28")
    assert not QuantizeWeights(least=1).run(model, ctx)
    assert "outside the budget" in ctx.remarks[-1].reason
    assert QuantizeWeights(bits=8, least=1).run(model, ctx)


def test_a_block_that_no_kernel_takes_is_refused() -> None:
    model = load_model(varied(PAIR))
    with pytest.raises(OptionError, match="block size 24"):
        QuantizeWeights(block=24).run(model, context(model))


def test_a_gated_site_stays() -> None:
    model = load_model(varied(PAIR))
    ctx = context(model)
    ctx.gate = Gate(sites=frozenset({("quantize", "quantize", "y")}))
    assert QuantizeDynamic(least=1).run(model, ctx)
    assert [node.op_type for node in model.graph if node.outputs[0].name == "y"] == ["MatMul"]


TABLE = """g (int64[n] i) => (float[n,160] y) <float[300,96] t, float[96,160] w> {
 e = Gather(t, i)  y = MatMul(e, w) }"""


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["contrib", "qdq"])
@pytest.mark.parametrize("block", [16, 32])
def test_tables_and_products_in_each_form(bits: int, form: str, block: int) -> None:
    proto = varied(TABLE, 21)
    after = changed(proto, QuantizeWeights(block=block, bits=bits, form=form, least=1))
    kinds = [node.op_type for node in after.graph.node]
    if form == "contrib":
        assert kinds == ["GatherBlockQuantized", "MatMulNBits"]
    else:
        assert kinds == ["DequantizeLinear", "Gather", "DequantizeLinear", "MatMul"]
    feed = {"i": np.array([0, 7, 299, 7], np.int64)}
    assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > (15 if bits == 4 else 38)


def test_blocks_need_opset_21_and_get_it() -> None:
    after = changed(varied(TABLE, 18), QuantizeWeights(form="qdq", least=1))
    assert after.opset_import[0].version == 21
    assert after.ir_version >= 10


def test_a_transposed_gemm_is_decoded_along_its_columns() -> None:
    proto = varied(GEMM, 21)
    after = changed(proto, QuantizeWeights(form="qdq", least=1))
    feed = {"x": X.reshape(-1, 96)[:4]}
    assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > 15


def test_samples_make_4_bits_better() -> None:
    proto = varied("g (float[n,96] x) => (float[n,160] y) <float[96,160] w> { y = MatMul(x, w) }")
    rng = np.random.default_rng(2)
    mix = rng.normal(size=(6, 96))
    feeds = [{"x": (rng.normal(size=(64, 6)) @ mix).astype(np.float32)} for _ in range(6)]
    found = []
    for calibration in (None, Calibration(feeds[1:])):
        model = load_model(proto)
        assert QuantizeWeights(least=1).run(model, context(model, calibration=calibration))
        found.append(sqnr(run(proto, feeds[0])[0], run(to_proto(model), feeds[0])[0]))
    assert found[1] > found[0] + 5


def test_batches_of_samples_do_not_show() -> None:
    proto = varied("g (float[n,t,96] x) => (float[n,t,64] y) <float[96,64] w> { y = MatMul(x, w) }")
    rng = np.random.default_rng(2)
    rows = (rng.normal(size=(6, 20, 96)) @ rng.normal(size=(96, 96))).astype(np.float32)
    found = set()
    for size in (1, 2, 6):
        feeds = [{"x": rows[start : start + size]} for start in range(0, 6, size)]
        model = load_model(proto)
        ctx = context(model, calibration=Calibration(feeds))
        assert QuantizeWeights(least=1).run(model, ctx)
        found.add(to_proto(model).SerializeToString())
    assert len(found) == 1


@pytest.mark.parametrize(("ratio", "rounded"), [(0.9, 0), (2.0, 1)])
def test_samples_round_once_and_only_what_is_faster(
    monkeypatch: pytest.MonkeyPatch, ratio: float, rounded: int
) -> None:
    proto = varied("g (float[n,96] x) => (float[n,160] y) <float[96,160] w> { y = MatMul(x, w) }")
    feeds = [{"x": np.ones((4, 96), np.float32)}]
    counts = []

    def counted(*given: Any) -> Any:
        counts.append(1)
        return compensate(*given)

    compensate = rounding.compensate
    monkeypatch.setattr(rounding, "compensate", counted)
    monkeypatch.setattr(Judgement, "race", lambda _judge, _model: lambda: ratio)
    model = load_model(proto)
    ctx = context(model, calibration=Calibration(feeds), force=False)
    assert QuantizeWeights(least=1, scheme="symmetric").run(model, ctx) == bool(rounded)
    assert len(counts) == rounded
    assert rounded or any("at 0.90x the speed of float" in told.reason for told in ctx.remarks)


@pytest.mark.parametrize("each", [{"bits": 3}, {"form": "onnx"}])
def test_forms_that_no_kernel_takes_are_refused(each: dict[str, Any]) -> None:
    model = load_model(varied(PAIR))
    with pytest.raises(OptionError, match="bits are 4 or 8"):
        QuantizeWeights(**each).run(model, context(model))


def read(proto: onnx.ModelProto) -> set[str]:
    return {name for node in proto.graph.node for name in node.input}


@pytest.mark.parametrize("form", ["contrib", "qdq"])
def test_a_weight_that_two_products_share_is_stored_once(form: str) -> None:
    proto = varied(
        """g (float[n,96] x) => (float[n,96] y, float[n,96] z) <float[96,96] w> {
             y = MatMul(x, w)  z = MatMul(y, w) }""",
        21,
    )
    after = changed(proto, QuantizeWeights(least=1, form=form, scheme="symmetric"))
    assert len([name for name in read(after) if name.startswith("w_") and "dec" not in name]) == 2
    feed = {"x": X.reshape(-1, 96)}
    for a, b in zip(run(proto, feed), run(after, feed), strict=True):
        assert sqnr(a, b) > 12


@pytest.mark.parametrize("form", ["contrib", "qdq"])
def test_a_table_that_is_multiplied_with_too_leaves_no_float_behind(form: str) -> None:
    proto = varied(
        """g (int64[n] i) => (float[n,300] y) <float[300,96] t> {
             e = Gather(t, i)  y = Gemm<transB=1>(e, t) }""",
        21,
    )
    after = changed(proto, QuantizeWeights(least=1, form=form))
    assert "t" not in read(after)
    feed = {"i": np.array([0, 7, 299, 7], np.int64)}
    assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > 15


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["contrib", "qdq"])
def test_weights_of_half_precision_get_scales_of_it(form: str, bits: int) -> None:
    proto = parse(
        """g (int64[n] i) => (float16[n,160] y) <float16[300,96] t, float16[96,160] w> {
             e = Gather(t, i)  y = MatMul(e, w) }""",
        opset=21,
    )
    for tensor in proto.graph.initializer:
        drawn = np.random.default_rng(1).normal(scale=0.01, size=tuple(tensor.dims))
        tensor.CopyFrom(onnx.numpy_helper.from_array(drawn.astype(np.float16), tensor.name))
    after = changed(proto, QuantizeWeights(least=1, form=form, bits=bits))
    scales = [t for t in after.graph.initializer if t.name.endswith("_scales")]
    assert {tensor.data_type for tensor in scales} == {onnx.TensorProto.FLOAT16}
    feed = {"i": np.array([0, 7, 299, 7], np.int64)}
    a, b = (run(each, feed)[0].astype(np.float64) for each in (proto, after))
    assert sqnr(a, b) > (15 if bits == 4 else 35)


def test_a_table_that_others_read_stays() -> None:
    text = TABLE.replace("(float[n,160] y)", "(float[n,160] y, float[300,96] u)").replace(
        "e = Gather", "u = Neg(t)  e = Gather"
    )
    after = changed(varied(text), QuantizeWeights(least=1))
    assert "GatherBlockQuantized" not in {node.op_type for node in after.graph.node}


BRANCHES = """g (bool c, float[n,6,96] x) => (float[n,6,160] y) <float[96,160] w, float[96,160] v> {
 y = If (c) <then_branch = t () => (float[n,6,160] a) { a = MatMul(x, w) },
             else_branch = e () => (float[n,6,160] b) { m = MatMul(x, v)  b = Neg(m) }> }"""
LOOP = """g (float[n,6,96] x) => (float[n,6,96] y) <float[96,96] w, int64 count = {2}> {
 y = Loop (count, , x) <body = t (int64 i, bool k, float[n,6,96] s) => (bool l, float[n,6,96] r)
  { l = Identity(k)  m = MatMul(s, w)  r = Tanh(m) }> }"""


@pytest.mark.parametrize(
    ("each", "kind", "least"),
    [
        (QuantizeDynamic(least=1), "MatMulIntegerToFloat", 20),
        (QuantizeWeights(least=1), "MatMulNBits", 10),
    ],
)
@pytest.mark.parametrize(("text", "bodies"), [(BRANCHES, 2), (LOOP, 1)])
def test_products_in_bodies_are_integers_too(
    text: str, bodies: int, each: QuantizeDynamic | QuantizeWeights, kind: str, least: float
) -> None:
    proto = varied(text) if text == BRANCHES else parse(text)
    drawn = np.random.default_rng(1).normal(size=(96, 96)).astype(np.float32) / 10
    if text == LOOP:
        weight = next(each for each in proto.graph.initializer if each.name == "w")
        weight.CopyFrom(onnx.numpy_helper.from_array(drawn, "w"))
    after = changed(proto, each)
    held = [a.g for node in after.graph.node for a in node.attribute if a.HasField("g")]
    assert [kind in {node.op_type for node in body.node} for body in held] == [True] * bodies
    for taken in (True, False) if text == BRANCHES else (None,):
        feed = {"x": X} if taken is None else {"x": X, "c": np.array(taken)}
        assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > least


def test_names_that_two_branches_share_are_left_alone() -> None:
    text = BRANCHES.replace("m = MatMul(x, v)  b = Neg(m)", "b = MatMul(x, v)")
    proto = varied(text)
    model = load_model(proto)
    model.graph[0].attributes["else_branch"].as_graph().outputs[0].name = "a"
    assert not QuantizeDynamic(least=1).run(model, context(model))


@pytest.mark.parametrize(("bits", "gain"), [(4, 1.08), (8, 1.09)])
def test_clips_lose_less_than_the_whole_range(bits: int, gain: float) -> None:
    rows = np.random.default_rng(3).normal(size=(64, 256)).astype(np.float32)
    made = blocks.encode(rows, 32, bits)
    parted = rows.reshape(64, -1, 32)
    low, high = blocks.limits(bits)
    peaks = np.take_along_axis(parted, np.abs(parted).argmax(-1)[..., None], -1) / low
    plain = np.clip(np.rint(parted / peaks), low, high) * peaks
    ours = made.decoded(256).reshape(parted.shape)
    assert ((plain - parted) ** 2).sum() > gain * ((ours - parted) ** 2).sum()
