"""Bringing the opsets of a model within the range of a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import onnx
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir

from graphopt.ir import operators
from graphopt.ir.model_file import load_model, skeleton_bytes
from graphopt.ir.scopes import all_graphs
from graphopt.numerics import Numerics
from graphopt.pipeline.adapters import replace_contents
from graphopt.rewrite import Context, Skip
from graphopt_passes.opset import Written, spell, write


@dataclasses.dataclass(frozen=True)
class ConvertOpset:
    """Brings ai.onnx within the opsets of the target: main graph, subgraphs and local functions.

    Before:  opset 8, for a target of 9 to 24:  y = Upsample<scales = [1, 1, 2, 2]>(x)
    After:   opset 9:                           y = Upsample(x, [1, 1, 2, 2])
    Older nodes are written as `lift-opset` writes them; what that cannot, and newer ones, by onnx's converter, which
    does not enter subgraphs and functions.  Changes numerics: exact.  Leaves alone: models within the range.
    Source: onnx/docs/Changelog.md; onnx.version_converter.
    """

    name: ClassVar[str] = "convert-opset"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        lowest, highest = ctx.target.opset
        imports = [i for i in all_imports(model) if i.get("", 0)]
        newest, oldest = (choose((i[""] for i in imports), default=0) for choose in (max, min))
        if not imports or lowest <= oldest <= newest <= highest:
            return False
        where = model.graph.name or "main"
        if oldest < lowest and newest <= highest:
            return self._raise(model, lowest, where, ctx)
        return self._convert(model, highest, where, ctx)

    def _raise(self, model: ir.Model, wanted: int, where: str, ctx: Context) -> bool:
        """Writes each node of an older opset as at `wanted`; by onnx's converter where one cannot be."""
        try:
            plan = raised(model, wanted, ctx)
        except Skip as skip:
            ctx.missed(self.name, where, f"to opset {wanted}, node by node: {skip}")
            return self._convert(model, wanted, where, ctx)
        if not ctx.permit(self.name, where):
            return False
        write(plan, ctx)
        for imports in all_imports(model):
            if imports.get("", wanted) < wanted:
                imports[""] = wanted
        ctx.refresh()
        return True

    def _convert(self, model: ir.Model, wanted: int, where: str, ctx: Context) -> bool:
        """The main graph by onnx's converter."""
        opset = model.opset_imports.get("", 0)
        if model.functions or any(scope.owner is not None for scope in all_graphs(model)):
            reason = "onnx's converter does not enter subgraphs and local functions"
            ctx.missed(self.name, where, f"opset {opset} to {wanted}: {reason}")
            return False
        converted = _converted(model, wanted)
        if isinstance(converted, str):
            ctx.missed(self.name, where, f"opset {opset} to {wanted}: {converted}")
            return False
        if not ctx.permit(self.name, where):
            return False
        replace_contents(model, converted)
        ctx.refresh()
        return True


def _converted(model: ir.Model, wanted: int) -> ir.Model | str:
    """The model at another opset, with the weights of `model`; or why it cannot be had."""
    proto = onnx.ModelProto.FromString(skeleton_bytes(model))
    apart = {
        tensor.name
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    known = {info.name for info in proto.graph.input}
    if any(_is_left_out(node) for node in proto.graph.node):
        return "a large Constant node"
    for tensor in [each for each in proto.graph.initializer if each.name in apart]:
        proto.graph.initializer.remove(tensor)
        if tensor.name not in known:
            info = proto.graph.input.add(name=tensor.name)
            info.type.tensor_type.elem_type = tensor.data_type
            for dim in tensor.dims:
                info.type.tensor_type.shape.dim.add(dim_value=dim)
    try:
        result = load_model(onnx.version_converter.convert_version(proto, wanted))
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError) as fault:
        return " ".join(str(fault).split())[:300]
    _put_back(result, model, apart, apart - known)
    return result


def _is_left_out(node: onnx.NodeProto) -> bool:
    return any(each.t.data_location == onnx.TensorProto.EXTERNAL for each in node.attribute)


def _put_back(result: ir.Model, model: ir.Model, apart: set[str], were_no_inputs: set[str]) -> None:
    """Gives the weights that were left out back to the converted model."""
    for value in list(result.graph.inputs):
        if value.name in apart:
            value.const_value = model.graph.initializers[value.name].const_value
            if value.name in were_no_inputs:
                result.graph.inputs.remove(value)
            result.graph.register_initializer(value)


def all_imports(model: ir.Model) -> Iterator[dict[str, int]]:
    """The opset imports of the model and of its functions."""
    yield model.opset_imports
    yield from (function.opset_imports for function in model.functions.values())


def raised(model: ir.Model, wanted: int, ctx: Context) -> list[Written]:
    """Each node of ai.onnx below `wanted` as it is written there, subgraphs and functions included.

    Raises:
        Skip: a node cannot be written there.
    """
    plan = []
    for scope in all_graphs(model):
        opset = scope.opsets.get("", 0)
        if not 0 < opset < wanted:
            continue
        for node in scope.graph:
            if not node.domain:
                try:
                    spelling = spell(node, opset, wanted, ctx.shapes, ctx.target)
                except Skip as skip:
                    raise Skip(f"{operators.describe(node)}: {skip}", node) from skip
                plan.append(Written(spelling, in_function=scope.function is not None))
    return plan
