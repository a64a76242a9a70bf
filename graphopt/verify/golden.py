"""Golden cases: a model, inputs, outputs and the structure that optimising must give, kept under version control.

A case is a folder in the layout of ONNX's backend tests (`model.onnx`, `test_data_set_0/input_0.pb`, …), so that
other tools read it, plus `golden.json` and `structure.txt`. Stored outputs are the source model's, in ONNX Runtime
with optimisations off. A check asks two questions and keeps their answers apart: does the optimised model compute
what the source computes here and now (the model's business), and does the source compute what was recorded (the
runtime's business).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tempfile
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, OptionError
from graphopt.ir.model_file import load_model, save_model
from graphopt.numerics import Numerics
from graphopt.verify.compare import OutputReport
from graphopt.verify.golden_case import (
    Optimize,
    compare_result,
    fingerprints,
    make_case,
    runtime_facts,
    stored_feeds,
)
from graphopt.verify.golden_files import MANIFEST, STRUCTURE, compare_summary, read_stored
from graphopt.verify.golden_folder import (
    find_cases,
    find_orphans,
    place,
    read_manifest,
    refuse_foreign,
    remove_orphans,
)
from graphopt.verify.structure import op_histogram, structure
from graphopt.verify.verifier import ReferenceRun, VerifyOptions

__all__ = [
    "CaseReport",
    "ErrorChange",
    "GoldenReport",
    "Optimize",
    "check",
    "check_case",
    "check_made",
    "record",
    "renew",
    "update",
    "update_case",
]

GROWTH = 4.0
"""An error that grows by more than this fails, even within the tolerance …"""

ERROR_FLOOR = 1e-6
"""… unless it stays below this, in max|d|/RMS: a few units in the last place of float32."""


@dataclasses.dataclass(frozen=True)
class ErrorChange:
    """The error (max|d|/RMS) of one output when it was recorded and now; None where it has no number."""

    output: str
    recorded: float | None
    now: float | None

    @property
    def grew(self) -> bool:
        """Whether the error is worse than rounding explains."""
        if self.recorded is None or self.now is None:
            return False
        return self.now > max(GROWTH * self.recorded, ERROR_FLOOR)


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """What checking or updating one case showed.

    Attributes:
        name: the folder, relative to the root.
        failures: what is wrong; empty where the case holds.
        errors: by output.
        outputs: the comparisons, the worst over all data sets.
        written: whether an update wrote the case.
        notes: what the reader should know and what is not the model's fault: another runtime, say.
    """

    name: str
    failures: tuple[str, ...] = ()
    errors: tuple[ErrorChange, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    written: bool = False
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures


@dataclasses.dataclass(frozen=True)
class GoldenReport:
    """What checking or updating a tree of cases showed; `orphans` are files that no manifest mentions."""

    cases: tuple[CaseReport, ...]
    orphans: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every case holds."""
        return all(case.passed for case in self.cases)


def record(  # noqa: PLR0913  what a case keeps, by keyword only
    folder: Path,
    model: Path,
    optimize: Optimize,
    *,
    feeds: list[Any] | None = None,
    recipe: str = "",
    seed: int = 0,
    ci: bool = False,
    link: bool = False,
) -> CaseReport:
    """Records a case: optimises the model, verifies the result and writes the folder.

    Args:
        folder: where the case shall lie; an existing case is replaced, nothing else is.
        model: the source; written into the folder as one file, its external data included, unless it lies there.
        optimize: the driver.
        feeds: inputs; generated from `seed` where None.
        recipe: handed to `optimize` and kept, for checks.
        seed: of generated inputs.
        ci: whether this is a run of continuous integration, which must not replace a case.
        link: leave the source where it is and keep the way to it, so that several cases can share one.

    Raises:
        OptionError: the folder holds something that is not a golden case, or `ci` is set and it holds one.
        VerifyError: the optimised model does not compute what the source does; nothing is written.
        ModelError, DataError: the source or the feeds are at fault.
    """
    refuse_foreign(folder, model)
    if (folder / MANIFEST).exists():
        _refuse_ci(ci)
    with tempfile.TemporaryDirectory(prefix="graphopt-golden-") as scratch:
        source = model
        path = "model.onnx"
        if link:
            path = Path(os.path.relpath(model.resolve(), folder.resolve())).as_posix()
        elif (folder / "model.onnx").resolve() != model.resolve():
            source = save_model(load_model(model), Path(scratch) / "model.onnx")[0]
        made = make_case(source, optimize, feeds, recipe, seed, Path(scratch), path)
        place(made.folder, folder, None if link else source)
    changes = tuple(ErrorChange(name, None, error) for name, error in made.errors.items())
    return CaseReport(folder.name, (), changes, made.verification.outputs, written=True)


