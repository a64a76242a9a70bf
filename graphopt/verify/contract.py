"""Whether two models can be put in each other's place: names, order, dtypes and dims of inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.runtime.specs import dtype_name, name_list

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphopt.runtime.specs import Dim, TensorSpec


def input_faults(reference: Sequence[TensorSpec], candidate: Sequence[TensorSpec]) -> list[str]:
    """What a caller of the reference would trip over at the inputs of the candidate.

    Inputs that must be fed come in the same order under the same names; defaults that could be overridden
    still can be. A dimension may not become stricter: a free one stays free, under its name.
    """
    faults = _name_faults("input", _required(reference), _required(candidate))
    if faults:
        return faults
    others = {spec.name: spec for spec in candidate}
    for spec in reference:
        other = others.get(spec.name)
        if other is None or (spec.overridable and not other.overridable):
            faults.append(f"the default of input '{spec.name}' can no longer be overridden")
            continue
        faults += _type_faults("input", spec, other)
        faults += [
            f"axis {axis} of input '{spec.name}' is {_shown(b)}, the reference has {_shown(a)}"
            for axis, (a, b) in enumerate(_axes(spec, other))
            if a != b and (a is not None or isinstance(b, int))
        ]
    return faults


def output_faults(reference: Sequence[TensorSpec], candidate: Sequence[TensorSpec]) -> list[str]:
    """What a caller of the reference would trip over at the outputs of the candidate.

    A dimension may become more precise, never less: a known size stays stated.
    """
    faults = _name_faults("output", reference, candidate)
    if faults:
        return faults
    for spec, other in zip(reference, candidate, strict=True):
        faults += _type_faults("output", spec, other)
        faults += [
            f"axis {axis} of output '{spec.name}' is {_shown(b)}, the reference has {_shown(a)}"
            for axis, (a, b) in enumerate(_axes(spec, other))
            if isinstance(a, int) and a != b
        ]
    return faults


def dropped_defaults(reference: Sequence[TensorSpec], candidate: Sequence[TensorSpec]) -> list[str]:
    """Names of overridable defaults of the reference that the candidate has made constants."""
    kept = {spec.name for spec in candidate if spec.overridable}
    return [spec.name for spec in reference if spec.overridable and spec.name not in kept]


def _required(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [spec for spec in specs if not spec.overridable]


def _name_faults(
    what: str, reference: Sequence[TensorSpec], candidate: Sequence[TensorSpec]
) -> list[str]:
    if [spec.name for spec in reference] == [spec.name for spec in candidate]:
        return []
    return [f"the {what}s are {name_list(candidate)}; the reference has {name_list(reference)}"]


def _type_faults(what: str, reference: TensorSpec, candidate: TensorSpec) -> list[str]:
    faults: list[str] = []
    if reference.dtype is ir.DataType.UNDEFINED:
        return faults  # the file states no type at all: stating the inferred one takes nothing from a caller
    if reference.kind is not candidate.kind:
        faults.append(
            f"{what} '{reference.name}' is a {candidate.kind.value}, the reference has a {reference.kind.value}"
        )
    if reference.dtype is not candidate.dtype:
        faults.append(
            f"{what} '{reference.name}' is {dtype_name(candidate.dtype)}, "
            f"the reference has {dtype_name(reference.dtype)}"
        )
    if reference.shape is not None and (
        candidate.shape is None or len(candidate.shape) != len(reference.shape)
    ):
        faults.append(f"{what} '{reference.name}' is {candidate}, the reference has {reference}")
    return faults


def _axes(reference: TensorSpec, candidate: TensorSpec) -> list[tuple[Dim, Dim]]:
    a, b = reference.shape or (), candidate.shape or ()
    return list(zip(a, b, strict=True)) if len(a) == len(b) else []


def _shown(dim: Dim) -> str:
    return "free" if dim is None else f"'{dim}'" if isinstance(dim, str) else str(dim)
