"""`graphopt targets`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import completion, options
from graphopt.cli.choice import one_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.targets import Target


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A target.", autocompletion=completion.target_names),
    ] = None,
    as_json: options.Json = False,
) -> int:
    """List the runtimes that graphopt emits for, or what one of them takes."""
    from graphopt.cli.console import show, show_json
    from graphopt.report.plain import graphopt_version
    from graphopt.targets import all_targets

    known = all_targets()
    if name is not None:
        one_of("target", name, known)
    chosen = list(known.values()) if name is None else [known[name]]
    if as_json:
        show_json({"graphopt": graphopt_version(), "targets": [_plain(each) for each in chosen]})
    else:
        show(_list(chosen) if name is None else _details(chosen[0]))
    return 0


def _list(known: list[Target]) -> RenderableType:
    from graphopt.cli.console import grid, text

    table = grid("target", "opsets", "what it is")
    for each in known:
        table.add_row(text(each.name, "bold"), _range(each.opset), text(each.summary))
    return table


def _details(target: Target) -> RenderableType:
    from rich.console import Group

    from graphopt.cli.console import facts, grid, text

    provider = target.provider or "not run by ONNX Runtime"
    rows = {
        "target": f"{target.name}: {target.summary}",
        "opsets": _range(target.opset),
        "IR versions": _range(target.ir_version),
        "domains": ", ".join(f"{name or 'ai.onnx'} {v}" for name, v in target.domains.items()),
        "functions": "are inlined" if target.inline_functions else "stay",
        "provider": provider,
        **_more(target),
    }
    table = grid("fused operator", "since", "dtypes", "why it may be introduced", fixed="01")
    for op in target.fused:
        name = f"{op.domain}::{op.op_type}" if op.domain else op.op_type
        dtypes = ", ".join(sorted(op.dtypes)).lower()
        table.add_row(text(name), str(op.since), text(dtypes), text(op.source))
    return Group(facts(rows), text(""), table)


def _range(limits: tuple[int, int]) -> str:
    return f"{limits[0]} to {limits[1]}"


def _plain(target: Target) -> Any:  # noqa: ANN401
    from graphopt.report.plain import plain

    return plain(target)


def _more(target: Target) -> dict[str, str]:
    """What is not said for every target."""
    rows = {}
    if target.architecture:
        rows["processor"] = target.architecture
    if target.kernels or target.operators:
        rows["checked by"] = ", ".join(filter(None, (target.operators, *target.kernels)))
    if target.version:
        rows["version"] = ".".join(map(str, target.version))
    if target.qdq is not None:
        held = target.qdq
        zero = "zero points allowed" if held.zero_points else "zero point 0"
        activations = held.activations or "activations stay float"
        rows["integers"] = (
            f"{activations}, weights {held.weights} ({held.weight_bits} bits), {zero}"
        )
    rows["computes in"] = ", ".join(sorted(target.floats.computes))
    rows["in a bundle"] = ", ".join(artefact.value for artefact in target.artefacts) or "run.py"
    return rows
