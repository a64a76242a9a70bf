"""Brings opset imports and IR version within what the target takes, where that changes no operator."""

from __future__ import annotations

from collections.abc import Iterable

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


def finalize(model: ir.Model, target: Target) -> None:
    """Clamps the opset imports and the IR version of `model` to the limits of `target`, in place.

    An opset is moved only if every operator in use means the same at both versions.  The IR version is the smallest
    that the model's features need, or the model's own where that is within the limits.

    Raises:
        TargetError: an operator in use is newer than the target takes.
    """
    _drop_unused_imports(model)
    lowest, highest = target.opset
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        version = imports.get("")
        if version is None or lowest <= version <= highest:
            continue
        moved = min(max(version, lowest), highest)
        _require_same_operators(model, version, moved, target)
        imports[""] = moved
        _forget_versions(model)
    lowest, highest = target.ir_version
    needed = max(_needed_ir_version(model), lowest)
    if needed > highest:
        raise TargetError(
            f"the model needs IR version {needed}, target {target.name} takes at most {highest}: "
            "its element types are too new for this runtime; cast them before export"
        )
    model.ir_version = min(max(model.ir_version, needed), highest)


def _drop_unused_imports(model: ir.Model) -> None:
    """Removes imports of domains that no node and no function uses; the main domain stays."""
    used = {"", *(identifier[0] for identifier in model.functions)}
    for scope in all_graphs(model):
        used.update(node.domain for node in scope.graph)
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        for domain in [d for d in imports if d not in used and d != "ai.onnx"]:
            del imports[domain]


def _forget_versions(model: ir.Model) -> None:
    """A node may carry the version of its domain; after a move only the imports count."""
    for scope in all_graphs(model):
        for node in scope.graph:
            if not node.domain:
                node.version = None


def _require_same_operators(model: ir.Model, version: int, moved: int, target: Target) -> None:
    """Refuses a move between opsets at which an operator in use differs.

    Raises:
        TargetError: naming the operators.
    """
    found = {node.op_type for scope in all_graphs(model) for node in scope.graph if not node.domain}
    changed = sorted(op for op in found if _since(op, version) != _since(op, moved))
    if changed:
        raise TargetError(
            f"the model imports ai.onnx opset {version}, target {target.name} takes {target.opset[0]} to "
            f"{target.opset[1]}, and these operators differ between the two: {', '.join(changed)}. "
            f"Export at opset {moved}, or convert with onnx.version_converter first"
        )


def _since(op_type: str, version: int) -> int | None:
    schema = operators.find_schema(op_type, version, "")
    return None if schema is None else int(schema.since_version)


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
