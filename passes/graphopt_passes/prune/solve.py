"""Which weights to keep and what they become, from second moments.  Pure functions of arrays in float64.

`W` is [rows, columns]; `H` = sum of x x^T over the inputs x of the layer in the pruned model so far; `G` = sum of
x_dense x^T.  With the dense target `T = (W0 G + l W0)(H + l I)^-1`, the distance between the outputs of the pruned and
of the dense layer is ||(W - T) H^(1/2)||^2 up to a constant: every method below works on (T, H), and so repairs what
the layers before it have lost.  `A` stands for W0 G, to which is added what the other summand of a residual sum lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt_passes.prune.allocate import ROUGH_FROM, smallest, smallest_about
from graphopt_passes.prune.layers import Array, Wide
from graphopt_passes.prune.request import Method
from graphopt_passes.prune.roots import RIDGE, Root, inverse, inverse_root, ridge

Mask = npt.NDArray[np.bool_]

_BLOCK, _STEP = 128, 32
_FINE_COLUMNS = 256
_WIDE_COLUMNS = 640
_ADMM_STEPS, _ADMM_STEPS_WIDE, _ADMM_STEPS_HUGE, _ADMM_RHO = 100, 16, 12, 0.3
_ADMM_RAMP = 0.7
_REFIT_STEPS, _REFIT_STEPS_WIDE, _REFIT_STEPS_HUGE = 30, 10, 6
_HUGE_COLUMNS = 2048


@dataclasses.dataclass(frozen=True)
class Goal:
    """How many zeros, and where they may lie.

    Attributes:
        zeros: in the matrix.
        pattern: (N, M) instead: N of each M consecutive columns stay.
        fixed: columns at the end that always stay (the bias).
    """

    zeros: int = 0
    pattern: tuple[int, int] | None = None
    fixed: int = 0

    @property
    def removes(self) -> bool:
        """Whether there is anything to set to zero."""
        return self.zeros > 0 or self.pattern is not None

    def of(self, size: int) -> int:
        """How many zeros it makes in so many weights."""
        if self.pattern is None:
            return self.zeros
        n, m = self.pattern
        return size * (m - n) // m

    def mask(self, scores: Wide, *, rough: bool = False) -> Mask:
        """Which weights stay: those with the greatest scores.

        Args:
            scores: of all weights.
            rough: whether about so many will do, where to count would take long.
        """
        keep = np.ones(scores.shape, bool)
        free = scores[:, : scores.shape[1] - self.fixed]
        if self.pattern is not None:
            chosen = pattern_mask(free, *self.pattern)
        elif rough and free.size >= ROUGH_FROM:
            chosen = smallest_about(free, self.zeros)
        else:
            chosen = smallest(free, self.zeros)
        keep[:, : free.shape[1]] = chosen
        return keep

    def share(self, part: float) -> Goal:
        """The same with `part` of the zeros."""
        return dataclasses.replace(self, zeros=int(self.zeros * part))


def pattern_mask(scores: Wide, n: int, m: int) -> Mask:
    """True at the n greatest of each m consecutive columns; ties go by position."""
    groups = scores.reshape(scores.shape[0], -1, m)
    ranks = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1, kind="stable")
    return (ranks < n).reshape(scores.shape)


def dense_target(weight: Wide, aim: Wide, root: Root) -> Wide:
    """The weight that fits the outputs of the dense layer best, given the inputs of the pruned model."""
    return root.solve(aim + root.damp * weight)


def refit(mask: Mask, start: Wide, weight: Wide, moment: Wide, aim: Wide) -> Wide:
    """Least squares on the kept weights: conjugate gradients with a Jacobi preconditioner, all rows at once.

    Minimises ||W X - W0 X_dense||^2 + l ||W - W0||^2 over W that is zero outside `mask`, from `start`.
    """
    damp = ridge(moment)
    scale = np.diag(moment) + damp
    found = np.where(mask, start, 0.0)
    removed = ~mask

    def apply(direction: Wide) -> Wide:
        image = direction @ moment
        image += damp * direction
        image[removed] = 0
        return image

    rest = np.where(mask, aim + damp * weight, 0.0) - apply(found)
    eased = rest / scale
    step = eased.copy()
    energy = np.sum(rest * eased, axis=1, keepdims=True)
    for _ in range(_refit_steps(len(moment))):
        image = apply(step)
        curve = np.sum(step * image, axis=1, keepdims=True)
        rate = np.divide(energy, curve, out=np.zeros_like(energy), where=curve > 0)
        found += rate * step
        rest -= rate * image
        eased = rest / scale
        renewed = np.sum(rest * eased, axis=1, keepdims=True)
        step = eased + step * np.divide(
            renewed, energy, out=np.zeros_like(energy), where=energy > 0
        )
        energy = renewed
    return found


def _refit_steps(columns: int) -> int:
    """Each step takes time in the square of the columns, and the first few bring most."""
    if columns > _HUGE_COLUMNS:
        return _REFIT_STEPS_HUGE
    return _REFIT_STEPS_WIDE if columns > _WIDE_COLUMNS else _REFIT_STEPS


def solve(
    weight: Wide, moment: Wide, aim: Wide, goal: Goal, method: Method, *, fit: bool
) -> tuple[Wide, Mask]:
    """The pruned matrix and its mask, computed in the precision of the moments.

    Args:
        weight: W.
        moment: H.
        aim: A.
        goal: how many zeros.
        method: how the weights that stay are chosen.
        fit: whether they are fitted to the outputs of the dense layer.
    """
    weight = weight.astype(moment.dtype, copy=False)
    if not goal.removes:
        kept = np.ones(weight.shape, bool)
        return (dense_target(weight, aim, inverse_root(moment)) if fit else weight), kept
    if method is Method.MAGNITUDE:
        start, mask = weight, goal.mask(np.abs(weight))
    elif method is Method.WANDA:
        start, mask = weight, goal.mask(np.abs(weight) * np.sqrt(np.diag(moment)))
    else:
        start, mask = _chosen_by_target(weight, moment, aim, goal, method)
    if not fit:
        return np.where(mask, start, 0.0), mask
    return refit(mask, start, weight, moment, aim), mask


def _chosen_by_target(
    weight: Wide, moment: Wide, aim: Wide, goal: Goal, method: Method
) -> tuple[Wide, Mask]:
    """A start and a mask by what approximates the best dense fit; its factor is let go of on return."""
    root = inverse_root(moment)
    target = dense_target(weight, aim, root)
    if method is Method.SPARSEGPT:
        return sparse_gpt(target, root.upper, goal)
    del root
    return admm(target, moment, goal)


def sparse_gpt(target: Wide, upper: Wide, goal: Goal) -> tuple[Wide, Mask]:
    """Column by column: each removed weight is made up for by those to its right.

    Source: Frantar and Alistarh 2023, SparseGPT; columns in blocks, the mask of a block chosen when it is reached.

    Args:
        target: the best dense fit; it is used up.
        upper: U of U^T U = (H + damp I)^-1.
        goal: how many zeros.
    """
    free = target.shape[1] - goal.fixed
    mask = np.ones(target.shape, bool)
    width = _block_width(goal)
    for begin in range(0, target.shape[1], width):
        end = min(begin + width, target.shape[1])
        here, part = slice(begin, end), np.ascontiguousarray(target[:, begin:end].T)
        inside = min(end, free) - begin
        if inside > 0:
            scores = np.square(part[:inside].T / np.diag(upper)[begin : begin + inside])
            zeros = round(goal.zeros * inside / free)
            mask[:, begin : begin + inside] = Goal(zeros, goal.pattern).mask(scores)
        errors = _swept(part, mask[:, here].T, upper[here, here])
        target[:, here] = part.T
        target[:, end:] -= errors.T @ upper[here, end:]
    target[~mask] = 0
    return target, mask


def _swept(part: Wide, keep: Mask, upper: Wide) -> Wide:
    """Errors of the columns of a block, which are the rows of `part` and are changed in place, one by one.

    Those near at hand see each error at once, the rest of the block all of a few together.
    """
    errors = np.empty_like(part)
    for start in range(0, len(part), _STEP):
        stop = min(start + _STEP, len(part))
        for at in range(start, stop):
            errors[at] = np.where(keep[at], 0, part[at]) / upper[at, at]
            part[at:stop] -= upper[at, at:stop, None] * errors[at]
        part[stop:] -= upper[start:stop, stop:].T @ errors[start:stop]
    return errors


def _block_width(goal: Goal) -> int:
    if goal.pattern is None:
        return _BLOCK
    return max(_BLOCK // goal.pattern[1], 1) * goal.pattern[1]


def admm(target: Wide, moment: Wide, goal: Goal) -> tuple[Wide, Mask]:
    """Alternates between the best dense fit and the nearest sparse matrix, with ever more zeros.

    Source: Meng et al. 2024 (ALPS), Boza 2024: columns scaled to unit energy, one factorisation for all steps.  The
    sparse matrix and its dual are the two parts of one matrix: the weights that stay, and those that do not.
    """
    precision: Any = np.float32 if len(moment) > _FINE_COLUMNS else np.float64
    scale = np.sqrt(np.diag(moment) + ridge(moment))
    normal: Array = (moment / scale[:, None]).astype(precision, copy=False)
    normal /= scale
    _add_to_diagonal(normal, RIDGE)
    both: Array = (target * scale).astype(precision)
    pull = both @ normal
    _add_to_diagonal(normal, _ADMM_RHO)
    solver: Array = inverse(normal)
    steps = _admm_steps(len(moment))
    mask, work, dense = np.ones(both.shape, bool), np.empty_like(both), np.empty_like(both)
    for turn in range(steps):
        np.multiply(both, np.where(mask, precision(_ADMM_RHO), precision(-_ADMM_RHO)), out=work)
        work += pull
        np.matmul(work, solver, out=dense)
        both[mask] = 0
        both += dense
        ramp = 1 - (1 - min((turn + 1) / (_ADMM_RAMP * steps), 1)) ** 3
        np.abs(both, out=work)
        mask = goal.share(ramp).mask(work, rough=turn + 1 < steps)
    both[~mask] = 0
    return np.asarray(both / scale, target.dtype), mask


def _admm_steps(columns: int) -> int:
    """Each step takes time in the square of the columns."""
    if columns > _HUGE_COLUMNS:
        return _ADMM_STEPS_HUGE
    return _ADMM_STEPS_WIDE if columns > _WIDE_COLUMNS else _ADMM_STEPS


def _add_to_diagonal(matrix: Array, number: float) -> None:
    matrix.reshape(-1)[:: len(matrix) + 1] += number
