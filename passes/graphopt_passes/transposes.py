"""Transposes that cancel across the operators between them, where that leaves fewer of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import Scope
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, is_dead, name_of, remove
from graphopt.rewrite.commit import take_over
from graphopt.rewrite.relink import mark, place_constant
from graphopt_passes.constants import is_tied
from graphopt_passes.spatial import SPATIAL, can_permute, permute

RULE = "cancel-transposes"
Perm: TypeAlias = tuple[int, ...]

_REDUCTIONS = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"}
    | {"ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"}
)
_ROUNDED = (_REDUCTIONS - {"ReduceMax", "ReduceMin"}) | {"Softmax", "LogSoftmax", "MatMul"}
_ALONG_AXIS = frozenset({"Concat", "Split", "Softmax", "LogSoftmax", "Hardmax"})
_AXES_INPUT = {"ReduceSum": 13}
PLAIN = _ALONG_AXIS | _REDUCTIONS
ALL = PLAIN | SPATIAL | {"MatMul"}
"""What is no elementwise operator and may move."""
_REGION_LIMIT = 512  # nodes: what is larger is a network between its input and its output layout


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes that may run on transposed tensors, and what changes at their edges.

    Attributes:
        nodes: the nodes.
        perm: every tensor in the region is `Transpose(t, perm)` of the tensor that it becomes.
        sources: the Transposes that feed it by that permutation.
        removed: Transposes that go.
        added: Transposes that come.
    """

    nodes: tuple[ir.Node, ...]
    perm: Perm
    sources: frozenset[ir.Node]
    removed: int
    added: int


