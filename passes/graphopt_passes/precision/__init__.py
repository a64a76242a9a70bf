"""Half precision: what may be cast, what must not, and the casts."""

from graphopt_passes.precision.cast import CastToHalf

__all__ = ["CastToHalf"]
