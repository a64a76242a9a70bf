"""Rules for gradients of what looks through a window: convolutions and pools, one place of the window at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from graphopt_passes.prune.gradients import Call, Grads, Rule
from graphopt_passes.prune.layers import Array

Where: TypeAlias = tuple[Any, ...]
"""An index: slices."""


class _View:
    """What a window sees of [N, C, spatial...]: for each of its places, a strided part of the padded input."""

    def __init__(self, call: Call, kernel: tuple[int, ...]) -> None:
        x, made = call.read(0), call.made
        rank = len(kernel)
        ones = (1,) * rank
        self.kernel = kernel
        self.size, self.out = x.shape[2:], made.shape[2:]
        self._strides = call.attribute("strides", ones)
        self._dilations = call.attribute("dilations", ones)
        ends = zip(self.out, self._strides, kernel, self._dilations, strict=True)
        reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in ends]
        mode = call.attribute("auto_pad", "NOTSET")
        if mode in ("NOTSET", ""):
            self._begin = tuple(call.attribute("pads", (0,) * (2 * rank)))[:rank]
        else:
            missing = [max(r - n, 0) for r, n in zip(reach, self.size, strict=True)]
            upper = mode != "SAME_LOWER"
            self._begin = tuple(m // 2 if upper else m - m // 2 for m in missing)
        whole = zip(reach, self._begin, self.size, strict=True)
        self.padded = tuple(max(r, b + n) for r, b, n in whole)

    def padded_input(self, x: Array, fill: float) -> Array:
        """The input with what lies around it."""
        lead = x.shape[: x.ndim - len(self.size)]
        made = np.full((*lead, *self.padded), fill, x.dtype)
        made[(..., *self._inside())] = x
        return made

    def inside(self, padded: Array) -> Array:
        """Without what lies around it."""
        return padded[(..., *self._inside())]

    def _inside(self) -> Where:
        return tuple(slice(b, b + n) for b, n in zip(self._begin, self.size, strict=True))

    def places(self) -> Iterator[tuple[tuple[int, ...], Where]]:
        """Each place of the window, and where in the padded input all windows have it."""
        for place in itertools.product(*map(range, self.kernel)):
            ends = zip(place, self._dilations, self._strides, self.out, strict=True)
            yield place, tuple(slice(p * d, p * d + (n - 1) * s + 1, s) for p, d, s, n in ends)


def _conv(call: Call) -> Grads:
    x, weight, grad = call.read(0), call.read(1), call.grad
    view, groups = _View(call, weight.shape[2:]), call.attribute("group", 1)
    turned = np.ascontiguousarray(np.swapaxes(grad, 0, 1))
    if groups > 1 and weight.shape[1] == 1 and weight.shape[0] == groups:
        small = math.prod(view.padded) <= _FEW_PLACES
        rule = _depthwise_as_products if small else _depthwise
        by_x, by_weight = rule(view, np.swapaxes(x, 0, 1), weight, turned)
    else:
        by_x, by_weight = _dense(view, np.swapaxes(x, 0, 1), weight, turned, groups)
    found: Grads = [np.swapaxes(by_x, 0, 1), by_weight]
    if call.has(2):
        found.append(grad.sum((0, *range(2, grad.ndim))))
    return found + [None] * (len(call.inputs) - len(found))


def _dense(view: _View, x: Array, weight: Array, grad: Array, groups: int) -> tuple[Array, Array]:
    """Of [C, N, spatial...]: one product of matrices for each place of the window and each group."""
    padded = view.padded_input(x, 0.0)
    by_padded, by_weight = np.zeros_like(padded), np.zeros_like(weight)
    rows, columns = len(weight) // groups, weight.shape[1]
    for group in range(groups):
        mine, reads = (
            slice(group * rows, (group + 1) * rows),
            slice(group * columns, (group + 1) * columns),
        )
        flat = grad[mine].reshape(rows, -1)
        for place, where in view.places():
            at: Where = (mine, slice(None), *place)
            seen = padded[(reads, slice(None), *where)]
            by_weight[at] = flat @ seen.reshape(columns, -1).T
            by_padded[(reads, slice(None), *where)] += (weight[at].T @ flat).reshape(seen.shape)
    return view.inside(by_padded), by_weight


def _depthwise(view: _View, x: Array, weight: Array, grad: Array) -> tuple[Array, Array]:
    padded = view.padded_input(x, 0.0)
    by_padded, by_weight = np.zeros_like(padded), np.zeros_like(weight)
    axes = tuple(range(1, grad.ndim))
    for place, where in view.places():
        at: Where = (slice(None), 0, *place)
        by_weight[at] = (padded[(..., *where)] * grad).sum(axes)
        by_padded[(..., *where)] += grad * weight[at].reshape(-1, *[1] * len(axes))
    return view.inside(by_padded), by_weight


_FEW_PLACES = 400
"""Of a padded image, up to which products with the whole of it are faster than its windows one by one."""


def _depthwise_as_products(
    view: _View, x: Array, weight: Array, grad: Array
) -> tuple[Array, Array]:
    """Each channel as one matrix [places out, places in], mostly zero."""
    index = np.arange(math.prod(view.padded)).reshape(view.padded)
    inside, rows = view.inside(index).reshape(-1), np.arange(math.prod(view.out))
    reads: list[tuple[Where, Array]] = [
        ((slice(None), 0, *place), index[at].reshape(-1)) for place, at in view.places()
    ]
    matrix = np.zeros((len(x), len(rows), index.size), x.dtype)
    for at, columns in reads:
        matrix[:, rows, columns] += weight[at][:, None]
    flat = grad.reshape(*grad.shape[:2], -1)
    by_x = flat @ np.ascontiguousarray(matrix[:, :, inside])
    met = np.zeros_like(matrix)
    met[:, :, inside] = np.swapaxes(flat, 1, 2) @ x.reshape(*x.shape[:2], -1)
    by_weight = np.empty_like(weight)
    for at, columns in reads:
        by_weight[at] = met[:, rows, columns].sum(1)
    return by_x.reshape(x.shape), by_weight


def _max_pool(call: Call) -> Grads:
    x = call.read(0)
    view = _View(call, call.attribute("kernel_shape", ()))
    padded = view.padded_input(x, -np.inf)
    found = np.zeros_like(padded)
    free = np.ones(call.made.shape, bool)
    for _, where in view.places():
        chosen = free & (padded[(..., *where)] == call.made)
        found[(..., *where)] += np.where(chosen, call.grad, 0)
        free &= ~chosen  # of equal ones the first
    return [view.inside(found)]


def _average_pool(call: Call) -> Grads:
    x = call.read(0)
    view = _View(call, call.attribute("kernel_shape", ()))
    # What lies outside counts where the node says so, and never beyond the pads that it states.
    around = 1.0 if call.attribute("count_include_pad", 0) else 0.0
    ones = view.padded_input(np.ones(x.shape[2:], x.dtype), around)
    count = sum(ones[where] for _, where in view.places())
    share = call.grad / count
    found = np.zeros((*x.shape[:2], *view.padded), x.dtype)
    for _, where in view.places():
        found[(..., *where)] += share
    return [view.inside(found)]


def _global_average(call: Call) -> Grads:
    x = call.read(0)
    return [np.broadcast_to(call.grad / math.prod(x.shape[2:]), x.shape).astype(x.dtype)]


WINDOWS: Mapping[str, Rule] = {
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
}
