"""Where values come from and go to, through control flow too: shape paths, counters, masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import all_graphs

_INTEGERS = frozenset(
    {
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT32,
        ir.DataType.UINT32,
        ir.DataType.INT64,
        ir.DataType.UINT64,
    }
)
"""Integers that a half does not hold exactly; 8 bits fit in either."""

# fmt: off
MOVEMENT = frozenset((
    "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Concat", "Split", "Slice", "Gather",
    "GatherElements", "GatherND", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Trilu", "Compress", "Dropout",
    "ReverseSequence",
))
FOLLOWERS = MOVEMENT | frozenset((
    "Relu", "Neg", "Abs", "Sign", "Clip", "Max", "Min", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "TopK",
    "ArgMax", "ArgMin", "Pad", "Where", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf",
    "NonZero", "Floor", "Ceil", "Round", "OneHot", "MaxUnpool", "ScatterND", "ScatterElements",
    "Shape", "Size",
))
"""Operators whose float results are elements of their inputs: they take the dtype that comes, and force no cast."""

_COUNTING = MOVEMENT | frozenset((
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Floor", "Ceil", "Round", "Mod", "Max", "Min", "Clip", "CumSum", "Pow",
    "Where",
))
_BOUNDARY = frozenset((
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization",
    "InstanceNormalization", "GroupNormalization", "BatchNormalization", "Attention", "LSTM", "GRU", "RNN", "Tanh",
    "Sigmoid", "QuantizeLinear", "DequantizeLinear",
))
_MASKING = MOVEMENT | frozenset(("Where", "Add", "Sub", "Mul", "Div", "Min", "Max", "Cast", "Neg", "ReduceMax"))
_MASKED = frozenset(("Softmax", "LogSoftmax", "Attention", "MultiHeadAttention", "GroupQueryAttention"))
# fmt: on

Edge = tuple[ir.Node, ir.Value]


@dataclasses.dataclass(frozen=True)
class Flow:
    """Edges from each value to those that depend on it directly, with the node in between; and back."""

    down: Mapping[ir.Value, list[Edge]]
    up: Mapping[ir.Value, list[Edge]]

    def reach(
        self, seeds: Iterable[ir.Value], through: Callable[[ir.Node], bool], *, back: bool = False
    ) -> set[ir.Value]:
        """The values that depend on `seeds` (or that they depend on) through nodes that `through` accepts."""
        edges = self.up if back else self.down
        found = set(seeds)
        pending = list(found)
        while pending:
            for node, value in edges.get(pending.pop(), ()):
                if value not in found and through(node):
                    found.add(value)
                    pending.append(value)
        return found


def flow_of(model: ir.Model) -> Flow:
    """The edges of every graph of a model."""
    down: dict[ir.Value, list[Edge]] = {}
    up: dict[ir.Value, list[Edge]] = {}
    for scope in all_graphs(model):
        for node in scope.graph:
            for source, sink in _edges(node):
                down.setdefault(source, []).append((node, sink))
                up.setdefault(sink, []).append((node, source))
    return Flow(down, up)


def _edges(node: ir.Node) -> Iterable[tuple[ir.Value, ir.Value]]:
    bodies = operators.subgraphs(node)
    if not bodies:
        for source in node.inputs:
            if source is not None:
                yield from ((source, sink) for sink in node.outputs)
        return
    for body in bodies:
        # Loop: (trips, condition, state…) -> body (trip, condition, state…) -> (condition, state…, scans…).
        skip = 1 if node.op_type == "Loop" else 0
        returned = list(body.outputs)[skip:]
        yield from zip(returned, node.outputs, strict=False)
        yield from (
            (source, sink)
            for source, sink in zip(node.inputs, body.inputs, strict=False)
            if source is not None
        )
        if node.op_type in ("Loop", "Scan"):
            yield from zip(returned, list(body.inputs)[2 * skip :], strict=False)


def is_count_cast(node: ir.Node) -> bool:
    """Whether the node turns integers that a half need not hold into floats."""
    source = node.inputs[0] if node.inputs else None
    return (
        node.op_type == "Cast"
        and not node.domain
        and source is not None
        and source.dtype in _INTEGERS
        and node.outputs[0].dtype == ir.DataType.FLOAT
    )


def shape_path(model: ir.Model, flow: Flow) -> set[ir.Value]:
    """Float values between a shape, or integers, and an integer again: they must stay exact."""
    nodes = [node for scope in all_graphs(model) for node in scope.graph if not node.domain]
    seeds = [
        node.outputs[0]
        for node in nodes
        if node.op_type in ("Shape", "Size", "NonZero") or is_count_cast(node)
    ]
    ends = [
        node.inputs[0]
        for node in nodes
        if node.op_type == "Cast"
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.FLOAT
        and node.outputs[0].dtype in _INTEGERS
    ]
    ends += [v for node in nodes if node.op_type == "Range" for v in node.inputs if v is not None]
    # The scales of Resize (second input before opset 11, third since) are sizes in disguise.
    ends += [
        v
        for n in nodes
        if n.op_type in ("Resize", "Upsample")
        for v in n.inputs[1:]
        if v is not None
    ]

    def arithmetic(node: ir.Node) -> bool:
        return node.op_type not in _BOUNDARY

    return flow.reach(seeds, arithmetic) & flow.reach(ends, arithmetic, back=True)


def counters(model: ir.Model, flow: Flow, is_mask: Callable[[ir.Value], bool]) -> set[ir.Value]:
    """Float values that count (positions, steps, ids) and what exact arithmetic makes of them.

    Args:
        model: the model.
        flow: its edges.
        is_mask: whether a value was seen to be 0 or 1 only.
    """
    found: set[ir.Value] = set()
    for scope in all_graphs(model):
        for node in scope.graph:
            is_range = node.op_type == "Range" and node.outputs[0].dtype == ir.DataType.FLOAT
            if is_range or (is_count_cast(node) and not is_mask(node.outputs[0])):
                found.add(node.outputs[0])
    pending = list(found)
    while pending:
        for node, value in flow.down.get(pending.pop(), ()):
            if value not in found and _goes_on_counting(node, found):
                found.add(value)
                pending.append(value)
    return found


def _goes_on_counting(node: ir.Node, found: set[ir.Value]) -> bool:
    if node.op_type in ("MatMul", "Einsum"):
        return _is_outer_product(node)
    known = [v in found or values.is_constant(v) for v in node.inputs if v is not None]
    return node.op_type in _COUNTING and (all(known) or node.op_type in MOVEMENT)


def _is_outer_product(node: ir.Node) -> bool:
    """Whether a product multiplies positions by frequencies and adds nothing up."""
    first = node.inputs[0]
    if node.op_type != "MatMul" or first is None or first.shape is None or not len(first.shape):
        return False
    return first.shape[-1] == 1


def near_inputs(model: ir.Model, flow: Flow) -> set[ir.Value]:
    """Float inputs of the model, and what exact arithmetic makes of them: no layer says how large they are."""
    pending = [v for v in model.graph.inputs if v.dtype == ir.DataType.FLOAT]
    pending = [v for v in pending if not v.is_initializer()]
    found = set(pending)
    while pending:
        for node, value in flow.down.get(pending.pop(), ()):
            operands = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
            known = all(v in found or values.is_constant(v) for v in operands)
            if value not in found and known and (_counts(node) or node.op_type in _AVERAGES):
                found.add(value)
                pending.append(value)
    return found


def phases(model: ir.Model, flow: Flow, near: set[ir.Value]) -> set[ir.Value]:
    """Angles made of float inputs by exact arithmetic (timesteps): no generated input tells how large they get.

    Args:
        model: the model.
        flow: its edges.
        near: `near_inputs`.
    """
    nodes = [node for scope in all_graphs(model) for node in scope.graph]
    angles = {n.inputs[0] for n in nodes if n.op_type in ("Sin", "Cos") and not n.domain}
    cone = flow.reach((a for a in angles if a is not None), _counts, back=True)
    return (near & cone) - (set(model.graph.inputs) - angles)


def _counts(node: ir.Node) -> bool:
    """Whether a node does exact arithmetic, element by element."""
    return not node.domain and (node.op_type in _COUNTING or _is_outer_product(node))


_DENOMINATORS = {"Div": 1, "Mod": 1, "Reciprocal": 0, "Log": 0}
_STEPS = {
    "QuantizeLinear": "quantised next: rounding it before could take another step",
    "DynamicQuantizeLinear": "quantised next: rounding it before could take another step",
} | dict.fromkeys(
    ("Floor", "Ceil", "Round", "Mod"),
    "rounded to a step next: rounding it before could take another",
)
COORDINATES = {"RoiAlign": 1, "GridSample": 1}
"""Operators that look up where an operand says, and which: what is read is much, where it is read one number."""


def fragile(
    model: ir.Model, flow: Flow, flushes: Callable[[ir.Value], bool], near: set[ir.Value]
) -> dict[ir.Value, str]:
    """Values of which zeros, steps, places or small differences matter more than their size, and why.

    Args:
        model: the model.
        flow: its edges.
        flushes: whether a half makes zeros of elements that are none.
        near: values of which nobody knows the mean.
    """
    found: dict[ir.Value, str] = {}
    places: list[ir.Value] = []
    cancelling: set[ir.Value] = set()
    for scope in all_graphs(model):
        for node in scope.graph:
            if node.domain:
                continue
            value = _operand(node, _DENOMINATORS.get(node.op_type))
            if value is not None and flushes(value):
                found[value] = (
                    "a half would make zeros of what is divided by, or has its logarithm taken"
                )
            if node.op_type in _STEPS and node.inputs[0] is not None:
                found[node.inputs[0]] = _STEPS[node.op_type]
            cancelling |= _cancelling(node)
            place = _operand(node, COORDINATES.get(node.op_type))
            places += [] if place is None else [place]
    reason = "cancellation: what is taken from its mean, or from squares of it, may be small"
    found |= dict.fromkeys(cancelling & near, reason)
    given = set(model.graph.inputs) - set(places)
    reached = flow.reach(places, _counts, back=True) - given
    reason = "coordinates: what is looked up where they say may change fast"
    return dict.fromkeys((v for v in reached if not values.is_constant(v)), reason) | found


def _operand(node: ir.Node, place: int | None) -> ir.Value | None:
    return node.inputs[place] if place is not None and place < len(node.inputs) else None


_AVERAGES = frozenset(
    (
        "ReduceMean",
        "ReduceSum",
        "AveragePool",
        "GlobalAveragePool",
        "Div",
        "Mul",
        "Squeeze",
        "Unsqueeze",
        "Reshape",
    )
)


_CENTRING = frozenset(
    (
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "MeanVarianceNormalization",
    )
)


def _cancelling(node: ir.Node) -> set[ir.Value]:
    """Values of which `node` keeps only what differs from their mean: squares of `E[x^2] - E[x]^2`, or `x` itself."""
    first = node.inputs[0] if node.inputs else None
    if node.op_type in _CENTRING and first is not None:
        return {first}
    if node.op_type != "Sub" or first is None or node.inputs[1] is None:
        return set()
    mean = node.inputs[1].producer()
    if mean is not None and mean.op_type == "ReduceMean" and mean.inputs[0] is first:
        return {first, node.inputs[1]}
    squares = [_squares(value) for value in node.inputs]
    return set.union(*squares) if all(squares) else set()


def _squares(value: ir.Value | None, depth: int = 5) -> set[ir.Value]:
    """The value and those before it back to a square, where it is a square or an average of squares; else none."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain or not depth:
        return set()
    power = values.array(node.inputs[1]) if node.op_type == "Pow" else None
    squared = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    if squared or node.op_type == "ReduceSumSquare" or (power is not None and (power == 2).all()):
        return {value}
    if node.op_type not in _AVERAGES or _computed(node) > 1:
        return set()
    before = _squares(node.inputs[0], depth - 1)
    return before | {value} if before else set()


