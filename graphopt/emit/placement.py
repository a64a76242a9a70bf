"""Where ONNX Runtime runs each node: which provider, at what cost in copies, or nowhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt.emit.bodies import expanded
from graphopt.emit.findings import Copies, Finding, NodeVerdict, Verdict
from graphopt.emit.registrations import (
    find_kernel,
    has_function_body,
    kernel_table,
    schema_fault,
)
from graphopt.emit.sites import Site, all_sites
from graphopt.ir import values
from graphopt.ir.shapes import Shapes
from graphopt.targets.kernels import KernelTable

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# Operands that a CUDA kernel reads, or results that it leaves, in host memory
# (onnxruntime/core/providers/cuda: InputMemoryType(OrtMemTypeCPUInput, …), OutputMemoryType(OrtMemTypeCPUOutput, …)).
HOST_INPUTS: Mapping[str, frozenset[int]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split"), frozenset({1})),
    **dict.fromkeys(
        ("TopK", "Trilu", "OneHot", "CumSum", "Upsample", "Dropout"), frozenset({1, 2})
    ),
    **{
        f"Reduce{kind}": frozenset({1})
        for kind in (
            "L1",
            "L2",
            "LogSum",
            "LogSumExp",
            "Max",
            "Mean",
            "Min",
            "Prod",
            "Sum",
            "SumSquare",
        )
    },
    "Slice": frozenset({1, 2, 3, 4}),
    "Pad": frozenset({1, 2, 3}),
    "Resize": frozenset({1, 2, 3}),
    "ConstantOfShape": frozenset({0}),
    "Range": frozenset({0, 1, 2}),
    "NonMaxSuppression": frozenset({2, 3, 4}),
    "If": frozenset({0}),
    "Loop": frozenset({0, 1}),
}
HOST_OUTPUTS = frozenset({"Shape", "Size"})
_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
_SOURCE = "kernel registrations: {0.source}, version {0.version}"


@dataclasses.dataclass(frozen=True)
class Placed:
    """A node and what becomes of it."""

    site: Site
    provider: str
    finding: Finding | None = None

    def verdict(self) -> NodeVerdict:
        """The same in the words of the report."""
        judged = Verdict.OK if self.finding is None else self.finding.verdict
        return NodeVerdict(
            self.site.label, self.site.op, self.site.scope.path, judged, self.provider
        )


def place(
    sites: Sequence[Site],
    tables: Sequence[str],
    functions: Iterable[ir.OperatorIdentifier],
    claimed: Mapping[Site, Finding | None] | None = None,
) -> list[Placed]:
    """Where each node runs.

    Args:
        sites: the nodes.
        tables: kernel tables in the order in which their providers are asked.
        functions: local functions of the model; their calls are replaced by their bodies.
        claimed: what a provider ahead of the tables said: None where it takes the node, its objection otherwise.
    """
    held = [kernel_table(name) for name in tables]
    local = set(functions)
    placed: list[Placed] = []
    host: set[ir.Value] = set()
    for site in sites:
        if site.node.op_identifier() in local or _is_stored(site):
            placed.append(Placed(site, ""))
            continue
        found = _place(site, held, host, claimed or {})
        placed.append(found)
        if _leaves_on_host(found):
            host.update(site.node.outputs)
    return placed


def copies(placed: Sequence[Placed]) -> Copies:
    """The copies between host and device that a run needs.

    One a value and direction: the runtime copies a value once for all its consumers, and holds weights on both sides
    (onnxruntime/core/framework/transformer_memcpy.cc).
    """
    on_host = {
        output: _leaves_on_host(each) for each in placed for output in each.site.node.outputs
    }
    to_host: dict[str, None] = {}
    to_device: dict[str, None] = {}
    fed: dict[ir.Value, set[bool]] = {}
    for value, wants_host in _reads(placed):
        if value not in on_host:
            fed.setdefault(value, set()).add(wants_host)
        elif wants_host != on_host[value]:
            (to_host if wants_host else to_device)[value.name or ""] = None
    # A graph input is fed where it is needed, unless both sides need it.
    to_device.update((value.name or "", None) for value, sides in fed.items() if len(sides) > 1)
    return Copies(tuple(to_host), tuple(to_device))


def _reads(placed: Sequence[Placed]) -> Iterator[tuple[ir.Value, bool]]:
    """Every computed or fed operand, and whether its reader wants it in host memory."""
    for each in placed:
        if not each.provider:
            continue
        for index, value in enumerate(each.site.node.inputs):
            if value is not None and not values.is_constant(value):
                yield value, each.provider == CPU or _reads_on_host(each, index)


def _place(
    site: Site,
    tables: Sequence[KernelTable],
    host: set[ir.Value],
    claimed: Mapping[Site, Finding | None],
) -> Placed:
    objection = claimed.get(site)
    if site in claimed and objection is None:
        return Placed(site, "TensorrtExecutionProvider")
    reasons = [] if objection is None else [objection.reason]
    if (fault := schema_fault(site)) is not None:
        return Placed(site, "", _refused(site, fault, f"ONNX Runtime {tables[-1].version}"))
    for table in tables:
        found = find_kernel(table, site)
        if found.kernel is None:
            reasons.append(found.reason)
            continue
        if table.provider != CPU and _is_shape_arithmetic(site, host):
            continue  # the runtime keeps small integers where they are
        return Placed(site, table.provider, _fallback(site, table, reasons))
    return _without_kernel(site, tables, reasons)


def _fallback(site: Site, table: KernelTable, reasons: Sequence[str]) -> Finding | None:
    if not reasons:
        return None
    return Finding(
        Verdict.FALLS_BACK,
        reasons[-1],
        _SOURCE.format(table),
        "keep it out of loops and of the hot path; a standard operator, or float32, may have a kernel",
        site.label,
        site.op,
        site.scope.path,
        table.provider,
    )


def _without_kernel(site: Site, tables: Sequence[KernelTable], reasons: Sequence[str]) -> Placed:
    """A node for which no provider has a kernel: cast, replaced by its body, or refused."""
    cpu = tables[-1]
    halves = any(site.dtype(index) == "FLOAT16" for index in range(len(site.node.inputs)))
    if halves and _float32_kernel(cpu, site):
        return Placed(site, CPU, _cast(site, cpu))
    if has_function_body(site):
        fault = _body_fault(site, tables)
        if fault is None:
            return Placed(site, tables[0].provider)
        reasons = [f"{fault}, which the function that defines {site.op} needs"]
    reason = reasons[-1] if reasons else f"no kernel for {site.op}"
    return Placed(site, "", _refused(site, reason, _SOURCE.format(cpu)))


def _refused(site: Site, reason: str, source: str) -> Finding:
    return Finding(
        Verdict.REFUSED, reason, source, remedy_for(site), site.label, site.op, site.scope.path
    )


def _body_fault(site: Site, tables: Sequence[KernelTable]) -> str | None:
    """What in the body of the function that defines the operator has no kernel; None where all of it has."""
    body = expanded(site)
    if body is None:
        return None
    for inner in all_sites(body, Shapes(body)):
        if _is_stored(inner):
            continue
        placed = _place(inner, tables, set(), {})
        if placed.finding is not None and placed.finding.verdict is Verdict.REFUSED:
            return placed.finding.reason
    return None


def _cast(site: Site, table: KernelTable) -> Finding:
    return Finding(
        Verdict.WARNING,
        f"{site.op} has no float16 kernel on the CPU: it runs in float32 between two Casts",
        "onnxruntime/core/optimizer/insert_cast_transformer.cc; " + _SOURCE.format(table),
        "keep it in float32 for this target (--precision fp32)",
        site.label,
        site.op,
        site.scope.path,
        CPU,
    )


def _float32_kernel(table: KernelTable, site: Site) -> bool:
    """Whether the kernel is there once float16 operands have become float32."""
    return find_kernel(table, dataclasses.replace(site, shapes=_Widened(site))).kernel is not None  # type: ignore[arg-type]


class _Widened:
    """What is known of values, with float32 where float16 was."""

    def __init__(self, site: Site) -> None:
        self._shapes = site.shapes

    def facts(self, value: ir.Value) -> _WidenedFacts:
        kind = self._shapes.facts(value).type or value.type
        if kind == ir.TensorType(ir.DataType.FLOAT16):
            kind = ir.TensorType(ir.DataType.FLOAT)
        return _WidenedFacts(kind)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        known = self._shapes.dtype(value)
        return ir.DataType.FLOAT if known == ir.DataType.FLOAT16 else known


@dataclasses.dataclass(frozen=True)
class _WidenedFacts:
    type: ir.TypeProtocol | None


def remedy_for(site: Site) -> str:
    """What to do about a node that ONNX Runtime has no kernel for."""
    if site.domain not in ("", "ai.onnx", "ai.onnx.ml", "com.microsoft"):
        return "load the library that implements the operator with register_custom_ops_library, or replace it"
    if site.node.op_type == "StringNormalizer":
        return "install the locale where the model runs, or export with the locale C"
    dtypes = {site.dtype(index) for index in range(len(site.node.inputs))} - {None}
    if "DOUBLE" in dtypes:
        return "export in float32, or run the pass cast-doubles"
    if dtypes & {"BFLOAT16", "FLOAT16"}:
        return "cast around it to float32"
    if dtypes & {"INT8", "INT16", "UINT8", "UINT16", "UINT32", "UINT64"}:
        return "cast around it to int32 or int64"
    return "export with another opset, or express it by other operators"


def _is_stored(site: Site) -> bool:
    """Whether the node is a constant: the runtime makes an initializer of it when it loads the model."""
    return site.node.op_type == "Constant" and not site.domain


def _is_shape_arithmetic(site: Site, host: set[ir.Value]) -> bool:
    """Whether all that the node reads is in host memory, and is integers.

    Source: onnxruntime/core/framework/fallback_cpu_capability.cc.
    """
    fed = [v for v in site.node.inputs if v is not None and not values.is_constant(v)]
    if not fed or site.node.op_type in HOST_OUTPUTS or not all(v in host for v in fed):
        return False
    return not any(site.dtype_of(v) in _FLOATS for v in (*fed, *site.node.outputs))


def _leaves_on_host(placed: Placed) -> bool:
    if placed.provider != CUDA:
        return placed.provider == CPU
    return placed.site.node.op_type in HOST_OUTPUTS


def _reads_on_host(placed: Placed, index: int) -> bool:
    if placed.provider != CUDA or placed.site.domain:
        return False
    return index in HOST_INPUTS.get(placed.site.node.op_type, ())
