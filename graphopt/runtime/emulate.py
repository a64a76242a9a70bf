"""Half precision as it is: a float32 graph that rounds where a half-precision graph rounds.

ONNX Runtime on the CPU computes most float16 nodes in float32 and drops the casts between them, at every optimisation
level (1.31: `x * 300 * 300 / 1000` gives 2.7e4 where float16 gives inf), and has no bfloat16 arithmetic at all.  Casts
that a graph states survive, so the graph states them: every half value becomes Cast(to half), Cast(to float).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from graphopt.ir import operators
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import Scope, all_graphs
from graphopt.ir.shapes import Shapes

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

# fmt: off
_EXACT = frozenset((
    "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Split",
    "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad", "Where", "Max",
    "Min", "Relu", "Neg", "Abs", "Sign", "Clip", "MaxPool", "GlobalMaxPool", "ReduceMax",
    "ReduceMin", "TopK", "DepthToSpace", "SpaceToDepth", "ReverseSequence", "Compress",
    "OneHot", "Trilu", "If", "Loop", "Scan", "SequenceMap", "SequenceAt", "SequenceConstruct",
    "SequenceInsert", "SequenceErase", "SequenceEmpty", "SplitToSequence", "ConcatFromSequence",
    "Optional", "OptionalGetElement", "Constant", "ConstantOfShape", "EyeLike", "MaxUnpool",
    "MaxRoiPool", "Ceil", "Floor", "Round",
))
# fmt: on
"""Operators whose results are elements of their inputs, or numbers that a half holds exactly as it held those."""

_SCATTERS = frozenset({"Scatter", "ScatterElements", "ScatterND"})
_DTYPE_ATTRIBUTES = ("dtype", "output_datatype", "output_dtype", "stash_type", "softmax_precision")


def has_halves(model: ir.Model) -> bool:
    """Whether any value of the model, in any graph, is float16 or bfloat16."""
    for scope in all_graphs(model):
        sources = (*scope.graph.inputs, *scope.graph.initializers.values())
        if any(half_of(value) is not None for value in sources):
            return True
        if any(_makes_half(node) for node in scope.graph):
            return True
    return False


def _makes_half(node: ir.Node) -> bool:
    """Whether the node states a half, in an attribute or as the type of an output: types may not be inferred yet."""
    if any(half_of(value) is not None for value in node.outputs):
        return True
    for name, held in node.attributes.items():
        if held.is_ref():
            continue
        if held.type == ir.AttributeType.TENSOR and held.value.dtype in HALVES:
            return True
        names_dtype = name == "to" or name in _DTYPE_ATTRIBUTES
        if held.type == ir.AttributeType.INT and names_dtype and held.value in map(int, HALVES):
            return True
    return False


def emulate(model: ir.Model) -> ir.Model:
    """A float32 model that computes what `model` computes in true half precision, to be run on the CPU.

    Each operator computes in float32 and its result is rounded to the nearest half (ties to even, overflow to infinity,
    subnormals kept), as kernels do that accumulate in float32.  Inputs and outputs keep their declared dtypes; only
    sequences and optionals of halves become sequences and optionals of float32 at the boundary.  Functions are
    inlined.  `model` stays as it is; float32 and integer nodes are untouched.
    """
    copy = load_model(model)
    if copy.functions:
        InlinePass()(copy)
    Shapes(copy)  # types every value that can be typed
    _Emulation(copy).run()
    return copy


def half_of(value: ir.Value | None) -> ir.DataType | None:
    """The half dtype of a tensor, sequence or optional value, or None."""
    if value is None:
        return None
    if value.const_value is not None and value.const_value.dtype in HALVES:
        return value.const_value.dtype
    return value.dtype if value.dtype in HALVES else None


class _Emulation:
    """Rewrites one model in place."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._names = Names.of(model)

    def run(self) -> None:
        """Rewrites every graph."""
        for scope in all_graphs(self._model):
            self._guess_types(scope.graph)
        for scope in list(all_graphs(self._model)):
            for node in tuple(scope.graph):
                self._node(node)
            self._initializers(scope.graph)
            self._inputs(scope.graph, is_main=scope.owner is None)

    def _guess_types(self, graph: ir.Graph) -> None:
        """Gives float outputs of operators that nobody can infer the half dtype of their inputs."""
        for node in graph:
            found = next((half for value in node.inputs if (half := half_of(value))), None)
            if found is None or not node.domain:
                continue
            for value in node.outputs:
                if value.type is None:
                    value.type = ir.TensorType(found)

    def _node(self, node: ir.Node) -> None:
        named = [value for value in node.outputs if value.name]  # an omitted output has no name
        halves = [(value, half) for value in named if (half := half_of(value)) is not None]
        if node.op_type == "CastLike" and not node.domain and halves:
            self._cast_like(node, halves[0][1])
        is_cast = node.op_type == "Cast" and not node.domain
        if not is_cast:
            _retype_attributes(node)
        for value, half in halves:
            if is_cast:
                self._widen(value, half)
                continue
            _set_float(value)
            if isinstance(value.type, ir.TensorType):
                self._round(value, half, exact=_is_exact(node))

    def _cast_like(self, node: ir.Node, half: ir.DataType) -> None:
        """CastLike(x, like) -> Cast(x), because `like` is about to change its dtype."""
        node.op_type = "Cast"
        node.resize_inputs(1)
        node.version = None
        node.attributes["to"] = ir.AttrInt64("to", int(half))

    def _widen(self, value: ir.Value, half: ir.DataType) -> None:
        """Reads the result of a cast to half as float32."""
        node = value.producer()
        assert node is not None
        wide = self._cast(value, ir.DataType.FLOAT, after=node)
        value.type = ir.TensorType(half)
        self._divert(value, wide)

    def _round(self, value: ir.Value, half: ir.DataType, *, exact: bool) -> None:
        """Reads a result that is float32 now as the half it stands for."""
        node = value.producer()
        assert node is not None
        is_output = value.is_graph_output() and node.graph is self._model.graph
        if exact and not is_output:
            return
        narrow = self._cast(value, half, after=node)
        if exact:
            self._output(value, narrow)
            return
        wide = self._cast(narrow, ir.DataType.FLOAT, after=_producer(narrow))
        self._divert(value, wide, narrow=narrow)

    def _divert(self, value: ir.Value, wide: ir.Value, *, narrow: ir.Value | None = None) -> None:
        """Lets all uses of `value` read `wide`; outputs of the main graph stay halves."""
        own = {_producer(wide), None if narrow is None else _producer(narrow)}
        for use in value.uses():
            if use.node not in own:
                use.node.replace_input_with(use.idx, wide)
        graph = _producer(wide).graph
        assert graph is not None
        if graph is self._model.graph:
            if narrow is not None:
                self._output(value, narrow)
            return
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = wide

    def _output(self, value: ir.Value, narrow: ir.Value) -> None:
        """Puts `narrow` where `value` is an output of the main graph, under its name."""
        graph = self._model.graph
        places = [index for index, output in enumerate(graph.outputs) if output is value]
        if not places:
            return
        name = value.name
        value.name = self._names.fresh(f"{name}_wide")
        narrow.name = name
        for index in places:
            graph.outputs[index] = narrow

    def _cast(self, value: ir.Value, to: ir.DataType, *, after: ir.Node) -> ir.Value:
        graph = after.graph
        assert graph is not None
        node = self._cast_node(value, to)
        graph.insert_after(after, node)
        return node.outputs[0]

    def _cast_node(self, value: ir.Value, to: ir.DataType) -> ir.Node:
        name = self._names.fresh(f"{value.name}_{to.name.lower()}")
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], name=name)
        out = node.outputs[0]
        out.name, out.type, out.shape = name, ir.TensorType(to), value.shape
        return node

    def _initializers(self, graph: ir.Graph) -> None:
        for value in tuple(graph.initializers.values()):
            half = half_of(value)
            if half is None or value.is_graph_input():
                continue
            wide = ir.Value(
                name=self._names.fresh(f"{value.name}_float"),
                type=ir.TensorType(ir.DataType.FLOAT),
                shape=value.shape,
                const_value=_widened(value),
            )
            graph.register_initializer(wide)
            for use in value.uses():
                use.node.replace_input_with(use.idx, wide)
            self._replace_inner_outputs(value, wide)
            if not value.is_graph_output():
                del graph.initializers[value.name or ""]

    def _inputs(self, graph: ir.Graph, *, is_main: bool) -> None:
        for value in graph.inputs:
            half = half_of(value)
            if half is None:
                continue
            if not is_main or not isinstance(value.type, ir.TensorType):
                _set_float(value)
                continue
            users = value.uses()
            if not users and not self._is_inner_output(value):
                continue
            node = self._cast_node(value, ir.DataType.FLOAT)
            first = next(iter(graph), None)
            if first is None:
                graph.append(node)
            else:
                graph.insert_before(first, node)
            for use in users:
                use.node.replace_input_with(use.idx, node.outputs[0])
            self._replace_inner_outputs(value, node.outputs[0])

    def _is_inner_output(self, value: ir.Value) -> bool:
        return any(value in scope.graph.outputs for scope in _inner(self._model))

    def _replace_inner_outputs(self, value: ir.Value, wide: ir.Value) -> None:
        """Subgraphs may return a value of an outer graph."""
        for scope in _inner(self._model):
            for index, output in enumerate(scope.graph.outputs):
                if output is value:
                    scope.graph.outputs[index] = wide


