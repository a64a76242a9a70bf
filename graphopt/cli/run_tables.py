"""How a run is shown: before and after, what the passes did, the verification, what is left to say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphopt.cli.console import change, count, grid, line, scaled, size, text
from graphopt.cli.verification import metric_lines, outputs_table, unjudged, verdict
from graphopt.report.patterns import CAVEATS
from graphopt.report.quantized import quantized_layers

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from graphopt.report.patterns import PatternLayer
    from graphopt.report.quantized import QuantizedLayer
    from graphopt.report.run import RunReport
    from graphopt.rewrite.context import Remark

MAX_OUTPUTS = 8
MAX_REASONS = 8
MAX_LAYERS = 16


def run_tables(report: RunReport, *, every_remark: bool = False) -> list[RenderableType]:
    """The parts to print, one after the other."""
    parts: list[RenderableType] = [_summary(report), _sizes(report), text("")]
    parts += [text(f"specialised: {each}", "dim") for each in report.specialized]
    passes = _passes(report)
    if passes is not None:
        parts += [passes, text("")]
    parts += _verification(report)
    if report.distilled is not None:
        parts += [text(f"distilled  {each}", "dim") for each in report.distilled.sentences()]
    if report.sparse is not None:
        parts += [text(f"sparsity  {each}", "dim") for each in report.sparse.sentences()]
    parts += _rolled_back(report)
    parts += [text(f"warning: {each}", "yellow") for each in report.warnings]
    parts += _quantized(report.remarks, every=every_remark)
    parts += _patterns(report.pattern_layers, every=every_remark)
    told = [each for each in report.remarks if not each.facts]
    parts += _remarks(told, every_remark=every_remark)
    return parts


def _summary(report: RunReport) -> RenderableType:
    source, made = report.input.path or "model in memory", report.output.path or "model in memory"
    asked = f"target {report.target}, precision {report.precision}"
    recipe = f", recipe {report.recipe}" if report.recipe else ""
    spent = f", {report.seconds:.1f} s CPU" if report.seconds is not None else ""
    return line((f"{source} → {made}", "bold"), (f"\n{asked}{recipe}{spent}", "dim"))


def _sizes(report: RunReport) -> RenderableType:
    before, after = report.input, report.output
    table = grid("", "before", "after", "", right="123")
    numbers = {
        "nodes": (before.nodes, after.nodes, count),
        "parameters": (before.parameters, after.parameters, scaled),
        "parameter bytes": (before.parameter_bytes, after.parameter_bytes, size),
        "file": (before.size_bytes, after.size_bytes, size),
    }
    for name, (old, new, show) in numbers.items():
        if old is not None and new is not None:
            style = "green" if new < old else "yellow" if new > old else ""
            table.add_row(name, show(old), show(new), text(change(old, new), style))
    for domain in sorted({*before.opsets, *after.opsets}):
        old, new = before.opsets.get(domain), after.opsets.get(domain)
        if not domain or old != new:
            name = f"opset {domain or 'ai.onnx'}"
            table.add_row(text(name), str(old or "-"), str(new or "-"), "=" if old == new else "")
    return table


def _passes(report: RunReport) -> RenderableType | None:
    """The passes that did something; None if none did."""
    active = [each for each in report.pass_totals() if each.changed or each.rewrites]
    if not active:
        return text("No pass found anything to change.")
    rules = report.rewrite_counts()
    table = grid("pass", "runs", "rewrites", "CPU", "rules", right="123")
    for each in active:
        fired = Counter({rule: n for (name, rule), n in rules.items() if name == each.name})
        shown = ", ".join(f"{rule} {n}" for rule, n in fired.most_common())
        table.add_row(
            text(each.name),
            str(each.runs),
            count(each.rewrites),
            f"{each.seconds:.2f} s",
            text(shown, "dim"),
        )
    return table


def _verification(report: RunReport) -> list[RenderableType]:
    found = report.verification
    if found.mode == "off":
        return [line(("unverified", "bold yellow"), "  --verify off: nothing was compared")]
    said = verdict(found.passed, found.profile, found.feeds, found.reason)
    if found.passed and not found.is_judged:
        said = unjudged(found)
    parts: list[RenderableType] = [said]
    if found.outputs:
        wrong = [each for each in found.outputs if not each.passed]
        right = [each for each in found.outputs if each.passed]
        shown = [*wrong, *right][: max(MAX_OUTPUTS, len(wrong))]
        parts.append(outputs_table(shown, found.reason, judged=found.is_judged))
        if len(shown) < len(found.outputs):
            parts.append(
                text(f"… and {len(found.outputs) - len(shown)} more outputs, all equal", "dim")
            )
    return [*parts, *metric_lines(found.metrics)]


def _rolled_back(report: RunReport) -> list[RenderableType]:
    """What was left out because it failed: the user should know, and we should get to know."""
    parts: list[RenderableType] = []
    for each in report.rolled_back:
        rule = f"/{each.rule}" if each.rule else ""
        where = f" at {each.site!r}" if each.site else ""
        what = f"left out  {each.pass_name}{rule}{where}: "
        parts.append(line((what, "bold yellow"), each.reason))
    return [text(""), *parts] if parts else []


def _quantized(remarks: Sequence[Remark], *, every: bool) -> list[RenderableType]:
    """The layers in 8 bits, each with its kernel and what it costs."""
    rows = [row for row in quantized_layers(remarks) if not row.why_float]
    if not rows:
        return []
    heads = ("layer", "kernel", "range by", "clipped", "dB", "input", "weight", "coarser")
    typed = not _alike(rows)
    table = grid(*heads, *(("values in", "weights in") if typed else ()), right="34567")
    for row in rows if every else rows[:MAX_LAYERS]:
        weight = "" if row.weight_sqnr_db is None else f"{row.weight_sqnr_db:.1f}"
        table.add_row(
            text(row.node),
            text(row.kernel),
            row.method,
            f"{row.clipped or 0:.2%}",
            f"{row.sqnr_db:.1f}",
            f"{row.input_sqnr_db:.1f}",
            f"{weight}{'*' if row.refined else ''}",
            str(row.raised_channels or ""),
            *((row.activations, row.weights) if typed else ()),
        )
    parts: list[RenderableType] = [text(""), table]
    if any(row.refined for row in rows):
        parts.append(text("* weight rounded by second moments of the input", "dim"))
    hidden = 0 if every else len(rows) - MAX_LAYERS
    return (
        [*parts, text(f"… and {hidden} other layers; --remarks lists all", "dim")]
        if hidden > 0
        else parts
    )


def _alike(rows: Sequence[QuantizedLayer]) -> bool:
    """Whether all values are stored in one type of 8 bits, and all weights in one."""
    values, weights = (
        {*kinds} - {""} for kinds in zip(*((r.activations, r.weights) for r in rows), strict=True)
    )
    return len(values) <= 1 and len(weights) <= 1 and values | weights <= {"uint8", "int8"}


def _patterns(rows: Sequence[PatternLayer], *, every: bool) -> list[RenderableType]:
    """The weights that sparse tensor cores may read, those that they cannot first."""
    if not rows:
        return []
    table = grid(
        "weight", "operator", "axis", "multiple of", "in pattern", "eligible", "", right="34"
    )
    ordered = sorted(rows, key=lambda row: row.eligible)
    for row in ordered if every else ordered[:MAX_LAYERS]:
        table.add_row(
            text(row.weight or row.node),
            row.operator,
            f"{row.axis} = {row.inputs}" if row.axis else "",
            str(row.multiple or ""),
            f"{row.following:.1%} of {row.pattern}",
            text("yes", "green") if row.eligible else text("no", "yellow"),
            text(row.why_not or row.note),
        )
    eligible = sum(row.eligible for row in rows)
    told = f"sparse tensor cores can read {eligible} of {len(rows)} weights; {CAVEATS}"
    parts: list[RenderableType] = [text(""), table, text(told, "dim")]
    hidden = 0 if every else len(rows) - MAX_LAYERS
    if hidden > 0:
        parts.append(text(f"… and {hidden} other weights; --remarks lists all", "dim"))
    return parts


def _remarks(remarks: Sequence[Remark], *, every_remark: bool) -> list[RenderableType]:
    """Remarks by rule and reason, most frequent first; each of them if asked for."""
    said = [each for each in remarks if each.kind != "warning"]
    if not said:
        return []
    if every_remark:
        table = grid("remark", "pass/rule", "at", "reason", "because of")
        for each in said:
            rule = f"{each.pass_name}/{each.rule}"
            table.add_row(
                each.kind.value, text(rule), text(each.node), text(each.reason), text(each.culprit)
            )
        return [text(""), table]
    notes = [each for each in said if each.kind == "note"]
    missed = [each for each in said if each.kind == "missed"]
    return [
        *_groups(notes, ("note", "times", "")),
        *_groups(missed, ("left as it is", "times", "because")),
    ]


def _groups(remarks: Sequence[Remark], heads: tuple[str, str, str]) -> list[RenderableType]:
    """Remarks of one kind, counted by rule and reason."""
    if not remarks:
        return []
    groups = Counter((each.pass_name, each.rule, without_names(each.reason)) for each in remarks)
    table = grid(*heads, right="1")
    for (name, rule, reason), times in groups.most_common(MAX_REASONS):
        table.add_row(text(f"{name}/{rule}"), str(times), text(reason))
    return [text(""), table, *_more(len(groups) - MAX_REASONS)]


def without_names(reason: str) -> str:
    """A reason with the names of values and nodes left out, so that the same reason counts once."""
    return re.sub(r"'[^']*'", "…", reason)


def _more(hidden: int) -> list[Text]:
    return [text(f"… and {hidden} other reasons; --remarks lists all", "dim")] if hidden > 0 else []
