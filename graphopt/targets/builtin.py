"""The built-in targets.

Limits are those of the installed ONNX Runtime (1.31: IR <= 13, released opsets <= 26; 1.32: IR <= 14, opsets <= 28)
and of TensorRT 11's ONNX parser (opsets 9 to 24).  A fused op is listed where it was measured to be no slower than what
it replaces, or where the runtime's own documentation recommends it; the source is beside it.
"""

from __future__ import annotations

from graphopt.targets.releases import newest_ir, newest_opset
from graphopt.targets.target import (
    FLOATS,
    Artefact,
    Channels,
    FusedOp,
    PrecisionStyle,
    QdqStyle,
    SparseStyle,
    Target,
)

_FLOAT = frozenset({"FLOAT"})
_MS = "com.microsoft"
_ORT_OPSET = (7, newest_opset())
_ORT_IR = (3, newest_ir())
_ORT_DOMAINS = {
    "": newest_opset(),
    "ai.onnx.ml": 5,
    "com.microsoft": 1,
    "com.ms.internal.nhwc": 1,
    "com.microsoft.nchwc": 1,
    "com.microsoft.experimental": 1,
}

_STATISTICS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
"""Types whose statistics LayerNormalization keeps: it computes them in float32, so float64 would lose."""

_HALVES = frozenset({"FLOAT", "FLOAT16"})
_DOUBLES = frozenset({"FLOAT", "DOUBLE"})

_TABLE = "kernel registered in ONNX Runtime 1.31.1 (get_all_opkernel_def)"

_LAYER_NORM = FusedOp(
    "LayerNormalization",
    "one kernel for 6 to 11 nodes; ONNX Runtime 1.31 CPU: 1.8-2.7x on the op",
    since=17,
    dtypes=_STATISTICS,
)
_BFLOAT16 = frozenset({"BFLOAT16"})
_RELAXED = (
    FusedOp("HardSwish", _TABLE, since=14, dtypes=_HALVES),
    FusedOp("Softplus", _TABLE, dtypes=_HALVES),
    FusedOp("HardSwish", _TABLE, since=22, dtypes=_BFLOAT16),
    FusedOp("Softplus", _TABLE, since=22, dtypes=_BFLOAT16),
)

