"""`graphopt optimize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.cli import optimizing, options, specializing
from graphopt.cli.choice import one_of
from graphopt.cli.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from graphopt.driver.result import Result
    from graphopt.report.explain import Explanation
    from graphopt.report.run import RunReport
    from graphopt.rewrite import Calibration

REPORT_SUFFIXES = (".html", ".json", ".md")


def command(
    model: options.Model,
    output: optimizing.Output,
    target: options.Target = None,
    precision: optimizing.Precision = None,
    calibration: optimizing.Calibration = None,
    preprocess: optimizing.Preprocess = None,
    samples: optimizing.SampleCount = None,
    budget: optimizing.BudgetText = None,
    sparsity: optimizing.Sparsity = None,
    distill: optimizing.Distill = None,
    plan: optimizing.Plan = None,
    save_plan: optimizing.SavePlan = None,
    sparse: optimizing.Sparse = "auto",
    force: optimizing.Force = False,
    autotune: optimizing.Autotune = False,
    recipe: optimizing.Recipe = None,
    extra: optimizing.Passes = None,
    disable: optimizing.Disable = None,
    freeze_defaults: optimizing.FreezeDefaults = False,
    verify: optimizing.Verify = None,
    inputs: options.Inputs = None,
    gate: options.Gates = None,
    metric: options.Metric = None,
    seed: optimizing.Seed = None,
    cache: options.Cache = False,
    fold_limit: optimizing.FoldLimit = None,
    external: optimizing.External = "auto",
    remarks: optimizing.Remarks = False,
    strict: optimizing.Strict = False,
    profile: optimizing.Profiles = None,
    extras: optimizing.Extras = None,
    set_dim: specializing.SetDim = None,
    bind: specializing.Bind = None,
    outputs: specializing.Outputs = None,
    io_dtype: specializing.IoDtype = None,
    io_layout: specializing.IoLayout = None,
    image: specializing.ImageInput = None,
    rename: specializing.Rename = None,
    explain: optimizing.Explain = None,
    report: optimizing.Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Make MODEL smaller and faster, and prove that the result computes the same.

    The result is compared with the original before it is written; a rewrite that changes the numbers is found, left
    out and named. Nothing else than OUT is written, unless --cache, --autotune or --report ask for it, and an existing
    OUT stays as it is when something fails.
    """
    limit = None if fold_limit is None else parse_bytes(fold_limit)
    one_of("place for weights", external, optimizing.EXTERNAL)
    check_report_path(report)
    from graphopt.driver import optimize
    from graphopt.specialize.wanted import from_texts

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
            calibration=samples_of(calibration, preprocess, samples),
            budget=budget,
            sparsity=sparsity,
            distill=distill,
            plan=plan,
            save_plan=save_plan,
            sparse=sparse,
            force=force,
            autotune=autotune,
            recipe=recipe,
            passes=tuple(extra or ()),
            disable=tuple(disable or ()),
            freeze_defaults=freeze_defaults,
            verify=verify,
            inputs=inputs,
            gates=gates_of(gate),
            metric=metric,
            seed=seed,
            cache=cache,
            fold_limit_bytes=limit,
            external=external,
            remarks=remarks,
            stages=report is not None,
            strict=strict,
            profiles=ranges_of(profile),
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


def samples_of(
    calibration: Path | None, preprocess: Path | None, samples: int | None
) -> Calibration | None:
    """Where the samples are, and how to read them.

    Raises:
        OptionError: it is said how, and not where.
    """
    from graphopt.errors import OptionError
    from graphopt.rewrite import Calibration

    if calibration is not None:
        return Calibration(calibration, preprocess, samples)
    if preprocess is not None or samples is not None:
        raise OptionError("--preprocess and --samples say how to read --calibration: give that too")
    return None


def ranges_of(profiles: list[str] | None) -> dict[str, tuple[int, int, int]]:
    """The least, usual and largest size by dimension.

    Raises:
        OptionError: a text is no profile.
    """
    from graphopt.emit.profiles import parse_profile

    return {
        name: (sizes.least, sizes.usual, sizes.most)
        for name, sizes in map(parse_profile, profiles or ())
    }


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
