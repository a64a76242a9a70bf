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


def _keeping_zeros(rows: Wide, limits: Limits) -> tuple[Wide, Wide]:
    """The least and the greatest code of each weight: 0 alone for what was pruned, where 0 is a code."""
    least, most = (np.broadcast_to(end, rows.shape) for end in limits)
    gone = (rows == 0) & (least <= 0) & (most >= 0)
    return np.where(gone, 0, least), np.where(gone, 0, most)


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
    found = codes.copy()
    wide = np.broadcast_to(scales, rows.shape)
    least, most = _keeping_zeros(rows, limits)
    slope = (rows - found * wide) @ moments
    diagonal = np.diag(moments)
    for _ in range(SWEEPS):
        moved = 0
        for k in range(rows.shape[1]):
            step = wide[:, k]
            direction = np.sign(slope[:, k] * step)
            better = 2 * np.abs(slope[:, k]) > np.abs(step) * diagonal[k] * (1 + 1e-9)
            target = found[:, k] + direction
            within = (target >= least[:, k]) & (target <= most[:, k])
            chosen = np.flatnonzero(better & within)
            if len(chosen) == 0:
                continue
            moved += len(chosen)
            found[chosen, k] = target[chosen]
            slope[chosen] -= (step[chosen] * direction[chosen])[:, None] * moments[k]
        if moved == 0:
            break
    return found


def compensate(rows: Wide, scales: Wide, moments: Moments, limits: Limits) -> Wide:
    """Codes in one go from the first column to the last, the error of each passed on to those behind (GPTQ)."""
    upper = moments.upper
    wide = np.broadcast_to(scales, rows.shape)
    least, most = _keeping_zeros(rows, limits)
    left, codes = rows.copy(), np.empty_like(rows)
    for k in range(rows.shape[1]):
        codes[:, k] = np.clip(np.rint(left[:, k] / wide[:, k]), least[:, k], most[:, k])
        lost = (left[:, k] - codes[:, k] * wide[:, k]) / upper[k, k]
        left[:, k + 1 :] -= lost[:, None] * upper[k, k + 1 :]
    return codes
