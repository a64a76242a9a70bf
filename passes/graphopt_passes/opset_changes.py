"""What changed between the versions of an operator, and how a node of the older one is written as the newer.

A step leads from one version of an operator to the next.  Most add an optional input or an attribute whose default
means what was meant before, and the node moves as it is; the others go through the function given here.  A step that is
in neither table cannot be made.  Source: onnx/docs/Changelog.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Skip

Given: TypeAlias = ir.Value | npt.NDArray[Any] | None


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How a node is written.

    Attributes:
        node: the node, which stays as it is.
        op_type: operator name.
        inputs: values, constants yet to be made, None for an omitted one.
        attributes: by name.
    """

    node: ir.Node
    op_type: str
    inputs: tuple[Given, ...]
    attributes: Mapping[str, ir.Attr]

    @classmethod
    def of(cls, node: ir.Node) -> Spelling:
        """The node as it is."""
        return cls(
            node, node.op_type, tuple(node.inputs), MappingProxyType(dict(node.attributes.data))
        )

    def is_new(self) -> bool:
        """Whether this is not how the node is written already."""
        same = len(self.inputs) == len(self.node.inputs) and all(
            a is b for a, b in zip(self.inputs, self.node.inputs, strict=True)
        )
        # The dictionary within: that compares attributes by identity first.
        kept = self.attributes == self.node.attributes.data
        return not (same and kept and self.op_type == self.node.op_type)

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - whatever the attribute holds
        """The value of an attribute."""
        held = self.attributes.get(name)
        return default if held is None else held.value

    def without(self, *names: str) -> Spelling:
        """Without these attributes."""
        kept = {n: a for n, a in self.attributes.items() if n not in names}
        return dataclasses.replace(self, attributes=MappingProxyType(kept))

    def having(self, name: str, value: int | str) -> Spelling:
        """With this attribute."""
        attribute = ir.convenience.convert_attribute(name, value)
        held = MappingProxyType({**self.attributes, name: attribute})
        return dataclasses.replace(self, attributes=held)

    def feeding(self, *more: Given) -> Spelling:
        """With these inputs after the ones that it has."""
        inputs = [*self.inputs, *more]
        while inputs and inputs[-1] is None:
            inputs.pop()
        return dataclasses.replace(self, inputs=tuple(inputs))


Step: TypeAlias = Callable[[Spelling, Shapes], Spelling]


def _ints_to_input(*names: str) -> Step:
    """Attributes that became inputs, in this order, at the end; an absent one stays absent."""

    def step(s: Spelling, _shapes: Shapes) -> Spelling:
        held = [s.get(name) for name in names]
        if any(numbers is not None and not len(numbers) for numbers in held):
            raise Skip("it has an empty list of axes, which not every version reads alike", s.node)
        data = [None if numbers is None else np.asarray(numbers, np.int64) for numbers in held]
        return s.without(*names).feeding(*data)

    return step


def _clip_11(s: Spelling, _shapes: Shapes) -> Spelling:
    """Bounds became inputs of the type of x.  Source: Clip-11."""
    data = [
        None if s.get(name) is None else np.asarray(s.get(name), _dtype(s).numpy())
        for name in ("min", "max")
    ]
    return s.without("min", "max").feeding(*data)


def _pad_11(s: Spelling, _shapes: Shapes) -> Spelling:
    """Pads and the value became inputs.  Source: Pad-11."""
    number = float(s.get("value", 0.0))
    fill = np.asarray(number, _dtype(s).numpy()) if number else None
    return s.without("pads", "value").feeding(np.asarray(s.get("pads"), np.int64), fill)


def _top_k_10(s: Spelling, _shapes: Shapes) -> Spelling:
    """K became an input.  Source: TopK-10."""
    return s.without("k").feeding(np.asarray([s.get("k")], np.int64))


def _dropout_10(s: Spelling, _shapes: Shapes) -> Spelling:
    """The mask became bool.  Source: Dropout-10."""
    if any(v.name for v in s.node.outputs[1:]):
        raise Skip("its mask changed type", s.node)
    return s


def _dropout_12(s: Spelling, _shapes: Shapes) -> Spelling:
    """The ratio became an input; without training_mode it still drops nothing.  Source: Dropout-12."""
    ratio = s.get("ratio")
    data = None if ratio is None else np.asarray(ratio, np.float32)
    return s.without("ratio").feeding(data)


