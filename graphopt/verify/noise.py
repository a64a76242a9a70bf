"""How uncertain a reference is by itself: what its outputs do when its inputs move by one unit in the last place."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.verify import metrics
from graphopt.verify.draws import Draws

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graphopt.verify.compare import OutputReport

NOISE_FACTOR = 4.0
"""How far REORDERED may exceed what the reference itself moves when its inputs move by one unit in the last place."""

STRESS_FACTOR = 16.0
"""The same on inputs that no user has: one draw of inputs says less of the roundings inside, where sums cancel."""

NOISE_CAP = 0.05
"""Over the RMS: a reference that moves more than this is chaotic, and nothing is forgiven on its account."""


def nudged(values: Mapping[str, Any], typical: Mapping[str, Any]) -> dict[str, Any]:
    """A feed with each float moved by one unit in the last place of float32."""
    return {name: _nudged(name, value, typical.get(name)) for name, value in values.items()}


def movement(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """How far each float output moved; infinite where NaN or infinity came or went."""
    found = {}
    for name, was in before.items():
        now = after[name]
        if isinstance(was, np.ndarray) and was.shape == now.shape and metrics.is_float(was.dtype):
            measured = metrics.measure(was, now, tolerance=0, floor=0)
            found[name] = math.inf if measured.nonfinite_at is not None else measured.max_abs
    return found


def may_explain(report: OutputReport) -> bool:
    """Whether any noise would be forgiven as much: if not, there is no need to measure it."""
    small = report.max_over_rms is not None and report.max_over_rms <= NOISE_FACTOR * NOISE_CAP
    return small and report.nonfinite_equal


def forgive(report: OutputReport, noise: float, *, stress: bool = False) -> OutputReport:
    """The report, passed after all where the reference itself is as uncertain as the difference is large.

    Args:
        report: a failure.
        noise: how far the reference moves.
        stress: whether the feed holds numbers that no user will: where the reference is chaotic there, nothing follows.
    """
    rms = report.max_abs / report.max_over_rms if report.max_abs and report.max_over_rms else 0.0
    chaotic = noise > NOISE_CAP * rms and noise > 0
    if stress and chaotic and (report.nonfinite_equal or math.isinf(noise)):
        why = "on huge inputs the reference itself is chaotic: nothing follows from the difference"
        return dataclasses.replace(report, passed=True, why=why)
    if not rms or not report.max_abs or not report.nonfinite_equal:
        return report
    if report.max_abs > (STRESS_FACTOR if stress else NOISE_FACTOR) * noise or chaotic:
        return report
    why = (
        f"max|d| {report.max_abs:.3g} is outside the tolerance, but the reference itself moves by {noise:.3g} "
        "when its inputs move by one unit in the last place"
    )
    return dataclasses.replace(report, passed=True, why=why)


def _nudged(name: str, value: Any, typical: Any) -> Any:  # noqa: ANN401
    """A float array moved by one unit in the last place of float32, of each element and of the typical one.

    The second part stands for the roundings behind the first bias, which a feed of zeros would not move.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    scale = metrics.root_mean_square(typical) if isinstance(typical, np.ndarray) else 0.0
    signs = np.where(Draws(0, f"nudge {name}").uniform(value.shape) < 0.5, -1.0, 1.0)
    return np.asarray(value + signs * 2.0**-23 * (np.abs(value) + scale)).astype(value.dtype)
