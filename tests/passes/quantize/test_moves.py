"""What only moves stays in bytes: one scale before and after, no way back to float between two products."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.fusion import read_fusion
from graphopt_passes.quantize.moves import MOVES

from graphopt.ir import values
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.shapes import Shapes
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.verify.feed_files import Feed
from tests.passes.quantize.test_static import IMAGES, ops, quantized, sqnr, varied

HEAD = """g (float[1,8,10,10] x) => (float[N,M,A,B] y)
<float[8,8,3,3] w, float[8,2,1,1] v2, float[8,4,1,1] v4, float[8,8,1,1] v8, float[8,16,1,1] v16, float[8,32,1,1] v32,
 int64[2] halves = {4, 4}, int64[3] thirds = {2, 4, 2}, int64[1] none = {0}, int64[1] one = {1}, int64[1] four = {4},
 int64[4] some = {6, 1, 1, 2}, int64[4] square = {1, 8, 20, 5}, int64[8] edges = {0, 0, 1, 1, 0, 0, 2, 2},
 int64[4] tiled = {1, 1, 2, 1}, int64[4] large = {1, 8, 20, 20}, int64[2] area = {2, 3}, int64[4] wide = {1, 8, 10, 10},
 int64[1,1,4,4] first = {5, 1, 2, 3, 4, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0}, float[8,1,1,1] v1>
{ c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  """
HALF = "h = Constant<value = float {0.5}>()  "
BOX = "b = Constant<value = float[8] {0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0}>()  "
NEAR = 'nearest", coordinate_transformation_mode="tf_crop_and_resize'

KEPT = [
    ("s, t = Split<axis=1>(r, halves)  a = Conv(s, v4)  b = Conv(t, v4)  d = Add(a, b)  y = Conv(d, v8)", 13),
    ("s, t = Split<axis=1, num_outputs=2>(r)  m = Concat<axis=1>(t, r, s)  y = Conv(m, v16)", 18),
    ("s, t, u = Split<axis=1>(r, thirds)  y = Conv(t, v4)", 13),
    ("m = Slice(r, none, four, one)  y = Conv(m, v4)", 13),
    ("m = Gather<axis=1>(r, some)  y = Conv(m, v4)", 13),
    ("m = GatherElements<axis=3>(r, first)  y = Conv(m, v1)", 13),
    ("m = Transpose<perm=[0,1,3,2]>(r)  y = Conv(m, v8)", 13),
    ("m = Reshape(r, square)  y = Conv(m, v8)", 13),
    ("m = Pad(r, edges)  y = Conv(m, v8)", 13),
    ("f = Constant<value = float {0.0}>()  m = Pad(r, edges, f)  y = Conv(m, v8)", 13),
    ("m = Pad<mode=\"reflect\">(r, edges)  y = Conv(m, v8)", 11),
    (HALF + "m = Pad<mode=\"edge\">(r, edges, h)  y = Conv(m, v8)", 21),
    ("m = Resize<mode=\"nearest\">(r, , , large)  y = Conv(m, v8)", 13),
    ("m = DepthToSpace<blocksize=2>(r)  y = Conv(m, v2)", 13),
    ("m = SpaceToDepth<blocksize=2>(r)  y = Conv(m, v32)", 13),
    ("m = Tile(r, tiled)  y = Conv(m, v8)", 13),
    ("p = GlobalAveragePool(r)  m = Expand(p, wide)  y = Conv(m, v8)", 13),
    ("m = ReduceMax(r, area)  y = Conv(m, v8)", 18),
    ("d = Conv(r, v8)  m = ReduceMin<axes=[1]>(d)  p = Expand(m, wide)  y = Conv(p, v8)", 13),
    ("m = MaxPool<kernel_shape=[2,2]>(r)  y = Conv(m, v8)", 12),
]  # fmt: skip

LEFT = [
    (HALF + "m = Pad(r, edges, h)  y = Conv(m, v8)", 13, "Pad"),
    ("m = Resize<mode=\"linear\">(r, , , large)  y = Conv(m, v8)", 13, "Resize"),
    (BOX + f"m = Resize<mode=\"{NEAR}\">(r, b, , large)  y = Conv(m, v8)", 13, "Resize"),
    ("m = MaxPool<kernel_shape=[2,2]>(r)  y = Conv(m, v8)", 11, "MaxPool"),
    ("m, i = MaxPool<kernel_shape=[2,2]>(r)  n = Cast<to=1>(i)  o = Mul(m, n)  y = Conv(o, v8)", 13, "MaxPool"),
    ("m = ReduceMax<axes=[2,3]>(r)  y = Conv(m, v8)", 11, "ReduceMax"),
]  # fmt: skip


def everything(model: ir.Model) -> list[str]:
    return [value.name or "" for node in model.graph for value in node.outputs]


@pytest.mark.parametrize(("body", "opset"), KEPT)
def test_what_moves_stays_in_bytes(body: str, opset: int) -> None:
    proto = varied(HEAD + body + " }", opset)
    model, layers = quantized(proto, IMAGES, "x86-vnni")
    fusion = read_fusion(model, everything(model))
    assert not fusion.leftovers
    assert fusion.edges == 2  # x and y
    assert any(layer.op_type in MOVES for layer in layers)
    assert sqnr(proto, model, IMAGES[0]) > 25
    assert Judgement(load_model(proto), [Feed("0", IMAGES[0])]).agreement(model) > 120


@pytest.mark.parametrize(("body", "opset", "op_type"), LEFT)
def test_what_writes_other_numbers_stays_float(body: str, opset: int, op_type: str) -> None:
    model, layers = quantized(varied(HEAD + body + " }", opset), IMAGES, "x86-vnni")
    assert op_type not in {layer.op_type for layer in layers}
    assert op_type in ops(model)


def test_a_split_has_one_scale() -> None:
    model, _ = quantized(varied(HEAD + KEPT[0][0] + " }"), IMAGES)
    split = next(node for node in model.graph if node.op_type == "Split")
    stored = [split.inputs[0], *(next(iter(v.uses())).node.outputs[0] for v in split.outputs)]
    scales = [values.scalar(value.producer().inputs[1]) for value in stored]  # type: ignore[union-attr]
    assert len(scales) == 3
    assert len(set(scales)) == 1


def test_a_part_that_is_read_in_float_too_is_decoded() -> None:
    body = "s, t = Split<axis=1>(r, halves)  a = Conv(s, v4)  b = Tan(t)  e = Conv(b, v4)  y = Add(a, e) }"
    proto = varied(HEAD + body)
    model, _ = quantized(proto, IMAGES, "x86-vnni")
    tan = next(node for node in model.graph if node.op_type == "Tan")
    assert tan.inputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    assert not read_fusion(model, ["s", "t", "a", "e"]).leftovers


def test_what_moves_codes_may_be_an_output() -> None:
    body = "y = Pad(r, edges)  m = Conv(y, v8)  z = Neg(m) }"
    proto = varied(HEAD.replace("B] y)", "B] y, float[N,M,A,B] z)") + body)
    model, _ = quantized(proto, IMAGES, "x86-vnni")
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0].dtype is ir.DataType.FLOAT
    assert sqnr(proto, model, IMAGES[0]) > 25


def test_moves_between_floats_are_left_alone() -> None:
    body = "s, t = Split<axis=1>(x, halves)  d = Tan(s)  e = Tan(t)  y = Concat<axis=1>(d, e, c) }"
    _, layers = quantized(varied(HEAD + body), IMAGES)
    assert [layer.op_type for layer in layers] == ["Conv"]


POOLED = "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)  y = Conv(m, v8) }"


def test_a_pool_behind_a_float_convolution_stays_float(tmp_path: Path) -> None:
    """Bytes read behind it are no reason to pool bytes: the runtime's kernel for them wants a convolution in front."""
    proto = varied(HEAD + POOLED)
    model, _ = quantized(proto, IMAGES, "x86-vnni", lambda node: node.outputs[0].name == "y")
    encode = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert encode.inputs[0].producer().op_type == "Max"  # type: ignore[union-attr]
    assert sqnr(proto, model, IMAGES[0]) > 30
    path = tmp_path / "deployed.onnx"
    options = SessionOptions(optimized_path=path)
    Session(model_to_bytes(model), level=OptimizationLevel.EXTENDED, options=options)
    deployed = load_model(path)
    Shapes(deployed)
    pool = next(node for node in deployed.graph if node.op_type == "MaxPool")
    assert pool.inputs[0] is not None
    assert pool.inputs[0].dtype is ir.DataType.FLOAT


@pytest.mark.parametrize("style", ["x86-vnni", "tensorrt"])
def test_nothing_is_put_behind_other_pools(style: str) -> None:
    model, _ = quantized(varied(HEAD + POOLED), IMAGES, style)
    assert "Max" not in ops(model)