def _split_18(s: Spelling, _shapes: Shapes) -> Spelling:
    """Without sizes, the number of parts has to be said.  Source: Split-18."""
    given = len(s.inputs) > 1 and s.inputs[1] is not None
    return s if given else s.having("num_outputs", len(s.node.outputs))


def _batch_norm_9(s: Spelling, _shapes: Shapes) -> Spelling:
    """The statistics are those of channels.  Source: BatchNormalization-9."""
    if s.get("spatial", 1) != 1:
        raise Skip("its statistics are not those of channels", s.node)
    return s.without("spatial")


def _batch_norm_14(s: Spelling, _shapes: Shapes) -> Spelling:
    """The number of outputs said whether it trains, training_mode does since.  Source: BatchNormalization-14."""
    if len(s.node.outputs) > 1:
        raise Skip("it runs in training mode", s.node)
    return s


def _softmax_13(s: Spelling, shapes: Shapes) -> Spelling:
    """It was over all axes from `axis` on, it is over that axis alone.  Source: Softmax-11, -13.

    Raises:
        Skip: several axes from `axis` on are not 1, or may not be.
    """
    value = s.node.inputs[0]
    dims = None if value is None else shapes.dims(value)
    axis = int(s.get("axis", 1))
    if dims is None or not -len(dims) <= axis < len(dims):
        raise Skip("its axes are not known", s.node)
    wide = [i for i in range(axis % len(dims), len(dims)) if dims[i].value != 1]
    if len(wide) > 1:
        raise Skip("it is over several axes", s.node)
    return s.having("axis", wide[0] if wide else len(dims) - 1)


def _upsample_9(s: Spelling, _shapes: Shapes) -> Spelling:
    """Scales became an input.  Source: Upsample-9."""
    return s.without("scales").feeding(np.asarray(s.get("scales"), np.float32))


def _upsample_10(s: Spelling, _shapes: Shapes) -> Spelling:
    """Resize took its place.  Source: Upsample-10, Resize-10."""
    return dataclasses.replace(s, op_type="Resize")


def _resize_11(s: Spelling, _shapes: Shapes) -> Spelling:
    """How coordinates are computed became attributes; before, they were x / scale, rounded down.  Source: Resize-11.

    Raises:
        Skip: a scale may be below 1, where runtimes rounded otherwise.
    """
    given = s.inputs[1]
    scales = given if isinstance(given, np.ndarray) else values.array(given)
    if scales is None or not (scales >= 1).all():
        raise Skip("a scale may be below 1", s.node)
    moved = dataclasses.replace(s, inputs=(s.inputs[0], np.zeros(0, np.float32), given))
    moved = moved.having("coordinate_transformation_mode", "asymmetric")
    return moved.having("nearest_mode", "floor") if s.get("mode", "nearest") == "nearest" else moved


def _roi_align_16(s: Spelling, _shapes: Shapes) -> Spelling:
    """The default for coordinates changed.  Source: RoiAlign-16."""
    return s.having("coordinate_transformation_mode", "output_half_pixel")


def _grid_sample_20(s: Spelling, _shapes: Shapes) -> Spelling:
    """Modes were renamed.  Source: GridSample-20."""
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = str(s.get("mode", "bilinear"))
    return s.having("mode", names.get(mode, mode))


def _dft_20(s: Spelling, _shapes: Shapes) -> Spelling:
    """The axis became an input, with another default.  Source: DFT-20."""
    padded = s if len(s.inputs) > 1 else dataclasses.replace(s, inputs=(s.inputs[0], None))
    return padded.without("axis").feeding(np.asarray(s.get("axis", 1), np.int64))


def _scatter_11(s: Spelling, _shapes: Shapes) -> Spelling:
    """ScatterElements took its place.  Source: Scatter-11."""
    return dataclasses.replace(s, op_type="ScatterElements")


def _floored(s: Spelling, _shapes: Shapes) -> Spelling:
    """How an average counts beyond a border that is rounded up was made clear only later.  Source: AveragePool-19."""
    if s.get("ceil_mode", 0):
        raise Skip("it rounds its size up", s.node)
    return s


