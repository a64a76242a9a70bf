"""What differs between two models, structurally: nothing here looks at the names of nodes or inner values."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import onnx_ir as ir

from graphopt.ir import operators
from graphopt.report.facts import ModelFacts, model_facts, operator_counts, operator_name
from graphopt.report.matching import (
    Side,
    attribute_default,
    attribute_texts,
    content_key,
    match,
    stored,
)
from graphopt.report.plain import graphopt_version, plain
from graphopt.report.regions import replacements
from graphopt.rewrite.context import name_of
from graphopt.runtime.specs import TensorSpec, dtype_name, input_specs, output_specs, spec_of
from graphopt.verify import metrics


@dataclasses.dataclass(frozen=True)
class PortChange:
    """An input or output that differs; None on the side that lacks it."""

    side: str
    name: str
    before: str | None
    after: str | None


@dataclasses.dataclass(frozen=True)
class NodeChange:
    """A node that is on both sides and differs.

    Attributes:
        kind: `attribute`, `type` (of an output) or `input` (it takes another value).
        graph: where the node is.
        operator: what it is.
        name: of the node, in the first model.
        what: the attribute, the output or the input.
        before: in the first model; None where absent.
        after: in the second model; None where absent.
    """

    kind: str
    graph: str
    operator: str
    name: str
    what: str
    before: str | None
    after: str | None


@dataclasses.dataclass(frozen=True)
class ConstantChange:
    """A constant input of a node that is on both sides.

    Attributes:
        graph: where the node is.
        operator: what it is.
        name: of the constant, in the first model.
        before: dtype and shape in the first model.
        after: dtype and shape in the second model.
        max_abs: greatest difference; None where dtypes or shapes differ or the elements are no numbers.
        sqnr_db: signal to noise ratio; None likewise, and where the signal is zero.
        changed: fraction of elements that differ; None as for max_abs.
    """

    graph: str
    operator: str
    name: str
    before: str
    after: str
    max_abs: float | None = None
    sqnr_db: float | None = None
    changed: float | None = None


@dataclasses.dataclass(frozen=True)
class Replacement:
    """Neighbouring nodes that only the first model has, and what only the second has in their place.

    Attributes:
        graph: where.
        at: a value that they compute, in the first model, or in the second where nothing was removed.
        removed: operators, in order.
        added: operators, in order.
        stands: a value that the second computes there; "" where nothing was added.
    """

    graph: str
    at: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    stands: str = ""


@dataclasses.dataclass(frozen=True)
class ModelDiff:
    """What differs between two models.

    Attributes:
        before: facts of the first model.
        after: facts of the second model.
        ports: inputs and outputs.
        opsets: version of each domain where they differ; None where it is not imported.
        operators: nodes of each operator where the numbers differ; constants do not count as nodes.
        functions: local functions that only one model has: -1 the first, 1 the second.
        matched: nodes that are in both.
        replacements: nodes that are not.
        nodes: what differs in those that are.
        constants: what differs in the constants that those take.
    """

    before: ModelFacts
    after: ModelFacts
    ports: tuple[PortChange, ...]
    opsets: Mapping[str, tuple[int | None, int | None]]
    operators: Mapping[str, tuple[int, int]]
    functions: Mapping[str, int]
    matched: int
    replacements: tuple[Replacement, ...]
    nodes: tuple[NodeChange, ...]
    constants: tuple[ConstantChange, ...]

    @property
    def equal(self) -> bool:
        """Whether the two are the same model, names of inner values and storage of constants aside."""
        found = (self.ports, self.opsets, self.operators, self.functions)
        return not (any(found) or self.replacements or self.nodes or self.constants)


def diff_models(a: ir.Model, b: ir.Model) -> ModelDiff:
    """What changed from `a` to `b`."""
    parts = [_diff_graphs("main", *_mains(a, b))]
    for key in sorted(set(a.functions) & set(b.functions)):
        one, other = a.functions[key], b.functions[key]
        sides = (
            Side(one.graph, one.opset_imports, dict(zip(one.inputs, _positions(), strict=False))),
            Side(
                other.graph,
                other.opset_imports,
                dict(zip(other.inputs, _positions(), strict=False)),
            ),
        )
        parts.append(_diff_graphs(f"function {key[0]}::{key[1]}", *sides))
    return ModelDiff(
        before=model_facts(a),
        after=model_facts(b),
        ports=(
            *_ports("input", input_specs(a), input_specs(b)),
            *_ports("output", output_specs(a), output_specs(b)),
        ),
        opsets=_changed(a.opset_imports, b.opset_imports),
        operators=_changed_counts(a, b),
        functions={
            f"{key[0]}::{key[1]}": 1 if key in b.functions else -1
            for key in sorted(set(a.functions) ^ set(b.functions))
        },
        matched=sum(part.matched for part in parts),
        replacements=tuple(each for part in parts for each in part.replacements),
        nodes=tuple(each for part in parts for each in part.nodes),
        constants=tuple(each for part in parts for each in part.constants),
    )


def diff_json(found: ModelDiff) -> dict[str, Any]:
    """A difference as `--json` prints it."""
    return {"graphopt": graphopt_version(), "equal": found.equal, **plain(found)}


@dataclasses.dataclass
class _GraphDiff:
    """What differs between two graphs and those within them."""

    matched: int = 0
    replacements: list[Replacement] = dataclasses.field(default_factory=list)
    nodes: list[NodeChange] = dataclasses.field(default_factory=list)
    constants: list[ConstantChange] = dataclasses.field(default_factory=list)

    def extend(self, other: _GraphDiff) -> None:
        self.matched += other.matched
        self.replacements += other.replacements
        self.nodes += other.nodes
        self.constants += other.constants


def _positions() -> Iterator[Hashable]:
    index = 0
    while True:
        yield "input", index
        index += 1


def _mains(a: ir.Model, b: ir.Model) -> tuple[Side, Side]:
    """The main graphs; an input that only one model has is paired by position with one of the other's."""
    names_a, names_b = ([v.name for v in model.graph.inputs] for model in (a, b))

    def fed(graph: ir.Graph) -> list[ir.Value]:
        return [value for value in graph.inputs if stored(value) is None]

    def labels(graph: ir.Graph, others: list[str | None]) -> dict[ir.Value, Hashable]:
        position = _positions()
        return {v: ("input", v.name) if v.name in others else next(position) for v in fed(graph)}

    return (
        Side(a.graph, a.opset_imports, labels(a.graph, names_b)),
        Side(b.graph, b.opset_imports, labels(b.graph, names_a)),
    )