@dataclasses.dataclass(frozen=True)
class CancelTransposes:
    """Moves Transposes through what does not mind the order of axes, or can be told another, where fewer are left.

    That is elementwise operators, Concat, Split, Slice, Pad, Resize, Softmax, reductions, and products with a matrix
    whose last axis stays the last.

    Before:  y = Transpose(Relu(Add(Transpose(a, p), Transpose(b, p))), inverse p)
    After:   y = Relu(Add(a, b))
    Changes numerics: exact; reordered where a reduction, Softmax or product moves.  Leaves alone: regions in which as
    many Transposes would be left, operators that know their axes otherwise (Conv, Reshape), large shared constants.
    """

    name: ClassVar[str] = "cancel-transposes"
    numerics: ClassVar[Numerics] = Numerics.REORDERED

    through_slices: bool = True
    """Also through Slice, Pad, Resize and products: not before rotations and heads are recognised by their Slices."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for scope, nodes in ctx.walk(model).parts:
            now = scope.graph if changed else nodes
            for node in [n for n in now if _permutation(n) is not None]:
                if node.graph is None:
                    continue
                region = best_region(node, scope, ctx, wide=self.through_slices)
                if region is None:
                    continue
                rounded = any(n.op_type in _ROUNDED for n in region.nodes)
                numerics = Numerics.REORDERED if rounded else Numerics.EXACT
                if ctx.permit(RULE, node, numerics):
                    _Mover(region, scope, ctx).apply()
                    changed = True
        return changed


def _permutation(node: ir.Node | None) -> Perm | None:
    """The permutation of a Transpose that says one; None for any other node."""
    if node is None or node.op_type != "Transpose" or node.domain or node.graph is None:
        return None
    held = node.attributes.get("perm")
    if held is None or held.is_ref() or held.type != ir.AttributeType.INTS:
        return None
    perm = tuple(held.as_ints())
    return perm if sorted(perm) == list(range(len(perm))) else None


def _inverse(perm: Perm) -> Perm:
    return tuple(perm.index(axis) for axis in range(len(perm)))


def best_region(source: ir.Node, scope: Scope, ctx: Context, *, wide: bool) -> Region | None:
    """The region behind a Transpose in which the fewest Transposes are left, if they are fewer than now."""
    perm = _permutation(source)
    if perm is None or any(v.is_graph_output() for v in source.outputs):
        return None
    kinds = ALL if wide else PLAIN
    found = [_grow(source, perm, scope, ctx, kinds, strict=strict) for strict in (True, False)]
    gaining = [r for r in found if r is not None and r.removed > r.added]
    return max(gaining, key=lambda r: r.removed - r.added, default=None)


def _grow(
    source: ir.Node,
    perm: Perm,
    scope: Scope,
    ctx: Context,
    kinds: frozenset[str],
    *,
    strict: bool,
) -> Region | None:
    """Everything movable behind `source`; with `strict`, only what is fed by such Transposes alone."""
    inside: dict[ir.Node, None] = {}
    waiting = [use.node for use in source.outputs[0].uses()]
    while waiting and len(inside) <= _REGION_LIMIT:
        node = waiting.pop(0)
        if node in inside or not _is_movable(node, perm, scope, ctx, kinds):
            continue
        if strict and not all(_is_free(v, perm, inside) for v in node.inputs if v is not None):
            continue
        inside[node] = None
        waiting.extend(use.node for value in node.outputs for use in value.uses())
        if not strict:
            makers = (v.producer() for v in node.inputs if v is not None)
            waiting.extend(m for m in makers if m is not None and _permutation(m) is None)
    if not inside or len(inside) > _REGION_LIMIT:
        return None
    return _weigh(tuple(inside), perm)


def _is_free(value: ir.Value, perm: Perm, inside: Mapping[ir.Node, None]) -> bool:
    """Whether a value needs no Transpose of its own at the edge of a region."""
    node = value.producer()
    return values.constant(value) is not None or _permutation(node) == perm or node in inside


def _is_movable(
    node: ir.Node, perm: Perm, scope: Scope, ctx: Context, kinds: frozenset[str]
) -> bool:
    """Whether a node may run on tensors whose axes are permuted, its attributes permuted alike."""
    if node.graph is not scope.graph or node.domain or operators.has_references(node):
        return False
    rank = len(perm)
    dims = [ctx.shapes.dims(value) for value in node.outputs]
    if any(d is None or len(d) != rank for d in dims):
        return False
    if _is_plain_elementwise(node):
        return all(_fits(v, rank, ctx) for v in node.inputs if v is not None)
    if node.op_type not in kinds:
        return False
    opset = scope.opsets.get("", 0)
    first = ctx.shapes.dims(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if first is None or len(first) != rank:
        return False
    if node.op_type in _ALONG_AXIS:
        flattens = opset < 13 and node.op_type in ("Softmax", "LogSoftmax", "Hardmax")
        return not flattens and all(
            _fits(v, rank, ctx) for v in node.inputs[: None if node.op_type == "Concat" else 1] if v
        )
    if node.op_type in SPATIAL:
        return can_permute(node, rank, opset)
    if node.op_type == "MatMul":
        return _is_by_matrix(node, perm, ctx)
    return _reduced_axes(node, opset) is not None


def _is_by_matrix(node: ir.Node, perm: Perm, ctx: Context) -> bool:
    """Whether a MatMul takes the last axis, which stays the last, to another by one constant matrix."""
    weight = node.inputs[1]
    dims = None if weight is None else ctx.shapes.dims(weight)
    constant = values.constant(weight) is not None
    return perm[-1] == len(perm) - 1 and constant and dims is not None and len(dims) == 2


def _is_plain_elementwise(node: ir.Node) -> bool:
    return operators.is_elementwise(node) and node.op_type not in ("CastLike", "PRelu")


def _fits(value: ir.Value, rank: int, ctx: Context) -> bool:
    """Whether an operand can be permuted: of the full rank, one number, or a constant that may be rewritten."""
    dims = ctx.shapes.dims(value)
    if dims is None:
        return False
    if len(dims) == rank or all(d == 1 for d in dims):
        return len(dims) <= rank and not is_tied(value)
    return len(dims) < rank and values.constant(value) is not None and not is_tied(value)


def _reduced_axes(node: ir.Node, opset: int) -> tuple[int, ...] | None:
    """The constant axes of a reduction that keeps them; None where it has none, or drops them."""
    keep = node.attributes.get("keepdims")
    if keep is not None and not keep.as_int():
        return None
    if opset < _AXES_INPUT.get(node.op_type, 18):
        held = node.attributes.get("axes")
        return None if held is None else tuple(held.as_ints())
    array = values.array(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if array is None or array.size == 0 else tuple(int(e) for e in array.reshape(-1))


def _data_inputs(node: ir.Node) -> tuple[int, ...]:
    """Which inputs are tensors of the region: not axes, split sizes, or the bounds of a Clip."""
    first_only = _REDUCTIONS | SPATIAL | {"Split", "Clip", "MatMul"}
    single = node.op_type in first_only or operators.is_elementwise_unary(node)
    return (0,) if single else tuple(range(len(node.inputs)))


def _weigh(nodes: tuple[ir.Node, ...], perm: Perm) -> Region | None:
    """The region with its Transposes counted."""
    inside = set(nodes)
    sources: set[ir.Node] = set()
    inputs: dict[ir.Value, None] = {}
    for node in nodes:
        for index in _data_inputs(node):
            value = node.inputs[index]
            if value is None or value.producer() in inside or values.constant(value) is not None:
                continue
            maker = value.producer()
            if maker is not None and _permutation(maker) == perm and not _reads(maker, inside):
                sources.add(maker)
            else:
                inputs[value] = None
    gone = sum(
        all(use.node in inside for use in s.outputs[0].uses())
        and not s.outputs[0].is_graph_output()
        for s in sources
    )
    added = sum(not _is_one(value) for value in inputs)
    for value in (v for node in nodes for v in node.outputs):
        cancelled = _cancelled(value, inside, perm)
        gone += len(cancelled)
        left = [n for n in _outside(value, inside) if n not in cancelled]
        # another Transpose behind the restored one becomes one with it
        added += value.is_graph_output() or any(_permutation(n) is None for n in left)
    return Region(nodes, perm, frozenset(sources), gone, added) if sources else None


def _outside(value: ir.Value, inside: Container[ir.Node]) -> list[ir.Node]:
    """The nodes outside a region that read a value of it, once each."""
    return list(dict.fromkeys(use.node for use in value.uses() if use.node not in inside))


def _cancelled(value: ir.Value, inside: Container[ir.Node], perm: Perm) -> list[ir.Node]:
    """The Transposes that undo the region's: their outputs become `value`, at most one of them a graph output."""
    found: list[ir.Node] = []
    has_output = value.is_graph_output()
    for node in _outside(value, inside):
        if _permutation(node) != _inverse(perm):
            continue
        is_output = node.outputs[0].is_graph_output()
        if not (is_output and has_output):
            found.append(node)
            has_output = has_output or is_output
    return found


