"""Activations and weights in 16 and 4 bits and in 8-bit floats: numbers, domains, single layers, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.coded import pack_as
from graphopt_passes.quantize.emission import quantize
from graphopt_passes.quantize.facts import Facts
from graphopt_passes.quantize.kinds import ACTIVATIONS, with_kinds
from graphopt_passes.quantize.placement import candidates
from graphopt_passes.quantize.static import QuantizeStatic
from graphopt_passes.quantize.styles import style_named

from graphopt.calibrate.collect import collect
from graphopt.calibrate.formats import Format, Parameters, round_trip
from graphopt.emit.legality import check_legality
from graphopt.errors import OptionError
from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Calibration, Context, Options, name_of
from graphopt.targets import get_target
from graphopt.verify.feed_files import Feed
from tests.passes.quantize.test_static import (
    BLOCK,
    IMAGES,
    RESIDUAL,
    TOKENS,
    rows,
    sqnr,
    varied,
)
from tests.rewriting import run

CHAIN = """g (float[1,8,10,10] x) => (float[1,8,10,10] y)
<float[8,8,3,3] w, float[8] b, float[8,8,3,3] v, float[8,8,3,3] u, float[8] k, float[8,8,3,3] t, float[8,8,1,1] h> {
 c1 = Conv<pads=[1,1,1,1]>(x, w, b)  r1 = Relu(c1)  c2 = Conv<pads=[1,1,1,1]>(r1, v)  r2 = Relu(c2)
 c3 = Conv<pads=[1,1,1,1]>(r2, u, k)  r3 = Relu(c3)  c4 = Conv<pads=[1,1,1,1]>(r3, t)  r4 = Relu(c4)
 y = Conv(r4, h) }"""

ROUNDS_PRODUCTS = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 32)
"""From 1.32 on, ONNX Runtime makes MatMulNBits of a product of float values and int8 weights that are decoded; its
kernel rounds the values to 8 bits, by blocks, whatever they were stored in."""


def quantised(
    proto: onnx.ModelProto,
    feeds: list[dict[str, Any]],
    *,
    target: str = "cpu",
    force: bool = True,
    **options: Any,
) -> tuple[ir.Model, Context]:
    model = load_model(proto)
    given = Options(
        calibration=Calibration(feeds), force=force, budget="sqnr>=0" if force else None
    )
    ctx = Context(model, get_target(target), given, pass_name="quantize-static")
    QuantizeStatic(**options).run(model, ctx)
    assert not list(violations(model))
    onnx.checker.check_model(to_proto(model))
    return model, ctx


def agreement(proto: onnx.ModelProto, model: ir.Model, feeds: list[dict[str, Any]]) -> float:
    """What kernels compute against what Q and DQ say, in dB."""
    judge = Judgement(load_model(proto), [Feed(str(i), feed) for i, feed in enumerate(feeds)])
    return judge.agreement(model)


def encoders(model: ir.Model) -> dict[str, ir.Node]:
    nodes = (node for node in model.graph if node.op_type == "QuantizeLinear")
    return {value.name or "": node for node in nodes if (value := node.inputs[0]) is not None}


def emitted(
    proto: onnx.ModelProto, feeds: list[dict[str, Any]], activations: str, weights: str
) -> ir.Model:
    """All layers in these types, whether or not that pays."""
    model = load_model(proto)
    style = with_kinds(style_named("x86-vnni"), activations, weights, get_target("cpu"))
    Shapes(model)
    names = candidates(model.graph, style, lambda _node: True)
    given = [Feed(str(i), feed) for i, feed in enumerate(feeds)]
    found = collect(proto.SerializeToString(), names, given)
    quantize(model, Facts(style, found.values), lambda _node: True, Names.of(model))
    assert not list(violations(model))
    onnx.checker.check_model(to_proto(model))
    return model


@pytest.mark.parametrize(("activations", "weights", "least"), [
    ("uint16", "", 30), ("int16", "int16", 80), ("uint16", "int16", 80), ("uint4", "int4", 8), ("int4", "", 8),
    ("float8e4m3fn", "float8e4m3fn", 18), ("float8e5m2", "", 12), ("uint8", "int16", 30),
])  # fmt: skip
@pytest.mark.parametrize(
    ("text", "feeds", "opset"),
    [(CHAIN, IMAGES, 19), (RESIDUAL, IMAGES, 21), (BLOCK, TOKENS, 19), (BLOCK, TOKENS, 23)],
)
def test_any_type_computes_what_q_and_dq_say(
    activations: str, weights: str, least: float, text: str, feeds: list[dict[str, Any]], opset: int
) -> None:
    proto = varied(text, opset)
    model = emitted(proto, feeds, activations, weights)
    kind = ACTIVATIONS[activations]
    assert sqnr(proto, model, feeds[0]) > least
    rounded = ROUNDS_PRODUCTS and not weights and activations == "uint16" and text != CHAIN
    assert agreement(proto, model, feeds) > (45 if rounded else 120)
    encode = next(iter(encoders(model).values()))
    assert encode.outputs[0].dtype is kind
    contrib = kind.is_integer() and kind.bitwidth != 8 and opset < 21
    assert encode.domain == ("com.microsoft" if contrib else "")


@pytest.mark.parametrize("activations", [*ACTIVATIONS])
def test_numbers_are_those_of_the_format(activations: str) -> None:
    model = emitted(varied(RESIDUAL, 21), IMAGES, activations, "")
    encode = encoders(model)["x"]
    scale, zero = (values.array(value) for value in encode.inputs[1:])
    assert scale is not None
    assert zero is not None
    given = Parameters(float(scale), int(zero), Format(ACTIVATIONS[activations], symmetric=False))
    decode = next(iter(encode.outputs[0].uses())).node
    tapped = to_proto(model)
    tapped.graph.output.append(onnx.ValueInfoProto(name=decode.outputs[0].name))
    found, expected = (
        run(tapped, IMAGES[0])[-1],
        round_trip(IMAGES[0]["x"].astype(np.float64), given),
    )
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"activations": "uint16"}, {"weights": "int16"}, {"activations": "float8e4m3fn"}]
)
def test_what_no_kernel_multiplies_needs_force(options: dict[str, str]) -> None:
    model, ctx = quantised(varied(CHAIN), IMAGES, force=False, **options)
    assert not encoders(model)
    assert any(
        "no layer would be faster" in each.reason and "--force" in each.reason
        for each in ctx.remarks
    )


@pytest.mark.parametrize(
    "override", ["c3: dtype=uint16", "c3: dtype=int16 weights=int16", "c3: dtype=float8e4m3fn"]
)
def test_one_layer_in_another_type_leaves_the_others_on_integers(override: str) -> None:
    proto = varied(CHAIN)
    model, ctx = quantised(proto, IMAGES, style="x86-vnni", overrides=(override,))
    found, kind = rows(ctx), override.split("dtype=")[1].split(maxsplit=1)[0]
    assert found["c3"].kernel == "Conv"
    assert found["c3"].activations == kind
    assert found["c3"].weights == ("int16" if "weights" in override else "int8")
    assert [found[name].kernel for name in ("c1", "c4")] == ["QLinearConv"] * 2
    kinds = {name: node.outputs[0].dtype for name, node in encoders(model).items()}
    # c2 makes what c3 reads: nothing stores that in 8 bits, and c2 is float indeed.
    assert kinds.pop(next(name for name in kinds if name.startswith("r2"))) is ACTIVATIONS[kind]
    assert set(kinds.values()) == {ir.DataType.UINT8}
    assert agreement(proto, model, IMAGES) > 120


def test_a_value_can_have_another_type() -> None:
    model, ctx = quantised(varied(CHAIN), IMAGES, style="x86-vnni", overrides=("x: dtype=uint16",))
    assert encoders(model)["x"].outputs[0].dtype is ir.DataType.UINT16
    assert rows(ctx)["c1"].activations == "uint16"
    assert rows(ctx)["c2"].kernel == "QLinearConv"


def test_bytes_can_be_stated_where_others_are_of_16_bits() -> None:
    model, ctx = quantised(
        varied(CHAIN), IMAGES, activations="uint16", overrides=("r3: dtype=uint8",)
    )
    kinds = {name: node.outputs[0].dtype for name, node in encoders(model).items()}
    assert kinds["r3"] is ir.DataType.UINT8
    assert kinds["r2"] is ir.DataType.UINT16
    assert rows(ctx)["c4"].activations == "uint8"


def test_a_name_of_a_node_alone_holds_for_what_it_reads() -> None:
    proto = varied(CHAIN)
    next(node for node in proto.graph.node if node.output[0] == "c1").name = "stem"
    model, _ = quantised(proto, IMAGES, style="x86-vnni", overrides=("stem: range=-2..2",))
    scale = values.array(encoders(model)["x"].inputs[1])
    assert scale is not None
    assert float(scale) == pytest.approx(4 / 255)


def test_an_excluded_layer_stays_float_between_layers_in_8_bits() -> None:
    # The runtime would make int8 of its weight, with one scale for all channels.
    proto = varied(CHAIN)
    model, _ = quantised(proto, IMAGES, style="x86-vnni", overrides=("c2: exclude",))
    assert agreement(proto, model, IMAGES) > 120
    node = next(node for node in model.graph if name_of(node) == "c2")
    assert (node.domain, node.op_type) == ("com.microsoft", "FusedConv")


def test_tensorrt_takes_8_bit_floats() -> None:
    kind = "float8e4m3fn"
    proto = varied(RESIDUAL)
    model, _ = quantised(proto, IMAGES, target="tensorrt", activations=kind, weights=kind)
    assert {node.outputs[0].dtype for node in encoders(model).values()} == {
        ir.DataType.FLOAT8E4M3FN
    }
    assert not check_legality(model, get_target("tensorrt")).refused
    assert sqnr(proto, model, IMAGES[0]) > 20


def test_unknown_types_are_refused() -> None:
    with pytest.raises(
        OptionError, match="activations of 'uint32': choose one of uint8, int8, uint16"
    ):
        quantised(varied(CHAIN), IMAGES, activations="uint32")
    with pytest.raises(OptionError, match="weights of 'uint32': choose one of int8, uint8"):
        quantised(varied(CHAIN), IMAGES, weights="uint32")


def test_an_opset_without_8_bit_floats_is_lifted() -> None:
    model, _ = quantised(varied(CHAIN, 17), IMAGES, activations="float8e4m3fn")
    assert model.opset_imports[""] == 19


@pytest.mark.parametrize("kind", ["int16", "int4", "float8e4m3fn"])
def test_weights_are_coded_row_by_row(kind: str) -> None:
    rows_in = np.array([[0.0, 0.0], [1.0, -0.5], [1e-3, 2e-3]], np.float32)
    found = pack_as(rows_in, ACTIVATIONS[kind])
    assert found.scales[0] == 1
    back = found.codes.astype(np.float64) * found.scales[:, None]
    step = {"int16": 1e-4, "int4": 0.15, "float8e4m3fn": 0.07}[kind]
    assert (
        np.abs(back - rows_in) <= step * np.abs(rows_in).max(axis=1, keepdims=True) + 1e-12
    ).all()
    assert len(set(pack_as(rows_in, ACTIVATIONS[kind], shared=True).scales.tolist())) == 1


ENDS_IN_POOL = """g (float[1,8,10,10] x) => (float[1,8,5,5] y) <float[8,8,3,3] w, float[8] b, float[8,8,3,3] v> {
 c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  d = Conv<pads=[1,1,1,1]>(r, v)  e = Add(d, r)
 y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(e) }"""


@pytest.mark.parametrize(
    ("override", "told"), [("e*: dtype=uint16", True), ("y*: dtype=int16", True), ("d: dtype=uint16", False),
                           ("e: dtype=uint16", False), ("y: dtype=int16", False), ("e: dtype=float8e4m3fn", False),
                           ("r: dtype=uint16", False), ("e: weights=int16", True), ("d: weights=int16", False)]
)  # fmt: skip
def test_an_override_without_effect_is_told(override: str, told: bool) -> None:
    _, ctx = quantised(varied(ENDS_IN_POOL), IMAGES, style="x86-vnni", overrides=(override,))
    found = [each.reason for each in ctx.remarks if "has no effect" in each.reason]
    assert [f"override '{override}' has no effect" in each for each in found] == [True] * told


@pytest.mark.parametrize(("text", "feeds", "name", "kind"), [
    (RESIDUAL, IMAGES, "s", "uint16"), (RESIDUAL, IMAGES, "p", "float8e4m3fn"), (RESIDUAL, IMAGES, "q", "float8e5m2"),
    (RESIDUAL, IMAGES, "f", "uint4"), (RESIDUAL, IMAGES, "p", "int16"), (ENDS_IN_POOL, IMAGES, "y", "int16"),
    (ENDS_IN_POOL, IMAGES, "y", "float8e4m3fn"), (BLOCK, TOKENS, "i", "int4"), (BLOCK, TOKENS, "y", "float8e4m3fn"),
    (BLOCK, TOKENS, "y", "uint16"),
])  # fmt: skip
def test_sums_pools_and_views_that_are_named_are_stored_so(
    text: str, feeds: list[dict[str, Any]], name: str, kind: str
) -> None:
    proto = varied(text, 19)
    model, ctx = quantised(proto, feeds, style="x86-vnni", overrides=(f"{name}: dtype={kind}",))
    assert ACTIVATIONS[kind] in {node.outputs[0].dtype for node in encoders(model).values()}
    assert not [each.reason for each in ctx.remarks if "has no effect" in each.reason]
    assert rows(ctx)[name].activations == kind
    assert agreement(proto, model, feeds) > 120
    assert sqnr(proto, model, feeds[0]) > (15 if "4" in kind and "8" not in kind else 22)


def test_what_is_named_but_excluded_or_no_float_stays() -> None:
    text = ENDS_IN_POOL.replace("{\n c", "{ z = Shape(x)  k = Add(z, z)\n c").replace(
        "=> (float[1,8,5,5] y)", "=> (float[1,8,5,5] y, int64[4] k)"
    )
    given = ("e: dtype=uint16", "e: exclude", "k: dtype=uint16")
    model, ctx = quantised(varied(text), IMAGES, style="x86-vnni", overrides=given)
    kinds = {node.outputs[0].dtype for node in encoders(model).values()}
    assert ir.DataType.UINT16 not in kinds
    assert any("'k: dtype=uint16' has no effect" in each.reason for each in ctx.remarks)


def test_tensorrt_says_which_types_of_single_sums_it_lacks() -> None:
    with pytest.raises(OptionError, match=r"'e'.*needs a zero point, and TensorRT takes none"):
        quantised(varied(ENDS_IN_POOL), IMAGES, target="tensorrt", overrides=("e: dtype=uint16",))


POOLS_A_SUM = """g (float[1,8,10,10] x) => (float[1,8,9,9] y, float[1,800] z)
<float[8,8,3,3] w, float[8,8,1,1] v, int64[2] s = {1, 800}> {
 c = Conv<pads=[1,1,1,1]>(x, w)  e = Add(c, x)  m = MaxPool<kernel_shape=[2,2]>(e)  t = Tanh(m)  y = Conv(t, v)
 z = Reshape(e, s) }"""


@pytest.mark.parametrize("kind", ["uint4", "float8e4m3fn", "uint16"])
def test_moves_in_float_read_what_was_decoded(kind: str) -> None:
    """The runtime would have them read codes, in types that it has no kernels for."""
    proto = varied(POOLS_A_SUM)
    model, _ = quantised(proto, IMAGES, style="x86-vnni", overrides=(f"e: dtype={kind}",))
    assert ACTIVATIONS[kind] in {node.outputs[0].dtype for node in encoders(model).values()}
    assert agreement(proto, model, IMAGES) > 100
