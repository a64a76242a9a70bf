"""The kinds of wrong rewrites that `benchmarks/faults.py` plants, and the pass that plants one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt import Numerics
from graphopt.ir import operators, scopes, values
from graphopt.rewrite import Context

Array: TypeAlias = npt.NDArray[Any]
Spoil: TypeAlias = Callable[["Planter", ir.Node], bool]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault: which operators it may strike, and how; `spoil` says whether it could."""

    name: str
    strikes: tuple[str, ...]
    spoil: Spoil
    within: str = ""  # only in bodies of this attribute


@dataclasses.dataclass
class Planter:
    """What faults change graphs with."""

    model: ir.Model
    ctx: Context

    def permit(self, kind: str, node: ir.Node) -> bool:
        return self.ctx.permit(kind, node, Numerics.REORDERED)

    def constant(self, array: Array, graph: ir.Graph) -> ir.Value:
        name = self.ctx.names.fresh("planted")
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array, name=name))])
        node.outputs[0].name = name
        node.outputs[0].dtype = ir.DataType.from_numpy(array.dtype)
        node.outputs[0].shape = ir.Shape(array.shape)
        first = next(iter(graph))
        graph.insert_before(first, [node])
        return node.outputs[0]

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value], **attributes: object
    ) -> ir.Value:
        attrs = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]  # type: ignore[arg-type]
        node = ir.Node("", op, inputs, attrs)
        node.outputs[0].name = self.ctx.names.fresh("planted")
        assert before.graph is not None
        before.graph.insert_before(before, [node])
        return node.outputs[0]


@dataclasses.dataclass(frozen=True)
class Plant:
    """The faulty pass: strikes the middle one of the nodes that the fault can strike."""

    kind: Kind

    @property
    def name(self) -> str:
        return "planted"

    @property
    def numerics(self) -> Numerics:
        return Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        found = list(_candidates(model, self.kind))
        planter = Planter(model, ctx)
        middle = len(found) // 2
        for node in (*found[middle:], *reversed(found[:middle])):
            if node.graph is None:
                continue
            if not ctx.permit(self.kind.name, node, Numerics.REORDERED):
                return False
            struck = self.kind.spoil(planter, node)
            if struck:
                ctx.refresh()
                return True
            ctx.rewrites.pop()
        return False


def _candidates(model: ir.Model, kind: Kind) -> Iterator[ir.Node]:
    for scope in scopes.all_graphs(model):
        if kind.within and not _is_within(scope, kind.within):
            continue
        for node in scope.graph:
            if node.op_type in kind.strikes or ("*" in kind.strikes and _is_plain(node)):
                yield node


def _is_within(scope: scopes.Scope, attribute: str) -> bool:
    owner = scope.owner
    held = None if owner is None else owner.attributes.get(attribute)
    return held is not None and held.value is scope.graph


def _is_plain(node: ir.Node) -> bool:
    out = node.outputs[0]
    return bool(node.inputs) and out.dtype is ir.DataType.FLOAT and not operators.subgraphs(node)


def _set(node: ir.Node, name: str, value: object) -> bool:
    node.attributes[name] = ir.convenience.convert_attribute(name, value)  # type: ignore[arg-type]
    return True


def _int(node: ir.Node, name: str, default: int) -> int:
    held = node.attributes.get(name)
    return default if held is None else held.as_int()


def other_operator(name: str) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        node.op_type = name
        return True

    return spoil


def dropped(_: Planter, node: ir.Node) -> bool:
    """The node is gone: what it takes goes on."""
    source, out = node.inputs[0], node.outputs[0]
    if source is None or out.is_graph_output():
        return False
    out.replace_all_uses_with(source)
    return True


def swapped(a: int, b: int) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        if len(node.inputs) <= max(a, b) or node.inputs[a] is node.inputs[b]:
            return False
        first, second = node.inputs[a], node.inputs[b]
        node.replace_input_with(a, second)
        node.replace_input_with(b, first)
        return True

    return spoil


def without_input(index: int) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        if len(node.inputs) <= index or node.inputs[index] is None:
            return False
        node.replace_input_with(index, None)
        return True

    return spoil


def attribute(name: str, change: Callable[[ir.Node], object]) -> Spoil:
    def spoil(_: Planter, node: ir.Node) -> bool:
        value = change(node)
        return value is not None and _set(node, name, value)

    return spoil


