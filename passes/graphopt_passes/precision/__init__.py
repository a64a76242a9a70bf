"""Half precision: what may be cast, what must not, and the casts."""

from graphopt_passes.precision.cast import CastToHalf
from graphopt_passes.precision.opsets import opsets_for

__all__ = ["CastToHalf", "opsets_for"]