# Measured on one thread with ONNX Runtime 1.31.1 and left out on purpose: Softplus (0.2x of Log(Exp(x) + 1): its kernel
# is scalar), Softmax and LogSoftmax over another axis than the last (0.1x-0.2x of their parts), HardSwish and Mish
# (expanded into their parts: 1.0x), SkipLayerNormalization (0.2x of Add and LayerNormalization), GroupNormalization.
CPU = Target(
    name="cpu",
    summary="ONNX Runtime on the CPU",
    opset=_ORT_OPSET,
    ir_version=_ORT_IR,
    domains=_ORT_DOMAINS,
    fused=(
        _LAYER_NORM,
        FusedOp(
            "RMSNormalization",
            "ONNX Runtime 1.31 CPU: 2.0-3.3x on the op",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
        ),
        FusedOp(
            "RMSNormalization",
            "ONNX Runtime 1.31 CPU: 1.6x of x / sqrt(sum(x^2)); LpNormalization is as fast as the parts, or slower",
            since=23,
            dtypes=_FLOAT,
            form="unit-length",
        ),
        FusedOp(
            "RotaryEmbedding",
            "ONNX Runtime 1.31 CPU: 2.7x on the op (5.3x interleaved)",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
        ),
        FusedOp(
            "InstanceNormalization",
            "ONNX Runtime 1.31 CPU: 3.8x on the op",
            since=6,
            dtypes=_FLOAT,
        ),
        FusedOp(
            "InstanceNormalization",
            "ONNX Runtime 1.31 CPU: 2.1x of GroupNormalization, which it expands into 29 nodes",
            since=6,
            dtypes=_FLOAT,
            form="groups",
        ),
        FusedOp(
            "Gelu",
            "ONNX Runtime 1.31 CPU: 1.3-2.8x (erf), 2.3-3.4x (tanh) on the op",
            since=20,
            dtypes=_FLOAT,
        ),
        FusedOp("Gelu", "same kernel as Gelu-20, any opset", domain=_MS, dtypes=_FLOAT),
        FusedOp("FastGelu", "ONNX Runtime 1.31 CPU: 2.3-3.4x on the op", domain=_MS, dtypes=_FLOAT),
        FusedOp(
            "QuickGelu",
            "what ONNX Runtime 1.31 makes of it when it loads the model",
            domain=_MS,
            dtypes=_FLOAT,
        ),
        FusedOp(
            "Gemm",
            "ONNX Runtime 1.31 CPU: 1.0x; float16 Gemm is far slower than MatMul and Add",
            since=7,
            dtypes=frozenset({"FLOAT", "DOUBLE"}),
        ),
        FusedOp(
            "FusedMatMul",
            "ONNX Runtime 1.31 CPU: 1.0x; spares a transposed copy of a tied weight",
            domain=_MS,
            dtypes=_FLOAT,
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime 1.31 CPU: 0.97-1.1x without the guard of masked rows, 1.5-1.9x with it",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime 1.31 CPU: zeros for a row masked with -infinity throughout",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
            form="masked-rows",
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime 1.31 CPU: 1.05-1.13x with shared keys, their repetition included",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
            form="grouped",
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime 1.31 CPU: 1.1-1.6x of Attention between four Transpose",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
            form="heads-in-place",
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime 1.31 CPU: 1.0-1.2x of two Concat and Attention",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
            form="past",
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime 1.31 CPU: the kernel takes softmax_precision",
            since=23,
            dtypes=frozenset({"FLOAT16"}),
            form="softmax-in-float",
        ),
        *(
            FusedOp(name, f"ONNX Runtime 1.31 CPU: {gain}", dtypes=_DOUBLES)
            for name, gain in (("DepthToSpace", "2.4x"), ("SpaceToDepth", "3.6-5.3x"))
        ),
        FusedOp(
            "GroupQueryAttention",
            "ONNX Runtime 1.31 CPU: 1.2x (32 tokens) and 2.0x (128, 512) of Attention with a causal mask, bit-equal",
            domain=_MS,
            dtypes=_FLOAT,
        ),
        FusedOp(
            "RotaryEmbedding",
            "ONNX Runtime 1.31 CPU: 1.0x, and the Transpose for Attention falls away",
            since=23,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
            form="heads-in-place",
        ),
        FusedOp(
            "LayerNormalization",
            "ONNX Runtime 1.31 CPU: 1.5-1.75x, both Transpose included",
            since=17,
            dtypes=_FLOAT,
            form="channels-first",
        ),
    ),
    shuns={
        "SkipLayerNormalization": "ONNX Runtime 1.31 CPU: 0.16-0.22x of Add and LayerNormalization",
        "PRelu": "ONNX Runtime 1.31 CPU: 0.4-0.5x of Relu, Min, Mul, Add from 10^5 elements on, 1.1x below 10^4",
    },
    channels=Channels(
        multiple=4,
        block=16,
        most=1.15,
        window=9,
        outputs=8,
        source="ONNX Runtime 1.31 CPU, AVX-512: 1.04-1.9x for filters of 3x3 (30, 62 channels; images of 7, 14, 56); "
        "1x1: 0.78-1.1x, one channel out: 0.96x; nchwc_transformer.cc leaves inputs of other multiples in NCHW",
    ),
    provider="CPUExecutionProvider",
    kernels=("ort-cpu",),
    qdq=QdqStyle(
        "UINT8",
        "INT8",
        integer_operators=True,
        sub_byte_weights=True,
        source="onnxruntime/core/mlas: U8S8 kernels",
    ),
    sparse=SparseStyle.INITIALIZER,
    artefacts=(Artefact.SESSION_OPTIONS,),
    options={
        Artefact.SESSION_OPTIONS: {
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "execution_mode": "ORT_SEQUENTIAL",
            "session.set_denormal_as_zero": "1",
        }
    },
)

