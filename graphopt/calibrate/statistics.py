"""What values look like over all samples: one pass, memory that does not grow, the same bits in any order.

A histogram on the bfloat16 bit pattern of each element needs no range beforehand, adds up across samples and processes,
and is fine where values are dense: its bins are 2^-7 to 2^-8 of what they hold.  Minimum and maximum are exact.  Sums
are kept as integers, so that adding them is associative and any split over workers gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from graphopt.errors import DataError
from graphopt.ir.atomic import write_file
from graphopt.verify.feed_files import read_npz

Array: TypeAlias = "np.ndarray[Any, Any]"

KEYS = 1 << 16
VERSION = 3
SENTINEL = 1e9
"""Magnitude from which on a value is a mask or a sentinel, not a signal: they are counted, not measured."""

LIMBS = 3
"""Integers that an exact sum is kept in."""

_BITS = 50
_UNIT = 2.0**_BITS
"""One of an integer in units of the next."""

_TOP = 2.0**40
"""One of the first integer; so what the last counts is 2^-60, and 2^103 fits."""


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """What each index of one axis holds.

    Attributes:
        sums: in three integers: int64 [3, channels].
        squares: sums of squares, likewise.
        ends: the least and the greatest element: float64 [2, channels].

    Of large tensors, of the elements that are counted.
    """

    sums: Array
    squares: Array
    ends: Array


NO_CHANNELS = Channels(
    np.zeros((LIMBS, 0), np.int64), np.zeros((LIMBS, 0), np.int64), np.zeros((2, 0))
)
"""Where the size of an axis varied, or something was left out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """One value over some samples.

    Attributes:
        histogram: how many elements have each bfloat16 pattern; large tensors are counted in part: int64 [65536].
        minimum: the least finite element that is no sentinel; +inf where there was none.
        maximum: the greatest; -inf where there was none.
        low_sum: sum over samples of the least element of each, in three integers: int64 [3].
        high_sum: of the greatest: int64 [2].
        samples: how many had a finite element.
        elements: how many there were in all.
        excluded: how many were NaN, infinite or sentinels.
        channels: by index of axis 1.
        last: by index of the last axis; not of images and volumes, which have four axes and more.
    """

    histogram: Array
    minimum: float = np.inf
    maximum: float = -np.inf
    low_sum: Array = dataclasses.field(default_factory=lambda: np.zeros(LIMBS, np.int64))
    high_sum: Array = dataclasses.field(default_factory=lambda: np.zeros(LIMBS, np.int64))
    samples: int = 0
    elements: int = 0
    excluded: int = 0
    channels: Channels = dataclasses.field(default_factory=lambda: NO_CHANNELS)
    last: Channels = dataclasses.field(default_factory=lambda: NO_CHANNELS)

    @property
    def is_empty(self) -> bool:
        """Whether no element was finite."""
        return self.samples == 0

    @property
    def mean_range(self) -> tuple[float, float]:
        """Means over samples of the least and of the greatest element."""
        count = max(self.samples, 1)
        return float(joined(self.low_sum)) / count, float(joined(self.high_sum)) / count

    def channel_means(self, axis: int) -> Array | None:
        """Mean of each index of axis 1 or -1, float64; None where its size varied or something was excluded.

        Of large tensors from a part of the elements.
        """
        return self._mean(self.by_axis(axis).sums)

    def channel_powers(self, axis: int) -> Array | None:
        """Mean square of each index of axis 1 or -1, float64; of large tensors from a part of the elements."""
        return self._mean(self.by_axis(axis).squares)

    def channel_ranges(self, axis: int) -> tuple[Array, Array] | None:
        """Extremes of each index of axis 1 or -1, float64; None where the mean is; of large tensors from a part."""
        low, high = self.by_axis(axis).ends
        return None if low.size == 0 or self.excluded else (low, high)

    def by_axis(self, axis: int) -> Channels:
        """What is known of axis 1, or of the last."""
        return self.channels if axis == 1 else self.last

    def _mean(self, sums: Array) -> Array | None:
        count = sums.shape[1]
        if count == 0 or self.excluded or self.elements == 0:
            return None
        return np.asarray(joined(sums) * count / self.elements)

    def merged(self, other: Statistics) -> Statistics:
        """Of both sets of samples; associative and commutative to the last bit."""
        return Statistics(
            histogram=self.histogram + other.histogram,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            low_sum=carried(self.low_sum + other.low_sum),
            high_sum=carried(self.high_sum + other.high_sum),
            samples=self.samples + other.samples,
            elements=self.elements + other.elements,
            excluded=self.excluded + other.excluded,
            channels=_added(self.channels, other.channels, self, other),
            last=_added(self.last, other.last, self, other),
        )


