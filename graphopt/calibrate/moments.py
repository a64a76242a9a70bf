"""Second moments of what layers read: which directions of an input matter, for rounding weights.

A bounded number of rows of a bounded number of samples is kept, so that memory does not grow with the samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.calibrate.statistics import SENTINEL
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.verify.feed_files import Feed

Array: TypeAlias = "np.ndarray[Any, Any]"
Wide: TypeAlias = npt.NDArray[np.float64]

SAMPLES = 32
"""Samples that are looked at: of few rows, more, until some input has `ROWS`."""

ROWS = 512

POSITIONS = 64
"""Rows of one sample that are looked at: more say little that is new."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What a convolution without groups reads at one position.

    Attributes:
        kernel: its size.
        strides: between positions.
        dilations: between taps.
        pads: zeros before each axis, then behind each.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One input of one layer: the name of the value, and the window of a convolution; None for matrix products."""

    value: str
    window: Window | None = None


def collect_moments(
    model: bytes | Path, wanted: Sequence[Wanted], feeds: Iterable[Feed], *, threads: int = 1
) -> dict[Wanted, Wide]:
    """Mean of x x^T over rows (positions) of each input: float64 [K, K].

    An input that held something not finite, or whose width varied, is left out.

    Raises:
        ModelError: the model fails on a sample, or has no such value.
    """
    names = tuple(dict.fromkeys(each.value for each in wanted))
    folder = model.parent if isinstance(model, Path) else None
    options = SessionOptions(threads=threads, external_folder=folder, extra_outputs=names)
    session = Session(model, level=OptimizationLevel.ALL, options=options)
    inputs = {spec.name for spec in session.inputs}
    tapped = [name for name in names if name not in inputs]
    kept: dict[Wanted, list[Array]] = {each: [] for each in wanted}
    for index, feed in enumerate(feeds):
        if index >= SAMPLES and _most(kept) >= ROWS:
            break
        results = session.run(feed.values, tapped) if tapped else {}
        for each, parts in kept.items():
            array = results.get(each.value, feed.values.get(each.value))
            assert array is not None
            parts.append(rows_of(array, each.window))
    found = {each: _mean(parts) for each, parts in kept.items()}
    return {each: moments for each, moments in found.items() if moments is not None}


def _most(kept: Mapping[Wanted, Sequence[Array]]) -> int:
    return max((sum(len(part) for part in parts) for parts in kept.values()), default=ROWS)


def _mean(parts: Sequence[Array]) -> Wide | None:
    if not parts or len({part.shape[1] for part in parts}) != 1:
        return None
    rows = np.concatenate(parts).astype(np.float64)
    if len(rows) == 0 or not (np.abs(rows) < SENTINEL).all():  # NaN compares false
        return None
    moments = rows.T @ rows / len(rows)
    filled = [part.astype(np.float64) for part in parts if len(part)]
    kept = 1 - _doubt(moments, filled if len(filled) > 1 else [row[None] for row in rows])
    diagonal = np.diag(moments).copy()
    moments *= kept
    np.fill_diagonal(moments, diagonal)
    return np.asarray(moments)


def _doubt(moments: Wide, parts: Sequence[Wide]) -> float:
    """The share of the moments off the diagonal that is chance: 0 of many samples, 1 where one says nothing of another.

    Their squared error over their square, both summed; rows of one sample are alike, so that samples are what is
    counted (Schaefer and Strimmer 2005, target D, with samples as clusters).
    """
    total = sum(len(part) for part in parts)
    square = _square(moments, np.diag(moments))
    spread, shares = -square, 0.0
    for part in parts:
        share = len(part) / total
        within = (
            part @ part.T / len(part)
        )  # of the same norm as the moments of the part, and smaller
        spread += share * _square(within, np.einsum("nk,nk->k", part, part) / len(part))
        shares += share**2
    if square <= 0 or shares >= 1:
        return 0.0 if len(parts) > 1 else 1.0
    return float(np.clip(spread * shares / (1 - shares) / square, 0, 1))


def _square(moments: Wide, diagonal: Wide) -> float:
    """The squared norm off the diagonal."""
    return float(np.vdot(moments, moments) - np.vdot(diagonal, diagonal))


def rows_of(array: Array, window: Window | None) -> Array:
    """What a layer multiplies its weight with, at evenly spread positions: float32 [rows, K]."""
    if window is None:
        rows = np.asarray(array).reshape(math.prod(array.shape[:-1]), array.shape[-1])
        return np.ascontiguousarray(rows[:: -(-len(rows) // POSITIONS) or 1], np.float32)
    rank = len(window.kernel)
    pads = [(0, 0), (0, 0), *zip(window.pads[:rank], window.pads[rank:], strict=True)]
    padded = np.pad(array, pads)
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    axes = tuple(range(2, 2 + rank))
    views = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)  # type: ignore[call-overload,unused-ignore]
    whole = (slice(None), slice(None))
    steps = tuple(slice(None, None, n) for n in (*window.strides, *window.dilations))
    taps = views[(*whole, *steps)]
    moved = np.moveaxis(taps, 1, 1 + rank)  # [N, positions, C, taps]
    part = moved if moved.size < _SMALL else _thinned(moved)
    flat = part.reshape(math.prod(part.shape[: 1 + rank]), *part.shape[1 + rank :])
    rows = flat.reshape(len(flat), math.prod(flat.shape[1:]))
    return np.ascontiguousarray(rows[:: -(-len(rows) // POSITIONS) or 1], np.float32)


_SMALL = 1 << 22


def _thinned(moved: Array) -> Array:
    """Positions of a large array, every n-th along the first axis of the image."""
    return moved[:, :: -(-moved.size // _SMALL)]
