"""Static quantisation: what is quantised, fused by the runtime, close to float, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.quantize import trials
from graphopt_passes.quantize.certificate import Judgement, host_saturates
from graphopt_passes.quantize.emission import quantize
from graphopt_passes.quantize.facts import Facts, Layer
from graphopt_passes.quantize.fusion import read_fusion
from graphopt_passes.quantize.placement import Allow, candidates
from graphopt_passes.quantize.search import Search
from graphopt_passes.quantize.static import QuantizeStatic
from graphopt_passes.quantize.styles import style_named, style_of
from graphopt_passes.quantize.trials import Trials

import graphopt
from graphopt.calibrate.collect import collect
from graphopt.errors import OptionError
from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.ir.shapes import Shapes
from graphopt.report.quantized import QuantizedLayer, quantized_layers
from graphopt.rewrite import Calibration, Context, Gate, Options, name_of
from graphopt.targets import get_target
from graphopt.verify.feed_files import Feed
from tests.rewriting import parse, run

RNG = np.random.default_rng(0)
IMAGES = [{"x": RNG.normal(size=(1, 8, 10, 10)).astype(np.float32)} for _ in range(4)]
TOKENS = [{"x": RNG.normal(size=(1, 6, 16)).astype(np.float32)} for _ in range(4)]

RESIDUAL = """g (float[1,8,10,10] x) => (float[1,5] y)
<float[8,8,3,3] w, float[8] b, float[8,8,1,1] v, float[8,5] m, float[5] n> {
 c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)
 d = Conv(r, v)  s = Add(d, r)  t = Relu(s)
 p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)  q = GlobalAveragePool(p)  f = Flatten(q)
 y = Gemm(f, m, n) }"""
BLOCK = """g (float[1,6,16] x) => (float[1,6,16] y) <float[16,16] w, float[16] b, float[16,16] v, float[16] s> {
 n = LayerNormalization(x, s)  h = MatMul(n, w)  i = Add(h, b)  e = Tanh(i)  o = MatMul(e, v)  y = Add(o, x) }"""


def varied(text: str, opset: int = 18) -> onnx.ModelProto:
    """The model with weights of both signs."""
    proto = parse(text, opset=opset)
    rng = np.random.default_rng(1)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            drawn = rng.normal(size=array.shape, scale=0.3).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    return proto


def quantized(
    proto: onnx.ModelProto,
    feeds: list[dict[str, Any]],
    style: str = "x86-avx2",
    allow: Allow = lambda _node: True,
) -> tuple[ir.Model, list[Layer]]:
    model = load_model(proto)
    Shapes(model)  # as passes find it
    chosen = style_named(style)
    names = candidates(model.graph, chosen, allow)
    given = [Feed(str(i), feed) for i, feed in enumerate(feeds)]
    found = collect(proto.SerializeToString(), names, given)
    layers = quantize(model, Facts(chosen, found.values), allow, Names.of(model))
    assert not list(violations(model))
    onnx.checker.check_model(to_proto(model))
    return model, layers


def sqnr(proto: onnx.ModelProto, model: ir.Model, feed: dict[str, Any]) -> float:
    a, b = run(proto, feed)[0], run(to_proto(model), feed)[0]
    return float(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_a_residual_net_is_fused_throughout(opset: int) -> None:
    proto = varied(RESIDUAL, opset)
    model, _ = quantized(proto, IMAGES)
    everything = [v.name or "" for node in model.graph for v in node.outputs]
    fusion = read_fusion(model, everything)
    allowed = 0 if opset >= 12 else 3  # MaxPool on bytes came with opset 12
    assert len(fusion.leftovers) <= allowed
    assert sqnr(proto, model, IMAGES[0]) > 25


def test_relu_needs_no_pair_of_its_own() -> None:
    model, _ = quantized(varied(RESIDUAL), IMAGES)
    makers = [
        None if (value := node.inputs[0]) is None else value.producer()
        for node in model.graph
        if node.op_type == "Relu"
    ]
    assert [maker.op_type for maker in makers if maker is not None] == ["Conv", "Add"]


def test_values_that_only_move_keep_their_scale() -> None:
    model, _ = quantized(varied(RESIDUAL), IMAGES)
    pool = next(node for node in model.graph if node.op_type == "MaxPool")
    before, after = pool.inputs[0].producer(), next(iter(pool.outputs[0].uses())).node  # type: ignore[union-attr]
    scales = [node.inputs[1].const_value.numpy() for node in (before, after)]  # type: ignore[union-attr]
    assert scales[0] == scales[1]


def test_a_transformer_block_keeps_float_between_products() -> None:
    proto = varied(BLOCK)
    model, _ = quantized(proto, TOKENS)
    assert ops(model).count("QuantizeLinear") == 2
    fusion = read_fusion(model, [v.name or "" for node in model.graph for v in node.outputs])
    assert not fusion.leftovers
    assert sqnr(proto, model, TOKENS[0]) > 25


def test_a_stored_graph_output_keeps_its_name() -> None:
    proto = varied(
        "g (float[1,8,10,10] x) => (float[1,8,10,10] y) <float[8,8,1,1] w> { y = Conv(x, w) }"
    )
    model, _ = quantized(proto, IMAGES)
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert ops(model)[-1] == "DequantizeLinear"
    assert sqnr(proto, model, IMAGES[0]) > 25


def test_the_mean_error_of_weights_goes_into_the_bias() -> None:
    text = "g (float[1,8,10,10] x) => (float[1,8,10,10] y) <float[8,8,1,1] w, float[8] b> { y = Conv(x, w, b) }"
    proto = varied(text)
    feeds = [{"x": feed["x"] + 3} for feed in IMAGES]
    model, _ = quantized(proto, feeds)
    a, b = run(proto, feeds[0])[0], run(to_proto(model), feeds[0])[0]
    step = next(n for n in reversed(list(model.graph)) if n.op_type == "DequantizeLinear").inputs[1]
    assert step is not None
    assert step.const_value is not None
    assert np.abs((b - a).mean(axis=(0, 2, 3))).max() < float(step.const_value.numpy()) / 4


@pytest.mark.parametrize(
    ("text", "given_back"),
    [
        ("m = MatMul(x, w)  y = Add(m, b)", True),
        ("m = MatMul(x, w)  y = Add(b, m)", True),
        ("m = MatMul(x, w)  y = com.microsoft.BiasGelu(m, b)", True),
        ("m = MatMul(x, w)  s = Add(m, b)  y = Mul(s, m)", False),  # two readers
        ("m = MatMul(x, w)  y = Sub(b, m)", False),
    ],
)
def test_the_mean_error_of_a_product_goes_into_the_bias_behind(
    text: str, *, given_back: bool
) -> None:
    proto = varied(
        f"g (float[2,6,16] x) => (float[2,6,16] y) <float[16,16] w, float[16] b> {{ {text} }}"
    )
    proto.opset_import.add(domain="com.microsoft", version=1)
    feeds = [{"x": RNG.normal(size=(2, 6, 16)).astype(np.float32) + 3} for _ in range(4)]
    before = onnx.numpy_helper.to_array(proto.graph.initializer[1])
    model, _ = quantized(proto, feeds)
    held = [values.array(each) for each in model.graph.initializers.values()]
    vectors = [a.reshape(-1) for a in held if a is not None and a.dtype == np.float32]
    biases = [a for a in vectors if a.shape == (16,) and np.abs(a - before).max() < 0.2]
    assert any(not np.array_equal(a, before) for a in biases) is given_back


def test_the_mean_error_of_a_product_is_gone() -> None:
    text = "g (float[1,6,16] x) => (float[1,6,16] y) <float[16,16] w, float[16] b> { m = MatMul(x, w)  y = Add(m, b) }"
    proto = varied(text)
    feeds = [{"x": RNG.normal(size=(1, 6, 16)).astype(np.float32) / 8 + 3} for _ in range(8)]
    model, _ = quantized(proto, feeds, style="x86-vnni")
    off = np.mean([run(to_proto(model), f)[0] - run(proto, f)[0] for f in feeds], axis=(0, 1, 2))
    deviation = np.std([run(to_proto(model), f)[0] - run(proto, f)[0] for f in feeds])
    assert np.abs(off).max() < deviation


def test_tensorrt_gets_symmetric_inputs_and_float_outputs() -> None:
    proto = varied(RESIDUAL)
    model, _ = quantized(proto, IMAGES, "tensorrt")
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2].const_value  # type: ignore[union-attr]
            scale = node.inputs[1].const_value  # type: ignore[union-attr]
            assert zero.dtype is ir.DataType.INT8  # type: ignore[union-attr]
            assert not zero.numpy().any()  # type: ignore[union-attr]
            assert (scale.numpy() > 0).all()  # type: ignore[union-attr]
            assert scale.numpy().ndim == 0 or "axis" in node.attributes  # type: ignore[union-attr]
    add = next(node for node in model.graph if node.op_type == "Add")
    assert [v.producer().op_type for v in add.inputs] == ["Conv", "DequantizeLinear"]  # type: ignore[union-attr]
    assert sqnr(proto, model, IMAGES[0]) > 25


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1,8,10,10] x, float[8,8,1,1] w) => (float[1,8,10,10] y) { y = Conv(x, w) }",
        "g (float[1,8,10,10] x, float[8] b) => (float[1,8,10,10] y) <float[8,8,1,1] w> { y = Conv(x, w, b) }",
        "g (float[8,2] x) => (float[2,5] y) <float[8,5] w> { y = Gemm<transA=1>(x, w) }",
        "g (float[1,6,16] x, float[1,16,4] z) => (float[1,6,4] y) { y = MatMul(x, z) }",
    ],
)
def test_what_no_integer_kernel_takes_stays_float(text: str) -> None:
    assert not candidates(load_model(varied(text)).graph, style_named("x86-avx2"), lambda _: True)


def test_a_network_of_zeros_is_safe() -> None:
    proto = parse(
        "g (float[1,8,4,4] x) => (float[1,8,4,4] y) <float[8,8,1,1] w> { y = Conv(x, w) }"
    )
    zeros = np.zeros((8, 8, 1, 1), np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(zeros, "w"))
    feed = {"x": np.zeros((1, 8, 4, 4), np.float32)}
    model, _ = quantized(proto, [feed])
    assert not run(to_proto(model), feed)[0].any()


def context(model: ir.Model, **options: Any) -> Context:
    given = Options(calibration=Calibration(IMAGES), force=True, **options)
    return Context(model, get_target("cpu"), given, pass_name="quantize-static")


def test_the_pass_quantises_and_says_how() -> None:
    model = load_model(varied(RESIDUAL))
    ctx = context(model)
    assert QuantizeStatic().run(model, ctx)
    assert "QuantizeLinear" in ops(model)
    assert any("Conv in 8 bits (QLinearConv): range by" in remark.reason for remark in ctx.remarks)
    again = load_model(varied(RESIDUAL))
    replay = Context(
        again, get_target("cpu"), ctx.options, cache=ctx.cache, pass_name=ctx.pass_name
    )
    assert QuantizeStatic().run(again, replay)
    assert to_proto(again) == to_proto(model)


def rows(ctx: Context) -> dict[str, QuantizedLayer]:
    return {row.node: row for row in quantized_layers(ctx.remarks)}


def test_every_layer_has_a_row_with_the_kernel_that_the_runtime_runs() -> None:
    model = load_model(varied(RESIDUAL))
    products = [name_of(node) for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    ctx = context(model)
    assert QuantizeStatic().run(model, ctx)
    found = rows(ctx)
    assert set(products) <= set(found)
    first = found["c"]
    assert (first.operator, first.kernel, first.why_float) == ("Conv", "QLinearConv", "")
    assert first.method
    assert first.sqnr_db is not None
    assert first.weight_sqnr_db is not None
    assert 0 <= first.clipped < 0.1  # type: ignore[operator]
    assert first.input_sqnr_db is not None
    assert 20 < first.sqnr_db < min(first.input_sqnr_db, first.weight_sqnr_db)
    sums = [row for row in found.values() if row.operator == "Add"]
    assert [row.kernel for row in sums] == ["QLinearAdd"]
    assert all(row.weight_sqnr_db is None for row in sums)


def test_rows_of_layers_in_float_say_why() -> None:
    model = load_model(varied(RESIDUAL))
    ctx = context(model)
    assert QuantizeStatic(skip_nodes=("c",)).run(model, ctx)
    assert rows(ctx)["c"].why_float == "the recipe leaves it out"
    text = (
        "g (float[1,6,16] x, float[1,16,4] z) => (float[1,6,4] y, float[1,6,4] u) <float[16,4] w> "
        "{ y = MatMul(x, z)  u = MatMul(x, w) }"
    )
    model = load_model(varied(text))
    rng = np.random.default_rng(0)
    feeds = [
        {
            n: rng.normal(size=s).astype(np.float32)
            for n, s in (("x", (1, 6, 16)), ("z", (1, 16, 4)))
        }
        for _ in range(4)
    ]
    given = Options(calibration=Calibration(feeds), force=True, budget="sqnr>=90")
    ctx = Context(model, get_target("cpu"), given, pass_name="quantize-static")
    assert not QuantizeStatic().run(model, ctx)
    assert rows(ctx)["y"].why_float.startswith("no integer kernel takes it")
    assert "within the budget" in rows(ctx)["u"].why_float


def test_nobody_claims_what_tensorrt_fuses() -> None:
    model = load_model(varied(RESIDUAL))
    given = Options(calibration=Calibration(IMAGES))
    ctx = Context(model, get_target("tensorrt"), given, pass_name="quantize-static")
    assert QuantizeStatic("tensorrt").run(model, ctx)
    assert rows(ctx)["c"].kernel == "laid out for tensorrt"


def test_everything_is_tried_where_the_part_that_the_table_prefers_is_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_first(self: Search, sites: frozenset[str]) -> frozenset[str]:
        return self.trials.all_sites(sites - {"c", "r"})

    def clock(_: Trials, sites: frozenset[str]) -> float:
        return 1.2 if "c" in sites else 0.8

    monkeypatch.setattr(Search, "_cheapest", without_first)
    monkeypatch.setattr(Search, "_pays", lambda _self, _sites: True)
    monkeypatch.setattr(Trials, "ratio", clock)
    model = load_model(varied(RESIDUAL))
    given = Options(calibration=Calibration(IMAGES), budget="sqnr>=20")
    ctx = Context(model, get_target("cpu"), given, pass_name="quantize-static")
    assert QuantizeStatic().run(model, ctx)
    assert sum(row.weight_sqnr_db is not None for row in rows(ctx).values()) == 3


def test_a_gated_site_stays_float() -> None:
    model = load_model(varied(RESIDUAL))
    ctx = context(model)
    ctx.gate = Gate(sites=frozenset({("quantize-static", "quantize", "c")}))
    assert QuantizeStatic().run(model, ctx)
    first = next(node for node in model.graph if name_of(node) == "c")
    assert first.inputs[0] is model.graph.inputs[0]


def test_operators_and_nodes_can_be_left_out() -> None:
    model = load_model(varied(RESIDUAL))
    assert QuantizeStatic(skip_ops=("Gemm",), skip_nodes=("c*",)).run(model, context(model))
    kept = {n.op_type for n in model.graph if name_of(n) in ("c", "y")}
    assert kept == {"Conv", "Gemm"}
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    assert gemm.inputs[1] is not None
    assert gemm.inputs[1].is_initializer()


def test_without_samples_it_says_how() -> None:
    model = load_model(varied(RESIDUAL))
    with pytest.raises(OptionError, match="give --calibration PATH"):
        QuantizeStatic().run(model, Context(model, get_target("cpu")))


@pytest.mark.parametrize(
    ("options", "error"),
    [({"style": "vax"}, "quantisation style 'vax'"), ({"method": "max"}, "method 'max'")],
)
def test_unknown_options_are_refused(options: dict[str, str], error: str) -> None:
    model = load_model(varied(RESIDUAL))
    with pytest.raises(OptionError, match=error):
        QuantizeStatic(**options).run(model, context(model))  # type: ignore[arg-type]


def test_a_model_without_products_is_left_alone() -> None:
    model = load_model(parse("g (float[1,8,10,10] x) => (float[1,8,10,10] y) { y = Relu(x) }"))
    ctx = context(model)
    assert not QuantizeStatic().run(model, ctx)
    assert "nothing to quantise" in ctx.remarks[0].reason


def test_an_opset_without_integer_kernels_is_lifted_or_declined() -> None:
    text = "g (float[1,8,10,10] x) => (float[1,8,10,10] y) <float[8,8,1,1] w> { y = Conv(x, w) }"
    model = load_model(varied(text, 9))
    assert QuantizeStatic().run(model, context(model))
    assert model.opset_imports[""] >= 10
    old = (
        "g (float[1,8,10,10] x) => (float[1,8,20,20] y) <float[8,8,1,1] w, float[4] s>"
        "{ c = Conv(x, w)  y = Upsample(c, s) }"
    )
    model = load_model(varied(old, 9))
    ctx = context(model)
    assert not QuantizeStatic().run(model, ctx)
    assert "export it anew" in ctx.remarks[0].reason


def test_a_budget_that_cannot_be_met_leaves_float() -> None:
    model = load_model(varied(RESIDUAL))
    ctx = context(model, budget="sqnr>=200")
    assert not QuantizeStatic().run(model, ctx)
    assert "stays float" in ctx.remarks[-1].reason


def test_weights_that_are_no_numbers_stay_float() -> None:
    proto = varied(RESIDUAL)
    broken = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    broken[2, 1] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(broken, "w"))
    model = load_model(proto)
    ctx = context(model)
    assert not QuantizeStatic().run(model, ctx)
    reasons = {(remark.node, remark.reason) for remark in ctx.remarks}
    assert ("c", "stays float: its weight or bias holds NaN or infinities") in reasons
    assert any("the float model gives NaN or infinities" in reason for _, reason in reasons)


def test_weights_without_elements_stay_float() -> None:
    text = """g (float[3,4] x) => (float[3,0] y, float[3,4] z) <float[4,0] w, float[4,4] v> {
     y = MatMul(x, w)  z = MatMul(x, v) }"""
    model = load_model(varied(text))
    feeds = [{"x": RNG.normal(size=(3, 4)).astype(np.float32)} for _ in range(4)]
    options = Options(calibration=Calibration(feeds), force=True)
    ctx = Context(model, get_target("cpu"), options, pass_name="quantize-static")
    assert QuantizeStatic().run(model, ctx)
    kept = next(node for node in model.graph if name_of(node) == "y")
    assert kept.inputs[0] is model.graph.inputs[0]
    reasons = {(remark.node, remark.reason) for remark in ctx.remarks}
    assert ("y", "stays float: its weight or bias has no elements") in reasons


def test_noise_that_is_no_number_settles_nothing() -> None:
    proto = varied(RESIDUAL)
    broken = onnx.numpy_helper.to_array(proto.graph.initializer[1]).copy()
    broken[2] = np.inf
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(broken, "b"))
    model = load_model(proto)
    ctx = context(model)
    assert not QuantizeStatic().run(model, ctx)
    assert not any("less noise" in remark.reason for remark in ctx.remarks)


def test_a_budget_is_met_in_about_log2_of_the_layers() -> None:
    layers = "  ".join(f"l{i} = Conv(l{i - 1}, w{i})" for i in range(1, 17))
    weights = ", ".join(f"float[8,8,1,1] w{i}" for i in range(1, 17))
    text = f"g (float[1,8,10,10] l0) => (float[1,8,10,10] l16) <{weights}> {{ {layers} }}"
    model = load_model(varied(text))
    feeds = [{"l0": feed["x"]} for feed in IMAGES]
    given = Options(calibration=Calibration(feeds), force=True, budget="sqnr>=34")
    ctx = Context(model, get_target("cpu"), given, pass_name="quantize-static")
    assert QuantizeStatic("x86-vnni").run(model, ctx)
    told = [r.reason for r in ctx.remarks if r.reason.startswith("the budget was asked of")]
    assert told == ["the budget was asked of 5 choices of the 16 layers"]
    quantised = sum("Conv in 8 bits (" in remark.reason for remark in ctx.remarks)
    assert 0 < quantised < 16


def test_saturation_that_bites_is_removed_and_told() -> None:
    # Every product is the largest there is: at full range, sums of two pass 16 bits.
    text = "g (float[1,64,4,4] x) => (float[1,64,4,4] y) <float[64,64,1,1] w> { y = Conv(x, w) }"
    proto = parse(text)
    ones = np.ones((64, 64, 1, 1), np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(ones, "w"))
    x = np.random.default_rng(0).uniform(0.9, 1.0, (1, 64, 4, 4)).astype(np.float32)
    model = load_model(proto)
    ctx = context(model)
    given = Options(calibration=Calibration([{"x": x}]), force=True)
    ctx.options = given
    assert QuantizeStatic(style="x86-avx2").run(model, ctx)
    judge = Judgement(load_model(proto), [Feed("x", {"x": x})])
    assert judge.agreement(model) > 60
    conv = next(node for node in model.graph if node.op_type == "Conv")
    makers = [value.producer() for value in conv.inputs[:2] if value is not None]
    scales = [float(np.max(values.array(m.inputs[1]))) for m in makers if m is not None]  # type: ignore[arg-type]
    top, weight = np.rint(1.0 / scales[0]), np.rint(1.0 / scales[1])
    assert 2 * top * weight <= 32767
    told = any("could saturate" in remark.reason for remark in ctx.remarks)
    assert told == host_saturates()


@pytest.mark.parametrize(
    ("architecture", "style"),
    [("", "x86-avx2"), ("x86-vnni", "x86-vnni"), ("x86-amx", "x86-vnni"), ("arm64", "arm")],
)
def test_styles_follow_the_processor(architecture: str, style: str) -> None:
    assert style_of(architecture) == style


def test_the_pipeline_raises_old_opsets() -> None:
    proto = varied(RESIDUAL, opset=9)
    result = graphopt.optimize(proto, precision="int8", calibration=IMAGES, force=True)
    kinds = {node.op_type for node in result.model.graph}
    assert "DequantizeLinear" in kinds
    assert {node.domain for node in result.model.graph} == {""}


def test_signed_bytes_for_arm_are_fused_as_there_and_not_timed_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """x86 leaves signed bytes that are read twice in float: that says nothing of ARM."""
    monkeypatch.setattr(trials, "host_architecture", lambda: "x86-avx2")
    monkeypatch.setattr(Judgement, "race", lambda *_: pytest.fail("timed on another processor"))
    monkeypatch.setattr(Trials, "predicted", lambda *_: 1.5)
    feeds = Calibration(IMAGES)
    model = load_model(varied(RESIDUAL))
    ctx = Context(
        model, get_target("cpu-arm64"), Options(calibration=feeds), pass_name="quantize-static"
    )
    assert QuantizeStatic(skip_ops=("Gemm",)).run(model, ctx)
    told = [remark.reason for remark in ctx.remarks]
    assert not any("does not fuse" in each for each in told)
    assert any("1.50x the speed of float by the table" in each for each in told)
