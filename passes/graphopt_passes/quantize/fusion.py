"""Proof on the deployed runtime: what it made of each Q and DQ, and which of its rules the rest broke.

Source: ONNX Runtime 1.31.1, qdq_selectors.cc; rules G1 to G4 were checked by building graphs and reading them back.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.model_file import load_model
from graphopt.rewrite import name_of
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt_passes.quantize.files import on_disk

ENCODE = "QuantizeLinear"
DECODE = "DequantizeLinear"


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What the runtime made of Q and DQ.

    Attributes:
        leftovers: what runs in float although its input was decoded for it: names of its outputs, and the rule broken.
        edges: Q and DQ between integers and float, where the two meet on purpose.
        kernels: what became of each site, by name: the operator that the runtime runs.
    """

    leftovers: dict[str, str]
    edges: int
    kernels: dict[str, str]


def read_fusion(model: ir.Model, integer: Sequence[str], *, signed: bool = False) -> Fusion:
    """How the runtime fuses `model`, read back from the graph that it would run.

    Args:
        model: the quantised model.
        integer: names of outputs of the nodes that shall run on integers.
        signed: whether activations are signed bytes, for a processor that takes them as they are.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        # Weights of the written graph lie beside it: as one message it could pass 2 GiB.
        options = SessionOptions(
            prepack=False,
            signed=signed,
            optimized_path=optimized,
            optimized_weights="weights.bin",
        )
        with on_disk(model) as source:
            Session(source, level=OptimizationLevel.EXTENDED, options=options)
        return _classified(model, load_model(optimized), frozenset(integer))


def _classified(model: ir.Model, deployed: ir.Model, integer: frozenset[str]) -> Fusion:
    makers = {v.name: node for node in model.graph for v in node.outputs}
    readers = _weight_readers(model)
    leftovers: dict[str, str] = {}
    edges = 0
    for node in deployed.graph:
        if node.op_type in (ENCODE, DECODE):
            edges += 1
            continue
        decoded = [v for v in node.inputs if v is not None and _maker(v) == DECODE]
        names = [v.name for v in node.outputs if v.name and v.name in integer] if decoded else []
        # Fused with what is behind it, a product goes by another name; that of its weight stays.
        names += [name for v in decoded if (name := readers.get(v.name)) in integer and name]
        for name in names:
            leftovers[name] = _rule(makers.get(name), node.op_type)
    return Fusion(leftovers, edges, _kernels(model, deployed, integer))


def _kernels(model: ir.Model, deployed: ir.Model, integer: frozenset[str]) -> dict[str, str]:
    """The operators that compute the results of sites, or what alone reads them and was fused with them."""
    made = {value.name: node.op_type for node in deployed.graph for value in node.outputs}
    found: dict[str, str] = {}
    for node in model.graph:
        if name_of(node) not in integer or node.op_type in (ENCODE, DECODE):
            continue
        value = node.outputs[0]
        for _ in range(_FUSED_BEHIND):
            kind = made.get(value.name)
            uses = tuple(value.uses())
            if kind not in (None, ENCODE, DECODE):
                found[name_of(node)] = kind or ""
                break
            if len(uses) != 1:
                break
            value = uses[0].node.outputs[0]
    return found


_FUSED_BEHIND = 4
"""A product, the sum behind it, an activation, QuantizeLinear."""


def _maker(value: ir.Value) -> str:
    maker = value.producer()
    return "" if maker is None else maker.op_type


def _weight_readers(model: ir.Model) -> dict[str | None, str]:
    """Who reads each decoded constant, by name."""
    return {
        node.outputs[0].name: name_of(use.node)
        for node in model.graph
        if node.op_type == DECODE and values.is_constant(node.inputs[0])
        for use in node.outputs[0].uses()
    }


def _rule(node: ir.Node | None, became: str) -> str:
    """The rule of the runtime that a node breaks which it left in float."""
    if node is None or node.op_type == DECODE:
        return f"it became {became}, for which there is no integer kernel"
    plain = [v for v in node.inputs if v is not None and not _is_decoded(v)]
    if plain and node.op_type in ("Conv", "MatMul", "Gemm", "Add", "Mul", "Concat"):
        return f"operand '{plain[0].name}' is not decoded from integers, and all must be"
    stored = _stored(node)
    if stored:
        return stored
    return f"it became {became}, for which there is no integer kernel"


def _is_decoded(value: ir.Value) -> bool:
    return _maker(value) == DECODE


def _stored(node: ir.Node) -> str:
    """What hinders the result of a node from being stored by one QuantizeLinear; empty where nothing does."""
    if node.op_type in ("MatMul", "Gemm"):
        return ""
    value = node.outputs[0]
    uses = tuple(value.uses())
    if value.is_graph_output():
        return "its result is an output of the model, and must be stored in 8 bits alone"
    if len(uses) != 1:
        return f"its result is read {len(uses)} times, and must be read by one QuantizeLinear alone"
    reader = uses[0].node
    if reader.op_type in ("Relu", "Clip"):
        return _stored(reader) or _kept(reader)
    if reader.op_type != ENCODE:
        return f"{reader.op_type} lies between it and QuantizeLinear; only Relu and Clip may"
    return ""


_LEAST = {ir.DataType.UINT8: 0, ir.DataType.INT8: -128}


def _kept(node: ir.Node) -> str:
    """Why storing does not make a Relu redundant; empty where it does, and of a Clip."""
    encode = next(iter(node.outputs[0].uses())).node
    zero = values.array(encode.inputs[2]) if len(encode.inputs) > 2 else None
    kind = None if zero is None else ir.DataType.from_numpy(zero.dtype)
    if node.op_type != "Relu" or zero is None or kind not in _LEAST or zero == _LEAST[kind]:
        return ""
    return f"the zero point {zero.item()} behind {node.op_type} is not the least code, so that storing does not clip"
