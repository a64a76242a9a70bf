"""`graphopt diff`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.progress import progress

if TYPE_CHECKING:
    from rich.console import RenderableType


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="The model before.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The model after.")],
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=0, help="Lines of each part; 0 for all.")
    ] = 12,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Show what changed from A to B, by structure: names of nodes and inner values do not matter.

    The exit status is 0 if they are the same model and 1 if they differ, as with diff(1).
    """
    from graphopt.cli.console import show, show_json
    from graphopt.ir.model_file import load_model
    from graphopt.report.diff import diff_json, diff_models
    from graphopt.report.outline import diff_outline

    with progress(quiet=quiet or as_json) as say:
        say("reading", None)
        before, after = load_model(a), load_model(b)
        say("matching", None)
        found = diff_models(before, after)
    if as_json:
        show_json(diff_json(found))
    elif markdown:
        sys.stdout.write(_markdown(diff_outline(found, top or None)))
    elif not quiet:
        show(_tree(f"{a} → {b}", diff_outline(found, top or None)))
    return 0 if found.equal else 1


def _tree(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> RenderableType:
    from rich.tree import Tree

    from graphopt.cli.console import text

    tree: Any = Tree(text(title, "bold"), guide_style="dim")
    for heading, lines in sections:
        branch = tree.add(text(heading))
        for line in lines:
            branch.add(text(line))
    return tree  # type: ignore[no-any-return]


def _markdown(sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    parts: list[str] = []
    for heading, lines in sections:
        parts.append(f"- {heading}")
        parts += [f"  - {line}" for line in lines]
    return "\n".join(parts) + "\n"
