"""Adds samples of one value up, at little more than what it takes to look at each element once.

Extremes are exact.  Of large tensors, all channels at evenly spread positions are counted.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
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
    split,
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


class Tally:
    """What one value holds over the samples so far.

    What each sample gave waits to be added until there is much of it, because small steps cost most in NumPy; when
    it is added does not show.

    Args:
        room: elements that may wait.
    """

    def __init__(self, room: int = 4 * DENSE) -> None:
        self._room, self._waiting = room, 0
        self._histogram = np.zeros(KEYS, np.int64)
        self._parts: list[Array] = []
        self._ends: list[tuple[float, float]] = []
        self._low, self._high = np.inf, -np.inf
        self._sums = np.zeros((LIMBS, 2), np.int64)
        self._samples = self._elements = self._excluded = 0
        self._channels, self._last = _Axis(), _Axis()

    def add(self, given: Observed, axes: Sequence[int] = (1, -1)) -> None:
        """Takes one sample into account, and channels along axis 1, the last, or both."""
        blocks = given.blocks if 1 in axes else None
        if blocks is None:
            self._add(np.ascontiguousarray(given.plain, np.float32), axes, given.floor)
            return
        part = _positions(blocks)
        if self._is_signal(blocks, part, given.floor):
            self._channels.add(part, blocks.size)
            self._count(part)

    def _add(self, array: Array, axes: Sequence[int], floor: float | None) -> None:
        if array.size == 0:
            return
        looks_last = -1 in axes and array.ndim <= 3
        parts = [
            _part(array, 1) if 1 in axes else None,
            _part(array, array.ndim - 1) if looks_last else None,
        ]
        counted = next((part for part in parts if part is not None), None)
        counted = array.reshape(-1)[:: stride(array.size)] if counted is None else counted
        if self._is_signal(array, counted, floor):
            self._channels.add(parts[0], array.size)
            self._last.add(parts[1], array.size)
            self._count(counted)

    def _is_signal(self, array: Array, part: Array, floor: float | None) -> bool:
        """Notes extremes; where something is no signal, it is left out, and with it what is known of channels."""
        high = float(array.max())  # NaN where there is one
        low = float(array.min() if floor is None or part.min() != floor else floor)
        self._elements += array.size
        if -SENTINEL < low <= high < SENTINEL:
            self._note(low, high)
            return True
        self._channels.drop()
        self._last.drop()
        kept = array[np.abs(array) < SENTINEL]  # NaN compares false
        self._excluded += array.size - kept.size
        if kept.size:
            self._note(float(kept.min()), float(kept.max()))
            self._count(kept[:: stride(kept.size)])
        return False

    def _note(self, low: float, high: float) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._ends.append((low, high))
        self._samples += 1

    def _count(self, part: Array) -> None:
        """Lets elements wait for the histogram."""
        self._parts.append(part.flatten())  # the next run overwrites what it may be a view of
        self._waiting += part.size
        if self._waiting > self._room:
            self._settle()

    def _settle(self) -> None:
        if self._parts:
            keys = np.concatenate(self._parts).view(np.uint32) >> 16
            self._histogram += np.bincount(keys, minlength=KEYS)
        if self._ends:
            self._sums = carried(self._sums + split(self._ends).sum(axis=1))
        self._parts, self._ends, self._waiting = [], [], 0
        self._channels.settle()
        self._last.settle()

    def total(self) -> Statistics:
        """What was seen so far."""
        self._settle()
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
    """What each index of one axis holds: sums, sums of squares, extremes."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Array, Array, Array, Array]] = []
        self._weights: list[float] = []
        self._found: Channels | None = None
        self._is_dropped = False

    def drop(self) -> None:
        """Something was left out, or the axis varied: its indices say nothing of one another."""
        self._is_dropped, self._waiting, self._weights, self._found = True, [], [], None

    def add(self, part: Array | None, size: int) -> None:
        """Takes evenly spread elements of one sample into account.

        Args:
            part: float32 [positions, channels], or [outer, channels, positions] where positions are many; None where
                the value has no such axis.
            size: how many elements they stand for.
        """
        if part is None:
            self.drop()
        elif not self._is_dropped:
            self._waiting.append(_reduced(part))
            self._weights.append(size / part.size)

    def settle(self) -> None:
        """Adds up what waits."""
        if not self._waiting:
            return
        known = self._found.ends.shape[1] if self._found else len(self._waiting[0][0])
        if any(len(sums) != known for sums, *_ in self._waiting):
            self.drop()
            return
        sums, squares, low, high = (
            np.array(each, np.float64) for each in zip(*self._waiting, strict=True)
        )
        weights = np.array(self._weights)[:, None]
        limbs = [split(each * weights).sum(axis=1) for each in (sums, squares)]
        ends = np.stack([low.min(axis=0), high.max(axis=0)])
        if (found := self._found) is not None:
            limbs = [limbs[0] + found.sums, limbs[1] + found.squares]
            ends = np.stack(
                [np.minimum(ends[0], found.ends[0]), np.maximum(ends[1], found.ends[1])]
            )
        self._found = Channels(carried(limbs[0]), carried(limbs[1]), ends)
        self._waiting, self._weights = [], []

    def total(self) -> Channels:
        """What was added up."""
        return self._found or NO_CHANNELS


def _reduced(part: Array) -> tuple[Array, Array, Array, Array]:
    """Sums, sums of squares, minima and maxima by channel: [channels] each."""
    if part.ndim == 2:
        wide = np.float64 if len(part) > _SHORT else None
        sums, squares = np.add.reduce(part, axis=0, dtype=wide), np.einsum("sc,sc->c", part, part)
        return sums, squares, np.minimum.reduce(part, axis=0), np.maximum.reduce(part, axis=0)
    sums = part.sum(axis=2).sum(axis=0, dtype=np.float64)  # NumPy adds a contiguous row pairwise
    squares = np.einsum("ocs,ocs->c", part, part)
    return sums, squares, part.min(axis=(0, 2)), part.max(axis=(0, 2))


def stride(size: int) -> int:
    """The step that leaves about `DENSE` of so many elements."""
    return STRIDES[min(bisect.bisect_left(STRIDES, size // DENSE), len(STRIDES) - 1)]


def _part(array: Array, axis: int) -> Array | None:
    """Evenly spread elements, all indices of an axis other than the first; see `_Axis.add`."""
    if not 1 <= axis < array.ndim:
        return None
    channels, inner = array.shape[axis], math.prod(array.shape[axis + 1 :])
    rows = array.reshape(-1, channels, inner)
    step = stride(array.size)
    part = rows[:, :, ::step] if inner > step else rows[::step]
    if part.shape[2] < _WIDE:  # a short inner axis costs more than turning the array
        part = part.transpose(0, 2, 1).reshape(-1, channels)
    return np.ascontiguousarray(part)


def _positions(blocks: Array) -> Array:
    """The same of a value in blocks of channels [N, blocks, positions, channels of a block]."""
    count, inner = len(blocks), blocks.shape[2]
    step = stride(blocks.size)
    part = blocks[:, :, ::step] if inner > step else blocks
    return part.transpose(0, 2, 1, 3).reshape(count * part.shape[2], -1)
