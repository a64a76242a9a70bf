"""Second moments of what a layer reads, summed batch by batch: memory for two matrices, whatever the samples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from graphopt_passes.prune.layers import Array, Layer, Wide, Window

MAX_COLUMNS, MAX_COLUMNS_WIDE = 16384, 4096
"""Inputs of a layer that are looked at in all: neighbouring positions of an image say the same again."""

_WIDE_COLUMNS = 256
_WIDE_ROWS = 640


MAX_WIDTH = 4096
"""Inputs of a matrix up to which their moments are kept as one: beyond, columns are fitted in parts."""


def parts(layer: Layer) -> int:
    """In how many parts the columns of a matrix are fitted, each as if the others made what they made before.

    Moments take the square of the columns: 100 MB of weights behind a flattened image would need gigabytes.
    """
    if layer.window is not None or layer.columns <= MAX_WIDTH:
        return 1
    least = -(-layer.columns // MAX_WIDTH)
    fit = (n for n in range(least, layer.columns) if layer.columns % n == 0)
    whole = next((n for n in fit if layer.columns // n % 4 == 0), None)
    return whole or next(n for n in range(least, layer.columns + 1) if layer.columns % n == 0)


def parted(rows: Array, count: int) -> Array:
    """[1, positions, columns + 1], ones at the end, as [parts, positions, columns of a part + 1]."""
    plain = np.moveaxis(rows[0, :, :-1].reshape(rows.shape[1], count, -1), 1, 0)
    return np.concatenate([plain, np.ones((*plain.shape[:-1], 1), rows.dtype)], axis=-1)


def precision(columns: int) -> type[np.float32] | type[np.float64]:
    """In which moments of so many columns are kept and solved: what is wide takes too much memory in double."""
    return np.float32 if columns > _WIDE_ROWS else np.float64


class Moments:
    """H = sum x x^T and G = sum x_dense x^T of each block of a layer, x with a 1 at its end for the bias.

    Where the output is one summand of a residual sum, also E = sum e x^T, e what the other summand has lost: the layer
    can make up for it (He, Zhang and Sun 2017 do so for channels).
    """

    def __init__(self, layer: Layer, batches: int, seed: int) -> None:
        """Starts at zero.

        Args:
            layer: whose input is looked at.
            batches: how many times `add` will be called.
            seed: of the choice of positions.
        """
        self._window = layer.window
        self._rows = layer.rows
        self._parts = parts(layer)
        most = MAX_COLUMNS_WIDE if layer.columns > _WIDE_ROWS else MAX_COLUMNS
        self._room = max(math.ceil(most / batches), 1)
        self._random = np.random.default_rng(seed)
        self.moment: Wide = np.zeros(0)
        self.cross: Wide = np.zeros(0)
        self._lost: Wide = np.zeros(0)

    def add(self, dense: Array, pruned: Array, gap: Array | None = None) -> None:
        """Adds one batch of inputs, as the dense and as the pruned model make them.

        Args:
            dense: what the layer reads in the dense model.
            pruned: what it reads in the pruned one.
            gap: what the other summand of its output lacks there, in the form of the output.
        """
        x_dense, x, lost = self.rows(dense, pruned, gap)
        if self._parts > 1:
            x_dense, x, lost = parted(x_dense, self._parts), parted(x, self._parts), None
        size = x.shape[-1]
        if not self.moment.size:
            self.moment = np.zeros((x.shape[0], size, size), precision(size))
            self.cross = np.zeros((x.shape[0], x_dense.shape[-1], size), precision(size))
        product = np.float32 if size > _WIDE_COLUMNS else np.float64
        x, x_dense = x.astype(product), x_dense.astype(product)
        for block in range(len(x)):
            self.moment[block] += x[block].T @ x[block]  # two axes: half the work, by symmetry
            self.cross[block] += x_dense[block].T @ x[block]
        if lost is not None:
            self._add_lost(lost, x)

    def rows(
        self, dense: Array, pruned: Array, gap: Array | None = None
    ) -> tuple[Array, Array, Array | None]:
        """What the layer multiplies at some positions, [blocks, positions, columns + 1] of both, and what lacks there.

        Args:
            dense: what the layer reads in the dense model.
            pruned: what it reads in the pruned one.
            gap: in the form of the output; what comes back is [positions, blocks, rows], None where it does not fit.
        """
        positions = self._positions(pruned)
        x_dense, x = (inputs(a, self._window, positions) for a in (dense, pruned))
        if gap is None or gap.shape != self._made(pruned):
            return x_dense, x, None
        last = gap if self._window is None else np.moveaxis(gap, 1, -1)
        return x_dense, x, _rows(last)[positions].reshape(len(positions), len(x), -1)

    def _made(self, pruned: Array) -> tuple[int, ...]:
        """The shape of the output: a summand of another one is repeated, or repeats it."""
        if self._window is None:
            return (*pruned.shape[:-1], self._rows)
        return (len(pruned), self._rows, *output_size(pruned.shape[2:], self._window))

    def _add_lost(self, lost: Array, x: Array) -> None:
        if not self._lost.size:
            shape = (len(x), lost.shape[-1], x.shape[-1])
            self._lost = np.zeros(shape, precision(x.shape[-1]))
        for block in range(len(x)):
            self._lost[block] += lost[:, block].astype(x.dtype).T @ x[block]

    def aim(self, full: Wide, block: int, size: int) -> Wide:
        """What a block shall make, against its inputs in the pruned model: full G + E, the first `size` columns.

        Args:
            full: the matrix of the block in the dense model, rows that stay, its bias the last column if it has one.
            block: which.
            size: inputs of the block in the pruned model, 1 for the bias included.
        """
        made: Wide = full @ self.cross[block][: full.shape[1], :size]
        return made + self._lost[block][:, :size] if self._lost.size else made

    def forget_cross(self) -> None:
        """Lets go of G, which is as large as H, once what is needed of it is known."""
        self.cross = self._lost = np.zeros(0)

    def _positions(self, array: Array) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        total = math.prod(array.shape[:-1])
        if self._window is not None:
            total = len(array) * math.prod(output_size(array.shape[2:], self._window))
        if total <= self._room:
            return np.arange(total)
        return np.sort(self._random.choice(total, self._room, replace=False))


def inputs(array: Array, window: Window | None, positions: Array) -> Array:
    """What a layer multiplies by its matrix at some positions: [blocks, positions, columns + 1], ones at the end."""
    rows = _rows(array)[positions][None] if window is None else patches(array, window, positions)
    ones = np.ones((*rows.shape[:-1], 1), rows.dtype)
    return np.concatenate([rows, ones], axis=-1)


def _rows(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def patches(array: Array, window: Window, positions: Array) -> Array:
    """Patches of [N, C, spatial...] under a window: [groups, positions, kernel * C / groups], channels fastest."""
    if window.turned is not None:
        array, window = spread(array, window)
    spatial = array.shape[2:]
    pads = [(0, 0), (0, 0), *_pads(spatial, window)]
    reach = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    axes = tuple(range(2, array.ndim))
    view = sliding_window_view(np.pad(array, pads), reach, axis=axes)
    steps = tuple(slice(None, None, stride) for stride in window.strides)
    taps = tuple(slice(None, None, dilation) for dilation in window.dilations)
    view = view[(slice(None), slice(None), *steps, *taps)]
    rank = len(spatial)
    grid = np.moveaxis(view, 1, 1 + rank)  # [N, positions..., C, kernel...]
    where = np.unravel_index(positions, grid.shape[: 1 + rank])
    chosen = grid[where]
    count, channels = chosen.shape[:2]
    split = chosen.reshape(count, window.group, channels // window.group, *window.kernel)
    last = np.moveaxis(split, 2, -1)
    return np.moveaxis(last.reshape(count, window.group, -1), 1, 0)


def spread(array: Array, window: Window) -> tuple[Array, Window]:
    """What a transposed convolution reads, with zeros between, and the window through which it is a plain one.

    The weight of the plain one is turned round: `Layer.matrix` does so.
    """
    plain = _turned_window(window)
    lead, spatial = array.shape[:2], array.shape[2:]
    made = np.zeros((*lead, *_turned_extent(spatial, window)), array.dtype)
    steps = [slice(0, (n - 1) * s + 1, s) for n, s in zip(spatial, window.strides, strict=True)]
    made[(slice(None), slice(None), *steps)] = array
    half = len(plain.pads) // 2
    ends = zip(plain.pads[:half], plain.pads[half:], made.shape[2:], strict=True)
    inside = [slice(max(-a, 0), n - max(-b, 0)) for a, b, n in ends]
    pads = tuple(max(pad, 0) for pad in plain.pads)
    return made[(slice(None), slice(None), *inside)], dataclasses.replace(plain, pads=pads)


def _turned_extent(spatial: tuple[int, ...], window: Window) -> tuple[int, ...]:
    extra = window.turned or (0,) * len(spatial)
    return tuple(
        (n - 1) * s + 1 + more for n, s, more in zip(spatial, window.strides, extra, strict=True)
    )


def _turned_window(window: Window) -> Window:
    """Steps of 1, and pads up to where each input is still met; some may be negative."""
    count = len(window.kernel)
    reach = [(k - 1) * d for k, d in zip(window.kernel, window.dilations, strict=True)] * 2
    pads = tuple(far - pad for far, pad in zip(reach, window.pads, strict=True))
    return dataclasses.replace(window, strides=(1,) * count, pads=pads, turned=None)


def output_size(spatial: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """Extent of the output by spatial axis."""
    if window.turned is not None:
        spatial, window = _turned_extent(spatial, window), _turned_window(window)
    pads = _pads(spatial, window)
    return tuple(
        (size + before + after - (k - 1) * d - 1) // s + 1
        for size, (before, after), k, d, s in zip(
            spatial, pads, window.kernel, window.dilations, window.strides, strict=True
        )
    )


def _pads(spatial: tuple[int, ...], window: Window) -> list[tuple[int, int]]:
    if window.auto_pad in ("NOTSET", "VALID", ""):
        rank = len(spatial)
        given = window.pads if window.auto_pad != "VALID" else (0,) * (2 * rank)
        return list(zip(given[:rank], given[rank:], strict=True))
    found = []
    for size, k, d, s in zip(spatial, window.kernel, window.dilations, window.strides, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if window.auto_pad == "SAME_UPPER" else (more, less))
    return found