def _computed(node: ir.Node) -> int:
    """How many operands of a node are float and not constant."""
    known = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
    return sum(not values.is_constant(v) for v in known)


SENTINEL = {ir.DataType.FLOAT16: -3e4, ir.DataType.BFLOAT16: -1e38}
"""What stands for "masked": two of them added stay finite, and the exponential of either is 0."""


MASKED = -2.9e4
"""Elements below are masked where a mask goes, in either half."""


LEAST = 5000.0
"""Masks are larger than this: its exponential is 0 beside that of any score."""

SWALLOWS = 1e8
"""Masks larger than this leave nothing of a score that they are added to in float32."""


@dataclasses.dataclass(frozen=True)
class Masks:
    """What hides scores from a softmax.

    Attributes:
        constants: that stand for minus infinity.
        carriers: the values that carry them to where a softmax ends them, constants included.
        finite: the carriers that no infinite constant goes into: a finite number may stand for all that they hide.
    """

    constants: frozenset[ir.Value] = frozenset()
    carriers: frozenset[ir.Value] = frozenset()
    finite: frozenset[ir.Value] = frozenset()


def sentinels(model: ir.Model, flow: Flow, least: float = LEAST) -> Masks:
    """The masks of a model: constants below -least all of whose ways end in a softmax."""
    constants: set[ir.Value] = set()
    cone: set[ir.Value] = set()
    for scope in all_graphs(model):
        for value in scope.graph.initializers.values():
            if not _masks(value, least):
                continue
            reached = _carriers(value, flow)
            if all(_ends_in_softmax(each, reached) for each in reached):
                constants.add(value)
                cone |= reached
    return Masks(frozenset(constants), frozenset(cone), frozenset(_finite(cone, flow)))


