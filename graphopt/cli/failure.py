"""What the command line says and returns when something fails."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import tempfile
import textwrap
import traceback

import typer

from graphopt.errors import GraphoptError

USAGE = 2
BUG = 70
INTERRUPTED = 130
BROKEN_PIPE = 141


class Terminated(BaseException):
    """The process was asked to end; not an Exception, so that no handler on the way takes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclasses.dataclass(frozen=True)
class Failure:
    """One failure, as people and machines are told.

    Attributes:
        kind: model, data, option, target, verify, pass, usage, system, interrupted or bug.
        message: one paragraph.
        exit_status: what `main` returns.
    """

    kind: str
    message: str
    exit_status: int


def tell(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Says what failed on stderr, and on stdout as JSON if asked; returns the exit status."""
    failure = describe(error)
    if debug:
        traceback.print_exception(error)
    elif failure.kind == "bug":
        failure = dataclasses.replace(
            failure, message=f"{failure.message} {_keep_traceback(error)}"
        )
    sys.stdout.flush()
    sys.stderr.write(paragraph(failure.message) + "\n")
    for note in getattr(error, "__notes__", ()):
        sys.stderr.write(f"{note}\n")
    if as_json:
        body = {"graphopt": own_version(), "error": dataclasses.asdict(failure)}
        sys.stdout.write(json.dumps(body, indent=2, allow_nan=False) + "\n")
    return failure.exit_status


def describe(error: BaseException) -> Failure:
    """The failure that an exception stands for."""
    if isinstance(error, GraphoptError):
        kind = type(error).__name__.removesuffix("Error").lower()
        return Failure(kind, str(error), error.exit_status)
    if isinstance(error, typer.TyperException):
        return Failure("usage", _usage(error), error.exit_code if error.exit_code > 1 else USAGE)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Failure("interrupted", "interrupted", INTERRUPTED)
    if isinstance(error, Terminated):
        return Failure("interrupted", "terminated", 128 + error.signum)
    if isinstance(error, OSError) and error.strerror:
        where = f" '{error.filename}'" if error.filename else ""
        return Failure("system", f"the system refused{where}: {error.strerror}", USAGE)
    if isinstance(error, MemoryError):
        return Failure("system", "the machine has too little free memory for this model", BUG)
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Failure("bug", f"this is a bug of graphopt, please report it: {told}.", BUG)


def paragraph(message: str) -> str:
    """`graphopt: error: …`, wrapped to the terminal; what cannot be printed is escaped."""
    width = max(40, min(shutil.get_terminal_size(fallback=(100, 24)).columns, 120))
    text = " ".join(escape(message).split())
    return textwrap.fill(
        f"graphopt: error: {text}", width, break_long_words=False, break_on_hyphens=False
    )


def escape(text: str) -> str:
    """The text with what cannot be printed written as escapes: names come from files of any origin."""
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def own_version() -> str:
    """The version of the installed package."""
    from importlib.metadata import version

    return version("graphopt")


def _usage(error: typer.TyperException) -> str:
    """What a mistake on the command line was, with the nearest thing there is."""
    message = error.format_message().rstrip(".")
    near = getattr(error, "possibilities", None)
    if near:
        message = re.sub(r" \(Possible options: .*\)$", "", message)
        message += f". Did you mean {near[0]}?"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "graphopt"
    return f"{message}{'' if message.endswith('?') else '.'} Try '{command} --help'."


def _keep_traceback(error: BaseException) -> str:
    """Writes the traceback to a file of its own; says where."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="graphopt-traceback-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"graphopt {own_version()}, Python {sys.version}\n\n{text}")
    except OSError:
        return "Run again with --debug to see the traceback."
    return f"The traceback is in {file.name}; --debug shows it."
