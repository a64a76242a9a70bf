"""Half precision: what may be cast, what must not, and the casts."""

from graphopt_passes.precision.cast import CastToHalf
from graphopt_passes.precision.fp8 import QuantizeFp8
from graphopt_passes.precision.opsets import opsets_for
from graphopt_passes.precision.storage import StoreHalf

__all__ = ["CastToHalf", "QuantizeFp8", "StoreHalf", "opsets_for"]
