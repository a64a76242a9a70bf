"""The numbers of a half dtype that decide."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers of a half dtype that decide.

    Attributes:
        greatest: finite magnitude.
        error: relative rounding error of a value or weight that is accepted; a sound one makes 2^-12 (2^-9 in bf16).
        integer: up to which integers are exact.
        exponent: magnitude up to which rounding what goes into an exponential moves the result by some percents.
    """

    greatest: float
    error: float
    integer: int
    exponent: float


LIMITS = {
    ir.DataType.FLOAT16: Limits(65504.0, 2.0**-9, 2048, 160.0),
    ir.DataType.BFLOAT16: Limits(3.3895313892515355e38, 2.0**-6, 256, 80.0),
}