def _finite(masked: set[ir.Value], flow: Flow) -> set[ir.Value]:
    sources = flow.reach(masked, lambda node: node.op_type in _MASKING, back=True)
    infinite = []
    for value in sources:
        array = values.array(value)
        if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
            infinite.append(value)
    return masked - flow.reach(infinite, lambda node: node.op_type in _MASKING)


def _carriers(mask: ir.Value, flow: Flow) -> set[ir.Value]:
    """The values that a mask goes on in."""
    found, pending = {mask}, [mask]
    while pending:
        source = pending.pop()
        for node, value in flow.down.get(source, ()):
            if value not in found and _passes_on(node, source):
                found.add(value)
                pending.append(value)
    return found


def _passes_on(node: ir.Node, value: ir.Value) -> bool:
    """Whether the result of a node masks what `value` masks; a product adds its third operand."""
    if node.op_type == "Gemm":
        return all(v is not value for v in node.inputs[:2])
    return node.op_type in _MASKING


def _masks(value: ir.Value, least: float) -> bool:
    tensor = values.constant(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size == 0:
        return False
    array = tensor.numpy()
    large = np.abs(array) > least
    finite = large & np.isfinite(array)
    return bool(finite.any()) and bool((array[large] < 0).all())


def _ends_in_softmax(value: ir.Value, reached: set[ir.Value]) -> bool:
    """Whether all that reads the value passes the mask on or ends it."""
    if value.is_graph_output() or not value.uses():
        return False
    for use in value.uses():
        if use.node.op_type in _MASKED or _asks_what_is_masked(use.node):
            continue
        if not _passes_on(use.node, value) or not reached.issuperset(use.node.outputs[:1]):
            return False
    return True


def _asks_what_is_masked(node: ir.Node) -> bool:
    """Whether a node tells what is masked from what is not, and stays right with any number that masks."""
    limit = values.array(node.inputs[1]) if node.op_type == "Greater" else None
    return limit is not None and bool(limit.size) and bool(limit.min() >= MASKED)
