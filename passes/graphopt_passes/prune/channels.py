"""Structured pruning: which channels to remove, and what the layers that stay become."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt_passes.prune.book import Ids
from graphopt_passes.prune.labels import Labels
from graphopt_passes.prune.layers import Layer, Wide
from graphopt_passes.prune.request import Importance, Measure
from graphopt_passes.prune.slim import Keep, kept_indices, slim

ROUNDING = 8
"""ONNX Runtime's convolutions work on blocks of 8 channels: 33 take as long as 40."""

FLOOR = 0.1
"""Least share of the channels of a group that stays."""

HELD_OUT = 5
"""One batch in so many is kept from the fit, to judge it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Classes that run through the same axes of the same weights: the channels of one width of the model.

    Attributes:
        classes: roots, in the order of their channels.
        rows: of each class, (layer, output indices) that make it.
        columns: of each class, (layer, input indices) that read it.
        multiple: of what the channels of a convolution shall stay a multiple.
    """

    classes: tuple[int, ...]
    rows: Mapping[int, list[tuple[Layer, Ids]]]
    columns: Mapping[int, list[tuple[Layer, Ids]]]
    multiple: int = ROUNDING

    @property
    def unit(self) -> int:
        """How many classes make `multiple` channels; 1 where nothing is a convolution."""
        makers = [pair for pairs in self.rows.values() for pair in pairs]
        if not any(layer.window is not None for layer, _ in makers):
            return 1
        return self.multiple // math.gcd(self.multiple, len(makers[0][1]))


def row_axis(layer: Layer) -> int:
    """The axis of the stored weight that makes outputs."""
    return 1 if layer.transposed else 0


def column_axis(layer: Layer) -> int:
    """The axis of the stored weight that reads inputs."""
    return 0 if layer.transposed else 1


def find_groups(layers: Sequence[Layer], labels: Labels, multiple: int = ROUNDING) -> list[Group]:
    """The groups of classes that can be removed: made by one layer at least, and read by one."""
    rows = _slices(layers, labels, row_axis)
    columns = _slices(layers, labels, column_axis)
    by_signature: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for root in sorted(rows.keys() & columns.keys()):
        if root not in labels.frozen:
            signature = tuple(
                [("row", id(layer)) for layer, _ in rows[root]]
                + [("column", id(layer)) for layer, _ in columns[root]]
            )
            by_signature[signature].append(root)
    return [
        Group(tuple(roots), {r: rows[r] for r in roots}, {r: columns[r] for r in roots}, multiple)
        for roots in by_signature.values()
    ]


def _slices(
    layers: Sequence[Layer], labels: Labels, axis_of: object
) -> dict[int, list[tuple[Layer, Ids]]]:
    found: defaultdict[int, list[tuple[Layer, Ids]]] = defaultdict(list)
    assert callable(axis_of)
    for layer in layers:
        classes = labels.classes(layer.weight, axis_of(layer))
        if classes is None:
            continue
        order = np.argsort(classes, kind="stable")
        roots, starts = np.unique(classes[order], return_index=True)
        for root, members in zip(roots.tolist(), np.split(order, starts[1:]), strict=True):
            found[root].append((layer, members))
    return dict(found)


def weight_norms(groups: Sequence[Group]) -> dict[int, float]:
    """L2 norm of what makes each class, over the mean of its group."""

    def score(group: Group, root: int) -> float:
        return math.sqrt(
            sum(float(np.square(_rows(layer, at)).sum()) for layer, at in group.rows[root])
        )

    return _scored(groups, score)


def similarity(groups: Sequence[Group]) -> dict[int, float]:
    """Distance of what makes each class to all others of its group: small where another says the same (FPGM)."""
    found: dict[int, float] = {}
    for group in groups:
        vectors = np.stack(
            [
                np.concatenate([_rows(layer, at).reshape(-1) for layer, at in group.rows[root]])
                for root in group.classes
            ]
        )
        squares = np.square(vectors).sum(1)
        apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * vectors @ vectors.T, 0))
        found.update(zip(group.classes, _over_mean(apart.sum(1)), strict=True))
    return found


def output_change(groups: Sequence[Group], energies: Mapping[str, Wide]) -> dict[int, float]:
    """What removing each class changes in the outputs of its readers: sum of |W_c|^2 E[x_c^2]."""

    def score(group: Group, root: int) -> float:
        total = 0.0
        for layer, at in group.columns[root]:
            array = np.moveaxis(layer.tensor.numpy().astype(np.float64), column_axis(layer), 0)[at]
            spread = np.square(array).reshape(len(at), -1).sum(1)
            total += float(spread @ energies[layer.name][at])
        return total

    return _scored(groups, score)


def information(groups: Sequence[Group], shares: Mapping[str, Wide]) -> dict[int, float]:
    """Fisher information of a gate on each class: E[(sum over its rows of w dlog p / dw)^2]."""

    def score(group: Group, root: int) -> float:
        parts = [shares[layer.name][:, at].sum(1) for layer, at in group.rows[root]]
        return float(np.square(np.sum(parts, axis=0)).mean())

    return _scored(groups, score)


def _rows(layer: Layer, at: Ids) -> Wide:
    return np.take(layer.tensor.numpy().astype(np.float64), at, axis=row_axis(layer))


def _scored(groups: Sequence[Group], score: object) -> dict[int, float]:
    assert callable(score)
    found: dict[int, float] = {}
    for group in groups:
        scores = np.array([score(group, root) for root in group.classes])
        found.update(zip(group.classes, _over_mean(scores), strict=True))
    return found


