"""The bundle: a folder with everything that deploying the result takes, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.driver.attempt import Attempt
from graphopt.driver.judge import Judge
from graphopt.driver.request import Request
from graphopt.driver.result import MANIFEST, MODEL, SCHEMA
from graphopt.driver.specialized import Special
from graphopt.emit.artefacts import Deployment, artefacts, is_two_of_four
from graphopt.emit.golden_set import GoldenSet
from graphopt.emit.legality import check_legality
from graphopt.emit.ort_format import ORT_FILE, write_ort
from graphopt.emit.profiles import input_profiles
from graphopt.emit.shape_tensors import shape_tensors
from graphopt.emit.triton import write_repository
from graphopt.errors import GraphoptError, OptionError
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.pipeline import PassRun, Step
from graphopt.pipeline.recipe import to_spec
from graphopt.report.facts import ModelFacts, file_sha256, model_facts
from graphopt.report.markdown import run_markdown
from graphopt.report.patterns import pattern_layers
from graphopt.report.plain import graphopt_version, plain
from graphopt.report.run import RolledBack, RunReport, VerificationFacts
from graphopt.runtime import onnxruntime_api
from graphopt.runtime.session import OptimizationLevel, Session
from graphopt.runtime.specs import TensorSpec, input_specs, output_specs
from graphopt.targets import Artefact, Target
from graphopt.verify import metrics

REPORT = "report.md"

_TEMPORARY = re.compile(r"[^\s'\"]*/\.graphopt-[^/\s'\"]+/")

_FLOOR = {Numerics.EXACT: 1e-4, Numerics.REORDERED: 1e-4, Numerics.LOSSY: 0.05}
"""Of the tolerance of golden outputs: the runtime's own rewrites may reorder sums, and fuse Q/DQ pairs otherwise."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A settled run, as a bundle needs it."""

    request: Request
    made: Attempt
    verdict: VerificationFacts
    judge: Judge
    rolled_back: tuple[RolledBack, ...]
    warnings: tuple[str, ...]
    special: Special | None = None
    specialized: tuple[str, ...] = ()


def build(run: Finished, folder: Path) -> Path:
    """Writes the bundle of a run into a new folder below `folder`; returns it.

    Raises:
        OptionError: a profile names no dynamic dimension.
        TargetError: something that was asked for cannot be expressed.
    """
    place = folder / "bundle"
    place.mkdir()
    for file in run.made.files:
        file.rename(place / file.name)
    model = load_model(place / MODEL)
    specs = (*input_specs(model), *output_specs(model))
    golden = _golden(run, {spec.name for spec in output_specs(model)})
    feed = golden.inputs if golden is not None else {}
    # Kernels read such inputs when they run; engines are built for their values.
    is_built = run.request.target.operators == "tensorrt"
    decided = shape_tensors(model) if is_built else frozenset[str]()
    made = Deployment(
        run.request.target,
        input_specs(model),
        output_specs(model),
        input_profiles(input_specs(model), dict(run.request.profiles), feed, decided),
        golden,
        is_two_of_four(run.request.target.sparse, (each.pattern for each in run.request.patterns)),
        decided,
    )
    listing = None if golden is None else golden.write(place, {s.name: s for s in specs})
    if golden is not None and Artefact.TRTEXEC in run.request.target.artefacts:
        golden.write_raw(place)
    _write_texts(artefacts(made), place)
    if "triton" in run.request.extras:
        write_repository(made, place / "triton", place / MODEL)
    unstable = set()
    if "ort" in run.request.extras and not write_ort(place / MODEL, place):
        unstable.add(ORT_FILE)
    (place / REPORT).write_text(placeless(_report(run, place)), encoding="utf-8")
    body = manifest(run, place, made, listing, unstable)
    _write_texts({MANIFEST: placeless(json.dumps(body, indent=2, allow_nan=False)) + "\n"}, place)
    return place


