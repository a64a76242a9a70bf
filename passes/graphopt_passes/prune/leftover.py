"""What the readers of channels lose when those go and the rest is fitted to make up for them.

Removing columns J of a weight W that reads x, with second moments H about the mean, costs tr(W_J ((H^-1)_JJ)^-1 W_J^T)
after the best fit of the others, which changes W and H^-1 in closed form (Frantar and Alistarh 2022 for single weights,
here for all columns of a channel, and over all its readers).  Costs are shares of what the readers' outputs vary by, so
that those of different layers compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from graphopt_passes.prune.channels import Group
from graphopt_passes.prune.layers import Layer, Wide
from graphopt_passes.prune.roots import ridge

MAX_COLUMNS = 2400
"""Inputs of a reader up to which it is looked at: time goes with the third power."""

_STEPS = 32
"""In how many steps a group is taken apart, at most."""


@dataclasses.dataclass(eq=False)
class _Reader:
    """A layer while channels of it go one after the other.

    Attributes:
        weight: [rows, columns], fitted to what is left.
        inverse: of the moments of what is left.
        columns: those of each class, [classes, columns of one].
        scale: by which costs become shares.
    """

    weight: Wide
    inverse: Wide
    columns: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    scale: float

    def costs(self, classes: Sequence[int]) -> Wide:
        """Of removing each of some classes alone."""
        at = self.columns[list(classes)]
        middle = np.linalg.inv(self.inverse[at[:, :, None], at[:, None, :]])
        parts = self.weight[:, at]
        return np.asarray(
            np.einsum("rci,cij,rcj->c", parts, middle, parts, optimize=True) * self.scale
        )

    def remove(self, classes: Sequence[int]) -> None:
        """Fits what is left to make up for some classes."""
        at = self.columns[list(classes)].reshape(-1)
        solved = np.linalg.solve(self.inverse[np.ix_(at, at)], self.inverse[at])
        self.weight = self.weight - self.weight[:, at] @ solved
        self.inverse = self.inverse - self.inverse[:, at] @ solved


def leftovers(groups: Sequence[Group], moments: Mapping[str, Wide]) -> dict[int, float]:
    """What each class costs at the time when it is the cheapest of its group that is left.

    Args:
        groups: of classes.
        moments: by name of a weight, [1, columns + 1, columns + 1], the last those of a constant 1.
    """
    found: dict[int, float] = {}
    for group in groups:
        readers = _readers(group, moments)
        left = list(range(len(group.classes)))
        step = max(len(left) // _STEPS, 1)
        spent = 0.0
        while left:
            if not readers:
                found.update((group.classes[at], 1.0) for at in left)
                break
            costs = np.sum([reader.costs(left) for reader in readers], axis=0)
            order = np.argsort(costs, kind="stable")[:step]
            for at in order.tolist():
                spent = max(spent, float(costs[at]))
                found[group.classes[left[at]]] = spent
            gone = [left[at] for at in order.tolist()]
            for reader in readers:
                reader.remove(gone)
            left = [at for at in left if at not in set(gone)]
    return found


def can_tell(layer: Layer) -> bool:
    """Whether the readers' loss is known: a plain layer that is not too wide."""
    return layer.blocks == 1 and layer.columns <= MAX_COLUMNS


def _readers(group: Group, moments: Mapping[str, Wide]) -> list[_Reader]:
    slices: dict[Layer, list[list[int]]] = {}
    for root in group.classes:
        for layer, at in group.columns[root]:
            slices.setdefault(layer, []).append(_columns(layer, at.tolist()))
    whole = {
        layer: several
        for layer, several in slices.items()
        if layer.name in moments and len(several) == len(group.classes)
    }
    return [_reader(layer, several, moments[layer.name][0]) for layer, several in whole.items()]


def _columns(layer: Layer, channels: Sequence[int]) -> list[int]:
    """The columns of the matrix of a layer that read some channels: kernel positions come first in it."""
    if layer.window is None:
        return list(channels)
    width = layer.inner
    taps = layer.columns // width
    return [tap * width + channel for tap in range(taps) for channel in channels]


def _reader(layer: Layer, several: list[list[int]], moment: Wide) -> _Reader:
    wide = moment.astype(np.float64)
    mean, count = wide[:-1, -1], max(float(wide[-1, -1]), 1.0)
    about = wide[:-1, :-1] - np.outer(mean, mean) / count
    weight = layer.matrix()[0]
    energy = float(np.sum((weight @ about) * weight))
    damped = about + ridge(about) * np.eye(len(about))
    return _Reader(
        weight,
        np.asarray(np.linalg.inv(damped), np.float64),
        np.array(several),
        1 / max(energy, 1e-12),
    )