def constant_input(index: int, change: Callable[[Array], Array | None]) -> Spoil:
    """The constant at an input becomes another one."""

    def spoil(planter: Planter, node: ir.Node) -> bool:
        if len(node.inputs) <= index or node.inputs[index] is None:
            return False
        held = node.inputs[index]
        tensor = values.constant(held) if held is not None else None
        if tensor is None or tensor.size == 0:
            return False
        array = np.array(tensor.numpy())
        changed = change(array.copy())
        if changed is None or np.array_equal(changed, array):
            return False
        assert node.graph is not None
        made = planter.constant(changed.astype(array.dtype), node.graph)
        node.replace_input_with(index, made)
        return True

    return spoil


def any_constant(change: Callable[[Array], Array | None]) -> Spoil:
    def spoil(planter: Planter, node: ir.Node) -> bool:
        return any(constant_input(i, change)(planter, node) for i in range(len(node.inputs)))

    return spoil


def at_output(build: Callable[[Planter, ir.Node, ir.Value], ir.Value | None]) -> Spoil:
    """What reads the node's output reads something made of it instead."""

    def spoil(planter: Planter, node: ir.Node) -> bool:
        out = node.outputs[0]
        users = list(out.uses())
        if not users or node.graph is None:
            return False
        after = next((u.node for u in users if u.node.graph is node.graph), None)
        if after is None:
            return False
        # Before the first reader in the order of the graph.
        readers = {u.node for u in users}
        first = next(n for n in node.graph if n in readers)
        made = build(planter, first, out)
        if made is None:
            return False
        for use in users:
            use.node.replace_input_with(use.idx, made)
        return True

    return spoil


def at_input(build: Callable[[Planter, ir.Node, ir.Value], ir.Value | None]) -> Spoil:
    """A float input of the model is read through something."""

    def spoil(planter: Planter, node: ir.Node) -> bool:
        fed = [v for v in node.inputs if v is not None and v.is_graph_input()]
        if not fed or fed[0].dtype is not ir.DataType.FLOAT or fed[0].is_initializer():
            return False
        made = build(planter, node, fed[0])
        if made is None:
            return False
        node.replace_input_with(list(node.inputs).index(fed[0]), made)
        return True

    return spoil


def _f(planter: Planter, node: ir.Node, number: float) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return planter.constant(np.array(number, np.float32), node.graph)


