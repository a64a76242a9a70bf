"""NumPy kernels for the operators whose result is exact and cheap: data movement and integers.

They serve two masters: folding (arrays of numbers) and shape inference (arrays of `Dim` objects,
for which the kernels that only move elements work unchanged). A kernel returns None where it does
not know the result to the last bit; the caller then asks a runtime. A malformed node makes it raise
one of `REFUSALS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.ir.kernels.arithmetic import ARITHMETIC
from graphopt.ir.kernels.creation import CREATION, shape_range
from graphopt.ir.kernels.movement import MOVEMENT
from graphopt.ir.kernels.operation import UNBOUND, Inputs, Kernel, Operation, Results

__all__ = [
    "KERNELS",
    "MOVEMENT",
    "REFUSALS",
    "UNBOUND",
    "Inputs",
    "Kernel",
    "Operation",
    "Results",
    "kernel",
    "movement",
    "run",
    "shape_range",
]

KERNELS: Mapping[str, Kernel] = {**MOVEMENT, **CREATION, **ARITHMETIC}

REFUSALS = (ValueError, IndexError, TypeError, KeyError, OverflowError, AttributeError)
"""What a kernel raises when node and inputs do not fit together."""


def kernel(node: ir.Node) -> Kernel | None:
    """The kernel of an operator of the default domain, or None."""
    return None if node.domain else KERNELS.get(node.op_type)


def movement(node: ir.Node) -> Kernel | None:
    """The kernel of an operator that only moves the elements of its inputs, or None."""
    return None if node.domain else MOVEMENT.get(node.op_type)


def run(chosen: Kernel, operation: Operation, inputs: Inputs) -> Results:
    """Runs a kernel; None where it does not know the exact result.

    Raises:
        ValueError, IndexError, TypeError, KeyError, OverflowError, AttributeError: the node is
        malformed.
    """
    with np.errstate(all="ignore"):
        return chosen(operation, inputs)
