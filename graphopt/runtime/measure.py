"""Latency of several models side by side, interleaved so that a busy machine is unfair to none."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graphopt.runtime.session import Session


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
    """

    wall_ms: float
    wall_spread_ms: float
    cpu_ms: float
    cpu_spread_ms: float
    ratio: float
    cpu_ratio: float
    rounds: int


def measure(
    sessions: Sequence[Session],
    feeds: Sequence[Mapping[str, Any]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 1000,
) -> list[Latency]:
    """Times each session on its own feeds, one run of each in turn, until `seconds` have passed.

    Ratios are taken within a round, where both models met the same machine; medians over rounds
    then leave out what other processes did.
    """
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
    return Latency(
        wall_ms=statistics.median(wall),
        wall_spread_ms=_spread(wall),
        cpu_ms=statistics.median(cpu),
        cpu_spread_ms=_spread(cpu),
        ratio=_ratio([times[0][0] for times in rounds], wall),
        cpu_ratio=_ratio([times[0][1] for times in rounds], cpu),
        rounds=len(rounds),
    )


def _spread(samples: list[float]) -> float:
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def _ratio(first: list[float], other: list[float]) -> float:
    # The CPU clock may tick too coarsely to see a tiny model: no time measured is no difference seen.
    ratios = [a / b for a, b in zip(first, other, strict=True) if b > 0]
    return statistics.median(ratios) if ratios else 1.0
