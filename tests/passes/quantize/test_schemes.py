"""Element types of activations and weights, with and without zero points, by tensor and by channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.quantize.coded import pack_as
from graphopt_passes.quantize.emission import quantize
from graphopt_passes.quantize.facts import Facts
from graphopt_passes.quantize.kinds import ACTIVATIONS, WEIGHTS, with_kinds
from graphopt_passes.quantize.overrides import Override, Overrides
from graphopt_passes.quantize.placement import candidates
from graphopt_passes.quantize.styles import style_named

from graphopt.calibrate.collect import collect
from graphopt.calibrate.formats import Format, Parameters, round_trip
from graphopt.errors import OptionError
from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.ir.shapes import Shapes
from graphopt.targets import get_target
from graphopt.verify.feed_files import Feed
from tests.passes.quantize.test_mixed import ROUNDS_PRODUCTS, agreement, encoders, quantised
from tests.passes.quantize.test_static import IMAGES, RESIDUAL, rows, sqnr, varied
from tests.rewriting import run

TEXT = """g (float[1,8,5,5] x) => (float[1,8,5,5] y, float[1,8,5,6] z)
<float[8,8,1,1] w, float[8] b, float[5,6] v> { y = Conv(x, w, b)  z = MatMul(x, v) }"""
RNG = np.random.default_rng(3)
FEEDS = [{"x": RNG.normal(size=(1, 8, 5, 5), loc=0.3).astype(np.float32)} for _ in range(3)]
PROTO = varied(TEXT, 21)
for tensor in PROTO.graph.initializer:  # more on one side of 0
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array + np.float32(0.2), tensor.name))
FOUND = collect(
    PROTO.SerializeToString(),
    candidates(load_model(PROTO).graph, style_named("x86-vnni"), lambda _node: True),
    [Feed(str(index), feed) for index, feed in enumerate(FEEDS)],
).values


def emitted(
    activations: str, weights: str, schemes: tuple[str, str], *, by_channel: bool
) -> ir.Model:
    model = load_model(PROTO)
    cpu = get_target("cpu")
    style = with_kinds(style_named("x86-vnni"), activations, weights, cpu, schemes)
    Shapes(model)
    overrides = Overrides(rules=(("*", Override(per_channel=by_channel)),))
    quantize(model, Facts(style, FOUND, overrides), lambda _node: True, Names.of(model))
    assert not list(violations(model))
    return model


def back(model: ir.Model, value: ir.Value) -> np.ndarray:
    """What a DequantizeLinear of constants makes, a Mul of it included, by our own arithmetic."""
    node = value.producer()
    assert node is not None
    if node.op_type == "Mul":
        first, second = node.inputs
        assert first is not None
        scales = values.array(second)
        assert scales is not None
        return back(model, first) * scales
    codes, scale, zero = (values.array(each) for each in node.inputs)
    assert codes is not None
    assert scale is not None
    assert zero is not None
    axis = node.attributes["axis"].as_int() if scale.ndim else 0
    shape = [-1 if scale.ndim and index == axis else 1 for index in range(codes.ndim)]
    zeros = zero.astype(np.float64).reshape(shape)
    return (codes.astype(np.float64) - zeros) * scale.astype(np.float64).reshape(shape)


def expected(model: ir.Model) -> tuple[np.ndarray, np.ndarray]:
    """Both outputs by our own arithmetic, in front of what stores the first."""
    read = encoders(model)["x"]
    scale, zero = (values.array(each) for each in read.inputs[1:])
    assert scale is not None
    assert zero is not None
    kind = read.outputs[0].dtype
    assert kind is not None
    given = Parameters(float(scale), int(zero), Format(kind, symmetric=False))
    x = round_trip(FEEDS[0]["x"].astype(np.float64), given)
    conv = next(node for node in model.graph if node.op_type == "Conv")
    product = next(node for node in model.graph if node.op_type == "MatMul")
    weight, bias, other = conv.inputs[1], conv.inputs[2], product.inputs[1]
    assert weight is not None
    assert bias is not None
    assert other is not None
    held = values.array(bias)
    added = back(model, bias) if held is None else held
    y = np.einsum("oc,ncij->noij", back(model, weight)[:, :, 0, 0], x)
    return y + added.reshape(-1, 1, 1), x @ back(model, other)


@pytest.mark.parametrize("weights", [*WEIGHTS])
@pytest.mark.parametrize(
    ("activations", "by_channel"), [*((kind, True) for kind in ACTIVATIONS), ("uint8", False), ("int16", False)]
)  # fmt: skip
def test_each_combination_computes_what_its_numbers_say(
    activations: str, weights: str, by_channel: bool
) -> None:
    is_float = weights.startswith("float")
    for scheme in ("symmetric",) if is_float else ("symmetric", "asymmetric"):
        for of_activations in ("symmetric", "asymmetric")[scheme == "symmetric" :]:
            model = emitted(activations, weights, (of_activations, scheme), by_channel=by_channel)
            proto = to_proto(model)
            conv = next(node for node in proto.graph.node if node.op_type == "Conv")
            proto.graph.output.append(onnx.ValueInfoProto(name=conv.output[0]))
            found = run(proto, FEEDS[0])
            for got, wanted in zip((found[-1], found[1]), expected(model), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("activations", ["uint8", "int8", "uint16", "int16", "float8e4m3fn"])
@pytest.mark.parametrize("weights", ["int8", "uint8", "uint16", "uint4"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_kernels_take_zero_points(activations: str, weights: str, scheme: str) -> None:
    model = emitted(activations, weights, ("", scheme), by_channel=True)
    rounds = ROUNDS_PRODUCTS and activations not in ("uint8", "int8")
    least = 40 if rounds or activations == weights == "int8" else 100
    assert agreement(PROTO, model, FEEDS) > least
    assert sqnr(PROTO, model, FEEDS[0]) > (10 if weights == "uint4" else 25)


def test_zero_points_lose_less_of_weights_on_one_side() -> None:
    rows_in = RNG.normal(size=(16, 64), loc=0.8, scale=0.3)
    noise = [pack_as(rows_in, ir.DataType.UINT8, symmetric=each).noise for each in (True, False)]
    assert noise[0] > 1.5 * noise[1]
    one = pack_as(rows_in, ir.DataType.UINT8, symmetric=False, one=True)
    assert one.zeros is not None
    assert len(set(one.zeros.tolist())) == 1
    assert noise[1] <= one.noise < noise[0]


@pytest.mark.parametrize("value", [0.0, 2.0, -3.0])
@pytest.mark.parametrize("one", [True, False])
def test_rows_of_one_number(value: float, one: bool) -> None:
    rows_in = np.full((3, 4), value)
    made = pack_as(rows_in, ir.DataType.UINT8, symmetric=False, one=one)
    np.testing.assert_allclose(made.decoded(), rows_in, rtol=1e-6)


def test_whole_models_in_uint8_weights_run_on_integers() -> None:
    proto = varied(RESIDUAL)
    given: dict[str, Any] = {"style": "x86-avx2", "weights": "uint8"}
    model, ctx = quantised(proto, IMAGES, weights_scheme="asymmetric", **given)
    table = rows(ctx)
    assert table["c"].kernel == "QLinearConv"
    assert table["c"].weights == "uint8"
    assert agreement(proto, model, IMAGES) > 40  # nothing saturates
    assert sqnr(proto, model, IMAGES[0]) > 25


def test_one_layer_with_zero_points() -> None:
    override = "c: weights=uint8 weights_scheme=asymmetric"
    model, ctx = quantised(varied(RESIDUAL), IMAGES, style="x86-vnni", overrides=(override,))
    assert rows(ctx)["c"].weights == "uint8"
    assert rows(ctx)["d"].weights == "int8"
    zeros = [t for t in to_proto(model).graph.initializer if t.name.startswith("w_zero")]
    assert onnx.numpy_helper.to_array(zeros[0]).any()


def test_a_value_without_zero_point() -> None:
    model, _ = quantised(
        varied(RESIDUAL), IMAGES, style="x86-vnni", overrides=("x: scheme=symmetric",)
    )
    zero = values.array(encoders(model)["x"].inputs[2])
    assert zero is not None
    assert int(zero) == 128


@pytest.mark.parametrize(("options", "told"), [
    ({"weights_scheme": "asymmetric", "style": "x86-avx2"}, "write weights of uint8"),
    ({"weights": "float8e4m3fn", "weights_scheme": "asymmetric"}, "8-bit floats have none"),
    ({"scheme": "none"}, "scheme 'none': choose symmetric or asymmetric"),
    ({"target": "tensorrt", "weights_scheme": "asymmetric"}, "the target 'tensorrt' takes none"),
    ({"target": "tensorrt", "scheme": "asymmetric"}, "the target 'tensorrt' takes none"),
    ({"target": "tensorrt", "overrides": ("c: scheme=asymmetric",)}, "TensorRT takes none"),
    ({"overrides": ("c: weights_scheme=asymmetric",), "style": "x86-avx2"}, "for 'c'"),
])  # fmt: skip
def test_what_no_kernel_takes_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        quantised(varied(RESIDUAL), IMAGES, **options)
