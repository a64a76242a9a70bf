"""A metric of the user's in `--budget`, asked of the file that was made: as deployed, on the calibration samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from graphopt.calibrate.samples import JUDGED, read_samples
from graphopt.calibrate.screening import Screening
from graphopt.rewrite import Options
from graphopt.runtime.session import OptimizationLevel, Session
from graphopt.targets import Precision, Target
from graphopt.verify.budget import budget_for, samples_for
from graphopt.verify.criteria import MetricReport
from graphopt.verify.verifier import Status, Verification


def held(
    found: Verification, file: Path, target: Target, precision: Precision, options: Options
) -> Verification:
    """The verification with what the metric says; it fails where the metric is below its bound."""
    budget = budget_for(precision, options.budget)
    runs_here = target.provider == "CPUExecutionProvider"
    if budget is None or budget.metric is None or options.calibration is None or not runs_here:
        return found
    session = Session(file, level=OptimizationLevel.ALL)
    samples = Screening().of(read_samples(options.calibration, session.inputs))
    feeds = samples.first(samples_for(budget, JUDGED))
    outputs = [session.run(feed.values) for feed in feeds]
    value = budget.metric.of(outputs, [feed.values for feed in feeds])
    name, limit = budget.metric.name, f">= {budget.metric.least:g}"
    passed = value >= budget.metric.least
    report = MetricReport(name, value, limit, passed, f"{len(feeds)} calibration samples")
    found = dataclasses.replace(found, metrics=(*found.metrics, report))
    if passed or found.status is not Status.PASSED:
        return found
    reason = f"metric {name} on {len(feeds)} calibration samples: {value:.6g}, asked for {limit}"
    return dataclasses.replace(found, status=Status.FAILED, reason=reason)
