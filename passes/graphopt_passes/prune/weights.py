"""Prunes weights layer by layer: allocation first, then mask and values of one layer after the other."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.sparse import thin
from graphopt.runtime.footprint import let_go
from graphopt_passes.prune.allocate import allocate, allocate_large, halfway, smallest
from graphopt_passes.prune.layers import PRUNABLE, Array, Layer, Wide, Window
from graphopt_passes.prune.moments import Moments, parts
from graphopt_passes.prune.request import Allocation, Method, Pattern, SparsityRequest
from graphopt_passes.prune.roots import ridge
from graphopt_passes.prune.samples import Feeds
from graphopt_passes.prune.solve import Goal, Mask, solve
from graphopt_passes.prune.streams import Piece, Streams, cut, partners

ADMM_FROM = 0.75
"""Share of zeros; below, SparseGPT is as good and takes less time."""

DENSE_SHARE = 0.25
"""Small, depthwise, first and last layers stay dense up to this share of the weights that may stay at all."""

TINY = 512
"""Weights that no file stores sparse."""

LARGE = 16_000_000
"""Weights from which on scores are not held for all layers at once."""

MIN_HELD_BYTES = 1 << 27
HELD_SHARE = 0.33
"""Values of samples may take this much memory, or this share of what the weights of the model take."""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """One layer after pruning.

    Attributes:
        layer: which.
        weight: as it is to be stored.
        bias: as it is to be stored; None where it stays.
        zeros: share of the weight.
    """

    layer: Layer
    weight: ir.TensorProtocol
    bias: Array | None
    zeros: float


def goals(
    layers: Sequence[Layer],
    request: SparsityRequest,
    moments: Mapping[str, Wide] | None = None,
) -> dict[Layer, Goal]:
    """How many zeros each layer that may be pruned shall have; layers that stay dense are left out.

    A ratio counts all layers, also those that stay dense, so that the file has as many zeros as the user asked for.

    Args:
        layers: of the model.
        request: what is asked for.
        moments: second moments of what each layer reads, for allocation by sensitivity.
    """
    own = _own(layers, request)
    free = [layer for layer in _free(layers, request) if layer not in own]
    if request.pattern is not None:
        pattern = request.pattern
        return own | {each: Goal(pattern=pattern) for each in free if takes(each, pattern)}
    if request.threshold is not None:
        limit = request.threshold
        return own | {each: Goal(int((np.abs(each.matrix()) <= limit).sum())) for each in free}
    assert request.ratio is not None
    if not free:
        return own
    total = sum({layer.weight: layer.size for layer in layers}.values())
    left = round(request.ratio * total) - sum(goal.of(layer.size) for layer, goal in own.items())
    zeros = min(max(left, 0), sum(layer.size for layer in free))
    counts = _counts(free, zeros, request.allocation)
    if request.allocation is Allocation.SENSITIVITY and moments is not None:
        costs = [
            removal_costs(in_parts(layer, layer.matrix()), moments[layer.name]) for layer in free
        ]
        counts = halfway(counts, allocate(costs, zeros, Allocation.LAMP))
    return own | {layer: Goal(count) for layer, count in zip(free, counts, strict=True)}


def takes(layer: Layer, pattern: Pattern) -> bool:
    """Whether hardware reads patterns in such a layer, and its inputs come in so many."""
    plain = layer.blocks == 1 and layer.node.op_type in PRUNABLE
    return plain and layer.inner % pattern[1] == 0


def _own(layers: Sequence[Layer], request: SparsityRequest) -> dict[Layer, Goal]:
    """Goals of the layers for which the user says how many zeros they shall have; the last word counts.

    Also of those that would stay dense otherwise, if they can be pruned at all.
    """
    found: dict[Layer, Goal] = {}
    for name, share in request.own:
        for layer in layers:
            if layer.is_bound or not re.search(name, layer.name):
                continue
            if isinstance(share, float):
                found[layer] = Goal(round(share * layer.size))
            elif takes(layer, share):
                found[layer] = Goal(pattern=share)
    return found


def _free(layers: Sequence[Layer], request: SparsityRequest) -> list[Layer]:
    """The layers that may be pruned: at high ratios also the greatest of those that would better stay dense."""
    if request.ratio is None:
        return [layer for layer in layers if not layer.dense]
    room = DENSE_SHARE * (1 - request.ratio) * sum(layer.size for layer in layers)
    dense: set[Layer] = set()
    for layer in sorted((each for each in layers if each.dense), key=lambda each: each.size):
        room -= 0 if layer.is_bound else layer.size
        if layer.is_bound or layer.size < TINY or room >= 0:
            dense.add(layer)
    return [layer for layer in layers if layer not in dense]


def _counts(free: Sequence[Layer], zeros: int, how: Allocation) -> list[int]:
    """Zeros of each layer, as far as the weights tell."""
    sizes = [layer.size for layer in free]
    if how is Allocation.SENSITIVITY:
        how = Allocation.LAMP
    if sum(sizes) <= LARGE:
        return allocate([layer.matrix() for layer in free], zeros, how)
    if how is Allocation.MIXED:
        lamp, erk = (_counts(free, zeros, each) for each in (Allocation.LAMP, Allocation.ERK))
        return halfway(lamp, erk)
    if how in (Allocation.LAMP, Allocation.GLOBAL):
        return allocate_large(_one_by_one(free), sizes, zeros, how)
    shapes = [(layer.blocks, layer.rows // layer.blocks, layer.columns) for layer in free]
    return allocate([np.broadcast_to(np.float64(0), shape) for shape in shapes], zeros, how)


def _one_by_one(layers: Sequence[Layer]) -> Iterator[Wide]:
    """The matrices of large models, none of which stays in memory when the next is read."""
    for layer in layers:
        yield layer.matrix()
        let_go([layer.tensor])


def removal_costs(matrix: Wide, moment: Wide) -> Wide:
    """The root of what removing each weight alone costs, the others made up: |w| / sqrt of the diagonal of 1 / H.

    Source: Hassibi and Stork 1993 (Optimal Brain Surgeon).

    Args:
        matrix: [blocks, rows, columns].
        moment: [blocks, columns + 1, columns + 1]; the last is that of the bias.
    """
    costs = []
    for block, known in zip(matrix, moment[:, :-1, :-1].astype(np.float64), strict=True):
        inverse = np.linalg.inv(known + ridge(known) * np.eye(len(known)))
        costs.append(np.abs(block) / np.sqrt(np.diag(inverse)))
    return np.stack(costs)


def dense_moments(
    model: ir.Model, layers: Sequence[Layer], feeds: Feeds, seed: int = 0
) -> dict[str, Wide]:
    """Of each layer as it is, [blocks, columns + 1, columns + 1]: the sum of x x^T over the samples, x with a 1."""
    groups = grouped_by_source(model, layers)
    stops = [group[0].source for group in groups]
    pieces = cut(model.graph, stops)
    streams = Streams(model, feeds)
    found: dict[str, Wide] = {}
    for piece, group in zip(pieces, groups, strict=True):
        streams.run(piece, {})
        for alike in by_window(group):
            moments, _ = _seen(alike[0], streams, len(feeds), seed)
            found |= {layer.name: moments.moment for layer in alike}
    return found


def fitted(layers: Sequence[Layer], wanted: Mapping[Layer, Goal]) -> dict[Layer, Goal]:
    """The goals, and for each layer that keeps all its weights the goal to fit them to what was lost before it."""
    if not wanted:
        return dict(wanted)
    kept = {
        layer: Goal()
        for layer in layers
        if layer not in wanted and not layer.is_bound and not layer.is_hidden
    }
    return {
        layer: (dict(wanted) | kept)[layer] for layer in layers if layer in wanted or layer in kept
    }


def method_for(request: SparsityRequest, *, samples: bool) -> Method:
    """The method that a request means."""
    if not samples:
        return Method.MAGNITUDE
    if request.method is not Method.AUTO:
        return request.method
    high = request.ratio is not None and request.ratio >= ADMM_FROM
    return Method.ADMM if high else Method.SPARSEGPT


def prune_blind(wanted: dict[Layer, Goal]) -> list[Pruned]:
    """Magnitude pruning without samples: the weights that stay are as they were."""
    found = []
    for layer, goal in wanted.items():
        matrix = layer.matrix()
        flat = matrix.reshape(-1, matrix.shape[-1])
        mask = goal.mask(np.abs(flat))
        found.append(_pruned(layer, np.where(mask, flat, 0.0).reshape(matrix.shape), None))
    return found


def prune_fitted(  # noqa: PLR0913  a model, what is wanted of it, samples, and how
    model: ir.Model,
    wanted: dict[Layer, Goal],
    feeds: Feeds,
    method: Method,
    *,
    fit: bool = True,
    seed: int = 0,
    given: Mapping[str, ir.TensorProtocol] | None = None,
) -> list[Pruned]:
    """Prunes in the order of the graph, each layer fitted to the dense model given what was pruned before it.

    Layers that read the same value in the same way share their moments.  Memory: the moments of one such group, and
    the values that later layers read.  `given` are constants, by name, that are
    not what they were, either: what is lost by them is made up for, too.
    """
    groups = grouped_by_source(model, list(wanted))
    stops = [group[0].source for group in groups]
    pieces = cut(model.graph, stops, partners(groups))
    release(model)  # what was read to spread the zeros
    feeds = _that_fit(model, pieces, feeds)
    streams = Streams(model, feeds)
    new: dict[str, ir.TensorProtocol] = dict(given or {})
    found: list[Pruned] = []
    for piece, group in zip(pieces, groups, strict=True):
        streams.run(piece, new)
        for layers in by_window(group):
            moments, lost = _seen(layers[0], streams, len(feeds), seed)
            chosen = [layer for layer in layers if wanted[layer].removes or lost]
            aims = [_aims(layer, moments) for layer in chosen]
            moments.forget_cross()
            for layer, aim in zip(chosen, aims, strict=True):
                done = _fit(layer, wanted[layer], moments, aim, method, fit=fit)
                found.append(done)
                new[layer.name] = done.weight
                if done.bias is not None and layer.bias is not None:
                    new[layer.bias.name or ""] = ir.Tensor(done.bias)
                if layer.is_hidden:
                    streams.run(streams.again(layer.node), new)
        release(model)
    return found


def _seen(layer: Layer, streams: Streams, batches: int, seed: int) -> tuple[Moments, bool]:
    """The moments of what a layer reads, and whether anything was lost before it."""
    moments, lost = Moments(layer, batches, seed), False
    partner = layer.partner
    gaps = streams.gaps("" if partner is None else partner.name or "", {})
    for (dense, pruned), gap in zip(streams.pairs(layer.source.name or ""), gaps, strict=True):
        moments.add(layer.seen(dense), layer.seen(pruned), gap)
        lost = lost or dense is not pruned or gap is not None
    return moments, lost


def release(model: ir.Model) -> None:
    """Lets go of the pages of mapped weights that were read; they are read again when they are needed."""
    let_go([v.const_value for v in model.graph.initializers.values() if v.const_value is not None])


def _that_fit(model: ir.Model, pieces: Sequence[Piece], feeds: Feeds) -> Feeds:
    """As many of the samples as can be held half way through the model, measured on the first of them."""
    probe = Streams(model, feeds[:1])
    most = 1
    for piece in pieces:
        probe.run(piece, {})
        most = max(most, probe.bytes_held)
        release(model)
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    return feeds[: max(int(max(MIN_HELD_BYTES, HELD_SHARE * weights)) // (2 * most), 1)]


def grouped_by_source(model: ir.Model, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers by the value that they read, in the order in which the graph makes those values."""
    place = {node: index for index, node in enumerate(model.graph)}
    by_source: defaultdict[tuple[ir.Value, bool], list[Layer]] = defaultdict(list)
    for layer in layers:
        by_source[layer.source, layer.is_hidden].append(layer)

    def when(group: list[Layer]) -> int:
        producer = group[0].source.producer()
        return -1 if producer is None else place[producer]

    return sorted(by_source.values(), key=when)


