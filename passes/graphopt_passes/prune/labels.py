"""Which indices of which axes of which weights belong together: labels, propagated through the graph.

Every index of every axis gets a label; operators say which labels are the same channel.  What results is a partition:
a class of slices of weights that can only be removed together, whatever residual sums, depthwise convolutions, heads
or flattened images lie between them.  No patterns: an operator that is not known freezes what it touches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import captures
from graphopt.ir.shapes import Shapes
from graphopt_passes.prune.book import Axes, Book, Ids
from graphopt_passes.prune.factors import Unknown, axis_runs
from graphopt_passes.prune.parts import expanded, grouped, sliced, split

_PASS = frozenset(
    {
        *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Sigmoid", "HardSigmoid"),
        *("HardSwish", "Swish", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal"),
        *("Softplus", "Softsign", "Gelu", "FastGelu", "QuickGelu", "Mish", "Clip", "Cast"),
        *("Identity", "Dropout", "Floor", "Ceil", "Round", "Sin", "Cos", "Sign"),
    }
)
_BROADCAST = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "PRelu", "Sum", "Mean"}
)
_POOLS = frozenset(
    {
        *("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"),
        "InstanceNormalization",
    }
)
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_SOFTMAX_OF_ONE_AXIS = 13
_MICROSOFT = frozenset({"Gelu", "FastGelu", "QuickGelu"})


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """The result of propagation.

    Attributes:
        axes: labels of each value of the main graph.
        roots: the class of each label.
        frozen: classes that cannot be removed.
    """

    axes: Mapping[ir.Value, Axes]
    roots: Ids
    frozen: frozenset[int]

    def classes(self, value: ir.Value, axis: int) -> Ids | None:
        """The class of each index along an axis."""
        known = self.axes.get(value)
        ids = None if known is None else known[axis]
        return None if ids is None else self.roots[ids]


def propagate(model: ir.Model, shapes: Shapes) -> Labels:
    """The partition of all indices of the main graph, which is sorted."""
    return _Propagation(shapes, model.opset_imports.get("", 1)).over(model.graph)


class _Propagation:
    """What each operator says of the labels of its inputs and outputs, node by node."""

    def __init__(self, shapes: Shapes, opset: int) -> None:
        self.book = Book(shapes)
        self._opset = opset

    def over(self, graph: ir.Graph) -> Labels:
        for value in graph.inputs:
            self.book.freeze(self.book.fresh(value))
        for node in graph:
            self._visit(node)
        for value in graph.outputs:
            self.book.freeze(self.book.of(value))
        roots = self.book.roots()
        frozen = frozenset(int(roots[label]) for ids in self.book.frozen for label in ids)
        return Labels(self.book.axes, roots, frozen)

    def _visit(self, node: ir.Node) -> None:
        known = not node.domain or (node.domain == "com.microsoft" and node.op_type in _MICROSOFT)
        rule = self._rule(node.op_type) if known and not operators.has_subgraph(node) else None
        made = None if rule is None else _attempt(rule, node)
        if made is None:
            self._freeze_around(node)
            return
        for output, axes in zip(node.outputs, made, strict=False):
            self.book.axes[output] = axes
        for output in node.outputs[len(made) :]:
            self.book.freeze(self.book.fresh(output))

    def _rule(self, op_type: str) -> Callable[[ir.Node], Sequence[Axes]] | None:
        if op_type in _PASS:
            return lambda node: [self.book.input(node, 0)]
        if op_type in _BROADCAST:
            return self._broadcast
        if op_type in _POOLS:
            return self._channelwise
        if op_type in _VIEWS:
            return self._view
        if op_type.startswith("Reduce"):
            return self._reduce
        special: dict[str, Callable[[ir.Node], Sequence[Axes]]] = {
            "Conv": self._conv,
            "ConvTranspose": self._conv_transpose,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "BatchNormalization": self._channelwise,
            "LayerNormalization": self._normalized,
            "RMSNormalization": self._normalized,
            "SimplifiedLayerNormalization": self._normalized,
            "Softmax": self._softmax,
            "LogSoftmax": self._softmax,
            "Concat": self._concat,
            "Transpose": self._transpose,
            "Pad": self._same_extent,
            "Resize": self._resize,
            "Gather": self._gather,
            "Attention": self._attention,
            "Split": lambda node: split(self.book, node),
            "Slice": lambda node: sliced(self.book, node),
            "Expand": lambda node: expanded(self.book, node),
        }
        return special.get(op_type)

    def _freeze_around(self, node: ir.Node) -> None:
        read = [v for v in node.inputs if v is not None]
        for graph in operators.subgraphs(node):
            read.extend(captures(graph))
        for value in read:
            self.book.freeze(self.book.of(value))
        for output in node.outputs:
            self.book.freeze(self.book.fresh(output))

    # -- operators ---------------------------------------------------------------------------------------------------

    def _conv(self, node: ir.Node) -> Sequence[Axes]:
        x, w = self.book.input(node, 0), self.book.input(node, 1)
        rows, per_group = self.book.dims(_value(node, 1))[:2]
        group = operators.attribute(node, "group", 1)
        if group == 1:
            self.book.unify(x[1], w[1])
        elif per_group == 1 and x[1] is not None and rows is not None:
            self.book.unify(np.repeat(x[1], rows // group), w[0])
        else:
            grouped(self.book, x[1], w, group)
        return self._convolved(node, x, w, w[0])

    def _conv_transpose(self, node: ir.Node) -> Sequence[Axes]:
        x, w = self.book.input(node, 0), self.book.input(node, 1)
        if operators.attribute(node, "group", 1) != 1:
            raise Unknown
        self.book.unify(x[1], w[0])
        return self._convolved(node, x, w, w[1])

    def _convolved(self, node: ir.Node, x: Axes, w: Axes, made: Ids | None) -> Sequence[Axes]:
        self.book.freeze([x[0], *x[2:], *w[2:]])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self.book.unify(made, self.book.input(node, 2)[0])
        out = self.book.fresh(node.outputs[0])
        self.book.freeze([out[0], *out[2:]])
        return [[out[0], made, *out[2:]]]

    def _gemm(self, node: ir.Node) -> Sequence[Axes]:
        a, b = self.book.input(node, 0), self.book.input(node, 1)
        if operators.attribute(node, "transA", 0):
            a = a[::-1]
        if operators.attribute(node, "transB", 0):
            b = b[::-1]
        self.book.unify(a[1], b[0])
        out: Axes = [a[0], b[1]]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self.book.align(self.book.input(node, 2), out)
        return [out]

    def _matmul(self, node: ir.Node) -> Sequence[Axes]:
        a, b = self.book.input(node, 0), self.book.input(node, 1)
        if len(a) < 2 or len(b) < 2:
            raise Unknown
        self.book.unify(a[-1], b[-2])
        rank = max(len(a), len(b))
        batch = self.book.joined([a[:-2], b[:-2]], rank - 2)
        return [[*batch, a[-2], b[-1]]]

    def _broadcast(self, node: ir.Node) -> Sequence[Axes]:
        given = [index for index, value in enumerate(node.inputs) if value is not None]
        read = [self.book.input(node, index) for index in given]
        return [self.book.joined(read, max(len(axes) for axes in read))]

    def _channelwise(self, node: ir.Node) -> Sequence[Axes]:
        """Pools and norms by channel: axis 1 passes and belongs to all parameters; the others stay as they are."""
        x = self.book.input(node, 0)
        for index in range(1, len(node.inputs)):
            if node.inputs[index] is not None:
                self.book.unify(x[1], self.book.input(node, index)[0])
        self.book.freeze([x[0], *x[2:]])
        out = self.book.fresh(node.outputs[0])
        self.book.freeze([out[0], *out[2:]])
        return [[out[0], x[1], *out[2:]]]

    def _normalized(self, node: ir.Node) -> Sequence[Axes]:
        """Statistics over axes: they change with every channel, so none may go."""
        x = self.book.input(node, 0)
        axis = operators.attribute(node, "axis", -1)
        self.book.freeze(x[axis:])
        for index in range(1, len(node.inputs)):
            if node.inputs[index] is not None:
                self.book.freeze(self.book.input(node, index))
        return [x]

    def _softmax(self, node: ir.Node) -> Sequence[Axes]:
        x = self.book.input(node, 0)
        if self._opset < _SOFTMAX_OF_ONE_AXIS:
            self.book.freeze(x)
        else:
            self.book.freeze([x[operators.attribute(node, "axis", -1)]])
        return [x]

    def _concat(self, node: ir.Node) -> Sequence[Axes]:
        read = [self.book.input(node, index) for index in range(len(node.inputs))]
        axis = int(operators.attribute(node, "axis", 0))
        axis %= len(read[0])
        out: Axes = list(read[0])
        for axes in read[1:]:
            for place, ids in enumerate(axes):
                if place != axis and (ids is not None or out[place] is not None):
                    self.book.unify(out[place], ids)
        parts = [
            axes[axis] if axes[axis] is not None else self._of_one(value, axis)
            for axes, value in zip(read, node.inputs, strict=True)
        ]
        out[axis] = np.concatenate([part for part in parts if part is not None])
        return [out]

    def _of_one(self, value: ir.Value | None, axis: int) -> Ids:
        """A frozen label for an axis of extent 1 that becomes part of a longer one."""
        if value is None or self.book.dims(value)[axis] != 1:
            raise Unknown
        ids = self.book.new(1)
        self.book.freeze([ids])
        return ids

    def _transpose(self, node: ir.Node) -> Sequence[Axes]:
        x = self.book.input(node, 0)
        perm = node.attributes.get("perm")
        return [x[::-1] if perm is None else [x[i] for i in perm.as_ints()]]

    def _same_extent(self, node: ir.Node) -> Sequence[Axes]:
        """Axes whose extent changes are frozen, and so are the others of a node that pads by something else than 0."""
        x, out = self.book.input(node, 0), self.book.fresh(node.outputs[0])
        before, after = self.book.dims(_value(node, 0)), self.book.dims(node.outputs[0])
        if len(before) != len(after):
            raise Unknown
        made: Axes = []
        for old, new, ids, fresh in zip(before, after, x, out, strict=True):
            same = old is not None and old == new
            if not same:
                self.book.freeze([ids, fresh])
            made.append(ids if same else fresh)
        return [made]

    def _resize(self, node: ir.Node) -> Sequence[Axes]:
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            raise Unknown  # sizes name the channels too
        x = self.book.input(node, 0)
        self.book.freeze([x[0], *x[2:]])
        return self._same_extent(node)

    def _reduce(self, node: ir.Node) -> Sequence[Axes]:
        x = self.book.input(node, 0)
        stated = node.attributes.get("axes")
        given = values.array(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = given.tolist() if given is not None else [] if stated is None else stated.as_ints()
        if not axes:
            raise Unknown
        reduced = {int(axis) % len(x) for axis in axes}
        self.book.freeze([x[axis] for axis in reduced])
        keep = operators.attribute(node, "keepdims", 1)
        kept: Axes = [None if i in reduced else ids for i, ids in enumerate(x)]
        return [kept if keep else [ids for i, ids in enumerate(kept) if i not in reduced]]

    def _gather(self, node: ir.Node) -> Sequence[Axes]:
        """Rows of a table: the columns pass."""
        data = self.book.input(node, 0)
        axis = int(operators.attribute(node, "axis", 0)) % len(data)
        indices = self.book.input(node, 1)
        self.book.freeze([data[axis], *indices])
        return [[*data[:axis], *indices, *data[axis + 1 :]]]

    def _attention(self, node: ir.Node) -> Sequence[Axes]:
        """Heads of queries, keys and values go together; a mask of one head a row joins them."""
        if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
            raise Unknown
        read = [self.book.input(node, index) for index in range(3)]
        flat = len(read[0]) == 3
        if flat:
            count = operators.attribute(node, "q_num_heads", 0)
            if not count or count != operators.attribute(node, "kv_num_heads", 0):
                raise Unknown
            heads: list[Ids | None] = [self._heads(axes[2], count) for axes in read]
            self.book.freeze([axes[1] for axes in read])
        else:
            heads = [axes[1] for axes in read]
            self.book.freeze([*(axes[2] for axes in read), read[0][3], read[1][3]])
        self.book.unify(heads[0], heads[1])
        self.book.unify(heads[0], heads[2])
        mask = (
            self.book.input(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else []
        )
        self.book.freeze(mask)
        if len(mask) > 2 and mask[-3] is not None:
            self.book.freeze(heads)
        if flat:
            return [[read[0][0], read[0][1], read[2][2]]]
        return [[read[0][0], heads[0], read[0][2], read[2][3]]]

    def _heads(self, ids: Ids | None, count: int) -> Ids:
        """The leading label of each head, after all labels within a head were unified."""
        if ids is None or len(ids) % count:
            raise Unknown
        blocks = ids.reshape(count, -1)
        for column in range(1, blocks.shape[1]):
            self.book.unify(blocks[:, 0], blocks[:, column])
        return np.ascontiguousarray(blocks[:, 0])

    def _view(self, node: ir.Node) -> Sequence[Axes]:
        """Axes that are split or merged: the runs of axes with the same product on both sides, one by one."""
        x = self.book.input(node, 0)
        before, after = (
            self.book.shapes.dims(_value(node, 0)),
            self.book.shapes.dims(node.outputs[0]),
        )
        if before is None or after is None:
            raise Unknown
        skip = 0
        while skip < min(len(before), len(after)) and before[skip] == after[skip]:
            skip += 1
        old, new = [d.value for d in before[skip:]], [d.value for d in after[skip:]]
        if any(dim is None or dim == 0 for dim in (*old, *new)):
            raise Unknown
        out: Axes = list(x[:skip])
        for mine, theirs in axis_runs([d or 0 for d in old], [d or 0 for d in new]):
            part = [x[skip + i] for i in mine]
            sizes = [old[i] or 0 for i in mine], [new[i] or 0 for i in theirs]
            out.extend(self._regrouped(part, *sizes))
        return [out]

    def _regrouped(self, part: Axes, old: list[int], new: list[int]) -> Axes:
        long_old = [i for i, size in enumerate(old) if size > 1]
        long_new = [i for i, size in enumerate(new) if size > 1]
        if not long_new:
            return [None] * len(new)
        out: Axes = [None] * len(new)
        if len(long_old) == 1 and len(long_new) == 1:
            out[long_new[0]] = part[long_old[0]]
            return out
        if len(long_old) == 1:
            return self._split_up(part[long_old[0]], new, long_new)
        free = [i for i in long_old if (ids := part[i]) is not None and not self.book.is_icy(ids)]
        if len(long_new) > 1 or len(free) > 1:
            self.book.freeze(part)
            made: Axes = [self.book.new(size) if size > 1 else None for size in new]
            self.book.freeze(made)
            return made
        total = int(np.prod(old))
        if not free:
            merged = self.book.new(total)
            self.book.freeze([merged])
        else:
            ids = part[free[0]]
            assert ids is not None
            shape = [1] * len(old)
            shape[free[0]] = len(ids)
            merged = np.broadcast_to(ids.reshape(shape), old).reshape(-1)
        out[long_new[0]] = merged
        return out

    def _split_up(self, ids: Ids | None, new: list[int], long_new: list[int]) -> Axes:
        """One axis becomes several: the leading one is a channel (a head), what follows lies within it."""
        made: Axes = [self.book.new(size) if size > 1 else None for size in new]
        lead = long_new[0]
        self.book.freeze([axis for place, axis in enumerate(made) if place != lead])
        if ids is not None:
            blocks = ids.reshape(new[lead], -1)
            for column in range(1, blocks.shape[1]):
                self.book.unify(blocks[:, 0], blocks[:, column])
            made[lead] = blocks[:, 0]
        return made


def _attempt(rule: Callable[[ir.Node], Sequence[Axes]], node: ir.Node) -> Sequence[Axes] | None:
    """What a rule makes of a node; None where it does not know this form of the operator."""
    try:
        return rule(node)
    except Unknown:
        return None


def _value(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise Unknown
    return value
