"""Number formats to quantise into, and the parameters that a range gives in each."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import OptionError

Wide: TypeAlias = npt.NDArray[np.float64]

LEAST_SCALE = 2.0**-100
"""Scales below this underflow when two of them are multiplied in float32."""

_INTEGERS = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
}
_FLOATS = {
    ir.DataType.FLOAT8E4M3FN: (448.0, ml_dtypes.float8_e4m3fn),
    ir.DataType.FLOAT8E5M2: (57344.0, ml_dtypes.float8_e5m2),
}


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format and how it is used.

    Attributes:
        dtype: of what is stored.
        symmetric: whether zero is stored as the middle of the codes, -qmin = qmax for signed ones.
        bits: codes used, in bits; None for all. 7 keeps 8-bit products from saturating 16-bit sums.
    """

    dtype: ir.DataType
    symmetric: bool = False
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _INTEGERS and self.dtype not in _FLOATS:
            known = ", ".join(d.name.lower() for d in (*_INTEGERS, *_FLOATS))
            raise OptionError(
                f"cannot quantise to {self.dtype.name.lower()}; choose one of {known}"
            )

    @property
    def is_float(self) -> bool:
        """Whether the codes are floating-point numbers."""
        return self.dtype in _FLOATS

    @property
    def codes(self) -> tuple[int, int]:
        """The least and the greatest code in use; for floats the greatest magnitude, both ways."""
        if self.is_float:
            top = int(_FLOATS[self.dtype][0])
            return -top, top
        low, high = _INTEGERS[self.dtype]
        if self.bits is not None:
            drop = self.dtype.bitwidth - self.bits
            low, high = low >> drop, high >> drop
        return (-high, high) if self.symmetric and low < 0 else (low, high)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Scale and zero point of one tensor.

    Attributes:
        scale: a float32 value.
        zero_point: a code.
        format: what the codes are.
    """

    scale: float
    zero_point: int
    format: Format

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest number that is represented."""
        low, high = self.format.codes
        return self.scale * (low - self.zero_point), self.scale * (high - self.zero_point)


def parameters(low: float, high: float, form: Format) -> Parameters:
    """Scale and zero point for numbers from `low` to `high`; zero is always represented exactly.

    s = (high - low) / (qmax - qmin), z = qmin - low / s; symmetric: s = max(|low|, |high|) / qmax.  Computed in
    float64; the zero point follows from the scale as it is stored.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    first, last = form.codes
    if form.is_float or (form.symmetric and first < 0):
        scale = _stored(max(-low, high) / last)
        return Parameters(scale, 0, form)
    if form.symmetric:
        middle = (first + last + 1) // 2
        scale = _stored(max(-low / (middle - first), high / (last - middle)))
        return Parameters(scale, middle, form)
    scale = _stored((high - low) / (last - first))
    zero = int(np.clip(np.rint(first - low / scale), first, last))
    return Parameters(scale, zero, form)


def _stored(scale: float) -> float:
    """The scale as float32; 1 for a tensor of zeros, whose scale must still be positive."""
    if not scale > 0 or not np.isfinite(scale):
        return 1.0
    return float(np.float32(max(scale, LEAST_SCALE)))


def round_trip(numbers: Wide, given: Parameters) -> Wide:
    """The numbers as they come back from the format."""
    first, last = given.format.codes
    scaled = numbers / given.scale
    if given.format.is_float:
        top, dtype = _FLOATS[given.format.dtype]
        narrow = np.clip(scaled, -top, top).astype(dtype)
        return np.asarray(narrow.astype(np.float64) * given.scale)
    codes = np.clip(np.rint(scaled) + given.zero_point, first, last)
    return np.asarray((codes - given.zero_point) * given.scale)
