"""Targets that differ by data: processors, versions, runtimes over others."""

from __future__ import annotations

import dataclasses

import pytest

from graphopt.errors import OptionError
from graphopt.pipeline.registry import pipeline_for
from graphopt.targets import Artefact, Precision, all_targets, get_target
from graphopt.targets.host import architecture_of, host_architecture
from graphopt.targets.releases import newest_opset
from graphopt.targets.variants import cpu_for


@pytest.mark.parametrize(
    ("machine", "flags", "architecture"),
    [
        ("x86_64", "flags : sse2 avx avx2", "x86-avx2"),
        ("x86_64", "flags : avx2 avx512_vnni", "x86-vnni"),
        ("AMD64", "flags : avx2 avx_vnni", "x86-vnni"),
        ("x86_64", "flags : avx2 avx512_vnni amx_int8", "x86-amx"),
        ("x86_64", "flags : sse2", ""),
        ("aarch64", "Features : asimd", "arm64"),
        ("riscv64", "", ""),
    ],
)
def test_processors(machine: str, flags: str, architecture: str) -> None:
    assert architecture_of(machine, flags) == architecture


def test_cpu_is_this_machine() -> None:
    assert get_target("cpu") == cpu_for(host_architecture())
    assert get_target("cpu").name == "cpu"


def test_products_saturate_without_vnni_alone() -> None:
    bits = {name: get_target(name).qdq for name in ("cpu-avx2", "cpu-vnni", "cpu-amx", "cpu-arm64")}
    assert {name: style.weight_bits for name, style in bits.items() if style} == {
        "cpu-avx2": 7,
        "cpu-vnni": 8,
        "cpu-amx": 8,
        "cpu-arm64": 8,
    }


def test_an_unknown_processor_has_the_plain_target() -> None:
    assert cpu_for("riscv").architecture == ""


def test_targets_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_target("tensorrt").name = "other"  # type: ignore[misc]


def test_every_target_has_a_pipeline_and_knows_what_it_takes() -> None:
    for target in all_targets().values():
        assert pipeline_for(target, Precision.FP32)
        assert target.opset[0] < target.opset[1] <= newest_opset()
        assert target.name == "portable" or target.kernels or target.operators
        assert set(target.options) <= set(target.artefacts)


def test_tensorrt_10_is_promised_less_than_11() -> None:
    old, new = get_target("tensorrt-10"), get_target("tensorrt")
    assert old.version < new.version
    assert not old.emits("RMSNormalization", opset=23)
    assert new.emits("RMSNormalization", opset=23)


def test_the_provider_of_onnx_runtime_is_strongly_typed_with_its_flags_off() -> None:
    options = get_target("ort-tensorrt").options[Artefact.PROVIDER_OPTIONS]
    assert {options[f"trt_{kind}_enable"] for kind in ("fp16", "bf16", "int8")} == {"0"}


def test_unknown_targets_are_named() -> None:
    with pytest.raises(OptionError, match="openvino"):
        get_target("npu")
