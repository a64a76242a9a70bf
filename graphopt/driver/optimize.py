"""The whole way: compile, verify, and where something fails, replay without it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from graphopt.driver.attempt import Attempt, attempt, write
from graphopt.driver.blame import find_among, find_guilty, find_silent
from graphopt.driver.bundle import Finished, build
from graphopt.driver.dump import dump_before
from graphopt.driver.judge import EachFailure, Judge
from graphopt.driver.repro import Fault, check_folder, write_repro
from graphopt.driver.request import Progress, Request, VerifyMode
from graphopt.driver.result import Result, check_output, is_bundle, place, place_bundle
from graphopt.driver.search import with_amount
from graphopt.driver.specialized import Special, compare_with_original, specialized
from graphopt.emit import check_model
from graphopt.errors import ModelError, OptionError, PassError, VerifyError
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.pipeline import flatten
from graphopt.report.facts import model_facts
from graphopt.report.layers import layers
from graphopt.report.patterns import pattern_layers
from graphopt.report.run import RolledBack, RunReport, VerificationFacts
from graphopt.rewrite import Gate, Remark, RemarkKind, Rewrite

MAX_ROLLBACKS = 16
"""How many passes or rewrites may be left out before the run gives up."""

MAX_REFUSALS = 2
"""How often the checker may refuse what came of a model that does not run."""

MAX_SITES = 2
"""At how many sites a rule may be wrong before it is left out everywhere."""


@dataclasses.dataclass
class Run:
    """One run in progress: what is left out so far, and where working files go."""

    request: Request
    judge: Judge
    folder: Path
    say: Progress
    gate: Gate
    rolled_back: list[RolledBack] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    refused: int = 0

    def settle(self) -> tuple[Attempt, VerificationFacts]:
        """The first attempt that holds, leaving out whatever fails on the way.

        Raises:
            PassError: a pass failed and the request is strict.
            ModelError: the model contradicts itself.
            VerifyError: the result is wrong and nothing can be left out to mend it.
        """
        for _ in range(MAX_ROLLBACKS):
            try:
                found = self._try()
            except PassError as fault:
                self._leave_out_pass(fault)
                continue
            if found is not None:
                return found
        last = ", ".join(f"{r.pass_name}/{r.rule}".rstrip("/") for r in self.rolled_back[-3:])
        raise VerifyError(
            f"still wrong after {MAX_ROLLBACKS} rewrites and passes were left out, the last of them {last}. "
            "Nothing was written; --disable leaves out a pass or rule from the start"
        )

    def _try(self) -> tuple[Attempt, VerificationFacts] | None:
        """An attempt that holds; None where something has to be left out, and is from now on.

        Raises:
            PassError: a pass failed, in the attempt or in a replay with fewer rewrites.
            ModelError, VerifyError: as `settle`.
        """
        try:
            made = self._compile(self.gate)
        except EachFailure as fault:
            self._leave_out_wrong(fault.rewrites, fault.file, str(fault), fault.became)
            return None
        if reason := self._invalid(made):
            self._refuse_contradictions()
            self._leave_out_guilty(len(made.rewrites), reason, is_valid)
            return None
        self.say("verify", None)
        verdict = self.judge.verdict(made)
        if verdict.passed is not False:
            return made, verdict
        self._leave_out_wrong(made.rewrites, made.files[0], verdict.reason, made.became)
        return None

    def _compile(self, gate: Gate) -> Attempt:
        """One attempt, in a working file if anybody will read it."""
        self.say("optimize", None)
        watch = self.judge.watch if self.request.verify is VerifyMode.EACH else None
        made = attempt(self.request, gate, watch=watch)
        if self.request.output is None and self.request.verify is VerifyMode.OFF:
            return made
        return self._written(made, self.judge.file_name)

    def _probe(self, gate: Gate) -> Attempt:
        return attempt(self.request, gate, is_probe=True)

    def _written(self, made: Attempt, name: str) -> Attempt:
        return write(made, self.folder, name, self.request.external, self.request.sparse_style)

    def _invalid(self, made: Attempt) -> str:
        """What `onnx.checker` says against the result, if it had nothing to say against the original."""
        fault = check_model(made.model)
        if fault is None:
            return ""
        if made.rewrites and check_model(load_model(self.request.source)) is None:
            return f"onnx.checker refuses the result: {fault[:300]}"
        warning = f"onnx.checker refuses the original model, and so the result: {fault[:300]}"
        if warning not in self.warnings:
            self.warnings.append(warning)
        return ""

    def _refuse_contradictions(self) -> None:
        """Gives up on a model that does not run itself where one rewrite after another makes it invalid.

        Each then only brings to light what was wrong before.

        Raises:
            ModelError: that is so.
        """
        self.refused += 1
        if self.refused <= MAX_REFUSALS or not (broken := self.judge.reference.unverifiable):
            return
        raise ModelError(
            f"the model contradicts itself: onnx.checker refused what was left of it {self.refused} times, each time "
            f"without another rewrite, and the original does not run either: {broken.rstrip('.')}. Nothing was "
            "written; export the model again, or mend the node named here"
        )

    def _leave_out_pass(self, fault: PassError) -> None:
        dump = dump_before(self.request, self.gate, fault)
        fault.dump = None if dump is None else str(dump)
        if self.request.strict or fault.pass_name in self.gate.passes:
            raise fault
        self.gate = self.gate.without_pass(fault.pass_name)
        self.rolled_back.append(RolledBack(fault.pass_name, "", "", str(fault)))

    def _leave_out_wrong(
        self, rewrites: tuple[Rewrite, ...], file: Path, reason: str, became: Mapping[str, str]
    ) -> None:
        """Finds what broke the numbers of the model in `file`, and gates it off.

        Rewrites near the first value that differs are suspected first: a few replays settle that, on that value alone.
        Where they are not to blame, all are searched.

        Raises:
            VerifyError: the request is strict, or nothing that can be left out is at fault.
        """
        self._refuse_if_strict(reason)
        self.say("bisect", None)
        numerics = max((each.numerics for each in rewrites), default=Numerics.EXACT)
        found = self.judge.divergence(file, numerics, became)
        if found is None:
            self._leave_out_guilty(len(rewrites), reason, self.judge.is_right)
            return
        where = f"{found.value!r} ({found.operator}) is the first value to differ"
        reason = f"{reason}; {where}, {found.spread} after it follow"
        near = {*found.region, *found.boundary}
        suspects = [each for each in rewrites if each.site in near]
        blame = find_among(
            lambda tried: attempt(self.request, tried, is_probe=True),
            lambda made: self.judge.agrees_at(found, made),
            self.gate,
            suspects,
        )
        if self.request.repro is not None and not self.rolled_back:
            guilty = () if blame is None else blame.rewrites
            fault = Fault(self.judge.reference_file, file, found, guilty, reason)
            write_repro(self.request.repro, fault)
        if blame is None:
            self._leave_out_guilty(len(rewrites), reason, self.judge.is_right)
            return
        for each in self._needed(blame.rewrites):
            self._leave_out(each, reason)

    def _needed(self, blamed: Sequence[Rewrite]) -> Sequence[Rewrite]:
        """Those of the rewrites blamed for one value without which the outputs are wrong.

        On inputs off the scale, a value in the middle may differ by what no output shows.
        """
        needed = list(blamed)
        for each in blamed:
            rest = [other for other in needed if other is not each]
            if rest and self.judge.is_right(self._probe(self.gate.without_all(rest))):
                needed = rest
        return needed

    def _leave_out_guilty(
        self, count: int, reason: str, is_right: Callable[[Attempt], bool]
    ) -> None:
        """Finds the rewrite among the first `count` that broke the result, and gates it off.

        Raises:
            VerifyError: the request is strict, or nothing that can be left out is at fault.
        """
        self._refuse_if_strict(reason)
        self.say("bisect", None)
        guilty = find_guilty(self._probe, is_right, self.gate, count).rewrites
        if not guilty:
            self._leave_out_silent(reason, is_right)
        for each in guilty:
            self._leave_out(each, reason)

    def _leave_out(self, guilty: Rewrite, reason: str) -> None:
        """Gates one rewrite off; its whole rule where that was wrong elsewhere too often."""
        rule = (guilty.pass_name, guilty.rule)
        wrong = sum((each.pass_name, each.rule) == rule for each in self.rolled_back)
        if wrong < MAX_SITES:
            self.gate = self.gate.without(guilty)
        else:
            self.gate = dataclasses.replace(self.gate, rules=self.gate.rules | {rule})
        site = guilty.site if wrong < MAX_SITES else ""
        self.rolled_back.append(RolledBack(*rule, site, reason))

    def _refuse_if_strict(self, reason: str) -> None:
        if self.request.strict:
            raise VerifyError(f"the result is wrong: {reason}. Nothing was written")

    def _leave_out_silent(self, reason: str, is_right: Callable[[Attempt], bool]) -> None:
        """Gates off the pass that broke the result without having asked for a single rewrite.

        Raises:
            VerifyError: the result is wrong even without any pass.
        """
        names = [each.name for each in flatten(self.request.steps)]
        name = find_silent(self._probe, is_right, self.gate, names)
        if name is None:
            raise VerifyError(
                f"the result is wrong even without any rewrite: {reason}. Nothing was written; this is a bug in "
                "reading or writing the model, please report it with the model"
            )
        self.gate = self.gate.without_pass(name)
        told = f"{reason}. The pass changes the model without asking ctx.permit, so all of it is left out"
        self.rolled_back.append(RolledBack(name, "", "", told))


def is_valid(made: Attempt) -> bool:
    """Whether `onnx.checker` has nothing to say against the result."""
    return check_model(made.model) is None


@contextlib.contextmanager
def _working_folder(output: Path | None) -> Iterator[Path]:
    """A folder for working files; what cannot be written there cannot be written to the output, and is told so.

    They lie beside the output, so that moving them there is a rename.
    """
    parent = None if output is None else output.parent
    with tempfile.TemporaryDirectory(prefix=".graphopt-", dir=parent) as scratch:
        try:
            yield Path(scratch)
        except OptionError as fault:
            told = str(fault)
            if output is None or scratch not in told:
                raise
            inside = re.escape(scratch) + r"[^\s:;,'\"]*"
            raise OptionError(re.sub(inside, lambda _: str(output), told)) from fault


def run(request: Request, say: Progress) -> Result:
    """Carries out a request.

    Raises:
        GraphoptError: with the exit status that the command line returns.
    """
    started = time.process_time()
    say("load", None)
    if request.output is not None:
        check_output(request.output)
    if request.repro is not None:
        check_folder(request.repro)
    with _working_folder(request.output) as scratch:
        request, special = specialized(request)
        request, searched = with_amount(request, say)
        judge = Judge(request, scratch, say)
        made_of = _compared(request, special, judge, scratch)
        running = Run(request, judge, scratch, say, request.gate)
        made, verdict = running.settle()
        say("write", None)
        told = (*searched, *running.warnings, *made.warnings, *_warnings(made.remarks))
        done = Finished(
            request, made, verdict, judge, tuple(running.rolled_back), told, special, made_of
        )
        path = _placed(done, scratch)
    report = _report(done, path, time.process_time() - started)
    return Result(made.model, report, path, request.sparse_style)


def _placed(done: Finished, scratch: Path) -> Path | None:
    """Where the result now lies: a file or a bundle; None where nothing was to be written."""
    output = done.request.output
    if output is None:
        return None
    if is_bundle(output):
        return place_bundle(build(done, scratch), output)
    return place(done.made, output)


def _report(done: Finished, path: Path | None, seconds: float) -> RunReport:
    request, made = done.request, done.made
    return RunReport(
        input=done.special.before if done.special is not None else made.before,
        output=model_facts(
            made.model,
            path,
            files=[path.with_name(file.name) for file in made.files] if path else None,
            with_hash=False,
        ),
        target=request.target.name,
        precision=request.precision.value,
        passes=made.runs,
        verification=done.verdict,
        remarks=made.remarks,
        rewrites=made.rewrites,
        rolled_back=done.rolled_back,
        recipe=request.recipe,
        seed=request.options.seed,
        seconds=seconds,
        sparse=made.sparse,
        stages=made.stages,
        layers=layers(made.model) if request.stages else (),
        pattern_layers=pattern_layers(made.model, request.patterns, made.remarks),
        distilled=made.distilled,
        warnings=done.warnings,
        specialized=done.specialized,
    )


def _compared(
    request: Request, special: Special | None, judge: Judge, folder: Path
) -> tuple[str, ...]:
    """What the model was specialised to, and how that compares with the original; () where it was not.

    Raises:
        VerifyError: it computes something else.
    """
    if special is None:
        return ()
    sentences = request.specialization.sentences()
    if request.verify is VerifyMode.OFF:
        return (*sentences, "not compared with the original: not asked for")
    return (*sentences, compare_with_original(special, judge.reference, folder))


def _warnings(remarks: Sequence[Remark]) -> tuple[str, ...]:
    return tuple(
        f"{remark.pass_name}: {remark.reason}"
        for remark in remarks
        if remark.kind is RemarkKind.WARNING
    )
