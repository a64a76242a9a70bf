"""Which values carry the same channels, from the layer that makes them to those that read them.

A space is a set of channels that must be scaled together; a lane says which spaces the channels of a value are.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt_passes.quantize.placement import clip_bounds, is_product
from graphopt_passes.quantize.reading import addend_of, is_turned

HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"})
"""f(s x) = s f(x) for positive s, channel by channel."""

NORMALIZATIONS = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1, 2),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2, None),
}
"""Where the factor and the bias of channels stand; what else the last two read is added before."""


@dataclasses.dataclass(frozen=True, eq=False)
class Maker:
    """A node that makes channels: its constant operands that scale with them, as (index, axis)."""

    node: ir.Node
    operands: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A product that reads the channels of a space: from `offset` on, each `repeat` times."""

    node: ir.Node
    offset: int
    repeat: int


@dataclasses.dataclass(eq=False)
class Space:
    """Channels that are scaled together.

    Attributes:
        size: how many.
        makers: what makes them.
        readers: what reads them.
        values: that hold them and nothing else, once each.
        bounds: upper bounds of a Clip, by its output.
        is_open: whether something reads them that cannot take a factor back.
    """

    size: int
    makers: list[Maker] = dataclasses.field(default_factory=list)
    readers: list[Reader] = dataclasses.field(default_factory=list)
    values: list[ir.Value] = dataclasses.field(default_factory=list)
    bounds: dict[ir.Value, float] = dataclasses.field(default_factory=dict)
    is_open: bool = False


@dataclasses.dataclass(frozen=True)
class Lane:
    """The channels of a value: spaces one behind the other along an axis, each channel `repeat` times."""

    spaces: tuple[Space, ...]
    axis: int
    repeat: int = 1


def trace(graph: ir.Graph) -> tuple[dict[ir.Value, Lane], list[Space]]:
    """The lanes of a graph, and the spaces that can be scaled, in order."""
    found = _Tracer(graph)
    for node in graph:
        found.visit(node)
    lanes = {v: dataclasses.replace(x, spaces=found.current(x)) for v, x in found.lanes.items()}
    spaces = dict.fromkeys(found.root(space) for space in found.made)
    return lanes, [s for s in spaces if not s.is_open and s.readers and s.makers]


