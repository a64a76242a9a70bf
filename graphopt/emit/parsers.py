"""Whether a runtime's own ONNX parser takes a node, by its operator table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from graphopt.emit.findings import Finding, Verdict
from graphopt.emit.rules import broken
from graphopt.emit.sites import Site
from graphopt.targets import Target
from graphopt.targets.operators import Operator, OperatorTable, Rule, operator_table

# Which pass mends a broken rule; the rest is for the export to change.
FIXES = {
    "axis-written": "write-quantization-axes",
    "branch-names-differ": "rename-branch-outputs",
    "all-zero": "symmetrize-quantization",
}
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_BYTES = "symmetrize-quantization"
DECOMPOSED = frozenset(
    {
        "AffineGrid",
        "Attention",
        "Bernoulli",
        "CenterCropPad",
        "Compress",
        "Concat",
        "Det",
        "Equal",
        "Expand",
        "Gather",
        "Gelu",
        "LayerNormalization",
        "LpPool",
        "MaxPool",
        "MeanVarianceNormalization",
        "NegativeLogLikelihoodLoss",
        "Pad",
        "RMSNormalization",
        "Reshape",
        "Resize",
        "RotaryEmbedding",
        "Slice",
        "SoftmaxCrossEntropyLoss",
        "Squeeze",
        "Swish",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Operators that the pass `decompose` writes in other ones, in some of their forms."""

