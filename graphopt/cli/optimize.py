"""`graphopt optimize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from graphopt.cli import completion, options, specializing
from graphopt.cli.choice import one_of
from graphopt.cli.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from graphopt.driver.result import Result
    from graphopt.report.explain import Explanation
    from graphopt.report.run import RunReport

EXTERNAL = ("auto", "never", "single", "per-tensor")
REPORT_SUFFIXES = (".html", ".json", ".md")

Output: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", help="File to write, x.onnx, or a folder for a bundle."
    ),
]
Precision: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="fp32: every dtype as it is; fp16, bf16: half where it pays; "
        "fp16-weights: half in the file only; fp8: TensorRT; int8: needs --calibration. [default: fp32]",
    ),
]
Calibration: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="PATH",
        help="Samples to decide on: npz, a folder of npz, ONNX test_data_set_*. Without, inputs are generated.",
    ),
]
Preprocess: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--preprocess",
        metavar="FILE",
        help="How images among the samples become inputs (TOML): resize, crop, scale, mean, std, layout.",
    ),
]
SampleCount: TypeAlias = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", help="How many samples to use at most. [default: all]"),
]
BudgetText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="EXPR",
        help="Error that a lossy run may make: sqnr>=40, max<=0.01,cosine>=0.999. [default: the precision's]",
    ),
]
Sparsity: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        metavar="AMOUNT",
        help="Prune: 0.8 (share of zeros), 2:4 (two zeros in four), channels:0.5 (share of the arithmetic), max or "
        "channels:max (the most within --budget). Give --calibration, else accuracy suffers.",
    ),
]
Distill: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--distill",
        metavar="SETTINGS",
        help="Train what is left towards the original, without labels: yes, or steps=300,lr=0.002,... Needs PyTorch "
        "and --calibration.",
    ),
]
Sparse: TypeAlias = Annotated[
    str,
    typer.Option(
        "--sparse",
        metavar="auto|dense|sparse_initializer|constant|kept",
        help="Form of weights that are mostly zero; auto: with --sparsity what the target reads, where the file "
        "shrinks; else as they came.",
    ),
]
Force: TypeAlias = Annotated[
    bool, typer.Option("--force", help="Emit what the target is known to run slower.")
]
Autotune: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--autotune",
        help="Time what fusions gain on this machine, instead of going by the target's tables; kept in "
        "~/.cache/graphopt for the next run.",
    ),
]
Recipe: TypeAlias = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Recipe in TOML; options given here win."),
]
Passes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="SPEC",
        help="Run this pass too, after the others: name, name{option=value} or module:object. Repeatable.",
        autocompletion=completion.pass_names,
    ),
]
Disable: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--disable",
        metavar="NAME",
        help="Leave out a pass (pass) or one rule of it (pass/rule). Repeatable.",
        autocompletion=completion.pass_names,
    ),
]
Verify: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--verify",
        metavar="final|each|off",
        help="Compare with the original at the end, after each pass, or not at all. [default: final]",
    ),
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Seed of everything random. [default: 0]"),
]
FoldLimit: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--fold-limit",
        metavar="BYTES",
        help="How much larger than what it replaces a folded constant may be: 65536, 64k, 16M. [default: 1 MiB]",
    ),
]
External: TypeAlias = Annotated[
    str,
    typer.Option(
        "--external",
        metavar="|".join(EXTERNAL),
        help="Where weights go: beside the model from 2 GiB on, never, in one file, in one file a tensor.",
    ),
]
Remarks: TypeAlias = Annotated[
    bool, typer.Option("--remarks", help="Look for near misses too, and list every remark.")
]
Strict: TypeAlias = Annotated[
    bool,
    typer.Option("--strict", help="Fail where a pass fails, instead of leaving it out."),
]
Profiles: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="NAME=MIN,OPT,MAX",
        help="Range of a dynamic dimension, for the engines of a bundle: batch=1,8,32. Repeatable.",
    ),
]
Extras: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="triton|ort",
        help="Put this into the bundle too: a Triton model repository, the .ort format. Repeatable.",
    ),
]
Explain: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--explain",
        metavar="NODE",
        help="Say why a node (its name or an output's, * and ? allowed) is as it is: dtype, reason, rewrites. "
        "Repeatable.",
    ),
]
Report: TypeAlias = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write the report: .html, .md or .json."),
]


def command(
    model: options.Model,
    output: Output,
    target: options.Target = None,
    precision: Precision = None,
    calibration: Calibration = None,
    preprocess: Preprocess = None,
    samples: SampleCount = None,
    budget: BudgetText = None,
    sparsity: Sparsity = None,
    distill: Distill = None,
    sparse: Sparse = "auto",
    force: Force = False,
    autotune: Autotune = False,
    recipe: Recipe = None,
    extra: Passes = None,
    disable: Disable = None,
    verify: Verify = None,
    inputs: options.Inputs = None,
    gate: options.Gates = None,
    metric: options.Metric = None,
    seed: Seed = None,
    fold_limit: FoldLimit = None,
    external: External = "auto",
    remarks: Remarks = False,
    strict: Strict = False,
    profile: Profiles = None,
    extras: Extras = None,
    set_dim: specializing.SetDim = None,
    bind: specializing.Bind = None,
    outputs: specializing.Outputs = None,
    io_dtype: specializing.IoDtype = None,
    io_layout: specializing.IoLayout = None,
    image: specializing.ImageInput = None,
    rename: specializing.Rename = None,
    explain: Explain = None,
    report: Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Make MODEL smaller and faster, and prove that the result computes the same.

    The result is compared with the original before it is written; a rewrite that changes the numbers is found, left
    out and named. Nothing else than OUT is written, and an existing OUT stays as it is when something fails.
    """
    limit = None if fold_limit is None else parse_bytes(fold_limit)
    one_of("place for weights", external, EXTERNAL)
    check_report_path(report)
    from graphopt.driver import optimize
    from graphopt.emit.profiles import parse_profile
    from graphopt.errors import OptionError
    from graphopt.rewrite import Calibration as Samples
    from graphopt.specialize.wanted import from_texts

    ranges = {
        name: (sizes.least, sizes.usual, sizes.most)
        for name, sizes in map(parse_profile, profile or ())
    }
    if calibration is None and (preprocess is not None or samples is not None):
        raise OptionError("--preprocess and --samples say how to read --calibration: give that too")
    given = None if calibration is None else Samples(calibration, preprocess, samples)
    special = from_texts(
        dims=set_dim or (),
        bind=bind or (),
        outputs=outputs or (),
        dtypes=io_dtype or (),
        layouts=io_layout or (),
        images=image or (),
        rename=rename or (),
    )
    with progress(quiet=quiet or as_json) as say:
        result = optimize(
            model,
            output=output,
            target=target,
            precision=precision,
            calibration=given,
            budget=budget,
            sparsity=sparsity,
            distill=distill,
            sparse=sparse,
            force=force,
            autotune=autotune,
            recipe=recipe,
            passes=tuple(extra or ()),
            disable=tuple(disable or ()),
            verify=verify,
            inputs=inputs,
            gates=gates_of(gate),
            metric=metric,
            seed=seed,
            fold_limit_bytes=limit,
            external=external,
            remarks=remarks,
            stages=report is not None,
            strict=strict,
            profiles=ranges,
            extras=tuple(extras or ()),
            specialize=special,
            progress=say,
        )
    tell(
        result.report,
        report=report,
        inputs=inputs,
        as_json=as_json,
        quiet=quiet,
        every_remark=remarks,
        explained=explanations(result, explain or ()),
    )
    return 1 if result.report.verification.passed is False else 0


