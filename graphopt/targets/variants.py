"""Targets that differ from a built-in one in what their data say: processors, versions, runtimes over others."""

from __future__ import annotations

import dataclasses

from graphopt.targets.builtin import CPU, CUDA, PORTABLE, TENSORRT
from graphopt.targets.host import ARCHITECTURES
from graphopt.targets.target import Artefact, PrecisionStyle, QdqStyle, SparseStyle, Target

_SATURATES = "onnxruntime/core/mlas, AVX2: vpmaddubsw adds pairs of products in 16 bits"
_STYLES = {
    "x86-avx2": QdqStyle(
        "UINT8", "INT8", 7, integer_operators=True, sub_byte_weights=True, source=_SATURATES
    ),
    "x86-vnni": QdqStyle(
        "UINT8",
        "INT8",
        integer_operators=True,
        sub_byte_weights=True,
        source="onnxruntime/core/mlas: vpdpbusd accumulates in 32 bits",
    ),
    "x86-amx": QdqStyle(
        "UINT8",
        "INT8",
        integer_operators=True,
        sub_byte_weights=True,
        source="onnxruntime/core/mlas: tdpbusd accumulates in 32 bits",
    ),
    "arm64": QdqStyle(
        "INT8",
        "INT8",
        integer_operators=True,
        sub_byte_weights=True,
        source="onnxruntime/core/mlas: sdot and udot; S8S8 spares the correction of a zero point",
    ),
}
_WORDS = {
    "x86-avx2": "x86-64 with AVX2",
    "x86-vnni": "x86-64 with VNNI",
    "x86-amx": "x86-64 with AMX",
    "arm64": "64-bit ARM",
}


def cpu_for(architecture: str) -> Target:
    """The target `cpu` for a processor: `cpu` itself where the processor is not known."""
    if architecture not in _STYLES:
        return CPU
    # Whether blocked layouts are as fast elsewhere was not measured.
    channels = CPU.channels if architecture.startswith("x86") else None
    return dataclasses.replace(
        CPU, architecture=architecture, qdq=_STYLES[architecture], channels=channels
    )


CPU_VARIANTS = tuple(
    dataclasses.replace(
        cpu_for(architecture),
        name=f"cpu-{architecture.removeprefix('x86-')}",
        summary=f"ONNX Runtime on the CPU, {_WORDS[architecture]}",
        like="cpu",
    )
    for architecture in ARCHITECTURES
)

TENSORRT_10 = dataclasses.replace(
    TENSORRT,
    name="tensorrt-10",
    summary="TensorRT's own ONNX parser, any 10.x",
    like="tensorrt",
    version=(10, 0),
    opset=(9, 20),
    domains={"": 20},
    fused=tuple(op for op in TENSORRT.fused if op.op_type != "RMSNormalization"),
    floats=PrecisionStyle(TENSORRT.floats.computes, strongly_typed=False),
)
"""What every TensorRT 10.x takes; the network is strongly typed only if the builder is told so."""

ORT_TENSORRT = dataclasses.replace(
    TENSORRT,
    name="ort-tensorrt",
    summary="ONNX Runtime with the TensorRT execution provider (TensorRT 10 in its wheels)",
    like="tensorrt",
    version=(10, 0),
    ir_version=CUDA.ir_version,
    provider="TensorrtExecutionProvider",
    kernels=CUDA.kernels,
    floats=PrecisionStyle(TENSORRT.floats.computes, strongly_typed=False),
    artefacts=(Artefact.SESSION_OPTIONS, Artefact.PROVIDER_OPTIONS),
    options={
        Artefact.SESSION_OPTIONS: CUDA.options[Artefact.SESSION_OPTIONS],
        # The network is strongly typed, so that the types in the graph count, only if all three are off
        # (onnxruntime 1.31, tensorrt_execution_provider.cc).
        Artefact.PROVIDER_OPTIONS: {
            "device_id": "0",
            "trt_fp16_enable": "0",
            "trt_bf16_enable": "0",
            "trt_int8_enable": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": "engines",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": "engines",
        },
    },
)

OPENVINO = Target(
    name="openvino",
    summary="OpenVINO's ONNX frontend",
    opset=(7, 26),
    ir_version=(3, 13),
    domains={"": 26},
    fused=PORTABLE.fused,
    like="portable",
    operators="openvino",
    version=(2026, 4),
    qdq=QdqStyle("UINT8", "INT8", source="FakeQuantize is made of Q/DQ pairs; NNCF's default"),
    floats=PrecisionStyle(frozenset({"FLOAT", "FLOAT16", "BFLOAT16"}), strongly_typed=False),
    sparse=SparseStyle.DENSE,
    artefacts=(Artefact.OPENVINO_CONFIG,),
    options={
        Artefact.OPENVINO_CONFIG: {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
    },
)

VARIANTS = (*CPU_VARIANTS, TENSORRT_10, ORT_TENSORRT, OPENVINO)