def _diff_graphs(path: str, a: Side, b: Side) -> _GraphDiff:
    pairs = match(a, b)
    found = _GraphDiff(matched=len(pairs))
    both = _corresponding(a, b, pairs)
    for one, other in pairs.items():
        found.nodes += _attribute_changes(path, one, a, other, b)
        found.nodes += _type_changes(path, one, other)
        found.nodes += _input_changes(path, one, other, both)
        found.constants += _constant_changes(path, one, other, both)
        for inner_a, inner_b in zip(
            operators.subgraphs(one), operators.subgraphs(other), strict=False
        ):
            found.extend(
                _diff_graphs(
                    f"{path}/{operators.describe(one)}",
                    _inner(inner_a, a, both.same),
                    _inner(inner_b, b, {value: value for value in both.same.values()}),
                )
            )
    found.nodes += _output_changes(path, a, b, both)
    found.replacements += [
        Replacement(
            path,
            name_of((region.removed or region.added)[-1]),
            tuple(operator_name(node) for node in region.removed),
            tuple(operator_name(node) for node in region.added),
            name_of(region.added[-1]) if region.added else "",
        )
        for region in replacements(a, b, pairs)
    ]
    return found


@dataclasses.dataclass(frozen=True)
class _Both:
    """What corresponds: values of the first graph to values of the second; nodes of the second that have a partner."""

    same: Mapping[ir.Value, ir.Value]
    paired: frozenset[ir.Node]

    def agree(self, left: ir.Value | None, right: ir.Value | None) -> bool:
        """Whether two values correspond, or differ only because of nodes that are new or gone."""
        if left is None or right is None:
            return left is right
        if stored(left) is not None:
            return stored(right) is not None or self._is_new(right)
        if left in self.same:
            return self.same[left] is right or self._is_new(right)
        return left.producer() is not None or self._is_new(right)

    def _is_new(self, value: ir.Value) -> bool:
        node = value.producer()
        return node is not None and node not in self.paired