class _Tracer:
    """One walk over a graph in order."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.lanes: dict[ir.Value, Lane] = {}
        self.made: list[Space] = []
        self._parent: dict[Space, Space] = {}

    def root(self, space: Space) -> Space:
        """The space that this one was joined into."""
        while space in self._parent:
            space = self._parent[space]
        return space

    def current(self, lane: Lane) -> tuple[Space, ...]:
        """The spaces of a lane as they are now."""
        return tuple(self.root(space) for space in lane.spaces)

    def visit(self, node: ir.Node) -> None:
        """Takes one node into account."""
        if node.domain == "" and is_product(node):
            self._product(node)
        elif node.op_type in NORMALIZATIONS and node.domain in ("", "com.microsoft"):
            self._normalization(node)
        else:
            lane = self._passed(node) if node.domain == "" and len(node.outputs) == 1 else None
            if lane is None:
                self._close(node)
            else:
                self._hold(node.outputs[0], lane)

    def _hold(self, value: ir.Value, lane: Lane) -> None:
        self.lanes[value] = lane
        inside = all(use.node.graph is self.graph for use in value.uses())
        if value.is_graph_output() or not inside:
            self._open(lane)
        if len(lane.spaces) == 1 and lane.repeat == 1:
            self.root(lane.spaces[0]).values.append(value)

    def _open(self, lane: Lane) -> None:
        for space in self.current(lane):
            space.is_open = True

    def _close(self, node: ir.Node, *, first: int = 0) -> None:
        """What a node reads from input `first` on cannot be scaled."""
        for value in node.inputs[first:]:
            if value is not None and value in self.lanes:
                self._open(self.lanes[value])

    def _product(self, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None
        axis = 1 if node.op_type == "Conv" else -1
        own = _sole(node, 1)
        if source in self.lanes:
            lane = self.lanes[source]
            fits = lane.axis == axis or (source.shape is not None and len(source.shape) == 2)
            if own and fits and _columns(node) == _width(lane):
                self._read(node, lane)
            else:
                self._open(lane)
        self._close(node, first=1)
        operands = _scaled_operands(node)
        tensor = values.constant(node.inputs[1])
        assert tensor is not None
        rows = tensor.shape.numpy()[operands[0][1]]
        usable = own and _sole(node, 2) and addend_of(node) is None
        self._make(Maker(node, operands), int(rows), axis, usable=usable)

    def _read(self, node: ir.Node, lane: Lane) -> None:
        offset = 0
        for space in self.current(lane):
            space.readers.append(Reader(node, offset, lane.repeat))
            offset += space.size * lane.repeat

    def _make(self, maker: Maker, size: int, axis: int, *, usable: bool) -> None:
        space = Space(size, [maker], is_open=not usable)
        self.made.append(space)
        self._hold(maker.node.outputs[0], Lane((space,), axis))

    def _normalization(self, node: ir.Node) -> None:
        self._close(node)
        first, second = NORMALIZATIONS[node.op_type]
        scale = values.constant(node.inputs[first]) if len(node.inputs) > first else None
        bias = None if second is None or len(node.inputs) <= second else node.inputs[second]
        last = operators.attribute(node, "axis", -1) == -1
        plain = scale is not None and len(scale.shape) == 1 and last
        if not plain or scale is None or (bias is not None and values.constant(bias) is None):
            return
        operands = ((first, 0),) if bias is None or second is None else ((first, 0), (second, 0))
        usable = all(_sole(node, index) for index, _ in operands)
        self._make(Maker(node, operands), int(scale.shape.numpy()[0]), -1, usable=usable)

    def _passed(self, node: ir.Node) -> Lane | None:
        """The lane of the output of a node that lets factors through."""
        if node.op_type == "Concat":
            return self._joined(node)
        if node.op_type == "Add":
            return self._added(node)
        source = node.inputs[0] if node.inputs else None
        lane = self.lanes.get(source) if source is not None else None
        if lane is None:
            return None
        if node.op_type in HOMOGENEOUS:
            return lane if lane.axis == 1 or node.op_type in ("Relu", "LeakyRelu") else None
        if node.op_type == "Clip":
            return self._clipped(node, lane)
        return _flattened(node, lane) if node.op_type in ("Flatten", "Reshape") else None

    def _clipped(self, node: ir.Node, lane: Lane) -> Lane | None:
        bounds = clip_bounds(node)
        if bounds is None or bounds[0] != 0 or len(lane.spaces) != 1 or lane.repeat != 1:
            return None
        if math.isfinite(bounds[1]):
            self.root(lane.spaces[0]).bounds[node.outputs[0]] = bounds[1]
        return lane

    def _joined(self, node: ir.Node) -> Lane | None:
        lanes = [self.lanes.get(value) for value in node.inputs if value is not None]
        known = [lane for lane in lanes if lane is not None]
        if operators.attribute(node, "axis", None) != 1 or len(known) < len(node.inputs):
            return None
        if any((lane.axis, lane.repeat) != (1, known[0].repeat) for lane in known):
            return None
        return Lane(tuple(s for x in known for s in self.current(x)), 1, known[0].repeat)

    def _added(self, node: ir.Node) -> Lane | None:
        """Terms of a sum carry the same factors: their spaces become one."""
        lanes = [self.lanes.get(value) for value in node.inputs if value is not None]
        for index, lane in enumerate(lanes):
            if lane is not None and values.is_constant(node.inputs[1 - index]):
                return self._biased(node, 1 - index, lane)
        first, second = lanes
        if first is None or second is None or (first.axis, first.repeat) != (second.axis, 1):
            return None
        sizes = [[space.size for space in self.current(lane)] for lane in (first, second)]
        if sizes[0] != sizes[1] or not _same_shape(node):
            return None
        for mine, theirs in zip(first.spaces, second.spaces, strict=True):
            self._join(self.root(mine), self.root(theirs))
        return first

    def _biased(self, node: ir.Node, index: int, lane: Lane) -> Lane | None:
        tensor = values.constant(node.inputs[index])
        fits = tensor is not None and len(tensor.shape) == 1 and lane.axis == -1
        if not fits or len(lane.spaces) != 1 or lane.repeat != 1 or not _sole(node, index):
            return None
        space = self.root(lane.spaces[0])
        if tensor is None or tensor.shape[0] != space.size:
            return None
        space.makers.append(Maker(node, ((index, 0),)))
        return lane

    def _join(self, mine: Space, theirs: Space) -> None:
        if mine is theirs:
            return
        self._parent[theirs] = mine
        for name in ("makers", "readers", "values"):
            getattr(mine, name).extend(getattr(theirs, name))
        mine.bounds.update(theirs.bounds)
        mine.is_open |= theirs.is_open


def _sole(node: ir.Node, index: int) -> bool:
    """Whether a constant operand is read by this node alone; true of one that is absent."""
    value = node.inputs[index] if len(node.inputs) > index else None
    return value is None or (len(value.uses()) == 1 and not value.is_graph_output())


def _scaled_operands(node: ir.Node) -> tuple[tuple[int, int], ...]:
    turned = is_turned(node)
    weight = (1, 0 if node.op_type == "Conv" or turned else 1)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return (weight,) if bias is None else (weight, (2, -1))


def _columns(node: ir.Node) -> int:
    tensor = values.constant(node.inputs[1])
    assert tensor is not None
    shape = tensor.shape.numpy()
    if node.op_type == "Conv":
        return int(shape[1]) * int(operators.attribute(node, "group", 1))
    turned = is_turned(node)
    return int(shape[1 if turned else 0])


def _width(lane: Lane) -> int:
    return sum(space.size for space in lane.spaces) * lane.repeat


def _same_shape(node: ir.Node) -> bool:
    first, second = (value.shape if value is not None else None for value in node.inputs)
    if first is None or second is None or len(first) != len(second):
        return False
    return all(a == b for a, b in zip(first[1:], second[1:], strict=True))


def _flattened(node: ir.Node, lane: Lane) -> Lane | None:
    """[N, C, h, w] as [N, C h w]: each channel h w times."""
    source, result = node.inputs[0], node.outputs[0]
    shape = source.shape if source is not None else None
    if lane.axis != 1 or lane.repeat != 1 or shape is None or len(shape) < 3:
        return None
    inner = [d for d in shape[2:] if isinstance(d, int)]
    if len(inner) < len(shape) - 2:
        return None
    repeat = math.prod(inner)
    wanted = repeat * sum(space.size for space in lane.spaces)
    flat = result.shape is not None and len(result.shape) == 2 and result.shape[1] == wanted
    if node.op_type == "Flatten":
        flat = operators.attribute(node, "axis", 1) == 1
    return Lane(lane.spaces, -1, repeat) if flat else None
