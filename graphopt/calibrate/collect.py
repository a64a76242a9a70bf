"""One pass over the samples: what many values of a model look like, here or shared out to workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

from graphopt.calibrate.batches import Rows, batch_size
from graphopt.calibrate.samples import Samples
from graphopt.calibrate.statistics import Collected
from graphopt.calibrate.tally import DENSE, Tally
from graphopt.errors import DataError, ModelError
from graphopt.runtime.observing import Observed, Observer
from graphopt.verify.feed_files import Feed


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
        ModelError: the model cannot be run, or has no such value.
        DataError: it fails on a sample, which is named.
    """
    if executor is None:
        return _collect_here(model, tuple(names), feeds, threads, axes or {})
    found = Collected({}, 0)
    iterator = iter(feeds)
    while window := _window(iterator, chunk * _TASKS):
        parts = [window[i : i + chunk] for i in range(0, len(window), chunk)]
        tasks = [
            executor.submit(_collect_here, model, tuple(names), part, threads, axes or {})
            for part in parts
        ]
        for task in tasks:
            found = found.merged(task.result())
    return found


WAITING = 1 << 22
"""Elements that may wait to be counted."""

_TASKS, _BYTES = 16, 1 << 25
"""Tasks in flight at most, and bytes of their samples: what bounds the samples in memory."""


def _window(feeds: Iterator[Feed], count: int) -> list[Feed]:
    """The next samples, until they are as many, or as large, as may be in flight."""
    found: list[Feed] = []
    room = _BYTES
    for feed in islice(feeds, count):
        found.append(feed)
        room -= sum(getattr(value, "nbytes", 0) for value in feed.values.values())
        if room <= 0:
            break
    return found


def _collect_here(
    model: bytes | Path,
    names: tuple[str, ...],
    feeds: Iterable[Feed],
    threads: int,
    axes: Mapping[str, Sequence[int]],
) -> Collected:
    # Fused as deployed: observed values stay, and what is quantised is what will run.
    observer = Observer(model, names, threads=threads)
    room = max(WAITING // max(len(names), 1), DENSE)
    found = {name: Tally(room) for name in names}
    count = 0
    for feed in feeds:
        batch = batch_size(feed)
        count += batch
        try:
            observed = observer.run(feed.values)
        except ModelError as error:
            raise DataError(f"'{feed.name}': {error}") from error
        for name, value in observed.items():
            for row in _rows(value, batch):
                found[name].add(row, axes.get(name, (1, -1)))
    return Collected({name: tally.total() for name, tally in found.items()}, count)


def _rows(value: Observed, batch: int) -> Iterable[Observed]:
    """The samples of a batch, each by itself: however samples are batched, they count the same."""
    if batch > 1 and value.array.ndim > 1 and len(value.array) == batch:
        return (value.row(index) for index in range(batch))
    return (value,)


def by_row(model: Callable[[], AbstractContextManager[Path]], samples: Samples) -> Samples:
    """The samples with each batch as those that it holds, where the model treats them one by one.

    Args:
        model: writes the model to a file, when a batch comes.
        samples: as the user batched them, or as they were taken apart before.
    """
    if samples.apart is not None:
        return samples
    return dataclasses.replace(samples, apart=Rows(model))
