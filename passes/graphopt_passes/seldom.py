"""Families that a run in float32 does not need; they are imported when somebody uses them."""

from __future__ import annotations

from graphopt.deferred import Deferring

Deferring(
    (
        "graphopt_passes.precision",
        "graphopt_passes.quantize.static",
        "graphopt_passes.quantize.weight_only",
        "graphopt_passes.requantize",
    )
).install()

from graphopt_passes import precision, requantize  # noqa: E402  what was said above holds from there on
from graphopt_passes.quantize import static, weight_only  # noqa: E402

__all__ = ["precision", "requantize", "static", "weight_only"]