def check(root: Path, optimize: Optimize) -> GoldenReport:
    """Optimises the source of every case under `root` again, compares numbers, operators and structure.

    Raises:
        DataError: there is no case, or a manifest cannot be read.
    """
    cases = find_cases(root)
    return GoldenReport(
        tuple(check_case(case, optimize, _label(case, root)) for case in cases),
        find_orphans(root, cases),
    )


def update(root: Path, optimize: Optimize, *, accept: bool = False, ci: bool) -> GoldenReport:
    """Records every case under `root` again on its own inputs; errors report old and new.

    Args:
        root: a case or a folder of cases.
        optimize: the driver.
        accept: write although an error grew or the source is another, and remove orphans within cases.
        ci: whether this is a run of continuous integration, which must not write.

    Raises:
        OptionError: `ci` is set.
        DataError: there is no case, or a manifest cannot be read.
    """
    _refuse_ci(ci)
    cases = find_cases(root)
    reports = tuple(
        update_case(case, optimize, _label(case, root), accept=accept) for case in cases
    )
    return GoldenReport(reports, find_orphans(root, cases))


def check_case(case: Path, optimize: Optimize, name: str = "") -> CaseReport:
    """Checks one case; `name` is what to call it in the report."""
    name = name or case.name
    manifest = read_manifest(case)
    source = case / manifest["source"]["path"]
    try:
        if reason := _source_change(source, manifest):
            return CaseReport(name, (reason,))
        with tempfile.TemporaryDirectory(prefix="graphopt-golden-") as scratch:
            result = Path(scratch) / "optimised.onnx"
            numerics = optimize(source, result, manifest["recipe"])
            run = ReferenceRun(source, stored_feeds(case, manifest))
            found = compare_result(run, result, manifest["recipe"], numerics, Path(scratch))
            failures = _structure_failures(case, manifest, result)
    except GraphoptError as error:
        return CaseReport(name, (f"{type(error).__name__}: {error}",))
    changes = tuple(
        ErrorChange(r.name, manifest["errors"].get(r.name), r.max_over_rms) for r in found.outputs
    )
    failures += [f"output '{r.name}' on '{r.feed}': {r.why}" for r in found.outputs if not r.passed]
    if found.passed is not True and all(r.passed for r in found.outputs):
        failures.append(found.reason)
    drift, notes = _drift(case, manifest, run)
    grown = [
        f"the error of output '{c.output}' grew from {c.recorded:.3g} to {c.now:.3g}"
        for c in changes
        if c.grew
    ]
    # Under another runtime the same graph may round otherwise: then growth says nothing about the model.
    failures += drift + ([] if notes else grown)
    return CaseReport(
        name, tuple(failures), changes, found.outputs, notes=(*notes, *(grown if notes else ()))
    )


def update_case(case: Path, optimize: Optimize, name: str = "", *, accept: bool) -> CaseReport:
    """Records one case again on its own inputs; see `update`."""
    name = name or case.name
    manifest = read_manifest(case)
    source = case / manifest["source"]["path"]
    generator = manifest["generator"]
    try:
        reason = _source_change(source, manifest)
        if reason and not accept:
            return CaseReport(name, (f"not written, {reason}; accept it to write",))
        feeds = None if generator is not None else stored_feeds(case, manifest)
        seed = 0 if generator is None else generator["seed"]
        with tempfile.TemporaryDirectory(prefix="graphopt-golden-") as scratch:
            path = manifest["source"]["path"]
            recipe = manifest["recipe"]
            made = make_case(source, optimize, feeds, recipe, seed, Path(scratch), path)
            changes = tuple(
                ErrorChange(output, manifest["errors"].get(output), now)
                for output, now in made.errors.items()
            )
            worse = [change for change in changes if change.grew]
            if worse and not accept:
                told = ", ".join(f"'{c.output}' {c.recorded:.3g} → {c.now:.3g}" for c in worse)
                return CaseReport(
                    name, (f"not written, errors grew: {told}; accept it to write",), changes
                )
            place(made.folder, case, None)
            if accept:
                remove_orphans(case, read_manifest(case))
    except GraphoptError as error:
        return CaseReport(name, (f"{type(error).__name__}: {error}",))
    return CaseReport(name, (), changes, made.verification.outputs, written=True)


