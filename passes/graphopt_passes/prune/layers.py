"""The layers whose weights can be pruned, as matrices [blocks, rows, columns]: one row an output, one block a group."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values

Wide: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = npt.NDArray[Any]

PRUNABLE = ("Conv", "Gemm", "MatMul")

SMALL_ELEMENTS = 1024
"""Weights below this stay dense: nothing to gain in the file, much to lose in accuracy."""

STEM_CHANNELS = 4
"""A convolution that reads at most so many channels reads an image; its few weights feed everything."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a convolution looks; a matrix product has none.

    Attributes:
        kernel: extent by spatial axis.
        strides: by spatial axis.
        dilations: by spatial axis.
        pads: ONNX order: all beginnings, then all ends; empty where `auto_pad` decides.
        auto_pad: SAME_UPPER, SAME_LOWER, VALID or NOTSET.
        group: number of groups.
        turned: extra extent at the ends of the output, of a transposed convolution; None for others.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    group: int
    turned: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A node that multiplies its input by a constant matrix.

    Attributes:
        node: Conv, Gemm or MatMul.
        source: what it reads.
        weight: its matrix, an initializer of its own.
        bias: the constant [rows] that is added to the product, here or in the next node; None where there is none.
        window: of a convolution.
        transposed: whether the stored matrix is [columns, rows].
        dense: why it stays dense, or "".
        is_bound: whether its weights stay as they are, bit for bit: they are shared, or the user named them.
    """

    node: ir.Node
    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    window: Window | None
    transposed: bool
    dense: str = ""
    is_bound: bool = False

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.weight.name or ""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.tensor.size

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The stored weight."""
        assert self.weight.const_value is not None
        return self.weight.const_value

    @property
    def columns(self) -> int:
        """Inputs of one row."""
        return self.size // self.rows

    @property
    def rows(self) -> int:
        """Outputs."""
        return int(self.tensor.shape.numpy()[1 if self.transposed else 0])

    @property
    def blocks(self) -> int:
        """Groups of a convolution; 1 otherwise."""
        return 1 if self.window is None else self.window.group

    @property
    def inner(self) -> int:
        """Extent of the axis along which hardware reads N:M patterns: channels of a group, or all columns."""
        shape = self.tensor.shape.numpy()
        return shape[0] if self.transposed else shape[1]

    def matrix(self) -> Wide:
        """The weight as [blocks, rows, columns]; the columns of a convolution in the order (kernel, channel)."""
        array = self.tensor.numpy().astype(np.float64)
        if self.window is None:
            return (array.T if self.transposed else array)[None]
        if self.transposed:
            array = np.swapaxes(np.flip(array, tuple(range(2, array.ndim))), 0, 1)
        last = np.moveaxis(array, 1, -1)
        return last.reshape(self.blocks, array.shape[0] // self.blocks, -1)

    def stored(self, matrix: Wide) -> Array:
        """A matrix in the form of the stored weight."""
        dtype = self.tensor.dtype.numpy()
        if self.window is None:
            plain = matrix[0].T if self.transposed else matrix[0]
            return np.ascontiguousarray(plain).astype(dtype)
        rows, channels, *kernel = self.tensor.shape.numpy()
        if self.transposed:
            rows, channels = channels, rows
        last = np.moveaxis(matrix.reshape(rows, *kernel, channels), -1, 1)
        if self.transposed:
            last = np.flip(np.swapaxes(last, 0, 1), tuple(range(2, last.ndim)))
        return np.ascontiguousarray(last).astype(dtype)

    @property
    def partner(self) -> ir.Value | None:
        """What is added to the output of the layer beside its bias: the other summand of a residual sum."""
        return self._summed()[1]

    @property
    def total(self) -> ir.Value:
        """The residual sum in which the output of the layer ends, or the output itself, its bias added."""
        return self._summed()[0]

    def _summed(self) -> tuple[ir.Value, ir.Value | None]:
        value = self.node.outputs[0]
        while len(uses := tuple(value.uses())) == 1 and not value.is_graph_output():
            user, index = uses[0]
            if user.op_type != "Add" or user.domain:
                break
            other = user.inputs[1 - index]
            if other is not None and not values.is_constant(other):
                return user.outputs[0], other
            if other is not self.bias:
                break
            value = user.outputs[0]
        return value, None

    @property
    def is_hidden(self) -> bool:
        """Whether it multiplies what its own node has made before: a recurrent weight."""
        return False

    def seen(self, array: Array) -> Array:
        """What the layer reads, as matrix products or convolutions read it."""
        return array

    def bias_vector(self) -> Wide | None:
        """The bias as [rows]."""
        if self.bias is None or self.bias.const_value is None:
            return None
        return self.bias.const_value.numpy().astype(np.float64).reshape(-1)


def find_layers(graph: ir.Graph, dense: str = "") -> list[Layer]:
    """The layers of a graph in its order; those that shall stay dense say why.

    Args:
        graph: sorted.
        dense: names of weights that the user wants dense, as a regular expression.
    """
    found = [layer for node in graph if (layer := _layer(node)) is not None]
    last = _closing(graph, found)
    return [
        dataclasses.replace(
            layer,
            dense=_why_dense(layer, dense, closing=layer.node in last),
            is_bound=_is_shared(layer) or _is_named(layer, dense),
        )
        for layer in found
    ]


def _layer(node: ir.Node) -> Layer | None:
    if node.domain or node.op_type not in PRUNABLE:
        return None
    source, weight = node.inputs[0], node.inputs[1]
    tensor = values.constant(weight)
    if source is None or weight is None or tensor is None or not weight.is_initializer():
        return None
    if tensor.dtype not in FLOATS or len(tensor.shape) < 2 or tensor.size == 0:
        return None
    if values.is_constant(source):
        return None
    if node.op_type == "Conv":
        return Layer(node, source, weight, _own_bias(node), _window(node, tensor), False)
    if len(tensor.shape) != 2:
        return None
    if node.op_type == "MatMul":
        return Layer(node, source, weight, _added_bias(node, tensor), None, True)
    plain = all(_number(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or _number(node, "transA", 0):
        return None
    return Layer(node, source, weight, _own_bias(node), None, not _number(node, "transB", 0))


def find_turned(graph: ir.Graph, dense: str = "") -> list[Layer]:
    """The transposed convolutions of one group; those whose weights shall stay dense say why.

    Args:
        graph: sorted.
        dense: names of weights that the user wants dense, as a regular expression.
    """
    found = [layer for node in graph if (layer := _turned(node)) is not None]
    plain = [layer for node in graph if (layer := _layer(node)) is not None]
    last = _closing(graph, [*plain, *found])
    return [
        dataclasses.replace(
            layer,
            dense=_why_dense(layer, dense, closing=layer.node in last)
            or (ADAPTS if layer.is_bound else ""),
            is_bound=layer.is_bound or _is_shared(layer) or _is_named(layer, dense),
        )
        for layer in found
    ]


def _turned(node: ir.Node) -> Layer | None:
    if node.op_type != "ConvTranspose" or node.domain or len(node.inputs) < 2:
        return None
    source, weight = node.inputs[0], node.inputs[1]
    tensor = values.constant(weight)
    if source is None or weight is None or tensor is None or not weight.is_initializer():
        return None
    window = _window(node, tensor)
    if tensor.dtype not in FLOATS or not tensor.size or window.group != 1:
        return None
    extra = node.attributes.get("output_padding")
    ends = (0,) * len(window.kernel) if extra is None else tuple(extra.as_ints())
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    own = bias if _is_bias(bias, tensor.shape.numpy()[1]) else None
    window = dataclasses.replace(window, turned=ends)
    bound = window.auto_pad != "NOTSET" or "output_shape" in node.attributes
    return Layer(node, source, weight, own, window, True, is_bound=bound)


ADAPTS = "it is a transposed convolution that states output_shape or auto_pad, not where it looks"


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _own_bias(node: ir.Node) -> ir.Value | None:
    """The third input where it is a constant of this node alone, one number a row."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    rows = _rows(node)
    return bias if _is_bias(bias, rows) else None


def _added_bias(node: ir.Node, tensor: ir.TensorProtocol) -> ir.Value | None:
    """The constant that the next node adds, one number a row."""
    uses = tuple(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    user, index = uses[0]
    if user.op_type != "Add" or user.domain or len(user.inputs) != 2:
        return None
    bias = user.inputs[1 - index]
    return bias if _is_bias(bias, tensor.shape.numpy()[1]) else None


def _rows(node: ir.Node) -> int:
    tensor = values.constant(node.inputs[1])
    assert tensor is not None
    shape = tensor.shape.numpy()
    turned = node.op_type == "Gemm" and not _number(node, "transB", 0)
    return shape[1] if turned else shape[0]


def _is_bias(bias: ir.Value | None, rows: int) -> bool:
    """Whether a value is a constant of one use, `rows` numbers along its last axis."""
    tensor = values.constant(bias)
    if bias is None or tensor is None or not bias.is_initializer():
        return False
    alone = len(bias.uses()) == 1 and not bias.is_graph_output()
    return alone and tensor.size == rows and tuple(tensor.shape.numpy()[-1:]) == (rows,)


def _window(node: ir.Node, tensor: ir.TensorProtocol) -> Window:
    kernel = tuple(tensor.shape.numpy()[2:])
    ones = (1,) * len(kernel)

    def ints(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        attribute = node.attributes.get(name)
        return default if attribute is None else tuple(attribute.as_ints())

    auto = node.attributes.get("auto_pad")
    mode = "NOTSET" if auto is None else auto.as_string()
    group = node.attributes.get("group")
    return Window(
        kernel,
        ints("strides", ones),
        ints("dilations", ones),
        ints("pads", (0,) * (2 * len(kernel))),
        mode,
        1 if group is None else group.as_int(),
    )


def _is_shared(layer: Layer) -> bool:
    return len(layer.weight.uses()) > 1 or layer.weight.is_graph_output()


def _is_named(layer: Layer, dense: str) -> bool:
    return bool(dense) and re.search(dense, layer.name) is not None


def why_dense(layer: Layer, dense: str) -> tuple[str, bool]:
    """Why a layer that is no classifier stays dense, or "", and whether it stays as it is, bit for bit."""
    return _why_dense(layer, dense, closing=False), _is_shared(layer) or _is_named(layer, dense)


def _why_dense(layer: Layer, dense: str, *, closing: bool) -> str:
    if _is_shared(layer):
        return "its weight has other uses"
    if _is_named(layer, dense):
        return "asked for"
    if layer.size < SMALL_ELEMENTS:
        return f"it has only {layer.size} weights"
    window = layer.window
    if window is not None and window.group > 1 and layer.inner == 1:
        return "it is depthwise: each output has a few weights of its own"
    if window is not None and window.group == 1 and layer.inner <= STEM_CHANNELS:
        return f"it reads an image of {layer.inner} channels"
    if closing:
        return "it makes the output"
    return ""


def _closing(graph: ir.Graph, found: list[Layer]) -> set[ir.Node]:
    """The layers from which a graph output follows with no other layer in between, where they are narrow.

    What is added to another activation ends a block, however near the output the sum is.
    """
    by_node = {layer.node: layer for layer in found}
    closing: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    stack = list(graph.outputs)
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        layer = by_node.get(node)
        if layer is None and not _is_residual(node):
            stack.extend(each for each in node.inputs if each is not None)
        elif layer is not None and _is_narrow(layer):
            closing.add(node)
    return closing


def _is_residual(node: ir.Node) -> bool:
    """Whether a node sums activations."""
    moving = [v for v in node.inputs if v is not None and not values.is_constant(v)]
    return node.op_type in _SUMS and len(moving) > 1


_SUMS = ("Add", "Sum", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def _is_narrow(layer: Layer) -> bool:
    """Whether a layer is small beside what it reads: a classifier, not a block that ends in a residual sum."""
    blocks, rows, columns = layer.matrix().shape
    return bool(blocks == 1 and rows * 4 <= columns)
