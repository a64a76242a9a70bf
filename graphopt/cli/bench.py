"""`graphopt bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from graphopt.cli import options
from graphopt.cli.choice import one_of
from graphopt.cli.progress import progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.runtime.measure import Latency
    from graphopt.verify.feeds import Feed
    from graphopt.verify.verifier import ReferenceRun

LEVELS = ("disabled", "basic", "extended", "all")

Models: TypeAlias = Annotated[
    list[Path], typer.Argument(metavar="MODEL…", help="Models that take the same inputs.")
]
Seconds: TypeAlias = Annotated[
    float, typer.Option("--seconds", metavar="S", min=0.0, help="How long to measure, in all.")
]
Threads: TypeAlias = Annotated[
    int, typer.Option("--threads", metavar="N", min=1, help="Threads inside an operator.")
]
Level: TypeAlias = Annotated[
    str,
    typer.Option("--level", metavar="|".join(LEVELS), help="ONNX Runtime's own optimisations."),
]


def command(
    models: Models,
    inputs: options.Inputs = None,
    seed: options.Seed = 0,
    dims: options.Dims = None,
    seconds: Seconds = 5.0,
    threads: Threads = 1,
    level: Level = "all",
    as_json: options.Json = False,
) -> int:
    """Measure the latency of models side by side on the CPU: one run of each in turn, so that a busy machine is fair.

    The ratio is taken within each round; above 1 is faster than the first model.
    """
    one_of("level", level, LEVELS)
    from graphopt.cli.console import show, show_json
    from graphopt.cli.inspect import parse_dims
    from graphopt.cli.verify import given_feeds, runnable
    from graphopt.runtime.measure import measure
    from graphopt.runtime.session import OptimizationLevel, Session
    from graphopt.verify.verifier import ReferenceRun

    sizes, chosen = parse_dims(dims or ()), OptimizationLevel[level.upper()]
    with progress(quiet=as_json) as say:
        say("loading", None)
        ready = [runnable(path) for path in models]
        feeds = None if inputs is None else given_feeds(inputs, models[0])
        feed = first_feed(ReferenceRun(ready[0], feeds, seed=seed, dims=sizes))
        sessions = [Session(model, level=chosen, threads=threads) for model in ready]
        say("measuring", None)
        found = measure(sessions, [feed.values] * len(sessions), seconds=seconds)
    if as_json:
        about = {"feed": feed.name, "threads": threads, "level": level}
        show_json(about | _plain(models, found))
    else:
        show(_table(models, found))
    return 0


def first_feed(reference: ReferenceRun) -> Feed:
    """The first inputs that the first model runs with.

    Raises:
        DataError: there are none.
    """
    from graphopt.errors import DataError

    if not reference.feeds:
        raise DataError(f"nothing to measure: {reference.unverifiable}")
    return reference.feeds[0]


def _table(models: list[Path], found: list[Latency]) -> RenderableType:
    from graphopt.cli.console import grid, text

    table = grid("model", "median", "spread", "CPU", "ratio", "rounds", right="12345")
    for path, each in zip(models, found, strict=True):
        table.add_row(
            text(path),
            f"{each.wall_ms:.3f} ms",
            f"± {each.wall_spread_ms / 2:.3f}",
            f"{each.cpu_ms:.3f} ms",
            f"{each.ratio:.2f}\N{MULTIPLICATION SIGN}",
            str(each.rounds),
        )
    return table


def _plain(models: list[Path], found: list[Latency]) -> dict[str, Any]:
    from graphopt.report.plain import graphopt_version, plain

    rows = [{"model": str(path), **plain(each)} for path, each in zip(models, found, strict=True)]
    return {"graphopt": graphopt_version(), "models": rows}
