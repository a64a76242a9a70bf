"""Whether a candidate computes what a reference computes: both run on the same feeds, in the same runtime.

The reference runs with the runtime's own optimisations off and without prepacking of weights. Prepacking picks
another GEMM kernel for constant weights than for computed ones (ONNX Runtime 1.31: 145 of 395 MatMul shapes
then differ in the last place), so that a model with a weight folded would not be bit-equal to itself.
"""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError, OptionError
from graphopt.ir.hazards import fatal_constants
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.runtime.emulate import HALVES
from graphopt.runtime.session import OptimizationLevel, Session
from graphopt.runtime.specs import Kind, input_specs, output_specs
from graphopt.verify import contract, metrics, noise, origins
from graphopt.verify.branches import Conditions, Seen, conditions
from graphopt.verify.compare import Hint, Origin, OutputReport, compare, merge, profile_for
from graphopt.verify.criteria import Criteria, MetricReport, worst
from graphopt.verify.declared import stale_shape, stated_shapes
from graphopt.verify.empties import takes_empty
from graphopt.verify.feeds import HUGE, LARGE, STRESS, Dropped, Feed, find_feeds
from graphopt.verify.origins import scale_floor
from graphopt.verify.reference import ReferenceSession
from graphopt.verify.trial import Trial, shared_taps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graphopt.verify.compare import Budget, Profile


class Status(enum.StrEnum):
    """What a verification says."""

    PASSED = "passed"
    FAILED = "failed"
    UNVERIFIED = "unverified"