def gates_of(texts: list[str] | None) -> dict[str, str]:
    """Limits by output, still as text.

    Raises:
        OptionError: a text has no `=`.
    """
    from graphopt.verify.criteria import parse_gates

    parse_gates(texts or ())
    return {name: limit for name, _, limit in (text.partition("=") for text in texts or ())}


def tell(
    report_facts: RunReport,
    *,
    report: Path | None,
    inputs: Path | None,
    as_json: bool,
    quiet: bool,
    every_remark: bool,
    explained: Sequence[Explanation] = (),
) -> None:
    """Writes the report where it was asked for."""
    if report is not None:
        write_report(report_facts, report, inputs)
    if as_json:
        from graphopt.cli.console import show_json

        facts = report_facts.to_json()
        if explained:
            facts["explained"] = {each.node: list(each.sentences) for each in explained}
        show_json(facts)
    elif not quiet:
        from graphopt.cli.console import show
        from graphopt.cli.run_tables import run_tables

        show(*run_tables(report_facts, every_remark=every_remark), *explanation_lines(explained))


def explanations(result: Result, patterns: Sequence[str]) -> list[Explanation]:
    """What the run says about the nodes that were asked for."""
    if not patterns:
        return []
    from graphopt.report.explain import explain

    return [e for pattern in patterns for e in explain(result.report, result.model, pattern)]


