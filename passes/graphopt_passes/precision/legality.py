"""Which operands of a node may be half precision: the operator's schema and what the target has kernels for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from graphopt.ir import operators
from graphopt.targets import Target
from graphopt.targets.kernels import Kernel, KernelTable, packaged_kernels
from graphopt.targets.operators import operator_table
from graphopt_passes.precision.flow import COORDINATES

MICROSOFT = "com.microsoft"

_STATISTICS: Mapping[str, tuple[int, ...]] = {
    "SkipLayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (1, 2),
}
"""Outputs of contributed operators that are float32 whatever the others are (contrib_defs.cc)."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which operands of a node may be half.

    Attributes:
        inputs: by position; False for what is no float32 tensor.
        outputs: by position.
        refusal: why the node cannot compute in half at all, or "".
    """

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]
    refusal: str = ""


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is a float32 tensor."""
    if value is None:
        return False
    if value.type is None and value.const_value is not None:
        return value.const_value.dtype == ir.DataType.FLOAT
    return isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True)
class Legality:
    """What the target takes in one half dtype.

    Attributes:
        target: what the result is for.
        half: FLOAT16 or BFLOAT16.
        opsets: imports of the graph.
    """

    target: Target
    half: ir.DataType
    opsets: operators.Opsets

    def slots(self, node: ir.Node) -> Slots:
        """The operands of `node` that may be half."""
        if node.domain == MICROSOFT:
            return self._contributed(node)
        schema = operators.schema(node, self.opsets)
        if schema is None:
            return _refused(node, "onnx has no schema of it")
        ins = _formals(schema.inputs, len(node.inputs))
        outs = _formals(schema.outputs, len(node.outputs))
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        halves = {name for name, types in allowed.items() if self._type in types}
        main = _main(node, ins, outs)
        if main not in halves:
            return _refused(node, self._schema_refusal(node, main))
        refusal, granted = self._runtime(node, schema.since_version, main, halves)
        if refusal:
            return _refused(node, refusal)
        bound = {name for name, value in zip(ins, node.inputs, strict=False) if is_float(value)}
        fixed = self._fixed_inputs(node)
        place = COORDINATES.get(node.op_type)
        if place is not None and place < len(ins) and ins[place] != main:
            fixed = fixed | {place}
        return Slots(
            tuple(
                is_float(value) and name in granted and index not in fixed
                for index, (value, name) in enumerate(zip(node.inputs, ins, strict=True))
            ),
            # What no input binds is set by an attribute (stash_type, dtype) and stays.
            tuple(
                is_float(value) and name in granted and name in bound
                for value, name in zip(node.outputs, outs, strict=True)
            ),
        )

    @property
    def _type(self) -> str:
        return f"tensor({self.half.name.lower()})"

    def _schema_refusal(self, node: ir.Node, main: str) -> str:
        version = operators.opset(node, self.opsets) or 0
        kind = self.half.name.lower()
        for newer in range(version + 1, onnx.defs.onnx_opset_version() + 1):
            later = operators.find_schema(node.op_type, newer, node.domain)
            types = (
                {c.type_param_str: c.allowed_type_strs for c in later.type_constraints}
                if later
                else {}
            )
            if self._type in types.get(main, ()):
                return f"schema: {kind} from opset {newer} on, the model imports {version}"
        return f"schema: takes no {kind}"

    def _runtime(
        self, node: ir.Node, version: int, main: str, halves: set[str]
    ) -> tuple[str, set[str]]:
        """Why the target refuses the node in half, and the type parameters that it takes in half."""
        if self.target.operators:
            return self._parser(node), halves
        table = self._table()
        if table is None:
            return "", halves
        rows = table.find(node.domain, node.op_type)
        row = self._row([each for each in rows if each.serves(version)], main)
        if row is None:
            return f"target: {self.target.name} has no {self.half.name.lower()} kernel", set()
        word = self.half.name.lower()
        return "", {name for name in halves if word in row.types.get(name, ()) or name == main}

    def _parser(self, node: ir.Node) -> str:
        table = operator_table(self.target.operators)
        found = table.operators.get(node.op_type)
        if found is None:
            return f"target: {self.target.name} does not list it" if table.strict else ""
        takes = found.supported and (not found.types or self.half.name in found.types)
        rules = [rule for rule in found.rules if rule.check == "dtype-in" and rule.input == 0]
        if takes and all(self.half.name in rule.values for rule in rules):
            return ""
        return f"target: {self.target.name} does not take it in {self.half.name.lower()}"

    def _fixed_inputs(self, node: ir.Node) -> set[int]:
        if not self.target.operators:
            return set()
        found = operator_table(self.target.operators).operators.get(node.op_type)
        rules = [] if found is None else [r for r in found.rules if r.check == "dtype-in"]
        return {r.input for r in rules if r.input is not None and self.half.name not in r.values}

    def _row(self, rows: Sequence[Kernel], main: str) -> Kernel | None:
        word = self.half.name.lower()
        return next((row for row in rows if word in row.types.get(main, {word})), None)

    def _table(self) -> KernelTable | None:
        """The kernels that decide: those of the first provider, where it computes in half at all."""
        if not self.target.kernels or self.half.name not in self.target.floats.computes:
            return None
        return packaged_kernels(self.target.kernels[0])

    def _contributed(self, node: ir.Node) -> Slots:
        """Operands of an operator of com.microsoft: one type for all, but for statistics."""
        table = self._table()
        rows = table.find(node.domain, node.op_type) if table is not None else ()
        word = self.half.name.lower()
        if not any(word in types for row in rows for types in row.types.values()):
            return _refused(
                node, f"target: {self.target.name} is not known to have a {word} kernel"
            )
        apart = _STATISTICS.get(node.op_type, ())
        return Slots(
            tuple(is_float(value) for value in node.inputs),
            tuple(is_float(v) and i not in apart for i, v in enumerate(node.outputs)),
        )


def _refused(node: ir.Node, reason: str) -> Slots:
    return Slots((False,) * len(node.inputs), (False,) * len(node.outputs), reason)


def _formals(formals: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> list[str]:
    """The type parameter of each operand; the last formal stands for all further ones."""
    names = [formal.type_str for formal in formals]
    return [names[min(index, len(names) - 1)] for index in range(count)] if names else [""] * count


def _main(node: ir.Node, ins: Sequence[str], outs: Sequence[str]) -> str:
    """The type parameter of the first float output, or of the first float input."""
    pairs = [*zip(node.outputs, outs, strict=True), *zip(node.inputs, ins, strict=True)]
    return next((name for value, name in pairs if is_float(value)), "")
