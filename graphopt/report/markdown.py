"""The report of one run in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphopt.report.plain import graphopt_version
from graphopt.report.run import RunReport, VerificationFacts
from graphopt.verify.compare import OutputReport


def run_markdown(report: RunReport, *, times: bool = True) -> str:
    """The report as a Markdown document; without `times`, the same for each run."""
    before, after = report.input, report.output
    opsets = [facts.opsets.get("", "") for facts in (before, after)]
    sizes = [
        ("nodes", before.nodes, after.nodes),
        ("parameters", before.parameters, after.parameters),
        ("parameter bytes", before.parameter_bytes, after.parameter_bytes),
        ("file bytes", before.size_bytes, after.size_bytes),
        ("opset", *opsets),
        ("IR version", before.ir_version, after.ir_version),
    ]
    parts = [
        f"# {before.path or 'model in memory'} → {after.path or 'model in memory'}",
        f"graphopt {graphopt_version()}, target {report.target}, precision {report.precision}, seed {report.seed}",
        _table(("", "before", "after"), sizes),
        *_specialized(report),
        *_passes(report, times=times),
        *_stages(report),
        *_verification(report.verification),
        *_layers(report),
        *_smaller(report),
        *_lists(report),
    ]
    return "\n\n".join(parts) + "\n"


def _specialized(report: RunReport) -> list[str]:
    if not report.specialized:
        return []
    return ["## Specialised", "\n".join(f"- {_cell(each)}" for each in report.specialized)]


def _smaller(report: RunReport) -> list[str]:
    """What zeros did to the file, and what training made up for."""
    parts = []
    if report.sparse is not None:
        parts += [
            "## Sparsity",
            "\n".join(f"- {_cell(each)}" for each in report.sparse.sentences()),
        ]
    if report.pattern_layers:
        patterned = [
            (
                each.weight or each.node,
                each.operator,
                f"{each.axis} = {each.inputs}" if each.axis else "",
                each.multiple or "",
                f"{each.following:.1%} of {each.pattern}",
                "yes" if each.eligible else "no",
                each.why_not or each.note,
            )
            for each in report.pattern_layers
        ]
        heads = ("weight", "operator", "axis", "multiple of", "in pattern", "eligible", "")
        parts += ["## Weights for sparse tensor cores", _table(heads, patterned)]
    if report.distilled is not None:
        rows = [(step, f"{loss:.6g}") for step, loss in report.distilled.judged]
        said = "\n".join(f"- {_cell(each)}" for each in report.distilled.sentences())
        parts += ["## Distillation", said, _table(("step", "loss on held-out samples"), rows)]
    return parts


def _passes(report: RunReport, *, times: bool) -> list[str]:
    rules: dict[str, list[str]] = {}
    for (name, rule), fired in report.rewrite_counts().items():
        rules.setdefault(name, []).append(f"{rule} {fired}")
    rows = [
        (
            each.name,
            each.runs,
            each.rewrites,
            *([f"{each.seconds:.2f}"] if times else []),
            ", ".join(rules.get(each.name, ())),
        )
        for each in report.pass_totals()
        if each.changed or each.rewrites
    ]
    heads = ("pass", "runs", "rewrites", *(["CPU seconds"] if times else []), "rules")
    return ["## Passes", _table(heads, rows) if rows else "No pass found anything to change."]


def _stages(report: RunReport) -> list[str]:
    rows = [
        (each.name or "as it was read", each.nodes, each.parameter_bytes, each.flops)
        for each in report.stages
    ]
    heads = ("after", "nodes", "parameter bytes", "FLOPs (free dimensions as 1)")
    return ["## Pass by pass", _table(heads, rows)] if rows else []


def _layers(report: RunReport) -> list[str]:
    rows = [
        (each.name, each.operator, each.arithmetic, each.weight, each.scales, each.bytes)
        for each in report.layers
    ]
    heads = ("value", "operator", "arithmetic", "weight", "scales", "bytes")
    return ["## Layers", _table(heads, rows)] if rows else []


def _verification(found: VerificationFacts) -> list[str]:
    said = found.verdict.capitalize()
    about = f", gate {found.profile}, {found.feeds} inputs" if found.profile else ""
    reason = f": {found.reason}" if found.reason else ""
    parts = ["## Verification", f"**{said}** (mode {found.mode}{about}){reason}"]
    if found.outputs:
        rows = [
            (
                each.name,
                each.max_abs,
                each.max_over_rms,
                each.sqnr_db,
                each.cosine,
                _said(each, found),
            )
            for each in found.outputs
        ]
        parts.append(_table(("output", "max abs", "over RMS", "SQNR dB", "cosine", ""), rows))
    return parts


def _said(output: OutputReport, found: VerificationFacts) -> str:
    if output.equal:
        return "bit-equal"
    if output.passed:
        return "equal" if found.is_judged else "differs, not judged"
    return f"differs: {output.why}"


def _lists(report: RunReport) -> list[str]:
    parts: list[str] = []
    if report.rolled_back:
        rows = [(e.pass_name, e.rule, e.site, e.reason) for e in report.rolled_back]
        parts += ["## Left out, because it failed", _table(("pass", "rule", "at", "reason"), rows)]
    if report.warnings:
        parts += ["## Warnings", "\n".join(f"- {_cell(each)}" for each in report.warnings)]
    if report.remarks:
        told = [
            (e.kind.value, f"{e.pass_name}/{e.rule}", e.node, e.reason, e.culprit)
            for e in report.remarks
        ]
        heads = ("kind", "pass/rule", "at", "reason", "because of")
        parts += ["## Remarks", _table(heads, told)]
    return parts


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(content: object) -> str:
    """One line, no column breaks; names in models hold anything."""
    if content is None:
        return ""
    text = f"{content:.4g}" if isinstance(content, float) else str(content)
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
