"""Kernel tables: which operators, versions and element types an execution provider of ONNX Runtime registers.

A table is packaged as JSON; of the provider on the CPU, the one of the installed wheel is better (`graphopt.runtime`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, TypeAlias

Types: TypeAlias = Mapping[str, frozenset[str]]
Key: TypeAlias = tuple[str, str]

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One registration.

    Attributes:
        since: first version of the operator that the kernel serves.
        until: last version, or None where it serves the version `since` alone, as long as that is the newest.
        types: element types by type constraint (or operand name) of the operator: `float`, `int64`, `seq(float)` …
    """

    since: int
    until: int | None
    types: Types

    def serves(self, version: int) -> bool:
        """Whether ONNX Runtime picks the kernel for an operator that was last changed in `version`.

        An open-ended kernel serves the version that it was registered for and no newer one
        (onnxruntime/core/framework/kernel_registry.cc, `VerifyVersion`).
        """
        if self.until is None:
            return version == self.since
        return self.since <= version <= self.until


@dataclasses.dataclass(frozen=True)
class KernelTable:
    """The registrations of one execution provider.

    Attributes:
        provider: its name, `CPUExecutionProvider`.
        version: of ONNX Runtime.
        source: where the table comes from.
        kernels: by (domain, operator).
    """

    provider: str
    version: str
    source: str
    kernels: Mapping[Key, tuple[Kernel, ...]]

    def find(self, domain: str, op_type: str) -> tuple[Kernel, ...]:
        """The registrations of an operator; none where the provider has no kernel for it."""
        return self.kernels.get((domain, op_type), ())


def packaged_kernels(name: str) -> KernelTable:
    """The table that ships with graphopt: `ort-cpu` or `ort-cuda`."""
    return _load(f"{name.replace('-', '_')}.json")


@functools.cache
def _load(file: str) -> KernelTable:
    return unpack(json.loads((files("graphopt.targets") / "tables" / file).read_bytes()))


def unpack(body: Mapping[str, Any]) -> KernelTable:
    """The table that the JSON of a file describes."""
    lists = [frozenset(names) for names in body["types"]]
    kernels: dict[Key, tuple[Kernel, ...]] = {}
    for domain, operators in body["kernels"].items():
        for op_type, rows in operators.items():
            kernels[domain, op_type] = tuple(
                Kernel(since, until, {name: lists[index] for name, index in types.items()})
                for since, until, types in rows
            )
    header = body["header"]
    return KernelTable(header["provider"], header["version"], header["source"], kernels)


def pack(table: KernelTable, licence: str) -> dict[str, Any]:
    """The JSON of a table; equal tables give equal JSON."""
    numbers: dict[tuple[str, ...], int] = {}
    kernels: dict[str, dict[str, list[Any]]] = {}
    for (domain, op_type), rows in sorted(table.kernels.items()):
        packed = [
            [
                row.since,
                row.until,
                {
                    name: numbers.setdefault(tuple(sorted(allowed)), len(numbers))
                    for name, allowed in sorted(row.types.items())
                },
            ]
            for row in sorted(merged(rows), key=_order)
        ]
        kernels.setdefault(domain, {})[op_type] = packed
    header = {
        "schema": SCHEMA,
        "provider": table.provider,
        "version": table.version,
        "source": table.source,
        "licence": licence,
    }
    return {"header": header, "types": [list(names) for names in numbers], "kernels": kernels}


def merged(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """The same registrations in fewer rows: rows that differ in the types of one constraint are joined."""
    rows = list(kernels)
    joined = True
    while joined:
        joined = False
        for index, row in enumerate(rows):
            mate = next((each for each in rows[index + 1 :] if _joinable(row, each)), None)
            if mate is not None:
                types = {name: row.types[name] | mate.types[name] for name in row.types}
                rows[index] = Kernel(row.since, row.until, types)
                rows.remove(mate)
                joined = True
                break
    return tuple(rows)


def _joinable(a: Kernel, b: Kernel) -> bool:
    if (a.since, a.until, a.types.keys()) != (b.since, b.until, b.types.keys()):
        return False
    return sum(a.types[name] != b.types[name] for name in a.types) <= 1


def _order(kernel: Kernel) -> tuple[int, int, Sequence[tuple[str, list[str]]]]:
    types = sorted((name, sorted(allowed)) for name, allowed in kernel.types.items())
    return (kernel.since, kernel.until or 1 << 30, types)
