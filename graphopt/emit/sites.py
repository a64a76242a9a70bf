"""A node with everything that a legality rule may ask about it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir import operators, values
from graphopt.ir.scopes import Scope, all_graphs
from graphopt.ir.shapes import Dim, Shapes

_NAMES = {
    "FLOAT": "float",
    "DOUBLE": "double",
    "FLOAT8E4M3FN": "float8e4m3fn",
    "FLOAT8E8M0": "float8e8m0",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One node in its graph.

    Attributes:
        node: the node.
        scope: where it is.
        shapes: what is known of the model's values.
        domain: of the operator, "" for ai.onnx.
        opset: version at which the domain is imported; 0 where it is not.
    """

    node: ir.Node
    scope: Scope
    shapes: Shapes
    domain: str
    opset: int

    @property
    def label(self) -> str:
        """The node's name, or that of its first named output."""
        return self.node.name or next((v.name for v in self.node.outputs if v.name), "") or ""

    @property
    def op(self) -> str:
        """`Conv`, or `com.microsoft::Gelu`."""
        return f"{self.domain}::{self.node.op_type}" if self.domain else self.node.op_type

    def input(self, index: int) -> ir.Value | None:
        """An operand, or None where it is absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def dtype(self, index: int) -> str | None:
        """Name of an operand's element type, or None where it is absent or not known."""
        value = self.input(index)
        return None if value is None else self.dtype_of(value)

    def dtype_of(self, value: ir.Value) -> str | None:
        """Name of a tensor's element type, or None where it is not known."""
        known = self.shapes.dtype(value) or value.dtype
        return known.name if isinstance(known, ir.DataType) and known.name != "UNDEFINED" else None

    def rank(self, index: int) -> int | None:
        """Rank of an operand, or None."""
        value = self.input(index)
        dims = None if value is None else self.shapes.dims(value)
        return None if dims is None else len(dims)

    def static_dims(self, index: int) -> tuple[int, ...] | None:
        """Dimensions of an operand, or None unless all are known numbers."""
        value = self.input(index)
        dims = None if value is None else self.shapes.dims(value)
        if dims is None:
            return None
        sizes = [dim.value for dim in dims]
        return (
            None
            if any(size is None for size in sizes)
            else tuple(s for s in sizes if s is not None)
        )

    def attribute(self, name: str) -> object:
        """An attribute's value, the schema's default, or None."""
        try:
            return operators.attribute(self.node, name, opsets=self.scope.opsets)
        except ModelError:
            return None

    def is_foldable(self, value: ir.Value | None) -> bool:
        """Whether a parser knows the value before anything runs: constant, or computed from constants alone."""
        return value is not None and _foldable(value, self.shapes, self.scope.opsets)


def all_sites(model: ir.Model, shapes: Shapes) -> Iterator[Site]:
    """Every node of a model, functions and subgraphs included."""
    for scope in all_graphs(model):
        for node in scope.graph:
            domain = "" if node.domain == "ai.onnx" else node.domain
            yield Site(node, scope, shapes, domain, operators.opset(node, scope.opsets) or 0)


def _foldable(root: ir.Value, shapes: Shapes, opsets: operators.Opsets) -> bool:
    """Whether everything that `root` is computed from is known; each value is looked at once."""
    pending, seen = [root], {root}
    while pending:
        value = pending.pop()
        if _is_known(value, shapes):
            continue
        node = value.producer()
        if value.is_graph_input() or node is None or operators.has_subgraph(node):
            return False
        inputs = {v for v in node.inputs if v is not None}
        if not inputs or not operators.is_pure(node, opsets):
            return False
        pending.extend(inputs - seen)
        seen |= inputs
    return True


def _is_known(value: ir.Value, shapes: Shapes) -> bool:
    """Whether a value is a constant, or small and known from shapes; a graph input never is, not even an empty one."""
    if values.constant(value) is not None:
        return True
    data = None if value.is_graph_input() else shapes.data(value)
    return data is not None and all(_is_number(each) for each in data.elements)


def _is_number(element: object) -> bool:
    return isinstance(element, float) or (isinstance(element, Dim) and element.is_static)


@functools.lru_cache(maxsize=1024)
def dtype_text(name: str) -> str:
    """A name of `ir.DataType` as ONNX Runtime writes it: `FLOAT` is `float`."""
    return _NAMES.get(name, name.lower())


def type_text(site: Site, value: ir.Value) -> str | None:
    """The type of a value as kernel tables write it: `float`, `seq(tensor(float))`; None where it is not known."""
    known = site.shapes.facts(value).type or value.type
    if known is None:
        name = site.dtype_of(value)
        return None if name is None else dtype_text(name)
    text = _written(known)
    if text is None or not text.startswith("tensor("):
        return text
    return text[len("tensor(") : -1]


def _written(kind: ir.TypeProtocol) -> str | None:
    if isinstance(kind, ir.TensorType):
        return None if kind.dtype.name == "UNDEFINED" else f"tensor({dtype_text(kind.dtype.name)})"
    inner = getattr(kind, "elem_type", None)
    sequence, optional = isinstance(kind, ir.SequenceType), isinstance(kind, ir.OptionalType)
    word = "seq" if sequence else "optional" if optional else ""
    written = _written(inner) if word and inner is not None and not isinstance(inner, int) else None
    return None if written is None else f"{word}({written})"
