"""Codes of weights chosen by what they do to outputs, not by what is nearest: second moments of the input decide.

The error of a layer is tr(D H D^T), D what rounding changed, H the second moments of its input.

Source: Frantar et al. 2022 (GPTQ); Nagel et al. 2020 (AdaRound), here by coordinates, without gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Wide: TypeAlias = npt.NDArray[np.float64]

DAMPING = 0.01
"""Of the mean of the diagonal, added to it: directions that the samples did not show cost something too."""

SWEEPS = 3

Limits: TypeAlias = tuple[int, int] | tuple[Wide, Wide]
"""The least and the greatest code, of all weights or of each."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of what a weight is multiplied with, ready for use.

    Attributes:
        damped: with a diagonal that is safely positive [K, K].
    """

    damped: Wide

    @classmethod
    def of(cls, moments: Wide) -> Moments:
        """The moments as they were collected."""
        return cls(damped(moments))

    @functools.cached_property
    def upper(self) -> Wide:
        """The triangle by which the error of a column is passed on to those behind: of the inverse, by Cholesky."""
        return np.asarray(np.linalg.cholesky(np.linalg.inv(self.damped)).T)


def damped(moments: Wide) -> Wide:
    """The moments with a diagonal that is safely positive."""
    level = DAMPING * float(np.mean(np.diag(moments)))
    return np.asarray(moments + np.eye(len(moments)) * max(level, 1e-12))


def error(lost: Wide, moments: Wide) -> float:
    """tr(D H D^T)."""
    return float(np.einsum("rk,rk->", lost @ moments, lost))


BLOCK = 64
"""Columns that are worked on by themselves; what they do to the others is one product of matrices (as in GPTQ)."""


def _keeping_zeros(rows: Wide, limits: Limits) -> tuple[Wide, Wide]:
    """The least and the greatest code of each weight [K, rows]: 0 alone for what was pruned, where 0 is a code."""
    least, most = (np.broadcast_to(end, rows.shape).T for end in limits)
    gone = (rows.T == 0) & (least <= 0) & (most >= 0)
    return np.where(gone, 0, least), np.where(gone, 0, most)


def _columns(array: Wide, shape: tuple[int, ...]) -> Wide:
    """The columns of it, each in one piece [K, rows]."""
    return np.array(np.broadcast_to(array, shape).T, order="C")


def refine(rows: Wide, codes: Wide, scales: Wide, moments: Wide, limits: Limits) -> Wide:
    """Codes moved one step wherever that lowers the error, until none does or the sweeps are over.

    Moving code k of a row by d = 1 or -1 changes its error by -2 s d (D H)_k + s^2 H_kk.

    Args:
        rows: float weights [rows, K].
        codes: to start from [rows, K].
        scales: of each weight [rows, K], or [rows, 1]; they may be negative.
        moments: H [K, K].
        limits: least and greatest code, of all or of each [rows, K].
    """
    found, steps = _columns(codes, rows.shape), _columns(scales, rows.shape)
    ends = _keeping_zeros(rows, limits)
    slope = moments @ (rows.T - found * steps)
    for _ in range(SWEEPS):
        moved = False
        for start in range(0, len(found), BLOCK):
            part = slice(start, start + BLOCK)
            within = ends[0][part], ends[1][part]
            moves = _moves(found[part], steps[part], slope[part], moments[part, part], within)
            if moves.any():
                moved = True
                slope -= moments[:, part] @ moves
        if not moved:
            break
    return np.ascontiguousarray(found.T)


def _moves(found: Wide, steps: Wide, slope: Wide, moments: Wide, ends: tuple[Wide, Wide]) -> Wide:
    """Moves codes of a few columns, one after the other; returns what that adds to the weights; all [columns, rows]."""
    near, moves = slope.copy(), np.zeros_like(slope)
    for k, diagonal in enumerate(np.diag(moments)):
        direction = np.sign(near[k] * steps[k])
        target = found[k] + direction
        better = 2 * np.abs(near[k]) > np.abs(steps[k]) * diagonal * (1 + 1e-9)
        chosen = np.flatnonzero(better & (target >= ends[0][k]) & (target <= ends[1][k]))
        if len(chosen) == 0:
            continue
        found[k, chosen] = target[chosen]
        moves[k, chosen] = steps[k, chosen] * direction[chosen]
        near[:, chosen] -= moments[:, k, None] * moves[k, chosen]
    return moves


def compensate(rows: Wide, scales: Wide, moments: Moments, limits: Limits) -> Wide:
    """Codes in one go from the first column to the last, the error of each passed on to those behind (GPTQ)."""
    upper = moments.upper
    left, steps = _columns(rows, rows.shape), _columns(scales, rows.shape)
    least, most = _keeping_zeros(rows, limits)
    codes = np.empty_like(left)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        lost = np.empty((stop - start, left.shape[1]))
        for k in range(start, stop):
            codes[k] = np.clip(np.rint(left[k] / steps[k]), least[k], most[k])
            lost[k - start] = (left[k] - codes[k] * steps[k]) / upper[k, k]
            left[k + 1 : stop] -= upper[k, k + 1 : stop, None] * lost[k - start]
        left[stop:] -= upper[start:stop, stop:].T @ lost
    return np.ascontiguousarray(codes.T)