CUDA = Target(
    name="cuda",
    summary="ONNX Runtime on NVIDIA GPUs (CUDA execution provider)",
    opset=_ORT_OPSET,
    ir_version=_ORT_IR,
    domains=_ORT_DOMAINS,
    fused=(
        _LAYER_NORM,
        *_RELAXED,
        FusedOp("RMSNormalization", _TABLE, since=23),
        FusedOp("RMSNormalization", _TABLE, since=23, form="unit-length"),
        FusedOp("RotaryEmbedding", _TABLE, since=23, dtypes=_STATISTICS),
        FusedOp("Attention", _TABLE, since=23, dtypes=_STATISTICS),
        FusedOp("Attention", _TABLE, since=23, dtypes=_STATISTICS, form="grouped"),
        FusedOp("Attention", _TABLE, since=23, dtypes=_STATISTICS, form="heads-in-place"),
        *(
            FusedOp(
                "Attention",
                f"no matrix of weights is written; not measured (on the CPU {loss})",
                since=23,
                dtypes=_STATISTICS,
                form=form,
            )
            for form, loss in (
                ("sequence-last", "0.9-1.05x up to 400 tokens"),
                ("windows", "0.8-0.99x up to 64 tokens"),
            )
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime pull request 27542: flash attention takes is_causal, but no mask; not measured",
            since=23,
            dtypes=_STATISTICS,
            form="causal",
        ),
        FusedOp(
            "Attention",
            "ONNX Runtime pull request 27542: the softmax of halves is in float32 always, and refuses to be told",
            since=23,
            dtypes=frozenset({"FLOAT16", "BFLOAT16"}),
            form="always-in-float",
        ),
        FusedOp("RotaryEmbedding", _TABLE, since=23, dtypes=_STATISTICS, form="heads-in-place"),
        FusedOp(
            "InstanceNormalization", f"{_TABLE} up to opset 21", since=6, until=21, dtypes=_HALVES
        ),
        FusedOp(
            "InstanceNormalization",
            "ONNX Runtime 1.31 has no kernel for GroupNormalization, and expands it into 29 nodes; not measured",
            since=6,
            until=21,
            dtypes=_HALVES,
            form="groups",
        ),
        FusedOp(
            "LayerNormalization",
            "ONNX Runtime 1.31 runs InstanceNormalization of opset 22 and later on the CPU; not measured",
            since=22,
            dtypes=_HALVES,
            form="groups",
        ),
        FusedOp("DepthToSpace", _TABLE, dtypes=_DOUBLES | _HALVES),
        FusedOp("SpaceToDepth", _TABLE, dtypes=_DOUBLES | _HALVES),
        FusedOp("Gemm", _TABLE, since=7, dtypes=_DOUBLES | _HALVES),
        FusedOp("Gemm", _TABLE, since=13, dtypes=_BFLOAT16),
        FusedOp("Gelu", _TABLE, since=20),
        FusedOp("Gelu", _TABLE, domain=_MS),
        FusedOp("FastGelu", _TABLE, domain=_MS),
        FusedOp("QuickGelu", _TABLE, domain=_MS),
        FusedOp("BiasGelu", _TABLE, domain=_MS),
        FusedOp("SkipLayerNormalization", _TABLE, domain=_MS, dtypes=_STATISTICS),
        FusedOp(
            "EmbedLayerNormalization",
            f"{_TABLE}; what ONNX Runtime's own EmbedLayerNormFusion makes of int32 ids; not measured",
            domain=_MS,
            dtypes=frozenset({"FLOAT", "FLOAT16"}),
        ),
        FusedOp("SkipSimplifiedLayerNormalization", _TABLE, domain=_MS, dtypes=_STATISTICS),
        FusedOp("FusedMatMul", _TABLE, domain=_MS),
    ),
    provider="CUDAExecutionProvider",
    kernels=("ort-cuda", "ort-cpu"),
    qdq=QdqStyle(
        "",
        "INT8",
        sub_byte_weights=True,
        source="docs/OperatorKernels.md: MatMulNBits and GatherBlockQuantized, no QLinear operator",
    ),
    floats=PrecisionStyle(frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})),
    sparse=SparseStyle.INITIALIZER,
    artefacts=(Artefact.SESSION_OPTIONS, Artefact.PROVIDER_OPTIONS),
    options={
        Artefact.SESSION_OPTIONS: {
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "execution_mode": "ORT_SEQUENTIAL",
        },
        Artefact.PROVIDER_OPTIONS: {
            "device_id": "0",
            "use_tf32": "1",
            "arena_extend_strategy": "kNextPowerOfTwo",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "cudnn_conv_use_max_workspace": "1",
            "enable_cuda_graph": "0",
            "prefer_nhwc": "0",
        },
    },
)