def _corresponding(a: Side, b: Side, pairs: Mapping[ir.Node, ir.Node]) -> _Both:
    """What corresponds: inputs, captures, outputs of paired nodes."""
    by_label = {label: value for value, label in b.labels.items()}
    same = {value: by_label[label] for value, label in a.labels.items() if label in by_label}
    for one, other in pairs.items():
        same.update(zip(one.outputs, other.outputs, strict=False))
    return _Both(same, frozenset(pairs.values()))


def _inner(graph: ir.Graph, outer: Side, names: Mapping[ir.Value, ir.Value]) -> Side:
    """A graph within a node: captured values are labelled by the value of the second model that they correspond to."""
    labels: dict[ir.Value, Hashable] = {value: id(named) for value, named in names.items()}
    labels |= {value: ("body input", index) for index, value in enumerate(graph.inputs)}
    return Side(graph, outer.opsets, labels)


def _attribute_changes(
    path: str, one: ir.Node, a: Side, other: ir.Node, b: Side
) -> Iterator[NodeChange]:
    before, after = attribute_texts(one, a.opsets), attribute_texts(other, b.opsets)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            was = before.get(name) or _by_default(one, a, name)
            now = after.get(name) or _by_default(other, b, name)
            yield _node_change("attribute", path, one, name, was, now)


def _by_default(node: ir.Node, side: Side, name: str) -> str | None:
    """What an attribute that is not there stands for, in words; None where the operator has no default."""
    text = attribute_default(node, side.opsets, name)
    return None if text is None else f"{text} (default)"


def _type_changes(path: str, one: ir.Node, other: ir.Node) -> Iterator[NodeChange]:
    """Differences in what both models state; a type that only one of them states is no difference."""
    for left, right in zip(one.outputs, other.outputs, strict=False):
        if left.dtype is not None and right.dtype is not None and left.dtype != right.dtype:
            before, after = dtype_name(left.dtype), dtype_name(right.dtype)
            yield _node_change("type", path, one, left.name or "output", before, after)
        elif left.shape is not None and right.shape is not None and left.shape != right.shape:
            yield _node_change(
                "type", path, one, left.name or "output", str(spec_of(left)), str(spec_of(right))
            )


def _input_changes(path: str, one: ir.Node, other: ir.Node, both: _Both) -> Iterator[NodeChange]:
    """Inputs that come from somewhere else, unless what they came from or come from is itself new or gone."""
    for index, (left, right) in enumerate(_aligned(one, other, both)):
        if not both.agree(left, right):
            yield _node_change("input", path, one, f"input {index}", _origin(left), _origin(right))


def _aligned(
    one: ir.Node, other: ir.Node, both: _Both
) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """The inputs of two nodes side by side; exchanged where that is how they correspond and their order is free."""
    given = list(zip_longest(one.inputs, other.inputs))
    exchanged = list(zip(one.inputs, reversed(other.inputs), strict=False))
    is_free = operators.is_commutative(one) and len(one.inputs) == len(other.inputs)
    if is_free and not _agree_all(given, both) and _agree_all(exchanged, both):
        return exchanged
    return given


def _agree_all(aligned: Iterable[tuple[ir.Value | None, ir.Value | None]], both: _Both) -> bool:
    return all(both.agree(left, right) for left, right in aligned)


def _output_changes(path: str, a: Side, b: Side, both: _Both) -> Iterator[NodeChange]:
    """Outputs of the graph that come from somewhere else."""
    for index, (left, right) in enumerate(zip(a.graph.outputs, b.graph.outputs, strict=False)):
        if not both.agree(left, right):
            what = f"output {index}"
            yield NodeChange("input", path, "graph", "", what, _origin(left), _origin(right))


