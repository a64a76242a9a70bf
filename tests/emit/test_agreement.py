"""The static checks against the runtimes themselves, and the zoo on every target."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

import graphopt
from graphopt.emit.legality import check_legality
from graphopt.ir.model_file import load_model
from graphopt.targets import get_target
from graphopt.targets.operators import operator_table
from tests.sweep.backend_cases import node_cases

EVERY = 12
"""One case in so many: all of them are in benchmarks/agreement.py."""

KEPT = ("strnormalizer", "padded_kv_bf16", "attn_mask_causal_bf16")
"""Tried each time: locales of the machine, and types that only appear inside a function's body."""


def takes(model: onnx.ModelProto) -> bool:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001  the runtime's own types share no base
        return False
    return True


def test_the_check_says_what_onnx_runtime_does() -> None:
    cpu = get_target("cpu")
    wrong = []
    cases = [case for _, case in sorted(node_cases().items())]
    chosen = [
        case
        for index, case in enumerate(cases)
        if index % EVERY == 0 or any(word in case.name for word in KEPT)
    ]
    for case in chosen:
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.ir_version = min(model.ir_version, cpu.ir_version[1])
        if bool(check_legality(load_model(model), cpu).refused) == takes(model):
            wrong.append(case.name)
    assert len(chosen) > 100
    assert not wrong


def test_operators_that_the_parser_took_every_time_are_not_refused_by_name() -> None:
    table = operator_table("tensorrt").operators
    taken = {
        op for op, entry in table.items() if entry.parsed and entry.parsed[0] == entry.parsed[1]
    }
    assert len(taken) > 60
    assert not [op for op in taken if not table[op].supported and table[op].parsed != (0, 0)]


@pytest.mark.zoo
@pytest.mark.parametrize(
    "target", ["cpu", "cuda", "tensorrt", "ort-tensorrt", "openvino", "portable"]
)
@pytest.mark.parametrize("name", ["mnist_cntk", "face_yunet_s", "cifar10_vit_ibp"])
def test_real_models_are_taken_once_optimised(zoo: Path, name: str, target: str) -> None:
    result = graphopt.optimize(zoo / "models" / f"{name}.onnx", target=target, verify="off")
    assert not check_legality(load_model(result.model), get_target(target)).refused


@pytest.mark.zoo
def test_obstacles_of_a_model_are_named(zoo: Path) -> None:
    found = check_legality(
        load_model(zoo / "models" / "imagenet_mobilenetv1_05_160_qdq.onnx"), get_target("tensorrt")
    )
    assert all(fault.node and fault.source and fault.remedy for fault in found.refused)
    assert any("zero point" in fault.reason for fault in found.refused)