WHOLE = frozenset(
    {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
)
"""Operators that the pass `write-out-integers` writes in floats that hold whole numbers."""

REMEDIES = {
    "constant": "export with a constant there, or fix the input's dimensions so that it folds",
    "dtype-in": "cast the operand around the node",
    "dtype-not-in": "cast the operand around the node",
    "attr-in": "export with another setting of the attribute",
    "all-zero": "quantise symmetrically: zero point 0, int8; or compute the bytes in floats (write-out-integers)",
    "all-positive": "calibrate anew with a floor under the scales",
    "per-tensor-activation": "quantise activations with one scale a tensor",
    "scale-opset": "convert the model to opset 19 or newer",
    "static-shape": "fix the dimensions of the inputs",
    "constant-below": "reduce K below the limit",
}


def parser_findings(
    site: Site, target: Target, functions: Iterable[ir.OperatorIdentifier]
) -> Iterator[Finding]:
    """What the parser of `target` has against the node."""
    if site.node.op_identifier() in set(functions):
        yield from ()
        return
    table = operator_table(target.operators)
    if site.domain:
        yield _foreign(site, table)
        return
    entry = table.operators.get(site.node.op_type)
    if entry is None or not entry.supported:
        if entry is not None or table.strict:
            yield _unknown(site, table, entry)
        else:
            yield _doubtful(site, table)
        return
    if entry.since > target.version:
        yield _too_new(site, table, entry, target)
    yield from _types(site, table, entry, target)
    for rule in entry.rules:
        fault = broken(site, rule)
        if fault is not None:
            verdict = Verdict.WARNING if rule.warning else Verdict.REFUSED
            note = f" ({rule.note})" if rule.note and rule.check != "note" else ""
            yield _finding(
                site,
                verdict,
                f"{site.op}: {fault}{note}",
                rule.source,
                _remedy(site, rule),
                _fix(site, rule.check),
            )


def _types(site: Site, table: OperatorTable, entry: Operator, target: Target) -> Iterator[Finding]:
    """Element types that the runtime does not know, or not for this operator."""
    present = [v for v in (*site.node.inputs, *site.node.outputs) if v is not None and v.name]
    for value in present:
        seen = site.dtype_of(value)
        if not target.dtypes or seen is None or seen in target.dtypes | target.io_dtypes:
            continue
        yield _finding(
            site,
            Verdict.REFUSED,
            f"{site.op}: {value.name!r} is {seen}, a type that the runtime does not know",
            table.source,
            "cast it to a type that the runtime knows, in the model or before it",
            _BYTES if site.node.op_type in _QUANTIZING else "",
        )
        return
    if (said := _first_type(site, table, entry)) is not None:
        yield said


def _first_type(site: Site, table: OperatorTable, entry: Operator) -> Finding | None:
    """What the operator's list of element types says against the first operand."""
    seen = site.dtype(0)
    if not entry.types or seen is None or seen in entry.types:
        return None
    if seen in entry.observed:
        return _finding(
            site,
            Verdict.WARNING,
            f"{site.op}: input 0 is {seen}, which the documentation does not list and a parser took",
            "RTX 1.7.1 parser (observed)",
            "cast around the node to be sure",
        )
    if seen == "DOUBLE" and "FLOAT" in entry.types:
        return _finding(
            site,
            Verdict.WARNING,
            f"{site.op}: float64 is narrowed to float32",
            table.source,
            "say so in the model",
            "cast-doubles",
        )
    soft = seen == "INT8"  # parsed, but arithmetic on it is for Q/DQ pairs
    return _finding(
        site,
        Verdict.WARNING if soft else Verdict.REFUSED,
        f"{site.op}: input 0 is {seen}, the operator takes {', '.join(sorted(entry.types))}",
        table.source,
        "cast around the node" if not soft else "use Q/DQ pairs around a float operator",
        _BYTES if site.node.op_type in _QUANTIZING else "" if soft else _rewriting(site),
    )


def _remedy(site: Site, rule: Rule) -> str:
    """What to do about a broken rule; an operand that is fed can be bound."""
    held = site.input(rule.input or 0) if rule.check == "constant" else None
    if held is not None and held.is_graph_input():
        return f"fix it: graphopt optimize --bind {held.name}=VALUE"
    return REMEDIES.get(rule.check, "export it in another form")


def _fix(site: Site, check: str) -> str:
    """The pass that mends a broken rule; "" for none."""
    if site.node.op_type in _QUANTIZING and check.startswith("dtype"):
        return _BYTES
    return FIXES.get(check) or _rewriting(site)


def _rewriting(site: Site) -> str:
    """The pass that writes an operator otherwise; "" for none."""
    if site.node.op_type in _QUANTIZING or site.node.op_type in WHOLE:
        return "write-out-integers"
    if site.node.outputs and site.is_foldable(site.node.outputs[0]):
        return "fold-constants"
    if site.node.op_type in DECOMPOSED:
        return "decompose"
    return "tidy" if "Sequence" in site.node.op_type or "Optional" in site.node.op_type else ""


def _foreign(site: Site, table: OperatorTable) -> Finding:
    contrib = site.domain == "com.microsoft"
    return _finding(
        site,
        Verdict.REFUSED,
        f"{site.op}: domain {site.domain!r} is not the parser's"
        + ("" if contrib else "; a plugin of that name would be needed"),
        table.source,
        "express it by standard operators" if contrib else "register a plugin of that name",
        "expand-contrib" if contrib else "",
    )


def _unknown(site: Site, table: OperatorTable, entry: Operator | None) -> Finding:
    words = entry.restrictions if entry is not None else "not in the table"
    return _finding(
        site,
        Verdict.REFUSED,
        f"{site.op} is not supported" + (f" ({words})" if words else ""),
        f"{table.name} {table.version}: {table.source}",
        "express it by other operators, or leave it outside of the model",
        _rewriting(site),
    )


def _doubtful(site: Site, table: OperatorTable) -> Finding:
    return _finding(
        site,
        Verdict.WARNING,
        f"{site.op} was not among what was tried",
        f"{table.name} {table.version}: {table.source}",
        "try it: openvino.Core().read_model()",
    )


def _too_new(site: Site, table: OperatorTable, entry: Operator, target: Target) -> Finding:
    return _finding(
        site,
        Verdict.REFUSED,
        f"{site.op} is taken from version {_version(entry.since)} on, the target is {_version(target.version)}",
        table.source,
        f"use {table.name} {_version(entry.since)} or newer, or leave the operator decomposed",
    )


def _version(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))


def _finding(
    site: Site, verdict: Verdict, reason: str, source: str, remedy: str, fix: str = ""
) -> Finding:
    return Finding(verdict, reason, source, remedy, site.label, site.op, site.scope.path, fix=fix)
