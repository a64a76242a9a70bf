"""Constant folding: what no feed can change is computed now, once, unless that makes the model larger."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.evaluate import evaluate
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.scopes import Census, Scope, all_nodes, captures, dependencies
from graphopt.ir.sparse import CooTensor
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, is_dead, name_of, remove
from graphopt.rewrite.relink import place_constant
from graphopt_passes.constants import TIED_BYTES, is_tied

RULE = "fold-constant"
SCRATCH_BYTES = 256 << 20
"""The largest tensor that is made on the way to a smaller one."""

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
COPIES = VIEWS | {"Cast", "CastLike", "Transpose"}
"""Operators that say the same bytes again: a second copy of a weight that stays is worth less than the node."""


@dataclasses.dataclass(frozen=True)
class FoldConstants:
    """Replaces nodes by their results where every input is constant, or where the result follows from static dims.

    Whole regions fold at once: only results that something outside reads are stored.  A result may be larger than the
    constants that become dead with it by `fold_limit_bytes`; all growing results together by that and an eighth of the
    model's constants.  What would grow more stays a node, and the search goes on with its inputs.

    Before:  s = Shape(x)  k = Mul(s, [2])  y = Reshape(x, k)      x: [2, 3]
    After:   y = Reshape(x, [4, 6])
    Changes numerics: exact.  Leaves alone: random and custom operators, QuantizeLinear, DequantizeLinear and
    DynamicQuantizeLinear, large weights that something else still needs, sequences and optionals.
    """

    name: ClassVar[str] = "fold-constants"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        region = collect(model, ctx)
        if not region.scopes and not region.given:
            return False
        return _apply(_Planner(region, ctx).plan(), region, ctx)


@dataclasses.dataclass(frozen=True)
class Region:
    """What can be computed without a feed.

    Attributes:
        scopes: the nodes to compute, in order, outer graphs first, and where each lies.
        inside: nodes within subgraphs of those, which are computed with their owner.
        given: values of other nodes whose elements shape inference knows.
        homes: where the producers of `given` lie.
        census: the graphs of the model.
    """

    scopes: dict[ir.Node, Scope]
    inside: dict[ir.Node, ir.Node]
    given: dict[ir.Value, ir.TensorProtocol]
    homes: dict[ir.Node, Scope]
    census: Census

    @functools.cached_property
    def constant_bytes(self) -> int:
        """Bytes of all constants of the model."""
        return sum(
            stored_bytes(value.const_value)
            for scope, _ in self.census.parts
            for value in scope.graph.initializers.values()
            if value.const_value is not None
        )

    def knows(self, value: ir.Value | None) -> bool:
        """Whether the value can be computed."""
        if value is None or value in self.given or value.producer() in self.scopes:
            return True
        return values.is_constant(value)


def collect(model: ir.Model, ctx: Context) -> Region:
    """Finds all nodes that can be computed without a feed, in one walk."""
    functions = frozenset(model.functions)
    census = ctx.walk(model)
    region = Region({}, {}, {}, {}, census)
    for scope, nodes in census.parts:
        for node in nodes:
            if node in region.inside or _is_constant_node(node):
                continue
            if _is_foldable(node, scope, region, functions) and not _explodes(node, ctx):
                region.scopes[node] = scope
                for graph in operators.subgraphs(node):
                    region.inside.update(dict.fromkeys(all_nodes(graph), node))
            else:
                _give(node, scope, region, ctx)
    return region


def _is_constant_node(node: ir.Node) -> bool:
    return node.op_type == "Constant" and not node.domain


def stored_bytes(tensor: ir.TensorProtocol) -> int:
    """Bytes of a constant in the file: a sparse one counts what it stores."""
    if isinstance(tensor, CooTensor):
        return stored_bytes(tensor.values) + stored_bytes(tensor.indices)
    return values.size_bytes(tensor)


def _is_foldable(
    node: ir.Node, scope: Scope, region: Region, functions: frozenset[ir.OperatorIdentifier]
) -> bool:
    for value in node.inputs:  # spelt out: asked of every node
        if not region.knows(value):
            return False
    if any(_must_stay(each) for each in _with_inner(node)):
        return False
    if not operators.is_pure(node, scope.opsets, functions):
        return False
    return all(region.knows(v) for graph in operators.subgraphs(node) for v in captures(graph))


def _must_stay(node: ir.Node) -> bool:
    """Folding a quantization would undo it; a parameter of a function has no value yet."""
    return operators.is_quantization(node) or operators.has_references(node)


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for graph in operators.subgraphs(node):
        yield from all_nodes(graph)


def _explodes(node: ir.Node, ctx: Context) -> bool:
    """Whether a node makes far more than fits, out of far less: it is not even tried."""
    made = max((known_bytes(value, ctx) or 0 for value in node.outputs), default=0)
    if made <= SCRATCH_BYTES:
        return False
    held = sum(known_bytes(value, ctx) or 0 for value in node.inputs if value is not None)
    if made > 4 * held:
        ctx.missed(RULE, node, f"would take {made >> 20} MiB, made of {held} bytes")
        return True
    return False


def known_bytes(value: ir.Value, ctx: Context) -> int | None:
    """Bytes of a tensor, or None where dims or dtype are unknown."""
    tensor = values.constant(value)
    if tensor is not None:
        return stored_bytes(tensor)
    dims, dtype = ctx.shapes.dims(value), value.dtype
    if dims is None or dtype is None or dtype == ir.DataType.STRING:
        return None
    bits = dtype.bitwidth
    for dim in dims:
        if not dim.is_static:
            return None
        bits *= int(dim)
    return (bits + 7) // 8


def _give(node: ir.Node, scope: Scope, region: Region, ctx: Context) -> None:
    """Notes outputs whose integers follow from static dims; floats are left to real arithmetic."""
    for value in node.outputs:
        data = ctx.shapes.data(value)
        exact = data is not None and (data.dtype.is_integer() or data.dtype == ir.DataType.BOOL)
        array = data.static() if data is not None and exact else None
        if array is not None and data is not None:
            region.given[value] = ir.tensor(array, dtype=data.dtype)
            region.homes[node] = scope


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """A node whose results are stored.

    Attributes:
        node: the node.
        outputs: those of its outputs that something reads.
        growth: what they add to the model in bytes, constants that die with them deducted.
    """

    node: ir.Node
    outputs: tuple[ir.Value, ...]
    growth: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one walk decided.

    Attributes:
        folds: the nodes whose results are stored, last first.
        given: values that shape inference knows, to be stored.
        kept: nodes of the region that stay nodes, and why.
    """

    folds: list[Fold] = dataclasses.field(default_factory=list)
    given: list[ir.Value] = dataclasses.field(default_factory=list)
    kept: dict[ir.Node, str] = dataclasses.field(default_factory=dict)


