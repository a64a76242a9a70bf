"""How a comparison of two models is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from graphopt.report.run import VerificationFacts
    from graphopt.verify.compare import OutputReport
    from graphopt.verify.criteria import MetricReport


def verdict(passed: bool | None, profile: str, feeds: int, reason: str) -> Text:
    """One line: verified, differs, or unverified, and why."""
    from graphopt.cli.console import line

    on = f"{feeds} {'input' if feeds == 1 else 'inputs'}"
    if passed:
        equal = {"exact": "bit-equal to", "lossy": "within the budget of"}.get(profile, "equal to")
        return line(
            ("verified", "bold green"), f"  {equal} the reference on {on} (gate: {profile})"
        )
    if passed is None:
        return line(("unverified", "bold yellow"), f"  {reason}")
    return line(("differs", "bold red"), f"  {reason} (gate: {profile})")


def unjudged(found: VerificationFacts) -> Text:
    """One line in place of the verdict on what was lossy on purpose and has no budget."""
    from graphopt.cli.console import line

    on = f"{found.feeds} {'input' if found.feeds == 1 else 'inputs'}"
    far = "" if found.worst_db is None else f" (SQNR of the worst output {found.worst_db:.1f} dB)"
    said = f"  differs from the original on {on}{far}, as is to be expected; {found.reason}"
    return line(("not judged", "bold yellow"), said)


def outputs_table(
    outputs: Sequence[OutputReport], said: str = "", *, judged: bool = True
) -> RenderableType:
    """One row an output: the numbers, and what failed or was forgiven, unless it is `said` already."""
    from graphopt.cli.console import NONE, grid, text

    table = grid("output", "max|d|", "/RMS", "SQNR", "cosine", "", right="1234")
    for each in outputs:
        style = "" if each.passed else "red"
        equal = "bit-equal" if each.equal else "equal" if each.passed and judged else "differs"
        decibels = f"{each.sqnr_db:.0f} dB" if each.sqnr_db is not None else NONE
        table.add_row(
            text(each.name, style),
            _number(each.max_abs),
            _number(each.max_over_rms),
            decibels,
            NONE if each.cosine is None else _cosine(each.cosine),
            text(equal if not each.why or each.why in said else f"{equal}: {each.why}", style),
        )
    return table


def metric_lines(metrics: Sequence[MetricReport]) -> list[Text]:
    """What metrics of the user's said."""
    from graphopt.cli.console import text

    return [
        text(
            f"metric {each.name}: {each.value:.6g}{f', asked for {each.limit}' if each.limit else ''}, worst on "
            f"'{each.feed}'",
            "" if each.passed else "red",
        )
        for each in metrics
    ]


def _number(number: float | None) -> str:
    from graphopt.cli.console import NONE

    return NONE if number is None else "0" if number == 0 else f"{number:.1e}"


def _cosine(cosine: float) -> str:
    """Nines are what matters: never rounded up to 1."""
    return "1" if cosine >= 1.0 else f"{min(cosine, 0.99999999):.8f}".rstrip("0")
