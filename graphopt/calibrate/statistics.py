"""What values look like over all samples: one pass, memory that does not grow, the same bits in any order.

A histogram on the bfloat16 bit pattern of each element needs no range beforehand, adds up across samples and processes,
and is fine where values are dense: its bins are 2^-7 to 2^-8 of what they hold.  Minimum and maximum are exact.  Sums
are kept as two integers, so that adding them is associative and any split over workers gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from graphopt.calibrate.samples import Samples, batch_size, rows_of
from graphopt.errors import DataError, GraphoptError
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.verify.feed_files import Feed

Array: TypeAlias = "np.ndarray[Any, Any]"

KEYS = 1 << 16
SENTINEL = 1e9
"""Magnitude from which on a value is a mask or a sentinel, not a signal: they are counted, not measured."""

DENSE = 1 << 14
"""Elements of one tensor and sample that are all counted; of larger ones, about so many, evenly spread."""

STRIDES = (1, 2, 3, 5, 7, 11, 13, 17, 23, 31, 41, 53, 61, 89, 127, 257)
"""Steps through a large tensor: primes, so that no step falls in with its rows or channels."""

_HIGH, _LOW = 2.0**12, 2.0**50
"""Units of the two halves of an exact sum."""


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """What each index of one axis holds.

    Attributes:
        sums: in two integers: int64 [2, channels].
        squares: sums of squares in two integers: int64 [2, channels].
        ends: the least and the greatest element: float64 [2, channels].

    Of large tensors, of the elements that are counted.
    """

    sums: Array
    squares: Array
    ends: Array


NO_CHANNELS = Channels(np.zeros((2, 0), np.int64), np.zeros((2, 0), np.int64), np.zeros((2, 0)))
"""Where the size of an axis varied, or something was left out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """One value over some samples.

    Attributes:
        histogram: how many elements have each bfloat16 pattern; large tensors are counted in part: int64 [65536].
        minimum: the least finite element that is no sentinel; +inf where there was none.
        maximum: the greatest; -inf where there was none.
        low_sum: sum over samples of the least element of each, in two integers: int64 [2].
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
    low_sum: Array = dataclasses.field(default_factory=lambda: np.zeros(2, np.int64))
    high_sum: Array = dataclasses.field(default_factory=lambda: np.zeros(2, np.int64))
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
        return float(_joined(self.low_sum)) / count, float(_joined(self.high_sum)) / count

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
        return np.asarray(_joined(sums) * count / self.elements)

    def merged(self, other: Statistics) -> Statistics:
        """Of both sets of samples; associative and commutative to the last bit."""
        return Statistics(
            histogram=self.histogram + other.histogram,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            low_sum=_carried(self.low_sum + other.low_sum),
            high_sum=_carried(self.high_sum + other.high_sum),
            samples=self.samples + other.samples,
            elements=self.elements + other.elements,
            excluded=self.excluded + other.excluded,
            channels=_added(self.channels, other.channels, self, other),
            last=_added(self.last, other.last, self, other),
        )


def empty() -> Statistics:
    """Of no sample at all: the neutral element of `merged`."""
    return Statistics(np.zeros(KEYS, np.int64))


_UNCOUNTED = Statistics(np.zeros(0, np.int64))
"""The same without histogram."""


class Tally:
    """Adds samples of one value up; elements wait to be counted until there are many, which costs the least."""

    def __init__(self) -> None:
        self._histogram = np.zeros(KEYS, np.int64)
        self._waiting: list[Array] = []
        self._rest = _UNCOUNTED

    def add(self, array: Array, axes: Sequence[int] = (1, -1)) -> None:
        """Takes one sample into account."""
        found, counted = _observed(np.ascontiguousarray(array, np.float32), axes)
        self._rest = self._rest.merged(found)
        self._waiting.append(counted)
        if sum(each.size for each in self._waiting) > 4 * DENSE:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            keys = np.concatenate(self._waiting).view(np.uint32) >> 16
            self._histogram += np.bincount(keys, minlength=KEYS)
        self._waiting = []

    def total(self) -> Statistics:
        """What was seen so far."""
        self._count()
        return dataclasses.replace(self._rest, histogram=self._histogram.copy())


def _observed(flat: Array, axes: Sequence[int]) -> tuple[Statistics, Array]:
    """Statistics without histogram, and the elements to count: float32, contiguous."""
    if flat.size == 0:
        return _UNCOUNTED, flat.reshape(-1)
    low, high = float(flat.min()), float(flat.max())
    if not -SENTINEL < low <= high < SENTINEL:
        return _observed_partly(flat)
    channels, part = _by_axis(flat, 1 if 1 in axes else 0)
    last, other = _by_axis(flat, flat.ndim - 1 if -1 in axes and flat.ndim <= 3 else 0)
    part = part if part.size else other
    counted = part if part.size else np.ascontiguousarray(flat.reshape(-1)[:: _stride(flat.size)])
    return _seen(low, high, flat.size, 0, channels, last), counted.reshape(-1)


def _observed_partly(flat: Array) -> tuple[Statistics, Array]:
    """The same where something is no signal: it is left out, and with it what is known of channels."""
    kept = flat[np.abs(flat) < SENTINEL]  # NaN compares false
    excluded = flat.size - kept.size
    if kept.size == 0:
        return dataclasses.replace(_UNCOUNTED, elements=flat.size, excluded=excluded), kept
    low, high = float(kept.min()), float(kept.max())
    counted = np.ascontiguousarray(kept[:: _stride(kept.size)])
    return _seen(low, high, flat.size, excluded, NO_CHANNELS, NO_CHANNELS), counted


def _seen(
    low: float, high: float, elements: int, excluded: int, channels: Channels, last: Channels
) -> Statistics:
    return Statistics(
        _UNCOUNTED.histogram,
        minimum=low,
        maximum=high,
        low_sum=_split(np.float64(low)),
        high_sum=_split(np.float64(high)),
        samples=1,
        elements=elements,
        excluded=excluded,
        channels=channels,
        last=last,
    )


def _stride(size: int) -> int:
    wanted = size // DENSE
    return next((step for step in STRIDES if step >= wanted), STRIDES[-1])


def _by_axis(array: Array, axis: int) -> tuple[Channels, Array]:
    """Sums and extremes by index of an axis other than the first, and the elements that they are of."""
    if not 1 <= axis < array.ndim:
        return NO_CHANNELS, array.reshape(-1)[:0]
    outer, inner = math.prod(array.shape[:axis]), math.prod(array.shape[axis + 1 :])
    rows = array.reshape(outer, array.shape[axis], inner)
    step = _stride(array.size)
    part = rows[:, :, ::step] if inner > step else rows[::step]
    if part.shape[2] < _WIDE:  # a short inner axis costs more than turning the array
        part = part.transpose(0, 2, 1).reshape(-1, array.shape[axis])
        ends, sums = np.stack([part.min(axis=0), part.max(axis=0)]), part.sum(axis=0, dtype=float)
        squares = np.einsum("sc,sc->c", part, part)
    else:
        part = np.ascontiguousarray(part)
        ends = np.stack([part.min(axis=(0, 2)), part.max(axis=(0, 2))])
        sums = part.sum(axis=2).sum(
            axis=0, dtype=np.float64
        )  # NumPy adds a contiguous row pairwise
        squares = np.einsum("ocs,ocs->c", part, part)
    weight = array.size / part.size
    found = (_split(sums * weight), _split(squares.astype(np.float64) * weight))
    return Channels(*found, ends.astype(np.float64)), np.ascontiguousarray(part)


_WIDE = 128
"""Elements from which on NumPy reduces a contiguous axis at full speed."""


def _split(sums: Any) -> Array:  # noqa: ANN401
    """A float64 as integers: multiples of 2^-12 and what is left in multiples of 2^-62."""
    scaled = np.asarray(sums, np.float64) * _HIGH
    high = np.floor(scaled)
    return np.stack([high.astype(np.int64), np.rint((scaled - high) * _LOW).astype(np.int64)])


def _joined(halves: Array) -> Array:
    return np.asarray((halves[0].astype(np.float64) + halves[1] / _LOW) / _HIGH)


def _carried(halves: Array) -> Array:
    """The same sum with its lower half below one unit of the upper: one form a number."""
    unit = np.int64(_LOW)
    carry = halves[1] // unit
    return np.stack([halves[0] + carry, halves[1] - carry * unit])


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
    return Channels(
        _carried(mine.sums + theirs.sums), _carried(mine.squares + theirs.squares), ends
    )


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
        """Writes the statistics as npz; the same statistics give the same bytes."""
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
            {"version": 2, "samples": self.samples, "model": self.model, "names": names}
        )
        with path.open("wb") as file:
            np.savez(file, head=np.frombuffer(head.encode(), np.uint8), **arrays)  # type: ignore[arg-type, unused-ignore]

    @classmethod
    def load(cls, path: Path) -> Collected:
        """Reads what `save` wrote.

        Raises:
            DataError: the file holds something else.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                head = json.loads(bytes(archive["head"]))
                values = {
                    name: _restored(archive, index) for index, name in enumerate(head["names"])
                }
                return cls(values, int(head["samples"]), str(head["model"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(
                f"'{path}' cannot be read as calibration statistics: {error}. Collect them again."
            ) from error


def _restored(archive: Any, index: int) -> Statistics:  # noqa: ANN401
    histogram = np.zeros(KEYS, np.int64)
    histogram[archive[f"{index}.keys"]] = archive[f"{index}.counts"]
    low, high = (float(x) for x in archive[f"{index}.range"])
    samples, elements, excluded = (int(x) for x in archive[f"{index}.numbers"])
    sums = archive[f"{index}.sums"]
    return Statistics(
        histogram,
        low,
        high,
        sums[0],
        sums[1],
        samples,
        elements,
        excluded,
        _restored_channels(archive, f"{index}.channels"),
        _restored_channels(archive, f"{index}.last"),
    )


def _restored_channels(archive: Any, key: str) -> Channels:  # noqa: ANN401
    sums, squares = archive[key]
    return Channels(sums, squares, archive[f"{key}.ends"])


def collect(  # noqa: PLR0913  all but the first three by keyword only
    model: bytes | Path,
    names: Sequence[str],
    feeds: Iterable[Feed],
    *,
    threads: int = 1,
    executor: Executor | None = None,
    chunk: int = 8,
    axes: Mapping[str, Sequence[int]] | None = None,
) -> Collected:
    """Statistics of the named values of the main graph over all feeds, in one pass.

    Args:
        model: the model; values keep their names.
        names: the values.
        feeds: complete samples.
        threads: inside one operator.
        executor: runs chunks of samples elsewhere; the result has the same bits.
        chunk: samples that one task takes.
        axes: which axes, of 1 and -1, to keep channels of, by value; both where a value is not named.

    Raises:
        ModelError: the model fails on a sample, or has no such value.
    """
    if executor is None:
        return _collect_here(model, tuple(names), feeds, threads, axes or {})
    found = Collected({}, 0)
    iterator = iter(feeds)
    while window := list(islice(iterator, chunk * _WINDOW)):
        parts = [window[i : i + chunk] for i in range(0, len(window), chunk)]
        tasks = [
            executor.submit(_collect_here, model, tuple(names), part, threads, axes or {})
            for part in parts
        ]
        for task in tasks:
            found = found.merged(task.result())
    return found


_WINDOW = 16
"""Tasks in flight: what bounds the samples in memory."""


def _collect_here(
    model: bytes | Path,
    names: tuple[str, ...],
    feeds: Iterable[Feed],
    threads: int,
    axes: Mapping[str, Sequence[int]],
) -> Collected:
    folder = model.parent if isinstance(model, Path) else None
    options = SessionOptions(threads=threads, external_folder=folder, extra_outputs=names)
    # Fused as deployed: observed values stay, and what is quantised is what will run.
    session = Session(model, level=OptimizationLevel.ALL, options=options)
    inputs = {spec.name for spec in session.inputs}
    tapped = [name for name in names if name not in inputs]
    found = {name: Tally() for name in names}
    count = 0
    for feed in feeds:
        results = session.run(feed.values, tapped) if tapped else {}
        batch = batch_size(feed)
        count += batch
        for name in names:
            array = results.get(name, feed.values.get(name))
            if array is not None:
                for row in _rows(array, batch):
                    found[name].add(row, axes.get(name, (1, -1)))
    return Collected({name: tally.total() for name, tally in found.items()}, count)


def _rows(array: Array, batch: int) -> Iterable[Array]:
    """The samples of a batch, each by itself: however samples are batched, they count the same."""
    if batch > 1 and array.ndim > 1 and len(array) == batch:
        return (array[index : index + 1] for index in range(batch))
    return (array,)


def by_row(model: Callable[[], AbstractContextManager[Path]], samples: Samples) -> Samples:
    """The samples with each batch as those that it holds, where the model treats them one by one.

    So any split into batches gives the same bits: kernels for several rows may round otherwise.  Asked of the first
    batch: its outputs are those of its rows, up to rounding, or the batches stay as they are.
    """
    first = next((feed for feed in samples.first(_LOOKED_AT) if batch_size(feed) > 1), None)
    if first is None:
        return samples
    with model() as path:
        session = Session(path)
    try:
        alone = [session.run(row.values) for row in islice(rows_of(first), _COMPARED)]
        together = session.run(first.values)
    except GraphoptError:
        return samples  # the model fixes the size of its batches
    apart = all(_is_row(together, each, index) for index, each in enumerate(alone))
    return dataclasses.replace(samples, by_row=True) if apart else samples


_COMPARED, _LOOKED_AT = 2, 4


def _is_row(together: Mapping[str, Any], alone: Mapping[str, Any], index: int) -> bool:
    for name, row in alone.items():
        whole = together[name]
        if not isinstance(row, np.ndarray) or row.ndim == 0 or len(row) != 1:
            return False
        if whole.shape[1:] != row.shape[1:] or index >= len(whole):
            return False
        if not np.allclose(
            whole[index], row[0], rtol=1e-3, atol=1e-4 * _scale(row), equal_nan=True
        ):
            return False
    return True


def _scale(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0)) if array.dtype.kind == "f" else 1.0