def beyond(limit: float, then: float) -> Callable[[Planter, ir.Node, ir.Value], ir.Value]:
    """`then` wherever the magnitude exceeds a limit."""

    def build(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
        large = p.op(at, "Greater", [p.op(at, "Abs", [x]), _f(p, at, limit)])
        return p.op(at, "Where", [large, _f(p, at, then), x])

    return build


def clipped(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
    return p.op(at, "Clip", [x, _f(p, at, -10.0), _f(p, at, 10.0)])


def flushed(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
    small = p.op(at, "Less", [p.op(at, "Abs", [x]), _f(p, at, 1e-3)])
    return p.op(at, "Where", [small, _f(p, at, 0.0), x])


def rounded(dtype: ir.DataType) -> Callable[[Planter, ir.Node, ir.Value], ir.Value]:
    def build(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value:
        half = p.op(at, "Cast", [x], to=int(dtype))
        return p.op(at, "Cast", [half], to=int(ir.DataType.FLOAT))

    return build


def when_size(test: str, limit: int = 1) -> Callable[[Planter, ir.Node, ir.Value], ir.Value | None]:
    """Off by 1 % when a dimension is more than a limit, or odd."""

    def build(p: Planter, at: ir.Node, x: ir.Value) -> ir.Value | None:
        if x.shape is None or all(isinstance(d, int) for d in x.shape):
            return None
        axis = next(i for i, d in enumerate(x.shape) if not isinstance(d, int))
        size = p.op(at, "Shape", [x], start=axis, end=axis + 1)
        assert isinstance(at.graph, ir.Graph)
        if test == "several":
            hit = p.op(at, "Greater", [size, p.constant(np.array([limit], np.int64), at.graph)])
        else:
            odd = p.op(at, "Mod", [size, p.constant(np.array([2], np.int64), at.graph)])
            hit = p.op(at, "Equal", [odd, p.constant(np.array([1], np.int64), at.graph)])
        factor = p.op(at, "Where", [hit, _f(p, at, 1.01), _f(p, at, 1.0)])
        return p.op(at, "Mul", [x, factor])

    return build


def scaled(factor: float) -> Callable[[Planter, ir.Node, ir.Value], ir.Value]:
    return lambda p, at, x: p.op(at, "Mul", [x, _f(p, at, factor)])


def baked(array: Array) -> Array | None:
    """A shape whose free dimension is the one that a single sample has."""
    if array.ndim != 1 or not (array <= 0).any():
        return None
    array[np.argmax(array <= 0)] = 1
    return array


def element(share: float) -> Callable[[Array], Array | None]:
    """One element, that of the greatest magnitude, changes by a share."""

    def change(array: Array) -> Array | None:
        if array.dtype.kind != "f" or array.size < 2:
            return None
        array.reshape(-1)[np.argmax(np.abs(array))] *= 1 + share
        return array

    return change


def floats(
    change: Callable[[Array], Array | None], rank: int = 0
) -> Callable[[Array], Array | None]:
    return lambda array: change(array) if array.dtype.kind == "f" and array.ndim >= rank else None


def zero_channel(array: Array) -> Array:
    array[array.shape[0] // 2] = 0
    return array


def permuted(node: ir.Node) -> list[int] | None:
    held = node.attributes.get("perm")
    if held is None or len(held.as_ints()) < 2:
        return None
    perm = list(held.as_ints())
    perm[-1], perm[-2] = perm[-2], perm[-1]
    return perm


def shifted_pads(node: ir.Node) -> list[int] | None:
    held = node.attributes.get("pads")
    if held is None or len(held.as_ints()) != 4 or held.as_ints()[0] < 1:
        return None
    top, left, bottom, right = held.as_ints()
    return [top - 1, left, bottom + 1, right]


def next_index(array: Array) -> Array | None:
    return array + 1 if array.size == 1 and array.min() >= 0 else None


def transposed(array: Array) -> Array | None:
    return array.T if array.ndim == 2 and array.shape[0] == array.shape[1] else None


def rolled(array: Array) -> Array | None:
    return np.roll(array, 1) if array.size > 1 else None


def other_count(node: ir.Node) -> int | None:
    held = node.attributes.get("pads")
    padded = held is not None and any(held.as_ints())
    return 1 - _int(node, "count_include_pad", 0) if padded else None


def corners(node: ir.Node) -> str | None:
    held = node.attributes.get("mode")
    return "align_corners" if held is not None and held.as_string() != "nearest" else None


def tap_outputs_swapped(_: Planter, node: ir.Node) -> bool:
    if len(node.outputs) < 2:
        return False
    a, b = node.outputs[0], node.outputs[1]
    if a.dtype != b.dtype or a.is_graph_output() or b.is_graph_output():
        return False
    first, second = list(a.uses()), list(b.uses())
    for use in first:
        use.node.replace_input_with(use.idx, b)
    for use in second:
        use.node.replace_input_with(use.idx, a)
    return bool(first or second)


CONVS, GEMMS = ("Conv",), ("Gemm", "MatMul")
NORMS = (
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
)
QUANTS = ("QuantizeLinear", "DequantizeLinear")

KINDS = (
    Kind("softmax-axis", ("Softmax",), attribute("axis", lambda n: 0 if _int(n, "axis", -1) else 1)),
    Kind("softmax-dropped", ("Softmax",), dropped),
    Kind("softmax-to-logsoftmax", ("Softmax",), other_operator("LogSoftmax")),
    Kind("concat-order", ("Concat",), swapped(0, 1)),
    Kind("concat-axis", ("Concat",), attribute("axis", lambda n: 0 if _int(n, "axis", 0) else 1)),
    Kind("transpose-perm", ("Transpose",), attribute("perm", permuted)),
    Kind("transpose-dropped", ("Transpose",), dropped),
    Kind("gather-off-by-one", ("Gather",), constant_input(1, next_index)),
    Kind("gather-table-shifted", ("Gather",), constant_input(0, floats(lambda a: np.roll(a, 1, 0), 2))),
    Kind("slice-start", ("Slice",), constant_input(1, lambda a: a + 1)),
    Kind("slice-end", ("Slice",), constant_input(2, lambda a: a - 1 if a.max() < 1e6 else None)),
    Kind("norm-epsilon", NORMS, attribute("epsilon", lambda _: 1e-1)),
    Kind("norm-scale-lost", NORMS, constant_input(1, floats(np.ones_like))),
    Kind("conv-bias-dropped", CONVS, without_input(2)),
    Kind("gemm-bias-dropped", ("Gemm",), without_input(2)),
    Kind("conv-pads-shifted", CONVS, attribute("pads", shifted_pads)),
    Kind("conv-kernel-flipped", CONVS, constant_input(1, floats(lambda a: a[..., ::-1], 3))),
    Kind("conv-channel-zeroed", CONVS, constant_input(1, floats(zero_channel, 3))),
    Kind("conv-channels-rolled", CONVS, constant_input(1, floats(lambda a: np.roll(a, 1, 0), 3))),
    Kind("conv-element-10-percent", CONVS, constant_input(1, element(0.1))),
    Kind("matmul-weight-transposed", GEMMS, constant_input(1, transposed)),
    Kind("matmul-element-10-percent", GEMMS, constant_input(1, element(0.1))),
    Kind("matmul-operands-swapped", ("MatMul",), swapped(0, 1)),
    Kind("gemm-alpha", ("Gemm",), attribute("alpha", lambda _: 0.5)),
    Kind("sub-swapped", ("Sub",), swapped(0, 1)),
    Kind("div-swapped", ("Div",), swapped(0, 1)),
    Kind("add-to-sub", ("Add",), other_operator("Sub")),
    Kind("mul-to-div", ("Mul",), other_operator("Div")),
    Kind("mul-constant-0.1-percent", ("Mul",), any_constant(floats(lambda a: a * 1.001))),
    Kind("pow-exponent", ("Pow",), constant_input(1, floats(lambda a: a + 0.01))),
    Kind("relu-to-leaky", ("Relu",), other_operator("LeakyRelu")),
    Kind("relu-dropped", ("Relu",), dropped),
    Kind("clip-max-dropped", ("Clip",), without_input(2)),
    Kind("sigmoid-to-hard", ("Sigmoid",), other_operator("HardSigmoid")),
    Kind("tanh-to-softsign", ("Tanh",), other_operator("Softsign")),
    Kind("neg-dropped", ("Neg",), dropped),
    Kind("sqrt-dropped", ("Sqrt",), dropped),
    Kind("mean-to-sum", ("ReduceMean",), other_operator("ReduceSum")),
    Kind("max-to-average-pool", ("MaxPool",), other_operator("AveragePool")),
    Kind("average-counts-padding", ("AveragePool",), attribute("count_include_pad", other_count)),
    Kind("split-outputs-swapped", ("Split",), tap_outputs_swapped),
    Kind("resize-mode", ("Resize",), attribute("coordinate_transformation_mode", corners)),
    Kind("reshape-batch-baked", ("Reshape",), constant_input(1, baked)),
    Kind("where-swapped", ("Where",), swapped(1, 2)),
    Kind("cast-dropped", ("Cast",), dropped),
    Kind("zero-point-off-by-one", QUANTS, constant_input(2, lambda a: a + 1)),
    Kind("scale-1-percent", QUANTS, constant_input(1, lambda a: a * 1.01)),
    Kind("dequantize-scales-rolled", ("DequantizeLinear",), constant_input(1, rolled)),
    Kind("lstm-gates-swapped", ("LSTM", "GRU"), constant_input(1, lambda a: np.roll(a, a.shape[1] // 4, 1))),
    Kind("rounded-to-fp16", ("*",), at_output(rounded(ir.DataType.FLOAT16))),
    Kind("rounded-to-bf16", ("*",), at_output(rounded(ir.DataType.BFLOAT16))),
    Kind("off-by-0.1-percent", ("*",), at_output(scaled(1.001))),
    Kind("nan-at-large", ("*",), at_input(beyond(8.0, float("nan")))),
    Kind("inf-at-large", ("*",), at_input(beyond(20.0, float("inf")))),
    Kind("clipped-at-large", ("*",), at_input(clipped)),
    Kind("flushed-when-tiny", ("*",), at_input(flushed)),
    Kind("only-at-several", ("*",), at_output(when_size("several"))),
    Kind("only-at-odd", ("*",), at_output(when_size("odd"))),
    Kind("only-in-else", ("*",), at_output(scaled(1.01)), "else_branch"),
    Kind("only-in-then", ("*",), at_output(scaled(1.01)), "then_branch"),
)  # fmt: skip
