"""Static integers for runtimes that do not run here: standard operators, TensorRT; judged by what Q and DQ say."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from graphopt_passes.quantize import emission
from graphopt_passes.quantize.fusion import read_fusion
from graphopt_passes.quantize.narrow import why_narrow
from graphopt_passes.quantize.placement import candidates
from graphopt_passes.quantize.static import QuantizeStatic
from graphopt_passes.quantize.styles import style_for, style_named
from graphopt_passes.quantize.weight_only import QuantizeWeights

import graphopt
from graphopt.driver.result import Result
from graphopt.emit.legality import check_legality
from graphopt.errors import OptionError
from graphopt.ir import values
from graphopt.ir.model_file import load_model, to_proto
from graphopt.report.quantized import QuantizedLayer, quantized_layers
from graphopt.rewrite import Calibration, Context, Options
from graphopt.targets import get_target
from tests.passes.quantize.test_static import IMAGES, RESIDUAL, RNG, quantized, sqnr, varied
from tests.rewriting import run

WIDE_IMAGES = [{"x": RNG.normal(size=(1, 16, 8, 8)).astype(np.float32)} for _ in range(4)]
TWO_WAYS = """g (float[1,16,8,8] x) => (float[1,16,8,8] y)
<float[16,16,3,3] w, float[16] b, float[16,16,1,1] v, float[16,16,1,1] u> {
 a = Relu(x)  c = Conv<pads=[1,1,1,1]>(a, w, b)  r = Relu(c)
 d = Conv(r, v)  e = Conv(a, u)  s = Add(d, e)  y = Relu(s) }"""
JOINED = """g (float[1,16,8,8] x) => (float[1,16,8,8] y)
<float[16,16,3,3] w, float[16] b, float[16,32,1,1] v> {
 c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  j = Concat<axis=1>(x, r)  y = Conv(j, v) }"""


def emitted(
    proto: onnx.ModelProto, target: str, feeds: list[dict[str, Any]], **given: Any
) -> Result:
    return graphopt.optimize(
        proto, target=target, precision="int8", calibration=feeds, inputs=feeds[:1], **given
    )


def layers(result: Result) -> dict[str, QuantizedLayer]:
    return {row.node: row for row in quantized_layers(result.report.remarks)}


def scales(result: Result) -> dict[str, float]:
    """Of stored activations, by name."""
    return {
        node.inputs[0].name or "": float(values.scalar(node.inputs[1]) or 0)
        for node in result.model.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None
    }


@pytest.mark.parametrize(("target", "opset"), [("portable", 9), ("portable", 21), ("openvino", 13)])
def test_any_runtime_gets_standard_pairs(target: str, opset: int) -> None:
    proto = varied(RESIDUAL, opset)
    made = emitted(proto, target, IMAGES)
    assert {node.domain for node in made.model.graph} == {""}
    assert made.model.opset_imports[""] == max(opset, 13)
    assert not check_legality(made.model, get_target(target)).findings
    everything = [v.name or "" for node in made.model.graph for v in node.outputs]
    assert not read_fusion(made.model, everything).leftovers
    assert sqnr(proto, made.model, IMAGES[0]) > 20


def test_what_any_runtime_gets_means_the_same_to_another_implementation() -> None:
    found = to_proto(emitted(varied(RESIDUAL, 21), "portable", IMAGES).model)
    told: Any = onnx.reference.ReferenceEvaluator(found).run(None, IMAGES[1])
    np.testing.assert_allclose(run(found, IMAGES[1])[0], told[0], rtol=1e-4, atol=1e-5)


def worst_sum(model: ir.Model, feeds: list[dict[str, Any]]) -> int:
    """The greatest sum of two products that any pair of weights could make of the codes that are met."""
    worst = 0
    for node in model.graph:
        if node.op_type != "Conv":
            continue
        decode = node.inputs[1].producer()  # type: ignore[union-attr]
        codes = decode.inputs[0].const_value.numpy().astype(int)  # type: ignore[union-attr]
        rows = np.sort(codes.reshape(codes.shape[0], -1), axis=1)
        pairs = max(abs(rows[:, :2].sum(axis=1)).max(), abs(rows[:, -2:].sum(axis=1)).max())
        read = node.inputs[0].producer().inputs[0]  # type: ignore[union-attr]
        tapped = to_proto(model)
        tapped.graph.output.append(onnx.ValueInfoProto(name=read.name))  # type: ignore[union-attr]
        met = [run(tapped, feed)[-1] for feed in feeds]
        moved = 128 if met[0].dtype == np.int8 else 0  # the runtime adds it on x86
        worst = max(worst, int(pairs * max(int(each.max()) + moved for each in met)))
    return worst


def test_nothing_saturates_16_bits() -> None:
    model, _ = quantized(varied(RESIDUAL), IMAGES)
    assert worst_sum(model, IMAGES[:1]) <= 32767


TAILED = [
    {"x": np.random.default_rng(i).standard_t(3, size=(1, 8, 10, 10)).astype(np.float32)}
    for i in range(4)
]
"""With values far beyond the range of least error: their codes pass those of 7 bits."""


@pytest.mark.parametrize("feeds", [IMAGES, TAILED])
def test_any_runtime_includes_one_that_saturates(feeds: list[dict[str, Any]]) -> None:
    """Whoever reads the file: no pair of products leaves 16 bits."""
    assert style_named("portable").saturates
    made = emitted(varied(RESIDUAL), "portable", feeds, budget="sqnr>=5").model
    assert 0 < worst_sum(made, feeds) <= 32767


def narrowed() -> ir.Model:
    """A value in 7 bits, with a range that leaves the tails out."""
    model = load_model(varied(RESIDUAL))
    given = Options(calibration=Calibration(TAILED), budget="sqnr>=1")
    ctx = Context(model, get_target("portable"), given, pass_name="quantize-static")
    assert QuantizeStatic(overrides=("x: bits=7 range=-2..2",)).run(model, ctx)
    return model


def test_codes_beyond_seven_bits_do_not_saturate() -> None:
    assert 0 < worst_sum(narrowed(), TAILED) <= 32767


def test_they_would_if_seven_bits_were_taken_for_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        emission._Emitter, "_top_code", lambda _self, _value, given: given.format.codes[1]
    )
    assert worst_sum(narrowed(), TAILED) > 32767


def test_codes_with_a_sign_get_128_more_before_they_are_multiplied() -> None:
    model = load_model(varied(RESIDUAL))
    given = Options(calibration=Calibration(IMAGES), budget="sqnr>=5")
    ctx = Context(model, get_target("portable"), given, pass_name="quantize-static")
    assert QuantizeStatic(activations="int8").run(model, ctx)
    assert 0 < worst_sum(model, IMAGES) <= 32767


def test_bytes_with_a_sign_where_a_target_says_so() -> None:
    board = get_target("cpu-arm64")
    assert style_for(board).activation.name == "INT8"
    assert style_for(get_target("openvino")).activation.name == "UINT8"
    assert style_for(get_target("ort-tensorrt")).name == "tensorrt"


MOVED = """g (float[1,16,8,8] x) => (float[1,16,8,4] y) <float[16,16,3,3] w, int64[1] b = {0}, int64[1] e = {4},
 int64[1] a = {3}> { c = Conv<pads=[1,1,1,1]>(x, w)  r = Slice(c, b, e, a)  y = Tanh(r) }"""


def test_bytes_with_a_sign_are_judged_on_any_processor() -> None:
    """ONNX Runtime 1.31 on x86 turns them around, and from opset 21 on refuses what it made where it moved Q and DQ."""
    made = emitted(varied(MOVED, 23), "cpu-arm64", WIDE_IMAGES, budget="sqnr>=15", force=True)
    stored = [node for node in made.model.graph if node.op_type == "QuantizeLinear"]
    assert {node.inputs[2].dtype for node in stored} == {ir.DataType.INT8}  # type: ignore[union-attr]


def test_16_bits_raise_the_opset_where_there_is_no_other_domain() -> None:
    proto = varied(RESIDUAL, 18)
    made = graphopt.optimize(
        proto,
        target="portable",
        passes=[QuantizeStatic(activations="uint16", weights="int16")],
        calibration=IMAGES,
        inputs=IMAGES[:1],
        budget="sqnr>=40",
    )
    assert {node.domain for node in made.model.graph} == {""}
    assert made.model.opset_imports[""] == 21


def test_cuda_has_no_kernels_for_stored_activations() -> None:
    model = load_model(varied(RESIDUAL))
    given = Options(calibration=Calibration(IMAGES))
    ctx = Context(model, get_target("cuda"), given, pass_name="quantize-static")
    with pytest.raises(OptionError, match="'cuda' has no integer kernels for Q and DQ"):
        QuantizeStatic().run(model, ctx)


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_a_budget_leaves_layers_in_float(target: str) -> None:
    proto = varied(TWO_WAYS)
    whole = emitted(proto, target, WIDE_IMAGES, budget="sqnr>=10")
    assert [row for row in layers(whole).values() if row.why_float] == []
    reached = min(sqnr(proto, whole.model, feed) for feed in WIDE_IMAGES)
    made = emitted(proto, target, WIDE_IMAGES, budget=f"sqnr>={reached + 1}")
    left = [row.why_float for row in layers(made).values() if row.why_float]
    assert left
    assert any("accuracy; it adds more noise than the budget allows" in why for why in left)
    assert min(sqnr(proto, made.model, feed) for feed in WIDE_IMAGES) >= reached + 1


def test_a_budget_that_no_choice_meets_leaves_the_model_in_float() -> None:
    made = emitted(varied(TWO_WAYS), "tensorrt", WIDE_IMAGES, budget="sqnr>=90")
    assert not scales(made)
    said = [remark.reason for remark in made.report.remarks]
    assert any("no choice of layers is within the budget; all of them" in each for each in said)


def test_nobody_claims_a_speed_that_was_not_measured() -> None:
    made = emitted(varied(TWO_WAYS), "tensorrt", WIDE_IMAGES, budget="sqnr>=10")
    said = [remark.reason for remark in made.report.remarks]
    assert any(each.startswith("not timed, the runtime is not this machine's") for each in said)
    assert not any("the speed of float" in each for each in said)


@pytest.mark.parametrize(("skipped", "identity"), [((), "e"), (("d",), "d"), (("e",), "e")])
def test_the_identity_of_a_sum_has_a_range_whoever_it_is(
    skipped: tuple[str, ...], identity: str
) -> None:
    """Which operand it is depends on which convolutions stay float: both are observed."""
    model = load_model(varied(TWO_WAYS))
    given = Options(calibration=Calibration(WIDE_IMAGES), budget="sqnr>=20")
    ctx = Context(model, get_target("tensorrt"), given, pass_name="quantize-static")
    assert QuantizeStatic(skip_nodes=skipped).run(model, ctx)
    sums = next(node for node in model.graph if node.op_type == "Add")
    decoded = [
        value.producer().inputs[0].producer()  # type: ignore[union-attr]
        for value in sums.inputs
        if value is not None and value.producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    ]
    assert [encode.inputs[0].name for encode in decoded] == [identity]  # type: ignore[union-attr]
    assert sqnr(varied(TWO_WAYS), model, WIDE_IMAGES[0]) > 25


def test_constants_are_no_identities() -> None:
    text = TWO_WAYS.replace("e = Conv(a, u)  ", "").replace("Add(d, e)", "Add(d, b2)")
    proto = varied(text.replace("float[16,16,1,1] u", "float[1,16,1,1] b2"))
    names = candidates(load_model(proto).graph, style_named("tensorrt"), lambda _node: True)
    assert set(names) == {"a", "r"}


def test_what_is_joined_has_one_scale_for_tensorrt() -> None:
    made = emitted(varied(JOINED), "tensorrt", WIDE_IMAGES, budget="sqnr>=10")
    found = scales(made)
    assert set(found) == {"x", "j"}
    assert found["x"] == found["j"]


def test_a_range_of_the_users_is_kept_apart() -> None:
    model = load_model(varied(JOINED))
    given = Options(calibration=Calibration(WIDE_IMAGES), budget="sqnr>=5")
    ctx = Context(model, get_target("tensorrt"), given, pass_name="quantize-static")
    assert QuantizeStatic(overrides=("x: range=-3..3",)).run(model, ctx)
    encode = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert np.float32(values.scalar(encode.inputs[1]) or 0) == np.float32(3 / 127)


CONV = "g (float[N,{read},8,8] x) => (float[N,{made},a,b] y) <float[{made},{each},{k},{k}] w> {{"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (CONV.format(read=3, made=16, each=3, k=3) + " y = Conv(x, w) }", ""),
        (CONV.format(read=3, made=12, each=3, k=3) + " y = Conv(x, w) }", "3 channels in and 12"),
        (CONV.format(read=8, made=8, each=8, k=1) + " y = Conv(x, w) }", ""),  # the first layer
        (CONV.format(read=32, made=32, each=1, k=3) + " y = Conv<group=32>(x, w) }", ""),
        (CONV.format(read=8, made=8, each=1, k=1) + " y = Conv<group=8>(x, w) }", "8 channels in"),
        ("g (float[N,32] x) => (float[N,64] y) <float[32,64] w> { y = MatMul(x, w) }", ""),
        ("g (float[1,32] x) => (float[1,64] y) <float[32,64] w> { y = MatMul(x, w) }", "a vector"),
        ("g (float[N,32] x) => (float[N,1] y) <float[32,1] w> { y = MatMul(x, w) }", "a vector"),
        (
            "g (float[N,32] x) => (float[N,8] y) <float[8,32] w> { y = Gemm<transB=1>(x, w) }",
            "32 x 8 weights",
        ),
    ],
)
def test_narrow_products_gain_nothing_on_tensor_cores(text: str, why: str) -> None:
    model = load_model(varied(text))
    node = model.graph[0]
    found = why_narrow(node, style_named("tensorrt").least_channels)
    assert found.startswith(why) if why else not found
    assert not why_narrow(node, style_named("portable").least_channels)


def test_narrow_layers_behind_the_first_stay_float_and_force_takes_them() -> None:
    proto = varied(RESIDUAL)
    plain = layers(emitted(proto, "tensorrt", IMAGES, budget="sqnr>=10"))
    assert "8 channels in and 8 out are too few" in (plain["d"].why_float or "")
    assert not plain["c"].why_float
    assert not layers(emitted(proto, "tensorrt", IMAGES, budget="sqnr>=10", force=True))[
        "d"
    ].why_float


def test_nothing_wide_enough_stays_float_and_says_why() -> None:
    text = "g (float[1,16] x) => (float[1,8] y) <float[16,8] w> { y = MatMul(x, w) }"
    feeds = [{"x": RNG.normal(size=(1, 16)).astype(np.float32)} for _ in range(4)]
    made = emitted(varied(text), "tensorrt", feeds)
    assert not scales(made)
    said = [remark.reason for remark in made.report.remarks]
    assert any("no layer is of a size that runs faster in 8 bits there" in each for each in said)


PRODUCT = """g (float[N,128] x) => (float[N,256] y) <float[128,256] w, float[256] b> {
 h = MatMul(x, w)  i = Add(h, b)  y = Relu(i) }"""
ROWS = [{"x": RNG.normal(size=(5, 128)).astype(np.float32)} for _ in range(2)]


def made_without_samples(text: str, opset: int, target: str, precision: str) -> Result:
    return graphopt.optimize(
        varied(text, opset), target=target, precision=precision, inputs=ROWS[:1]
    )


def test_any_runtime_quantises_activations_as_they_come() -> None:
    made = made_without_samples(PRODUCT, 13, "portable", "int8-dynamic")
    found = [node.op_type for node in made.model.graph]
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= set(found)
    assert set(made.model.opset_imports) == {""}
    assert sqnr(varied(PRODUCT, 13), made.model, ROWS[0]) > 30


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "cuda"])
def test_some_runtimes_have_no_integer_products_of_what_comes(target: str) -> None:
    made = made_without_samples(PRODUCT, 13, target, "int8-dynamic")
    assert {node.op_type for node in made.model.graph} == {"Gemm", "Relu"}
    said = [remark.reason for remark in made.report.remarks]
    assert any(f"'{target}' has no kernels for MatMulInteger" in each for each in said)


def test_integer_products_of_what_comes_are_made_by_force() -> None:
    forced = graphopt.optimize(
        varied(PRODUCT, 13), target="openvino", precision="int8-dynamic", force=True
    )
    assert "MatMulInteger" in [node.op_type for node in forced.model.graph]


TIED = """g (int64[2,6] i) => (float[2,6,64] y) <float[64,32] e, float[32,32] w> {
 x = Gather(e, i)  h = MatMul(x, w)  n = Tanh(h)  t = Transpose<perm=[1,0]>(e)  y = MatMul(n, t) }"""


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
@pytest.mark.parametrize("skipped", [False, True])
def test_tied_embeddings_are_products_and_stored_once_in_float(target: str, skipped: bool) -> None:
    proto = varied(TIED)
    model = load_model(proto)
    feeds = [{"i": RNG.integers(0, 64, (2, 6))} for _ in range(4)]
    given = Options(calibration=Calibration(feeds), budget="sqnr>=10")
    ctx = Context(model, get_target(target), given, pass_name="quantize-static")
    assert QuantizeStatic(skip_nodes=("y",) if skipped else ()).run(model, ctx)
    head = next(n for n in model.graph if n.outputs[0].name == "y")
    maker = head.inputs[1].producer()  # type: ignore[union-attr]
    assert maker is not None
    assert maker.op_type == ("Transpose" if skipped else "DequantizeLinear")
    held = {v.name: v.const_value for v in model.graph.initializers.values() if v.uses()}
    large = {k for k, v in held.items() if v is not None and v.size > 64}
    assert {k for k in large if held[k].dtype is ir.DataType.FLOAT} == {"e"}  # type: ignore[union-attr]
    assert not any("turned" in name for name in model.graph.initializers) or not skipped
    assert sqnr(proto, model, feeds[0]) > 25


def test_tensorrt_keeps_bodies_in_float_and_says_so() -> None:
    text = """g (bool c, float[1,16,8,8] x) => (float[1,16,8,8] y) <float[16,16,1,1] w, float[16,16,1,1] v> {
 y = If (c) <then_branch = t () => (float[1,16,8,8] a) { a = Conv(x, w) },
             else_branch = e () => (float[1,16,8,8] d) { d = Conv(x, v) }> }"""
    feeds = [{**feed, "c": np.array(i % 2 == 0)} for i, feed in enumerate(WIDE_IMAGES)]
    made = emitted(varied(text), "tensorrt", feeds)
    said = [remark.reason for remark in made.report.remarks]
    assert any("bodies of If, Loop and Scan, which stay float for 'tensorrt'" in s for s in said)
    inside = emitted(varied(text), "portable", feeds).model
    assert {n.op_type for g in inside.graphs() for n in g} >= {"QuantizeLinear", "If"}


@pytest.mark.parametrize(("target", "block"), [("portable", 32), ("tensorrt", 128)])
@pytest.mark.parametrize("opset", [9, 17])
def test_blocks_raise_the_opset(target: str, block: int, opset: int) -> None:
    made = made_without_samples(PRODUCT, opset, target, "int4-weights")
    decode = next(n for n in made.model.graph if n.op_type == "DequantizeLinear")
    assert made.model.opset_imports[""] == 21
    assert decode.attributes["block_size"].as_int() == block
    assert not check_legality(made.model, get_target(target)).findings
    assert sqnr(varied(PRODUCT, opset), made.model, ROWS[0]) > 15


@pytest.mark.parametrize("precision", ["portable", "tensorrt", "openvino"])
def test_scales_of_blocks_are_positive_where_the_parser_is_not_known_to_take_others(
    precision: str,
) -> None:
    made = made_without_samples(PRODUCT, 21, precision, "int4-weights")
    decode = next(n for n in made.model.graph if n.op_type == "DequantizeLinear")
    held = values.array(decode.inputs[1])
    assert held is not None
    assert (held > 0).all()


@pytest.mark.parametrize(
    ("text", "block", "why"),
    [
        (PRODUCT.replace("128", "192"), 64, ""),
        (PRODUCT.replace("256", "255"), None, "rows of 255 numbers of 4 bits are odd"),
        (PRODUCT.replace("128", "130"), None, "no block divides 130 rows"),
    ],
)
def test_tensorrt_gets_whole_blocks(text: str, block: int | None, why: str) -> None:
    made = graphopt.optimize(varied(text, 21), target="tensorrt", precision="int4-weights")
    found = [n for n in made.model.graph if n.op_type == "DequantizeLinear"]
    assert [n.attributes["block_size"].as_int() for n in found] == ([block] if block else [])
    assert not check_legality(made.model, get_target("tensorrt")).findings
    assert not why or any(why in remark.reason for remark in made.report.remarks)


def test_operators_that_changed_are_rewritten_for_blocks_of_any_size() -> None:
    text = """g (float[4,64] x) => (float[2,2,1] y) <float[64,32] w, int64[3] s = {2, 2, 32}> {
 h = MatMul(x, w)  r = Reshape(h, s)  y = ReduceSum(r, a) }"""
    proto = varied(text.replace("s = {2, 2, 32}", "s = {2, 2, 32}, int64[1] a = {2}"), 13)
    model = load_model(proto)
    ctx = Context(model, get_target("portable"), Options(), pass_name="quantize-weights")
    assert QuantizeWeights(form="qdq", tables=False, least=1024).run(model, ctx)
    assert model.opset_imports[""] == 21
    feed = {"x": RNG.normal(size=(4, 64)).astype(np.float32)}
    assert 12 < sqnr(proto, model, feed) < 60


def test_the_opset_stays_where_nothing_is_stored_in_blocks() -> None:
    small = PRODUCT.replace("256", "16")
    made = made_without_samples(small, 9, "portable", "int4-weights")
    assert made.model.opset_imports[""] == 9
    said = [remark.reason for remark in made.report.remarks]
    assert any(each.startswith("nothing to quantise") for each in said)


@pytest.mark.parametrize(
    ("target", "precision"), [("tensorrt", "int4-weights"), ("cuda", "int4-weights")]
)
def test_weights_are_judged_for_runtimes_that_do_not_run_here(target: str, precision: str) -> None:
    kept = graphopt.optimize(
        varied(PRODUCT, 21), target=target, precision=precision, inputs=ROWS[:1], budget="sqnr>=60"
    )
    said = [remark.reason for remark in kept.report.remarks]
    assert any("outside the budget" in each for each in said)
    assert not [node for node in kept.model.graph if node.op_type not in {"Gemm", "Relu"}]
    made = made_without_samples(PRODUCT, 21, target, precision)
    said = [remark.reason for remark in made.report.remarks]
    assert any(each.startswith("not timed, the runtime") for each in said)
