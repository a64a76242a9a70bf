"""Latency of several models side by side, interleaved so that a busy machine is unfair to none."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graphopt.runtime.session import Session


CONFIDENCE = 0.95
"""Of the interval around a ratio."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long one model takes for one run.

    Attributes:
        wall_ms: median wall time.
        wall_spread_ms: from the first to the third quartile.
        cpu_ms: median CPU time of the process, all threads.
        cpu_spread_ms: from the first to the third quartile.
        ratio: median over rounds of (first model's wall time / this model's), in the same round:
            above 1 is faster than the first.
        cpu_ratio: the same for CPU time.
        rounds: how many runs were timed.
        ratio_low: lower end of the interval that holds the median ratio with `CONFIDENCE`.
        ratio_high: its upper end.
    """

    wall_ms: float
    wall_spread_ms: float
    cpu_ms: float
    cpu_spread_ms: float
    ratio: float
    cpu_ratio: float
    rounds: int
    ratio_low: float = 1.0
    ratio_high: float = 1.0


def measure(
    sessions: Sequence[Session],
    feeds: Sequence[Mapping[str, Any]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    warmup: int = 1,
) -> list[Latency]:
    """Times each session on its own feeds, one run of each in turn, until `seconds` have passed.

    Ratios are taken within a round, where both models met the same machine; medians over rounds
    then leave out what other processes did.

    Args:
        sessions: what is timed.
        feeds: of each session.
        seconds: how long to measure, in all.
        min_rounds: how many rounds there are at least.
        max_rounds: how many at most.
        warmup: runs of each session before anything is timed.
    """
    for _ in range(max(1, warmup)):
        for session, given in zip(sessions, feeds, strict=True):
            session.run(given)
    rounds: list[list[tuple[float, float]]] = []
    started = time.perf_counter()
    while len(rounds) < max_rounds and (
        len(rounds) < min_rounds or time.perf_counter() - started < seconds
    ):
        # Every other round runs backwards, so that no model always follows the same neighbour.
        order = range(len(sessions)) if len(rounds) % 2 == 0 else reversed(range(len(sessions)))
        times = {index: _timed(sessions[index], feeds[index]) for index in order}
        rounds.append([times[index] for index in range(len(sessions))])
    return [_latency(rounds, index) for index in range(len(sessions))]


def _timed(session: Session, feeds: Mapping[str, Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    session.run(feeds)
    return (time.perf_counter_ns() - wall) / 1e6, (time.process_time_ns() - cpu) / 1e6


def _latency(rounds: list[list[tuple[float, float]]], index: int) -> Latency:
    wall = [times[index][0] for times in rounds]
    cpu = [times[index][1] for times in rounds]
    ratios = _ratios([times[0][0] for times in rounds], wall)
    low, high = _interval(ratios)
    return Latency(
        wall_ms=statistics.median(wall),
        wall_spread_ms=_spread(wall),
        cpu_ms=statistics.median(cpu),
        cpu_spread_ms=_spread(cpu),
        ratio=_median(ratios),
        cpu_ratio=_median(_ratios([times[0][1] for times in rounds], cpu)),
        rounds=len(rounds),
        ratio_low=low,
        ratio_high=high,
    )


def _spread(samples: list[float]) -> float:
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def _ratios(first: list[float], other: list[float]) -> list[float]:
    # The CPU clock may tick too coarsely to see a tiny model: no time measured is no difference seen.
    return [a / b for a, b in zip(first, other, strict=True) if b > 0]


def _median(ratios: list[float]) -> float:
    return statistics.median(ratios) if ratios else 1.0


def _interval(samples: list[float]) -> tuple[float, float]:
    """The interval that holds the median with `CONFIDENCE`, by order statistics: nothing is assumed of how they spread.

    With few samples even the whole range may hold it with less.
    """
    ordered = sorted(samples)
    if not ordered:
        return 1.0, 1.0
    skipped = _skipped(len(ordered))
    return ordered[skipped], ordered[len(ordered) - 1 - skipped]


def _skipped(count: int) -> int:
    """How many samples on each side may be left out: each falls below the median with probability one half."""
    ways, below = 1, 0
    for skipped in range(count // 2 + 1):
        below += ways
        if below / 2**count > (1 - CONFIDENCE) / 2:
            return max(0, skipped - 1)
        ways = ways * (count - skipped) // (skipped + 1)
    return 0
