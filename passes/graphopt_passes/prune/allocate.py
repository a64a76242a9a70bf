"""How many weights of each layer become zero.  Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from graphopt_passes.prune.layers import Wide
from graphopt_passes.prune.request import Allocation

FLOOR = 0.01
"""Least share of a layer that stays."""

ROUGH_FROM = 1 << 19
"""Scores from which on a sample of them tells where about the limit lies."""

_SAMPLED = 1 << 16


def allocate(weights: Sequence[Wide], zeros: int, how: Allocation) -> list[int]:
    """Zeros of each layer; they add up to `zeros` unless every layer is at its floor.

    Args:
        weights: of each layer, any shape.
        zeros: wanted in all.
        how: uniform: the same share of each.  global: the smallest of all weights.  LAMP: the smallest scores
            w^2 / sum of the squares not smaller in the layer, so that no layer loses its greatest weights (Lee et al.
            2021).  ERK: density in proportion to (sum of dims) / (product of dims) (Evci et al. 2020).
    """
    if how is Allocation.MIXED:
        parts = [allocate(weights, zeros, each) for each in (Allocation.LAMP, Allocation.ERK)]
        return halfway(*parts)
    sizes = [weight.size for weight in weights]
    most = [size - max(int(np.ceil(FLOOR * size)), 1) for size in sizes]
    if how is Allocation.UNIFORM:
        wanted = [round(zeros * size / sum(sizes)) for size in sizes]
    elif how is Allocation.ERK:
        wanted = _erdos_renyi(weights, zeros)
    else:
        score = lamp_scores if how is Allocation.LAMP else np.abs
        wanted = _smallest([np.asarray(score(w.reshape(-1))) for w in weights], zeros)
    return _within(wanted, most, zeros)


def halfway(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Counts between those of two ways."""
    return [(mine + theirs) // 2 for mine, theirs in zip(one, other, strict=True)]


def allocate_large(
    weights: Iterable[Wide], sizes: Sequence[int], zeros: int, how: Allocation
) -> list[int]:
    """As `allocate` for LAMP and global, with one layer in memory at a time.

    Scores are counted in classes of the upper half of their float32 bits, 1/128 apart; the class in which the limit
    lies gives the same share of each layer.
    """
    score = _ascending_lamp_scores if how is Allocation.LAMP else np.abs
    counts = np.stack(
        [_classes(np.asarray(score(w.reshape(-1).astype(np.float32)))) for w in weights]
    )
    below = np.cumsum(counts.sum(0))
    limit = int(np.searchsorted(below, zeros))
    whole = counts[:, :limit].sum(1)
    at = counts[:, limit] if limit < counts.shape[1] else np.zeros(len(counts), np.int64)
    share = (zeros - int(whole.sum())) / max(int(at.sum()), 1)
    wanted = [int(count) for count in whole + np.floor(share * at).astype(np.int64)]
    most = [size - max(int(np.ceil(FLOOR * size)), 1) for size in sizes]
    return _within(wanted, most, zeros)


def _classes(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    bits = scores.astype(np.float32).view(np.uint32) >> 16
    return np.bincount(bits, minlength=1 << 16)


def lamp_scores(weights: Wide) -> Wide:
    """w_i^2 over the sum of all squares not smaller, for flat weights."""
    squares = np.square(weights)
    order = np.argsort(squares, kind="stable")
    scores = np.empty_like(squares)
    scores[order] = _over_the_rest(squares[order])
    return scores


def _ascending_lamp_scores(weights: Wide) -> Wide:
    """The scores in ascending order: to sort numbers takes a fraction of the time that it takes to find their order."""
    return _over_the_rest(np.sort(np.square(weights)))


def _over_the_rest(ascending: Wide) -> Wide:
    """Each of ascending numbers over the sum of it and those after it."""
    rest = np.cumsum(ascending[::-1], dtype=np.float64)[::-1]
    return np.asarray(ascending / np.where(rest > 0, rest, 1.0))


def smallest(scores: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.bool_]:
    """A mask of the shape of `scores`, False at the `count` smallest; ties go by position."""
    flat = scores.reshape(-1)
    if not 0 < count < flat.size:
        return np.full(scores.shape, count <= 0)
    limit = np.partition(flat, count - 1)[count - 1]
    keep = flat > limit
    ties = np.flatnonzero(flat == limit)
    keep[ties[count - int((flat < limit).sum()) :]] = True
    return np.asarray(keep.reshape(scores.shape), bool)


def smallest_about(scores: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.bool_]:
    """As `smallest`, for about `count` of many: a sample of the scores, evenly spaced, tells the limit."""
    if not 0 < count < scores.size:
        return np.full(scores.shape, count <= 0)
    step = scores.size // _SAMPLED
    sample = scores.reshape(-1)[
        :: step + 1 - step % 2
    ]  # odd: not the same few columns again and again
    at = min(count * sample.size // scores.size, sample.size - 1)
    return np.asarray(scores > np.partition(sample, at)[at], bool)


def _smallest(scores: list[npt.NDArray[np.floating]], zeros: int) -> list[int]:
    dropped = ~smallest(np.concatenate(scores), zeros)
    ends = np.cumsum([score.size for score in scores])
    return [int(part.sum()) for part in np.split(dropped, ends[:-1])]


def _erdos_renyi(weights: Sequence[Wide], zeros: int) -> list[int]:
    sizes = np.array([weight.size for weight in weights], float)
    raw = np.array([sum(weight.shape) for weight in weights], float) / sizes
    full = np.zeros(len(weights), bool)
    kept = sizes.sum() - zeros
    while True:
        room = kept - sizes[full].sum()
        scale = room / max(float((raw * sizes)[~full].sum()), 1e-12)
        over = ~full & (scale * raw > 1)
        if not over.any():
            break
        full |= over
    density = np.where(full, 1.0, np.clip(scale * raw, 0, 1))
    return [int(zero) for zero in np.rint(sizes * (1 - density))]


def _within(wanted: list[int], most: list[int], zeros: int) -> list[int]:
    """The counts, none above its limit; what is cut off goes to the layers with room, in proportion to it."""
    given = [min(want, limit) for want, limit in zip(wanted, most, strict=True)]
    left = min(zeros, sum(most)) - sum(given)
    room = np.array(most) - np.array(given)
    if left > 0:
        extra = np.floor(left * room / max(int(room.sum()), 1)).astype(int)
        given = [count + int(more) for count, more in zip(given, extra, strict=True)]
    return given
