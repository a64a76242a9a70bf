"""The application: its commands, and `main`, which turns whatever happens into an exit status."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from graphopt.cli import (
    bench,
    bisect,
    check,
    densify,
    diff,
    distill,
    failure,
    golden,
    inspect,
    optimize,
    passes,
    targets,
    verify,
)

# Markup mode None: plain help costs half the start-up time of a boxed one, and can be searched with grep.
app = typer.Typer(
    name="graphopt",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit status: 0 done and verified; 1 verification failed, or the models differ; 2 the model, data or an "
    "option is at fault; 3 the target cannot express the model; 70 a bug of graphopt.",
)
for name, short_help, function in (
    ("optimize", "make a model smaller and faster, proven equal", optimize.command),
    ("inspect", "what is in a model", inspect.command),
    ("verify", "run two models on the same inputs and compare", verify.command),
    ("densify", "make sparse weights dense, for tools that cannot read them", densify.command),
    ("distill", "train a smaller model to compute what the original does", distill.command),
    ("diff", "what changed between two models, by structure", diff.command),
    ("bisect", "which rewrite makes the result wrong, with a minimal reproduction", bisect.command),
    ("bench", "latency of models, side by side", bench.command),
    ("check", "will a runtime take a model: node by node, with the reason", check.command),
    ("passes", "the passes there are, and what they do", passes.command),
    ("targets", "the runtimes to emit for", targets.command),
):
    app.command(name, short_help=short_help)(function)
app.add_typer(golden.app, name="golden", short_help="golden cases: record, check, update")


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error; may stand anywhere.")
    ] = False,
) -> None:
    """Makes the ONNX file to deploy out of the ONNX file that was exported, and proves them equal."""
    del version, debug  # `main` has dealt with both: they are declared for --help and completion.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status.

    Args:
        argv: the arguments without the program's name; those of the process by default.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _print_what_can_be_printed()
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        with _terminable():
            status = _run(args)
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return failure.BROKEN_PIPE
    except SystemExit as leave:
        if isinstance(
            leave.__context__, BrokenPipeError
        ):  # typer makes a 1 of it, which has a meaning here
            return failure.BROKEN_PIPE
        return int(leave.code) if isinstance(leave.code, int) else failure.BUG
    except (Exception, KeyboardInterrupt, failure.Terminated) as error:  # noqa: BLE001  the last stop
        return failure.tell(error, as_json="--json" in args, debug=debug)
    return status


def _run(args: list[str]) -> int:
    if args[:1] == ["--version"]:
        sys.stdout.write(f"graphopt {failure.own_version()}\n")
        return 0
    status = app(args=args or ["--help"], prog_name="graphopt", standalone_mode=False)
    if status == failure.INTERRUPTED:
        raise KeyboardInterrupt  # typer has made a status of it, without a word
    return status if isinstance(status, int) else 0


def _print_what_can_be_printed() -> None:
    """Lets a terminal that knows no UTF-8 show a question mark where it would otherwise end the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that working files are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        del frame
        raise failure.Terminated(signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _discard_stdout() -> None:
    """Sends what is still buffered for a closed pipe nowhere, so that the interpreter does not complain at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