def check_made(case: Path, model: Path, optimize: Optimize, *, recipe: str = "") -> CaseReport:
    """Checks a case whose source was just made again, by an export under test say: it must be the recorded one."""
    if not (case / MANIFEST).is_file():
        return CaseReport(
            case.name, (f"there is no golden case '{case}' yet; record it with --graphopt-update",)
        )
    manifest = read_manifest(case)
    if recipe != manifest["recipe"]:
        return CaseReport(
            case.name, (f"recorded with the recipe {manifest['recipe']!r}, not {recipe!r}",)
        )
    if reason := _source_change(model, manifest):
        return CaseReport(case.name, (reason,))
    return check_case(case, optimize)


def renew(
    case: Path, model: Path, optimize: Optimize, *, recipe: str = "", accept: bool
) -> CaseReport:
    """Records a case whose source was just made, or records it again, on its own inputs if the source is the same.

    Another source, or an error that grew, is written with `accept` only.
    """
    if not (case / MANIFEST).is_file():
        return record(case, model, optimize, recipe=recipe)
    manifest = read_manifest(case)
    reason = _source_change(model, manifest)
    if not reason and recipe == manifest["recipe"]:
        return update_case(case, optimize, accept=accept)
    if reason and not accept:
        return CaseReport(case.name, (f"not written, {reason}; accept it to write",))
    return record(case, model, optimize, recipe=recipe)


def _refuse_ci(ci: bool) -> None:
    if ci:
        raise OptionError(
            "Golden cases are not updated in continuous integration: run 'graphopt golden update' where the change "
            "can be reviewed, and commit it."
        )


def _source_change(source: Path, manifest: dict[str, Any]) -> str:
    """In which way the source is not the one that was recorded; "" where it is."""
    if not source.is_file():
        return f"the source '{source}' is missing or is not the one that was recorded"
    now = fingerprints(load_model(source))
    if now["structural"] != manifest["source"]["structural"]:
        return f"the source '{source}' is not the one that was recorded: its structure changed"
    if now["weights"] != manifest["source"]["weights"]:
        return f"the source '{source}' is not the one that was recorded: its weights changed"
    return ""


def _drift(
    case: Path, manifest: dict[str, Any], run: ReferenceRun
) -> tuple[list[str], tuple[str, ...]]:
    """Whether the source still computes what was recorded: failures under the same runtime, notes under another."""
    then, now = manifest["runtime"], runtime_facts()
    other = then["version"] != now["version"]
    notes = (
        [f"recorded with {then['name']} {then['version']}, checked with {now['version']}"]
        if other
        else []
    )
    differing = [] if run.unverifiable else _differing(case, manifest, run)
    if not differing:
        return [], tuple(notes)
    told = "; ".join(differing[:3])
    if other:
        return [], (*notes, f"the source itself computes otherwise under this runtime: {told}")
    return [
        f"the source itself does not compute what was recorded, under the same runtime: {told}"
    ], tuple(notes)


def _differing(case: Path, manifest: dict[str, Any], run: ReferenceRun) -> list[str]:
    """Outputs of the source that are not what was stored, beyond what another processor's rounding explains."""
    profile = run.profile(VerifyOptions(Numerics.REORDERED))
    specs = {spec.name: spec for spec in run.output_specs}
    found = []
    for index, entry in enumerate(manifest["data_sets"]):
        for output in entry["outputs"]:
            name = output["name"]
            if name in run.excluded:
                continue
            value = run.outputs[index][name]
            if "summary" in output:
                report = compare_summary(name, output["summary"], value, profile)
            else:
                stored = read_stored(case / entry["folder"] / output["file"], specs[name])
                report = run.judge(name, index, stored, profile)
            if not report.passed:
                found.append(f"output '{name}' on '{entry['feed']}': {report.why}")
    return found


def _structure_failures(case: Path, manifest: dict[str, Any], result: Path) -> list[str]:
    graph = load_model(result)
    failures = []
    was, now = manifest["ops"], op_histogram(graph)
    changed = [
        f"{op} {was.get(op, 0)} → {now.get(op, 0)}"
        for op in sorted({*was, *now})
        if was.get(op) != now.get(op)
    ]
    if changed:
        failures.append(f"operators changed: {', '.join(changed)}")
    recorded = (
        (case / STRUCTURE).read_text(encoding="utf-8") if (case / STRUCTURE).is_file() else ""
    )
    lines = difflib.unified_diff(
        recorded.splitlines(), structure(graph).splitlines(), "recorded", "now", lineterm="", n=1
    )
    shown = list(lines)
    if shown:
        more = f"\n… {len(shown) - 30} lines more" if len(shown) > 30 else ""
        failures.append("the structure changed:\n" + "\n".join(shown[:30]) + more)
    return failures


def _label(case: Path, root: Path) -> str:
    return case.name if case == root else case.relative_to(root).as_posix()