def _write_texts(texts: Mapping[str, str], place: Path) -> None:
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
        if name.endswith(".sh"):
            (place / name).chmod(0o755)


def placeless(text: str) -> str:
    """The text without the temporary folders that messages of the runtime name: they differ from run to run."""
    return _TEMPORARY.sub("", text)


def _golden(run: Finished, known: set[str]) -> GoldenSet | None:
    """The first feed and what the original gives for it; None where it cannot be run here."""
    try:
        reference = run.judge.reference
    except GraphoptError:
        return None
    if reference.unverifiable or not reference.feeds or not reference.outputs:
        return None
    outputs = {
        name: value
        for name, value in reference.outputs[0].items()
        if name in known and name not in reference.excluded
    }
    observed = {each.name: each.max_over_rms for each in run.verdict.outputs}
    moved = _moved(run, outputs)
    tolerance = {
        name: _allowed(run, value, observed.get(name) or 0.0, moved.get(name, 0.0))
        for name, value in outputs.items()
    }
    inputs = {spec.name: reference.feeds[0].values.get(spec.name) for spec in reference.inputs}
    given = {name: value for name, value in inputs.items() if name in reference.feeds[0].values}
    return GoldenSet(given, outputs, tolerance)


def _allowed(run: Finished, value: object, observed: float, moved: float) -> float | None:
    """What max|d| / RMS of a right result stays below; None where a lossy run may choose other integers."""
    if not _is_integer(value):
        return max(_FLOOR[run.made.numerics], 4 * observed, 4 * moved)
    # Bytes of a quantised model move by whole steps where the runtime adds up otherwise; indices do not move.
    return None if run.made.numerics is Numerics.LOSSY else 4 * max(observed, moved)


def _moved(run: Finished, outputs: Mapping[str, Any]) -> dict[str, float]:
    """By how much the runtime's own rewrites move each output of the original, over its RMS.

    Faster kernels approximate: ONNX Runtime 1.31 moves the scores of a detector by half a percent when it fuses.
    """
    try:
        session = Session(run.judge.reference_file, level=OptimizationLevel.ALL)
        seen = session.run(run.judge.reference.feeds[0].values, list(outputs))
    except GraphoptError:
        return {}
    found = {}
    for name, value in outputs.items():
        other = seen[name]
        if isinstance(value, np.ndarray) and value.size and _is_number(value):
            same = isinstance(other, np.ndarray) and other.shape == value.shape
            wide = [np.asarray(v, np.float64) for v in (value, other)] if same else []
            told = metrics.measure(*wide, tolerance=0.0, floor=0.0) if same else None
            if told is not None and np.isfinite(told.max_over_rms):
                found[name] = float(told.max_over_rms)
    return found


def _is_number(value: np.ndarray[Any, Any]) -> bool:
    return metrics.is_float(value.dtype) or value.dtype.kind in "iu"


def _is_integer(value: object) -> bool:
    return getattr(getattr(value, "dtype", None), "kind", "") in "iub"


def _report(run: Finished, place: Path) -> str:
    """The report of the run, without what differs from run to run: times and folders."""
    before = run.special.before if run.special is not None else run.made.before
    name = None if before.path is None else Path(before.path).name
    after = model_facts(load_model(place / MODEL), place / MODEL, with_hash=False)
    return run_markdown(
        RunReport(
            input=dataclasses.replace(before, path=name),
            output=dataclasses.replace(after, path=MODEL),
            target=run.request.target.name,
            precision=run.request.precision.value,
            passes=run.made.runs,
            verification=run.verdict,
            remarks=run.made.remarks,
            rewrites=run.made.rewrites,
            rolled_back=run.rolled_back,
            recipe=None if run.request.recipe is None else Path(run.request.recipe).name,
            seed=run.request.options.seed,
            warnings=run.warnings,
            sparse=run.made.sparse,
            pattern_layers=pattern_layers(run.made.model, run.request.patterns, run.made.remarks),
            specialized=run.specialized,
        ),
        times=False,
    )


