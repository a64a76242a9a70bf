"""The built-in targets.

Limits are those of ONNX Runtime 1.31 (IR <= 13, released opsets <= 26) and of TensorRT 11's ONNX parser (opsets 9 to
24).  A fused op is listed where it was measured to be no slower than what it replaces, or where the runtime's own
documentation recommends it; the source is beside it.
"""

from __future__ import annotations

from graphopt.targets.target import FLOATS, FusedOp, Target

_FLOAT = frozenset({"FLOAT"})
_MS = "com.microsoft"
_ORT_OPSET = (7, 26)
_ORT_IR = (3, 13)
_ORT_DOMAINS = {
    "": 26,
    "ai.onnx.ml": 5,
    "com.microsoft": 1,
    "com.ms.internal.nhwc": 1,
    "com.microsoft.nchwc": 1,
    "com.microsoft.experimental": 1,
}

_STANDARD = (
    FusedOp(
        "LayerNormalization",
        "one kernel for 6 to 11 nodes; ONNX Runtime 1.31 CPU: 1.8-2.7x on the op",
        since=17,
    ),
    FusedOp("RMSNormalization", "ONNX Runtime 1.31 CPU: 2.6-3.3x on the op", since=23),
    FusedOp("RotaryEmbedding", "ONNX Runtime 1.31 CPU: 2.7x on the op", since=23),
)

CPU = Target(
    name="cpu",
    summary="ONNX Runtime on the CPU",
    opset=_ORT_OPSET,
    ir_version=_ORT_IR,
    domains=_ORT_DOMAINS,
    fused=(
        *_STANDARD,
        FusedOp(
            "Gelu",
            "ONNX Runtime 1.31 CPU: 1.3-1.4x (erf), 2.3-3.4x (tanh) on the op",
            since=20,
            dtypes=_FLOAT,
        ),
        FusedOp("Gelu", "same kernel as Gelu-20, any opset", domain=_MS, dtypes=_FLOAT),
        FusedOp("FastGelu", "ONNX Runtime 1.31 CPU: 2.3-3.4x on the op", domain=_MS, dtypes=_FLOAT),
        FusedOp(
            "QuickGelu", "ONNX Runtime 1.31 CPU: 1.2-1.4x on the op", domain=_MS, dtypes=_FLOAT
        ),
    ),
    provider="CPUExecutionProvider",
)

CUDA = Target(
    name="cuda",
    summary="ONNX Runtime on NVIDIA GPUs (CUDA execution provider)",
    opset=_ORT_OPSET,
    ir_version=_ORT_IR,
    domains=_ORT_DOMAINS,
    fused=(
        *_STANDARD,
        FusedOp("Gelu", "kernel registered for the CUDA provider in ONNX Runtime 1.31", since=20),
        FusedOp("Gelu", "kernel registered for the CUDA provider in ONNX Runtime 1.31", domain=_MS),
        FusedOp(
            "FastGelu", "kernel registered for the CUDA provider in ONNX Runtime 1.31", domain=_MS
        ),
        FusedOp(
            "QuickGelu", "kernel registered for the CUDA provider in ONNX Runtime 1.31", domain=_MS
        ),
    ),
    provider="CUDAExecutionProvider",
)

TENSORRT = Target(
    name="tensorrt",
    summary="TensorRT's own ONNX parser (10.x and 11.x)",
    opset=(9, 24),
    ir_version=(3, 13),
    domains={"": 24},
    fused=(
        FusedOp(
            "LayerNormalization",
            "TensorRT >= 8.6 imports it; the function form keeps fp16 accuracy",
            since=17,
        ),
        FusedOp("RMSNormalization", "TensorRT >= 10.15 imports it", since=23),
        FusedOp("Gelu", "TensorRT >= 10.0 imports it", since=20),
    ),
)

PORTABLE = Target(
    name="portable",
    summary="any runtime: standard operators only",
    opset=(7, 26),
    ir_version=(3, 13),
    domains={"": 26, "ai.onnx.ml": 5},
    fused=(
        FusedOp("LayerNormalization", "standard since opset 17", since=17),
        FusedOp("Gelu", "standard since opset 20", since=20, dtypes=FLOATS),
    ),
)
