"""Static legality: whether and how a target takes a model, node by node, without the hardware."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from graphopt.emit import placement
from graphopt.emit.findings import Copies, Finding, Legality, NodeVerdict, Verdict
from graphopt.emit.parsers import parser_findings
from graphopt.emit.registrations import kernel_table
from graphopt.emit.sites import Site, all_sites
from graphopt.ir.shapes import Shapes
from graphopt.targets import Target
from graphopt.targets.operators import operator_table


def check_legality(model: ir.Model, target: Target) -> Legality:
    """What `target` has to say about `model`, which stays as it is but for inferred types and shapes.

    Limits of the file (opsets, IR version, domains), types of inputs and outputs, and each node: by the kernels that
    ONNX Runtime registers, or by the operator table of the runtime's parser, or by both where nodes that a parser
    refuses fall back to kernels.
    """
    sites = list(all_sites(model, Shapes(model)))
    findings = list(_limits(model, target))
    findings += _interface(model, target)
    if target.operators and not target.kernels:
        nodes, more = _parsed(sites, model, target)
        return Legality(target.name, _sources(target), nodes, (*findings, *more))
    if target.kernels:
        placed = placement.place(
            sites, target.kernels, model.functions, _claims(sites, model, target)
        )
        found = [each.finding for each in placed if each.finding is not None]
        spread = len(target.kernels) > 1
        moved = placement.copies(placed) if spread else Copies()
        nodes = tuple(each.verdict() for each in placed)
        return Legality(target.name, _sources(target), nodes, (*findings, *found), moved)
    nodes, more = _standard(sites, model, target)
    return Legality(target.name, _sources(target), nodes, (*findings, *more))


def refusal(
    site: Site, target: Target, functions: Iterable[ir.OperatorIdentifier] = ()
) -> Finding | None:
    """What keeps `target` from running one node, by whichever provider; None where nothing does."""
    local = tuple(functions)
    if site.node.op_identifier() in local:
        return None
    said = list(parser_findings(site, target, local)) if target.operators else []
    refused = next((f for f in said if f.verdict is Verdict.REFUSED), None)
    if target.kernels:
        if target.operators and refused is None:
            return None
        (placed,) = placement.place([site], target.kernels, local)
        found = placed.finding
        return found if found is not None and found.verdict is Verdict.REFUSED else None
    if target.operators:
        return refused
    return None if target.has_domain(site.domain) else _foreign(site, target)


def _parsed(
    sites: Sequence[Site], model: ir.Model, target: Target
) -> tuple[tuple[NodeVerdict, ...], tuple[Finding, ...]]:
    nodes, findings = [], []
    for site in sites:
        said = list(parser_findings(site, target, model.functions))
        findings += said
        nodes.append(_verdict(site, said, target.operators))
    return tuple(nodes), tuple(findings)


def _standard(
    sites: Sequence[Site], model: ir.Model, target: Target
) -> tuple[tuple[NodeVerdict, ...], tuple[Finding, ...]]:
    """For a target without tables: operators that the imported standard defines."""
    nodes, findings = [], []
    for site in sites:
        known = target.has_domain(site.domain) or site.node.op_identifier() in model.functions
        said = [] if known else [_foreign(site, target)]
        findings += said
        nodes.append(_verdict(site, said, "any"))
    return tuple(nodes), tuple(findings)


def _foreign(site: Site, target: Target) -> Finding:
    contrib = site.domain == "com.microsoft"
    return Finding(
        Verdict.REFUSED,
        f"{site.op}: domain {site.domain!r} is not among those of target {target.name}",
        f"targets: {target.name}",
        "express it by standard operators",
        site.label,
        site.op,
        site.scope.path,
        fix="expand-contrib" if contrib else "",
    )


def _claims(sites: Sequence[Site], model: ir.Model, target: Target) -> dict[Site, Finding | None]:
    """What a parser ahead of the kernels says to each node: None where it takes it."""
    if not target.operators:
        return {}
    claims: dict[Site, Finding | None] = {}
    for site in sites:
        said = parser_findings(site, target, model.functions)
        claims[site] = next((f for f in said if f.verdict is Verdict.REFUSED), None)
    return claims


def _verdict(site: Site, said: Sequence[Finding], provider: str) -> NodeVerdict:
    order = list(Verdict)
    worst = max((f.verdict for f in said), key=order.index, default=Verdict.OK)
    runs = "" if worst is Verdict.REFUSED else provider
    return NodeVerdict(site.label, site.op, site.scope.path, worst, runs)


def _limits(model: ir.Model, target: Target) -> Iterator[Finding]:
    """Versions beyond what the runtime reads."""
    lowest, highest = target.opset
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    source = f"targets: {target.name}"
    # ONNX Runtime refuses by number; parsers look at the operators, and vouch for a range.
    beyond = Verdict.REFUSED if target.kernels or not target.operators else Verdict.WARNING
    if version is not None and version > highest:
        yield Finding(
            beyond,
            f"the model imports ai.onnx opset {version}, {target.name} takes {lowest} to {highest}",
            source,
            f"convert it to opset {highest}, or export it so",
            fix="convert-opset",
        )
    if version is not None and version < lowest:
        yield Finding(
            Verdict.WARNING,
            f"the model imports ai.onnx opset {version}, {target.name} vouches for {lowest} to {highest}",
            source,
            f"convert it to opset {lowest} or newer",
            fix="convert-opset",
        )
    if model.ir_version > target.ir_version[1]:
        yield Finding(
            beyond,
            f"the file is of IR version {model.ir_version}, {target.name} takes at most {target.ir_version[1]}",
            source,
            "graphopt optimize writes one that it takes",
            fix="convert-opset",
        )
    if model.functions and target.inline_functions and not target.kernels:
        names = ", ".join(str(function.name) for function in model.functions.values())
        yield Finding(
            Verdict.WARNING if target.operators == "tensorrt" else Verdict.REFUSED,
            f"the model has local functions: {names}",
            source,
            "inline them",
            fix="inline-functions",
        )


def _interface(model: ir.Model, target: Target) -> list[Finding]:
    """Inputs and outputs that the runtime cannot take or give."""
    found = []
    allowed = target.dtypes | target.io_dtypes
    for value in (*model.graph.inputs, *model.graph.outputs):
        if not target.operators or target.kernels or not target.dtypes:
            break
        dtype = value.dtype.name if isinstance(value.type, ir.TensorType) and value.dtype else None
        kind = None if isinstance(value.type, ir.TensorType | None) else str(value.type)
        if kind is None and (dtype is None or dtype in allowed):
            continue
        found.append(
            Finding(
                Verdict.REFUSED,
                f"{value.name!r} is {kind or dtype}, which cannot enter or leave the network",
                f"targets: {target.name}",
                "cast it, or open it, outside of the model",
            )
        )
    return found


def _sources(target: Target) -> tuple[str, ...]:
    held = []
    if target.operators:
        table = operator_table(target.operators)
        held.append(f"{table.name} {table.version}: {table.source}")
    for name in target.kernels:
        kernels = kernel_table(name)
        held.append(f"{kernels.provider} of ONNX Runtime {kernels.version}: {kernels.source}")
    return tuple(held)
