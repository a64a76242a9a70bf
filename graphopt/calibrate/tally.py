"""Adds samples of one value up, at little more than what it takes to look at each element once.

Extremes are exact.  Of large tensors, all channels at evenly spread positions are counted.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from graphopt.calibrate.statistics import (
    KEYS,
    LIMBS,
    NO_CHANNELS,
    SENTINEL,
    Channels,
    Statistics,
    carried,
    split_sum,
)
from graphopt.runtime.observing import Observed

Array: TypeAlias = "np.ndarray[Any, Any]"

DENSE = 1 << 13
"""Elements of one tensor and sample that are all counted; of larger ones, about so many, evenly spread."""

STRIDES = (1, 2, 3, 5, 7, 11, 13, 17, 23, 31, 41, 53, 61, 89, 127, 257, 509)
"""Steps through a large tensor: primes, so that no step falls in with its rows or channels."""

_WIDE = 128
"""Elements from which on NumPy reduces a contiguous axis at full speed."""

_SHORT = 128
"""Terms that float32 adds up with errors that do not matter."""

_NEAR = 1 << 17
"""Elements that stay in the cache while they are looked at twice."""


class Tally:
    """What one value holds over the samples so far.

    What each sample gave waits to be added until there is much of it, because small steps cost most in NumPy; when
    it is added does not show.

    Args:
        room: elements that may wait.
    """

    def __init__(self, room: int = 4 * DENSE) -> None:
        self._histogram = np.zeros(KEYS, np.int64)
        self._ends: list[tuple[float, float]] = []
        self._low, self._high = np.inf, -np.inf
        self._sums = np.zeros((LIMBS, 2), np.int64)
        self._samples = self._elements = self._excluded = 0
        self._channels, self._last, self._flat = (_Axis(self._histogram, room) for _ in range(3))
        self._flat.drop()

    def add(self, given: Observed, axes: Sequence[int] = (1, -1)) -> None:
        """Takes one sample into account, and channels along axis 1, the last, or both."""
        if given.array.size == 0:
            return
        blocks = given.blocks if 1 in axes else None
        if blocks is None:
            array = np.ascontiguousarray(given.plain, np.float32)
            whole, parts = [array], self._parts(array, axes)
        else:
            whole = _whole(blocks, given.channels)
            parts = [(self._channels, *_positions(blocks, given.channels))]
        size = sum(each.size for each in whole)
        self._elements += size
        seen = [axis.look(view, shape) for axis, view, shape in parts]
        low, high = _ends(whole, given.floor, seen[0])
        if not -SENTINEL < low <= high < SENTINEL:
            self._leave_out(np.concatenate([each.reshape(-1) for each in whole]))
            return
        self._note(low, high)
        for index, (axis, *_) in enumerate(parts):
            axis.keep(size, counted=index == 0)

    def _parts(
        self, array: Array, axes: Sequence[int]
    ) -> list[tuple[_Axis, Array, tuple[int, ...]]]:
        """What is counted of a sample, the first for the histogram too; see `_Axis.look`."""
        looked = [(self._channels, 1 in axes, 1)]
        looked += [(self._last, -1 in axes and array.ndim <= 3, array.ndim - 1)]
        found: list[tuple[_Axis, Array, tuple[int, ...]]] = []
        for axis, is_wanted, index in looked:
            if is_wanted and 1 <= index < array.ndim:
                found.append((axis, *_part(array, index)))
            else:
                axis.drop()
        flat = array.reshape(-1)[:: stride(array.size)]
        return found or [(self._flat, flat, flat.shape)]

    def _leave_out(self, array: Array) -> None:
        """Counts a sample in which something is no signal without that; of channels nothing is known then."""
        self._channels.drop()
        self._last.drop()
        kept = array[np.abs(array) < SENTINEL]  # NaN compares false
        self._excluded += array.size - kept.size
        if kept.size:
            self._note(float(kept.min()), float(kept.max()))
            _count(self._histogram, kept[:: stride(kept.size)])

    def _note(self, low: float, high: float) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._ends.append((low, high))
        self._samples += 1
        if len(self._ends) == _ROWS:
            self._sum_ends()

    def _sum_ends(self) -> None:
        if self._ends:
            self._sums = carried(self._sums + split_sum(np.array(self._ends)))
        self._ends = []

    def total(self) -> Statistics:
        """What was seen so far."""
        for axis in (self._channels, self._last, self._flat):
            axis.settle()
        self._sum_ends()
        return Statistics(
            self._histogram.copy(),
            minimum=self._low,
            maximum=self._high,
            low_sum=self._sums[:, 0],
            high_sum=self._sums[:, 1],
            samples=self._samples,
            elements=self._elements,
            excluded=self._excluded,
            channels=self._channels.total(),
            last=self._last.total(),
        )


class _Axis:
    """What each index of one axis holds: sums, sums of squares, extremes; and what is counted of all.

    Args:
        histogram: what elements are counted in.
        room: elements that may wait.
    """

    def __init__(self, histogram: Array, room: int) -> None:
        self._histogram, self._room = histogram, room
        self._waiting = np.empty((0, 0), np.float32)
        self._weights: list[float] = []
        self._is_counted = self._is_dropped = False
        self._found: Channels | None = None

    def drop(self) -> None:
        """Something was left out, or the axis varied: its indices say nothing of one another."""
        self._is_dropped, self._found = True, None

    def look(self, view: Array, shape: tuple[int, ...]) -> Array:
        """Lets elements of one sample wait, for as long as `keep` is not called to be overwritten by the next.

        Args:
            view: the elements.
            shape: how they are laid out then: [positions, channels], or [outer, channels, positions] where positions
                are many.
        """
        if self._waiting.shape[1:] != shape:
            self.settle()
            slots = max(self._room // max(view.size, 1), 1)
            self._waiting = np.empty((slots, *shape), np.float32)
        found: Array = self._waiting[len(self._weights)]
        np.copyto(found.reshape(view.shape), view)
        return found

    def keep(self, size: int, *, counted: bool) -> None:
        """What was looked at last counts, for so many elements; in the histogram too, or not."""
        if counted != self._is_counted and self._weights:
            last = self._waiting[len(self._weights)].copy()
            self.settle()
            self._waiting[0] = last
        self._is_counted = counted
        self._weights.append(size / max(self._waiting[0].size, 1))
        if len(self._weights) == len(self._waiting):
            self.settle()

    def settle(self) -> None:
        """Adds up what waits."""
        if not self._weights:
            return
        filled, weights = self._waiting[: len(self._weights)], np.array(self._weights)
        self._weights = []
        if self._is_counted:
            _count(self._histogram, filled)
        if self._is_dropped:
            return
        numbers, ends = _reduced(filled)
        limbs = split_sum((numbers * weights[:, None]).transpose(1, 0, 2))
        if (found := self._found) is not None:
            if found.ends.shape != ends.shape:
                self.drop()
                return
            limbs = limbs + np.stack([found.sums, found.squares], axis=1)
            ends = np.stack(
                [np.minimum(ends[0], found.ends[0]), np.maximum(ends[1], found.ends[1])]
            )
        limbs = carried(limbs)
        self._found = Channels(limbs[:, 0], limbs[:, 1], ends)

    def total(self) -> Channels:
        """What was added up."""
        return self._found or NO_CHANNELS


_ROWS = 64
"""Samples whose extremes wait to be added up."""


def _count(histogram: Array, elements: Array) -> None:
    """Counts elements by the upper half of their bits."""
    keys = np.ascontiguousarray(elements).reshape(-1).view(np.uint32) >> 16
    found = np.bincount(keys)
    histogram[: len(found)] += found


def _reduced(waiting: Array) -> tuple[Array, Array]:
    """Sums and sums of squares [2, samples, channels], and extremes over all samples [2, channels], in float64.

    The sums of one sample are the same bits however many wait: NumPy adds along one axis in one order.
    """
    squares = waiting * waiting
    if waiting.ndim == 3:
        flat = waiting.reshape(-1, waiting.shape[2])
        ends = np.stack([np.minimum.reduce(flat), np.maximum.reduce(flat)]).astype(np.float64)
        if waiting.shape[1] > _SHORT:
            waiting, squares = waiting.astype(np.float64), squares.astype(np.float64)
        numbers = [np.add.reduce(each, axis=1) for each in (waiting, squares)]
    else:
        ends = np.stack([waiting.min(axis=(0, 1, 3)), waiting.max(axis=(0, 1, 3))])
        ends = ends.astype(np.float64)
        rows = [np.add.reduce(each, axis=3).astype(np.float64) for each in (waiting, squares)]
        numbers = [np.add.reduce(each, axis=1) for each in rows]  # rows were added pairwise
    return np.array(numbers, np.float64), ends


def _ends(whole: Sequence[Array], floor: float | None, seen: Array) -> tuple[float, float]:
    """The least and the greatest element, NaN where there is one; looked at once where a floor is known to be met."""
    is_met = floor is not None and bool(seen.min() == floor)
    lows: list[float] = [float(floor)] if is_met and floor is not None else []
    highs: list[float] = []
    for array in whole:
        for near in _near(array) if not is_met else (array,):
            highs.append(float(near.max()))
            if not is_met:
                lows.append(float(near.min()))
    if len(highs) == 1:
        return lows[0], highs[0]
    return float(np.min(lows)), float(np.max(highs))


def _near(array: Array) -> Iterator[Array]:
    """The array in parts that stay in the cache."""
    if array.size <= _NEAR or not array.flags.c_contiguous:
        yield array
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, _NEAR):
        yield flat[start : start + _NEAR]


def stride(size: int) -> int:
    """The step that leaves about `DENSE` of so many elements."""
    return STRIDES[min(bisect.bisect_left(STRIDES, size // DENSE), len(STRIDES) - 1)]


def _part(array: Array, axis: int) -> tuple[Array, tuple[int, ...]]:
    """Evenly spread elements, all indices of an axis other than the first; see `_Axis.look`."""
    channels, inner = array.shape[axis], math.prod(array.shape[axis + 1 :])
    rows = array.reshape(-1, channels, inner)
    step = stride(array.size)
    part = rows[:, :, ::step] if inner > step else rows[::step]
    if part.shape[2] < _WIDE:  # a short inner axis costs more than turning the array
        return part.transpose(0, 2, 1), (part.shape[0] * part.shape[2], channels)
    return part, part.shape


def _positions(blocks: Array, channels: int) -> tuple[Array, tuple[int, ...]]:
    """The same of a value in blocks of channels [N, blocks, positions, channels of a block]."""
    inner = blocks.shape[2]
    step = stride(blocks.size)
    part = blocks[:, :, ::step] if inner > step else blocks
    part = part.transpose(0, 2, 1, 3)
    shape = (part.shape[0] * part.shape[1], channels)
    padded = part.shape[2] * part.shape[3]
    return (part if padded == channels else part.reshape(-1, padded)[:, :channels]), shape


def _whole(blocks: Array, channels: int) -> list[Array]:
    """Every element of a value in blocks, without what pads the last of them."""
    full, rest = divmod(channels, blocks.shape[3])
    found = [blocks[:, :full]] if full else []
    return [*found, blocks[:, full, :, :rest]] if rest else found
