"""Opsets raised for half precision: only as far as operators or kernels ask for it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import LIFT_FOR_HALF, PREPARE
from graphopt_passes.precision import CastToHalf

from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Context
from graphopt.targets import get_target
from tests.rewriting import parse

CONV = "g (float[1,4,6,6] x) => (float[1,4,6,6] y) <float[4,4,1,1] w> { y = Conv(x, w) }"
CLIPPED = (
    "g (float[1,4,6,6] x) => (float[1,4,6,6] y) <float[4,4,1,1] w>"
    "{ c = Conv(x, w) y = Clip<min=0.0, max=6.0>(c) }"
)


def lifted(text: str, precision: str, opset: int, target: str = "cuda") -> ir.Model:
    model = ir.from_proto(parse(text, opset=opset))
    cast = CastToHalf("bf16" if precision == "bf16" else "fp16")
    steps = (*PREPARE, LIFT_FOR_HALF[precision], cast)
    run_pipeline(model, steps, Context(model, get_target(target)))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_bfloat16_convolutions_need_opset_22(target: str) -> None:
    model = lifted(CONV, "bf16", 18, target)
    assert model.opset_imports[""] == 22
    conv = next(node for node in model.graph if node.op_type == "Conv")
    assert conv.outputs[0].dtype is ir.DataType.BFLOAT16


def test_a_kernel_may_need_a_newer_opset_than_the_schema() -> None:
    model = lifted(CLIPPED, "fp16", 9)
    assert model.opset_imports[""] == 12
    clip = next(node for node in model.graph if node.op_type == "Clip")
    assert clip.outputs[0].dtype is ir.DataType.FLOAT16


def test_where_all_is_legal_the_opset_stays() -> None:
    model = lifted(CONV, "fp16", 13)
    assert model.opset_imports[""] == 13


def test_a_target_that_keeps_opsets_keeps_them() -> None:
    model = lifted(CONV, "bf16", 18, "portable")
    assert model.opset_imports[""] == 18


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_what_could_not_be_verified_on_a_cpu_any_more_keeps_the_opset(target: str) -> None:
    text = CONV.replace("y = Conv(x, w)", "n = RandomNormalLike(x) c = Conv(x, w) y = Add(c, n)")
    model = lifted(text, "bf16", 18, target)
    assert model.opset_imports[""] == 18