def _constant_changes(
    path: str, one: ir.Node, other: ir.Node, both: _Both
) -> Iterator[ConstantChange]:
    for left, right in _aligned(one, other, both):
        before, after = stored(left), stored(right)
        if before is None or after is None or before is after:
            continue
        if content_key(before) != content_key(after):
            name = (left.name if left is not None else None) or ""
            yield _constant_change(path, one, name, before, after)


def _constant_change(
    path: str, node: ir.Node, name: str, before: ir.TensorProtocol, after: ir.TensorProtocol
) -> ConstantChange:
    change = ConstantChange(
        path, operator_name(node), name, _tensor_text(before), _tensor_text(after)
    )
    numeric = before.dtype not in (
        ir.DataType.STRING,
        ir.DataType.COMPLEX64,
        ir.DataType.COMPLEX128,
    )
    if change.before != change.after or not numeric or not before.size:
        return change
    left, right = before.numpy(), after.numpy()
    seen = metrics.measure(left, right, tolerance=0.0, floor=0.0)
    return dataclasses.replace(
        change,
        max_abs=seen.max_abs,
        sqnr_db=seen.sqnr_db if abs(seen.sqnr_db) != float("inf") else None,
        changed=float((left != right).mean()),
    )


def _tensor_text(tensor: ir.TensorProtocol) -> str:
    return f"{dtype_name(tensor.dtype)}[{','.join(map(str, tensor.shape.numpy()))}]"


def _node_change(
    kind: str, path: str, node: ir.Node, what: str, before: str | None, after: str | None
) -> NodeChange:
    return NodeChange(kind, path, operator_name(node), name_of(node), what, before, after)


def _origin(value: ir.Value | None) -> str | None:
    """Where a value comes from, in words."""
    if value is None:
        return None
    if stored(value) is not None:
        return f"constant {value.name!r}"
    node = value.producer()
    return f"{value.name!r}" if node is None else f"{value.name!r} of {operator_name(node)}"


def _ports(
    side: str, before: Iterable[TensorSpec], after: Iterable[TensorSpec]
) -> Iterator[PortChange]:
    """Inputs or outputs by name, and their order."""
    old, new = ({spec.name: spec for spec in specs} for specs in (before, after))
    for name in [*old, *(name for name in new if name not in old)]:
        left, right = (_port_text(specs.get(name)) for specs in (old, new))
        if left != right:
            yield PortChange(side, name, left, right)
    if set(old) == set(new) and list(old) != list(new):
        yield PortChange(side, "order", ", ".join(old), ", ".join(new))


def _port_text(spec: TensorSpec | None) -> str | None:
    return None if spec is None else f"{spec}{' (has a default)' if spec.overridable else ''}"


def _changed(
    before: Mapping[str, int], after: Mapping[str, int]
) -> dict[str, tuple[int | None, int | None]]:
    keys = sorted({*before, *after})
    return {
        key or "ai.onnx": (before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
    }


def _changed_counts(a: ir.Model, b: ir.Model) -> dict[str, tuple[int, int]]:
    before, after = Counter(operator_counts(a)), Counter(operator_counts(b))
    return {
        name: (before[name], after[name])
        for name in sorted({*before, *after}, key=lambda n: (after[n] - before[n], n))
        if before[name] != after[name] and name != "Constant"
    }


def grouped(found: Iterable[Replacement]) -> list[tuple[Replacement, int]]:
    """Replacements of the same operators by the same operators, with how many there are; most nodes first."""
    groups: defaultdict[Hashable, list[Replacement]] = defaultdict(list)
    for each in found:
        key = (tuple(sorted(each.removed)), tuple(sorted(each.added)))
        groups[key].append(each)
    counted = [(members[0], len(members)) for members in groups.values()]
    return sorted(counted, key=lambda item: -item[1] * (len(item[0].removed) + len(item[0].added)))