def manifest(
    run: Finished,
    place: Path,
    made: Deployment,
    golden: Mapping[str, Any] | None,
    unstable: Set[str] = frozenset(),
) -> dict[str, Any]:
    """What the bundle is and how it came about: the same for the same run, on any day and in any folder."""
    request, model = run.request, load_model(place / MODEL)
    return {
        "schema": SCHEMA,
        "versions": {
            "graphopt": graphopt_version(),
            "onnxruntime": onnxruntime_api.version(),
            "onnx": onnx.__version__,
        },
        "source": _source(run),
        "model": _model(model_facts(model)),
        "inputs": [_spec(spec) for spec in made.inputs],
        "outputs": [_spec(spec) for spec in made.outputs],
        "target": {
            "name": request.target.name,
            "version": ".".join(map(str, request.target.version)),
            "architecture": request.target.architecture,
        },
        "recipe": _recipe(request),
        "specialization": list(run.specialized),
        "passes": [_pass(each) for each in run.made.runs],
        "rolled_back": plain(run.rolled_back),
        "verification": plain(run.verdict),
        "legality": _legality(load_model(place / MODEL), request.target),
        "profiles": plain(made.profiles),
        "golden": golden,
        "warnings": list(run.warnings),
        "files": {
            file.relative_to(place).as_posix(): None if file.name in unstable else file_sha256(file)
            for file in sorted(place.rglob("*"))
            if file.is_file()
        },
    }


def _model(facts: ModelFacts) -> dict[str, Any]:
    return {
        "file": MODEL,
        "ir_version": facts.ir_version,
        "opsets": dict(facts.opsets),
        "nodes": facts.nodes,
        "operators": dict(facts.operators),
        "parameter_bytes": facts.parameter_bytes,
    }


def _pass(run: PassRun) -> dict[str, Any]:
    """A pass without the time it took, which differs from run to run."""
    return {
        "name": run.name,
        "changed": run.changed,
        "rewrites": run.rewrites,
        "nodes_after": run.nodes_after,
    }


def _legality(model: ir.Model, target: Target) -> dict[str, Any]:
    found = check_legality(model, target)
    return {
        "verdict": found.verdict.value,
        "checked_against": list(found.checked_against),
        "placement": dict(found.placement()),
        "predicted_copies": found.copies.count,
        "findings": plain(found.findings),
    }


def _source(run: Finished) -> dict[str, Any]:
    source = run.special.source if run.special is not None else run.request.source
    facts = run.special.before if run.special is not None else run.made.before
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    is_file = path is not None and path.is_file()
    return {
        "sha256": file_sha256(path) if path is not None and is_file else None,
        "nodes": facts.nodes,
        "parameter_bytes": facts.parameter_bytes,
        "opsets": dict(facts.opsets),
        "ir_version": facts.ir_version,
    }


def _recipe(request: Request) -> dict[str, Any]:
    options = request.options
    return {
        "target": request.target.name,
        "precision": request.precision.value,
        "pipeline": [_step(step) for step in request.steps],
        "disabled": sorted(
            [*request.gate.passes, *(f"{name}/{rule}" for name, rule in request.gate.rules)]
        ),
        "verify": request.verify.value,
        "seed": options.seed,
        "fold_limit_bytes": options.fold_limit_bytes,
        "budget": options.budget,
        "sparsity": options.sparsity,
        "force": options.force,
        "calibrated": options.calibration is not None,
        "external": request.external.value,
        "profiles": plain(dict(request.profiles)),
        "extras": list(request.extras),
    }


def _step(step: Step) -> str:
    """The spec of a step; of one that was made in Python, its name."""
    try:
        return to_spec(step)
    except OptionError:
        return step.name


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "kind": spec.kind.value,
        "dtype": spec.dtype.name.lower(),
        "shape": None if spec.shape is None else list(spec.shape),
        "overridable": spec.overridable,
    }
