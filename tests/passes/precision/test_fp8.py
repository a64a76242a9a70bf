"""8-bit floats for TensorRT: pairs in front of products, scales from samples, plans that say which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.precision import CastToHalf, QuantizeFp8

from graphopt.driver import optimize
from graphopt.errors import OptionError
from graphopt.ir.model_file import model_to_bytes
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Calibration, Context, Options
from graphopt.runtime.session import Session
from graphopt.targets import get_target
from tests.rewriting import parse

Array = np.ndarray[Any, Any]
TEXT = (
    "g (float[N,16] x) => (float[N,8] y) <float[16,16] w, float[8,16] v>"
    "{ a = MatMul(x, w) b = Relu(a) y = Gemm<transB=1>(b, v) }"
)
X = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


def quantised(
    step: QuantizeFp8, text: str = TEXT, opset: int = 19
) -> tuple[ir.Model, Context, onnx.ModelProto]:
    proto = parse(text, opset=opset)
    model = ir.from_proto(proto)
    options = Options(calibration=Calibration([{"x": X}]))
    ctx = Context(model, get_target("tensorrt"), options)
    run_pipeline(model, (step,), ctx)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, ctx, proto


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_products_read_pairs_and_weights_in_8_bits() -> None:
    model, _, proto = quantised(QuantizeFp8())
    assert operators(model).count("QuantizeLinear") == 2
    assert operators(model).count("DequantizeLinear") == 4
    held = [
        v for n, v in model.graph.initializers.items() if n.startswith(("w_float8", "v_float8"))
    ]
    assert [v.dtype for v in held] == [ir.DataType.FLOAT8E4M3FN] * 2
    axes = [n.attributes["axis"].as_int() for n in model.graph if "axis" in n.attributes]
    assert axes == [1, 0]
    expected = Session(proto.SerializeToString()).run({"x": X})["y"]
    found = Session(model_to_bytes(model)).run({"x": X})["y"]
    noise = float(np.sqrt(np.mean((expected - found) ** 2)))
    assert 0 < noise < 0.05 * float(np.sqrt(np.mean(expected**2)))


def test_the_scale_takes_the_greatest_sample_to_the_greatest_float() -> None:
    model, _, _ = quantised(QuantizeFp8())
    scale = model.graph.initializers["x_scale"].const_value
    assert scale is not None
    assert float(scale.numpy()) == pytest.approx(float(np.abs(X).max()) / 448)


def test_a_plan_says_which(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model = ir.from_proto(parse(TEXT, opset=19))
    run_pipeline(model, (CastToHalf(write_plan=str(path)),), Context(model, get_target("tensorrt")))
    body = json.loads(path.read_text())
    body["nodes"][0]["dtype"] = "float8"
    path.write_text(json.dumps(body))
    made, _, _ = quantised(QuantizeFp8(plan=str(path)))
    assert operators(made).count("QuantizeLinear") == 1


def test_nodes_can_be_left_out_by_name() -> None:
    made, _, _ = quantised(QuantizeFp8(float32=("a",)))
    assert operators(made).count("QuantizeLinear") == 1


def test_what_was_zero_throughout_is_left_alone() -> None:
    text = TEXT.replace("a = MatMul(x, w)", "z = Sub(x, x) a = MatMul(z, w)")
    made, ctx, _ = quantised(QuantizeFp8(), text)
    assert operators(made).count("QuantizeLinear") == 0
    assert any("zero throughout" in remark.reason for remark in ctx.remarks)


@pytest.mark.parametrize("small", [0.0, 1e-44, 1e-37])
def test_channels_too_small_for_a_scale_become_zeros(small: float) -> None:
    proto = parse("g (float[N,16] x) => (float[N,16] y) <float[16,16] w> { y = MatMul(x, w) }")
    weight = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    weight[:, 3] = small
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    proto.opset_import[0].version = 19
    model = ir.from_proto(proto)
    ctx = Context(model, get_target("tensorrt"), Options(calibration=Calibration([{"x": X}])))
    run_pipeline(model, (QuantizeFp8(),), ctx)
    found = Session(model_to_bytes(model)).run({"x": X})["y"]
    assert np.isfinite(found).all()
    assert not found[:, 3].any()
    assert found[:, 2].any()


def test_without_data_nothing_is_quantised() -> None:
    model = ir.from_proto(parse(TEXT, opset=19))
    options = Options(calibration=Calibration([{"x": X[:, :3]}]))
    ctx = Context(model, get_target("tensorrt"), options)
    run_pipeline(model, (QuantizeFp8(),), ctx)
    assert not ctx.rewrites
    assert any("without data" in remark.reason for remark in ctx.remarks)


def test_old_opsets_have_no_float8() -> None:
    _, ctx, _ = quantised(QuantizeFp8(), opset=18)
    assert not ctx.rewrites
    assert any("from opset 19 on" in remark.reason for remark in ctx.remarks)


def test_the_command_raises_the_opset_and_verifies() -> None:
    made = optimize(parse(TEXT, opset=17), target="tensorrt", precision="fp8")
    assert made.model.opset_imports[""] == 19
    assert made.report.verification.passed


def test_other_targets_have_no_float8() -> None:
    with pytest.raises(OptionError, match="fp8"):
        optimize(parse(TEXT, opset=19), target="cpu", precision="fp8")
