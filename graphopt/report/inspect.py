"""What is in a model: inputs and outputs, operators, parameters, arithmetic, dtypes, sparsity, where it is stored."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.ir import values
from graphopt.ir.scopes import Scope, all_graphs
from graphopt.ir.shapes import Conflict, Shapes
from graphopt.ir.shapes.dim import Dim
from graphopt.ir.sparse import CooTensor
from graphopt.report.cost import macs
from graphopt.report.facts import (
    ModelFacts,
    external_file,
    external_files,
    model_facts,
    operator_name,
    stored_tensors,
)
from graphopt.report.plain import graphopt_version, plain
from graphopt.runtime.specs import TensorSpec, dtype_name, input_specs, output_specs

Size: TypeAlias = int | str | None

KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"}
)
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class PortFacts:
    """One input or output; a dimension is a number, a symbol, or None; `shape` is None where the rank is unknown."""

    name: str
    dtype: str
    shape: tuple[Size, ...] | None
    kind: str
    overridable: bool


@dataclasses.dataclass(frozen=True)
class TensorFacts:
    """One stored tensor.

    Attributes:
        name: of its value.
        dtype: of its elements.
        shape: its dimensions.
        elements: how many.
        bytes: what they take as a dense tensor.
        zeros: how many are zero; None for strings.
        storage: `inline`, `external` or `sparse`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    bytes: int
    zeros: int | None
    storage: str

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros; None where nothing can be zero."""
        return None if self.zeros is None or not self.elements else self.zeros / self.elements


@dataclasses.dataclass(frozen=True)
class OperatorFacts:
    """All nodes of one operator.

    Attributes:
        operator: its name.
        count: how many nodes.
        macs: multiply-accumulate operations of those whose dimensions are known.
        unknown: how many others count.
        formula: of all of them in the model's symbolic dimensions; None as in `Arithmetic`.
    """

    operator: str
    count: int
    macs: int
    unknown: int
    formula: str | None


@dataclasses.dataclass(frozen=True)
class DtypeFacts:
    """All stored tensors of one dtype."""

    dtype: str
    tensors: int
    elements: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Multiply-accumulate operations of one run.

    Attributes:
        macs: of all nodes whose dimensions are known.
        formula: of all nodes, in the model's symbolic dimensions; None where that takes more than symbols.
        unknown: nodes that count but whose dimensions are not known.
        dims: the sizes of symbolic dimensions that were given.
        free: symbolic dimensions of the inputs that were not.
    """

    macs: int
    formula: str | None
    unknown: int
    dims: Mapping[str, int]
    free: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations: two a multiply-accumulate."""
        return 2 * self.macs


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that `graphopt inspect` knows of a model.

    Attributes:
        model: the facts that every report has.
        name: of the main graph.
        producer: the program that made the model, with version.
        inputs: what can be fed.
        outputs: what is returned.
        operators: most frequent first.
        arithmetic: what one run costs.
        tensors: stored tensors, largest first.
        dtypes: stored tensors by dtype, largest first.
        subgraphs: graphs within nodes.
        functions: local functions and how many nodes each has.
        custom_domains: domains of operators that ONNX does not define, and how many nodes use each.
        external: files beside the model that hold tensors, and the bytes used there.
        metadata: the model's own key-value pairs.
        contradictions: outputs that are declared otherwise than the operators make them.
    """

    model: ModelFacts
    name: str
    producer: str
    inputs: tuple[PortFacts, ...]
    outputs: tuple[PortFacts, ...]
    operators: tuple[OperatorFacts, ...]
    arithmetic: Arithmetic
    tensors: tuple[TensorFacts, ...]
    dtypes: tuple[DtypeFacts, ...]
    subgraphs: int
    functions: Mapping[str, int]
    custom_domains: Mapping[str, int]
    external: Mapping[str, int]
    metadata: Mapping[str, str]
    contradictions: tuple[Conflict, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all elements that could be zero."""
        known = [tensor for tensor in self.tensors if tensor.zeros is not None]
        elements = sum(tensor.elements for tensor in known)
        return sum(tensor.zeros or 0 for tensor in known) / elements if elements else 0.0


def inspect_model(
    model: ir.Model, path: Path | None = None, *, dims: Mapping[str, int] | None = None
) -> Inspection:
    """What is in `model`.  The dimensions of its inputs are set to `dims`, in place, before shapes are inferred.

    Args:
        model: the model; its weights are read once, to count zeros.
        path: the file that it came from.
        dims: sizes of symbolic dimensions, by name; an unnamed one is `input:axis`.

    Raises:
        OptionError: there is no such dimension.
    """
    inputs = tuple(port_facts(spec) for spec in input_specs(model))
    _bind(model, dims or {})
    shapes = Shapes(model)
    operators_found, arithmetic = _arithmetic(model, shapes, dims or {})
    tensors = sorted(
        (_tensor_facts(value, tensor, path) for value, tensor in stored_tensors(model)),
        key=lambda tensor: (-tensor.bytes, tensor.name),
    )
    return Inspection(
        model=model_facts(model, path, with_hash=False),
        name=model.graph.name or "",
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        inputs=inputs,
        outputs=tuple(port_facts(spec) for spec in output_specs(model)),
        operators=operators_found,
        arithmetic=arithmetic,
        tensors=tuple(tensors),
        dtypes=_by_dtype(tensors),
        subgraphs=sum(scope.owner is not None for scope in all_graphs(model)),
        functions={
            f"{function.domain}::{function.name}": len(function.graph)
            for function in model.functions.values()
        },
        custom_domains=_custom_domains(model),
        external=external_files(model, path),
        metadata=dict(sorted(model.metadata_props.items())),
        contradictions=shapes.conflicts,
    )


def inspection_json(found: Inspection) -> dict[str, Any]:
    """An inspection as `--json` prints it."""
    return {
        "graphopt": graphopt_version(),
        **plain(found),
        "flops": found.arithmetic.flops,
        "sparsity": found.sparsity,
    }


def port_facts(spec: TensorSpec) -> PortFacts:
    """An input or output as reports show it."""
    return PortFacts(
        spec.name, dtype_name(spec.dtype), spec.shape, spec.kind.value, spec.overridable
    )


def _bind(model: ir.Model, dims: Mapping[str, int]) -> None:
    """Sets symbolic dimensions of the inputs to numbers."""
    known = _bindable(model)
    for name in dims:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(
                f"the inputs have no symbolic dimension {name!r}.{hint} They have: {', '.join(known) or 'none'}."
            )
        for value, axis in known[name]:
            assert value.shape is not None
            sizes = list(value.shape)
            sizes[axis] = dims[name]
            value.shape = ir.Shape(sizes)


def _bindable(model: ir.Model) -> dict[str, list[tuple[ir.Value, int]]]:
    """Where each symbolic dimension of the inputs stands; unnamed ones are called `input:axis`."""
    found: defaultdict[str, list[tuple[ir.Value, int]]] = defaultdict(list)
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                found[size.value or f"{value.name}:{axis}"].append((value, axis))
    return dict(found)


def _arithmetic(
    model: ir.Model, shapes: Shapes, dims: Mapping[str, int]
) -> tuple[tuple[OperatorFacts, ...], Arithmetic]:
    """The cost of every operator and of the whole.

    Each graph within a node and each function counts once: how often it runs is not known before it does.
    """
    costs: defaultdict[str, list[Dim | None]] = defaultdict(list)
    for node in _nodes(all_graphs(model)):
        costs[operator_name(node)].append(macs(node, shapes.dims))
    by_operator = tuple(
        OperatorFacts(
            operator=name,
            count=len(found),
            macs=sum((cost.value if cost is not None else None) or 0 for cost in found),
            unknown=sum(cost is None or not cost.is_static for cost in found),
            formula=_formula(found),
        )
        for name, found in sorted(costs.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    return by_operator, Arithmetic(
        macs=sum(each.macs for each in by_operator),
        formula=_formula(cost for found in costs.values() for cost in found),
        unknown=sum(each.unknown for each in by_operator),
        dims=dict(dims),
        free=tuple(_bindable(model)),
    )


def _formula(costs: Iterable[Dim | None]) -> str | None:
    """The sum of the costs in the model's own symbols; None where one is unknown or is made of other symbols."""
    total = Dim.of(0)
    for cost in costs:
        if cost is None or not cost.is_named():
            return None
        total = total + cost
    return str(total)


def _nodes(scopes: Iterable[Scope]) -> Iterable[ir.Node]:
    return (node for scope in scopes for node in scope.graph)


def _tensor_facts(value: ir.Value, tensor: ir.TensorProtocol, path: Path | None) -> TensorFacts:
    storage = (
        "sparse"
        if isinstance(tensor, CooTensor)
        else "external"
        if external_file(tensor) not in (None, path.resolve() if path is not None else None)
        else "inline"
    )
    return TensorFacts(
        name=value.name or "",
        dtype=dtype_name(tensor.dtype),
        shape=tuple(int(size) for size in tensor.shape.numpy()),
        elements=tensor.size,
        bytes=values.size_bytes(tensor),
        zeros=count_zeros(tensor),
        storage=storage,
    )


def count_zeros(tensor: ir.TensorProtocol) -> int | None:
    """How many elements are zero, of either sign; None for strings."""
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    if isinstance(tensor, CooTensor):
        return tensor.size - int(np.count_nonzero(tensor.values.numpy()))
    flat = tensor.numpy().reshape(-1)
    chunks = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return flat.size - sum(int(np.count_nonzero(chunk)) for chunk in chunks)


def _by_dtype(tensors: Sequence[TensorFacts]) -> tuple[DtypeFacts, ...]:
    groups: defaultdict[str, list[TensorFacts]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    found = [
        DtypeFacts(name, len(group), sum(t.elements for t in group), sum(t.bytes for t in group))
        for name, group in groups.items()
    ]
    return tuple(sorted(found, key=lambda each: (-each.bytes, each.dtype)))


def _custom_domains(model: ir.Model) -> dict[str, int]:
    local = {identifier[0] for identifier in model.functions}
    used = Counter(node.domain for node in _nodes(all_graphs(model)))
    return {
        domain: count
        for domain, count in sorted(used.items())
        if domain not in KNOWN_DOMAINS and domain not in local
    }
