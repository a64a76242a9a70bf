"""Where things are printed: results on stdout, progress on stderr; rich is imported when something is shown."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphopt.cli.failure import escape

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text


NONE = "\N{EN DASH}"
"""What a cell without content shows."""


def stdout() -> Console:
    """A console on stdout; markup and highlighting are off, because names in models hold brackets and anything else."""
    from rich.console import Console

    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """The same on stderr."""
    from rich.console import Console

    return Console(file=sys.stderr, markup=False, highlight=False, emoji=False)


def show(*parts: RenderableType) -> None:
    """Prints each part on stdout."""
    console = stdout()
    for part in parts:
        console.print(part)


def show_json(body: Any) -> None:  # noqa: ANN401
    """Prints one JSON object on stdout."""
    sys.stdout.write(json.dumps(body, indent=2, allow_nan=False) + "\n")


def grid(*headers: str, right: str = "", fixed: str = "") -> Table:
    """An empty table; `right` and `fixed` say by 0-based digits which columns are right-aligned, which never break."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
        collapse_padding=True,
    )
    for index, header in enumerate(headers):
        digit = str(index)
        table.add_column(
            header,
            justify="right" if digit in right else "left",
            no_wrap=digit in right + fixed,
            overflow="fold",
        )
    return table


def text(content: object, style: str = "") -> Text:
    """Styled text; what cannot be printed is escaped."""
    from rich.text import Text

    return Text(escape(str(content)), style=style)


def line(*parts: str | tuple[str, str]) -> Text:
    """One text out of several, each plain or with a style."""
    from rich.text import Text

    styled = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((escape(content), style) for content, style in styled))


def count(number: int | None) -> str:
    """`12 345 678`; a dash for None."""
    return NONE if number is None else f"{number:,}".replace(",", "\N{THIN SPACE}")


def scaled(number: int | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: `1.23 M`."""
    if number is None:
        return NONE
    size, steps = float(number), iter(("", "k", "M", "G", "T", "P"))
    prefix = next(steps)
    while abs(size) >= 999.5 and prefix != "P":
        size, prefix = size / 1000, next(steps)
    digits = f"{size:.0f}" if not prefix or size >= 99.95 else f"{size:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()


def size(number: int | None) -> str:
    """Bytes with a decimal prefix: `4.32 MB`."""
    return scaled(number, "B")


def change(before: float, after: float) -> str:
    """`-59 %`, `+3.1 %`, `-0.02 %`, `=`."""
    if before == after:
        return "="
    if not before:
        return "new"
    percent = (after - before) / before * 100
    sign = "\N{MINUS SIGN}" if percent < 0 else "+"
    digits = 0 if abs(percent) >= 9.95 else 1 if abs(percent) >= 0.095 else 2
    return f"{sign}{abs(percent):.{digits}f} %"


def facts(rows: Mapping[str, object]) -> Table:
    """Names and what they are, without lines."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(text(name, "dim"), text(value))
    return table
