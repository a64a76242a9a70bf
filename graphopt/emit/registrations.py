"""Whether an execution provider of ONNX Runtime has a kernel for a node: the runtime's own look-up, done statically.

Source: onnxruntime/core/framework/kernel_registry.cc (version and type match) and kernel_type_str_resolver.cc (which
operands a type constraint of a kernel speaks of), ONNX Runtime 1.31.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.emit.sites import Site, type_text
from graphopt.ir import operators
from graphopt.runtime.installed import has_locale, installed_kernels, operator_schemas
from graphopt.targets.kernels import Kernel, KernelTable, packaged_kernels

# Settings that constructors of kernels throw at (onnxruntime/core/providers/cpu/rnn/*.h).
_REFUSED_SETTINGS = dict.fromkeys(("GRU", "LSTM", "RNN"), ("layout", 1))
_INSTALLED = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}


def kernel_table(name: str) -> KernelTable:
    """A kernel table: that of the installed wheel where it has the provider, else the packaged one."""
    return installed_kernels(_INSTALLED[name]) or packaged_kernels(name)


@dataclasses.dataclass(frozen=True)
class LookUp:
    """What looking for a kernel gave: the kernel, or the reason that there is none."""

    kernel: Kernel | None
    reason: str = ""


def find_kernel(table: KernelTable, site: Site) -> LookUp:
    """The kernel that `table` has for the node."""
    node = site.node
    rows = table.find(site.domain, node.op_type)
    if not rows:
        return LookUp(None, f"{table.provider} has no kernel for {site.op}")
    schema = runtime_schema(site)
    if schema is None:
        return LookUp(None, f"no operator {site.op} in opset {site.opset} of its domain")
    version = int(schema.since_version)
    fitting = [row for row in rows if row.serves(version)]
    if not fitting:
        known = ", ".join(sorted({_range(row) for row in rows}))
        return LookUp(
            None,
            f"{table.provider} has kernels for {site.op} of versions {known}, not for {version}",
        )
    if (fault := _unbound(site, schema)) is not None:
        return LookUp(None, fault)
    operands = constraint_types(site, schema)
    for row in fitting:
        if all(operands.get(name) in (None, *allowed) for name, allowed in row.types.items()):
            return LookUp(row)
    return LookUp(None, _type_reason(table, site, fitting, operands))


def runtime_schema(site: Site) -> Any:  # noqa: ANN401  of onnx or of ONNX Runtime, which have the same members
    """The schema by which ONNX Runtime reads the node; None where the operator is unknown to it."""
    known = operator_schemas().get((site.domain, site.node.op_type), ())
    fitting = [each for each in known if each.since_version <= site.opset]
    if fitting:
        return fitting[-1]
    return operators.find_schema(site.node.op_type, site.opset, site.domain) if site.opset else None


def has_function_body(site: Site) -> bool:
    """Whether the operator is defined by a function of other operators, which the runtime puts in its place."""
    if operator_schemas() and (site.domain, site.node.op_type) not in operator_schemas():
        return False
    schema: Any = operators.find_schema(site.node.op_type, site.opset, site.domain)
    return schema is not None and bool(schema.has_function or schema.has_context_dependent_function)


def schema_fault(site: Site) -> str | None:
    """An attribute that the installed runtime's schema does not know, or a setting that its kernel refuses."""
    schema = runtime_schema(site)
    if schema is None or not site.node.attributes:
        return None
    unknown = [name for name in site.node.attributes if name not in schema.attributes]
    if unknown and site.domain in ("", "com.microsoft"):
        return (
            f"attribute {unknown[0]!r} of {site.op} is newer than the schema that the runtime has, "
            f"version {schema.since_version}"
        )
    held = _REFUSED_SETTINGS.get(site.node.op_type)
    if held is not None and not site.domain and site.attribute(held[0]) == held[1]:
        return f"{site.op} with {held[0]} = {held[1]} is not implemented"
    locale = _locale(site)
    if locale and not has_locale(locale):
        return f"{site.op} needs the locale {locale!r}, which this machine does not have"
    return None


def _locale(site: Site) -> str:
    """The locale that a StringNormalizer loads when it is made, where it changes cases or stop words ignore them."""
    if site.node.op_type != "StringNormalizer" or site.domain:
        return ""
    changes = site.attribute("case_change_action") != "NONE"
    ignores = not site.attribute("is_case_sensitive") and "stopwords" in site.node.attributes
    named = site.attribute("locale")
    return (
        (named if isinstance(named, str) and named else "en_US.UTF-8") if changes or ignores else ""
    )


def constraint_types(site: Site, schema: Any) -> dict[str, str]:  # noqa: ANN401
    """The type of the first present operand of each type constraint and each formal name, as far as it is known."""
    found: dict[str, str] = {}
    pairs = (
        *_bound(schema.inputs, site.node.inputs),
        *_bound(schema.outputs, site.node.outputs),
    )
    for formal, value in pairs:
        if value is None or not value.name:
            continue
        text = type_text(site, value)
        if text is None:
            continue
        for name in (_type_name(formal), formal.name):
            found.setdefault(name, text)
    return found


def _unbound(site: Site, schema: Any) -> str | None:  # noqa: ANN401
    """Operands that one type constraint binds to different types, which the runtime calls a type error."""
    found: dict[str, str] = {}
    for formal, value in _bound(schema.inputs, site.node.inputs):
        name = _type_name(formal)
        if value is None or not value.name or "(" in name:
            continue
        text = type_text(site, value)
        if text is not None and found.setdefault(name, text) != text:
            return f"{site.op}: its operands {name} are {found[name]} and {text}, and must be alike"
    return None


def _bound(
    formals: Sequence[Any], actual: Sequence[ir.Value | None]
) -> Iterator[tuple[Any, ir.Value | None]]:
    return zip(formals, actual, strict=False)


def _type_name(formal: Any) -> str:  # noqa: ANN401
    return str(getattr(formal, "type_str", None) or getattr(formal, "typeStr", ""))


def _range(kernel: Kernel) -> str:
    return str(kernel.since) if kernel.until is None else f"{kernel.since}-{kernel.until}"


def _type_reason(
    table: KernelTable, site: Site, rows: Sequence[Kernel], operands: dict[str, str]
) -> str:
    for name in rows[0].types:
        seen = operands.get(name)
        allowed = {text for row in rows for text in row.types.get(name, ())}
        if seen is not None and seen not in allowed:
            return (
                f"{table.provider} has no kernel for {site.op} with {name} = {seen}; "
                f"it has {', '.join(sorted(allowed))}"
            )
    seen = ", ".join(f"{name} = {text}" for name, text in operands.items() if name in rows[0].types)
    return f"{table.provider} has no kernel for {site.op} with {seen} together"
