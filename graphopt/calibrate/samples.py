"""Calibration samples, one at a time: npz, folders of npz, ONNX `test_data_set_*`, JSON, images, Python feeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from graphopt.calibrate.given import arrays_of, feed_of
from graphopt.calibrate.images import Preprocess, image_feeds, images_in, load_preprocess
from graphopt.errors import DataError, OptionError
from graphopt.rewrite import Calibration
from graphopt.runtime.specs import Kind, TensorSpec
from graphopt.verify.feed_files import Feed, check_feed, natural_order, read_feeds, read_npz

Array: TypeAlias = "np.ndarray[Any, Any]"
Reader: TypeAlias = Callable[[], Iterator[Feed]]


JUDGED = 24
"""Samples on which numbers are compared, and on which metrics of users' are asked."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples that can be gone through any number of times; one is in memory at a time.

    Attributes:
        reader: starts from the beginning.
        limit: how many to give at most; None for all.
        keeps: which of them to give, by position; None for all.
        apart: the samples that a batch holds; None leaves batches whole.
        sound: whether a sample holds numbers; None for all.
        notes: what was left out while they were read, in words.
    """

    reader: Reader
    limit: int | None = None
    keeps: Callable[[int], bool] | None = None
    apart: Callable[[Feed], Iterable[Feed]] | None = None
    sound: Callable[[Feed], bool] | None = None
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Feed]:
        """The samples in order.

        Raises:
            DataError: a sample cannot be read or does not fit the model; the message names sample and input.
        """
        found: Iterator[Feed] = self.reader()
        if self.apart is not None:
            found = chain.from_iterable(map(self.apart, found))
        if self.sound is not None:
            found = filter(self.sound, found)
        found = islice(found, self.limit)
        if self.keeps is None:
            return found
        keeps = self.keeps
        return (feed for index, feed in enumerate(found) if keeps(index))

    def parted(self, every: int, before: int = 0) -> tuple[Samples, Samples]:
        """All but every n-th sample, and every n-th, or those that come `before` places earlier."""
        at = (-1 - before) % every
        return (
            dataclasses.replace(self, keeps=lambda index: index % every != at),
            dataclasses.replace(self, keeps=lambda index: index % every == at),
        )

    def first(self, count: int) -> list[Feed]:
        """The first samples, at most `count`."""
        return list(islice(iter(self), count))

    def spread(self, count: int) -> list[Feed]:
        """At most `count` samples evenly spread over all, and at least half as many where there are that many."""
        found: list[Feed] = []
        step = 1
        for index, feed in enumerate(self):
            if index % step == 0:
                found.append(feed)
            if len(found) > count:
                found, step = found[::2], 2 * step
        return found


def read_samples(calibration: Calibration, specs: Sequence[TensorSpec]) -> Samples:
    """The samples that a user gave, checked against the inputs of the model as they are read.

    Raises:
        DataError: there are none, or the first does not fit.
        OptionError: images without a preprocessing file or one without images, or a limit below 1.
    """
    if calibration.limit is not None and calibration.limit < 1:
        raise OptionError(
            f"{calibration.limit} calibration samples are too few: --samples must be 1 or more"
        )
    notes: dict[str, None] = {}
    samples = Samples(_reader(calibration, specs, notes), calibration.limit, notes=notes)
    if not samples.first(1):
        raise DataError(
            f"'{calibration.source}' holds no calibration samples{_found(calibration.source)}; give an .npz whose "
            "leading axis is the samples, a folder of .npz files, ONNX test_data_set folders, or images with "
            "--preprocess"
            if isinstance(calibration.source, Path)
            else "the list of calibration samples is empty; give at least one, better 64 or more"
        )
    return samples


def _found(source: Path) -> str:
    """What else lies in a folder, for whoever pointed to the wrong one."""
    if not source.is_dir():
        return ""
    there = (path for path in source.rglob("*") if path.is_file())
    names = sorted(str(path.relative_to(source)) for path in islice(there, _TOLD))
    return f" (there is {', '.join(names)})" if names else " (it is empty)"


_TOLD = 3
"""Files that are named."""


def _reader(
    calibration: Calibration, specs: Sequence[TensorSpec], notes: dict[str, None]
) -> Reader:
    source = calibration.source
    if isinstance(source, str):
        source = Path(source)
    if isinstance(source, Mapping | np.ndarray):
        arrays = arrays_of("samples", source, specs)
        return lambda: _rows("samples", arrays, specs, notes)
    if not isinstance(source, Path):
        feeds = source
        return lambda: (feed_of(f"sample {i}", values, specs) for i, values in enumerate(feeds))
    if not source.exists():
        raise DataError(f"there is no file or folder '{source}' with calibration samples")
    images = images_in(source)
    if images and (calibration.preprocess is not None or not _has_arrays(source)):
        recipe = _preprocess(calibration, source)
        return lambda: image_feeds(images, recipe, specs, notes)
    if calibration.preprocess is not None:
        raise OptionError(
            f"--preprocess '{calibration.preprocess}' says how images become inputs, and '{source}' holds none: give a "
            "folder of images, or leave --preprocess out"
        )
    return lambda: _read(source, specs, notes)


def _has_arrays(source: Path) -> bool:
    return source.is_dir() and any(_is_npz(path) for path in source.iterdir())


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz" and not path.name.startswith(".")


def _preprocess(calibration: Calibration, source: Path) -> Preprocess:
    if calibration.preprocess is None:
        raise OptionError(
            f"'{source}' holds images: say with --preprocess FILE.toml how they become inputs (resize, crop, scale, "
            "mean, std, layout)"
        )
    return load_preprocess(calibration.preprocess)


def _read(source: Path, specs: Sequence[TensorSpec], notes: dict[str, None]) -> Iterator[Feed]:
    if source.is_dir() and not any(source.glob("input_*.pb")):
        for entry in sorted(source.iterdir(), key=natural_order):
            if _is_npz(entry):
                yield from _rows(str(entry), read_npz(entry), specs, notes)
            elif entry.is_dir() and any(entry.glob("input_*.pb")):
                yield from read_feeds(entry, specs)
    elif _is_npz(source):
        yield from _rows(str(source), read_npz(source), specs, notes)
    else:
        yield from read_feeds(source, specs)


def _rows(
    name: str, arrays: Mapping[str, Array], specs: Sequence[TensorSpec], notes: dict[str, None]
) -> Iterator[Feed]:
    """The samples of one npz: its rows where the leading axis is the samples, else the file as one sample.

    What has no rows, a number or one row of others' many, goes with each of them.
    """
    known = {spec.name: spec for spec in specs}
    sizes = {key: _row_size(known.get(key), array) for key, array in arrays.items()}
    single = {key for key in arrays if _is_single(known.get(key), arrays[key], sizes[key])}
    rows = {key: size for key, size in sizes.items() if key not in single and size is not None}
    if not rows or len(rows) + len(single) < len(arrays):
        yield check_feed(Feed(name, arrays), specs)
        return
    counts = {key: len(arrays[key]) // (size or 1) for key, size in rows.items()}
    if len(set(counts.values())) > 1:
        if _fits(arrays, known):
            yield check_feed(Feed(name, arrays), specs)
            return
        told = ", ".join(f"'{key}': {count}" for key, count in counts.items())
        raise DataError(
            f"'{name}' holds different numbers of samples ({told}); give every input one row a sample"
        )
    _check_left(name, arrays, rows, notes)
    for index in range(next(iter(counts.values()))):
        values = {
            key: _row(array, index, rows[key]) if key in rows else array
            for key, array in arrays.items()
        }
        yield check_feed(Feed(f"{name}[{index}]", values), specs)


def _check_left(
    name: str, arrays: Mapping[str, Array], rows: Mapping[str, int], notes: dict[str, None]
) -> None:
    """Notes rows that make no whole batch of the size that the model fixes.

    Raises:
        DataError: none of them do.
    """
    for key, size in rows.items():
        count = len(arrays[key])
        if size > 1 and 0 < count < size:
            raise DataError(
                f"'{name}' has {count} rows of the input '{key}', and the model takes {size} at a time: give at least "
                f"{size}"
            )
        if size > 1 and count % size:
            notes[
                f"the last {count % size} of {count} rows of '{key}' in '{name}' are left out: the model takes {size} "
                "at a time"
            ] = None


def _is_single(spec: TensorSpec | None, array: Array, size: int | None) -> bool:
    """Whether an array is one input as it is, and no rows of several."""
    if spec is None or spec.kind is not Kind.TENSOR or spec.shape is None:
        return False
    return _is_of(array, spec.shape) and (size is None or len(array) == size)


def _row_size(spec: TensorSpec | None, array: Array) -> int | None:
    """Rows of `array` that one sample takes; 0 where a row is a sample of one axis less; None where it has no rows."""
    if spec is None or spec.kind is not Kind.TENSOR or spec.shape is None or array.ndim == 0:
        return None
    if array.ndim == len(spec.shape) + 1:
        return 0
    if array.ndim != len(spec.shape):
        return None
    first = spec.shape[0]
    return first if isinstance(first, int) and first > 0 else 1


def _row(array: Array, index: int, size: int) -> Array:
    return np.asarray(array[index]) if size == 0 else array[index * size : (index + 1) * size]


def _fits(arrays: Mapping[str, Array], known: Mapping[str, TensorSpec]) -> bool:
    """Whether the arrays are one feed as they are."""
    return all(
        _is_of(array, shape)
        for name, array in arrays.items()
        if (shape := known[name].shape) is not None
    )


def _is_of(array: Array, shape: Sequence[int | str | None]) -> bool:
    return array.ndim == len(shape) and all(
        not isinstance(d, int) or d == n for d, n in zip(shape, array.shape, strict=True)
    )
