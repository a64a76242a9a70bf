"""Matrix products and convolutions on 8-bit floats (E4M3), written as Q/DQ pairs that TensorRT fuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.scopes import sort
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt.rewrite.relink import mark
from graphopt_passes.precision.legality import is_float
from graphopt_passes.precision.plan_file import keys, planned_dtypes, write_dtypes
from graphopt_passes.precision.ranges import Spread, observe

Array = np.ndarray[Any, Any]
RULE = "quantize-fp8"
GREATEST = 448.0
"""Of E4M3 without infinities.  Source: OCP 8-bit floating point specification, 1.0; ONNX FLOAT8E4M3FN."""

LEAST = GREATEST * float(np.finfo(np.float32).tiny)
"""Below this greatest magnitude, float32 has no normal scale."""

FP8 = ir.DataType.FLOAT8E4M3FN
WORD = "float8"
"""What a precision plan calls it."""

_FLOAT = ("float32", "left out by name, plan or budget, or its input was not seen")

_SINCE = 19
_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}


@dataclasses.dataclass(frozen=True)
class QuantizeFp8:
    """Lets products read 8-bit floats: y = MatMul(x, w)  ->  y = MatMul(DQ(Q<e4m3>(x)), DQ(w8)).

    Activations take one scale, weights one a channel of the result; outputs are not quantised.  Scales are float32 and
    follow from the greatest magnitude seen on calibration samples, or on generated inputs.
    Changes numerics: lossy.  Leaves alone: computed weights, subgraphs, models below opset 19.
    Source: QuantizeLinear-19; TensorRT developer guide, explicit quantization: FP8 has no zero point.

    Attributes:
        plan: a precision plan; only what it calls `float8` is quantised. Without one, every product is.
        float32: nodes or outputs, by name, that stay as they are.
    """

    plan: str = ""
    float32: tuple[str, ...] = ()

    name: ClassVar[str] = "quantize-fp8"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: the plan cannot be read, or fits no node of the model.
        """
        opset = model.opset_imports.get("", 0)
        if opset < _SINCE:
            reason = (
                f"QuantizeLinear takes float8 from opset {_SINCE} on, the model imports {opset}"
            )
            ctx.missed(RULE, model.graph.name or "", reason)
            return False
        sort(model.graph)
        _ = ctx.shapes
        nodes = self._wanted(model, ctx)
        if not nodes:
            return False
        seen = observe(model, ctx, ir.DataType.FLOAT16, set())
        if seen.why:
            ctx.remark(
                RemarkKind.WARNING, RULE, "", f"without data ({seen.why}) nothing is quantised"
            )
            return False
        ctx.remark(RemarkKind.NOTE, RULE, "", f"scales come from {seen.source}")
        emitter = _Emitter(model.graph, ctx)
        before, places = len(ctx.rewrites), keys(model)
        said = {node: _FLOAT for node in model.graph if _is_product(node)}
        for node in nodes:
            if emitter.quantise(node, seen.spreads.get(_input_name(node))):
                said[node] = (WORD, "nothing speaks against it")
        if ctx.options.save_plan is not None:
            write_dtypes(ctx.options.save_plan, places, said)
        if len(ctx.rewrites) > before:
            ctx.refresh()
        return len(ctx.rewrites) > before

    def _wanted(self, model: ir.Model, ctx: Context) -> list[ir.Node]:
        found = [node for node in model.graph if _is_product(node)]
        file = Path(self.plan) if self.plan else ctx.options.plan
        if file is not None:
            dtypes = planned_dtypes(file, model, ctx)
            found = [node for node in found if dtypes.get(node) == WORD]
        names = set(self.float32)
        return [n for n in found if not names & {n.name, *(v.name for v in n.outputs)}]


def _is_product(node: ir.Node) -> bool:
    if node.domain or node.op_type not in _AXES or not is_float(node.inputs[0]):
        return False
    tensor = values.constant(node.inputs[1])
    return (
        tensor is not None
        and tensor.dtype is ir.DataType.FLOAT
        and len(tensor.shape) >= 2
        and not values.is_constant(node.inputs[0])
    )


def _input_name(node: ir.Node) -> str:
    value = node.inputs[0]
    return "" if value is None else value.name or ""


