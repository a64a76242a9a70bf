"""How long a model takes before and after a cut, told by shapes alone: the same on every machine, whatever else runs.

The numbers are microseconds of one thread with AVX-512 in ONNX Runtime 1.31, fitted to profiles of a ResNet and a
MobileNet; only their ratios matter here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.shapes import Shapes
from graphopt_passes.prune.slim import Keep

NODE = 5.0
THOUSAND_ELEMENTS = 0.18
_MILLION_PRODUCTS, _MILLION_DEPTHWISE = 20.0, 43.0
_MEGABYTE_OF_WEIGHTS = 50.0
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Constant", "Shape"})
_FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})


@dataclasses.dataclass(frozen=True)
class _Task:
    """A node: names and extents of what it reads, multiplies by and makes."""

    node: ir.Node
    made: tuple[int, ...]
    weight: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Clock:
    """The tasks of the main graph.

    Attributes:
        block: channels that lie together in convolutions: what is not a multiple takes as long as the next one.
    """

    tasks: tuple[_Task, ...]
    block: int

    @classmethod
    def of(cls, graph: ir.Graph, shapes: Shapes, block: int) -> Clock:
        """Reads all extents; those that are not known count once."""
        found = []
        for node in graph:
            if node.op_type in _VIEWS or not node.outputs or _is_fused(node):
                continue
            weight = values.constant(node.inputs[1]) if len(node.inputs) > 1 else None
            known = () if weight is None else tuple(weight.shape.numpy())
            found.append(_Task(node, _extents(shapes, node.outputs[0]), known))
        return cls(tuple(found), block)

    def left(self, keep: Keep) -> float:
        """Microseconds of all tasks after a cut; of all with an empty one."""
        return sum(self._takes(task, keep) for task in self.tasks)

    def _takes(self, task: _Task, keep: Keep) -> float:
        node = task.node
        made = _after(node.outputs[0], task.made, keep)
        elements = math.prod(made)
        spent = NODE + THOUSAND_ELEMENTS * elements / 1e3
        if node.op_type in ("Conv", "ConvTranspose") and len(task.weight) > 2:
            spent += self._convolved(task, made, keep)
        elif node.op_type in ("Gemm", "MatMul") and task.weight:
            weight = _after(node.inputs[1], task.weight, keep)
            size, inner = math.prod(weight), _inner(node, weight)
            spent += _MILLION_PRODUCTS * elements * inner / 1e6
            spent += _MEGABYTE_OF_WEIGHTS * size * 4 / 1e6
        return spent

    def _convolved(self, task: _Task, made: Sequence[int], keep: Keep) -> float:
        node = task.node
        weight = _after(node.inputs[1], task.weight, keep)
        group = int(operators.attribute(node, "group", 1))
        taps, places = math.prod(weight[2:]), math.prod(made) / max(made[1], 1)
        rows = self._whole(made[1])
        if group > 1 and weight[1] == 1:
            return _MILLION_DEPTHWISE * rows * places * taps / 1e6
        read = weight[0] if node.op_type == "ConvTranspose" else weight[1]
        columns = self._whole(read) if read >= self.block else read
        stored = _MEGABYTE_OF_WEIGHTS * math.prod(weight) * 4 / 1e6
        return _MILLION_PRODUCTS * rows * columns * places * taps / 1e6 + stored

    def _whole(self, channels: int) -> int:
        return -(-channels // self.block) * self.block


def _is_fused(node: ir.Node) -> bool:
    """Whether the runtime does it while it makes what is read: an activation of a convolution."""
    source = node.inputs[0] if node.inputs else None
    maker = None if source is None else source.producer()
    return node.op_type in _FUSED and maker is not None and maker.op_type == "Conv"


def _extents(shapes: Shapes, value: ir.Value) -> tuple[int, ...]:
    dims = shapes.dims(value)
    return () if dims is None else tuple(dim.value or 1 for dim in dims)


def _after(value: ir.Value | None, extents: tuple[int, ...], keep: Keep) -> tuple[int, ...]:
    cut = {} if value is None else keep.get(value.name or "", {})
    return tuple(len(cut[axis]) if axis in cut else size for axis, size in enumerate(extents))


def _inner(node: ir.Node, weight: Sequence[int]) -> int:
    turned = node.op_type == "Gemm" and int(operators.attribute(node, "transB", 0))
    return weight[-1] if turned else weight[-2]