def _inner(model: ir.Model) -> list[Scope]:
    return [scope for scope in all_graphs(model) if scope.owner is not None]


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _is_exact(node: ir.Node) -> bool:
    if node.domain:
        return False
    if node.op_type in _SCATTERS:
        return operators.attribute(node, "reduction", "none") == "none"
    return node.op_type in _EXACT


def _set_float(value: ir.Value) -> None:
    value.type = _floated(value.type)


def _floated(kind: ir.TypeProtocol | None) -> ir.TypeProtocol:
    if isinstance(kind, ir.SequenceType):
        return ir.SequenceType(_floated(kind.elem_type))
    if isinstance(kind, ir.OptionalType):
        return ir.OptionalType(_floated(kind.elem_type))
    return ir.TensorType(ir.DataType.FLOAT)


def _widened(value: ir.Value) -> ir.TensorProtocol:
    """The float32 tensor of a half initializer, made when it is written: one at a time for large models."""
    tensor = value.const_value
    assert tensor is not None
    return ir.LazyTensor(
        _converter(tensor), dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy())
    )


def _converter(tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(tensor.numpy().astype(np.float32))


def _retype_attributes(node: ir.Node) -> None:
    """Turns halves that attributes name or hold into float32."""
    halves = {int(half) for half in HALVES}
    for name, held in tuple(node.attributes.items()):
        if held.is_ref():
            continue
        if held.type == ir.AttributeType.INT and name in _DTYPE_ATTRIBUTES:
            if held.value in halves:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif held.type == ir.AttributeType.TENSOR and held.value.dtype in HALVES:
            wide = ir.Tensor(held.value.numpy().astype(np.float32))
            node.attributes[name] = ir.AttrTensor(name, wide)
        elif held.type == ir.AttributeType.TYPE_PROTO and held.value.type.dtype in HALVES:
            kind = ir.TypeAndShape(_floated(held.value.type), held.value.shape)
            node.attributes[name] = ir.Attr(name, held.type, kind)