def by_window(group: list[Layer]) -> list[list[Layer]]:
    """Layers that read one value in the same way and add to the same, and so share their moments."""
    found: defaultdict[tuple[Window | None, ir.Value | None], list[Layer]] = defaultdict(list)
    for layer in group:
        found[layer.window, layer.partner].append(layer)
    return list(found.values())


def _aims(layer: Layer, moments: Moments) -> list[Wide]:
    """What the blocks of a layer shall make."""
    return [
        moments.aim(weight, block, weight.shape[1])
        for block, weight in enumerate(_augmented(layer, moments))
    ]


def _augmented(layer: Layer, moments: Moments) -> list[Wide]:
    """The blocks of a matrix in the precision of the moments, the bias as their last column, where there is one."""
    dtype, bias = moments.moment.dtype, layer.bias_vector()
    blocks = [block.astype(dtype) for block in in_parts(layer, layer.matrix())]
    if bias is None:
        return blocks
    count = parts(layer)
    columns = np.repeat(bias / count, count).reshape(-1, count).T if count > 1 else bias
    columns = columns.reshape(len(blocks), -1, 1).astype(dtype)
    return [np.concatenate(pair, axis=1) for pair in zip(blocks, columns, strict=True)]


def in_parts(layer: Layer, matrix: Wide) -> Wide:
    """[blocks, rows, columns] as the moments of the layer see it: a wide matrix [1, ...] as one block a part."""
    count = parts(layer)
    if count == 1:
        return matrix
    return np.moveaxis(matrix[0].reshape(matrix.shape[1], count, -1), 1, 0)


