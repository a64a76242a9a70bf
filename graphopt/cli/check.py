"""`graphopt check`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from graphopt.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.emit.findings import Finding, Legality

REFUSED = 3
MAX_SHOWN = 20
_STYLES = {"refused": "red", "falls-back": "yellow", "warning": "yellow", "ok": "green"}

Fix: TypeAlias = Annotated[
    bool,
    typer.Option("--fix", help="Run the passes that mend what they can, and check the result."),
]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="With --fix: write the mended model."),
]
Budget: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="EXPR",
        help="With --fix: error that a lossy pass may make: sqnr>=20. [default: none; int8's where bytes change]",
    ),
]
Every: TypeAlias = Annotated[
    bool, typer.Option("--all", help="List every node, not only what is not plainly fine.")
]


def command(
    model: options.Model,
    target: options.Target = None,
    fix: Fix = False,
    output: Output = None,
    inputs: options.Inputs = None,
    budget: Budget = None,
    every: Every = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Say whether a runtime will take MODEL: node by node, with the reason and the remedy, without the hardware.

    The exit status is 0 if it does, falls back to slower kernels included, and 3 if it refuses.
    """
    from graphopt.cli.console import show, show_json
    from graphopt.emit.legality import check_legality
    from graphopt.errors import OptionError
    from graphopt.ir.model_file import load_model
    from graphopt.report.plain import graphopt_version, plain
    from graphopt.targets import get_target

    if output is not None and not fix:
        raise OptionError(
            f"-o {output} goes with --fix: without it, nothing is changed that could be written"
        )
    chosen = get_target(target or "cpu")
    before = check_legality(load_model(model), chosen)
    after, applied = before, tuple[str, ...]()
    if fix:
        from graphopt.driver.mend import mend

        after, applied = mend(model, chosen, before, output, inputs=inputs, budget=budget)
    if as_json:
        body = {"graphopt": graphopt_version(), "model": str(model), "verdict": after.verdict.value}
        show_json({**body, "fixed": list(applied), **plain(_facts(after))})
    elif not quiet:
        show(*_parts(model, after, applied, every=every))
    return REFUSED if after.refused else 0


def _facts(found: Legality) -> dict[str, Any]:
    return {
        "target": found.target,
        "checked_against": found.checked_against,
        "placement": found.placement(),
        "copies": {"to_host": found.copies.to_host, "to_device": found.copies.to_device},
        "findings": found.findings,
        "nodes": found.nodes,
    }


def _parts(
    model: Path, found: Legality, applied: Sequence[str], *, every: bool
) -> list[RenderableType]:
    from graphopt.cli.console import count, grid, line, text

    verdict = found.verdict.value
    parts: list[RenderableType] = [
        line((f"{model} on {found.target}: ", "bold"), (_words(verdict), _STYLES[verdict]))
    ]
    if applied:
        parts.append(text(f"after {', '.join(applied)}"))
    parts += [text(f"checked against {source}", "dim") for source in found.checked_against]
    placed = found.placement()
    if placed:
        where = ", ".join(f"{count(n)} nodes {provider}" for provider, n in placed.items())
        parts.append(text(where))
    if found.copies.count:
        moved = found.copies
        parts.append(
            text(
                f"predicted copies in each run: {len(moved.to_host)} to the host, "
                f"{len(moved.to_device)} to the device",
                "yellow",
            )
        )
    parts += _findings(found.findings)
    if every:
        table = grid("node", "operator", "graph", "verdict", "runs on")
        for each in found.nodes:
            cells = (each.node, each.op, each.graph, each.verdict.value, each.provider)
            table.add_row(*(text(cell) for cell in cells))
        parts += [text(""), table]
    if found.fixes:
        parts.append(text(f"--fix runs: {', '.join(found.fixes)}", "dim"))
    return parts


def _findings(findings: Sequence[Finding]) -> list[RenderableType]:
    """One entry for each reason, the worst first, with the nodes that share it; numbers and names do not tell apart."""
    from graphopt.cli.console import line, text
    from graphopt.emit.findings import Verdict

    grouped: dict[tuple[str, str], list[Finding]] = {}
    for each in findings:
        alike = re.sub(r"'[^']*'|\d+(\.\d+)?", "", each.reason)
        grouped.setdefault((each.verdict.value, alike), []).append(each)
    order = [verdict.value for verdict in Verdict]
    ranked = sorted(grouped.items(), key=lambda item: -order.index(item[0][0]))
    parts: list[RenderableType] = []
    for (verdict, _), members in ranked[:MAX_SHOWN]:
        first = members[0]
        parts += [text(""), line((f"{verdict}: ", _STYLES[verdict]), first.reason)]
        if first.node:
            names = ", ".join(f"{each.node} ({each.graph})" for each in members[:3])
            more = f" and {len(members) - 3} more" if len(members) > 3 else ""
            parts.append(text(f"  at {names}{more}"))
        runs = f", runs on {first.provider}" if first.provider else ""
        parts.append(text(f"  rule: {first.source}{runs}", "dim"))
        if first.remedy:
            mends = f" (--fix: {first.fix})" if first.fix else ""
            parts.append(text(f"  remedy: {first.remedy}{mends}"))
    if len(ranked) > MAX_SHOWN:
        parts.append(
            text(f"and {len(ranked) - MAX_SHOWN} more reasons; --json has them all", "dim")
        )
    return parts


def _words(verdict: str) -> str:
    return {
        "ok": "is taken",
        "warning": "is taken, with warnings",
        "falls-back": "is taken; some nodes fall back",
        "refused": "is refused",
    }[verdict]