def _over_mean(scores: Wide) -> list[float]:
    mean = float(scores.mean())
    return [float(score / mean) if mean > 0 else 0.0 for score in scores]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Multiply-adds of each layer for one sample, or its weights."""

    layers: tuple[Layer, ...]
    amounts: tuple[float, ...]

    @classmethod
    def of(cls, layers: Sequence[Layer], shapes: Shapes, by: Measure = Measure.FLOPS) -> Costs:
        """Counts outputs times columns, where dims that are not known count once; or weights."""
        if by is Measure.PARAMETERS:
            return cls(tuple(layers), tuple(float(layer.size) for layer in layers))
        return cls(tuple(layers), tuple(_cost(layer, shapes) for layer in layers))

    @property
    def total(self) -> float:
        """Of all layers."""
        return sum(self.amounts)

    def left(self, keep: Keep) -> float:
        """Of all layers after a cut."""
        return sum(
            cost * self._share(layer, keep)
            for layer, cost in zip(self.layers, self.amounts, strict=True)
        )

    @staticmethod
    def _share(layer: Layer, keep: Keep) -> float:
        shape = layer.tensor.shape.numpy()
        return math.prod(len(stay) / shape[axis] for axis, stay in keep.get(layer.name, {}).items())


def _cost(layer: Layer, shapes: Shapes) -> float:
    turned = layer.node.op_type == "ConvTranspose"  # each input meets the kernel once
    dims = shapes.dims(layer.source if turned else layer.node.outputs[0]) or ()
    places = math.prod(d.value or 1 for d in dims)
    extent = layer.tensor.shape.numpy()[column_axis(layer) if turned else row_axis(layer)]
    return places / extent * layer.size


def choose(
    groups: Sequence[Group],
    scores: Mapping[int, float],
    labels: Labels,
    costs: Costs,
    share: float,
    dear: Mapping[Group, float] | None = None,
) -> frozenset[int]:
    """The least important classes whose removal saves `share` of the arithmetic.

    Channels go in blocks that kernels work on, the least important of a group first, so that what stays is rounded.

    Args:
        groups: of classes that may go.
        scores: importance by class, about 1 in the mean of each group.
        labels: of the model.
        costs: of its layers.
        share: of the arithmetic.
        dear: by what the scores of each group are divided: what its channels save counts so beside importance.
    """
    ranked = [
        (float(np.mean([scores[root] for root in block])) / (dear or {}).get(group, 1.0), block)
        for group in groups
        for block in _blocks(group, scores)
    ]
    order = [block for _, block in sorted(ranked)]
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if costs.left(kept_indices(labels, _joined(order[:middle]))) <= (1 - share) * costs.total:
            high = middle
        else:
            low = middle + 1
    return _joined(order[:low])


def expense(group: Group, costs: Costs) -> float:
    """Share of the arithmetic that goes through one class of a group, in the mean."""
    amounts = dict(zip((layer.name for layer in costs.layers), costs.amounts, strict=True))
    root = group.classes[0]
    total = 0.0
    for pairs, axis_of in ((group.rows[root], row_axis), (group.columns[root], column_axis)):
        for layer, at in pairs:
            total += amounts[layer.name] * len(at) / layer.tensor.shape.numpy()[axis_of(layer)]
    return total / max(costs.total, 1e-12)


def _joined(blocks: Sequence[tuple[int, ...]]) -> frozenset[int]:
    return frozenset(root for block in blocks for root in block)


def _blocks(group: Group, scores: Mapping[int, float]) -> list[tuple[int, ...]]:
    """The classes of a group that may go, least important first, in blocks that leave a round number."""
    ranked = sorted(group.classes, key=lambda root: (scores[root], root))
    size, unit = len(ranked), group.unit
    least = min(math.ceil(max(math.ceil(FLOOR * size), 1) / unit) * unit, size)
    first = size % unit
    ends = ([first] if first else []) + list(range(first + unit, size - least + 1, unit))
    begins = [0, *ends][: len(ends)]
    return [tuple(ranked[i:j]) for i, j in zip(begins, ends, strict=True) if j <= size - least]


def slimmed(model: ir.Model, labels: Labels, dropped: frozenset[int]) -> ir.Model:
    """A clone without the dropped classes; what stays is as it was."""
    made = load_model(model)
    slim(made, kept_indices(labels, dropped), Names.of(made))
    return made


def importances(
    which: Importance,
    groups: Sequence[Group],
    energies: Mapping[str, Wide] | None,
    shares: Mapping[str, Wide] | None = None,
    costs: Mapping[int, float] | None = None,
) -> dict[Importance, dict[int, float]]:
    """The scores to try: one, or all that the data allow.

    Args:
        which: one, or all.
        groups: of classes.
        energies: E[x^2] of the inputs of layers, where there are samples.
        costs: of removing each class, where they are known.
        shares: what the rows of weights contribute to samples' likelihoods, where they are known.
    """
    made = {
        Importance.L2: lambda: weight_norms(groups),
        Importance.SIMILAR: lambda: similarity(groups),
    }
    if energies is not None:
        made[Importance.ACTIVATION] = lambda: output_change(groups, energies)
    if shares is not None:
        made[Importance.FISHER] = lambda: information(groups, shares)
    if costs is not None:
        made[Importance.RECONSTRUCTION] = lambda: dict(costs)
    wanted = list(made) if energies is not None else [Importance.L2]
    if which is not Importance.AUTO:
        wanted = [which] if which in made else []
    return {each: made[each]() for each in wanted}
