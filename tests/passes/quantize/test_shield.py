"""Float layers between Q and DQ: the runtime quantises their weights by itself, unless they are written otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.shield import shield

from graphopt.ir.build import Names
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.verify.feed_files import Feed
from tests.rewriting import parse

SCALES = "float s = {0.02}, uint8 z = {128}, float[2] q = {0.01, 0.02}, int8[2] o = {0, 0}"
IMAGE = "g (float[1,2,5,5] x) => (float[1,2,5,5] y)"
AROUND = "e = QuantizeLinear(x, s, z)  d = DequantizeLinear(e, s, z)"
BEHIND = "f = QuantizeLinear(r, s, z)  y = DequantizeLinear(f, s, z)"
CONV = f"{IMAGE} <{SCALES}, float[2,2,1,1] w> {{ {AROUND} c = Conv(d, w)  r = Relu(c) {BEHIND} }}"
TRANSPOSED = f"{IMAGE} <{SCALES}, float[2,2,1,1] w> {{ {AROUND} r = ConvTranspose(d, w) {BEHIND} }}"
GEMM = f"""g (float[9,16] x) => (float[9,16] y) <{SCALES}, float[16,16] w, float[16] b> {{
 {AROUND} r = Gemm<transB=1>(d, w, b) {BEHIND} }}"""
CODED = f"""{IMAGE} <{SCALES}, int8[2,2,1,1] w = {{1, 2, 3, 4}}> {{
 {AROUND} v = DequantizeLinear<axis=0>(w, q, o)  r = Conv(d, v) {BEHIND} }}"""
ENDING = f"{IMAGE} <{SCALES}, float[2,2,1,1] w> {{ {AROUND} y = Conv(d, w) }}"
PLAIN = f"{IMAGE} <{SCALES}, float[2,2,1,1] w> {{ r = Conv(x, w) {BEHIND} }}"


def uneven(text: str) -> onnx.ModelProto:
    """With weights of very different channels: one scale for all of them shows."""
    proto = parse(text, opset=18)
    rng = np.random.default_rng(2)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w", "b") and tensor.data_type == onnx.TensorProto.FLOAT:
            drawn = rng.normal(size=tuple(tensor.dims)).astype(np.float32)
            drawn[0] *= 0.004
            tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    return proto


def agreement(proto: onnx.ModelProto) -> float:
    model = load_model(proto)
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    draw = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Judgement(model, [Feed("0", {"x": draw})]).agreement(model)


@pytest.mark.parametrize(
    ("text", "became", "contrib"),
    [
        (CONV, "FusedConv", True),
        (CONV, "Max", False),
        (GEMM, "Max", True),
        (TRANSPOSED, "Max", True),
    ],
)
def test_float_weights_stay_float(text: str, became: str, contrib: bool) -> None:
    proto = uneven(text)
    assert agreement(proto) < 60  # what the runtime makes of it
    model = load_model(proto)
    shielded = shield(model.graph, Names.of(model), contrib=contrib)
    assert shielded == became.startswith("Fused")
    assert became in [node.op_type for node in model.graph]
    assert not list(violations(model))
    model.opset_imports["com.microsoft"] = 1
    draw = np.random.default_rng(0).normal(
        size=(model.graph.inputs[0].shape or ir.Shape([])).numpy()
    )
    judge = Judgement(load_model(proto), [Feed("0", {"x": draw.astype(np.float32)})])
    assert judge.agreement(model) > 100


@pytest.mark.parametrize("text", [CODED, ENDING, PLAIN])
def test_others_are_left_as_they_are(text: str) -> None:
    model = load_model(uneven(text))
    before = [node.op_type for node in model.graph]
    assert not shield(model.graph, Names.of(model))
    assert [node.op_type for node in model.graph] == before


POOLS = f"""g (float[1,2,6,6] x) => (float[1,2,3,3] y) <{SCALES}> {{
 r = Relu(x)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)  f = QuantizeLinear(p, s, z)
 y = DequantizeLinear(f, s, z) }}"""
TURNED = POOLS.replace("f = Q", "t = Transpose<perm=[0,2,3,1]>(p)  f = Q").replace("r(p,", "r(t,")
READ = POOLS.replace("y = Deq", "d = Deq").replace(" }", "  y = Add(d, p) }")
INSIDE = POOLS.replace("r = Relu(x)", "e = QuantizeLinear(x, s, z)  r = DequantizeLinear(e, s, z)")


@pytest.mark.parametrize(("text", "kept"), [(POOLS, 1), (TURNED, 1), (READ, 0), (INSIDE, 0)])
def test_float_pools_stay_float(text: str, kept: int, tmp_path: Path) -> None:
    """ONNX Runtime moves a Q up through what nobody else reads; between integers a pool may run on bytes."""
    model = load_model(parse(text, opset=18))
    shield(model.graph, Names.of(model))
    assert not list(violations(model))
    assert sum(node.op_type == "Max" for node in model.graph) == kept
    assert pools_in_float(model, tmp_path) == (text != INSIDE)


def test_standard_operators_alone_get_no_guard_of_pools(tmp_path: Path) -> None:
    model = load_model(parse(POOLS, opset=18))
    shield(model.graph, Names.of(model), contrib=False)
    assert not pools_in_float(model, tmp_path)


def pools_in_float(model: ir.Model, folder: Path) -> bool:
    """Whether the runtime pools before it encodes."""
    path = folder / "optimized.onnx"
    Session(
        model_to_bytes(model),
        level=OptimizationLevel.EXTENDED,
        options=SessionOptions(optimized_path=path),
    )
    kinds = [node.op_type for node in load_model(path).graph if node.op_type != "DequantizeLinear"]
    return kinds.index("MaxPool") < max(
        i for i, kind in enumerate(kinds) if kind == "QuantizeLinear"
    )