_PARSER = "imported by TensorRT's ONNX parser (onnx-tensorrt docs/operators.md, 11.1)"

TENSORRT = Target(
    name="tensorrt",
    summary="TensorRT's own ONNX parser, 11.x",
    opset=(9, 24),
    ir_version=(3, 13),
    domains={"": 24},
    fused=(
        FusedOp(
            "LayerNormalization",
            "TensorRT >= 8.6 imports it; the function form keeps fp16 accuracy",
            since=17,
            dtypes=_STATISTICS,
        ),
        FusedOp("RMSNormalization", "TensorRT >= 10.15 imports it", since=23, dtypes=_STATISTICS),
        FusedOp("RotaryEmbedding", "TensorRT >= 10.15 imports it", since=23, dtypes=_STATISTICS),
        *(
            FusedOp("Attention", _PARSER, since=23, dtypes=_STATISTICS, form=form)
            for form in ("", "grouped", "causal", "sequence-last", "windows")
        ),
        FusedOp("Gelu", "TensorRT >= 10.0 imports it", since=20, dtypes=_STATISTICS),
        FusedOp("InstanceNormalization", _PARSER, since=6, dtypes=_STATISTICS),
        FusedOp("HardSwish", _PARSER, since=14, dtypes=_HALVES),
        FusedOp("Mish", _PARSER, since=18, dtypes=_HALVES),
        FusedOp("GroupNormalization", _PARSER, since=21, dtypes=_STATISTICS),
        FusedOp("Softplus", _PARSER, dtypes=_STATISTICS),
        FusedOp("DepthToSpace", _PARSER, dtypes=_STATISTICS),
        FusedOp("SpaceToDepth", _PARSER, dtypes=_STATISTICS),
        FusedOp("Softmax", _PARSER, since=13, dtypes=_STATISTICS, form="inner-axis"),
        FusedOp("Gemm", _PARSER, since=7, dtypes=_STATISTICS),
    ),
    operators="tensorrt",
    version=(11, 1),
    dtypes=frozenset(
        {
            "FLOAT",
            "FLOAT16",
            "BFLOAT16",
            "DOUBLE",
            "FLOAT8E4M3FN",
            "FLOAT4E2M1",
            "INT32",
            "INT64",
            "INT8",
            "INT4",
            "BOOL",
        }
    ),
    io_dtypes=frozenset({"UINT8"}),
    qdq=QdqStyle(
        "INT8",
        "INT8",
        zero_points=False,
        sub_byte_weights=True,
        whole_blocks=True,
        source="TensorRT documentation, explicit quantization: symmetric, zero point 0",
    ),
    floats=PrecisionStyle(frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})),
    artefacts=(Artefact.TRTEXEC,),
)

PORTABLE = Target(
    name="portable",
    summary="any runtime: standard operators only",
    opset=(7, 26),
    ir_version=(3, 13),
    domains={"": 26, "ai.onnx.ml": 5},
    raises_opset=False,
    fused=(
        FusedOp("LayerNormalization", "standard since opset 17", since=17, dtypes=_STATISTICS),
        FusedOp("RMSNormalization", "standard since opset 23", since=23, dtypes=_STATISTICS),
        FusedOp("Gelu", "standard since opset 20", since=20, dtypes=FLOATS),
        FusedOp("InstanceNormalization", "standard since opset 6", since=6, dtypes=_STATISTICS),
        FusedOp("HardSwish", "standard since opset 14", since=14, dtypes=_STATISTICS),
        FusedOp("Mish", "standard since opset 18", since=18, dtypes=_STATISTICS),
        FusedOp("GroupNormalization", "standard since opset 21", since=21, dtypes=_STATISTICS),
        FusedOp("Softplus", "standard since opset 1", dtypes=_STATISTICS),
        FusedOp("DepthToSpace", "standard since opset 1", dtypes=_DOUBLES),
        FusedOp("SpaceToDepth", "standard since opset 1", dtypes=_DOUBLES),
        FusedOp("Softmax", "any axis since opset 13", since=13, form="inner-axis"),
        FusedOp("Gemm", "standard; broadcasts its addend since opset 7", since=7),
    ),
)