def _reads(transpose: ir.Node, inside: set[ir.Node]) -> bool:
    """Whether a Transpose reads a tensor of the region, whose layout changes."""
    source = transpose.inputs[0]
    return source is not None and source.producer() in inside


def _is_one(value: ir.Value) -> bool:
    """Whether a value is declared a scalar, which needs no Transpose."""
    return value.shape is not None and len(value.shape) == 0


class _Mover:
    """Carries a region over to its new layout."""

    def __init__(self, region: Region, scope: Scope, ctx: Context) -> None:
        self._region = region
        self._ctx = ctx
        self._opset = scope.opsets.get("", 0)
        self._as_nodes = scope.function is not None and scope.owner is None
        self._inside = set(region.nodes)
        self._fed: dict[ir.Value, ir.Value] = {}

    def apply(self) -> None:
        """Rewires inputs, permutes attributes, and puts a Transpose where the old layout is still read."""
        leaving = [
            (v, v.shape)
            for node in self._region.nodes
            for v in node.outputs
            if self._is_read_outside(v)
        ]
        for node in self._region.nodes:
            for index in _data_inputs(node):
                value = node.inputs[index]
                if value is not None and value.producer() not in self._inside:
                    node.replace_input_with(index, self._feed(value, node))
            self._permute_axes(node)
            for value in node.outputs:
                value.shape = None
        touched = [node for value, shape in leaving for node in self._leave(value, shape)]
        self._ctx.shapes.update([*self._region.nodes, *touched])
        for source in self._region.sources:
            if source.graph is not None and is_dead(source):
                remove(source, self._ctx)

    def _is_read_outside(self, value: ir.Value) -> bool:
        return value.is_graph_output() or any(u.node not in self._inside for u in value.uses())

    def _feed(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """An operand in the new layout."""
        if value not in self._fed:
            self._fed[value] = self._moved(value, user)
        return self._fed[value]

    def _moved(self, value: ir.Value, user: ir.Node) -> ir.Value:
        maker = value.producer()
        if maker is not None and maker in self._region.sources:
            source = maker.inputs[0]
            assert source is not None
            return source
        dims = self._ctx.shapes.dims(value)
        rank = len(self._region.perm)
        if dims is not None and len(dims) < rank and all(d == 1 for d in dims):
            return value
        back = _inverse(self._region.perm)
        array = values.array(value)
        if array is not None:
            full = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(back)
            name = self._ctx.names.fresh(f"{value.name}_transposed")
            return place_constant(
                np.ascontiguousarray(full), name, user, as_node=self._as_nodes, ctx=self._ctx
            )
        node = self._transpose(value, back, name_of(user))
        assert user.graph is not None
        user.graph.insert_before(user, node)
        self._ctx.shapes.update([node])
        return node.outputs[0]

    def _transpose(self, value: ir.Value, perm: Sequence[int], origin: str) -> ir.Node:
        node = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", tuple(perm))])
        node.name = self._ctx.names.fresh(f"{origin}_Transpose")
        node.outputs[0].name = self._ctx.names.fresh(f"{origin}_transposed")
        mark(node, RULE, origin, self._ctx)
        return node

    def _permute_axes(self, node: ir.Node) -> None:
        """Axes of the old layout as axes of the new one."""
        perm = self._region.perm
        if node.op_type in _ALONG_AXIS:
            held = node.attributes.get("axis")
            default = 0 if node.op_type == "Split" else -1
            axis = default if held is None else held.as_int()
            node.attributes["axis"] = ir.AttrInt64("axis", perm[axis])
        elif node.op_type in SPATIAL:
            permute(node, perm, lambda data: self._constant(data, node))
        elif node.op_type in _REDUCTIONS:
            axes = [perm[axis] for axis in _reduced_axes(node, self._opset) or ()]
            if self._opset < _AXES_INPUT.get(node.op_type, 18):
                node.attributes["axes"] = ir.AttrInt64s("axes", sorted(axes))
                return
            node.replace_input_with(1, self._constant(np.asarray(sorted(axes), np.int64), node))

    def _constant(self, data: npt.NDArray[Any], user: ir.Node) -> ir.Value:
        """A constant that says in the new layout what an operand of `user` said in the old one."""
        name = self._ctx.names.fresh(f"{name_of(user)}_axes")
        return place_constant(data, name, user, as_node=self._as_nodes, ctx=self._ctx)

    def _leave(self, value: ir.Value, shape: ir.Shape | None) -> list[ir.Node]:
        """Serves those outside who read a value in the old layout; returns the nodes to look at again."""
        touched: list[ir.Node] = []
        restores = value.is_graph_output()
        cancelled = _cancelled(value, self._inside, self._region.perm)
        readers = {n for n in _outside(value, self._inside) if n not in cancelled}
        for node in cancelled:
            touched.extend(use.node for use in node.outputs[0].uses())
            take_over(node.outputs[0], value, fresh=False)
            remove(node, self._ctx)
        if readers or restores:
            uses = [(use.node, use.idx) for use in value.uses() if use.node in readers]
            touched.append(self._restore(value, shape, uses))
        return touched

    def _restore(
        self, value: ir.Value, shape: ir.Shape | None, uses: Sequence[tuple[ir.Node, int]]
    ) -> ir.Node:
        """A Transpose behind a value of the region, which gives the old layout."""
        producer = value.producer()
        assert producer is not None
        assert producer.graph is not None
        node = self._transpose(value, self._region.perm, name_of(value))
        restored = node.outputs[0]
        restored.type, restored.shape = value.type, shape
        for user, index in uses:
            user.replace_input_with(index, restored)
        producer.graph.insert_after(producer, node)
        outputs = producer.graph.outputs
        for index, output in enumerate(outputs):
            if output is value:
                outputs[index] = restored
                _swap_names(value, restored, self._ctx)
        return node


def _swap_names(value: ir.Value, restored: ir.Value, ctx: Context) -> None:
    """Gives a graph output's name to the value that takes its place."""
    name, value.name = value.name, ctx.names.fresh(f"{value.name}_moved")
    restored.name = name
