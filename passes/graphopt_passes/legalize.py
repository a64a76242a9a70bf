"""What a target does not take, written so that it does: float64, names in branches, axes of scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.rewrite import Context

_DOUBLE, _FLOAT = ir.DataType.DOUBLE, ir.DataType.FLOAT
_TYPE_ATTRIBUTES = {
    "Cast": "to",
    "EyeLike": "dtype",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniformLike": "dtype",
    "Multinomial": "dtype",
    "Bernoulli": "dtype",
}


@dataclasses.dataclass(frozen=True)
class CastDoubles:
    """Computes in float32 what the model computes in float64; inputs and outputs keep their types.

    Before:  (double[N] x) => (double[N] y)   y = Exp(x)
    After:   (double[N] x) => (double[N] y)   y = Cast<to = double>(Exp(Cast<to = float>(x)))
    Subgraphs and local functions are entered.  Changes numerics: lossy.  Leaves alone: models in which a function's
    element types are parameters.
    """

    name: ClassVar[str] = "cast-doubles"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if not _is_wide(model):
            return False
        where = model.graph.name or "main"
        if any(_states_by_parameter(node) for scope in all_graphs(model) for node in scope.graph):
            ctx.missed(self.name, where, "a function's element types are parameters: inline it")
            return False
        if not ctx.permit(self.name, where, self.numerics):
            return False
        wide = {v for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype == _DOUBLE}
        for scope in all_graphs(model):
            for value in scope.graph.initializers.values():
                _narrow_constant(value)
            for node in scope.graph:
                _narrow_attributes(node)
        for value in _values(model):
            if value.dtype == _DOUBLE and value not in wide:
                value.type = ir.TensorType(_FLOAT)
        self._casts(model, ctx)
        ctx.refresh()
        return True

    def _casts(self, model: ir.Model, ctx: Context) -> None:
        """Casts behind the inputs and before the outputs that stay float64."""
        graph = model.graph
        for value in [v for v in graph.inputs if v.dtype == _DOUBLE and not v.is_initializer()]:
            uses = value.uses()
            cast = _cast(value, _FLOAT, ctx)
            for use in uses:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            first = next(iter(graph), None)
            if first is None:
                graph.append(cast)
            else:
                graph.insert_before(first, cast)
        for index, value in enumerate(graph.outputs):
            if value.dtype != _DOUBLE or value.producer() is None:
                continue
            name, value.name = value.name, ctx.names.fresh(f"{value.name}_float")
            value.type = ir.TensorType(_FLOAT)
            cast = _cast(value, _DOUBLE, ctx)
            cast.outputs[0].name = name
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def _is_wide(model: ir.Model) -> bool:
    """Whether anything is computed in float64; values in functions have no types, so their constants count."""
    if any(_computes_wide(value) for value in _values(model)):
        return True
    bodies = [scope.graph for scope in all_graphs(model) if scope.function is not None]
    return any(_holds_wide(node) for graph in bodies for node in graph)


def _holds_wide(node: ir.Node) -> bool:
    held = node.attributes.get(_TYPE_ATTRIBUTES.get(node.op_type, "") if not node.domain else "")
    if held is not None and not held.is_ref() and held.value == int(_DOUBLE):
        return True
    tensors = [a for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR]
    return any(not a.is_ref() and a.as_tensor().dtype == _DOUBLE for a in tensors)


def _states_by_parameter(node: ir.Node) -> bool:
    stated = node.attributes.get(_TYPE_ATTRIBUTES.get(node.op_type, "") if not node.domain else "")
    return stated is not None and stated.is_ref()


def _cast(value: ir.Value, dtype: ir.DataType, ctx: Context) -> ir.Node:
    base = value.name or "value"
    attribute = ir.AttrInt64("to", int(dtype))
    node = ir.Node("", "Cast", [value], [attribute], name=ctx.names.fresh(f"{base}_Cast"))
    out = node.outputs[0]
    out.name, out.shape = ctx.names.fresh(f"{base}_{dtype.name.lower()}"), value.shape
    out.type = ir.TensorType(dtype)
    return node


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for scope in all_graphs(model):
        yield from scope.graph.inputs
        yield from scope.graph.initializers.values()
        for node in scope.graph:
            yield from node.outputs


def _computes_wide(value: ir.Value) -> bool:
    """Whether a value is float64 and more than an input on its way into a Cast, or an output on its way out of one."""
    if value.dtype != _DOUBLE:
        return False
    if value.is_graph_input() and not value.is_initializer():
        return value.is_graph_output() is False and any(
            use.node.op_type != "Cast" for use in value.uses()
        )
    maker = value.producer()
    is_cast = maker is not None and maker.op_type == "Cast" and value.is_graph_output()
    return not (is_cast and not value.uses())


def _narrow_constant(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is not None and tensor.dtype == _DOUBLE:
        value.const_value = _narrowed(tensor)
        value.type = ir.TensorType(_FLOAT)


def _narrowed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    with np.errstate(over="ignore"):
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _narrow_attributes(node: ir.Node) -> None:
    """Element types that a node states, and tensors that it holds."""
    stated = _TYPE_ATTRIBUTES.get(node.op_type, "") if not node.domain else ""
    held = node.attributes.get(stated)
    if held is not None and not held.is_ref() and held.value == int(_DOUBLE):
        node.attributes[stated] = ir.AttrInt64(stated, int(_FLOAT))
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
            tensor = attribute.as_tensor()
            if tensor.dtype == _DOUBLE:
                node.attributes[name] = ir.AttrTensor(name, _narrowed(tensor))


@dataclasses.dataclass(frozen=True)
class RenameBranchOutputs:
    """Gives the outputs of the two branches of each If names of their own.

    Before:  If<then_branch = () => (a) {…}, else_branch = () => (a) {…}>
    After:   If<then_branch = () => (a) {…}, else_branch = () => (a_1) {…}>
    Changes numerics: exact.
    Source: onnx-tensorrt docs/operators.md, "If".
    """

    name: ClassVar[str] = "rename-branch-outputs"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for scope in all_graphs(model):
            for node in scope.graph:
                if node.op_type == "If" and not node.domain:
                    changed = self._part(node, ctx) or changed
        return changed

    def _part(self, node: ir.Node, ctx: Context) -> bool:
        graphs = operators.subgraphs(node)
        if len(graphs) != 2:
            return False
        taken = {value.name for value in graphs[0].outputs}
        changed = False
        for value in graphs[1].outputs:
            if value.name in taken and value.graph is graphs[1] and ctx.permit(self.name, value):
                value.name = ctx.names.fresh(f"{value.name}")
                changed = True
        return changed


@dataclasses.dataclass(frozen=True)
class WriteQuantizationAxes:
    """Writes the axis of QuantizeLinear and DequantizeLinear where it is the default.

    TensorRT takes axis 0 where none is written, ONNX means axis 1.

    Before:  y = DequantizeLinear(w, scales)            scales: [4]
    After:   y = DequantizeLinear<axis = 1>(w, scales)
    Changes numerics: exact.  Leaves alone: scalar scales; opsets before 13, which have no axis.
    Source: ONNX QuantizeLinear-13; onnx-tensorrt, onnxOpImporters.cpp.
    """

    name: ClassVar[str] = "write-quantization-axes"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        changed = False
        for scope in all_graphs(model):
            for node in scope.graph:
                if (
                    not self._lacks_axis(node, ctx)
                    or (operators.opset(node, scope.opsets) or 0) < 13
                ):
                    continue
                if ctx.permit(self.name, node):
                    node.attributes["axis"] = ir.AttrInt64("axis", 1)
                    changed = True
        return changed

    def _lacks_axis(self, node: ir.Node, ctx: Context) -> bool:
        if node.domain or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return False
        scale = node.inputs[1] if len(node.inputs) > 1 else None
        if scale is None or "axis" in node.attributes:
            return False
        dims = ctx.shapes.dims(scale)
        tensor = values.constant(scale)
        rank = len(dims) if dims is not None else 0 if tensor is None else len(tensor.shape)
        return rank == 1
