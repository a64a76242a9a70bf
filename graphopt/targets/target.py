"""What a target is: frozen data that passes ask, never branch on by name."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import onnx_ir as ir

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})


class Precision(enum.StrEnum):
    """What the user asks the weights and activations to be."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
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
        inline_functions: whether local functions must be inlined.
        provider: the ONNX Runtime execution provider, or None where ONNX Runtime does not run it.
    """

    name: str
    summary: str
    opset: tuple[int, int]
    ir_version: tuple[int, int]
    domains: Mapping[str, int]
    fused: tuple[FusedOp, ...] = ()
    inline_functions: bool = True
    provider: str | None = None

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
            fused.op_type == op_type
            and fused.domain == domain
            and fused.form == form
            and (opset >= fused.since or domain != "")
            and (dtype is None or dtype.name in fused.dtypes)
            for fused in self.fused
        )

    def has_domain(self, domain: str) -> bool:
        """Whether the runtime knows operators of `domain`."""
        return domain in self.domains
