"""Whether a quantised model is good enough: by what the user wrote, else by noise and by expected changes of mind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Wide: TypeAlias = npt.NDArray[np.float64]

SQNR_DB, CLASSES_SQNR_DB = 30.0, 20.0
"""Signal to noise of the worst output over all samples that is good enough; where outputs name classes."""

NOT_TIMED = "not timed, the runtime is not this machine's; by what Q and DQ say"
"""What is told of the speed of what cannot be run here."""

LEAST_SQNR_DB = 20.0
"""The same where activations are quantised as they come, and no layer can be left out."""

FLIPS = 0.01
"""Expected share of samples whose class changes that a classifier may have: each may be for better or for worse.

So at most a point of accuracy is expected to be lost, all changes being for the worse, and about nothing where they are
coins; half a point is the aim on image classifiers.
"""

LOSS = 0.002
"""Expected share of samples that a classifier may get wrong for it, by its own probabilities."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What noise does to classes.

    Attributes:
        flips: expected share of samples whose class changes.
        loss: expected share of samples that are lost, those won taken off: a sample that turns from a class of
            probability p to one of probability q loses p - q.
    """

    flips: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Quality:
    """How far a quantised model is from float.

    Attributes:
        sqnr_db: signal to noise of the worst output over all samples; of probabilities, that of their scores.
        passed: whether every output of every sample is within the budget.
        change: what becomes of classes; None where no output names classes.
        metric: what the user's function gave, or None.
        leads: how far the lead of the first class is off in each sample; empty where no output names classes.
    """

    sqnr_db: float
    passed: bool
    change: Change | None = None
    metric: float | None = None
    leads: tuple[float, ...] = ()

    @property
    def merit_db(self) -> float:
        """What ways to quantise are compared by: signal to noise; of classes, how few are expected to change.

        Changes grow with the amplitude of noise.  Its power over all samples says less: one sample that is far off
        decides it, and changes its class once.
        """
        if self.change is None:
            return self.sqnr_db
        return float("inf") if self.change.flips <= 0 else float(-20 * np.log10(self.change.flips))

    @property
    def is_good(self) -> bool:
        """Whether it is good enough where the user states no budget."""
        if self.change is None:
            return self.passed and self.sqnr_db >= SQNR_DB
        few = self.change.flips <= FLIPS and self.change.loss <= LOSS
        return self.passed and self.sqnr_db >= CLASSES_SQNR_DB and few


def won(before: Quality, after: Quality) -> tuple[float, float]:
    """How much less noise there is, in dB, and its standard error over the samples.

    Of classes, how much less leads are off, sample by sample: what is expected to change class hangs on the few samples
    that lie near a tie, so that of two ways to quantise it says by 1 to 3 dB more or less than thousands of samples do.
    Of other outputs the difference of the merits, over all of their elements.
    """
    pairs = [(a, b) for a, b in zip(before.leads, after.leads, strict=False) if a > 0 and b > 0]
    if len(pairs) < 2 or before.change is None or after.change is None:
        return after.merit_db - before.merit_db, 0.0
    each = 20 * np.log10([a / b for a, b in pairs])
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def decibels(power: float, error: float) -> float:
    """Signal to noise; infinite without noise."""
    if error == 0:
        return float("inf")
    return float(10 * np.log10(power / error)) if power > 0 else -float("inf")


def scores_of(array: Wide) -> Wide:
    """The array, or of probabilities what a Softmax was given, up to a constant.

    Probabilities exaggerate: between two near ties a small difference of scores moves all the weight.
    """
    if not is_distribution(array):
        return array
    logs = np.log(np.maximum(array, 1e-12))
    return np.asarray(logs - logs.mean(axis=-1, keepdims=True))


def powers(expected: object, found: object) -> tuple[float, float]:
    """Squared scores and squared difference; (0, 0) for what is no float."""
    if not (isinstance(expected, np.ndarray) and isinstance(found, np.ndarray)):
        return 0.0, 0.0
    if expected.dtype.kind != "f" or expected.shape != found.shape or expected.size == 0:
        return 0.0, 0.0
    ours, theirs = expected.astype(np.float64), found.astype(np.float64)
    if is_distribution(ours):
        ours, theirs = scores_of(ours), logs_of(theirs)
    kept = np.isfinite(ours) & np.isfinite(theirs)
    wanted, got = ours[kept], theirs[kept]
    return float((wanted**2).sum()), float(((wanted - got) ** 2).sum())


def logs_of(probabilities: Wide) -> Wide:
    """Scores of what should be probabilities, whether or not they add up to one."""
    logs = np.log(np.maximum(probabilities, 1e-12))
    return np.asarray(logs - logs.mean(axis=-1, keepdims=True))


def class_rows(output: object) -> Wide | None:
    """Scores [rows, classes] of an output that may name classes; None for any other."""
    if not isinstance(output, np.ndarray) or output.dtype.kind != "f" or output.size == 0:
        return None
    squeezed = output.astype(np.float64).reshape(
        [d for i, d in enumerate(output.shape) if d != 1 or i == 0]
    )
    if squeezed.ndim != 2 or not np.isfinite(squeezed).all():
        return None
    return logs_of(squeezed) if (squeezed >= 0).all() else squeezed


def is_distribution(array: Wide) -> bool:
    """Whether the last axis holds probabilities that add up to one."""
    if array.ndim == 0 or array.shape[-1] < 2 or not (array >= 0).all():
        return False
    return bool(np.allclose(array.sum(axis=-1), 1, atol=1e-3))


def expected_change(expected: Wide, found: Wide, more: Wide | None = None) -> Change | None:
    """What noise like the one seen does to classes; None where rows name no class.

    Differences of the greatest score and the k-th are off by s_k = s r_k, another s for each row that was seen in both,
    and r_k what the k-th is off by compared with others: the next class is often like the first, and off with it.
    A row whose greatest score leads the k-th by m_k turns to it with probability Phi(-m_k / s_k), over all s, and
    loses p_1 - p_k of being right, by what the model itself takes for probable.  Counting changes instead would need
    thousands of samples.

    Where few rows would turn, more noise is taken, and the result scaled back.  Rows become more the farther from a
    tie, so that this says too much: it is followed back to no noise from two amounts.

    Args:
        expected: scores in float [rows, classes].
        found: the same from the quantised model.
        more: scores in float of further samples, which may lead by less.
    """
    rows = expected if more is None else np.concatenate([expected, more])
    if expected.ndim != 2 or not 2 <= expected.shape[1] <= 1 << 16:
        return None
    if len(np.unique(rows.argmax(axis=1))) < 2 or not _is_decided(rows):
        return None  # the same class for all, or no class at all: margins say nothing
    deviations = _deviations(expected, found)
    if not deviations.any():
        return Change(0.0, 0.0)
    leaders = _leaders(rows)
    shares = np.take_along_axis(_shares(rows), leaders, axis=1)
    scores = np.take_along_axis(rows, leaders, axis=1)
    margins, lead = scores[:, :1] - scores[:, 1:], shares[:, :1] - shares[:, 1:]
    scale, share = 1.0, _turned(margins, lead, deviations)
    while share.flips * len(rows) < min(FEW, len(rows) / 4) and scale < FAR:
        scale *= 2
        share = _turned(margins, lead, deviations * scale)
    if scale == 1:
        return share
    less = _turned(margins, lead, deviations * (scale / 2))
    flips = _followed(less.flips / (scale / 2), share.flips / scale)
    return Change(flips, _followed(less.loss / (scale / 2) ** 2, share.loss / scale**2))


def _followed(near: float, far: float) -> float:
    """What a quantity per noise is without any, from what it is at some and at twice as much; no more than there."""
    return min(max(2 * near - far, far * LEAST_FOLLOWED), far)


LEAST_FOLLOWED = 0.25
"""What is left at least of what much noise says, however few rows lie near a tie."""


def _deviations(expected: Wide, found: Wide) -> Wide:
    """How far leads over the next few are off: [rows, rivals], of each row alone and of each rank over all rows."""
    leaders = _leaders(expected)
    error = np.take_along_axis(found, leaders, axis=1)
    error -= np.take_along_axis(expected, leaders, axis=1)
    squares = (error[:, :1] - error[:, 1:]) ** 2
    whole = squares.mean()
    ranks = np.sqrt(squares.mean(axis=0) / whole) if whole > 0 else np.zeros(squares.shape[1])
    return np.asarray(np.sqrt(squares.mean(axis=1))[:, None] * ranks)


def deviations_of(expected: Wide, found: Wide) -> Wide:
    """How far the lead of the first class over the next few is off: [rows]."""
    leaders = _leaders(expected)
    scores = np.take_along_axis(expected, leaders, axis=1)
    error = np.take_along_axis(found, leaders, axis=1) - scores
    return np.asarray(np.sqrt(((error[:, :1] - error[:, 1:]) ** 2).mean(axis=1)))


def leads_off(pairs: Sequence[tuple[Any, Any]]) -> Wide:
    """How far the lead of the first class is off in each output, on average over its rows; 0 where it names none."""
    rows = [(class_rows(ours), class_rows(theirs)) for ours, theirs in pairs]
    return np.array(
        [
            0.0 if ours is None or theirs is None else deviations_of(ours, theirs).mean()
            for ours, theirs in rows
        ]
    )


FEW, FAR = 5, 1 << 10
"""Rows that must be expected to turn for the rest to be left out of account: where fewer would, no row seen may be near
a tie, and more noise is taken, up to so much; changes grow with it, losses with its square."""


def _turned(margins: Wide, lead: Wide, deviations: Wide) -> Change:
    """What noise of these deviations does to rows that lead by these margins, in score and in probability."""
    floor = deviations.max() * 1e-6
    tails = np.mean([_upper_tail(margins / np.maximum(each, floor)) for each in deviations], axis=0)
    tails /= np.maximum(tails.sum(axis=1, keepdims=True), 1)  # a row turns once
    return Change(float(tails.sum(axis=1).mean()), float((tails * lead).sum(axis=1).mean()))


def _shares(scores: Wide) -> Wide:
    """Softmax of each row."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _is_decided(scores: Wide) -> bool:
    """Whether the model prefers one class, on average: one that was not trained does not."""
    top = _shares(scores).max(axis=1)
    return bool(top.mean() >= min(max(DECIDED, 2 / scores.shape[1]), MOST_DECIDED))


DECIDED, MOST_DECIDED = 0.1, 0.6
"""Mean probability of the first class from which on scores count as those of a classifier; of few classes, more."""


def _leaders(scores: Wide) -> npt.NDArray[np.intp]:
    count = min(RIVALS, scores.shape[1])
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


RIVALS = 5
"""Classes whose scores are compared: the noise of those that matter is larger than that of the many that do not."""


def _upper_tail(z: Wide) -> Wide:
    """1 - Phi(z) for z >= 0 to 1e-7 (Abramowitz and Stegun 26.2.17)."""
    t = 1 / (1 + 0.2316419 * z)
    powers = (0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429)
    total = sum(c * t ** (i + 1) for i, c in enumerate(powers))
    return np.asarray(np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * total)