@dataclasses.dataclass(frozen=True)
class Verification:
    """What comparing a candidate with a reference showed.

    Attributes:
        status: passed, failed, or unverified where nothing could be compared.
        profile: name of the gate.
        outputs: one report an output, the worst over all feeds; excluded outputs are left out.
        feeds: names of the feeds that were run on both.
        dropped: generated feeds that the reference refuses.
        excluded: outputs that are not compared, and why.
        contract: differences of inputs and outputs that a caller would notice; any fails.
        notes: what the reader should know besides.
        failing: names of the feeds on which some output differs, those that users would make first.
        metrics: what metrics of the user's said, each at its worst.
        deployed: the candidate at the level it will run at, against the same reference; informs, never fails.
        reason: why the status is not passed; else "".
        judged: whether differences were held against anything; where not, they are shown alone.
    """

    status: Status
    profile: str
    outputs: tuple[OutputReport, ...] = ()
    feeds: tuple[str, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    contract: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    deployed: tuple[OutputReport, ...] = ()
    reason: str = ""
    failing: tuple[str, ...] = ()
    metrics: tuple[MetricReport, ...] = ()
    judged: bool = True

    @property
    def passed(self) -> bool | None:
        """True or False; None where nothing could be compared."""
        return None if self.status is Status.UNVERIFIED else self.status is Status.PASSED


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """How strictly and how far to compare.

    Attributes:
        numerics: what the passes declared; picks the gate.
        budget: of LOSSY.
        fail_fast: stop at the first feed that fails (bisection), unless no user would make it.
        allow_constant_defaults: accept that overridable defaults became constants.
        deployed: a level to run the candidate at as well, for information.
        feed: name of the only feed to compare on; None for all.
        brief: leave out the longest feeds: somebody else compares on those.
        criteria: limits for single outputs, and metrics, that the user asks for.
    """

    numerics: Numerics = Numerics.EXACT
    budget: Budget | None = None
    fail_fast: bool = False
    allow_constant_defaults: bool = False
    deployed: OptimizationLevel | None = None
    feed: str | None = None
    brief: bool = False
    criteria: Criteria = dataclasses.field(default_factory=Criteria)


class ReferenceRun:
    """A reference model, feeds that it runs with, and its outputs: computed once, compared with many candidates.

    Attributes:
        feeds: what was run.
        outputs: of the reference, by feed.
        dropped: generated feeds that the reference refuses.
        excluded: outputs that cannot be compared, and why.
        notes: what every verification against this reference shall say besides.
        unverifiable: why nothing can be compared, or "".

    Raises:
        ModelError: the file is not a model, or fails on feeds that the user gave.
        DataError: given feeds do not fit, or `dims` names no dimension of the inputs.
    """

    def __init__(
        self,
        model: Path | bytes,
        feeds: Sequence[Feed] | None = None,
        *,
        seed: int = 0,
        dims: Mapping[str, int] | None = None,
        thorough: bool = False,
        kept: Path | None = None,
    ) -> None:
        graph = load_model(model)
        self.inputs = input_specs(graph)
        self.output_specs = output_specs(graph)
        self.depth = origins.arithmetic_depth(graph)
        self.dtype = origins.narrowest_float(graph)
        self.excluded = {
            name: f"depends on the random {cause}"
            for name, cause in origins.random_outputs(graph).items()
        }
        self.feeds: tuple[Feed, ...] = ()
        self.outputs: list[dict[str, Any]] = []
        self.dropped: tuple[Dropped, ...] = ()
        self.notes: list[str] = []
        self.unverifiable = ""
        self._repeated: set[int] = set()
        self._noises: dict[int, dict[str, float]] = {}
        self._origins = origins.output_origins(graph)
        self.hidden = origins.hidden_scores(graph)
        self._stated = stated_shapes(graph)
        if fatal := fatal_constants(graph):
            self.unverifiable = f"running the reference would end the process: {fatal}"
            return
        # Watching adds outputs to the graph that it is given.
        found = conditions(load_model(model)) if thorough and feeds is None else Conditions()
        keep = None if self.excluded else kept  # what is random is not the same twice
        try:
            self._session = ReferenceSession(
                model, graph, found, self._taps(), limited=feeds is None, kept=keep
            )
        except ModelError as error:
            self.unverifiable = f"the reference cannot be run: {error}"
            return
        self._seen = Seen(self._session.conditions, self._explored, self.outputs.append)
        if feeds is not None:
            self.feeds = tuple(feeds)
            self.outputs = [self._session.run(feed) for feed in feeds]
        else:
            self._search(graph, seed, dims, thorough=thorough)
        self._examine("on the inputs given" if feeds is not None else "whatever the inputs")

    def _taps(self) -> tuple[str, ...]:
        """Inner values that comparing outputs takes: scores that are ranked, and what discrete outputs hide."""
        ranked = (o.scores for o in self._origins.values() if o.scores)
        hidden = (name for names in self.hidden.values() for name in names)
        return (*ranked, *hidden)

    def _search(
        self, graph: ir.Model, seed: int, dims: Mapping[str, int] | None, *, thorough: bool
    ) -> None:
        """Makes feeds, and runs each that the reference takes."""
        found = find_feeds(
            graph,
            self._refuses,
            seed=seed,
            dims=dims,
            # Only the runtime knows the keys of maps.
            specs=self._session.inputs if any(s.kind is Kind.OPAQUE for s in self.inputs) else None,
            thorough=thorough,
            branches=self._seen if thorough else None,
        )
        self.feeds, self.dropped = found.feeds, found.dropped
        self.notes += [f"no inputs were found that take {way}" for way in self._seen.untaken()]

    def keep_usual(self) -> None:
        """Drops generated feeds that no user would make: what loses precision is not made for them."""
        kept = [i for i, feed in enumerate(self.feeds) if feed.name.split(",")[0] not in STRESS]
        self.feeds = tuple(self.feeds[i] for i in kept)
        self.outputs = [self.outputs[i] for i in kept]

    def profile(self, options: VerifyOptions) -> Profile:
        """The gate for this model: its tolerance follows from depth and dtype.

        In half precision nothing is EXACT here: ONNX Runtime on the CPU computes it in float32 and rounds where one
        kernel hands over to the next, so that removing an Identity moves the last place.
        """
        exact = options.numerics is Numerics.EXACT and self._is_half()
        return profile_for(
            Numerics.REORDERED if exact else options.numerics,
            depth=self.depth,
            dtype=self.dtype,
            budget=options.budget,
        )

    def verify(
        self, candidate: Path | bytes | ir.Model, options: VerifyOptions | None = None
    ) -> Verification:
        """Compares one candidate, a file or a model in memory, with the reference on every feed."""
        options = options or VerifyOptions()
        options.criteria.check_names([spec.name for spec in self.output_specs])
        profile = self.profile(options)
        about: dict[str, Any] = {
            "profile": profile.name,
            "dropped": self.dropped,
            "excluded": dict(self.excluded),
        }
        try:
            graph = candidate if isinstance(candidate, ir.Model) else load_model(candidate)
        except ModelError as error:
            return self._failed(about, f"the candidate cannot be read: {error}")
        faults, notes = self._contract(input_specs(graph), output_specs(graph), options)
        notes = [*self.notes, *notes]
        if faults:
            return self._failed(about | {"contract": tuple(faults)}, faults[0])
        if self.unverifiable:
            return Verification(
                Status.UNVERIFIED, reason=self.unverifiable, notes=tuple(notes), **about
            )
        try:
            shared = shared_taps(self.hidden, graph) if profile.budget is None else ()
            promised = (input_specs(graph), output_specs(graph))
            session = self._session.beside(candidate, graph, shared)
            trial = Trial(self, session, profile, options, promised, takes_empty(graph))
            reports = trial.reports()
        except OptionError:
            raise  # of a metric: the candidate is not to blame
        except GraphoptError as error:
            return self._failed(about, f"the candidate cannot be run: {error}")
        right = all(report.passed for found in reports.values() for report in found)
        # Where the numbers are wrong nobody asks for shapes; of a model on its way nobody reads them.
        if right and not options.brief and (stale := stale_shape(graph, self._stated, self.feeds)):
            return self._failed(about, stale)
        deployed = self._deployed(candidate, options)
        notes += trial.notes
        about |= {"excluded": dict(self.excluded)}
        about["metrics"] = tuple(worst(found) for found in trial.metrics.values())
        return self._verdict(about, reports, deployed, notes)

    def _refuses(self, feed: Feed) -> str | None:
        try:
            outputs = self._session.run(feed)
        except GraphoptError as error:
            return str(error)
        self.outputs.append(outputs)
        if (
            feed.name.split(",")[0] not in STRESS
        ):  # what is wrong in a branch drowns in numbers that are off the scale
            self._seen.note(outputs)
        return None

    def _explored(self, feed: Feed) -> dict[str, Any] | None:
        """The outputs on a feed; None where the reference refuses it."""
        try:
            return self._session.run(feed)
        except GraphoptError:
            return None

    def _examine(self, fed: str) -> None:
        """Notes what the reference does by itself, `fed` so: nothing at all, or something else every time."""
        if not self.feeds:
            # The first refusal is of the most natural feed; later ones grope.
            first = self.dropped[0] if self.dropped else None
            tried = (
                f"{len(self.dropped)} generated ones were refused, the first ({first.name}): {first.reason}"
                if first
                else "none were given."
            )
            self.unverifiable = f"no inputs to compare on: {tried} Give some with --inputs."
            return
        if all(spec.name in self.excluded for spec in self.output_specs):
            self.unverifiable = "every output is random: " + "; ".join(self.excluded.values())
        never = [spec.name for spec in self.output_specs if self._is_never_finite(spec.name)]
        told = f"is NaN or infinite in every element, {fed}; give others with --inputs"
        self.notes += [f"output '{name}' {told}" for name in never]
        if never and len(never) == len(self.output_specs):
            self.unverifiable = f"every output {told}"

    def _is_never_finite(self, name: str) -> bool:
        """Whether an output says nothing on any feed."""
        held = [outputs[name] for outputs in self.outputs]
        arrays = [a for a in held if isinstance(a, np.ndarray) and a.size]
        return bool(arrays) and all(
            metrics.is_float(a.dtype) and not np.isfinite(a.astype(np.complex128)).any()
            for a in arrays
        )

    def exclude_unstable(self, index: int) -> None:
        """Excludes outputs that the reference itself gives otherwise when a feed is run again."""
        if index in self._repeated:
            return
        self._repeated.add(index)
        again = self._session.again(self.feeds[index])
        exact = profile_for(Numerics.EXACT)
        for spec in self.output_specs:
            name = spec.name
            same = compare(name, self.outputs[index][name], again[name], exact).equal
            if name not in self.excluded and not same:
                self.excluded[name] = "differs between two runs of the reference"

    def _contract(
        self, inputs: Sequence[Any], outputs: Sequence[Any], options: VerifyOptions
    ) -> tuple[list[str], list[str]]:
        """Faults and notes."""
        lost = contract.dropped_defaults(self.inputs, inputs)
        reference, notes = self.inputs, []
        if lost and options.allow_constant_defaults:
            reference = tuple(spec for spec in self.inputs if spec.name not in lost)
            notes = [f"{len(lost)} overridable defaults became constants: {', '.join(lost[:8])}"]
        return [
            *contract.input_faults(reference, inputs),
            *contract.output_faults(self.output_specs, outputs),
        ], notes

    def judge(self, name: str, index: int, value: object, profile: Profile) -> OutputReport:
        """Compares a value with one output of the reference on one feed.

        What fails REORDERED by no more than the reference itself is uncertain is forgiven.
        """
        report = compare(
            name, self.outputs[index][name], value, profile, self._hint(name, index, profile)
        )
        return report if report.passed else self.forgiven(report, name, index, profile)

    def forgiven(
        self, report: OutputReport, name: str, index: int, profile: Profile
    ) -> OutputReport:
        """A failure on one feed, passed after all where the reference is as uncertain itself."""
        if profile.numerics is not Numerics.REORDERED:
            return report
        kind = self.feeds[index].name.split(",")[0]
        stress = kind == HUGE or (kind == LARGE and self._is_half())
        if not stress and not noise.may_explain(report):
            return report
        if index not in self._noises:
            self._noises[index] = self._noise(index)
        return noise.forgive(report, self._noises[index].get(name, 0.0), stress=stress)

    def _hint(self, name: str, index: int, profile: Profile) -> Hint:
        made = self._origins.get(name, origins.OutputOrigin())
        scores = self.outputs[index].get(made.scores) if made.origin is Origin.RANK else None
        floor = scale_floor(self.outputs[0].get(name), made, profile)
        return Hint(made.origin, scores, made.axis, floor)

    def _noise(self, index: int) -> dict[str, float]:
        """How far each float output moves when float inputs move by one unit in the last place of float32.

        In half precision, how far it moves when each value is really rounded, as a graph of halves says.
        """
        values = noise.nudged(self.feeds[index].values, self.feeds[0].values)
        try:
            if self._is_half():
                moved = self._session.rounded(self.feeds[index])
            else:
                moved = self._session.run(Feed("nudged", values))
        except GraphoptError:
            return {}
        return noise.movement(self.outputs[index], moved)

    def _is_half(self) -> bool:
        return self.dtype in HALVES

    def _deployed(
        self, candidate: Path | bytes | ir.Model, options: VerifyOptions
    ) -> tuple[OutputReport, ...]:
        """The candidate as it will run, judged as REORDERED at least: the runtime fuses on its own."""
        if options.deployed is None or isinstance(candidate, ir.Model):
            return ()
        profile = self.profile(
            dataclasses.replace(options, numerics=max(options.numerics, Numerics.REORDERED))
        )
        try:
            session = Session(candidate, level=options.deployed)
            reports = Trial(self, session, profile, options).reports()
        except GraphoptError as error:
            why = f"cannot be run at level {options.deployed.name}: {error}"
            return tuple(
                OutputReport(s.name, passed=False, equal=False, why=why) for s in self.output_specs
            )
        return tuple(merge(found) for found in reports.values() if found)

    def _verdict(
        self,
        about: dict[str, Any],
        reports: dict[str, list[OutputReport]],
        deployed: tuple[OutputReport, ...],
        notes: list[str],
    ) -> Verification:
        outputs = tuple(merge(found) for found in reports.values() if found)
        used = next((found for found in reports.values() if found), [])
        wrong = next((report for report in outputs if not report.passed), None)
        reason = f"output '{wrong.name}' on feed '{wrong.feed}': {wrong.why}" if wrong else ""
        bad = next((each for each in about["metrics"] if not each.passed), None)
        if bad and not reason:
            limit = bad.limit or "true"
            reason = f"metric {bad.name} on feed '{bad.feed}': {bad.value:.6g}, asked for {limit}"
        notes = [
            *notes,
            *(f"output '{name}' {why}" for name, why in self.excluded.items()),
        ]
        if not outputs:
            reason = "every output is random: " + "; ".join(self.excluded.values())
            return Verification(Status.UNVERIFIED, reason=reason, notes=tuple(notes), **about)
        return Verification(
            Status.FAILED if wrong or bad else Status.PASSED,
            outputs=outputs,
            feeds=tuple(report.feed for report in used),
            notes=tuple(notes),
            deployed=deployed,
            reason=reason,
            failing=_failing(reports) or ((bad.feed,) if bad else ()),
            **about,
        )

    def _failed(self, about: dict[str, Any], reason: str) -> Verification:
        return Verification(Status.FAILED, reason=reason, notes=tuple(self.notes), **about)


def verify(
    reference: Path | bytes | ReferenceRun,
    candidate: Path | bytes,
    feeds: Sequence[Feed] | None = None,
    *,
    options: VerifyOptions | None = None,
    seed: int = 0,
) -> Verification:
    """Compares a candidate with a reference, on the feeds given or on generated ones.

    Args:
        reference: the original, or a run of it to be used again.
        candidate: what shall stand in its place.
        feeds: inputs; generated from `seed` where None. Ignored with a `ReferenceRun`, which has its own.
        options: how strictly to compare; EXACT by default.
        seed: of generated feeds.

    Raises:
        ModelError: the reference is not a model, or fails on the feeds given.
        DataError: the feeds do not fit the reference.
    """
    run = (
        reference
        if isinstance(reference, ReferenceRun)
        else ReferenceRun(reference, feeds, seed=seed)
    )
    return run.verify(candidate, options)


def _failing(reports: Mapping[str, Sequence[OutputReport]]) -> tuple[str, ...]:
    names = [r.feed for found in reports.values() for r in found if not r.passed]
    ordered = sorted(dict.fromkeys(names), key=lambda name: name.split(",")[0] in STRESS)
    return tuple(ordered)
