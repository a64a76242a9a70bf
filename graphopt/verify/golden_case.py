"""One golden case: made from a model and its optimiser, and read back from its folder."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from graphopt.errors import DataError, OptionError, VerifyError
from graphopt.ir import fingerprint
from graphopt.ir.model_file import load_model, save_model
from graphopt.numerics import Numerics
from graphopt.runtime import onnxruntime_api
from graphopt.runtime.emulate import emulate, has_halves
from graphopt.runtime.session import SessionOptions
from graphopt.runtime.specs import Kind, TensorSpec, input_specs
from graphopt.targets import Precision
from graphopt.verify import draws
from graphopt.verify.budget import budget_for
from graphopt.verify.feeds import Feed, find_feeds
from graphopt.verify.golden_files import (
    MANIFEST,
    MAX_CASE_BYTES,
    MAX_STORED_BYTES,
    SCHEMA,
    STRUCTURE,
    read_stored,
    size_bytes,
    summarise,
    value_hash,
    write_value,
)
from graphopt.verify.structure import op_histogram, structure
from graphopt.verify.verifier import ReferenceRun, Verification, VerifyOptions

if TYPE_CHECKING:
    import onnx_ir as ir

Optimize: TypeAlias = Callable[[Path, Path, str], Numerics]
"""Optimises a source file into another file by a recipe; returns what that may do to the numbers."""


TABLE = "golden"
"""The table of a case's recipe that recipes of runs do not have."""


class CaseOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a case says of itself, in `[golden]`.

    Attributes:
        force: emit what the target is known to run slower.
        calibration: samples for passes that decide by data, relative to the folder of the source.
        budget: the error that the run and its result may make, such as "sqnr>=30"; None for what the precision
            promises.
    """

    force: bool = False
    calibration: str | None = None
    budget: str | None = None


def case_options(recipe: str) -> CaseOptions:
    """What the recipe of a case says in `[golden]`.

    Raises:
        OptionError: something that is no option.
    """
    try:
        return msgspec.convert(_table(recipe).get(TABLE, {}), CaseOptions)
    except msgspec.ValidationError as error:
        told = "force (true or false), calibration (a path) and budget (a text)"
        raise OptionError(f"[{TABLE}] of the recipe: {error}; it takes {told}") from error


def compare_result(
    run: ReferenceRun, result: Path, recipe: str, numerics: Numerics, scratch: Path
) -> Verification:
    """How an optimised file compares with its source, by the gate of the precision that the recipe asks for.

    bfloat16 runs in true half precision, by emulation: the runtime has no such kernels on the CPU.
    """
    file = result
    if _precision(recipe) is Precision.BF16 and has_halves(model := load_model(result)):
        file = save_model(emulate(model), scratch / "emulated.onnx")[0]
    return run.verify(file, _gate(recipe, numerics))


def _gate(recipe: str, numerics: Numerics) -> VerifyOptions:
    return VerifyOptions(numerics, budget_for(_precision(recipe), case_options(recipe).budget))


def _precision(recipe: str) -> Precision:
    return Precision(_table(recipe).get("precision", Precision.FP32))


def _table(recipe: str) -> dict[str, Any]:
    """What a recipe says in TOML; nothing where it is one of another kind, which its optimiser understands."""
    try:
        return tomllib.loads(recipe)
    except tomllib.TOMLDecodeError:
        return {}


@dataclasses.dataclass(frozen=True)
class Made:
    """A case that is not in its place yet: a folder with everything but the model, and what verifying it showed."""

    folder: Path
    verification: Verification
    errors: dict[str, float | None]


def make_case(  # noqa: PLR0913, PLR0917  what a case is made of
    model: Path,
    optimize: Optimize,
    feeds: list[Feed] | None,
    recipe: str,
    seed: int,
    scratch: Path,
    path: str = "model.onnx",
) -> Made:
    """Optimises and verifies, then writes everything but the model into a fresh folder.

    `path` is where the manifest says the source lies, relative to the case.

    Raises:
        VerifyError: the optimised model does not compute what the source does.
        ModelError, DataError: the source or the feeds are at fault.
    """
    result = scratch / "optimised.onnx"
    numerics = optimize(model, result, recipe)
    run = ReferenceRun(model, feeds, seed=seed)
    if numerics is Numerics.LOSSY and feeds is None:
        run.keep_usual()
    verification = compare_result(run, result, recipe, numerics, scratch)
    if verification.passed is not True:
        raise VerifyError(
            f"'{model}' cannot be recorded, it is {verification.status}: {verification.reason}"
        )
    folder = scratch / "case"
    folder.mkdir()
    graph = load_model(result)
    errors = {report.name: report.max_over_rms for report in verification.outputs}
    manifest = {
        "schema": SCHEMA,
        "source": {"path": path, **fingerprints(load_model(model))},
        "recipe": recipe,
        "numerics": numerics.name.lower(),
        "generator": {"name": draws.GENERATOR, "seed": seed} if feeds is None else None,
        "runtime": runtime_facts(),
        "data_sets": _write_data_sets(folder, run, generated=feeds is None),
        "profile": verification.profile,
        "tolerance": run.profile(_gate(recipe, numerics)).tolerance,
        "errors": errors,
        "forgiven": [report.name for report in verification.outputs if report.why],
        "excluded": dict(verification.excluded),
        "ops": op_histogram(graph),
    }
    (folder / STRUCTURE).write_text(structure(graph), encoding="utf-8")
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Made(folder, verification, errors)


def fingerprints(model: ir.Model) -> dict[str, str]:
    """What a source computes and with which numbers; names, documentation and how it is stored do not count."""
    return {"structural": fingerprint.structural(model), "weights": fingerprint.weights(model)}


def runtime_facts() -> dict[str, Any]:
    """The runtime that gives reference outputs, as it is installed here."""
    options = SessionOptions(prepack=False)
    return {
        "name": "onnxruntime",
        "version": onnxruntime_api.version(),
        "level": "disabled",
        "threads": options.threads,
        "providers": list(options.providers),
        "prepack": options.prepack,
    }


def stored_feeds(case: Path, manifest: dict[str, Any]) -> list[Feed]:
    """The inputs of every data set: from files, or generated again where they were too large to keep.

    Raises:
        DataError: what is read or generated is not what was recorded.
    """
    graph = load_model(case / manifest["source"]["path"])
    specs = {spec.name: spec for spec in input_specs(graph)}
    again = _generated(graph, manifest)
    feeds = []
    for data_set in manifest["data_sets"]:
        folder = case / data_set["folder"]
        made = again.get(data_set["feed"])
        values = {}
        for position, entry in enumerate(data_set["inputs"]):
            name = entry["name"]
            if entry["stored"]:
                value = read_stored(folder / f"input_{position}.pb", specs[name])
            else:
                value = made.values[name] if made else None
            if value_hash(value) != entry["sha256"]:
                raise DataError(
                    f"The input '{name}' of '{folder}' is not what was recorded; restore or update it."
                )
            values[name] = value
        feeds.append(Feed(data_set["feed"], values))
    return feeds


def _generated(graph: ir.Model, manifest: dict[str, Any]) -> dict[str, Feed]:
    """Feeds of which not everything was kept, by name."""
    if all(entry["stored"] for one in manifest["data_sets"] for entry in one["inputs"]):
        return {}
    # What the model refused then is not asked again: the recorded names say what it took.
    names = {data_set["feed"] for data_set in manifest["data_sets"]}
    found = find_feeds(
        graph,
        lambda feed: None if feed.name in names else "not recorded",
        seed=manifest["generator"]["seed"],
    )
    return {feed.name: feed for feed in found.feeds}


@dataclasses.dataclass
class _Room:
    """How many bytes of a case are left for values; each that fits takes its share."""

    left: int = MAX_CASE_BYTES

    def takes(self, value: object) -> bool:
        size = size_bytes(value)
        fits = size <= min(MAX_STORED_BYTES, self.left)
        self.left -= size if fits else 0
        return fits


def _write_data_sets(folder: Path, run: ReferenceRun, *, generated: bool) -> list[dict[str, Any]]:
    room = _Room(MAX_CASE_BYTES)
    sets = []
    for index, feed in enumerate(run.feeds):
        target = folder / f"test_data_set_{index}"
        target.mkdir()
        inputs = _write_inputs(target, feed, run, None if generated is False else room)
        outputs = _write_outputs(target, run, index, room)
        if not any(target.iterdir()):
            target.rmdir()  # version control keeps no empty folders
        sets.append(
            {"folder": target.name, "feed": feed.name, "inputs": inputs, "outputs": outputs}
        )
    return sets


def _write_inputs(
    target: Path, feed: Feed, run: ReferenceRun, room: _Room | None
) -> list[dict[str, Any]]:
    """Writes inputs; without a `room` all of them, because nothing could make them again."""
    inputs = []
    for position, (name, value) in enumerate(feed.values.items()):
        stored = room is None or room.takes(value)
        if stored:
            write_value(target / f"input_{position}.pb", name, value, _kind(run.inputs, name))
        inputs.append({"name": name, "sha256": value_hash(value), "stored": stored})
    return inputs


def _write_outputs(
    target: Path, run: ReferenceRun, index: int, room: _Room
) -> list[dict[str, Any]]:
    kept = []
    for position, spec in enumerate(run.output_specs):
        if spec.name in run.excluded:
            continue
        value = run.outputs[index][spec.name]
        entry: dict[str, Any] = {"name": spec.name, "file": f"output_{position}.pb"}
        if not hasattr(value, "reshape") or room.takes(value):
            write_value(target / entry["file"], spec.name, value, spec.kind)
        else:
            entry = {"name": spec.name, "summary": summarise(spec.name, value)}
        kept.append(entry)
    return kept


def _kind(specs: tuple[TensorSpec, ...], name: str) -> Kind:
    return next(spec.kind for spec in specs if spec.name == name)
