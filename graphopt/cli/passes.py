"""`graphopt passes`."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import completion, options
from graphopt.cli.choice import one_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.pipeline.registry import PassInfo
    from graphopt.rewrite import Rule


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A pass.", autocompletion=completion.pass_names),
    ] = None,
    as_json: options.Json = False,
) -> int:
    """List the passes there are, or show what one of them does: before and after, its options, its rules."""
    from graphopt.cli.console import show, show_json
    from graphopt.pipeline.registry import all_passes
    from graphopt.report.plain import graphopt_version

    known = all_passes()
    if name is not None:
        one_of("pass", name, known)
    chosen = list(known.values()) if name is None else [known[name]]
    if as_json:
        show_json({"graphopt": graphopt_version(), "passes": [_plain(each) for each in chosen]})
    elif name is None:
        show(_list(chosen))
    else:
        show(*_details(chosen[0]))
    return 0


def documentation(info: PassInfo) -> str:
    """What a pass says of itself; one that is made of rules has the words of the modules that its rules are in."""
    rules = _rules(info)
    if not rules:
        return info.doc
    modules = dict.fromkeys(rule.build.__module__ for rule in rules)
    docs = [inspect.getdoc(sys.modules[name]) for name in modules if name in sys.modules]
    return "\n\n".join(doc for doc in docs if doc) or info.doc


def reflow(doc: str) -> str:
    """Joins the lines of each sentence, so that they break where the terminal ends; pictures stay as they are."""
    lines: list[str] = []
    is_open = False
    for line in doc.splitlines():
        is_picture = line[:1].isspace() or line.startswith(("Before:", "After:"))
        if is_open and line and not is_picture:
            lines[-1] += f" {line}"
        else:
            lines.append(line)
        is_open = bool(line) and not is_picture
    return "\n".join(lines)


def _rules(info: PassInfo) -> tuple[Rule, ...]:
    rules = getattr(info.maker, "rules", ())
    return tuple(rules) if isinstance(rules, tuple) else ()


def _list(known: list[PassInfo]) -> RenderableType:
    from graphopt.cli.console import grid, text

    table = grid("pass", "numerics", "what it does", fixed="01")
    for each in known:
        summary = documentation(each).partition("\n\n")[0]
        table.add_row(
            text(each.name, "bold"), each.numerics.name.lower(), text(" ".join(summary.split()))
        )
    return table


def _details(info: PassInfo) -> list[RenderableType]:
    from graphopt.cli.console import facts, grid, text

    about = {"pass": info.name, "numerics": info.numerics.name.lower(), "from": info.source}
    if info.options:
        about["options"] = "\n".join(map(str, info.options))
    parts: list[RenderableType] = [facts(about), text(""), text(reflow(documentation(info)))]
    rules = _rules(info)
    if rules:
        table = grid("rule", "numerics", "rewrite", fixed="1")
        for rule in rules:
            table.add_row(
                text(rule.name, "bold"), rule.numerics.name.lower(), text(_one_line(rule.doc))
            )
        parts += [text(""), table]
    return parts


def _one_line(doc: str) -> str:
    return " ".join(doc.partition("\n\n")[0].split())


def _plain(info: PassInfo) -> dict[str, Any]:
    from graphopt.pipeline.options import plain

    return {
        "name": info.name,
        "numerics": info.numerics.name.lower(),
        "source": info.source,
        "doc": documentation(info),
        "options": [
            {"name": each.name, "type": each.expected, "default": plain(each.default)}
            for each in info.options
        ],
        "rules": [
            {"name": rule.name, "numerics": rule.numerics.name.lower(), "doc": _one_line(rule.doc)}
            for rule in _rules(info)
        ],
    }
