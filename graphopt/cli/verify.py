"""`graphopt verify`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from graphopt.cli import options
from graphopt.cli.choice import one_of
from graphopt.cli.progress import progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.verify.criteria import Criteria
    from graphopt.verify.feeds import Feed
    from graphopt.verify.verifier import Verification, VerifyOptions

PROFILES = ("exact", "reordered", "fp16", "bf16", "int8")


Reference: TypeAlias = Annotated[
    Path, typer.Argument(metavar="REFERENCE", help="The model that is right by definition.")
]
Candidate: TypeAlias = Annotated[
    Path, typer.Argument(metavar="CANDIDATE", help="The model to compare with it.")
]
Profile: TypeAlias = Annotated[
    str,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="What may differ: exact (no bit), reordered (float rounding), fp16, bf16, int8 (an error budget).",
    ),
]
Tolerance: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--tolerance", metavar="X", help="Accept max|d| / RMS(reference) up to X instead."
    ),
]
Sqnr: TypeAlias = Annotated[
    float | None,
    typer.Option("--sqnr", metavar="DB", help="Require this signal to noise ratio instead."),
]
Cosine: TypeAlias = Annotated[
    float | None, typer.Option("--cosine", metavar="C", help="Require this cosine instead.")
]
Deployed: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--deployed",
        help="Run CANDIDATE with the runtime's own optimisations too, for information.",
    ),
]


def command(
    reference: Reference,
    candidate: Candidate,
    inputs: options.Inputs = None,
    seed: options.Seed = 0,
    cache: options.Cache = False,
    dims: options.Dims = None,
    profile: Profile = "reordered",
    tolerance: Tolerance = None,
    sqnr: Sqnr = None,
    cosine: Cosine = None,
    gates: options.Gates = None,
    metric: options.Metric = None,
    deployed: Deployed = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Run both models on the same inputs and compare each output; the exit status is 1 if they differ or cannot run.

    Both run in ONNX Runtime on the CPU with its own optimisations off.
    """
    from graphopt.cli.console import show, show_json
    from graphopt.cli.inspect import parse_dims
    from graphopt.numerics import Numerics
    from graphopt.report.plain import graphopt_version, plain
    from graphopt.verify.kept import user_folder
    from graphopt.verify.verifier import ReferenceRun

    gate = verify_options(profile, tolerance, sqnr, cosine, deployed=deployed)
    gate = dataclasses.replace(gate, criteria=criteria(gates, metric, inputs))
    sizes = parse_dims(dims or ())
    with progress(quiet=quiet or as_json) as say:
        say("reading", None)
        first, second = runnable(reference), runnable(candidate)
        feeds = None if inputs is None else given_feeds(inputs, reference)
        say("running the reference", None)
        run = ReferenceRun(
            first,
            feeds,
            seed=seed,
            dims=sizes,
            thorough=gate.numerics is not Numerics.LOSSY,
            kept=user_folder() if cache else None,
        )
        say("running the candidate", None)
        found = run.verify(second, gate)
    if as_json:
        names = {"reference": str(reference), "candidate": str(candidate)}
        show_json({"graphopt": graphopt_version(), **names, "passed": found.passed, **plain(found)})
    elif not quiet:
        show(*_parts(found))
    return 0 if found.passed else 1


def criteria(gates: list[str] | None, metric: str | None, inputs: Path | None) -> Criteria:
    """What is asked of single outputs, in options and in the file that bounds the inputs, and the metric."""
    from graphopt.verify.constraints import read_constraints
    from graphopt.verify.criteria import Criteria, load_metric, parse_gates

    bounds = inputs is not None and inputs.suffix == ".toml"
    outputs = read_constraints(inputs).outputs if inputs is not None and bounds else {}
    metrics = () if metric is None else (load_metric(metric),)
    return Criteria({**parse_gates(outputs), **parse_gates(gates or ())}, metrics)


def verify_options(
    profile: str,
    tolerance: float | None,
    sqnr: float | None,
    cosine: float | None,
    *,
    deployed: bool = False,
) -> VerifyOptions:
    """The gate that the options ask for.

    Raises:
        OptionError: no such profile, or a limit that cannot be one.
    """
    from graphopt.errors import OptionError
    from graphopt.numerics import Numerics
    from graphopt.runtime.session import OptimizationLevel
    from graphopt.verify.compare import BF16, FP16, INT8, Budget
    from graphopt.verify.verifier import VerifyOptions

    one_of("profile", profile, PROFILES)
    for name, limit in (("--tolerance", tolerance), ("--sqnr", sqnr), ("--cosine", cosine)):
        if limit is not None and not math.isfinite(limit):
            raise OptionError(f"{name} {limit}: give a finite number")
    level = OptimizationLevel.ALL if deployed else None
    if (tolerance, sqnr, cosine) != (None, None, None):
        budget: Budget | None = Budget(max_over_rms=tolerance, sqnr_db=sqnr, cosine=cosine)
    else:
        budget = {"fp16": FP16, "bf16": BF16, "int8": INT8}.get(profile)
    if budget is not None:
        return VerifyOptions(Numerics.LOSSY, budget, deployed=level)
    numerics = Numerics.EXACT if profile == "exact" else Numerics.REORDERED
    return VerifyOptions(numerics, deployed=level)


def runnable(path: Path) -> Path | bytes:
    """What ONNX Runtime can read: the file itself, or the bytes of a model in another form.

    Raises:
        ModelError: the file is no model.
    """
    from graphopt.ir.model_file import load_model, model_to_bytes

    model = load_model(path)
    return path if path.suffix == ".onnx" else model_to_bytes(model)


def given_feeds(inputs: Path, model: Path) -> list[Feed]:
    """The user's inputs for a model.

    Raises:
        DataError: they do not fit it.
    """
    from graphopt.ir.model_file import load_model
    from graphopt.runtime.specs import input_specs
    from graphopt.verify.feeds import read_feeds

    if inputs.suffix == ".toml":
        from graphopt.verify.constraints import constrained_feeds, read_constraints

        return constrained_feeds(model, read_constraints(inputs))
    return read_feeds(inputs, input_specs(load_model(model)))


def _parts(found: Verification) -> list[RenderableType]:
    from graphopt.cli.console import text
    from graphopt.cli.verification import metric_lines, outputs_table, verdict

    said = verdict(found.passed, found.profile, len(found.feeds), found.reason)
    parts: list[RenderableType] = [said]
    if found.outputs:
        parts.append(outputs_table(found.outputs, found.reason))
    parts += metric_lines(found.metrics)
    parts += [text(f"contract: {line}", "red") for line in found.contract]
    if found.deployed:
        parts += [text(""), text("with the runtime's own optimisations", "bold")]
        parts.append(outputs_table(found.deployed))
    parts += [text(f"note: {note}", "dim") for note in found.notes]
    if found.dropped:
        first = found.dropped[0]
        left = f"{len(found.dropped)} generated inputs were refused by the reference, the first ({first.name}): "
        parts.append(text(f"note: {left}{first.reason}", "dim"))
    return parts
