"""`graphopt passes`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli import completion, options


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A pass.", autocompletion=completion.pass_names),
    ] = None,
    as_json: options.Json = False,
) -> int:
    """List the passes there are, or show what one of them does, its options and its rules."""
    raise NotImplementedError
