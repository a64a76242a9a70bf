"""What the inputs of a model are for, read from the nodes that consume them: ids, masks, lengths or numbers.

A random integer fed to a `Gather` fails the run, and a random mask tests nothing: each input is followed
through casts, reshapes and constant offsets, into subgraphs and functions, to the operators that say
what its elements may be.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

from graphopt.ir import operators, scopes, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Bound: TypeAlias = "int | str"
"""A number, or the symbolic dimension that gives it."""


class Use(enum.IntEnum):
    """What an input is for; where several apply, the greatest rules."""

    NUMBER = 0
    POSITIVE = 1  # a scale, a variance, a divisor
    CHOICE = 2  # compared with constants
    COUNT = 3  # how many: repetitions, ends of slices, k
    AXIS = 4  # counting from zero is always right
    LENGTH = 5  # 1 .. bound
    INDEX = 6  # 0 .. bound - 1
    SHAPE = 7  # target of Expand
    RESHAPE = 8  # target of Reshape
    FLAG = 9  # condition of If or Loop
    MASK = 10  # one keeps, zero hides
    ADDITIVE_MASK = 11  # zero keeps, a large negative number hides


@dataclasses.dataclass(frozen=True)
class Role:
    """What is known of the elements of one input.

    Attributes:
        use: what they are for.
        bounds: each exclusive for INDEX, inclusive for LENGTH and COUNT; the least one counts.
        choices: constants that the model compares the input with, or trip counts.
        words: strings that the model knows.
    """

    use: Use = Use.NUMBER
    bounds: tuple[Bound, ...] = ()
    choices: tuple[float, ...] = ()
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trail:
    """A value that holds scale * input + offset, elements of the input rearranged.

    `guarded` where a Max, Min or Where chose among them and others: it may keep out what nobody can take.
    """

    value: ir.Value
    scale: float = 1
    offset: float = 0
    guarded: bool = False


_Finding: TypeAlias = "tuple[Use, Bound | None]"

# Operators that pass elements of the given inputs on unchanged.
_CARRIERS: dict[str, tuple[int, ...] | None] = {
    "Cast": (0,),
    "CastLike": (0,),
    "Concat": None,
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Max": None,
    "Min": None,
    "Pad": (0,),
    "Reshape": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}

_GUARDS = frozenset({"Max", "Min", "Where"})

# (operator, input) -> use without a bound.
_PLAIN_SINKS: dict[tuple[str, int], Use] = {
    ("BatchNormalization", 4): Use.POSITIVE,
    ("BitShift", 1): Use.COUNT,
    ("Col2Im", 1): Use.COUNT,
    ("Col2Im", 2): Use.COUNT,
    ("Compress", 1): Use.MASK,
    ("ConstantOfShape", 0): Use.COUNT,
    ("CumProd", 1): Use.AXIS,
    ("CumSum", 1): Use.AXIS,
    ("DFT", 1): Use.COUNT,
    ("DFT", 2): Use.AXIS,
    ("DequantizeLinear", 1): Use.POSITIVE,
    ("Div", 1): Use.POSITIVE,
    ("Dropout", 1): Use.AXIS,
    ("Dropout", 2): Use.FLAG,
    ("Expand", 1): Use.SHAPE,
    ("If", 0): Use.FLAG,
    ("Loop", 0): Use.COUNT,
    ("Loop", 1): Use.FLAG,
    ("MaxUnpool", 1): Use.INDEX,
    ("Mod", 1): Use.POSITIVE,
    ("NonMaxSuppression", 2): Use.COUNT,
    ("NonMaxSuppression", 3): Use.AXIS,
    ("NonMaxSuppression", 4): Use.AXIS,
    ("OneHot", 1): Use.COUNT,
    ("Pad", 1): Use.COUNT,
    ("QuantizeLinear", 1): Use.POSITIVE,
    ("Range", 0): Use.COUNT,
    ("Range", 1): Use.COUNT,
    ("Range", 2): Use.POSITIVE,
    ("Reshape", 1): Use.RESHAPE,
    ("Resize", 2): Use.SHAPE,
    ("Resize", 3): Use.COUNT,
    ("STFT", 1): Use.POSITIVE,
    ("STFT", 3): Use.POSITIVE,
    ("SequenceAt", 1): Use.AXIS,
    ("SequenceErase", 1): Use.AXIS,
    ("SequenceInsert", 2): Use.AXIS,
    ("Slice", 1): Use.AXIS,
    ("Slice", 2): Use.COUNT,
    ("Slice", 3): Use.AXIS,
    ("Slice", 4): Use.POSITIVE,
    ("SplitToSequence", 1): Use.POSITIVE,
    ("Squeeze", 1): Use.AXIS,
    ("TensorScatter", 2): Use.AXIS,
    ("Tile", 1): Use.COUNT,
    ("TopK", 1): Use.COUNT,
    ("Trilu", 1): Use.AXIS,
    ("Unsqueeze", 1): Use.AXIS,
    ("Upsample", 1): Use.SHAPE,
    ("Where", 0): Use.MASK,
}

# (operator, input) -> (use, input that holds the table, its axis or the attribute that names it).
_TABLE_SINKS: dict[tuple[str, int], tuple[Use, int, int | str]] = {
    ("ArrayFeatureExtractor", 1): (Use.INDEX, 0, -1),
    ("EmbedLayerNormalization", 0): (Use.INDEX, 2, 0),
    ("EmbedLayerNormalization", 1): (Use.INDEX, 4, 0),
    ("GRU", 4): (Use.LENGTH, 0, 0),
    ("Gather", 1): (Use.INDEX, 0, "axis"),
    ("GatherBlockQuantized", 1): (Use.INDEX, 0, "gather_axis"),
    ("GatherElements", 1): (Use.INDEX, 0, "axis"),
    ("LSTM", 4): (Use.LENGTH, 0, 0),
    ("NegativeLogLikelihoodLoss", 1): (Use.INDEX, 0, 1),
    ("RNN", 4): (Use.LENGTH, 0, 0),
    ("ReverseSequence", 1): (Use.LENGTH, 0, "time_axis"),
    ("RoiAlign", 2): (Use.INDEX, 0, 0),
    ("RotaryEmbedding", 3): (Use.INDEX, 1, 0),
    ("Scatter", 1): (Use.INDEX, 0, "axis"),
    ("ScatterElements", 1): (Use.INDEX, 0, "axis"),
    ("SoftmaxCrossEntropyLoss", 1): (Use.INDEX, 0, 1),
}

SIZE_SINKS = frozenset(
    key
    for key, use in _PLAIN_SINKS.items()
    if use not in {Use.MASK, Use.FLAG} and key not in {("Div", 1), ("Mod", 1), ("BitShift", 1)}
) | frozenset({("If", 0), ("Loop", 1), ("Range", 2)})
"""Inputs of operators that sizes, counts and places follow from."""

_MAX_READ = 1 << 16  # elements of a constant that are read to see what is compared with it

_COMPARISONS = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_MASK_NAME = re.compile(r"(?:^|[^a-z])\w*mask", re.IGNORECASE)
_LENGTH_NAME = re.compile(r"len(?:gth|s|$|_)", re.IGNORECASE)


def input_roles(model: ir.Model) -> dict[str, Role]:
    """The role of every input of the main graph, by name."""
    follower = Follower(model)
    return {value.name or "": follower.role(value) for value in model.graph.inputs}


class Follower:
    """Follows values of one model to the operators that decide what they may hold."""

    def __init__(self, model: ir.Model) -> None:
        self._functions = model.functions
        self._callers: dict[int, list[ir.Node]] = {}
        for scope in scopes.all_graphs(model):
            if scope.owner is not None:
                self._callers.setdefault(id(scope.graph), []).append(scope.owner)
            for node in scope.graph:
                function = self._functions.get(node.op_identifier())
                if function is not None:
                    self._callers.setdefault(id(function.graph), []).append(node)

    def role(self, source: ir.Value) -> Role:
        """What the elements of one input are for."""
        findings: list[_Finding] = []
        choices: list[float] = []
        words: list[str] = []
        for trail, node, index in self.consumers(source):
            if node.op_type in _COMPARISONS:
                choices += _compared(trail, node, index)
            if node.op_type == "Loop" and index == 0:
                choices += (3, 0, 1)
            findings += _sink(trail, node, index)
            words += _known_words(node)
        return _decide(source, findings, tuple(dict.fromkeys(choices)), tuple(dict.fromkeys(words)))

    def consumers(self, source: ir.Value) -> Iterator[tuple[Trail, ir.Node, int]]:
        """Every (trail, node, input index) that elements of the source reach unchanged."""
        queue, seen = deque([Trail(source)]), {id(source)}
        while queue:
            trail = queue.popleft()
            for node, index in trail.value.uses():
                yield trail, node, index
                for found in self._carried(trail, node, index):
                    if id(found.value) not in seen:
                        seen.add(id(found.value))
                        queue.append(found)
            for value in self._returned(trail.value):
                if id(value) not in seen:
                    seen.add(id(value))
                    queue.append(dataclasses.replace(trail, value=value))

    def _carried(self, trail: Trail, node: ir.Node, index: int) -> Iterator[Trail]:
        function = self._functions.get(node.op_identifier())
        if function is not None:
            if index < len(function.inputs):
                yield dataclasses.replace(trail, value=function.inputs[index])
            return
        if operators.has_subgraph(node):
            # Loop, Scan (since 9): input i of the node is input i of the body, trip count and condition aside.
            for graph in operators.subgraphs(node):
                if (
                    node.op_type in {"Loop", "Scan"}
                    and index < len(graph.inputs)
                    and not _steers(node, index)
                ):
                    yield dataclasses.replace(trail, value=graph.inputs[index])
            return
        positions = _CARRIERS.get(node.op_type, ())
        if positions is None or index in positions:
            guarded = trail.guarded or node.op_type in _GUARDS
            yield from (
                dataclasses.replace(trail, value=output, guarded=guarded) for output in node.outputs
            )
        elif node.op_type in {"Add", "Sub", "Mul"}:
            yield from _moved(trail, node, index)

    def _returned(self, value: ir.Value) -> Iterator[ir.Value]:
        """What a value becomes outside its subgraph or function, where it is an output there."""
        graph = value.graph
        if graph is None or not value.is_graph_output():
            return
        position = next(i for i, output in enumerate(graph.outputs) if output is value)
        for node in self._callers.get(id(graph), ()):
            shift = 1 if node.op_type == "Loop" else 0
            if 0 <= position - shift < len(node.outputs):
                yield node.outputs[position - shift]


def _steers(node: ir.Node, index: int) -> bool:
    return node.op_type == "Loop" and index < 2


def _moved(trail: Trail, node: ir.Node, index: int) -> Iterator[Trail]:
    """Through + c, - c, c - x and * c, where c is one constant."""
    if len(node.inputs) != 2:
        return
    number = values.scalar(node.inputs[1 - index])
    if number is None:
        return
    other = float(number)
    scale, offset = trail.scale, trail.offset
    if node.op_type == "Add":
        offset += other
    elif node.op_type == "Mul":
        scale, offset = scale * other, offset * other
    elif index == 0:
        offset -= other
    else:
        scale, offset = -scale, other - offset
    yield Trail(node.outputs[0], scale, offset, trail.guarded)


def _sink(trail: Trail, node: ir.Node, index: int) -> Iterator[_Finding]:
    key = (node.op_type, index)
    if node.op_type == "RotaryEmbedding" and node.domain == operators.MICROSOFT:
        # There the positions come second, before the tables; in ONNX's operator last.
        if index == 1:
            yield Use.INDEX, _extent(node, 2, 0)
    elif node.op_type.startswith("Reduce") and index == 1:
        yield Use.AXIS, None
    elif key in _PLAIN_SINKS:
        yield _PLAIN_SINKS[key], None
    elif key in _TABLE_SINKS:
        use, table, axis = _TABLE_SINKS[key]
        axis = axis if isinstance(axis, int) else operators.attribute(node, axis, 0)
        yield use, _inverse(trail, _extent(node, table, axis))
    elif key in {("GatherND", 1), ("ScatterND", 1)}:
        for bound in _extents(node, 0):
            yield Use.INDEX, _inverse(trail, bound)
    elif key == ("OneHot", 0):
        depth = values.scalar(node.inputs[1])
        yield Use.INDEX, _inverse(trail, None if depth is None else int(depth))
    elif node.op_type == "Sub" and index == 1 and values.fill(node.inputs[0]) == 1:
        # (1 - mask) * big negative number: how transformers hide positions.
        yield Use.MASK, None


def _inverse(trail: Trail, bound: Bound | None) -> Bound | None:
    """The bound on the input, given the bound on scale * input + offset."""
    if not isinstance(bound, int) or (trail.scale, trail.offset) == (1, 0):
        return bound
    if trail.scale <= 0:
        return int(trail.offset) + 1 if trail.scale < 0 else None
    return max(1, int((bound - 1 - trail.offset) // trail.scale) + 1)


def _extents(node: ir.Node, index: int) -> list[Bound]:
    value = node.inputs[index] if index < len(node.inputs) else None
    shape = shape_of(value)
    return [] if shape is None else [d for d in map(_bound, shape) if d is not None]


def _extent(node: ir.Node, index: int, axis: int) -> Bound | None:
    shape = shape_of(node.inputs[index]) if index < len(node.inputs) else None
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    return _bound(shape[axis])


def shape_of(value: ir.Value | None) -> ir.Shape | None:
    """The shape of a value, looked up through operators that keep it."""
    for _ in range(16):
        if value is None:
            return None
        tensor = values.constant(value)
        if tensor is not None:
            return ir.Shape([int(str(d)) for d in tensor.shape])
        if value.shape is not None:
            return value.shape
        producer = value.producer()
        keeps = producer is not None and (
            operators.is_elementwise_unary(producer) or operators.is_quantization(producer)
        )
        value = producer.inputs[0] if producer is not None and keeps else None
    return None


def _bound(dim: int | ir.SymbolicDim) -> Bound | None:
    return dim if isinstance(dim, int) else dim.value


def _compared(trail: Trail, node: ir.Node, index: int) -> Iterator[float]:
    """Numbers of the input at which a comparison with constants turns, and neighbours on the other side."""
    others = _constants_behind(node.inputs[1 - index]) if len(node.inputs) == 2 else ()
    if trail.scale == 0:
        return
    ats = [(other - trail.offset) / trail.scale for other in others]
    yield from ats
    if len(ats) == 1:
        # A neighbour takes the other branch of whatever the comparison decides.
        yield from (ats[0] + 1,) if node.op_type == "Equal" else (ats[0] - 1, ats[0] + 1)


def _constants_behind(value: ir.Value | None) -> tuple[float, ...]:
    """The one constant that a value holds, or the least and the greatest of several."""
    for _ in range(16):
        tensor = values.constant(value)
        if tensor is not None:
            number = values.tensor_scalar(tensor)
            if number is not None:
                return (float(number),)
            if not tensor.dtype.is_integer() or not 0 < tensor.size <= _MAX_READ:
                return ()
            array = tensor.numpy()
            return tuple(dict.fromkeys((float(array.min()), float(array.max()))))
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type not in _CARRIERS or not producer.inputs:
            return ()
        value = producer.inputs[0]
    return ()


def _known_words(node: ir.Node) -> Iterator[str]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.STRINGS and not attribute.is_ref():
            yield from attribute.as_strings()[:64]


def _decide(
    source: ir.Value, findings: list[_Finding], choices: tuple[float, ...], words: tuple[str, ...]
) -> Role:
    name, dtype = source.name or "", source.dtype
    use = max((found for found, _ in findings), default=Use.NUMBER)
    if use is Use.NUMBER and choices and dtype in _INTEGERS:
        use = Use.CHOICE
    if use < Use.LENGTH and dtype in _INTEGERS and _LENGTH_NAME.search(name):
        use = Use.LENGTH
    if _MASK_NAME.search(name):
        additive = dtype is not None and dtype.is_floating_point() and use is not Use.MASK
        use = Use.ADDITIVE_MASK if additive and _meets(source, "Add") else Use.MASK
    if (
        use is Use.MASK
        and dtype is ir.DataType.BOOL
        and source.shape is not None
        and not len(source.shape)
    ):
        use = Use.FLAG
    bounds = tuple(
        dict.fromkeys(bound for found, bound in findings if found is use and bound is not None)
    )
    return Role(use, bounds, choices, words)


_INTEGERS = frozenset(
    (
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.INT16,
        ir.DataType.UINT64,
        ir.DataType.UINT32,
    )
)


def _meets(value: ir.Value, op_type: str) -> bool:
    """Whether the value itself, or a reshaped or cast one, is an input of such a node."""
    follow: Callable[[ir.Node], bool] = lambda node: node.op_type in _CARRIERS  # noqa: E731
    queue = [value]
    for current in queue:
        for node, _ in current.uses():
            if node.op_type == op_type:
                return True
            if follow(node) and len(queue) < 64:
                queue.extend(node.outputs)
    return False
