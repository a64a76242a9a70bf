"""Fits what channels and branches have left of a model to what the original computes, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.model_file import model_to_bytes
from graphopt.runtime.session import Session, SessionOptions
from graphopt_passes.prune.book import Ids
from graphopt_passes.prune.channels import row_axis
from graphopt_passes.prune.layers import Array, Layer, Wide, find_layers, find_turned
from graphopt_passes.prune.moments import Moments, parts
from graphopt_passes.prune.roots import RIDGE, ridge
from graphopt_passes.prune.samples import Feeds
from graphopt_passes.prune.slim import Keep
from graphopt_passes.prune.streams import Streams, cut, partners

CHECKED = 4
"""One batch in so many chooses how far a fit may go from what was there."""

_RIDGES, _RIDGES_WIDE = (0.1, 1.0, 10.0, 100.0, 1000.0), (1.0, 10.0, 100.0)
_WIDE_COLUMNS = 1500


def input_energies(model: ir.Model, layers: Sequence[Layer], feeds: Feeds) -> dict[str, Wide]:
    """E[x^2] of each input channel of each layer, by name of its weight."""
    found: dict[str, Wide] = {}
    stops = _stops(model, layers)
    streams = Streams(model, feeds)
    pieces = cut(model.graph, stops)
    for piece, stop in zip(pieces, stops, strict=True):
        streams.run(piece, {})
        for layer in layers:
            if layer.source is stop:
                found[layer.name] = _energy(
                    layer, [pair[0] for pair in streams.pairs(stop.name or "")]
                )
    return found


def _energy(layer: Layer, arrays: Sequence[Array]) -> Wide:
    axis = 1 if layer.window is not None else -1
    totals, count = np.zeros(arrays[0].shape[axis]), 0
    for array in arrays:
        last = np.moveaxis(array.astype(np.float64), axis, -1)
        flat = last.reshape(-1, last.shape[-1])
        totals += np.square(flat).sum(0)
        count += len(flat)
    if (
        layer.inner > 1
    ):  # a group's channels share the columns of the weight with those of the other groups
        totals = totals.reshape(layer.blocks, -1).sum(0)
    return totals / max(count, 1)


def _stops(model: ir.Model, layers: Sequence[Layer]) -> list[ir.Value]:
    """What the layers read, once each, in the order of the graph."""
    place = {node: index for index, node in enumerate(model.graph)}
    sources = dict.fromkeys(layer.source for layer in layers)
    return sorted(sources, key=lambda v: -1 if (p := v.producer()) is None else place[p])


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """A layer before and after.

    Attributes:
        dense: in the original.
        slim: in the model that is fitted.
        aim: what its output, other summands included, shall be in the original; None for its own.
        own: what that output is called here.
    """

    dense: Layer
    slim: Layer
    aim: ir.Value | None
    own: ir.Value

    def beside(self) -> list[ir.Value]:
        """What of the original has to be known beside the source."""
        aimed = [self.aim, self.dense.total] if self.aim is not None else []
        return [value for value in (*aimed, self.dense.partner) if value is not None]


def reconstruct(  # noqa: PLR0913  two models, what links them, samples, and how
    dense: ir.Model,
    slim_model: ir.Model,
    keep: Keep,
    feeds: Feeds,
    seed: int,
    aims: Mapping[str, str] | None = None,
    *,
    thin: int = 1,
) -> int:
    """Fits each layer of the slimmed model to what the dense one computes, in order; returns how many took the fit.

    Least squares from the inputs that are left, bias included.  How near the result stays to what was there is chosen
    on samples that it has not seen; where nothing is better on those, nothing changes.

    Args:
        dense: the original.
        slim_model: what is left of it; changed in place.
        keep: which indices stay, by name in `slim_model`.
        feeds: samples.
        seed: of the choice of positions.
        aims: by name of a value in `slim_model`, which of the original's it stands for instead of its own.
        thin: takes one of so many of the positions that would be looked at.
    """
    groups = _groups(dense, slim_model, aims or {})
    streams = Streams(dense, feeds)
    slims = [[pair.slim for pair in group] for group in groups]
    beside = [[value for pair in group for value in pair.beside()] for group in groups]
    pieces = zip(
        cut(dense.graph, [group[0].dense.source for group in groups], beside),
        cut(slim_model.graph, [group[0].slim.source for group in groups], partners(slims)),
        strict=True,
    )
    fitted = 0
    for (mine, theirs), group in zip(pieces, groups, strict=True):
        streams.run_apart(mine, theirs, slim_model)
        for pair in group:
            fitted += _refit(pair, keep, streams, thin * len(feeds), seed)
    return fitted


def _groups(dense: ir.Model, slim_model: ir.Model, aims: Mapping[str, str]) -> list[list[_Pair]]:
    """The layers of both models that read the same, in the order of the graphs."""
    before = {layer.name: layer for layer in _all_layers(dense)}
    known = {v.name: v for node in dense.graph for v in node.outputs}
    pairs = []
    for layer in _all_layers(slim_model):
        if layer.name in before and not layer.is_bound:
            own = layer.total
            aim = known.get(aims.get(own.name or "", ""))
            pairs.append(_Pair(before[layer.name], layer, aim, own))
    place = {v: at for at, v in enumerate(_stops(slim_model, [pair.slim for pair in pairs]))}
    theirs = {v: at for at, v in enumerate(_stops(dense, [pair.dense for pair in pairs]))}
    found: dict[tuple[int, int], list[_Pair]] = {}
    for pair in pairs:
        found.setdefault((place[pair.slim.source], theirs[pair.dense.source]), []).append(pair)
    return [found[key] for key in sorted(found)]


def _all_layers(model: ir.Model) -> list[Layer]:
    return [*find_layers(model.graph), *find_turned(model.graph)]


def _refit(pair: _Pair, keep: Keep, streams: Streams, batches: int, seed: int) -> bool:
    """Fits one layer; whether the fit stands."""
    layer = pair.slim
    full, start = _augmented(pair.dense), _augmented(layer)
    rows = keep.get(layer.name, {}).get(row_axis(layer))
    if rows is not None:
        full = full.reshape(-1, full.shape[-1])[rows].reshape(len(start), -1, full.shape[-1])
    known = [_known(pair, keep, streams, checked=checked) for checked in (False, True)]
    if parts(layer) > 1:
        found = _best(*(_Rows.of(layer, each, full, start, batches, seed) for each in known))
    else:
        found = _best(*(_System.of(layer, each, full, start, batches, seed) for each in known))
    if found is not None:
        _put(layer, found)
    return found is not None


def _best(seen: S | None, unseen: S | None) -> Wide | None:
    """What fits both sets of samples best, as near to what was there as the second asks for; None if that is better."""
    if seen is None or unseen is None:
        return None if seen is None else seen.solved(1.0)
    ridges = _RIDGES if seen.start.shape[-1] <= _WIDE_COLUMNS else _RIDGES_WIDE
    losses = {factor: unseen.loss(seen.solved(factor)) for factor in ridges}
    best = min(losses, key=lambda factor: losses[factor])
    return seen.joined(unseen).solved(best) if losses[best] < unseen.loss(seen.start) else None


_Known = Iterator[tuple[Array, Array, Array | None]]
"""By batch: what a layer reads in the original and now, and what its output shall have beside."""


def _known(pair: _Pair, keep: Keep, streams: Streams, *, checked: bool) -> _Known:
    """What a layer is fitted to, or what chooses how far it goes."""
    layer = pair.slim
    names = pair.dense.source.name or "", layer.source.name or ""
    # The groups of a depthwise convolution are its channels: those that went have no group here.
    stay = keep.get(names[1], {}) if layer.blocks > 1 and layer.inner == 1 else {}
    for index, (dense, slim) in enumerate(zip(streams.dense, streams.pruned, strict=True)):
        if (index % CHECKED == CHECKED - 1) is checked:
            yield _take(dense[names[0]], stay), slim[names[1]], _lost(pair, keep, dense, slim)


def _lost(
    pair: _Pair, keep: Keep, dense: Mapping[str, Array], slim: Mapping[str, Array]
) -> Array | None:
    """What the output of a layer shall have beside what it had: what the other summand lost, and what went after it."""
    other = pair.slim.partner
    cuts = (
        keep.get("" if other is None else other.name or "", {}),
        keep.get(pair.own.name or "", {}),
    )
    mine = _cut(dense, pair.dense.partner, cuts[0 if other is not None else 1])
    theirs = _cut(slim, other, {})
    gap = None if mine is None or theirs is None or mine is theirs else mine - theirs
    aim = _cut(dense, pair.aim, cuts[1])
    if aim is None:
        return gap
    total = _cut(dense, pair.dense.total, cuts[1])
    assert total is not None
    extra = aim - total
    if other is None and mine is not None:  # the sum itself went
        extra = extra + mine
    return extra if gap is None else gap + extra


def _cut(
    live: Mapping[str, Array], value: ir.Value | None, stay: Mapping[int, Ids]
) -> Array | None:
    array = None if value is None else live.get(value.name or "")
    return None if array is None else _take(array, stay)


def _take(array: Array, stay: Mapping[int, Ids]) -> Array:
    for axis, at in stay.items():
        array = np.take(array, at, axis=axis)
    return array


@dataclasses.dataclass(frozen=True, eq=False)
class _System:
    """The normal equations of one layer, group by group: W moment ~ goal, near `start`."""

    moment: Wide
    goal: Wide
    start: Wide

    @classmethod
    def of(
        cls, layer: Layer, known: _Known, full: Wide, start: Wide, batches: int, seed: int
    ) -> _System | None:
        moments, size = Moments(layer, batches, seed), start.shape[-1]
        for dense, slim, gap in known:
            moments.add(dense, slim, gap)
        if not moments.moment.size:
            return None
        goals = [moments.aim(each, block, size) for block, each in enumerate(full)]
        return cls(moments.moment[:, :size, :size], np.stack(goals), start)

    def joined(self, other: _System) -> _System:
        """On the samples of both."""
        return _System(self.moment + other.moment, self.goal + other.goal, self.start)

    def solved(self, factor: float) -> Wide:
        """The least squares solution, `factor` times the usual ridge towards the start."""
        damp = factor * np.array([ridge(each) for each in self.moment])[:, None, None]
        left = self.moment + damp * np.eye(self.moment.shape[-1])
        right = self.goal + damp * self.start
        found = np.linalg.solve(left, np.swapaxes(right, 1, 2))
        return np.asarray(np.swapaxes(found, 1, 2), np.float64)

    def loss(self, weight: Wide) -> float:
        """Squared error of the outputs, up to a constant."""
        return float(np.sum((weight @ self.moment - 2 * self.goal) * weight))


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """The same for a matrix with more inputs than there are samples: the samples themselves.

    W = W0 + E^T (X X^T + l I)^-1 X with E = goal - X W0^T is the same solution, from a matrix of samples by samples.
    """

    x: Wide
    goal: Wide
    start: Wide

    @classmethod
    def of(
        cls, layer: Layer, known: _Known, full: Wide, start: Wide, batches: int, seed: int
    ) -> _Rows | None:
        moments, size = Moments(layer, batches, seed), start.shape[-1]
        read, goal = [], []
        for dense, slim, gap in known:
            x_dense, x, lost = moments.rows(dense, slim, gap)
            wanted = x_dense[0][:, : full.shape[-1]] @ full[0].T
            goal.append(wanted if lost is None else wanted + lost[:, 0])
            read.append(x[0][:, :size].astype(np.float64))
        return cls(np.concatenate(read), np.concatenate(goal), start) if read else None

    def joined(self, other: _Rows) -> _Rows:
        """On the samples of both."""
        both = np.concatenate([self.x, other.x]), np.concatenate([self.goal, other.goal])
        return _Rows(*both, self.start)

    def solved(self, factor: float) -> Wide:
        """The least squares solution, `factor` times the usual ridge towards the start."""
        damp = factor * RIDGE * float(np.square(self.x).sum()) / self.x.shape[1]
        left = self.x @ self.x.T + max(damp, 1e-8) * np.eye(len(self.x))
        wrong = self.goal - self.x @ self.start[0].T
        return np.asarray(self.start + np.linalg.solve(left, wrong).T @ self.x, np.float64)

    def loss(self, weight: Wide) -> float:
        """Squared error of the outputs."""
        return float(np.square(self.x @ weight[0].T - self.goal).sum())


S = TypeVar("S", _System, _Rows)


def _augmented(layer: Layer) -> Wide:
    """The matrix [groups, rows, columns] with the bias as its last column, where there is one."""
    matrix, bias = layer.matrix(), layer.bias_vector()
    if bias is None:
        return matrix
    return np.concatenate([matrix, bias.reshape(len(matrix), -1, 1)], axis=-1)


def _put(layer: Layer, found: Wide) -> None:
    bias = layer.bias
    if bias is not None and bias.const_value is not None:
        like = bias.const_value
        array = found[..., -1].reshape(like.shape.numpy()).astype(like.dtype.numpy())
        bias.const_value = ir.Tensor(array, like.dtype, name=bias.name)
        found = found[..., :-1]
    stored = layer.stored(found)
    layer.weight.const_value = ir.Tensor(stored, layer.tensor.dtype, name=layer.name)


def outputs(model: ir.Model, feeds: Feeds) -> list[dict[str, Array]]:
    """The float outputs of a model, by feed."""
    session = Session(model_to_bytes(model), options=SessionOptions(threads=2))
    made = [session.run(feed) for feed in feeds]
    return [
        {n: a for n, a in each.items() if isinstance(a, np.ndarray) and a.dtype.kind == "f"}
        for each in made
    ]


def divergence(wanted: Sequence[Mapping[str, Array]], model: ir.Model, feeds: Feeds) -> float:
    """Error of the float outputs of a model over those wanted, root of summed squares."""
    wrong = scale = 0.0
    for want, got in zip(wanted, outputs(model, feeds), strict=True):
        for name, array in want.items():
            wrong += float(np.square(got[name].astype(np.float64) - array).sum())
            scale += float(np.square(array.astype(np.float64)).sum())
    return math.sqrt(wrong / scale) if scale > 0 else math.inf
