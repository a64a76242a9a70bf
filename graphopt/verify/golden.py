"""Golden cases: a model, inputs, outputs and the structure that optimising must give, kept under version control.

A case is a folder in the layout of ONNX's backend tests (`model.onnx`, `test_data_set_0/input_0.pb`, …), so that
other tools read it, plus `golden.json` and `structure.txt`. Stored outputs are the source model's, in ONNX Runtime
with optimisations off; checking optimises the source again and compares.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from graphopt.errors import DataError, GraphoptError, OptionError, VerifyError
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.runtime import onnxruntime_api
from graphopt.runtime.session import Session, SessionOptions
from graphopt.runtime.specs import Kind, TensorSpec, input_specs
from graphopt.verify import draws
from graphopt.verify.compare import Budget, Hint, OutputReport, Profile, compare, merge
from graphopt.verify.feeds import Feed, find_feeds
from graphopt.verify.golden_files import (
    MANIFEST,
    MAX_STORED_BYTES,
    SCHEMA,
    STRUCTURE,
    compare_summary,
    read_stored,
    size_bytes,
    summarise,
    value_hash,
    write_value,
)
from graphopt.verify.golden_folder import (
    file_hash,
    find_cases,
    find_orphans,
    place,
    read_manifest,
    refuse_foreign,
    remove_orphans,
)
from graphopt.verify.origins import output_origins
from graphopt.verify.structure import op_histogram, structure
from graphopt.verify.verifier import ReferenceRun, Verification, VerifyOptions, scale_floor

Optimize: TypeAlias = Callable[[Path, Path, str], Numerics]
"""Optimises a source file into another file by a recipe; returns what that may do to the numbers."""

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
    """

    name: str
    failures: tuple[str, ...] = ()
    errors: tuple[ErrorChange, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    written: bool = False

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


def record(
    folder: Path,
    model: Path,
    optimize: Optimize,
    *,
    feeds: list[Feed] | None = None,
    recipe: str = "",
    seed: int = 0,
) -> CaseReport:
    """Records a case: optimises the model, verifies the result and writes the folder.

    Args:
        folder: where the case shall lie; an existing case is replaced, nothing else is.
        model: the source; copied into the folder unless it lies there.
        optimize: the driver.
        feeds: inputs; generated from `seed` where None.
        recipe: handed to `optimize` and kept, for checks.
        seed: of generated inputs.

    Raises:
        OptionError: the folder holds something that is not a golden case.
        VerifyError: the optimised model does not compute what the source does; nothing is written.
        ModelError, DataError: the source or the feeds are at fault.
    """
    refuse_foreign(folder, model)
    with tempfile.TemporaryDirectory(prefix="graphopt-golden-") as scratch:
        made = _make(model, optimize, feeds, recipe, seed, Path(scratch))
        place(made.folder, folder, model)
    return CaseReport(folder.name, (), made.errors, made.verification.outputs, written=True)


def check(root: Path, optimize: Optimize) -> GoldenReport:
    """Optimises the source of every case under `root` again, compares numbers, operators and structure.

    Raises:
        DataError: there is no case, or a manifest cannot be read.
    """
    cases = find_cases(root)
    return GoldenReport(
        tuple(_check_case(case, _label(case, root), optimize) for case in cases),
        find_orphans(root, cases),
    )


def update(root: Path, optimize: Optimize, *, accept: bool = False, ci: bool) -> GoldenReport:
    """Records every case under `root` again on its own inputs; errors report old and new.

    Args:
        root: a case or a folder of cases.
        optimize: the driver.
        accept: write although an error grew, and remove orphans within cases.
        ci: whether this is a run of continuous integration, which must not write.

    Raises:
        OptionError: `ci` is set.
        DataError: there is no case, or a manifest cannot be read.
    """
    if ci:
        raise OptionError(
            "Golden cases are not updated in continuous integration: run 'graphopt golden update' where the change "
            "can be reviewed, and commit it."
        )
    cases = find_cases(root)
    reports = tuple(_update_case(case, _label(case, root), optimize, accept) for case in cases)
    return GoldenReport(reports, find_orphans(root, cases))


@dataclasses.dataclass(frozen=True)
class _Made:
    folder: Path
    verification: Verification
    errors: tuple[ErrorChange, ...]


def _make(
    model: Path, optimize: Optimize, feeds: list[Feed] | None, recipe: str, seed: int, scratch: Path
) -> _Made:
    """Optimises and verifies, then writes everything but the model into a fresh folder."""
    result = scratch / "optimised.onnx"
    numerics = optimize(model, result, recipe)
    run = ReferenceRun(model, feeds, seed=seed)
    verification = run.verify(result, VerifyOptions(numerics=numerics))
    if verification.passed is not True:
        raise VerifyError(
            f"'{model}' cannot be recorded, it is {verification.status}: {verification.reason}"
        )
    folder = scratch / "case"
    folder.mkdir()
    graph = load_model(result)
    generator = {"name": draws.GENERATOR, "seed": seed} if feeds is None else None
    data_sets = [
        _write_data_set(folder, index, run, generator is not None)
        for index in range(len(run.feeds))
    ]
    errors = {report.name: report.max_over_rms for report in verification.outputs}
    manifest = {
        "schema": SCHEMA,
        "source": {"path": "model.onnx", "sha256": file_hash(model)},
        "recipe": recipe,
        "numerics": numerics.name.lower(),
        "profile": _profile_json(run.profile(VerifyOptions(numerics=numerics))),
        "generator": generator,
        "runtime": _runtime_json(),
        "data_sets": data_sets,
        "errors": errors,
        "forgiven": [report.name for report in verification.outputs if report.why],
        "excluded": dict(verification.excluded),
        "ops": op_histogram(graph),
    }
    (folder / STRUCTURE).write_text(structure(graph), encoding="utf-8")
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    changes = tuple(ErrorChange(name, None, error) for name, error in errors.items())
    return _Made(folder, verification, changes)


def _write_data_set(folder: Path, index: int, run: ReferenceRun, generated: bool) -> dict[str, Any]:
    feed, outputs = run.feeds[index], run.outputs[index]
    target = folder / f"test_data_set_{index}"
    target.mkdir()
    inputs = []
    for position, (name, value) in enumerate(feed.values.items()):
        stored = not generated or size_bytes(value) <= MAX_STORED_BYTES
        if stored:
            write_value(target / f"input_{position}.pb", name, value, _kind(run.inputs, name))
        inputs.append({"name": name, "sha256": value_hash(value), "stored": stored})
    kept = []
    for position, spec in enumerate(run.output_specs):
        if spec.name in run.excluded:
            continue
        value = outputs[spec.name]
        entry: dict[str, Any] = {"name": spec.name, "file": f"output_{position}.pb"}
        if size_bytes(value) > MAX_STORED_BYTES and hasattr(value, "reshape"):
            entry = {"name": spec.name, "summary": summarise(spec.name, value)}
        else:
            write_value(target / entry["file"], spec.name, value, spec.kind)
        kept.append(entry)
    return {"folder": target.name, "feed": feed.name, "inputs": inputs, "outputs": kept}


def _check_case(case: Path, name: str, optimize: Optimize) -> CaseReport:
    manifest = read_manifest(case)
    source = case / manifest["source"]["path"]
    if not source.is_file() or file_hash(source) != manifest["source"]["sha256"]:
        return CaseReport(
            name, (f"the source '{source}' is missing or is not the one that was recorded",)
        )
    with tempfile.TemporaryDirectory(prefix="graphopt-golden-") as scratch:
        result = Path(scratch) / "optimised.onnx"
        try:
            optimize(source, result, manifest["recipe"])
            outputs = _compare_stored(case, manifest, result)
        except GraphoptError as error:
            return CaseReport(name, (f"{type(error).__name__}: {error}",))
        failures = _structure_failures(case, manifest, result)
    changes = tuple(
        ErrorChange(r.name, manifest["errors"].get(r.name), r.max_over_rms) for r in outputs
    )
    failures += [f"output '{r.name}' on '{r.feed}': {r.why}" for r in outputs if not r.passed]
    failures += [
        f"the error of output '{c.output}' grew from {c.recorded:.3g} to {c.now:.3g}"
        for c in changes
        if c.grew
    ]
    return CaseReport(name, tuple(failures), changes, outputs)


def _compare_stored(case: Path, manifest: dict[str, Any], result: Path) -> tuple[OutputReport, ...]:
    """The optimised model's outputs against the stored ones, the worst over all data sets."""
    session = Session(result, options=SessionOptions(prepack=False))
    specs = {spec.name: spec for spec in session.outputs}
    profile = _profile_of(manifest["profile"])
    made = output_origins(load_model(case / manifest["source"]["path"]))
    floors: dict[str, float] = {}
    reports: dict[str, list[OutputReport]] = {}
    for entry, feed in zip(manifest["data_sets"], _stored_feeds(case, manifest), strict=True):
        wanted = [output["name"] for output in entry["outputs"]]
        values = session.run(feed.values, wanted)
        for output in entry["outputs"]:
            name = output["name"]
            if "summary" in output:
                report = compare_summary(name, output["summary"], values[name], profile)
            else:
                stored = read_stored(case / entry["folder"] / output["file"], specs[name])
                floors.setdefault(name, scale_floor(stored, made[name], profile))
                report = compare(
                    name, stored, values[name], profile, Hint(made[name].origin, floor=floors[name])
                )
            reports.setdefault(name, []).append(dataclasses.replace(report, feed=feed.name))
    return tuple(merge(found) for found in reports.values())


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


def _update_case(case: Path, name: str, optimize: Optimize, accept: bool) -> CaseReport:
    manifest = read_manifest(case)
    source = case / manifest["source"]["path"]
    generator = manifest["generator"]
    try:
        feeds = None if generator is not None else _stored_feeds(case, manifest)
        seed = 0 if generator is None else generator["seed"]
        with tempfile.TemporaryDirectory(prefix="graphopt-golden-") as scratch:
            made = _make(source, optimize, feeds, manifest["recipe"], seed, Path(scratch))
            changes = tuple(
                ErrorChange(change.output, manifest["errors"].get(change.output), change.now)
                for change in made.errors
            )
            worse = [change for change in changes if change.grew]
            if worse and not accept:
                told = ", ".join(f"'{c.output}' {c.recorded:.3g} → {c.now:.3g}" for c in worse)
                return CaseReport(
                    name, (f"not written, errors grew: {told}; pass --accept to write",), changes
                )
            if accept:
                remove_orphans(case, manifest)
            place(made.folder, case, source)
    except GraphoptError as error:
        return CaseReport(name, (f"{type(error).__name__}: {error}",))
    return CaseReport(name, (), changes, made.verification.outputs, written=True)


def _stored_feeds(case: Path, manifest: dict[str, Any]) -> list[Feed]:
    """The inputs of every data set: from files, or generated again where they were too large to keep.

    Raises:
        DataError: what is read or generated is not what was recorded.
    """
    graph = load_model(case / manifest["source"]["path"])
    specs = {spec.name: spec for spec in input_specs(graph)}
    generated: dict[str, Feed] = {}
    if any(
        not entry["stored"] for data_set in manifest["data_sets"] for entry in data_set["inputs"]
    ):
        names = {data_set["feed"] for data_set in manifest["data_sets"]}
        seed = manifest["generator"]["seed"]
        # What the model refused then is not asked again: the recorded names say what it took.
        found = find_feeds(
            graph, lambda feed: None if feed.name in names else "not recorded", seed=seed
        )
        generated = {feed.name: feed for feed in found.feeds}
    feeds = []
    for data_set in manifest["data_sets"]:
        values = {}
        for position, entry in enumerate(data_set["inputs"]):
            name = entry["name"]
            path = case / data_set["folder"] / f"input_{position}.pb"
            made = generated.get(data_set["feed"])
            value = (
                read_stored(path, specs[name])
                if entry["stored"]
                else made.values[name]
                if made
                else None
            )
            if value_hash(value) != entry["sha256"]:
                raise DataError(
                    f"The input '{name}' of '{path.parent}' is not what was recorded; restore or update it."
                )
            values[name] = value
        feeds.append(Feed(data_set["feed"], values))
    return feeds


def _label(case: Path, root: Path) -> str:
    return case.name if case == root else case.relative_to(root).as_posix()


def _kind(specs: tuple[TensorSpec, ...], name: str) -> Kind:
    return next(spec.kind for spec in specs if spec.name == name)


def _profile_json(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "numerics": profile.numerics.name.lower(),
        "tolerance": profile.tolerance,
        "budget": None if profile.budget is None else dataclasses.asdict(profile.budget),
    }


def _profile_of(stored: dict[str, Any]) -> Profile:
    budget = None if stored["budget"] is None else Budget(**stored["budget"])
    return Profile(
        stored["name"], Numerics[stored["numerics"].upper()], stored["tolerance"], budget
    )


def _runtime_json() -> dict[str, Any]:
    options = SessionOptions(prepack=False)
    return {
        "name": "onnxruntime",
        "version": onnxruntime_api.version(),
        "level": "disabled",
        "threads": options.threads,
        "providers": list(options.providers),
        "prepack": options.prepack,
    }
