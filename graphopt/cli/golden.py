"""`graphopt golden record|check|update`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from graphopt.cli import options
from graphopt.cli.progress import progress
from graphopt.errors import DataError, OptionError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.verify.golden import CaseReport, ErrorChange, GoldenReport

app = typer.Typer(rich_markup_mode=None)

Folder: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIR", help="A case, or a folder that holds cases.")
]


@app.callback()
def group() -> None:
    """Golden cases: models with inputs, outputs and the structure that optimising must give, for version control."""


@app.command("record")
def record_command(
    model: options.Model,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new case.")],
    inputs: options.Inputs = None,
    seed: options.Seed = 0,
    target: options.Target = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="Recipe in TOML; the case keeps its text."),
    ] = None,
    link: Annotated[
        bool,
        typer.Option("--link", help="Leave MODEL where it is: several cases can share one."),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Record a case: optimise MODEL, verify the result, and write inputs, outputs and structure to DIR."""
    text = recipe_text(target, recipe)
    from graphopt.cli.verify import given_feeds
    from graphopt.driver.golden import golden_optimizer
    from graphopt.verify.golden import GoldenReport, record

    with progress(quiet=quiet or as_json) as say:
        feeds = None if inputs is None else given_feeds(inputs, model)
        case = record(
            folder,
            model,
            golden_optimizer(say),
            feeds=feeds,
            recipe=text,
            seed=seed,
            ci=in_ci(),
            link=link,
        )
    return _tell(GoldenReport((case,)), as_json=as_json, quiet=quiet)


@app.command("check")
def check_command(
    folder: Folder, as_json: options.Json = False, quiet: options.Quiet = False
) -> int:
    """Optimise the model of each case again; the exit status is 1 if numbers, operators or structure changed."""
    from graphopt.driver.golden import golden_optimizer
    from graphopt.verify.golden import check

    _require_folder(folder)
    with progress(quiet=quiet or as_json) as say:
        found = check(folder, golden_optimizer(say))
    return _tell(found, as_json=as_json, quiet=quiet)


@app.command("update")
def update_command(
    folder: Folder,
    accept: Annotated[
        bool,
        typer.Option("--accept", help="Write although an error grew; remove files of no case."),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Record each case again on its own inputs, and show old and new errors."""
    from graphopt.driver.golden import golden_optimizer
    from graphopt.verify.golden import update

    _require_folder(folder)
    with progress(quiet=quiet or as_json) as say:
        found = update(folder, golden_optimizer(say), accept=accept, ci=in_ci())
    return _tell(found, as_json=as_json, quiet=quiet)


def in_ci() -> bool:
    """Whether this is a run of continuous integration, which must not write what nobody will review.

    CI is what every provider sets.
    """
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


def recipe_text(target: str | None, recipe: Path | None) -> str:
    """The recipe that a case keeps, in TOML.

    Raises:
        OptionError: both a target and a recipe are given, there is no such target, or the file is no recipe.
    """
    if recipe is not None and target is not None:
        raise OptionError(
            "--target and --recipe exclude one another here: put `target = …` into the recipe"
        )
    if target is not None:
        from graphopt.targets import get_target

        return f'target = "{get_target(target).name}"\n'
    if recipe is None:
        return ""
    from graphopt.driver.golden import read_recipe

    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the recipe {recipe} cannot be read: {error}") from error
    read_recipe(text, str(recipe))  # refuses it now, not when the case is checked
    return text


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give a golden case, or a folder of them")


def _tell(found: GoldenReport, *, as_json: bool, quiet: bool) -> int:
    from graphopt.cli.console import show, show_json
    from graphopt.report.plain import graphopt_version, plain

    if as_json:
        body = plain(found)
        for case, held in zip(body["cases"], found.cases, strict=True):
            case["passed"] = held.passed
        show_json({"graphopt": graphopt_version(), "passed": found.passed, **body})
    elif not quiet:
        show(*_parts(found))
    return 0 if found.passed else 1


def _parts(found: GoldenReport) -> list[RenderableType]:
    from graphopt.cli.console import grid, text

    table = grid("case", "", "error", "recorded", right="23")
    for case in found.cases:
        worst = _worst(case)
        state = "failed" if case.failures else "written" if case.written else "ok"
        style = "red" if case.failures else "green"
        now, then = (None, None) if worst is None else (worst.now, worst.recorded)
        table.add_row(text(case.name), text(state, style), _number(now), _number(then))
    parts: list[RenderableType] = [table]
    for case in found.cases:
        parts += [text(f"{case.name}: {line}", "red") for line in case.failures]
        parts += [text(f"{case.name}: note: {line}", "yellow") for line in case.notes]
    parts += [text(f"no case mentions {path}", "yellow") for path in found.orphans]
    return parts


def _worst(case: CaseReport) -> ErrorChange | None:
    known: Sequence[ErrorChange] = [each for each in case.errors if each.now is not None]
    return max(known, key=lambda each: each.now or 0.0, default=None)


def _number(number: float | None) -> str:
    from graphopt.cli.console import NONE

    return NONE if number is None else "0" if number == 0 else f"{number:.1e}"
