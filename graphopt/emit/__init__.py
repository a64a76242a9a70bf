"""From the IR to a file that a target takes: limits clamped, checked, written atomically."""

from graphopt.emit.conformance import check_model
from graphopt.emit.finalize import finalize

__all__ = ["check_model", "finalize"]