class _Emitter:
    """Puts pairs in front of products; one pair an activation."""

    def __init__(self, graph: ir.Graph, ctx: Context) -> None:
        self._graph = graph
        self._ctx = ctx
        self._pairs: dict[ir.Value, ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int], ir.Value] = {}

    def quantise(self, node: ir.Node, seen: Spread | None) -> bool:
        """Lets a product read 8-bit floats; declines where nobody saw what it reads, and says whether it did not."""
        source, weight = node.inputs[0], node.inputs[1]
        assert source is not None
        assert weight is not None
        if seen is None or not LEAST <= seen.absmax < np.inf:
            self._ctx.missed(RULE, node, "its input was not seen, or was zero throughout", source)
            return False
        if not self._ctx.permit(RULE, node, Numerics.LOSSY):
            return False
        if source not in self._pairs:
            self._pairs[source] = self._pair(source, seen.absmax)
        node.replace_input_with(0, self._pairs[source])
        axis = _axis(node)
        if (weight, axis) not in self._weights:
            self._weights[weight, axis] = self._stored(weight, axis, node)
        node.replace_input_with(1, self._weights[weight, axis])
        return True

    def _pair(self, value: ir.Value, greatest: float) -> ir.Value:
        """DQ(Q(value)), right behind the value."""
        name = value.name or "input"
        scale = self._held(f"{name}_scale", ir.tensor(np.array(greatest / GREATEST, np.float32)))
        zero = self._held(f"{name}_zero", ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn)))
        quantised = self._node("QuantizeLinear", [value, scale, zero], FP8, value, [])
        anchor = value.producer()
        if anchor is not None and anchor.graph is self._graph:
            self._graph.insert_after(anchor, quantised)
        else:
            self._graph.insert_before(next(iter(self._graph)), quantised)
        narrow = quantised.outputs[0]
        back = self._node("DequantizeLinear", [narrow, scale, zero], ir.DataType.FLOAT, value, [])
        self._graph.insert_after(quantised, back)
        return back.outputs[0]

    def _stored(self, weight: ir.Value, axis: int, reader: ir.Node) -> ir.Value:
        """DQ(weight in 8 bits), a scale a channel."""
        tensor = values.constant(weight)
        assert tensor is not None
        codes, scales = _codes(np.asarray(tensor.numpy(), np.float32), axis)
        name = weight.name or "weight"
        held = self._held(f"{name}_float8", ir.tensor(codes))
        scale = self._held(f"{name}_scale", ir.tensor(scales))
        zero = self._held(f"{name}_zero", ir.tensor(np.zeros(len(scales), ml_dtypes.float8_e4m3fn)))
        attributes = [ir.AttrInt64("axis", axis)]
        float32 = ir.DataType.FLOAT
        node = self._node("DequantizeLinear", [held, scale, zero], float32, weight, attributes)
        self._graph.insert_before(reader, node)
        return node.outputs[0]

    def _held(self, hint: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=self._ctx.names.fresh(hint),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        dtype: ir.DataType,
        like: ir.Value,
        attributes: list[ir.Attr],
    ) -> ir.Node:
        name = self._ctx.names.fresh(f"{like.name}_{op_type}")
        node = ir.Node("", op_type, inputs, attributes, name=name)
        out = node.outputs[0]
        out.name, out.type, out.shape = name, ir.TensorType(dtype), like.shape
        mark(node, RULE, like.name or "", self._ctx)
        return node


def _axis(node: ir.Node) -> int:
    """The axis of the weight along which channels of the result lie."""
    tensor = values.constant(node.inputs[1])
    assert tensor is not None
    rank = len(tensor.shape)
    if node.op_type == "Gemm":
        turned = node.attributes.get("transB")
        return 0 if turned is not None and turned.as_int() else 1
    return _AXES[node.op_type] % rank


def _codes(array: Array, axis: int) -> tuple[Array, Array]:
    """A weight in 8-bit floats and the scale of each channel."""
    others = tuple(each for each in range(array.ndim) if each != axis)
    greatest = np.abs(array).max(axis=others)
    # A channel of zeros, or of numbers too small for a scale, becomes zeros.
    scales = np.where(greatest >= LEAST, greatest / GREATEST, 1.0).astype(np.float32)
    shape = [1] * array.ndim
    shape[axis] = -1
    return (array / scales.reshape(shape)).astype(ml_dtypes.float8_e4m3fn), scales
