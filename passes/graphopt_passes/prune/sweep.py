"""Removes channels that change nothing: nobody reads them, they never change, or another one says the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir.build import Names
from graphopt.ir.sparse import thin
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt_passes.prune.book import Ids
from graphopt_passes.prune.channels import Group, column_axis, find_groups, row_axis
from graphopt_passes.prune.labels import Labels, propagate
from graphopt_passes.prune.layers import Array, Layer, Wide, find_layers
from graphopt_passes.prune.paths import contracted, path_to, tables
from graphopt_passes.prune.slim import kept_indices, slim

RULE = "dead-channels"

TURNS = 8
"""What is removed may leave more dead behind it; every turn goes one layer further."""

SAME = 1e-6
"""Two filters are the same where they differ by less than this over their length: rounding of float32."""


@dataclasses.dataclass(frozen=True)
class SweepChannels:
    """Removes channels without which the model computes the same.

    Before:  h = Relu(W x + b)   y = V h + c        column i of V zero; or row i of W zero; or row i = a * row j, a > 0
    After:   the same without row i of W and column i of V     c += V_i Relu(b_i); or V_j += a V_i
    Changes numerics: sums of fewer terms, in another order.  Leaves channels whose removal would leave a convolution
    with a number of channels that is no multiple of 8, which kernels run slower: their rows become zero instead.
    Runs where sparsity is asked for, or by name.  A zero times an infinity counts as zero.
    """

    name: ClassVar[str] = "sweep-channels"
    numerics: ClassVar[Numerics] = Numerics.REORDERED

    always: bool = False
    """Whether to run where no sparsity is asked for."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if not (self.always or ctx.options.sparsity):
            return False
        removed = 0
        changed = False
        for _ in range(TURNS):
            found = _decide(model, ctx)
            site = model.graph.name or "main"
            if not found.any or not ctx.permit(RULE, site, Numerics.REORDERED):
                break
            _apply(model, found)
            ctx.refresh()
            removed += len(found.dropped)
            changed = True
        if removed:
            reason = f"{removed} channels removed that nothing reads, that never change or that another one repeats"
            ctx.remark(RemarkKind.NOTE, RULE, model.graph.name or "main", reason)
        return changed


@dataclasses.dataclass(frozen=True)
class Findings:
    """What to do.

    Attributes:
        labels: of the model.
        dropped: classes to remove.
        weights: initializers that get other numbers first.
    """

    labels: Labels
    dropped: frozenset[int]
    weights: Mapping[ir.Value, Array]

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.dropped or self.weights)


class _Draft:
    """The weights as they are to become."""

    def __init__(self) -> None:
        self.arrays: dict[ir.Value, Array] = {}

    def of(self, value: ir.Value) -> Array:
        """The numbers of an initializer, to be changed in place, in double precision."""
        if value not in self.arrays:
            assert value.const_value is not None
            self.arrays[value] = value.const_value.numpy().astype(np.float64)
        return self.arrays[value]


def _decide(model: ir.Model, ctx: Context) -> Findings:
    labels = propagate(model, ctx.shapes)
    layers = find_layers(model.graph)
    groups = find_groups(layers, labels)
    blocked = contracted(model.graph, labels) | tables(layers, labels)
    draft, full = _Draft(), _Full()
    dropped: set[int] = set()
    for group in groups:
        if blocked.intersection(group.classes) or _is_bound(group):
            continue
        unread = [root for root in group.classes if _is_unread(group, root, full)]
        still = _constant(group, unread, draft, full)
        again = _repeated(group, {*unread, *still}, draft)
        dead = [*unread, *still, *again]
        count = len(dead)
        left = len(group.classes) - count
        spare = min(-left % group.unit, count) if left else min(group.unit, count)
        dropped.update(dead[spare:])
        for root in dead[:spare]:
            _silence(group, root, draft)
    return Findings(labels, frozenset(dropped), _changed(draft))


def _is_bound(group: Group) -> bool:
    every = [
        layer
        for parts in (group.rows, group.columns)
        for pairs in parts.values()
        for layer, _ in pairs
    ]
    return any(layer.is_bound for layer in every)


def _column(layer: Layer, at: Ids, array: Array) -> Array:
    return np.moveaxis(array, column_axis(layer), 0)[at]