def empty() -> Statistics:
    """Of no sample at all: the neutral element of `merged`."""
    return Statistics(np.zeros(KEYS, np.int64))


def split_sum(numbers: Array) -> Array:
    """Sums over the first axis as integers: multiples of 2^40, of 2^-10 and of 2^-60, int64 [3, ...]."""
    found = np.zeros((LIMBS, *numbers.shape[1:]), np.int64)
    for start in range(0, len(numbers), _SUMMED):
        left = np.asarray(numbers[start : start + _SUMMED], np.float64) * (_UNIT / _TOP)
        if left.size and max(left.max(), -left.min()) >= _UNIT:  # seldom: nothing is that large
            above = np.trunc(left / _UNIT)
            found[0] += above.astype(np.int64).sum(axis=0)
            left -= above * _UNIT
        whole = np.trunc(left)
        left -= whole
        left *= _UNIT
        # Integers below 2^50: so few of them add up in float64 without an error.
        found[1] += whole.sum(axis=0).astype(np.int64)
        found[2] += np.rint(left, out=left).sum(axis=0).astype(np.int64)
    return found


_SUMMED = 8
"""Numbers that are added up at once."""


def joined(limbs: Array) -> Array:
    """The numbers, float64, that integers stand for."""
    sign = np.where(limbs[0] < 0, -1, 1)  # by magnitude, so that nothing cancels
    limbs = carried(limbs * sign)
    found = limbs[LIMBS - 1].astype(np.float64)
    for index in reversed(range(LIMBS - 1)):
        found = limbs[index] + found / _UNIT
    return np.asarray(found * sign * _TOP)


def carried(limbs: Array) -> Array:
    """The same numbers with all but the first integer from 0 to 2^50: one form a number."""
    found = limbs.copy()
    for index in reversed(range(1, LIMBS)):
        carry = found[index] >> _BITS
        found[index] -= carry << _BITS
        found[index - 1] += carry
    return found


def _added(mine: Channels, theirs: Channels, me: Statistics, other: Statistics) -> Channels:
    if me.elements == 0:
        return theirs
    if other.elements == 0:
        return mine
    if mine.sums.shape != theirs.sums.shape or mine.ends.shape != theirs.ends.shape:
        return NO_CHANNELS
    ends = np.stack(
        [np.minimum(mine.ends[0], theirs.ends[0]), np.maximum(mine.ends[1], theirs.ends[1])]
    )
    return Channels(carried(mine.sums + theirs.sums), carried(mine.squares + theirs.squares), ends)