def _joined(layer: Layer, solved: Wide) -> Wide:
    """What `in_parts` did, undone."""
    if parts(layer) == 1:
        return solved
    return np.moveaxis(solved, 0, 1).reshape(1, solved.shape[1], -1)


def _fit(
    layer: Layer, goal: Goal, moments: Moments, aims: list[Wide], method: Method, *, fit: bool
) -> Pruned:
    has_bias = layer.bias_vector() is not None
    blocks = _augmented(layer, moments)
    counts = spread_over_blocks(blocks, moments.moment, goal.zeros, fixed=int(has_bias))
    done = []
    for weight, moment, aim, zeros in zip(blocks, moments.moment, aims, counts, strict=True):
        used = weight.shape[1]
        share = dataclasses.replace(goal, zeros=zeros, fixed=int(has_bias))
        found = solve(weight, moment[:used, :used], aim, share, method, fit=fit)
        done.append(_cleaned(*found))
    solved = np.stack(done)
    if not has_bias:
        return _pruned(layer, _joined(layer, solved), None)
    bias = solved[..., -1].sum(0) if parts(layer) > 1 else solved[..., -1].reshape(-1)
    return _pruned(layer, _joined(layer, solved[..., :-1]), bias)


def spread_over_blocks(
    blocks: Sequence[Wide], moments: Wide, zeros: int, *, fixed: int
) -> list[int]:
    """How many zeros each block of a layer gets: the weights that move its output least go first, wherever they are.

    A depthwise convolution has as many blocks as channels, and some channels hardly matter.

    Args:
        blocks: the matrices.
        moments: second moments of what each reads.
        zeros: of all blocks.
        fixed: columns at the end that always stay (the bias).
    """
    if len(blocks) == 1 or not zeros:
        return [zeros // len(blocks)] * len(blocks)
    scores = [
        np.square(block[:, : block.shape[1] - fixed]) * np.diag(moment)[: block.shape[1] - fixed]
        for block, moment in zip(blocks, moments, strict=True)
    ]
    keep = smallest(np.stack(scores), zeros)
    return [int(np.sum(~part)) for part in keep]


def _cleaned(weight: Wide, mask: Mask) -> Wide:
    """The weights with +0.0 where they are pruned: -0.0 would count as a value in the file."""
    return np.where(mask, weight, 0.0) + 0.0


def _pruned(layer: Layer, matrix: Wide, bias: Wide | None) -> Pruned:
    weight = layer.stored(matrix)
    stored = None
    if bias is not None and layer.bias is not None and layer.bias.const_value is not None:
        like = layer.bias.const_value
        stored = bias.reshape(like.shape.numpy()).astype(like.dtype.numpy())
    return Pruned(
        layer, thin(weight, layer.tensor.dtype, layer.name), stored, float(np.mean(weight == 0))
    )
