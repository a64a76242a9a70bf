"""`graphopt bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from graphopt.cli import optimizing, options
from graphopt.cli.progress import progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.report.run import RunReport

Repro: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder for the reproduction of the first fault. [default: repro]",
    ),
]


def command(
    model: options.Model,
    output: Repro = None,
    target: options.Target = None,
    precision: optimizing.Precision = None,
    recipe: optimizing.Recipe = None,
    extra: optimizing.Passes = None,
    disable: optimizing.Disable = None,
    freeze_defaults: optimizing.FreezeDefaults = False,
    inputs: options.Inputs = None,
    seed: options.Seed = 0,
    cache: options.Cache = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Find the rewrites that make the optimised MODEL compute something else; the exit status is 1 if there are any.

    The first one is reproduced in DIR: the part of the model that shows it, before and after, with inputs.
    """
    folder = output or Path("repro")
    from graphopt.driver import optimize

    with progress(quiet=quiet or as_json) as say:
        report = optimize(
            model,
            target=target,
            precision=precision,
            recipe=recipe,
            passes=tuple(extra or ()),
            disable=tuple(disable or ()),
            freeze_defaults=freeze_defaults,
            inputs=inputs,
            seed=seed,
            cache=cache,
            repro=folder,
            progress=say,
        ).report
    written = (folder / "before.onnx").is_file() and bool(report.rolled_back)
    repro = folder if written else None
    if as_json:
        from graphopt.cli.console import show_json

        show_json(_plain(model, report, repro))
    elif not quiet:
        from graphopt.cli.console import show

        show(*_parts(report, repro))
    return 1 if report.rolled_back or report.verification.passed is False else 0


def _plain(model: Path, report: RunReport, folder: Path | None) -> dict[str, Any]:
    from graphopt.report.plain import graphopt_version, plain

    return {
        "graphopt": graphopt_version(),
        "model": str(model),
        "verified": report.verification.passed,
        "guilty": plain(report.rolled_back),
        "repro": None if folder is None else str(folder),
    }


def _parts(report: RunReport, folder: Path | None) -> list[RenderableType]:
    from graphopt.cli.console import grid, line, text

    if not report.rolled_back:
        said = "nothing to find" if report.verification.passed else "nothing could be compared"
        return [line((said, "bold"), f"  {report.verification.reason}")]
    table = grid("pass", "rule", "at", "why")
    for each in report.rolled_back:
        table.add_row(text(each.pass_name, "red"), text(each.rule), text(each.site), each.reason)
    parts: list[RenderableType] = [table]
    if folder is not None:
        parts.append(text(f"reproduction in {folder}; see {folder / 'README.md'}"))
    rest = {True: "verified", False: "still wrong", None: "not verified"}
    parts.append(text(f"without them the result is {rest[report.verification.passed]}"))
    return parts
