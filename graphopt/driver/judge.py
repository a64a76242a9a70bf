"""Whether what an attempt gave computes what the original does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.driver.attempt import Attempt
from graphopt.driver.request import Progress, Request, VerifyMode
from graphopt.emit import finalize
from graphopt.errors import TargetError, VerifyError
from graphopt.ir.model_file import load_model, save_model
from graphopt.pipeline import PassRun
from graphopt.report.run import VerificationFacts
from graphopt.rewrite import Context
from graphopt.runtime.specs import input_specs
from graphopt.targets import get_target
from graphopt.verify.feeds import Feed, read_feeds
from graphopt.verify.verifier import ReferenceRun, Verification, VerifyOptions


class EachFailure(VerifyError):
    """With `verify each`: the numbers were right before a pass and wrong after it.

    `count` is how many rewrites had been made by then.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


class Judge:
    """Compares attempts with the original; the reference is run once, when it is first needed."""

    def __init__(self, request: Request, folder: Path, say: Progress) -> None:
        self._request = request
        self._folder = folder
        self._say = say
        self._reference: ReferenceRun | None = None
        self.file_name = "model.onnx" if request.output is None else request.output.name

    def verdict(self, made: Attempt) -> VerificationFacts:
        """How the written attempt compares with the original."""
        mode = self._request.verify
        if mode is VerifyMode.OFF:
            return VerificationFacts(mode.value, reason="not asked for")
        return self._facts(self._compare(made))

    def is_right(self, made: Attempt) -> bool:
        """Whether the written attempt may stand, at the first feed that tells."""
        return self._compare(made, fail_fast=True).passed is not False

    def watch(self, run: PassRun, model: ir.Model, ctx: Context) -> None:
        """Compares after a pass that changed something.

        Raises:
            EachFailure: the pass broke the numbers.
        """
        if not run.changed:
            return
        snapshot = load_model(model)
        finalize(snapshot, self._request.target)
        files = save_model(snapshot, self._folder / "each.onnx")
        options = VerifyOptions(ctx.numerics, fail_fast=True, allow_constant_defaults=True)
        found = self.reference.verify(files[0], options)
        if found.passed is False:
            raise EachFailure(
                f"pass {run.name} broke the numbers: {found.reason}", len(ctx.rewrites)
            )

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
            run = ReferenceRun(file, feeds, seed=seed)
            if run.unverifiable and (clamped := self._clamped(file)) is not None:
                run = self._better(run, ReferenceRun(clamped, feeds, seed=seed))
            self._reference = run
        return self._reference

    def _compare(self, made: Attempt, *, fail_fast: bool = False) -> Verification:
        options = VerifyOptions(made.numerics, fail_fast=fail_fast, allow_constant_defaults=False)
        return self.reference.verify(made.files[0], options)

    def _original(self) -> Path:
        """The original as a file that ONNX Runtime reads by itself."""
        source = self._request.source
        if isinstance(source, str | Path) and Path(source).suffix == ".onnx":
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
        """The user's inputs; None for generated ones."""
        given = self._request.inputs
        if given is None:
            return None
        if isinstance(given, Path):
            return read_feeds(given, input_specs(load_model(file)))
        return [Feed(f"given {i}", dict(values)) for i, values in enumerate(given)]

    def _facts(self, found: Verification) -> VerificationFacts:
        return VerificationFacts(
            mode=self._request.verify.value,
            passed=found.passed,
            profile=found.profile,
            outputs=found.outputs,
            feeds=len(found.feeds),
            reason="; ".join(filter(None, [found.reason, *found.notes])),
        )
