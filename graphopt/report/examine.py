"""What a report measures besides what the run did: error along the graph, latency before and after, what changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from graphopt.emit.findings import Legality
from graphopt.emit.legality import check_legality
from graphopt.errors import GraphoptError
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.report.diff import ModelDiff, diff_models
from graphopt.report.drawing import Drawing, drawings
from graphopt.runtime.measure import Latency, measure
from graphopt.runtime.session import OptimizationLevel, Session
from graphopt.targets import get_target
from graphopt.verify.divergence import Truth, errors_along
from graphopt.verify.feeds import Feed
from graphopt.verify.verifier import ReferenceRun, VerifyOptions


@dataclasses.dataclass(frozen=True)
class Point:
    """The error of one value that both models have.

    Attributes:
        value: its name.
        operator: what computes it in the result.
        error: max|d| over the RMS of the original's; None where it has no number.
        passed: whether it is within the gate.
    """

    value: str
    operator: str
    error: float | None
    passed: bool


@dataclasses.dataclass(frozen=True)
class Examined:
    """What was measured for a report; what could not be measured is absent, with a reason.

    Attributes:
        diff: what changed structurally.
        drawings: the changed neighbourhoods, each kind once.
        along: errors along the graph, in the order of the result.
        feed: the inputs that errors and latencies were measured on.
        latency: of the original and of the result, with ONNX Runtime's own optimisations on, as deployed.
        legality: what the target takes of the result; None where nobody said which target.
        reasons: why something is absent.
    """

    diff: ModelDiff
    drawings: tuple[Drawing, ...]
    along: tuple[Point, ...] = ()
    feed: str = ""
    latency: tuple[Latency, ...] = ()
    legality: Legality | None = None
    reasons: tuple[str, ...] = ()


def examine(
    original: Path,
    result: Path,
    feeds: Sequence[Feed] | None = None,
    *,
    seconds: float = 2.0,
    target: str | None = None,
) -> Examined:
    """Measures two model files side by side.

    Args:
        original: the model as it was read, in binary form.
        result: the model as it was written.
        feeds: inputs; generated if None.  The first is used.
        seconds: how long to take latencies.
        target: what the result was made for; None leaves legality out.
    """
    before, after = load_model(original), load_model(result)
    diff = diff_models(before, after)
    legality = None if target is None else check_legality(after, get_target(target))
    held = Examined(diff, drawings(before, after, diff), legality=legality)
    run = ReferenceRun(original, feeds)
    if run.unverifiable:
        return dataclasses.replace(held, reasons=(run.unverifiable,))
    feed = run.feeds[0]
    held = dataclasses.replace(held, feed=feed.name)
    try:
        held = dataclasses.replace(held, along=_along(original, result, run, feed))
    except GraphoptError as error:
        held = dataclasses.replace(held, reasons=(f"no errors along the graph: {error}",))
    try:
        sessions = [Session(path, level=OptimizationLevel.ALL) for path in (original, result)]
        times = measure(sessions, [feed.values] * 2, seconds=seconds)
    except GraphoptError as error:
        return dataclasses.replace(held, reasons=(*held.reasons, f"no latencies: {error}"))
    return dataclasses.replace(held, latency=tuple(times))


def _along(original: Path, result: Path, run: ReferenceRun, feed: Feed) -> tuple[Point, ...]:
    profile = run.profile(VerifyOptions(Numerics.REORDERED))
    found = errors_along(Truth(original), result, feed, profile)
    return tuple(
        Point(report.name, operator, report.max_over_rms, report.passed)
        for operator, report in found
    )
