"""`graphopt bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from graphopt.cli import options
from graphopt.cli.choice import one_of
from graphopt.cli.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from graphopt.runtime.measure import Latency
    from graphopt.runtime.op_profile import OpProfile
    from graphopt.runtime.session import OptimizationLevel
    from graphopt.runtime.specs import TensorSpec
    from graphopt.verify.feeds import Feed
    from graphopt.verify.verifier import ReferenceRun

LEVELS = ("disabled", "basic", "extended", "all")
TOP = 12
_SUFFIX = "ExecutionProvider"

Models: TypeAlias = Annotated[
    list[Path], typer.Argument(metavar="MODEL…", help="Models with the same inputs and outputs.")
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
Providers: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="Execution provider to run on: cpu, cuda, tensorrt … Repeatable. [default: all that are here]",
    ),
]
Warmup: TypeAlias = Annotated[
    int, typer.Option("--warmup", metavar="N", min=1, help="Runs of each before any is timed.")
]
Memory: TypeAlias = Annotated[
    bool,
    typer.Option("--memory/--no-memory", help="Measure peak memory, in a process a model."),
]
ProfileOps: TypeAlias = Annotated[
    bool, typer.Option("--profile-ops", help="Show where the time goes: operators and nodes.")
]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one provider.

    Attributes:
        model: its path.
        provider: `cpu`, `cuda` …
        latency: what was measured.
        peak_bytes: memory that loading and running it takes at its peak; None where that was not measured.
        profile: where the time goes; None where that was not asked for.
    """

    model: Path
    provider: str
    latency: Latency
    peak_bytes: int | None = None
    profile: OpProfile | None = None


def command(
    models: Models,
    inputs: options.Inputs = None,
    seed: options.Seed = 0,
    dims: options.Dims = None,
    provider: Providers = None,
    seconds: Seconds = 5.0,
    warmup: Warmup = 3,
    threads: Threads = 1,
    level: Level = "all",
    memory: Memory = True,
    profile_ops: ProfileOps = False,
    as_json: options.Json = False,
) -> int:
    """Measure models side by side: one run of each in turn, on each provider, so that a busy machine is fair.

    The ratio is taken within each round, with the interval that holds its median in 95 of 100 cases; above 1 is faster
    than the first. Models with other inputs or outputs than the first one's are refused.
    """
    one_of("level", level, LEVELS)
    from graphopt.cli.console import show, show_json
    from graphopt.cli.inspect import parse_dims
    from graphopt.cli.verify import given_feeds, runnable
    from graphopt.runtime.session import OptimizationLevel
    from graphopt.verify.verifier import ReferenceRun

    sizes, chosen = parse_dims(dims or ()), OptimizationLevel[level.upper()]
    places = known_providers(provider)
    with progress(quiet=as_json) as say:
        say("loading", None)
        ready = [runnable(path) for path in models]
        feeds = None if inputs is None else given_feeds(inputs, models[0])
        feed = first_feed(ReferenceRun(ready[0], feeds, seed=seed, dims=sizes))
        pairs = [
            (path, model, place)
            for place in places
            for path, model in zip(models, ready, strict=True)
        ]
        say("measuring", None)
        rows = _timed(pairs, feed, chosen, threads, seconds=seconds, warmup=warmup)
        if memory:
            say("memory", None)
            rows = _with_memory(rows, pairs, feed, level, threads)
        if profile_ops:
            say("profiling", None)
            rows = _with_profile(rows, pairs, feed, chosen, threads)
    if as_json:
        about = {"feed": feed.name, "threads": threads, "level": level, "warmup": warmup}
        show_json(about | _plain(rows))
    else:
        show(*_parts(rows, feed, several=len(places) > 1))
    return 0


def known_providers(wanted: Sequence[str] | None) -> list[str]:
    """The execution providers to run on: those named, or all that the installed ONNX Runtime has for this machine.

    Raises:
        OptionError: one is not here.
    """
    from graphopt.errors import OptionError
    from graphopt.runtime.onnxruntime_api import runtime

    # The provider that asks a service elsewhere is no provider of this machine.
    here = [
        str(name)
        for name in runtime().get_available_providers()
        if name != "AzureExecutionProvider"
    ]
    found = []
    for name in wanted or [short(each) for each in reversed(here)]:
        full = next(
            (each for each in here if short(each) == name.lower().removesuffix(_SUFFIX.lower())),
            None,
        )
        if full is None:
            raise OptionError(
                f"--provider {name}: not in this onnxruntime; it has {', '.join(map(short, here))}"
            )
        found.append(full)
    return list(dict.fromkeys(found))


def short(provider: str) -> str:
    """`cpu` for CPUExecutionProvider."""
    return provider.removesuffix(_SUFFIX).lower()


def chain(provider: str) -> tuple[str, ...]:
    """The provider, and the CPU for what it lacks."""
    return tuple(dict.fromkeys((provider, f"CPU{_SUFFIX}")))


def check_alike(models: Sequence[Path], sessions: Sequence[Any]) -> None:
    """Refuses models that do not take and give what the first one does.

    Raises:
        DataError: naming the difference.
    """
    from graphopt.errors import DataError

    first = sessions[0]
    for path, other in zip(models, sessions, strict=False):
        for what, ours, theirs in (
            ("input", first.inputs, other.inputs),
            ("output", first.outputs, other.outputs),
        ):
            fault = _difference(ours, theirs)
            if fault:
                raise DataError(
                    f"{path} cannot be compared with {models[0]}: {what} {fault}. Bench them one by one, or give both "
                    "the same inputs and outputs (graphopt optimize --rename, --io-dtype, --outputs …)"
                )


