"""Whether what an attempt gave computes what the original does."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.calibrate.samples import read_samples
from graphopt.calibrate.screening import Screening
from graphopt.driver import half, metric
from graphopt.driver.attempt import Attempt
from graphopt.driver.request import Progress, Request, VerifyMode
from graphopt.driver.result import model_name
from graphopt.emit import finalize
from graphopt.errors import TargetError, VerifyError
from graphopt.ir import values
from graphopt.ir.model_file import load_model, save_model
from graphopt.numerics import Numerics
from graphopt.pipeline import PassRun, drops_defaults, flatten
from graphopt.report.facts import stored_tensors
from graphopt.report.run import VerificationFacts
from graphopt.rewrite import Context, Rewrite
from graphopt.runtime.specs import input_specs
from graphopt.targets import Precision, get_target
from graphopt.verify.budget import budget_for, samples_for
from graphopt.verify.constraints import constrained_feeds, read_constraints
from graphopt.verify.criteria import Criteria, parse_gates
from graphopt.verify.divergence import Divergence, Truth, agrees_at, first_divergence
from graphopt.verify.feeds import Feed, read_feeds
from graphopt.verify.verifier import ReferenceRun, Verification, VerifyOptions

CALIBRATION_FEEDS = 8
"""Calibration samples that stand in for inputs where the user gave no others: what a lossy run was made for."""


LARGE_MODEL_BYTES = 1 << 26
"""Of weights: beyond, `verify each` compares on one feed after each pass, and on all at the end."""


class EachFailure(VerifyError):
    """With `verify each`: the numbers were right before a pass and wrong after it.

    Attributes:
        rewrites: those made by then.
        file: the model as it was then, written.
        became: values that were gone by then, and what was put in their place.
    """

    def __init__(
        self,
        message: str,
        rewrites: tuple[Rewrite, ...],
        file: Path,
        became: Mapping[str, str],
    ) -> None:
        super().__init__(message)
        self.rewrites = rewrites
        self.file = file
        self.became = became


class Judge:
    """Compares attempts with the original; the reference is run once, when it is first needed."""

    def __init__(self, request: Request, folder: Path, say: Progress) -> None:
        self._request = request
        self._folder = folder
        self._say = say
        self._reference: ReferenceRun | None = None
        self._reference_file = Path()
        self._truth: Truth | None = None
        self._failing: str | None = None
        self.file_name = model_name(request.output)

    def verdict(self, made: Attempt) -> VerificationFacts:
        """How the written attempt compares with the original."""
        mode = self._request.verify
        if mode is VerifyMode.OFF:
            return VerificationFacts(mode.value, reason="not asked for")
        return self._facts(self._compare(made))

    def is_right(self, made: Attempt) -> bool:
        """Whether an attempt, written or not, may stand, on the feed on which the last comparison failed."""
        options = VerifyOptions(
            made.numerics,
            fail_fast=True,
            allow_constant_defaults=self._frozen,
            feed=self._failing,
        )
        return self._in_memory(made.model, options).passed is not False

    def divergence(
        self, file: Path, numerics: Numerics, became: Mapping[str, str]
    ) -> Divergence | None:
        """Where the model in a file parts from the original, on the feed on which the last comparison failed."""
        feed = self._feed()
        if feed is None or self.reference.unverifiable:
            return None
        profile = self.reference.profile(VerifyOptions(numerics))
        if self._truth is None:
            self._truth = Truth(self._reference_file, self._request.kept)
        return first_divergence(self._truth, file, feed, profile, became)

    def agrees_at(self, found: Divergence, made: Attempt) -> bool:
        """Whether an attempt computes the value where another one parted from the original."""
        feed = self._feed()
        profile = self.reference.profile(VerifyOptions(made.numerics))
        return feed is not None and agrees_at(found, made.model, feed, profile, made.became)

    @property
    def reference_file(self) -> Path:
        """The original as it was run."""
        return self._reference_file

    def _feed(self) -> Feed | None:
        return next((feed for feed in self.reference.feeds if feed.name == self._failing), None)

    def _noted(self, found: Verification) -> Verification:
        """Keeps in mind on which feed a comparison failed."""
        self._failing = next(iter(found.failing), None)
        return found

    def watch(self, run: PassRun, model: ir.Model, ctx: Context) -> None:
        """Compares after a pass that changed something; the longest inputs are left to the end.

        Raises:
            EachFailure: the pass broke the numbers.
        """
        if not run.changed:
            return
        snapshot = load_model(model)
        finalize(snapshot, self._request.target)
        options = VerifyOptions(
            ctx.numerics, fail_fast=True, allow_constant_defaults=True, brief=True
        )
        found = self._noted(self._verify_each(snapshot, options))
        if found.passed is False:
            file = save_model(snapshot, self._folder / "each.onnx")[0]
            message = f"pass {run.name} broke the numbers: {found.reason}"
            raise EachFailure(message, tuple(ctx.rewrites), file, dict(ctx.became))

    def _verify_each(self, model: ir.Model, options: VerifyOptions) -> Verification:
        """Compares a model on its way; a large one on the plain feed alone, the rest is left to the end."""
        feeds = self.reference.feeds
        size = sum(values.size_bytes(tensor) for _, tensor in stored_tensors(model))
        if size > LARGE_MODEL_BYTES and feeds:
            options = dataclasses.replace(options, feed=feeds[0].name)
        return self._in_memory(model, options)

    def _in_memory(self, model: ir.Model, options: VerifyOptions) -> Verification:
        """Compares a model that nobody will keep; half precision is emulated from a file."""
        asked = self._request
        if asked.precision in half.HALVES or asked.options.sparsity:
            return self._verify(save_model(model, self._folder / "probe.onnx")[0], options)
        budget = budget_for(asked.precision, asked.options.budget)
        asked_for = dataclasses.replace(options, budget=budget, criteria=self._criteria)
        return self.reference.verify(model, asked_for)

    @property
    def reference(self) -> ReferenceRun:
        """The original with its feeds and outputs.

        Raises:
            DataError: the user's inputs do not fit the model.
        """
        if self._reference is None:
            self._say("reference", None)
            file = self._original()
            feeds = self._feeds(file)
            seed = self._request.options.seed
            # What changes precision is judged on what it was made for.
            whole = self._request.precision is Precision.FP32 and not self._request.options.sparsity
            kept = self._request.kept
            run = ReferenceRun(file, feeds, seed=seed, thorough=whole, kept=kept)
            self._reference_file = file
            if run.unverifiable and (clamped := self._clamped(file)) is not None:
                again = ReferenceRun(clamped, feeds, seed=seed, thorough=whole, kept=kept)
                run = self._better(run, again)
                self._reference_file = file if run.unverifiable else clamped
            self._reference = half.usual(run, self._request)
        return self._reference

    def _verify(self, file: Path, options: VerifyOptions) -> Verification:
        asked = dataclasses.replace(options, criteria=self._criteria)
        return half.verify(self.reference, file, asked, self._request, self._folder)

    @property
    def _criteria(self) -> Criteria:
        """What the user asks of outputs, in options and in the file that bounds the inputs."""
        given = self._request.criteria
        path = self._request.inputs
        if not isinstance(path, Path) or path.suffix != ".toml":
            return given
        outputs = parse_gates(read_constraints(path).outputs)
        return dataclasses.replace(given, outputs={**outputs, **given.outputs})

    @property
    def _frozen(self) -> bool:
        """Whether the user asked for defaults to become constants."""
        return any(drops_defaults(step) for step in flatten(self._request.steps))

    def _compare(self, made: Attempt) -> Verification:
        # Where something is wrong it will be left out and all compared again: one feed that shows it is enough.
        whole = self._request.precision in half.HALVES  # what is said of these depends on all
        options = VerifyOptions(
            made.numerics, fail_fast=not whole, allow_constant_defaults=self._frozen
        )
        found = self._noted(self._verify(made.files[0], options))
        asked = self._request
        return metric.held(found, made.files[0], asked.target, asked.precision, asked.options)

    def _original(self) -> Path:
        """The original as a file that ONNX Runtime reads by itself."""
        source = self._request.source
        if isinstance(source, str | os.PathLike) and Path(source).suffix == ".onnx":
            return Path(source)
        return save_model(load_model(source), self._folder / "original.onnx")[0]

    def _clamped(self, file: Path) -> Path | None:
        """The original under an opset and IR version that the reference runtime takes, if nothing else changes.

        Exporters write the newest versions before runtimes take them.
        """
        model = load_model(file)
        try:
            finalize(model, get_target("cpu"))
        except TargetError:
            return None
        return save_model(model, self._folder / "clamped.onnx")[0]

    @staticmethod
    def _better(original: ReferenceRun, clamped: ReferenceRun) -> ReferenceRun:
        if clamped.unverifiable:
            return original
        clamped.notes.append(
            "the reference runtime does not take the original's opset or IR version; it ran under the newest that "
            "it takes, at which every operator in use means the same"
        )
        return clamped

    def _feeds(self, file: Path) -> Sequence[Feed] | None:
        """The user's inputs, else the first calibration samples; None for generated ones."""
        given = self._request.inputs
        if given is None:
            calibration = self._request.options.calibration
            if calibration is None:
                return None
            samples = read_samples(calibration, input_specs(load_model(file)))
            budget = budget_for(self._request.precision, self._request.options.budget)
            if budget is not None:
                budget = dataclasses.replace(budget, metric=None)  # asked of the file by itself
            return Screening().of(samples).first(samples_for(budget, CALIBRATION_FEEDS))
        if isinstance(given, Path):
            if given.suffix == ".toml":
                seed = self._request.options.seed
                return constrained_feeds(file, read_constraints(given), seed=seed)
            return read_feeds(given, input_specs(load_model(file)))
        return [Feed(f"given {i}", dict(values)) for i, values in enumerate(given)]

    def _facts(self, found: Verification) -> VerificationFacts:
        return VerificationFacts(
            mode=self._request.verify.value,
            passed=found.passed,
            profile=found.profile,
            outputs=found.outputs,
            feeds=len(found.feeds),
            metrics=found.metrics,
            reason="; ".join(filter(None, [found.reason, *found.notes])),
            judged=found.judged,
        )
