"""Making a model for one use: dimensions fixed, inputs bound, outputs chosen, names, types and layouts changed."""

from __future__ import annotations

from graphopt.specialize.plan import InputPort, OutputPort, Plan
from graphopt.specialize.surgery import specialize
from graphopt.specialize.table import from_table, over
from graphopt.specialize.wanted import Image, Specialization

__all__ = [
    "Image",
    "InputPort",
    "OutputPort",
    "Plan",
    "Specialization",
    "from_table",
    "over",
    "specialize",
]
