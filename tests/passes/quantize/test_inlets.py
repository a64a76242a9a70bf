"""Factors in front of products: the function stays, noise falls, and what reads otherwise is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.quantize import inlets
from graphopt_passes.quantize.inlets import Inlet
from graphopt_passes.quantize.lanes import trace
from graphopt_passes.quantize.placement import place
from graphopt_passes.quantize.static import QuantizeStatic
from graphopt_passes.quantize.styles import style_named

from graphopt.ir.build import Names
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.rewrite import Calibration, Context, Options, name_of
from graphopt.targets import get_target
from tests.passes.quantize.test_equalize import statistics
from tests.passes.quantize.test_static import varied
from tests.rewriting import parse, run

RNG = np.random.default_rng(0)
SHARED = """
g (float[1,6,32] x) => (float[1,6,8] y, float[1,6,32] r)
<float[32] s, float[32,8] w, float[32,8] v> {
 n = LayerNormalization(x, s)  r = Add(n, x)  a = MatMul(n, w)  b = MatMul(n, v)  y = Mul(a, b) }
"""
FEED = {"x": RNG.normal(size=(1, 6, 32)).astype(np.float32)}


def uneven(text: str = SHARED) -> onnx.ModelProto:
    """The model with a normalisation that makes two of its channels a hundred times as large as the others."""
    proto = varied(text)
    factors = np.ones(32, np.float32)
    factors[[3, 17]] = 100
    for held in proto.graph.initializer:
        if held.name == "s":
            held.CopyFrom(onnx.numpy_helper.from_array(factors, "s"))
    return onnx.shape_inference.infer_shapes(proto)


def planned(proto: onnx.ModelProto) -> tuple[ir.Model, tuple[Inlet, ...]]:
    model = load_model(proto)
    sites = place(model.graph, style_named("x86-vnni"), lambda _node: True)
    return model, inlets.plan(sites, statistics(proto, FEED), Names.of(model))


def test_products_of_one_value_share_the_factors_and_the_function_stays() -> None:
    proto = uneven()
    model, found = planned(proto)
    assert [(each.value, each.readers) for each in found] == [("n", ("a", "b"))]
    inlets.insert(model.graph, found, {"a", "b"}, Names.of(model))
    assert [node.op_type for node in model.graph].count("Mul") == 2
    assert not list(violations(model))
    for ours, theirs in zip(run(to_proto(model), FEED), run(proto, FEED), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_small_channels_become_larger() -> None:
    _, (found,) = planned(uneven())
    large = found.factors[[3, 17]]
    assert large.max() * 5 < np.delete(found.factors, [3, 17]).min()


def test_products_that_stay_float_keep_their_input() -> None:
    model, found = planned(uneven())
    inlets.insert(model.graph, found, {"b"}, Names.of(model))
    read = {name_of(node): node.inputs[0] for node in model.graph if node.op_type == "MatMul"}
    assert [value.name for value in read.values() if value is not None] == ["n", found[0].result]
    inlets.insert(other := load_model(uneven()).graph, found, (), Names.of(load_model(uneven())))
    assert [node.op_type for node in other].count("Mul") == 1


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1,32,6,6] x) => (float[1,8,6,6] y) <float[8,32,1,1] w> { y = Conv(x, w) }",
        SHARED,
    ],
)
def test_even_channels_and_convolutions_are_left_alone(text: str) -> None:
    proto = onnx.shape_inference.infer_shapes(varied(text))
    for held in proto.graph.initializer:
        if held.name == "s":
            held.CopyFrom(onnx.numpy_helper.from_array(np.ones(32, np.float32), "s"))
    model = load_model(proto)
    sites = place(model.graph, style_named("x86-vnni"), lambda _node: True)
    held = proto.graph.input[0].type.tensor_type.shape.dim
    feed: dict[str, Any] = {"x": RNG.normal(size=[d.dim_value for d in held]).astype(np.float32)}
    assert sites
    assert not inlets.plan(sites, statistics(proto, feed), Names.of(model))


@pytest.mark.parametrize(("budget", "factored"), [("sqnr>=32", True), ("sqnr>=5", False)])
def test_a_whole_run_takes_factors_where_noise_is_too_much(budget: str, factored: bool) -> None:
    proto = uneven()
    for held in proto.graph.initializer:
        if held.name in (
            "w",
            "v",
        ):  # what is large counts for little: the rest is what must be kept
            array = onnx.numpy_helper.to_array(held).copy()
            array[[3, 17]] /= 100
            held.CopyFrom(onnx.numpy_helper.from_array(array, held.name))
    model = load_model(proto)
    given = Options(calibration=Calibration([FEED] * 4), force=True, budget=budget)
    ctx = Context(model, get_target("cpu"), given, pass_name="quantize-static")
    QuantizeStatic().run(model, ctx)
    assert not list(violations(model))
    told = any("factors for channels of 1 values" in remark.reason for remark in ctx.remarks)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Mul") == 1 + told
    assert told == factored
    assert kinds.count("QuantizeLinear") >= 1


@pytest.mark.parametrize(
    ("inputs", "scaled"), [("x, k, s, b", 2), ("x, k, s, b, c", 2), ("x, k, s", 1)]
)
def test_fused_normalisations_carry_factors_themselves(inputs: str, scaled: int) -> None:
    text = f"""g (float[1,6,32] x, float[1,6,32] k) => (float[1,6,8] y)
    <float[32] s, float[32] b, float[32] c, float[32,8] w> {{
     n = com.microsoft.SkipLayerNormalization({inputs})  y = MatMul(n, w) }}"""
    proto = parse(text)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    (space,) = trace(load_model(proto).graph)[1]
    assert [(index, axis) for index, axis in space.makers[0].operands] == [(2, 0), (3, 0)][:scaled]
