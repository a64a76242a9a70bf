"""Batches as the samples that they hold: however samples come in batches, they count the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.runtime.session import Session
from graphopt.runtime.specs import Kind, TensorSpec
from graphopt.verify.feed_files import Feed
from graphopt.verify.metrics import is_float


def batch_size(feed: Feed) -> int:
    """How many samples a feed holds: the leading size that all of its inputs of two axes and more share, else 1."""
    sizes = {
        len(a) if isinstance(a, np.ndarray) and a.ndim > 1 else 1 for a in feed.values.values()
    }
    return sizes.pop() if len(sizes) == 1 else 1


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Where the samples of a batch lie: the axis, and the inputs that have it."""

    axis: int
    names: frozenset[str]

    def size(self, feed: Feed) -> int:
        """How many samples a feed holds; 1 where its inputs disagree."""
        given = [feed.values[name] for name in self.names if name in feed.values]
        sizes = {a.shape[self.axis] for a in given if a.ndim > self.axis} - {1}
        return sizes.pop() if len(sizes) == 1 else 1

    def row(self, feed: Feed, index: int, size: int) -> Feed:
        """One of them, with what is given to all."""
        values = {name: self._part(name, a, index, size) for name, a in feed.values.items()}
        return Feed(f"{feed.name}[{index}]", values)

    def _part(self, name: str, array: Any, index: int, size: int) -> Any:  # noqa: ANN401
        if name not in self.names or array.ndim <= self.axis or array.shape[self.axis] != size:
            return array
        return array[(slice(None),) * self.axis + (slice(index, index + 1),)]


class Rows:
    """Takes batches apart where the model treats their samples one by one, else leaves them whole.

    So any split into batches gives the same bits: kernels for several samples may round otherwise.  Asked of the first
    batch that comes: its outputs are those of its samples, up to rounding.  Samples lie along the first axis, or where
    the model mixes that (time), along the second.  What has none (a number, one row, a fixed size) is given to each.

    Args:
        model: writes the model to a file.
    """

    def __init__(self, model: Callable[[], AbstractContextManager[Path]]) -> None:
        self._model = model
        self._specs: tuple[TensorSpec, ...] | None = None
        self._axes = [0, 1]
        self._batch: _Batch | None = None

    def __call__(self, feed: Feed) -> Iterator[Feed]:
        """The samples of a feed."""
        if self._batch is None:
            self._ask(feed)
        size = 1 if self._batch is None else self._batch.size(feed)
        if self._batch is None or size == 1:
            yield feed
            return
        for index in range(size):
            yield self._batch.row(feed, index, size)

    def _ask(self, feed: Feed) -> None:
        """Finds out along which axis samples lie, if this feed is one that tells."""
        session = None
        while self._axes and self._batch is None:
            axis = self._axes[0]
            if not _sizes(feed, axis, self._specs):
                return
            if session is None:
                with self._model() as path:
                    session = Session(path)
            specs = self._specs = tuple(session.inputs)
            if sizes := _sizes(feed, axis, specs):
                few = _few(feed, axis, sizes)
                self._batch = _told(session, few, axis, _sizes(few, axis, specs))
            elif any(_is_free(spec, axis) for spec in specs):
                return  # a longer one may come
            self._axes.pop(0)


def _is_free(spec: TensorSpec, axis: int) -> bool:
    """Whether an input may be of any size along an axis."""
    if spec.kind is not Kind.TENSOR:
        return False
    shape = spec.shape
    return shape is None or (len(shape) > axis and not isinstance(shape[axis], int))


def _sizes(feed: Feed, axis: int, specs: Sequence[TensorSpec] | None) -> dict[str, int]:
    """Sizes along an axis beyond 1, of the inputs that may have any where that is known."""
    free = None if specs is None else {spec.name for spec in specs if _is_free(spec, axis)}
    return {
        name: array.shape[axis]
        for name, array in feed.values.items()
        if isinstance(array, np.ndarray) and array.ndim > axis and array.shape[axis] > 1
        if free is None or name in free
    }


def _few(feed: Feed, axis: int, sizes: Mapping[str, int]) -> Feed:
    """The first samples of a large batch, which tell as much."""
    if len({*sizes.values()}) > 1 or max(sizes.values()) <= _COMPARED:
        return feed
    part = (slice(None),) * axis + (slice(_COMPARED),)
    return Feed(feed.name, {n: a[part] if n in sizes else a for n, a in feed.values.items()})


_COMPARED = 8
"""Samples of a batch that are run together."""


def _told(session: Session, feed: Feed, axis: int, sizes: Mapping[str, int]) -> _Batch | None:
    """What a batch and its first and last sample tell by their outputs; None where it is no batch along this axis."""
    try:
        together = session.run(feed.values)
        found = {_size(output, axis) for output in together.values()}
        size = found.pop() if len(found) == 1 else 0
        batch = _Batch(axis, frozenset(name for name, count in sizes.items() if count == size))
        if not batch.names:
            return None
        alone = [
            (index, session.run(batch.row(feed, index, size).values)) for index in (0, size - 1)
        ]
    except GraphoptError:
        return None  # the model fixes the size of its batches
    return batch if all(_is_part(together, each, axis, i) for i, each in alone) else None


def _size(output: object, axis: int) -> int:
    return output.shape[axis] if isinstance(output, np.ndarray) and output.ndim > axis else 0


def _is_part(together: Mapping[str, Any], alone: Mapping[str, Any], axis: int, index: int) -> bool:
    """Whether the outputs of one sample are those of a batch at its place."""
    for name, part in alone.items():
        if _size(part, axis) != 1:
            return False
        whole = np.take(together[name], [index], axis)
        if whole.shape != part.shape or not _is_near(whole, part):
            return False
    return True


def _is_near(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    if other.dtype.kind == "c" or not is_float(other.dtype):
        return bool(np.array_equal(one, other))
    exact, close = one.astype(np.float64), other.astype(np.float64)
    scale = float(np.abs(close[np.isfinite(close)]).max(initial=0.0))
    return bool(np.allclose(exact, close, rtol=1e-3, atol=1e-4 * scale, equal_nan=True))
