"""The rewrites that ship with graphopt: what there is, and in which order each target runs it.

`PASSES` and `PIPELINES` are what the entry point group `graphopt.passes` looks for; a package of your own has the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias

import onnx_ir as ir

from graphopt.deferred import Late
from graphopt.pipeline import Pass, Repeat, RewritePass, Step
from graphopt.rewrite import Context
from graphopt_passes import (
    activation,
    algebra,
    attention,
    batched_heads,
    biases,
    blends,
    bodies,
    bounds,
    broadcasts,
    causal,
    contrib,
    contrib_heads,
    contrib_integers,
    contrib_plain,
    contrib_transformers,
    conv,
    einsum,
    embedding,
    evasion,
    filling,
    gemm,
    groupnorm,
    heads,
    integers,
    layout,
    linear,
    lowering,
    norm,
    padding,
    powers,
    quantized,
    reductions,
    remnants,
    residuals,
    rope,
    scales,
    sequences,
    shapes,
    slices,
    softmax,
    tidy,
    turned,
)
from graphopt_passes.cache import FuseCache
from graphopt_passes.cleanup import (
    FreezeDefaults,
    LiftConstants,
    LiftSubgraphConstants,
    RemoveDeadCode,
    UpgradeIr,
)
from graphopt_passes.control_flow import InlineControlFlow
from graphopt_passes.convert import ConvertOpset
from graphopt_passes.dedupe import MergeCommonSubexpressions, MergeDuplicateConstants
from graphopt_passes.distill import Distill
from graphopt_passes.fold import FoldConstants
from graphopt_passes.functions import InlineFunctions
from graphopt_passes.hoisting import HoistInvariants
from graphopt_passes.legalize import (
    CastDoubles,
    RenameBranchOutputs,
    WriteQuantizationAxes,
)
from graphopt_passes.naming import NameNodes
from graphopt_passes.opset import LiftOpset
from graphopt_passes.prune import DropTraces, Prune, SweepChannels
from graphopt_passes.seldom import precision, requantize, static, weight_only
from graphopt_passes.shape_sources import RebuildShapes
from graphopt_passes.transposes import CancelTransposes
from graphopt_passes.trimming import TrimControlFlow

Maker: TypeAlias = Pass | type[Pass] | Callable[[], Pass]

TIDY = RewritePass("tidy", (*tidy.RULES, *remnants.RULES, *sequences.RULES))
SHAPES = RewritePass(
    "simplify-shapes", (*shapes.RULES, *slices.RULES, *broadcasts.RULES, *layout.RULES)
)
ALGEBRA = RewritePass(
    "simplify-algebra",
    (
        *algebra.RULES,
        *bounds.RULES,
        *powers.RULES,
        *reductions.RULES,
        *einsum.RULES,
        *quantized.RULES,
        *biases.RULES,  # before lift-opset, which sees the attention that they make
        *batched_heads.RULES,
        *turned.RULES,
        *blends.RULES,
    ),
)
FUSE_CONV = RewritePass("fuse-conv", (*conv.RULES, *padding.RULES))
FUSE_ATTENTION = RewritePass(
    "fuse-attention", (*attention.RULES, *rope.RULES, *heads.RULES, *causal.RULES)
)
FUSE_GEMM = RewritePass("fuse-gemm", (*gemm.RULES, *linear.RULES))
FUSE_ACTIVATION = RewritePass("fuse-activation", (*activation.RULES, *softmax.RULES))
FUSE_NORM = RewritePass("fuse-norm", (*norm.RULES, *groupnorm.RULES, *scales.RULES))


def _opsets_for_half(dtype: ir.DataType, model: ir.Model, ctx: Context) -> Iterable[int]:
    return precision.opsets_for(dtype)(model, ctx)


LIFT_OPSET = LiftOpset(
    rules=(*FUSE_ATTENTION.rules, *norm.RULES, *activation.RULES), later=groupnorm.RULES
)
LIFT_FOR_HALF: Mapping[str, LiftOpset] = {
    half: LiftOpset(
        f"lift-opset-{half}",
        wishes=functools.partial(_opsets_for_half, dtype),
        use=f"compute in {half}",
    )
    for half, dtype in (("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16))
}
LIFT_FOR_INT8 = LiftOpset(
    "lift-opset-int8", wishes=lambda _model, _ctx: (13,), use="run on integers", needed=True
)

LIFT_FOR_FP8 = LiftOpset("lift-opset-fp8", wishes=lambda _model, _ctx: (19,), use="compute in fp8")
FUSE_RESIDUALS = RewritePass("fuse-residuals", (*embedding.RULES, *residuals.RULES))
# Last of all, where everything that knows Add is done.
EVADE = RewritePass("evade-runtime-fusions", (*evasion.RULES, *filling.RULES))
EXPAND_CONTRIB = RewritePass(
    "expand-contrib",
    (
        *contrib.RULES,
        *contrib_transformers.RULES,
        *contrib_heads.RULES,
        *contrib_integers.RULES,
        *contrib_plain.RULES,
    ),
)
DECOMPOSE = RewritePass("decompose", (*lowering.RULES, *bodies.RULES))
WRITE_OUT_INTEGERS = RewritePass("write-out-integers", integers.RULES)
LOWER_POWERS = RewritePass("lower-powers", powers.LOWERING)

_FAMILIES = (
    TIDY,
    SHAPES,
    ALGEBRA,
    FUSE_CONV,
    FUSE_ATTENTION,
    FUSE_GEMM,
    FUSE_ACTIVATION,
    FUSE_NORM,
    EXPAND_CONTRIB,
    DECOMPOSE,
    WRITE_OUT_INTEGERS,
)

_AT_HAND: Mapping[str, Maker] = {
    **{
        each.name: each
        for each in (
            UpgradeIr,
            FreezeDefaults,
            InlineFunctions,
            LiftConstants,
            FoldConstants,
            InlineControlFlow,
            TrimControlFlow,
            HoistInvariants,
            CancelTransposes,
            RebuildShapes,
            FuseCache,
            LiftSubgraphConstants,
            MergeDuplicateConstants,
            MergeCommonSubexpressions,
            RemoveDeadCode,
            Prune,
            Distill,
            SweepChannels,
            DropTraces,
            CastDoubles,
            ConvertOpset,
            RenameBranchOutputs,
            WriteQuantizationAxes,
            NameNodes,
        )
    },
    LIFT_OPSET.name: LIFT_OPSET,
    **{each.name: each for each in (*LIFT_FOR_HALF.values(), LIFT_FOR_INT8, LIFT_FOR_FP8)},
    FUSE_RESIDUALS.name: FUSE_RESIDUALS,
    EVADE.name: EVADE,
    LOWER_POWERS.name: LOWER_POWERS,
    **{family.name: family for family in _FAMILIES},
}

PASSES: Mapping[str, Maker] = Late(
    {
        **{name: functools.partial(_AT_HAND.__getitem__, name) for name in _AT_HAND},
        "cast-to-half": lambda: precision.CastToHalf,
        "store-half": lambda: precision.StoreHalf,
        "quantize-fp8": lambda: precision.QuantizeFp8,
        "quantize-static": lambda: static.QuantizeStatic,
        "quantize-dynamic": lambda: weight_only.QuantizeDynamic,
        "quantize-weights": lambda: weight_only.QuantizeWeights,
        "symmetrize-quantization": lambda: requantize.SymmetrizeQuantization,
    }
)

PREPARE: tuple[Step, ...] = (
    UpgradeIr(),  # before anything asks what is constant: old files list their weights as inputs
    InlineFunctions(),  # everything after sees one graph
    LiftConstants(),  # one carrier for constants
    ConvertOpset(),  # nothing within the target's range; before any rule asks for the opset
    EXPAND_CONTRIB,  # nothing where the target has com.microsoft; before fusing, which may find better
)

CLEAN = Repeat(
    (
        TIDY,
        FoldConstants(),  # before control flow: conditions become constant
        InlineControlFlow(),
        TrimControlFlow(),  # after inlining, which leaves less to look at
        HoistInvariants(),  # after trimming: what no turn changes is read from outside by then
        SHAPES,
        ALGEBRA,
        CancelTransposes(through_slices=False),
        RebuildShapes(),  # after the Reshape and Expand rules, which take away most of what it serves
        LiftSubgraphConstants(),
        MergeDuplicateConstants(),  # before subexpressions: equal constants make equal nodes
        MergeCommonSubexpressions(),
        RemoveDeadCode(),
    ),
    name="clean",
)

FUSE = Repeat(
    (
        FUSE_ATTENTION,  # first: it reads the scales of queries and keys, which gemm folds away
        FUSE_NORM,  # before gemm: a scale folded into weights would hide the affine part of a norm
        FUSE_ACTIVATION,
        FUSE_CONV,
        FUSE_GEMM,
        FoldConstants(),
        TIDY,
        SHAPES,
        ALGEBRA,
        CancelTransposes(),
        RebuildShapes(),
        LiftSubgraphConstants(),
        MergeDuplicateConstants(),
        MergeCommonSubexpressions(),
        RemoveDeadCode(),
    ),
    name="fuse",
)

# Powers are lowered last: x**3 as two products is faster and one node more, and the GELU patterns read the power.
_SPARSE = (
    *PREPARE,
    CLEAN,
    DECOMPOSE,  # nothing that the target takes; after cleaning, which folds much of what it would refuse
    LIFT_OPSET,  # after cleaning, where what would fuse lies open; before fusing, which then can
    FUSE,
    FuseCache(),  # after fusing, which makes the attention that keeps it
    SweepChannels(),  # this and Prune do nothing without --sparsity; after fusing, which makes the matrices that stay
    Prune(early=True),  # nothing unless training follows and few weights stay
    Distill(early=True),
    Prune(),
    SweepChannels(),  # zeros leave channels behind that nobody reads
    DropTraces(),
)
_FP32 = (*_SPARSE, Distill(), LOWER_POWERS)  # nothing without --distill


# Channels that are filled up leave their old weights behind.
_EVADE = (EVADE, RemoveDeadCode())


def _half(half: Literal["fp16", "bf16"]) -> tuple[Step, ...]:
    """The float32 pipeline, the casts, and what removes double ones; nothing after the casts makes float32 nodes."""
    return (
        *_FP32,
        LIFT_FOR_HALF[half],  # last before the casts: what fused needs no newer opset
        precision.CastToHalf(half),
        TIDY,
        MergeDuplicateConstants(),
        MergeCommonSubexpressions(),
        RemoveDeadCode(),
        FUSE_RESIDUALS,  # after the casts: the kernels take halves
        *_EVADE,
    )


def _quantized(step: Pass) -> tuple[Step, ...]:
    """The float32 pipeline, then integers: what is quantised is what will run."""
    return (*_FP32, LIFT_FOR_INT8, *_stored(step))


def _stored(step: Pass) -> tuple[Step, ...]:
    return (step, MergeDuplicateConstants(), RemoveDeadCode(), *_EVADE)


def _in_blocks(step: Pass) -> tuple[Step, ...]:
    """As `_quantized`, by a pass that raises the opset itself, where it has something to store."""
    return (*_FP32, *_stored(step))


def _trained(step: Pass) -> tuple[Step, ...]:
    """As `_quantized`, but distillation sees the rounding, and trains through it."""
    return (
        *_SPARSE,
        LOWER_POWERS,
        LIFT_FOR_INT8,
        step,
        MergeDuplicateConstants(),
        RemoveDeadCode(),
        Distill(),
        *_EVADE,
    )


def _plain() -> tuple[Step, ...]:
    return (*_FP32, FUSE_RESIDUALS, *_EVADE)


_RUNTIMES = ("cpu", "cuda", "tensorrt", "portable")
_PLAIN: Mapping[tuple[str, str], Callable[[], tuple[Step, ...]]] = {
    **{(target, kind): _plain for target in _RUNTIMES for kind in ("fp32", "fp16-weights")},
    **{(target, "fp16"): lambda: _half("fp16") for target in _RUNTIMES},
    **{(target, "bf16"): lambda: _half("bf16") for target in _RUNTIMES},
    ("tensorrt", "fp8"): lambda: (*_FP32, LIFT_FOR_FP8, precision.QuantizeFp8(), RemoveDeadCode()),
    ("cpu", "int8"): lambda: _trained(static.QuantizeStatic()),
    ("tensorrt", "int8"): lambda: _trained(static.QuantizeStatic("tensorrt")),
    ("portable", "int8"): lambda: _trained(static.QuantizeStatic()),
    ("cpu", "int8-dynamic"): lambda: _quantized(weight_only.QuantizeDynamic()),
    ("cpu", "int4-weights"): lambda: _quantized(weight_only.QuantizeWeights()),
    ("cuda", "int4-weights"): lambda: _quantized(weight_only.QuantizeWeights()),
    ("cuda", "int8"): lambda: _quantized(weight_only.QuantizeWeights(bits=8)),
    ("tensorrt", "int4-weights"): lambda: _in_blocks(
        weight_only.QuantizeWeights(block=128, form="qdq", tables=False)
    ),
    ("portable", "int4-weights"): lambda: _in_blocks(
        weight_only.QuantizeWeights(form="qdq", tables=False)
    ),
    ("portable", "int8-dynamic"): lambda: (
        *_quantized(weight_only.QuantizeDynamic()),
        EXPAND_CONTRIB,
        RemoveDeadCode(),
    ),
}

# What TensorRT's parser wants to see written is written last: no pass before it would keep it.
_SPELLED = (RenameBranchOutputs(), WriteQuantizationAxes())

# Rounding makes steps of the least difference: nothing that reorders sums may come after, or between.
_WRITTEN_OUT = (WRITE_OUT_INTEGERS, FoldConstants(), RemoveDeadCode())


def _pipeline(target: str, kind: str) -> tuple[Step, ...]:
    return (
        *_PLAIN[target, kind](),
        *(_WRITTEN_OUT if target in ("tensorrt", "portable") else ()),
        *(
            (precision.StoreHalf(),) if kind == "fp16-weights" else ()
        ),  # after folding: it would fold the casts
        *(_SPELLED if target == "tensorrt" else ()),
        NameNodes(),  # after everything that makes nodes
    )


PIPELINES: Mapping[tuple[str, str], tuple[Step, ...]] = Late(
    {(target, kind): functools.partial(_pipeline, target, kind) for target, kind in _PLAIN}
)
