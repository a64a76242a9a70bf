"""The report of one run as one page of HTML that needs nothing else: no network, no script but its own."""

from __future__ import annotations

import math
from typing import Any

from graphopt.report.curves import loss_plot
from graphopt.report.examine import Examined, Point
from graphopt.report.plain import graphopt_version
from graphopt.report.run import RunReport, VerificationFacts
from graphopt.report.stages import Stage
from graphopt.rewrite.context import RemarkKind

_PLOT_WIDTH, _PLOT_HEIGHT = 720, 150

OFF = 1.0
"""A value that is off by more than its RMS, in front of outputs that are right, is another quantity by now."""


def run_html(report: RunReport, examined: Examined | None = None) -> str:
    """The page.

    Args:
        report: what the run did.
        examined: what was measured besides; None where there are no files to measure.
    """
    import jinja2  # noqa: PLC0415  costs start-up time that no other report need pay

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphopt.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": _number, "bytes": _bytes, "count": _count}
    return environment.get_template("run.html.j2").render(
        report=report,
        version=graphopt_version(),
        verdict=report.verification.verdict,
        totals=[each for each in report.pass_totals() if each.changed or each.rewrites],
        runs=[run for run in report.passes if run.changed],
        fused=[(name, rule, n) for (name, rule), n in report.rewrite_counts().items()],
        declined=[each for each in report.remarks if each.kind is RemarkKind.MISSED],
        noted=[each for each in report.remarks if each.kind is not RemarkKind.MISSED],
        examined=examined,
        stages=_stages(report),
        sizes=_sizes(report.stages),
        errors={p.value: p.error for p in examined.along} if examined else {},
        plot=_plot(examined.along, report.verification) if examined else "",
        off=_off(examined.along) if examined and report.verification.passed else [],
        losses=loss_plot(report.distilled) if report.distilled else "",
        operators=_operators(report),
    )


def _stages(report: RunReport) -> list[dict[str, Any]]:
    """The stages with what their passes did."""
    runs = [None, *(run for run in report.passes if run.changed)]
    if len(runs) != len(report.stages):
        return []
    rows = []
    nodes = report.stages[0].nodes
    for each, run in zip(report.stages, runs, strict=True):
        rows.append(
            {
                "name": each.name,
                "rewrites": "" if run is None else run.rewrites,
                "nodes": each.nodes,
                "change": each.nodes - nodes,
                "bytes": each.parameter_bytes,
                "flops": each.flops,
                "seconds": None if run is None else run.seconds,
            }
        )
        nodes = each.nodes
    return rows


def _sizes(stages: tuple[Stage, ...]) -> str:
    """Nodes after each stage, as a line."""
    if len(stages) < 3:
        return ""
    most = max(each.nodes for each in stages) or 1
    step = _PLOT_WIDTH / (len(stages) - 1)
    points = [
        (round(i * step, 1), round(_PLOT_HEIGHT * (1 - each.nodes / most), 1), each)
        for i, each in enumerate(stages)
    ]
    line = " ".join(f"{x},{y}" for x, y, _ in points)
    dots = "".join(
        f'<circle class="ok" cx="{x}" cy="{y}" r="3"><title>{_escape(each.name or "read")}: {each.nodes} nodes</title>'
        "</circle>"
        for x, y, each in points
    )
    return (
        f'<svg class="plot" id="sizes" viewBox="-4 -8 {_PLOT_WIDTH + 8} {_PLOT_HEIGHT + 16}" role="img">'
        f'<polyline points="{line}" fill="none" stroke="#888"/>{dots}</svg>'
    )


def _operators(report: RunReport) -> list[tuple[str, int, int]]:
    before, after = report.input.operators, report.output.operators
    names = sorted(
        set(before) | set(after), key=lambda name: -max(_of(before, name), _of(after, name))
    )
    return [(name, _of(before, name), _of(after, name)) for name in names]


def _of(counts: Any, name: str) -> int:  # noqa: ANN401
    return int(counts.get(name, 0))


def _plot(points: tuple[Point, ...], found: VerificationFacts) -> str:
    """Errors along the graph, on a scale of powers of ten; values that are bit-equal lie on the ground.

    Where the run may lose precision, no gate says of a value in the middle whether it is good or bad.
    """
    known = [(index, point) for index, point in enumerate(points) if point.error is not None]
    if not known:
        return ""
    logs = [math.log10(p.error) for _, p in known if p.error]
    low = math.floor(min(logs, default=-8.0)) - 1
    high = max(math.ceil(max(logs, default=-6.0)), low + 1)

    def y(error: float) -> float:
        share = 0.0 if error == 0 else (math.log10(error) - low) / (high - low)
        return round(_PLOT_HEIGHT * (1 - share), 1)

    step = _PLOT_WIDTH / max(len(points), 1)
    grid = "".join(
        f'<line x1="0" x2="{_PLOT_WIDTH}" y1="{y(10.0**p)}" y2="{y(10.0**p)}"/>'
        f'<text x="{_PLOT_WIDTH + 4}" y="{y(10.0**p) + 4}">1e{p}</text>'
        for p in range(low + 1, high + 1)
    )
    dots = "".join(
        f'<circle class="{_judged(p, found)}" cx="{round(index * step + step / 2, 1)}" '
        f'cy="{y(p.error or 0.0)}" r="2.5"><title>{_escaped(p)}</title></circle>'
        for index, p in known
    )
    return (
        f'<svg class="plot" viewBox="-4 -8 {_PLOT_WIDTH + 48} {_PLOT_HEIGHT + 16}" role="img">'
        f"{grid}{dots}</svg>"
    )


def _off(points: tuple[Point, ...]) -> list[Point]:
    """Values that are another quantity than the original's, in a result whose outputs are right."""
    return [point for point in points if point.error is not None and point.error > OFF]


def _judged(point: Point, found: VerificationFacts) -> str:
    if point.passed:
        return "ok"
    other = bool(found.passed) and (point.error or 0) > OFF
    return "some" if found.profile == "lossy" or other else "bad"


def _escaped(point: Point) -> str:
    return _escape(f"{point.operator} {point.value}: {point.error:.2g}")


def _escape(text: str) -> str:
    from xml.sax.saxutils import escape  # noqa: PLC0415

    return escape(text)


def _number(number: float | None) -> str:
    return "" if number is None else "0" if number == 0 else f"{number:.3g}"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}".replace(",", "\u202f")


def _bytes(number: int | None) -> str:
    if number is None:
        return ""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