class _Planner:
    """Decides which results are stored: from their readers towards the constants, and again without what failed."""

    def __init__(self, region: Region, ctx: Context) -> None:
        self._region = region
        self._ctx = ctx
        self._limit = ctx.options.fold_limit_bytes
        self._small = min(TIED_BYTES, self._limit)
        self._refused: dict[ir.Node, str] = {}
        self._failed: dict[ir.Node, str] = {}
        self._sizes: dict[ir.Value, int] = {}

    def plan(self) -> Mapping[ir.Value, ir.TensorProtocol]:
        """The results to store, in order.  Nothing in the model changes."""
        while True:
            choice = self._choose()
            if self._is_too_much(choice):
                continue
            results, failures = self._compute(choice)
            if failures:
                self._drop(failures)
            elif not self._has_outgrown(choice, results):
                break
        for node, reason in {**self._failed, **choice.kept}.items():
            self._ctx.missed(RULE, node, reason)
        return results

    def _choose(self) -> Choice:
        """Walks from the last node to the first: when a node is reached, all its readers are decided."""
        wanted = self._demand()
        choice = Choice()
        for node in reversed(self._region.scopes):
            outputs = tuple(value for value in node.outputs if value in wanted)
            if not outputs:
                continue
            fold = Fold(node, outputs, self._growth(node, outputs))
            reason = self._refused.get(node) or self._refusal(fold)
            if reason:
                choice.kept[node] = reason
                wanted.update(dependencies(node))
            else:
                choice.folds.append(fold)
        choice.given.extend(value for value in self._region.given if value in wanted)
        return choice

    def _demand(self) -> set[ir.Value]:
        """The values that something outside the region reads."""
        region = self._region
        ours = [value for node in region.scopes for value in node.outputs]
        return {
            value
            for value in (*ours, *region.given)
            if value.is_graph_output()
            or any(self._home(use.node) not in region.scopes for use in value.uses())
        }

    def _home(self, node: ir.Node) -> ir.Node:
        """The node of the region that a node is computed with: itself, or the one whose subgraph holds it."""
        return self._region.inside.get(node, node)

    def _refusal(self, fold: Fold) -> str:
        """Why the outputs of a node should not be stored, or ""."""
        if not all(_is_storable(value) for value in fold.outputs):
            return "its result is no tensor, which is all that a model can store"
        if fold.growth <= self._small:
            return ""
        copies = fold.node.op_type in COPIES and not fold.node.domain
        tied = copies and any(is_tied(v) for v in fold.node.inputs[:1] if v is not None)
        if fold.growth <= self._limit and not tied:
            return ""
        return f"its result would make the model {fold.growth} bytes larger" + (
            ": the constant that it comes from has other uses" if tied else ""
        )

    def _growth(self, node: ir.Node, outputs: Sequence[ir.Value]) -> int:
        """Bytes that the results add, less those of the constants that nothing else needs."""
        size = sum(self._size(value) or 0 for value in outputs)
        if size <= self._small:
            return size
        return size - sum(_held_bytes(value) for value in self._dying(node))

    def _size(self, value: ir.Value) -> int | None:
        return self._sizes.get(value, known_bytes(value, self._ctx))

    def _dying(self, node: ir.Node) -> list[ir.Value]:
        """The constants that are needed for nothing but this node, on whatever way."""
        cone, leaves = self._cone([node])
        leaky = [
            each
            for each in cone
            if each is not node and not all(self._ends_in(value, cone) for value in each.outputs)
        ]
        needed = set(self._cone(leaky)[1])
        return [v for v in leaves if v not in needed and self._ends_in(v, cone)]

    def _cone(self, tips: Sequence[ir.Node]) -> tuple[set[ir.Node], list[ir.Value]]:
        """The nodes of the region that some need, themselves included, and the constants at their feet."""
        cone = set(tips)
        leaves: dict[ir.Value, None] = {}
        pending = list(tips)
        while pending:
            for value in dependencies(pending.pop()):
                producer = value.producer()
                if value in self._region.given:
                    continue
                if producer is not None and producer in self._region.scopes:
                    if producer not in cone:
                        cone.add(producer)
                        pending.append(producer)
                else:
                    leaves[value] = None
        return cone, list(leaves)

    def _ends_in(self, value: ir.Value, cone: set[ir.Node]) -> bool:
        """Whether only nodes of a cone read a value."""
        if value.is_graph_output():
            return False
        return all(self._home(use.node) in cone for use in value.uses())

    def _is_too_much(self, choice: Choice) -> bool:
        """Refuses results that each may grow the model, but together by too much."""
        growing = [fold for fold in choice.folds if fold.growth > self._small]
        total = sum(fold.growth for fold in growing)
        if total <= self._limit + self._region.constant_bytes // 8:
            return False
        for fold in growing:
            self._refused[fold.node] = (
                f"{len(growing)} such results would make a model with {self._region.constant_bytes} bytes of constants "
                f"{total} bytes larger"
            )
        return True

    def _compute(
        self, choice: Choice
    ) -> tuple[dict[ir.Value, ir.TensorProtocol], dict[ir.Node, str]]:
        """The chosen results, and the nodes that could not be computed."""
        results = {value: self._region.given[value] for value in choice.given}
        wanted: list[ir.Value] = []
        needed: set[ir.Node] = set()
        for fold in reversed(choice.folds):
            seen = self._as_view(fold)
            if seen is not None:
                results[fold.outputs[0]] = seen
                continue
            wanted.extend(fold.outputs)
            needed |= self._cone([fold.node])[0]
        failures: dict[ir.Node, str] = {}
        for opsets, nodes in self._by_imports(needed):
            done = evaluate(nodes, wanted, opsets, known=self._region.given)
            results.update(done.tensors)
            failures.update(done.reasons)
        for value in wanted:
            maker = value.producer()
            if value not in results and maker is not None:
                failures.setdefault(maker, "its result has no form that a model can store")
        return results, failures

    def _by_imports(self, needed: set[ir.Node]) -> list[tuple[operators.Opsets, list[ir.Node]]]:
        """The nodes in order, those of each function body on their own: their imports may differ."""
        groups: dict[int, tuple[operators.Opsets, list[ir.Node]]] = {}
        for node, scope in self._region.scopes.items():
            if node in needed:
                groups.setdefault(id(scope.opsets), (scope.opsets, []))[1].append(node)
        return list(groups.values())

    def _as_view(self, fold: Fold) -> ir.TensorProtocol | None:
        """The result of a reshape of a constant: its bytes stay where they are."""
        node, dims = fold.node, self._ctx.shapes.dims(fold.outputs[0])
        tensor = values.constant(node.inputs[0]) if node.inputs else None
        if node.domain or node.op_type not in VIEWS or tensor is None or dims is None:
            return None
        if not all(dim.is_static for dim in dims):
            return None
        return reshaped(tensor, [int(dim) for dim in dims])

    def _drop(self, failures: Mapping[ir.Node, str]) -> None:
        """Takes nodes that could not be computed, and all that need them, out of the region."""
        region = self._region
        gone: set[ir.Node] = set()
        for node in tuple(region.scopes):
            if node in failures or any(v.producer() in gone for v in dependencies(node)):
                gone.add(node)
                del region.scopes[node]
        self._failed.update(failures)

    def _has_outgrown(self, choice: Choice, results: Mapping[ir.Value, ir.TensorProtocol]) -> bool:
        """Whether a result whose size was unknown is so large that the choice must be made again."""
        late = {
            value: stored_bytes(results[value])
            for fold in choice.folds
            for value in fold.outputs
            if self._size(value) is None
        }
        self._sizes.update(late)
        return any(size > self._small for size in late.values())


