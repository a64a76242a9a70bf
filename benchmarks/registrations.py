"""Whether the check finds a kernel exactly where ONNX Runtime registers one: each operator, version and element type.

    python benchmarks/registrations.py [--reference FILE]

cpu   against get_all_opkernel_def() of the installed wheel.
cuda  against FILE, a list of registrations {"kernels": [{"provider", "domain", "op", "since", "until", "types"}]} that
      was read from the wheel onnxruntime-gpu; the packaged table itself where none is given.

For each operator and each version of it, one node a type: every type that the operator's schema admits for one
constraint, the others at what a kernel takes.  The check must find a kernel where a registration fits, and nowhere
else.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx.defs
import onnx_ir as ir

from graphopt.emit.registrations import constraint_types, find_kernel, kernel_table, runtime_schema
from graphopt.emit.sites import Site, dtype_text
from graphopt.ir.scopes import Scope
from graphopt.ir.shapes import Shapes
from graphopt.runtime.installed import operator_schemas
from graphopt.targets.kernels import Kernel, KernelTable, packaged_kernels

NAMES = {dtype_text(each.name): each for each in ir.DataType}
PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}


def registered(name: str, reference: Path | None) -> dict[tuple[str, str], list[Kernel]]:
    """What is registered, by (domain, operator)."""
    if name == "ort-cpu" or reference is None:
        table = kernel_table(name) if name == "ort-cpu" else packaged_kernels(name)
        return {key: list(rows) for key, rows in table.kernels.items()}
    found: dict[tuple[str, str], list[Kernel]] = collections.defaultdict(list)
    for row in json.loads(reference.read_text(encoding="utf-8"))["kernels"]:
        if row["provider"] == PROVIDERS[name]:
            found[row["domain"], row["op"]] += _rows(row)
    return dict(found)


def _rows(row: Mapping[str, Any]) -> Iterator[Kernel]:
    """One registration each: a list may say which types of several constraints go together."""
    types = {key: frozenset(allowed) for key, allowed in row["types"].items()}
    for combination in row.get("combos", [()]):
        pairs = zip(row.get("combo_names", ()), combination, strict=True)
        together = {name: frozenset([text]) for name, text in pairs}
        yield Kernel(row["since"], row["until"], {**types, **together})


def schemas(domain: str, op_type: str) -> list[Any]:
    """Every version of an operator's schema that the runtime knows, one each."""
    held = [
        s
        for s in onnx.defs.get_all_schemas_with_history()
        if s.name == op_type and s.domain == domain
    ]
    return [s for s in held if s.since_version <= 26] or list(
        operator_schemas().get((domain, op_type), ())
    )


def typed(text: str) -> ir.TypeProtocol | None:
    """The type that a table writes as `float` or `seq(tensor(float))`."""
    for word, kind in (("seq", ir.SequenceType), ("optional", ir.OptionalType)):
        if text.startswith(f"{word}("):
            inner = typed(text[len(word) + 1 : -1])
            return None if inner is None else kind(inner)
    name = re.sub(r"^tensor\((.*)\)$", r"\1", text)
    return ir.TensorType(NAMES[name]) if name in NAMES else None


def cases(schema: Any, rows: Sequence[Kernel]) -> Iterator[dict[str, str]]:  # noqa: ANN401
    """Types by constraint: each admitted type of one, the others as some kernel takes them."""
    admitted = {
        _constraint(c): [
            text.removeprefix("tensor(").removesuffix(")") if text.startswith("tensor(") else text
            for text in _allowed(c)
        ]
        for c in schema.type_constraints
    }
    bases: list[dict[str, str]] = [{name: texts[0] for name, texts in admitted.items() if texts}]
    for row in rows:
        held = {name: min(allowed) for name, allowed in row.types.items() if name in admitted}
        bases.append({**bases[0], **held})
    seen = set()
    for base, (name, texts) in itertools.product(bases, admitted.items()):
        for text in texts:
            case = {**base, name: text}
            key = tuple(sorted(case.items()))
            if key not in seen:
                seen.add(key)
                yield case


def _constraint(constraint: Any) -> str:  # noqa: ANN401
    return str(getattr(constraint, "type_param_str", "") or constraint.typeParamStr)


def _allowed(constraint: Any) -> list[str]:  # noqa: ANN401
    return list(getattr(constraint, "allowed_type_strs", None) or constraint.allowedTypeStrs)


def node_of(schema: Any, domain: str, types: Mapping[str, str]) -> Site | None:  # noqa: ANN401
    """A node with an operand for each formal of the schema; None where a type cannot be written."""
    operands: list[ir.Value] = []
    for formal in (*schema.inputs, *schema.outputs):
        text = types.get(_type_of(formal), _type_of(formal))
        plain = re.sub(r"^tensor\((.*)\)$", r"\1", text)
        kind = typed(plain)
        if kind is None:
            return None
        operands.append(ir.Value(name=f"v{len(operands)}", type=kind))
    count = len(schema.inputs)
    node = ir.Node(domain, schema.name, operands[:count], outputs=operands[count:], name="n")
    graph = ir.Graph(
        operands[:count],
        operands[count:],
        nodes=[node],
        opset_imports={domain: schema.since_version},
    )
    model = ir.Model(graph, ir_version=10)
    scope = Scope(graph, model.opset_imports)
    site = Site(node, scope, Shapes(model), domain, schema.since_version)
    return dataclasses.replace(site, shapes=_Stated(site))  # type: ignore[arg-type]


class _Stated:
    """Types as they were stated: what inference would make of a node is not asked here."""

    def __init__(self, site: Site) -> None:
        del site

    def facts(self, value: ir.Value) -> ir.Value:
        return value

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        return value.dtype


def _type_of(formal: Any) -> str:  # noqa: ANN401
    return str(getattr(formal, "type_str", None) or getattr(formal, "typeStr", ""))


def fits(rows: Sequence[Kernel], version: int, operands: Mapping[str, str]) -> bool:
    """Whether a registration serves the version and takes the types."""
    return any(
        row.serves(version)
        and all(operands.get(name) in (None, *allowed) for name, allowed in row.types.items())
        for row in rows
    )


def agreement(name: str, reference: Path | None) -> tuple[int, int]:
    """How often the check and the registrations say the same, of how many."""
    known, table = registered(name, reference), kernel_table(name)
    right = total = 0
    for (domain, op_type), rows in sorted(known.items()):
        for schema in schemas(domain, op_type):
            for types in cases(schema, rows):
                same = judged(schema, domain, types, rows, table)
                if same is None:
                    continue
                total += 1
                right += same
                if not same:
                    print(f"{name}: {domain}::{op_type} version {schema.since_version}: {types}")
    return right, total


def judged(
    schema: Any,  # noqa: ANN401
    domain: str,
    types: Mapping[str, str],
    rows: Sequence[Kernel],
    table: KernelTable,
) -> bool | None:
    """Whether both say the same of one node; None where it cannot be made."""
    site = node_of(schema, domain, types)
    if site is None:
        return None
    seen = runtime_schema(site)
    if seen is None:
        return None
    operands = constraint_types(site, seen)
    return (find_kernel(table, site).kernel is not None) == fits(rows, seen.since_version, operands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path)
    given = parser.parse_args()
    for name in PROVIDERS:
        right, total = agreement(name, given.reference)
        source = "the wheel" if name == "ort-cpu" else given.reference or "the packaged table"
        print(f"{name}: {right} of {total} agree with {source} ({right / total:.2%})")


if __name__ == "__main__":
    main()
