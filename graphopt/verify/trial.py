"""One candidate on every feed of a reference run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphopt.errors import GraphoptError, ModelError
from graphopt.verify.compare import Hint, compare
from graphopt.verify.criteria import MetricReport, measured
from graphopt.verify.declared import broken_promises
from graphopt.verify.dims import EMPTY, LONG, LONGER
from graphopt.verify.feeds import STRESS
from graphopt.verify.origins import OutputOrigin, scale_floor
from graphopt.verify.shares import held, without_share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from graphopt.runtime.session import Session
    from graphopt.runtime.specs import TensorSpec
    from graphopt.verify.compare import OutputReport, Profile
    from graphopt.verify.feeds import Feed
    from graphopt.verify.verifier import ReferenceRun, VerifyOptions

Promises: TypeAlias = "tuple[Sequence[TensorSpec], Sequence[TensorSpec]]"
"""Inputs and outputs as a candidate declares them."""


@dataclasses.dataclass
class Trial:
    """A candidate, compared with a reference.

    Attributes:
        reference: what it shall compute.
        session: the candidate, ready to run; values that discrete outputs hide may be among its outputs.
        profile: the gate.
        options: which feeds, and whether to stop at the first failure.
        promised: what it declares of inputs and outputs; None to take that as it is.
        may_be_empty: whether it survives empty inputs.
        notes: what the reader should know besides.
        metrics: what metrics of the user's said, by metric, one a feed.
    """

    reference: ReferenceRun
    session: Session
    profile: Profile
    options: VerifyOptions
    promised: Promises | None = None
    may_be_empty: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    metrics: dict[str, list[MetricReport]] = dataclasses.field(default_factory=dict)
    _failed: set[str] = dataclasses.field(default_factory=set, init=False)

    def reports(self) -> dict[str, list[OutputReport]]:
        """Reports by output name, one a feed.

        Raises:
            GraphoptError: the candidate does not run.
        """
        takes = {spec.name for spec in self.session.inputs}
        run = self.reference
        names = [spec.name for spec in run.output_specs if spec.name not in run.excluded]
        reports: dict[str, list[OutputReport]] = {name: [] for name in names}
        for index, feed in enumerate(run.feeds):
            if self.options.feed not in (None, feed.name):
                continue
            if self.options.brief and any(f", {label} (" in feed.name for label in (LONG, LONGER)):
                continue
            if not takes.issuperset(feed.values):
                continue  # overrides a default that is a constant now, which the options accept
            results = self._results(feed)
            if results is None:
                continue
            for name, report in self._on_feed(index, feed, results, names):
                reports[name].append(report)
            failed = any(not r[-1].passed for r in reports.values() if r)
            failed |= any(not found[-1].passed for found in self.metrics.values())
            if failed and self.options.fail_fast and feed.name.split(",")[0] not in STRESS:
                break
        kept = {name: found for name, found in reports.items() if name not in run.excluded}
        profiles = {name: self.options.criteria.profile(name, self.profile) for name in kept}
        return {name: held(found, profiles[name]) for name, found in kept.items()}

    def _results(self, feed: Feed) -> dict[str, Any] | None:
        """What the candidate returns; None where it need not, and does not."""
        empty = f", {EMPTY} (" in feed.name
        if empty and not self.may_be_empty:
            return None
        try:
            return self.session.run(feed.values)
        except GraphoptError as error:
            if not empty:
                told = f"on feed '{feed.name}', which the reference runs: {error}"
                raise ModelError(told) from error
            note = f"the candidate refuses empty inputs, which the reference takes: {error}"
            self.notes.append(note)
            return None

    def _on_feed(
        self, index: int, feed: Feed, results: Mapping[str, Any], names: Sequence[str]
    ) -> list[tuple[str, OutputReport]]:
        broken = self._broken(index, feed, results)
        found = []
        self._measure(index, feed, results)
        for name in names:
            profile = self.options.criteria.profile(name, self.profile)
            report = self.reference.judge(name, index, results[name], without_share(profile))
            if report.passed and name in broken:
                report = dataclasses.replace(report, passed=False, why=broken[name])
            if report.passed and profile is self.profile:
                report = self._with_hidden(report, index, results)
            if not report.passed and name not in self._failed:
                # Memory that nobody initialised, say, may show on some feeds only.
                self._failed.add(name)
                self.reference.exclude_unstable(index)
            found.append((name, dataclasses.replace(report, feed=feed.name)))
        return found

    def _measure(self, index: int, feed: Feed, results: Mapping[str, Any]) -> None:
        """Asks the user's metrics, with the outputs alone."""
        run = self.reference
        for metric in self.options.criteria.metrics:
            names = [spec.name for spec in run.output_specs]
            ours = {name: run.outputs[index][name] for name in names}
            theirs = {name: results[name] for name in names}
            report = measured(metric, ours, theirs, feed.name)
            self.metrics.setdefault(metric.name, []).append(report)

    def _broken(self, index: int, feed: Feed, results: Mapping[str, Any]) -> dict[str, str]:
        """By output, what the candidate declares of it and does not keep; the reference's own lapses are forgiven."""
        if self.promised is None:
            return {}
        found = broken_promises(*self.promised, feed.values, results)
        if not found:
            return {}
        run = self.reference
        own = broken_promises(run.inputs, run.output_specs, feed.values, run.outputs[index])
        return {
            name: f"axis {axis} has {why}: the declared shape is wrong"
            for (name, axis), why in found.items()
            if (name, axis) not in own
        }

    def _with_hidden(
        self, report: OutputReport, index: int, results: Mapping[str, Any]
    ) -> OutputReport:
        """The report of a discrete output, failed if the numbers that it is made of differ.

        A class stays the same under most errors of its scores.
        """
        run = self.reference
        for name in run.hidden.get(report.name, ()):
            truth, found = run.outputs[index][name], results.get(name)
            if not isinstance(found, np.ndarray) or not isinstance(truth, np.ndarray):
                continue
            if found.dtype != truth.dtype or found.shape != truth.shape:
                continue  # the same name, another layout
            hint = Hint(floor=scale_floor(run.outputs[0].get(name), OutputOrigin(), self.profile))
            under = compare(name, truth, found, self.profile, hint)
            if not under.passed:
                under = run.forgiven(under, name, index, self.profile)
            if not under.passed:
                why = f"what it is made of, '{name}', differs: {under.why}"
                return dataclasses.replace(report, passed=False, why=why)
        return report


def shared_taps(hidden: Mapping[str, Sequence[str]], candidate: ir.Model) -> tuple[str, ...]:
    """What discrete outputs of the reference hide and the candidate still has under the same name."""
    made = {value.name for node in candidate.graph for value in node.outputs}
    names = (name for held in hidden.values() for name in held if name in made)
    return tuple(dict.fromkeys(names))