class _Full:
    """Which rows and columns of weights hold anything but zeros, looked up once a weight."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}

    def rows(self, layer: Layer, at: Ids) -> bool:
        """Whether one of some outputs has a weight."""
        return bool(self._of(layer, row_axis(layer))[at].any())

    def columns(self, layer: Layer, at: Ids) -> bool:
        """Whether one of some inputs has a weight."""
        return bool(self._of(layer, column_axis(layer))[at].any())

    def _of(self, layer: Layer, axis: int) -> npt.NDArray[np.bool_]:
        key = (layer.name, axis)
        if key not in self._known:
            array = layer.tensor.numpy()
            others = tuple(i for i in range(array.ndim) if i != axis)
            self._known[key] = (array != 0).any(axis=others)
        return self._known[key]


def _is_unread(group: Group, root: int, full: _Full) -> bool:
    return not any(full.columns(layer, at) for layer, at in group.columns[root])


def _constant(group: Group, known: Sequence[int], draft: _Draft, full: _Full) -> list[int]:
    """Classes that are made of zeros: what they are for every input goes into the biases of those who read them."""
    found, gone = [], set(known)
    for root in group.classes:
        if root in gone or any(full.rows(layer, at) for layer, at in group.rows[root]):
            continue
        ways = [_way(group, root, reader, at) for reader, at in group.columns[root]]
        if any(way is None for way in ways):
            continue
        for way in ways:
            assert way is not None
            way.fold(draft)
        found.append(root)
    return found


@dataclasses.dataclass(frozen=True)
class _Way:
    """A reader of a channel that is the same for every input."""

    reader: Layer
    at: Ids
    level: Wide

    def fold(self, draft: _Draft) -> None:
        """Puts what the channel adds into the bias, and zeros in its place."""
        array = draft.of(self.reader.weight)
        columns = _column(self.reader, self.at, array)
        if self.level.any():
            assert self.reader.bias is not None
            flat = columns.reshape(len(self.at), *columns.shape[1:])
            per_row = flat.reshape(*flat.shape[:2], -1).sum(-1)
            bias = draft.of(self.reader.bias)
            bias += (self.level[:, None] * per_row).sum(0).reshape(bias.shape)
        np.moveaxis(array, column_axis(self.reader), 0)[self.at] = 0


def _way(group: Group, root: int, reader: Layer, at: Ids) -> _Way | None:
    """How a constant channel reaches a reader; None where it cannot be told, or cannot be folded."""
    if len(group.rows[root]) != 1:
        return None
    maker, rows = group.rows[root][0]
    path = path_to(maker, reader)
    if path is None:
        return None
    start = np.zeros(len(rows)) if (b := maker.bias_vector()) is None else b[rows]
    level = path.levels(start)
    if level is None:
        return None
    if len(level) not in (1, len(at)):
        return None
    wide = np.broadcast_to(level, (len(at),))
    if not np.isfinite(wide).all():
        return None
    padded = reader.window is not None and (
        any(reader.window.pads) or reader.window.auto_pad.startswith("SAME")
    )
    if wide.any() and (padded or reader.bias is None):
        return None
    return _Way(reader, at, wide)


def _repeated(group: Group, gone: set[int], draft: _Draft) -> list[int]:
    """Classes whose filter is another's times a positive number: their columns go to the other's."""
    makers = {layer.name: layer for root in group.classes for layer, _ in group.rows[root]}
    if len(makers) != 1:
        return []
    (maker,) = makers.values()
    readers = {layer.name: layer for root in group.classes for layer, _ in group.columns[root]}
    paths = [path_to(maker, reader) for reader in readers.values()]
    if maker.blocks > 1 or any(path is None for path in paths):
        return []
    whole = all(path is not None and path.is_homogeneous for path in paths)
    free = [root for root in group.classes if root not in gone]
    vectors = _filters(maker, group, free)
    found = []
    for one, other, factor in _pairs(vectors, scaled=whole):
        for (reader, at), (_, to) in zip(
            group.columns[free[other]], group.columns[free[one]], strict=True
        ):
            array = np.moveaxis(draft.of(reader.weight), column_axis(reader), 0)
            array[to] += factor * array[at]
            array[at] = 0
        found.append(free[other])
    return found


def _filters(maker: Layer, group: Group, roots: Sequence[int]) -> Wide:
    bias, array = maker.bias_vector(), np.moveaxis(maker.tensor.numpy(), row_axis(maker), 0)
    rows = []
    for root in roots:
        (_, at) = group.rows[root][0]
        weights = array[at].astype(np.float64)
        own = np.zeros(0) if bias is None else bias[at]
        rows.append(np.concatenate([weights.reshape(-1), own]))
    return np.stack(rows) if rows else np.zeros((0, 1))


def _pairs(vectors: Wide, *, scaled: bool) -> list[tuple[int, int, float]]:
    """(kept, repeated, factor) with repeated = factor * kept, factor > 0; 1 unless `scaled`."""
    lengths = np.linalg.norm(vectors, axis=1)
    found: list[tuple[int, int, float]] = []
    gone: set[int] = set()
    usable = np.flatnonzero(lengths > 0)
    unit = vectors[usable] / lengths[usable, None]
    # A projection finds candidates in order; only neighbours along it can be the same.
    direction = np.random.default_rng(0).standard_normal(vectors.shape[1])
    order = usable[np.argsort(unit @ direction, kind="stable")]
    for place, one in enumerate(order.tolist()):
        if one in gone:
            continue
        for other in order[place + 1 :].tolist():
            a, b = vectors[one] / lengths[one], vectors[other] / lengths[other]
            if abs(float((a - b) @ direction)) > SAME * float(np.abs(direction).sum()):
                break
            same = np.abs(a - b).max() <= SAME
            factor = float(lengths[other] / lengths[one])
            if same and other not in gone and (scaled or abs(factor - 1) <= SAME):
                found.append((one, other, factor))
                gone.add(other)
    return found


def _silence(group: Group, root: int, draft: _Draft) -> None:
    """Zeros in place of a channel that stays only so that their number is round."""
    for layer, at in group.rows[root]:
        np.moveaxis(draft.of(layer.weight), row_axis(layer), 0)[at] = 0
        if layer.bias is not None:
            draft.of(layer.bias).reshape(-1)[at] = 0


def _changed(draft: _Draft) -> dict[ir.Value, Array]:
    found = {}
    for value, array in draft.arrays.items():
        tensor = value.const_value
        assert tensor is not None
        new = (array + 0.0).astype(tensor.dtype.numpy())
        if not np.array_equal(new, tensor.numpy()):
            found[value] = new
    return found


def _apply(model: ir.Model, found: Findings) -> None:
    for value, array in found.weights.items():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = thin(array, tensor.dtype, value.name)
    if found.dropped:
        slim(model, kept_indices(found.labels, found.dropped), Names.of(model))
