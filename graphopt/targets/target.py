"""What a target is: frozen data that passes ask, never branch on by name."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence

import onnx_ir as ir

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})


class Precision(enum.StrEnum):
    """What the user asks the weights and activations to be."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP16_WEIGHTS = "fp16-weights"
    FP8 = "fp8"
    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"
    INT4_WEIGHTS = "int4-weights"


@dataclasses.dataclass(frozen=True)
class FusedOp:
    """An operator that stands for several others, and where the target has a kernel for it that pays.

    Attributes:
        op_type: operator name.
        domain: operator domain, "" for ai.onnx.
        since: first opset of the domain that defines it.
        until: last opset of ai.onnx at which the target has a kernel; None for all.
        dtypes: element types (names of `ir.DataType`) that the kernel takes.
        form: a use of the operator that pays or not for itself ("inner-axis"); "" for the usual one.
        source: the measurement or documentation that says it pays.
    """

    op_type: str
    source: str
    domain: str = ""
    since: int = 1
    dtypes: frozenset[str] = FLOATS
    form: str = ""
    until: int | None = None


class SparseStyle(enum.StrEnum):
    """In which form the runtime takes weights of which most are zero."""

    DENSE = "dense"
    INITIALIZER = "sparse_initializer"
    CONSTANT = "constant"
    KEPT = "kept"
    """Sparse for what came sparse, dense for what came dense; in Constant nodes where all that came sparse did."""


class Artefact(enum.StrEnum):
    """What a bundle holds for the runtime beside the model."""

    SESSION_OPTIONS = "session_options.json"
    PROVIDER_OPTIONS = "provider_options.json"
    TRTEXEC = "build.sh"
    OPENVINO_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class QdqStyle:
    """How quantised arithmetic is written down for the target.

    Attributes:
        activations: element type of quantised activations; "" where quantising them does not pay.
        weights: element type of quantised weights.
        weight_bits: bits of a weight that may be used; 7 where products of 8-bit values saturate.
        zero_points: whether activations may have a zero point other than 0.
        per_channel: whether weights may have one scale a channel.
        integer_operators: whether MatMulInteger, QLinearConv and their like have kernels.
        sub_byte_weights: whether 4-bit weights, dequantised in blocks, have kernels.
        whole_blocks: whether blocks must divide what they lie along, and rows of 4-bit tensors be of even length.
        source: who says so.
    """

    activations: str
    weights: str
    weight_bits: int = 8
    zero_points: bool = True
    per_channel: bool = True
    integer_operators: bool = False
    sub_byte_weights: bool = False
    whole_blocks: bool = False
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Channels:
    """How many channels the blocked layout of the target's convolutions wants.

    Attributes:
        multiple: of how many an input's channels must be to be taken into the layout.
        block: how many channels lie together; what a tensor lacks to whole blocks is computed, too.
        most: how many times as many channels whole blocks may have as there are, to pay still.
        window: how many positions a filter must have at least, for the layout to be worth going into.
        outputs: how many channels must come out at least.
        source: the measurement.
    """

    multiple: int
    block: int
    most: float
    window: int
    outputs: int
    source: str


@dataclasses.dataclass(frozen=True)
class PrecisionStyle:
    """Which floats the target computes in.

    Attributes:
        computes: element types with arithmetic of their own; others are cast around each operator.
        strongly_typed: whether the types in the graph are the types of execution, with no flag needed.
    """

    computes: frozenset[str]
    strongly_typed: bool = True


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime to emit for.

    Attributes:
        name: what the command line calls it.
        summary: one line for `graphopt targets`.
        opset: smallest and largest ai.onnx opset that the runtime takes.
        ir_version: smallest and largest IR version that the runtime takes.
        domains: operator domains with kernels there, and the version to import of each.
        fused: fused operators that may be introduced.
        shuns: operators that the runtime would fuse to when it loads the model, and lose by; the measurement of each.
        channels: how many channels convolutions should have; None where it does not matter, or is not known.
        raises_opset: whether a model's opset may be raised for a fused operator that came later.
        inline_functions: whether local functions must be inlined.
        provider: the ONNX Runtime execution provider, or None where ONNX Runtime does not run it.
        like: a target whose pipelines serve this one too; "" for none.
        operators: the packaged table of operators that the runtime's parser takes; "" where kernels decide.
        kernels: packaged kernel tables of ONNX Runtime, in the order in which its providers are asked.
        version: of the runtime that the limits are of; operators that came later are refused.
        dtypes: element types that the runtime knows at all; empty where the kernels decide.
        io_dtypes: element types that may enter and leave the graph beyond `dtypes`.
        architecture: processor that kernels are picked for: x86-avx2, x86-vnni, x86-amx, arm64; "" for any.
        qdq: how quantised arithmetic is written down; None where it is not.
        floats: which floats it computes in.
        sparse: the form of sparse weights.
        artefacts: what a bundle holds for it.
        options: settings of the runtime that a bundle states, by artefact.
    """

    name: str
    summary: str
    opset: tuple[int, int]
    ir_version: tuple[int, int]
    domains: Mapping[str, int]
    fused: tuple[FusedOp, ...] = ()
    shuns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    channels: Channels | None = None
    raises_opset: bool = True
    inline_functions: bool = True
    provider: str | None = None
    like: str = ""
    operators: str = ""
    kernels: tuple[str, ...] = ()
    version: tuple[int, ...] = ()
    dtypes: frozenset[str] = frozenset()
    io_dtypes: frozenset[str] = frozenset()
    architecture: str = ""
    qdq: QdqStyle | None = None
    floats: PrecisionStyle = PrecisionStyle(frozenset({"FLOAT", "DOUBLE"}))
    sparse: SparseStyle = SparseStyle.DENSE
    artefacts: tuple[Artefact, ...] = ()
    options: Mapping[Artefact, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    def emits(
        self,
        op_type: str,
        *,
        opset: int,
        domain: str = "",
        dtype: ir.DataType | None = None,
        form: str = "",
    ) -> bool:
        """Whether a rewrite may introduce `op_type` in a model of ai.onnx `opset` on elements of `dtype`."""
        return any(
            (opset >= fused.since or domain != "")
            and (fused.until is None or opset <= fused.until)
            and (dtype is None or dtype.name in fused.dtypes)
            for fused in self._by_form.get((op_type, domain, form), ())
        )

    @functools.cached_property
    def _by_form(self) -> Mapping[tuple[str, str, str], Sequence[FusedOp]]:
        """The fused operators by type, domain and form: rules ask at every match."""
        found: dict[tuple[str, str, str], list[FusedOp]] = {}
        for fused in self.fused:
            found.setdefault((fused.op_type, fused.domain, fused.form), []).append(fused)
        return found

    def has_domain(self, domain: str) -> bool:
        """Whether the runtime knows operators of `domain`."""
        return domain in self.domains
