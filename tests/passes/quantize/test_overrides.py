"""What a recipe says of single layers and values."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from graphopt_passes.quantize.overrides import Override, parse
from graphopt_passes.quantize.static import QuantizeStatic

from graphopt.calibrate.ranges import Method
from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.rewrite import Calibration, Context, Options, name_of
from graphopt.targets import get_target
from tests.passes.quantize.test_static import IMAGES, RESIDUAL, varied


def test_later_rules_win_setting_by_setting() -> None:
    found = parse("best", ["a*: method=mse bits=7", "*b: bits=8 range=-1..2", "c: exclude"])
    assert found.of("ab") == Override(method=Method.MSE, bits=8, ends=(-1.0, 2.0))
    assert found.of("x", "c").exclude
    assert found.of("x") == Override()


@pytest.mark.parametrize(
    "text",
    [
        "a", "a:", "a: ", "a: colour=red", "a: method=best-ever", "a: bits=3", "a: dtype=int2", "a: axis=7",
        "a: range=1", "a: range=2..1", "a: range=0..inf", "a: exclude=maybe",
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match="write for example"):
        parse("best", [text])


def quantized(*overrides: str) -> ir.Model:
    model = load_model(varied(RESIDUAL))
    options = Options(calibration=Calibration(IMAGES), force=True, budget="sqnr>=0")
    ctx = Context(model, get_target("cpu"), options, pass_name="quantize-static")
    assert QuantizeStatic(overrides=overrides).run(model, ctx)
    return model


def scale_of(model: ir.Model, index: int) -> ir.TensorProtocol:
    """The scale that decodes an input of the first convolution."""
    first = next(node for node in model.graph if name_of(node) == "c")
    decode = first.inputs[index].producer()  # type: ignore[union-attr]
    return decode.inputs[1].const_value  # type: ignore[union-attr,return-value]


def test_a_layer_can_be_excluded() -> None:
    first = next(node for node in quantized("c: exclude").graph if name_of(node) == "c")
    assert first.inputs[0] is not None
    assert first.inputs[0].producer() is None


def test_a_range_can_be_stated() -> None:
    found = float(scale_of(quantized("x: range=-8..8"), 0).numpy())
    assert found == pytest.approx(16 / 255)


def test_bits_of_a_value_can_be_stated() -> None:
    eight, seven = (
        float(scale_of(quantized(f"x: range=-8..8 bits={bits}"), 0).numpy()) for bits in (8, 7)
    )
    assert seven / eight == pytest.approx(255 / 127)


def test_a_weight_can_have_one_scale() -> None:
    assert len(set(scale_of(quantized(), 1).numpy().tolist())) > 1
    assert len(set(scale_of(quantized("c: axis=tensor"), 1).numpy().tolist())) == 1


def test_a_layer_is_known_by_what_its_activation_hides() -> None:
    """c is stored as r, behind Relu."""
    plain, said = (
        next(n for n in quantized(*given).graph if name_of(n) == "d").inputs[0].producer()  # type: ignore[union-attr]
        for given in ((), ("c: range=0..64",))
    )
    scales = [float(each.inputs[1].const_value.numpy()) for each in (plain, said)]  # type: ignore[union-attr]
    assert scales[1] == pytest.approx(64 / 255)
    assert scales[0] < scales[1]


def test_all_layers_of_an_operator_can_be_told_something() -> None:
    assert float(scale_of(quantized("op:Conv: bits=7"), 0).numpy()) == pytest.approx(
        255 / 127 * float(scale_of(quantized("op:Gemm: bits=7"), 0).numpy()), rel=0.3
    )
    assert len(set(scale_of(quantized("op:Conv: axis=tensor"), 1).numpy().tolist())) == 1
    assert len(set(scale_of(quantized("op:Gemm: axis=tensor"), 1).numpy().tolist())) > 1
    left = [node for node in quantized("op:Conv: exclude").graph if node.op_type == "Conv"]
    assert [node.inputs[1].is_initializer() for node in left] == [True, True]  # type: ignore[union-attr]


def test_operators_are_no_names() -> None:
    found = parse("best", ["*: bits=7", "op:C*: method=mse"])
    assert found.of("a", "op:Gemm") == Override(bits=7)
    assert found.of("op:Conv") == Override(method=Method.MSE)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("w: axis=tensor", "axis"), ("w: method=mse range=0..1", "method, range"), ("op:Add: axis=tensor", "axis"),
        ("c: axis=tensor bits=7", ""), ("x: method=mse", ""), ("op:Conv: method=mse", ""), ("r: bits=7", ""),
    ],
)  # fmt: skip
def test_what_nothing_follows_is_told(override: str, told: str) -> None:
    model = load_model(varied(RESIDUAL))
    options = Options(calibration=Calibration(IMAGES), force=True, budget="sqnr>=0")
    ctx = Context(model, get_target("cpu"), options, pass_name="quantize-static")
    assert QuantizeStatic(overrides=(override,)).run(model, ctx)
    found = [each.reason for each in ctx.remarks if "has no effect" in each.reason]
    assert [f"has no effect in {told}:" in each for each in found] == [True] * bool(told)


@pytest.mark.parametrize("options", [
    {"overrides": ("op:Con: exclude",)}, {"overrides": ("con: exclude",)}, {"skip_nodes": ("con",)},
    {"overrides": ("z*: bits=7",)},
])  # fmt: skip
def test_a_name_that_nothing_has_is_refused(options: dict[str, tuple[str, ...]]) -> None:
    model = load_model(varied(RESIDUAL))
    ctx = Context(model, get_target("cpu"), Options(calibration=Calibration(IMAGES), force=True))
    with pytest.raises(OptionError, match="is the name of no node and no value of the model"):
        QuantizeStatic(**options).run(model, ctx)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gemm", "Convolution", "Softmax"])
def test_an_operator_that_is_never_quantised_is_refused(name: str) -> None:
    model = load_model(varied(RESIDUAL))
    ctx = Context(model, get_target("cpu"), Options(calibration=Calibration(IMAGES), force=True))
    with pytest.raises(OptionError, match=f"skip_ops names '{name}'.* Conv, .*Gemm"):
        QuantizeStatic(skip_ops=("Conv", name)).run(model, ctx)


def test_names_of_what_was_fused_away_are_known() -> None:
    model = load_model(varied(RESIDUAL))
    original = load_model(varied(RESIDUAL.replace("c = Conv", "u = Identity(x)  c = Conv")))
    given = Options(calibration=Calibration(IMAGES), force=True)
    ctx = Context(model, get_target("cpu"), given, original=lambda: original)
    assert QuantizeStatic(skip_nodes=("u",)).run(model, ctx)


@pytest.mark.parametrize(("setting", "why"), [
    ("dtype=float16", "keep a layer in float with 'exclude'"), ("dtype=uint3", "is no setting"),
    ("weights=uint3", "is no setting"), ("bits=7 dtype=uint16", "bits are those of uint8 and int8"),
])  # fmt: skip
def test_types_that_are_none_are_refused_with_the_reason(setting: str, why: str) -> None:
    with pytest.raises(OptionError, match=f"'a: {setting}'.*{why}.*types uint8, .*float8e4m3fn"):
        parse("best", [f"a: {setting}"])


def for_tensorrt(**options: Any) -> ir.Model:
    model = load_model(varied(RESIDUAL))
    given = Options(calibration=Calibration(IMAGES))
    ctx = Context(model, get_target("tensorrt"), given, pass_name="quantize-static")
    QuantizeStatic(**options).run(model, ctx)
    return model


@pytest.mark.parametrize(("options", "error"), [
    ({"overrides": ("x: dtype=uint8",)}, "uint8 for 'x' needs a zero point, .*write int8"),
    ({"overrides": ("d: dtype=uint16",)}, "uint16 for 'd' needs a zero point"),
    ({"overrides": ("d: dtype=int16",)}, "int16 for 'd' is no type that TensorRT's parser takes"),
    ({"overrides": ("d: weights=int4",)}, "int4 for 'd' is a type of weights alone"),
    ({"overrides": ("d: dtype=float8e4m3fn",)}, "float8e4m3fn for 'd' beside others"),
    ({"activations": "int16"}, "int16 with weights of int8: the parser of 'tensorrt' takes"),
    ({"activations": "float8e4m3fn"}, "float8e4m3fn with weights of int8: the parser"),
    ({"overrides": ("[x]: range=-1..4",)}, r"a range of -1..4 for 'x' needs a zero point, .*write range=-4..4"),
    ({"style": "x86-avx2"}, "style 'x86-avx2' gives 'c' inputs with zero points and an int32 bias"),
])  # fmt: skip
def test_tensorrt_is_given_no_zero_point(options: dict[str, Any], error: str) -> None:
    with pytest.raises(OptionError, match=error):
        for_tensorrt(**options)


def test_tensorrt_takes_what_is_symmetric() -> None:
    model = for_tensorrt(overrides=("x: dtype=int8 range=-4..4",))
    scale = scale_of(model, 0).numpy()
    assert float(scale) == pytest.approx(4 / 127)
