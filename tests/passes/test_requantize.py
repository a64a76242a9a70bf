"""Q/DQ pairs with zero points become symmetric: what changes, what stays exact at the boundary, what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.requantize import SymmetrizeQuantization

from graphopt.emit.legality import check_legality
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Context, Options, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse, run

PAIR = """g (float[1,2,4,4] x) => (float[1,3,4,4] y)
<float s = {0.05}, uint8 z = {100}, float ws = {0.02}, uint8 wz = {120}, uint8[3,2,1,1] w = {10, 200, 120, 255, 0, 90},
 float bs = {0.001}, int32 bz = {0}, int32[3] b = {1000, -2000, 500}> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    f = DequantizeLinear(w, ws, wz)
    c = DequantizeLinear(b, bs, bz)
    y = Conv(d, f, c)
}"""
EDGES = """g (uint8[1,4,4,2] x) => (uint8[1,2,16] y)
<float s = {0.05}, uint8 z = {100}, float t = {0.1}, uint8 o = {7}, int64[3] shape = {1, 2, 16}> {
    p = Transpose<perm = [0, 3, 1, 2]>(x)
    d = DequantizeLinear(p, s, z)
    e = Relu(d)
    q = QuantizeLinear(e, t, o)
    y = Reshape(q, shape)
}"""


def made(text: str, target: str = "tensorrt") -> tuple[ir.Model, Context]:
    model = ir.from_proto(parse(text))
    return model, apply(model, target)


def apply(model: ir.Model, target: str = "tensorrt") -> Context:
    ctx = Context(model, get_target(target), Options())
    run_pipeline(model, (SymmetrizeQuantization(),), ctx)
    return ctx


def test_bytes_become_signed_around_zero() -> None:
    model, ctx = made(PAIR)
    assert ctx.rewrites
    assert not check_legality(model, get_target("tensorrt")).refused
    x = np.random.default_rng(0).normal(0, 2, (1, 2, 4, 4)).astype(np.float32)
    (before,), (after,) = run(parse(PAIR), {"x": x}), run(ir.to_proto(model), {"x": x})
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()


def test_filters_get_a_scale_for_each_output_channel_and_biases_are_floats() -> None:
    model, _ = made(PAIR)
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    assert conv.inputs[1] is not None
    filters = conv.inputs[1].producer()
    assert filters is not None
    assert filters.attributes["axis"].as_int() == 0
    scales = filters.inputs[1]
    assert scales is not None
    assert list(scales.shape or ()) == [3]
    bias = conv.inputs[2]
    assert bias is not None
    assert bias.const_value is not None
    np.testing.assert_allclose(bias.const_value.numpy(), [1.0, -2.0, 0.5])


def test_what_enters_and_leaves_stays_exact() -> None:
    model, ctx = made(EDGES)
    assert ctx.rewrites
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph}
    assert not check_legality(model, get_target("tensorrt")).refused
    x = np.arange(32, dtype=np.uint8).reshape(1, 4, 4, 2) * 8
    (before,), (after,) = run(parse(EDGES), {"x": x}), run(ir.to_proto(model), {"x": x})
    np.testing.assert_array_equal(before, after)


def test_a_second_run_changes_nothing() -> None:
    model, _ = made(PAIR)
    assert not apply(model).rewrites


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_targets_with_zero_points_keep_them(target: str) -> None:
    assert not made(PAIR, target)[1].rewrites


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("y = Conv(d, f, c)", "y = Conv(d, f, c) k = Cast<to = 1>(q)"), "read by Cast"),
        (("d = DequantizeLinear(q, s, z)", "d = DequantizeLinear(q, bs, z)"), "another scale"),
        (("=> (float[1,3,4,4] y)", "=> (float[1,3,4,4] y, uint8[1,2,4,4] q)"), "leave the model"),
    ],
)
def test_bytes_that_go_elsewhere_stay(change: tuple[str, str], reason: str) -> None:
    _, ctx = made(PAIR.replace(*change))
    assert not ctx.rewrites
    missed = [remark.reason for remark in ctx.remarks if remark.kind is RemarkKind.MISSED]
    assert any(reason in each for each in missed), missed