@dataclasses.dataclass(frozen=True)
class Collected:
    """Statistics of many values over many samples.

    Attributes:
        values: by name.
        samples: how many samples were run.
        model: what they were run through, as whoever collects them names it.
    """

    values: Mapping[str, Statistics]
    samples: int
    model: str = ""

    def merged(self, other: Collected) -> Collected:
        """Of both sets of samples."""
        names = dict.fromkeys((*self.values, *other.values))
        none = empty()
        return Collected(
            {n: self.values.get(n, none).merged(other.values.get(n, none)) for n in names},
            self.samples + other.samples,
            self.model or other.model,
        )

    def save(self, path: Path) -> None:
        """Writes the statistics as npz, whole or not at all; the same statistics give the same bytes.

        Raises:
            OptionError: the file system refuses.
        """
        names = list(self.values)
        arrays: dict[str, Array] = {}
        for index, name in enumerate(names):
            found = self.values[name]
            keys = np.flatnonzero(found.histogram)
            arrays[f"{index}.keys"] = keys
            arrays[f"{index}.counts"] = found.histogram[keys]
            arrays[f"{index}.range"] = np.array([found.minimum, found.maximum])
            arrays[f"{index}.sums"] = np.stack([found.low_sum, found.high_sum])
            arrays[f"{index}.numbers"] = np.array([found.samples, found.elements, found.excluded])
            for axis, each in (("channels", found.channels), ("last", found.last)):
                arrays[f"{index}.{axis}"] = np.stack([each.sums, each.squares])
                arrays[f"{index}.{axis}.ends"] = each.ends
        head = json.dumps(
            {"version": VERSION, "samples": self.samples, "model": self.model, "names": names}
        )
        written = io.BytesIO()
        np.savez(written, head=np.frombuffer(head.encode(), np.uint8), **arrays)  # type: ignore[arg-type, unused-ignore]
        write_file(path, written.getvalue())

    @classmethod
    def load(cls, path: Path) -> Collected:
        """Reads what `save` wrote.

        Raises:
            DataError: the file holds something else.
        """
        try:
            arrays = read_npz(path)
            head = _head(arrays)
            values = {name: _restored(arrays, index) for index, name in enumerate(head.names)}
        except (DataError, ValueError, KeyError, msgspec.MsgspecError) as error:
            told = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            told = told.removesuffix(" Write it with numpy.savez.").removesuffix(".")
            raise DataError(
                f"'{path}' cannot be read as calibration statistics: {told}. Name another file, or remove this one: "
                "they are collected again then."
            ) from error
        return cls(values, head.samples, head.model)


class _Head(msgspec.Struct):
    """What a file of statistics says of itself."""

    version: int
    samples: int
    model: str
    names: list[str]


def _head(arrays: Mapping[str, Array]) -> _Head:
    head = msgspec.json.decode(arrays["head"].tobytes(), type=_Head)
    if head.version != VERSION:
        raise ValueError(f"it has format {head.version}, not {VERSION}")
    return head


def _restored(arrays: Mapping[str, Array], index: int) -> Statistics:
    keys = _checked(arrays, f"{index}.keys", (None,))
    if keys.size and not 0 <= keys.min() <= keys.max() < KEYS:
        raise ValueError(f"'{index}.keys' are no patterns of 16 bits")
    histogram = np.zeros(KEYS, np.int64)
    histogram[keys] = _checked(arrays, f"{index}.counts", keys.shape)
    low, high = (float(x) for x in _checked(arrays, f"{index}.range", (2,), np.float64))
    samples, elements, excluded = (int(x) for x in _checked(arrays, f"{index}.numbers", (3,)))
    sums = _checked(arrays, f"{index}.sums", (2, LIMBS))
    if min(samples, elements, excluded, histogram.min()) < 0 or np.isnan([low, high]).any():
        raise ValueError(f"'{index}.numbers', '{index}.counts' or '{index}.range' are none")
    return Statistics(
        histogram,
        low,
        high,
        sums[0],
        sums[1],
        samples,
        elements,
        excluded,
        _restored_channels(arrays, f"{index}.channels"),
        _restored_channels(arrays, f"{index}.last"),
    )


def _restored_channels(arrays: Mapping[str, Array], key: str) -> Channels:
    sums, squares = _checked(arrays, key, (2, LIMBS, None))
    return Channels(sums, squares, _checked(arrays, f"{key}.ends", (2, sums.shape[1]), np.float64))


def _checked(
    arrays: Mapping[str, Array], key: str, shape: tuple[int | None, ...], dtype: type = np.int64
) -> Array:
    """An array of a file, if it is of that form."""
    array = arrays[key]
    fits = array.ndim == len(shape) and all(
        want in (None, size) for want, size in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        raise ValueError(f"'{key}' is {array.dtype}{list(array.shape)}")
    return array