def _padded_explicitly(s: Spelling, _shapes: Shapes) -> Spelling:
    """On which side the odd pad goes was written down otherwise.  Source: ConvTranspose-11."""
    if s.get("auto_pad", "NOTSET") != "NOTSET":
        raise Skip(f"its auto_pad is {s.get('auto_pad')}", s.node)
    return s


def _dtype(s: Spelling) -> ir.DataType:
    dtype = None if s.node.inputs[0] is None else s.node.inputs[0].dtype
    if dtype is None:
        raise Skip("its element type is not known", s.node)
    return dtype


_REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)
_axes_to_input = _ints_to_input("axes")

CHANGES: Mapping[tuple[str, int], Step] = {
    **{(op, 18): _axes_to_input for op in _REDUCTIONS},
    ("ReduceSum", 13): _axes_to_input,
    ("Squeeze", 13): _axes_to_input,
    ("Unsqueeze", 13): _axes_to_input,
    ("Split", 13): _ints_to_input("split"),
    ("Split", 18): _split_18,
    ("Slice", 10): _ints_to_input("starts", "ends", "axes"),
    ("Clip", 11): _clip_11,
    ("Pad", 11): _pad_11,
    ("TopK", 10): _top_k_10,
    ("Dropout", 10): _dropout_10,
    ("Dropout", 12): _dropout_12,
    ("BatchNormalization", 9): _batch_norm_9,
    ("BatchNormalization", 14): _batch_norm_14,
    ("Softmax", 13): _softmax_13,
    ("LogSoftmax", 13): _softmax_13,
    ("Hardmax", 13): _softmax_13,
    ("Upsample", 9): _upsample_9,
    ("Upsample", 10): _upsample_10,
    ("Resize", 11): _resize_11,
    ("RoiAlign", 16): _roi_align_16,
    ("GridSample", 20): _grid_sample_20,
    ("DFT", 20): _dft_20,
    ("Scatter", 11): _scatter_11,
    ("AveragePool", 19): _floored,
    ("AveragePool", 22): _floored,
    ("MaxPool", 22): _floored,
    ("ConvTranspose", 11): _padded_explicitly,
}
"""Steps that write a node otherwise, by operator and the version that they lead to."""

_NEUTRAL: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys((*_REDUCTIONS, "Gather", "Softmax", "LogSoftmax", "Hardmax"), (11, 13)),
    **dict.fromkeys(("Max", "Mean", "Min", "Sum"), (8, 13)),
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), (13, 14)),
    **dict.fromkeys(("Abs", "Ceil", "Floor", "GatherElements", "LRN", "Mod"), (13,)),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), (14,)),
    **dict.fromkeys(("ScatterElements", "ScatterND"), (16, 18)),
    **dict.fromkeys(("ArgMax", "ArgMin", "Loop"), (11, 12, 13)),
    "Attention": (24,),
    "AveragePool": (10, 11),
    "BatchNormalization": (15,),
    "Cast": (9, 13, 19, 24),
    "CastLike": (19, 24),
    "Clip": (12, 13),
    "Concat": (11,),
    "Constant": (11, 12),
    "DepthToSpace": (11, 13),
    "DequantizeLinear": (13, 19, 21, 23),
    "GatherND": (12, 13),
    "Gemm": (11, 13),
    "Loop": (11, 13, 16),
    "LpPool": (18,),
    "MaxPool": (8, 10, 12),
    "MeanVarianceNormalization": (13,),
    "NegativeLogLikelihoodLoss": (13,),
    "OneHot": (11,),
    "OptionalGetElement": (18,),
    "OptionalHasElement": (18,),
    "PRelu": (16,),
    "Pad": (13, 18, 19),
    "QuantizeLinear": (13, 19, 21, 23),
    "ReduceMax": (11, 12, 13, 20),
    "ReduceMin": (11, 12, 13, 20),
    "ReduceSum": (11,),
    "Reshape": (14,),
    "Resize": (13, 18, 19),
    "Shape": (15,),
    "Slice": (11, 13),
    "SoftmaxCrossEntropyLoss": (13,),
    "TopK": (11,),
    "Unsqueeze": (11,),
}

NEUTRAL: frozenset[tuple[str, int]] = frozenset(
    (op, version) for op, versions in _NEUTRAL.items() for version in versions
) - frozenset(CHANGES)
"""Steps that change the text of the standard, or add what is off by default: nodes move as they are."""
