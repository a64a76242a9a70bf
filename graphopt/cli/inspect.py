"""`graphopt inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli import options
from graphopt.errors import OptionError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.report.inspect import Inspection, PortFacts


MAX_FORMULA = 60
"""Characters of a formula that are worth reading."""


def command(
    model: options.Model,
    dims: options.Dims = None,
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=0, help="Rows of each table; 0 for all.")
    ] = 12,
    as_json: options.Json = False,
) -> int:
    """Show what is in MODEL: inputs, outputs, operators, parameters, arithmetic, sparsity, opsets, functions."""
    sizes = parse_dims(dims or ())
    from graphopt.cli.console import show, show_json
    from graphopt.ir.model_file import load_model
    from graphopt.report.inspect import inspect_model, inspection_json

    found = inspect_model(load_model(model), model, dims=sizes)
    if as_json:
        show_json(inspection_json(found))
    else:
        show(*_parts(found, top or None))
    return 0


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    """Sizes by name, of `batch=1,seq=128`.

    Raises:
        OptionError: a text is of another form.
    """
    sizes: dict[str, int] = {}
    for item in (item.strip() for text in texts for item in text.split(",")):
        name, equals, number = item.rpartition("=")
        if not equals or not name or not (number.isascii() and number.isdigit()):
            raise OptionError(f"--dims {item!r}: give NAME=SIZE, as in batch=1,seq=128")
        sizes[name] = int(number)
    return sizes


def _parts(found: Inspection, top: int | None) -> list[RenderableType]:
    from graphopt.cli.console import text

    parts: list[RenderableType] = [
        _summary(found),
        text(""),
        _ports(found),
        text(""),
        _operators(found, top),
    ]
    parts += [
        text(f"output {each.output!r} is declared {each.declared}; it is {each.inferred}", "red")
        for each in found.contradictions
    ]
    if found.tensors:
        parts += [text(""), _tensors(found, top)]
    return parts


def _summary(found: Inspection) -> RenderableType:
    from graphopt.cli.console import NONE, count, facts, scaled, size

    model = found.model
    opsets = ", ".join(
        f"{domain or 'ai.onnx'} {version}" for domain, version in model.opsets.items()
    )
    nodes = count(model.nodes) + (f" ({found.subgraphs} subgraphs)" if found.subgraphs else "")
    stored = f"{scaled(model.parameters)} in {size(model.parameter_bytes)}"
    if len(found.dtypes) > 1:
        stored += f": {', '.join(f'{each.dtype} {size(each.bytes)}' for each in found.dtypes)}"
    elif found.dtypes:
        stored += f" {found.dtypes[0].dtype}"
    rows = {
        "file": f"{model.path or NONE}, {size(model.size_bytes)}",
        "format": f"IR {model.ir_version}; {opsets}",
        "producer": found.producer,
        "nodes": nodes,
        "functions": ", ".join(f"{name} ({nodes})" for name, nodes in found.functions.items()),
        "parameters": stored,
        "zeros": f"{found.sparsity:.1%}",
        "arithmetic": _cost_text(found),
        "other domains": ", ".join(f"{d} ({n} nodes)" for d, n in found.custom_domains.items()),
        "external data": ", ".join(
            f"{file} ({size(used)})" for file, used in found.external.items()
        ),
        "metadata": ", ".join(f"{key}={value}" for key, value in found.metadata.items()),
    }
    return facts({name: value for name, value in rows.items() if value})


def _cost_text(found: Inspection) -> str:
    """The cost in numbers where dimensions are known, else as a formula, else how to make it known."""
    from graphopt.cli.console import scaled

    cost = found.arithmetic
    if not cost.unknown:
        return (
            f"{scaled(cost.macs)} MAC = {scaled(cost.flops)} FLOP" if cost.macs else "none counted"
        )
    give = f"; give --dims {','.join(f'{name}=1' for name in cost.free[:4])}" if cost.free else ""
    if cost.formula is not None and len(cost.formula) <= MAX_FORMULA:
        return f"{cost.formula} MAC{give}"
    known = f"{scaled(cost.macs)} MAC and " if cost.macs else ""
    return f"{known}{cost.unknown} nodes of unknown size{give}"


def _ports(found: Inspection) -> RenderableType:
    from graphopt.cli.console import grid, text

    table = grid("", "name", "type")
    for side, ports in (("input", found.inputs), ("output", found.outputs)):
        for port in ports:
            default = " (has a default)" if port.overridable else ""
            table.add_row(text(side, "dim"), text(port.name), text(type_text(port) + default))
    return table


def type_text(port: PortFacts) -> str:
    """`float[batch, 3, 224, 224]`."""
    dims = (
        "?" if port.shape is None else ", ".join("?" if d is None else str(d) for d in port.shape)
    )
    prefix = "" if port.kind == "tensor" else f"{port.kind} of "
    return f"{prefix}{port.dtype}[{dims}]"


def _operators(found: Inspection, top: int | None) -> RenderableType:
    from graphopt.cli.console import NONE, count, grid, scaled, text

    table = grid("operator", "nodes", "MAC", "share", right="123")
    total = found.arithmetic.macs
    common = found.operators[:top]
    costly = [each for each in found.operators[len(common) :] if each.macs or each.unknown]
    for each in (*common, *costly):
        formula = each.formula if each.formula and len(each.formula) <= MAX_FORMULA else "?"
        macs = formula if each.unknown else scaled(each.macs) if each.macs else NONE
        share = f"{each.macs / total:.0%}" if each.macs and not found.arithmetic.unknown else ""
        table.add_row(text(each.operator), count(each.count), macs, share)
    rest = [each for each in found.operators if each not in common and each not in costly]
    if rest:
        more = f"{len(rest)} more operators"
        table.add_row(text(more, "dim"), count(sum(each.count for each in rest)), "", "")
    return table


def _tensors(found: Inspection, top: int | None) -> RenderableType:
    from graphopt.cli.console import NONE, count, grid, size, text

    table = grid("largest constants", "type", "size", "zeros", right="23")
    for each in found.tensors[:top]:
        shape = ", ".join(map(str, each.shape))
        stored = "" if each.storage == "inline" else f" {each.storage}"
        zeros = NONE if each.sparsity is None else f"{each.sparsity:.1%}"
        table.add_row(
            text(each.name), text(f"{each.dtype}[{shape}]{stored}"), size(each.bytes), zeros
        )
    rest = found.tensors[len(found.tensors[:top]) :]
    if rest:
        more = f"{count(len(rest))} more"
        table.add_row(text(more, "dim"), "", size(sum(each.bytes for each in rest)), "")
    return table
