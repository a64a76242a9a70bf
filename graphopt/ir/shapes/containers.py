"""Types and shapes of sequences and optionals: the dims of a container are those that all its tensors have."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim
from graphopt.ir.shapes.facts import UNKNOWN, Dims, Facts
from graphopt.ir.shapes.query import Query, Rules, normalised


def shared(shapes: Sequence[Dims | None]) -> Dims | None:
    """The dimensions that all tensors of a container have, or None where they differ."""
    first = shapes[0] if shapes else None
    return first if all(dims == first for dims in shapes) else None


def _element(given: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    """The type of what a sequence or optional holds."""
    return given.elem_type if isinstance(given, ir.SequenceType | ir.OptionalType) else None


def _construct(q: Query) -> Sequence[Facts]:
    inner = q.facts(0).type
    dims = shared([q.dims(i) for i in range(len(q.inputs))])
    return [UNKNOWN if inner is None else Facts(ir.SequenceType(inner), dims)]


def _empty(q: Query) -> Sequence[Facts]:
    dtype = q.attr("dtype", int(ir.DataType.FLOAT))
    return [Facts(ir.SequenceType(facts.tensor_type(ir.DataType(dtype))))]


def _at(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    return [Facts(_element(given.type), given.dims)]


def _insert(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    return [Facts(given.type, shared((given.dims, q.dims(1))))]


def _same(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    return [Facts(given.type, given.dims)]


def _length(_q: Query) -> Sequence[Facts]:
    return [facts.tensor(ir.DataType.INT64, ())]


def _split_to_sequence(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    if given.type is None:
        return [UNKNOWN]
    kind = ir.SequenceType(given.type)
    if given.dims is None:
        return [Facts(kind)]
    axis = normalised(q.attr("axis", 0), len(given.dims))
    size = _piece(q, given.dims[axis])
    keep = bool(q.attr("keepdims", 1)) or q.has(1)
    if size is None and keep:
        return [Facts(kind)]
    middle = (size,) if size is not None and keep else ()
    return [Facts(kind, (*given.dims[:axis], *middle, *given.dims[axis + 1 :]))]


def _piece(q: Query, total: Dim) -> Dim | None:
    """The size of every piece along the split axis, or None where they may differ."""
    if not q.has(1):
        return Dim.of(1)
    sizes = q.ints(1)
    if sizes is None:
        return None
    if q.dims(1) == ():
        return Dim.of(sizes[0]) if total % sizes[0] == 0 else None
    return Dim.of(sizes[0]) if sizes and len(set(sizes)) == 1 else None


def _concat_from_sequence(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    inner = _element(given.type)
    if inner is None or given.dims is None:
        return [Facts(inner)]
    new = bool(q.attr("new_axis", 0))
    rank = len(given.dims) + new
    axis = normalised(q.attr("axis", 0), rank)
    rest = given.dims[axis:] if new else given.dims[axis + 1 :]
    return [Facts(inner, (*given.dims[:axis], q.fresh(0, axis), *rest))]


def _optional(q: Query) -> Sequence[Facts] | None:
    given = q.facts(0)
    if not q.has(0) or given.type is None:
        return None
    return [Facts(ir.OptionalType(given.type), given.dims)]


def _optional_get(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    if isinstance(given.type, ir.OptionalType):
        return [Facts(_element(given.type), given.dims)]
    return [given]


def _optional_has(_q: Query) -> Sequence[Facts]:
    return [facts.tensor(ir.DataType.BOOL, ())]


RULES: Rules = {
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceAt": _at,
    "SequenceInsert": _insert,
    "SequenceErase": _same,
    "SequenceLength": _length,
    "SplitToSequence": _split_to_sequence,
    "ConcatFromSequence": _concat_from_sequence,
    "Optional": _optional,
    "OptionalGetElement": _optional_get,
    "OptionalHasElement": _optional_has,
}