def _difference(ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec]) -> str:
    """What a caller would notice: names, types, ranks, sizes that differ; "" for nothing."""
    known = {spec.name: spec for spec in theirs if not spec.overridable}
    wanted = {spec.name: spec for spec in ours if not spec.overridable}
    if known.keys() != wanted.keys():
        return f"names are {', '.join(known) or 'none'}, not {', '.join(wanted) or 'none'}"
    for name, spec in wanted.items():
        other = known[name]
        same = (
            spec.kind is other.kind and spec.dtype is other.dtype and _fit(spec.shape, other.shape)
        )
        if not same:
            return f"{name!r} is {other}, not {spec}"
    return ""


def _fit(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(
        x == y or not isinstance(x, int) or not isinstance(y, int)
        for x, y in zip(a, b, strict=True)
    )


def first_feed(reference: ReferenceRun) -> Feed:
    """The first inputs that the first model runs with.

    Raises:
        DataError: there are none.
    """
    from graphopt.errors import DataError

    if not reference.feeds:
        raise DataError(f"nothing to measure: {reference.unverifiable}")
    return reference.feeds[0]


def _timed(
    pairs: Sequence[tuple[Path, Any, str]],
    feed: Feed,
    level: OptimizationLevel,
    threads: int,
    *,
    seconds: float,
    warmup: int,
) -> list[Row]:
    """The latency of each model on each provider.

    Raises:
        DataError: they do not take and give the same.
    """
    from graphopt.runtime.measure import measure
    from graphopt.runtime.session import Session

    sessions = [
        Session(model, level=level, threads=threads, providers=chain(place))
        for _, model, place in pairs
    ]
    check_alike([path for path, _, _ in pairs], sessions)
    found = measure(sessions, [feed.values] * len(sessions), seconds=seconds, warmup=warmup)
    return [
        Row(path, short(place), each) for (path, _, place), each in zip(pairs, found, strict=True)
    ]


def _with_memory(
    rows: list[Row], pairs: Sequence[tuple[Path, Any, str]], feed: Feed, level: str, threads: int
) -> list[Row]:
    from graphopt.runtime.footprint import peak_bytes

    return [
        dataclasses.replace(
            row,
            peak_bytes=peak_bytes(
                model, feed.values, level=level.upper(), threads=threads, providers=chain(place)
            ),
        )
        for row, (_, model, place) in zip(rows, pairs, strict=True)
    ]


def _with_profile(
    rows: list[Row],
    pairs: Sequence[tuple[Path, Any, str]],
    feed: Feed,
    level: OptimizationLevel,
    threads: int,
) -> list[Row]:
    from graphopt.runtime.op_profile import profile_ops
    from graphopt.runtime.session import SessionOptions

    return [
        dataclasses.replace(
            row,
            profile=profile_ops(
                model,
                feed.values,
                level=level,
                options=SessionOptions(threads=threads, providers=chain(place)),
            ),
        )
        for row, (_, model, place) in zip(rows, pairs, strict=True)
    ]


def _parts(rows: Sequence[Row], feed: Feed, *, several: bool) -> list[RenderableType]:
    from graphopt.cli.console import text

    parts: list[RenderableType] = [
        text(f"inputs: {feed.name}", "dim"),
        _table(rows, several=several),
    ]
    for row in rows:
        if row.profile is not None:
            where = f"{row.model} on {row.provider}" if several else str(row.model)
            parts += [text(""), text(where, "bold"), *_profile(row.profile)]
    return parts


def _table(rows: Sequence[Row], *, several: bool) -> RenderableType:
    from graphopt.cli.console import grid, size, text

    heads = [
        "model",
        *(["on"] if several else []),
        "median",
        "spread",
        "CPU",
        "ratio",
        "95 %",
        "memory",
        "rounds",
    ]
    table = grid(*heads, right="".join(str(i) for i in range(2 if several else 1, len(heads))))
    for row in rows:
        each = row.latency
        table.add_row(
            text(str(row.model)),
            *([row.provider] if several else []),
            f"{each.wall_ms:.3f} ms",
            f"± {each.wall_spread_ms / 2:.3f}",
            f"{each.cpu_ms:.3f} ms",
            f"{each.ratio:.2f}\N{MULTIPLICATION SIGN}",
            f"{each.ratio_low:.2f}-{each.ratio_high:.2f}",
            "-" if row.peak_bytes is None else size(row.peak_bytes),
            str(each.rounds),
        )
    return table


def _profile(found: OpProfile) -> list[RenderableType]:
    from graphopt.cli.console import grid, text

    parts: list[RenderableType] = [text(f"{found.kernels_ms:.3f} ms in kernels of one run", "dim")]
    for head, spent in (("operator", found.operators), ("node", found.nodes)):
        table = grid(head, *(["operator"] if head == "node" else []), "ms", "share", "runs")
        for each in spent[:TOP]:
            first = [text(each.name), each.operator] if head == "node" else [text(each.operator)]
            table.add_row(*first, f"{each.ms:.3f}", f"{each.share:.1%}", f"{each.count:g}")
        parts += [table, text("")]
    return parts[:-1]


def _plain(rows: Sequence[Row]) -> dict[str, Any]:
    from graphopt.report.plain import graphopt_version, plain

    listed = [
        {
            "model": str(row.model),
            "provider": row.provider,
            **plain(row.latency),
            "peak_bytes": row.peak_bytes,
            **({} if row.profile is None else {"profile": plain(row.profile)}),
        }
        for row in rows
    ]
    return {"graphopt": graphopt_version(), "models": listed}
