"""Shape, type and small-integer inference with symbolic dimensions, for the whole model and after a change.

`Shapes(model)` infers; `shapes.dims(value)` are `Dim`s, polynomials over the user's dim_params and
over symbols for what nothing tells; `shapes.data(value)` the elements of small integer tensors in
the same terms. Rules live in one module a family, tables named RULES; every operator without a rule
goes through onnx's own inference, node by node.
"""

from graphopt.ir.shapes.dim import (
    Dim,
    Kind,
    Symbol,
    broadcast,
    ceildiv,
    is_cut_to,
    maximum,
    minimum,
    product,
    truncdiv,
)
from graphopt.ir.shapes.facts import Dims, Facts, Ratio, SymbolicData
from graphopt.ir.shapes.inference import Conflict, Shapes

__all__ = [
    "Conflict",
    "Dim",
    "Dims",
    "Facts",
    "Kind",
    "Ratio",
    "Shapes",
    "Symbol",
    "SymbolicData",
    "broadcast",
    "ceildiv",
    "is_cut_to",
    "maximum",
    "minimum",
    "product",
    "truncdiv",
]