def _is_storable(value: ir.Value) -> bool:
    return not isinstance(value.type, (ir.SequenceType, ir.OptionalType))


def _held_bytes(value: ir.Value) -> int:
    tensor = values.constant(value)
    return 0 if tensor is None else stored_bytes(tensor)


def reshaped(tensor: ir.TensorProtocol, dims: Sequence[int]) -> ir.TensorProtocol | None:
    """A tensor over the same bytes with other dims, or None where that takes a copy."""
    if isinstance(tensor, MappedTensor):
        mapping = tensor.mapping
        if mapping is not None:
            return MappedTensor(mapping[0], tensor.dtype, dims, offset=mapping[1])
    if (
        isinstance(tensor, CooTensor)
        or tensor.dtype == ir.DataType.STRING
        or tensor.dtype.bitwidth < 8
    ):
        return None
    array = tensor.numpy()
    return ir.tensor(array.reshape(dims), dtype=tensor.dtype) if array.flags.c_contiguous else None


def _apply(results: Mapping[ir.Value, ir.TensorProtocol], region: Region, ctx: Context) -> bool:
    """Stores the results and removes what nobody reads any more."""
    stale: list[ir.Node] = []
    users: dict[ir.Node, None] = {}
    before = len(ctx.rewrites)
    for value, tensor in results.items():
        node = value.producer()
        assert node is not None
        if node.graph is None or not ctx.permit(RULE, value):
            continue
        users.update((use.node, None) for use in value.uses())
        scope = region.scopes.get(node) or region.homes[node]
        _store(value, tensor, node, scope, ctx)
        stale.append(node)
    folded = tuple(stale)
    while stale:
        node = stale.pop()
        if node.graph is not None and is_dead(node):
            users.pop(node, None)
            stale.extend(remove(node, ctx))
    for node in folded:
        if (
            node.graph is not None
        ):  # other outputs are still read: the schema may insist on this one
            for value in node.outputs:
                value.name = (
                    ctx.names.fresh(f"{name_of(node)}_unused") if value.name is None else value.name
                )
    ctx.shapes.update([user for user in users if user.graph is not None])
    return len(ctx.rewrites) > before


def _store(
    value: ir.Value, tensor: ir.TensorProtocol, node: ir.Node, scope: Scope, ctx: Context
) -> None:
    """Puts a constant where a node's output was, under its name; a graph output needs a producer."""
    name = value.name or ctx.names.fresh(f"{node.op_type}_folded")
    is_output = value.is_graph_output()
    in_body = scope.function is not None and scope.owner is None
    value.name = None
    new = place_constant(tensor, name, node, as_node=is_output or in_body, ctx=ctx)
    new.doc_string = value.doc_string
    new.metadata_props.update(value.metadata_props)
    new.meta.update(value.meta)
    if is_output:
        new.type, new.shape = value.type, value.shape
    value.replace_all_uses_with(new, replace_graph_outputs=True)
