"""Brings opset imports and IR version within what the target takes, where that changes no operator."""

from __future__ import annotations

from collections.abc import Iterable

import onnx.defs
import onnx_ir as ir

from graphopt.errors import TargetError
from graphopt.ir import operators
from graphopt.ir.scopes import all_graphs
from graphopt.targets import Target

_IR_VERSIONS = {
    # What first needed each IR version, by element type (ONNX IR.md, version history).
    10: (ir.DataType.UINT4, ir.DataType.INT4),
    11: (ir.DataType.FLOAT4E2M1,),
}
_INITIALIZERS_APART = 4
_FUNCTIONS = 8


def finalize(model: ir.Model, target: Target) -> tuple[str, ...]:
    """Clamps the opset imports and the IR version of `model` to the limits of `target`, in place; returns warnings.

    An opset is moved only if every operator in use means the same at both versions.  The IR version is the model's own
    where that is within the limits and new enough for what the model holds.

    Raises:
        TargetError: an operator in use is newer than the target takes.
    """
    _drop_unused_imports(model)
    warnings = [
        warning
        for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values()))
        if (warning := _clamp_opset(model, imports, target))
    ]
    lowest, highest = target.ir_version
    needed = max(_needed_ir_version(model), lowest)
    if needed > highest:
        raise TargetError(
            f"the model needs IR version {needed}, target {target.name} takes at most {highest}: "
            "its element types are too new for this runtime; cast them before export"
        )
    model.ir_version = min(max(model.ir_version, needed), highest)
    return tuple(warnings)


def _clamp_opset(model: ir.Model, imports: dict[str, int], target: Target) -> str:
    """Moves the import of ai.onnx into the target's range; a warning where it must stay below."""
    version = imports.get("")
    lowest, highest = target.opset
    if version is None or lowest <= version <= highest:
        return ""
    moved = min(max(version, lowest), highest)
    changed = sorted(_changed_operators(model, version, moved))
    if changed and version > highest:
        raise TargetError(
            f"the model imports ai.onnx opset {version}, target {target.name} takes {lowest} to {highest}, and these "
            f"operators differ between the two: {', '.join(changed)}. Export at opset {moved} or older"
        )
    if changed:
        return (
            f"the model imports ai.onnx opset {version}, target {target.name} vouches for {lowest} to {highest}: "
            f"{', '.join(changed[:8])} may behave differently there; export at opset {lowest} or newer"
        )
    imports[""] = moved
    for scope in all_graphs(model):
        for node in scope.graph:
            if not node.domain:
                node.version = (
                    None  # a node may carry the version of its domain: only the imports count now
                )
    return ""


def _drop_unused_imports(model: ir.Model) -> None:
    """Removes imports of domains that no node and no function uses; the main domain stays."""
    used = {"", *(identifier[0] for identifier in model.functions)}
    for scope in all_graphs(model):
        used.update(node.domain for node in scope.graph)
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        for domain in [d for d in imports if d not in used and d != "ai.onnx"]:
            del imports[domain]


def _changed_operators(model: ir.Model, version: int, moved: int) -> set[str]:
    """Operators in use that do not mean the same at both opsets."""
    return {
        node.op_type
        for scope in all_graphs(model)
        for node in scope.graph
        if not node.domain and not _means_the_same(node, version, moved)
    }


def _means_the_same(node: ir.Node, version: int, moved: int) -> bool:
    """Whether two opsets share the schema, or differ in nothing but element types that `node` does not use."""
    before = operators.find_schema(node.op_type, version, "")
    after = operators.find_schema(node.op_type, moved, "")
    if before is None or after is None:
        return before is after
    if after.deprecated and not before.deprecated:
        return False  # Upsample from opset 10 on: the schema is there, runtimes refuse it
    if before.since_version == after.since_version:
        return True
    return _signature(before) == _signature(after) and _admits(after, node)


def _signature(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    """Everything a schema says but the element types: its documentation is where a change of meaning shows."""
    formals = [(f.name, f.option, f.type_str) for f in (*schema.inputs, *schema.outputs)]
    attributes = sorted((n, a.required, str(a.default_value)) for n, a in schema.attributes.items())
    return (schema.doc, formals, attributes)


def _admits(schema: onnx.defs.OpSchema, node: ir.Node) -> bool:
    """Whether the schema takes the element types of `node`'s inputs and outputs; unknown ones do not count."""
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    pairs = [
        *zip(schema.inputs, node.inputs, strict=False),
        *zip(schema.outputs, node.outputs, strict=False),
    ]
    for formal, value in pairs:
        if value is None or value.dtype is None or not isinstance(value.type, ir.TensorType):
            continue
        if f"tensor({value.dtype.name.lower()})" not in allowed.get(
            formal.type_str, {formal.type_str}
        ):
            return False
    return True


def _needed_ir_version(model: ir.Model) -> int:
    needed = _FUNCTIONS if model.functions else 3
    inputs = set(model.graph.inputs)
    if any(value not in inputs for value in model.graph.initializers.values()):
        needed = max(needed, _INITIALIZERS_APART)
    found = set(_dtypes(model))
    for version, dtypes in _IR_VERSIONS.items():
        if found.intersection(dtypes):
            needed = max(needed, version)
    return needed


def _dtypes(model: ir.Model) -> Iterable[ir.DataType | None]:
    for scope in all_graphs(model):
        yield from (value.dtype for value in scope.graph.inputs)
        yield from (value.dtype for value in scope.graph.initializers.values())
        yield from (value.dtype for node in scope.graph for value in node.outputs)
