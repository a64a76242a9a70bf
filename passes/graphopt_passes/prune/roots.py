"""Triangular factors of inverses of second moments, made in place: what is wide leaves no room for copies."""

from __future__ import annotations

import dataclasses

import numpy as np

from graphopt_passes.prune.layers import Wide

RIDGE = 0.01
"""Over the mean of the diagonal of H."""

_BLOCK = 256
_HARDER = (1.0, 10.0, 100.0, 1000.0)


def ridge(moment: Wide) -> float:
    """The ridge of a second moment, positive even where the moment is zero."""
    return RIDGE * float(np.mean(np.diag(moment))) or 1e-8


@dataclasses.dataclass(frozen=True)
class Root:
    """U with U^T U = (H + damp I)^-1.

    Attributes:
        upper: upper triangular.
        damp: as small as it can be, from the usual ridge on.
    """

    upper: Wide
    damp: float

    def solve(self, right: Wide) -> Wide:
        """X of X (H + damp I) = right."""
        return np.asarray((right @ self.upper.T) @ self.upper)


def inverse_root(moment: Wide) -> Root:
    """The factor of a symmetric moment that is positive up to rounding; the moment stays as it is."""
    damp = ridge(moment)
    for harder in _HARDER:
        try:
            return Root(_root(moment, harder * damp), harder * damp)
        except np.linalg.LinAlgError:
            continue
    scale = float(np.mean(np.abs(np.diag(moment)))) or 1.0
    return Root(np.asarray(np.eye(len(moment)) / np.sqrt(scale), moment.dtype), scale)


def inverse(work: Wide) -> Wide:
    """The inverse of a symmetric positive definite matrix, made in its place.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    blocks = _blocks(work)
    _factorize(work, blocks)
    _invert(work, blocks)
    # U^T U, from the last rows up: each block of rows needs those above it as they were.
    for here in reversed(blocks):
        rows, right = slice(0, here.stop), slice(here.start, None)
        work[here, right] = work[rows, here].T @ work[rows, right]
    for here in blocks:
        work[here.stop :, here] = work[here, here.stop :].T
    return work


def _root(moment: Wide, damp: float) -> Wide:
    """U from H + damp I = R R^T, R upper, U = R^-1."""
    work = moment.copy()
    work.reshape(-1)[:: len(work) + 1] += damp
    blocks = _blocks(work)
    _factorize(work, blocks)
    _invert(work, blocks)
    return work


def _blocks(work: Wide) -> list[slice]:
    return [slice(at, min(at + _BLOCK, len(work))) for at in range(0, len(work), _BLOCK)]


def _factorize(work: Wide, blocks: list[slice]) -> None:
    """Makes R of R R^T = work in its upper half; the rest becomes zero."""
    for index in range(len(blocks) - 1, -1, -1):
        here, above = blocks[index], slice(0, blocks[index].start)
        lower = np.linalg.cholesky(work[here, here][::-1, ::-1])
        work[here, here] = corner = lower[::-1, ::-1]
        work[here, above] = 0
        work[above, here] = work[above, here] @ np.linalg.inv(corner).T
        for other in blocks[:index]:
            rows = slice(0, other.stop)
            work[rows, other] -= work[rows, here] @ work[other, here].T


def _invert(work: Wide, blocks: list[slice]) -> None:
    """Makes the inverse of an upper triangular matrix in its place."""
    for here in blocks:
        above = slice(0, here.start)
        work[here, here] = corner = np.triu(np.linalg.inv(work[here, here]))
        work[above, here] = -(work[above, above] @ (work[above, here] @ corner))
