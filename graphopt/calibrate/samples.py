"""Calibration samples, one at a time: npz, folders of npz, ONNX `test_data_set_*`, JSON, images, Python feeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from graphopt.calibrate.images import IMAGE_SUFFIXES, Preprocess, load_preprocess, read_image
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
        by_row: whether a batch counts as the samples that it holds, each given alone.
    """

    reader: Reader
    limit: int | None = None
    keeps: Callable[[int], bool] | None = None
    by_row: bool = False

    def __iter__(self) -> Iterator[Feed]:
        """The samples in order.

        Raises:
            DataError: a sample cannot be read or does not fit the model; the message names sample and input.
        """
        found: Iterator[Feed] = islice(self.reader(), self.limit)
        if self.by_row:
            found = (row for feed in found for row in rows_of(feed))
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


def batch_size(feed: Feed) -> int:
    """How many samples a feed holds: the leading size that all of its inputs share, else 1."""
    sizes = {len(array) if np.ndim(array) > 1 else 1 for array in feed.values.values()}
    return sizes.pop() if len(sizes) == 1 else 1


def rows_of(feed: Feed) -> Iterator[Feed]:
    """The samples of a batch, each by itself."""
    size = batch_size(feed)
    if size == 1:
        yield feed
        return
    for index in range(size):
        row = {name: np.asarray(a)[index : index + 1] for name, a in feed.values.items()}
        yield Feed(f"{feed.name}[{index}]", row)


def read_samples(calibration: Calibration, specs: Sequence[TensorSpec]) -> Samples:
    """The samples that a user gave, checked against the inputs of the model as they are read.

    Raises:
        DataError: there are none, or the first does not fit.
        OptionError: images without a preprocessing file, or a limit below 1.
    """
    if calibration.limit is not None and calibration.limit < 1:
        raise OptionError(
            f"{calibration.limit} calibration samples are too few: --samples must be 1 or more"
        )
    samples = Samples(_reader(calibration, specs), calibration.limit)
    if not samples.first(1):
        raise DataError(
            f"'{calibration.source}' holds no calibration samples; give an .npz whose leading axis is the samples, a "
            "folder of .npz files, ONNX test_data_set folders, or images with --preprocess"
            if isinstance(calibration.source, Path)
            else "the list of calibration samples is empty; give at least one, better 64 or more"
        )
    return samples


def _reader(calibration: Calibration, specs: Sequence[TensorSpec]) -> Reader:
    source = calibration.source
    if not isinstance(source, Path):
        feeds: Iterable[Mapping[str, Any]] = source
        return lambda: (
            check_feed(Feed(f"sample {i}", dict(values)), specs) for i, values in enumerate(feeds)
        )
    if not source.exists():
        raise DataError(f"there is no file or folder '{source}' with calibration samples")
    images = _images(source)
    if images:
        recipe = _preprocess(calibration, source)
        return lambda: (_image_feed(path, recipe, specs) for path in images)
    return lambda: _read(source, specs)


def _images(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source] if source.suffix.lower() in IMAGE_SUFFIXES else []
    found = (path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(found, key=natural_order)


def _preprocess(calibration: Calibration, source: Path) -> Preprocess:
    if calibration.preprocess is None:
        raise OptionError(
            f"'{source}' holds images: say with --preprocess FILE.toml how they become inputs (resize, crop, scale, "
            "mean, std, layout)"
        )
    return load_preprocess(calibration.preprocess)


def _image_feed(path: Path, recipe: Preprocess, specs: Sequence[TensorSpec]) -> Feed:
    required = [spec for spec in specs if not spec.overridable]
    name = recipe.input or (required[0].name if len(required) == 1 else "")
    spec = next((spec for spec in required if spec.name == name), None)
    if spec is None:
        raise OptionError(
            f'the preprocessing file must name the input that images feed (input = "…"): the model has '
            f"{', '.join(repr(spec.name) for spec in required)}"
        )
    array = read_image(path, recipe).astype(spec.dtype.numpy(), copy=False)
    if spec.shape is not None and not _is_of(array, spec.shape):
        raise DataError(
            f"'{path}' becomes {list(array.shape)} by the preprocessing file, and the input '{name}' must be {spec}: "
            "change its resize, crop, layout or channels"
        )
    return check_feed(Feed(str(path), {name: array}), specs)


def _read(source: Path, specs: Sequence[TensorSpec]) -> Iterator[Feed]:
    if source.suffix == ".npz":
        yield from _rows(source, specs)
    elif source.is_dir() and not any(source.glob("input_*.pb")):
        for entry in sorted(source.iterdir(), key=natural_order):
            if entry.suffix == ".npz":
                yield from _rows(entry, specs)
            elif entry.is_dir() and any(entry.glob("input_*.pb")):
                yield from read_feeds(entry, specs)
    else:
        yield from read_feeds(source, specs)


def _rows(path: Path, specs: Sequence[TensorSpec]) -> Iterator[Feed]:
    """The samples of one npz: its rows where the leading axis is the samples, else the file as one sample."""
    arrays = read_npz(path)
    known = {spec.name: spec for spec in specs}
    plan = {name: _row_size(known.get(name), array) for name, array in arrays.items()}
    if not arrays or any(size is None for size in plan.values()):
        yield check_feed(Feed(str(path), arrays), specs)
        return
    counts = {name: len(array) // (plan[name] or 1) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        if _fits(arrays, known):
            yield check_feed(Feed(str(path), arrays), specs)
            return
        told = ", ".join(f"'{name}': {count}" for name, count in counts.items())
        raise DataError(
            f"'{path}' holds different numbers of samples ({told}); give every input one row a sample"
        )
    for index in range(next(iter(counts.values()))):
        values = {name: _row(array, index, plan[name] or 0) for name, array in arrays.items()}
        yield check_feed(Feed(f"{path}[{index}]", values), specs)


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