def explanation_lines(explained: Sequence[Explanation]) -> list[Text]:
    """The same, to be printed."""
    from graphopt.cli.console import line

    return [
        line((f"\n{each.node}", "bold"), "".join(f"\n  {sentence}" for sentence in each.sentences))
        for each in explained
    ]


def parse_bytes(text: str) -> int:
    """A number of bytes: `65536`, `64k`, `16M`, `1G` (powers of 1024).

    Raises:
        OptionError: the text is none.
    """
    from graphopt.errors import OptionError

    digits, unit = text.strip().rstrip("iB"), 1
    for suffix, factor in {"k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.items():
        if digits.endswith(suffix):
            digits, unit = digits.removesuffix(suffix), factor
            break
    if not digits.isascii() or not digits.isdigit():
        raise OptionError(
            f"--fold-limit {text!r} is not a size: give bytes, as in 65536, 64k or 16M"
        )
    return int(digits) * unit


def check_report_path(path: Path | None) -> None:
    """Refuses, before any work, a report that could not be written.

    Raises:
        OptionError: with the remedy.
    """
    if path is None:
        return
    from graphopt.errors import OptionError

    if path.suffix not in REPORT_SUFFIXES:
        raise OptionError(
            f"--report {path}: the suffix says the format, and {path.suffix or 'none'} is not one of "
            f"{', '.join(REPORT_SUFFIXES)}"
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"{path.parent} is not a folder"
        raise OptionError(f"cannot write --report {path}: {what}; give the path of a file")


def write_report(facts: RunReport, path: Path, inputs: Path | None = None) -> None:
    """Writes the report as JSON, HTML or Markdown, by suffix; for HTML both models are measured on `inputs`."""
    from graphopt.ir.atomic import write_file

    if path.suffix == ".json":
        body = json.dumps(facts.to_json(), indent=2, allow_nan=False) + "\n"
    elif path.suffix == ".html":
        body = _page(facts, inputs)
    else:
        from graphopt.report.markdown import run_markdown

        body = run_markdown(facts)
    write_file(path, body.encode())


def _page(facts: RunReport, inputs: Path | None) -> str:
    from graphopt.cli.verify import given_feeds
    from graphopt.report.examine import examine
    from graphopt.report.html import run_html

    if facts.input.path is None or facts.output.path is None:
        return run_html(facts)
    original, result = Path(facts.input.path), Path(facts.output.path)
    if original.suffix != ".onnx" or facts.specialized:
        return run_html(facts)  # ONNX Runtime reads protobufs only; other inputs cannot be compared
    feeds = None if inputs is None else given_feeds(inputs, original)
    return run_html(facts, examine(original, result, feeds, target=facts.target))
