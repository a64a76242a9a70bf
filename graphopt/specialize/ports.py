"""Types and layouts of inputs and outputs: the nodes that lead from what is fed to what the model computes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.ir.build import Names
from graphopt.specialize.plan import InputPort, OutputPort, Scaling
from graphopt.specialize.wanted import LAYOUTS, Image, Specialization, parse_dtype

_FLOAT = ir.DataType.FLOAT
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def change(
    model: ir.Model, wanted: Specialization, names: Names
) -> tuple[tuple[InputPort, ...], tuple[OutputPort, ...]]:
    """Gives inputs and outputs the types and layouts that are wanted; returns all of them.

    Raises:
        OptionError: a type, layout or rank does not allow it.
    """
    graph = model.graph
    for name in wanted.images:
        if name in wanted.dtypes or name in wanted.layouts:
            raise OptionError(
                f"image {name!r}: it is uint8 in the layout that --image gives; leave out --io-dtype and --io-layout"
            )
    outputs = tuple(_Output(model, value, wanted, names).port() for value in list(graph.outputs))
    inputs = tuple(_Input(model, value, wanted, names).port() for value in list(graph.inputs))
    return inputs, outputs


@dataclasses.dataclass
class _Tape:
    """Nodes in the making, one behind the other."""

    base: str
    names: Names
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        like: ir.Value,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """The output of a new node, of the type of `like`."""
        node = ir.node(
            op_type, inputs, attributes=attributes, name=self.names.fresh(f"{self.base}_{op_type}")
        )
        made = node.outputs[0]
        made.name = self.names.fresh(f"{self.base}_{op_type.lower()}")
        made.type, made.shape = like.type, like.shape
        self.nodes.append(node)
        return made

    def const(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A constant."""
        node = ir.node(
            "Constant",
            [],
            attributes={"value": ir.tensor(array)},
            name=self.names.fresh(f"{self.base}_Constant"),
        )
        made = node.outputs[0]
        made.name = self.names.fresh(f"{self.base}_constant")
        made.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        made.shape = ir.Shape(array.shape)
        self.nodes.append(node)
        return made

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another element type."""
        made = self.op("Cast", [value], value, to=int(dtype))
        made.type = ir.TensorType(dtype)
        return made

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """The value with its axes in another order."""
        made = self.op("Transpose", [value], value, perm=list(perm))
        made.shape = _permuted(value.shape, perm)
        return made


def _permuted(shape: ir.Shape | None, perm: Sequence[int]) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[axis] for axis in perm])


class _Input:
    """An input to change."""

    def __init__(
        self, model: ir.Model, value: ir.Value, wanted: Specialization, names: Names
    ) -> None:
        self.graph, self.value, self.names = model.graph, value, names
        self.name = value.name or ""
        self.image = wanted.images.get(self.name)
        text = wanted.dtypes.get(self.name)
        self.dtype = None if text is None else parse_dtype(self.name, text)
        self.layout = wanted.layouts.get(self.name)

    def port(self) -> InputPort:
        if self.image is None and self.dtype is None and self.layout is None:
            return InputPort(self.name, self.name)
        _check_tensor(self.value)
        if self.value.is_initializer():
            raise OptionError(
                f"input {self.name!r} has a default value: bind it, or leave its type and layout"
            )
        held = self.value.dtype
        assert held is not None
        tape = _Tape(self.name, self.names)
        new = ir.Value(name=self.name, type=self.value.type, shape=self.value.shape)
        if self.image is not None:
            port, made = self._image(tape, new, self.image, held)
        else:
            port, made = self._plain(tape, new, held)
        self._put(tape, new, made)
        return port

    def _plain(self, tape: _Tape, new: ir.Value, held: ir.DataType) -> tuple[InputPort, ir.Value]:
        made, perm = new, None
        if self.layout is not None:
            there = _perm(self.value, self.layout)
            perm = _inverse(there)
            new.shape = _permuted(self.value.shape, there)
        if self.dtype is not None:
            new.type = ir.TensorType(self.dtype)
            made = tape.cast(new, held)
        if perm is not None:
            made = tape.transpose(made, perm)
        return InputPort(self.name, self.name, held if self.dtype else None, None, perm), made

    def _image(
        self, tape: _Tape, new: ir.Value, image: Image, held: ir.DataType
    ) -> tuple[InputPort, ir.Value]:
        """Cast, order of channels, one product and one sum, in float32; then the model's layout and type."""
        if not held.is_floating_point():
            raise OptionError(
                f"image {self.name!r}: the input is {held.name}, and images scale to floats"
            )
        last = _channels_last(self.value, image)
        given_last = image.layout == "NHWC"
        there = None if last == given_last else _perm(self.value, image.layout)
        new.type = ir.TensorType(ir.DataType.UINT8)
        new.shape = self.value.shape if there is None else _permuted(self.value.shape, there)
        rank = len(self.value.shape or ())
        axis = rank - 1 if given_last else rank - 3
        channels = new.shape[axis] if new.shape is not None else None
        scaling = Scaling(image.scale, image.mean, image.std, axis, image.channels == "BGR")
        _check_channels(self.name, scaling, channels)
        made = tape.cast(new, _FLOAT)
        perm = None if there is None else _inverse(there)
        if perm is not None:
            made = tape.transpose(
                made, perm
            )  # before the arithmetic, which a convolution may then take in
        inner = rank - 1 if last else rank - 3
        if scaling.reverse:
            order = tape.const(np.array([2, 1, 0], np.int64))
            made = tape.op("Gather", [made, order], made, axis=inner)
        made = _scaled(tape, made, dataclasses.replace(scaling, axis=inner), rank)
        if held != _FLOAT:
            made = tape.cast(made, held)
        return InputPort(self.name, self.name, held, scaling, perm), made

    def _put(self, tape: _Tape, new: ir.Value, made: ir.Value) -> None:
        """Puts the new input and its nodes in the place of the old one."""
        value, graph = self.value, self.graph
        value.name = self.names.fresh(f"{self.name}_original")
        index = next(i for i, each in enumerate(graph.inputs) if each is value)
        for use in value.uses():
            use.node.replace_input_with(use.idx, made)
        for at, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[at] = made
        graph.inputs[index] = new
        first = next(iter(graph), None)
        if first is None:
            graph.extend(tape.nodes)
        else:
            graph.insert_before(first, tape.nodes)


class _Output:
    """An output to change."""

    def __init__(
        self, model: ir.Model, value: ir.Value, wanted: Specialization, names: Names
    ) -> None:
        self.graph, self.value, self.names = model.graph, value, names
        self.name = value.name or ""
        is_input = value.is_graph_input()
        text = None if is_input else wanted.dtypes.get(self.name)
        self.dtype = None if text is None else parse_dtype(self.name, text)
        self.layout = None if is_input else wanted.layouts.get(self.name)

    def port(self) -> OutputPort:
        if self.dtype is None and self.layout is None:
            return OutputPort(self.name, self.name)
        _check_tensor(self.value)
        held = self.value.dtype
        assert held is not None
        if self.dtype is not None and held.is_floating_point() and not _is_float(self.dtype):
            raise OptionError(
                f"output {self.name!r} is {held.name}: as {self.dtype.name} it would lose its fractions"
            )
        value = self.value
        value.name = self.names.fresh(f"{self.name}_original")
        tape, made, perm = _Tape(self.name, self.names), value, None
        if self.layout is not None:
            perm = _perm(value, self.layout)
            made = tape.transpose(made, perm)
        if self.dtype is not None:
            made = tape.cast(made, self.dtype)
        made.name = self.name
        self.graph.extend(tape.nodes)
        index = next(i for i, each in enumerate(self.graph.outputs) if each is value)
        self.graph.outputs[index] = made
        return OutputPort(self.name, self.name, self.dtype, perm)


def _scaled(tape: _Tape, value: ir.Value, scaling: Scaling, rank: int) -> ir.Value:
    """The value / (scale * std) - mean / std, by one product and one sum; what does nothing is left out."""
    wide = [1] * rank
    wide[scaling.axis] = -1
    std, mean = np.asarray(scaling.std, np.float64), np.asarray(scaling.mean, np.float64)
    factor, shift = 1 / (scaling.scale * std), -mean / std
    for op_type, numbers, neutral in (("Mul", factor, 1.0), ("Add", shift, 0.0)):
        if not np.all(numbers == neutral):
            shaped = np.atleast_1d(numbers).reshape(wide).astype(np.float32)
            value = tape.op(op_type, [value, tape.const(shaped)], value)
    return value


def _check_tensor(value: ir.Value) -> None:
    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        raise OptionError(f"{value.name!r} is {value.type}: only tensors change type and layout")


def _check_channels(name: str, scaling: Scaling, channels: object) -> None:
    numbers = {len(scaling.mean), len(scaling.std)} - {1}
    if scaling.reverse and channels != 3:
        raise OptionError(f"image {name!r}: {channels} channels have no order of blue, green, red")
    if isinstance(channels, int) and numbers - {channels}:
        raise OptionError(
            f"image {name!r}: mean {list(scaling.mean)} and std {list(scaling.std)} for {channels} channels"
        )


def _is_float(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point()


def _perm(value: ir.Value, layout: str) -> tuple[int, ...]:
    """The axes of `value` in the order of `layout`, which it does not have yet: channels last, or behind the batch."""
    if layout not in LAYOUTS:
        raise OptionError(f"layout {layout!r} of {value.name!r}: give NHWC or NCHW")
    rank = len(value.shape) if value.shape is not None else 0
    if rank not in (3, 4, 5):
        raise OptionError(
            f"layout {layout!r} of {value.name!r}: it has {rank or 'an unknown number of'} dimensions, and layouts "
            "are of 3 (without a batch), 4 or 5"
        )
    first = 0 if rank == 3 else 1  # where channels are, if not last
    rest = [axis for axis in range(rank) if axis != (first if layout == "NHWC" else rank - 1)]
    if layout == "NHWC":
        return (*rest, first)
    return (*rest[:first], rank - 1, *rest[first:])


def _inverse(perm: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.argsort(perm))


def _channels_last(value: ir.Value, image: Image) -> bool:
    """Whether the model wants channels last.

    Raises:
        OptionError: its rank is none of an image, or neither of the axes looks like channels.
    """
    dims = list(value.shape or ())
    if len(dims) not in (3, 4):
        raise OptionError(
            f"image {value.name!r}: the input is {value.shape}; images have 4 dimensions, or 3 without a batch"
        )
    if image.model_layout:
        return image.model_layout == "NHWC"
    first, last = (dim in (1, 3, 4) for dim in (dims[-3], dims[-1]))
    if first == last:
        raise OptionError(
            f"image {value.name!r}: {value.shape} may be NCHW or NHWC; say model=nchw or model=nhwc"
        )
    return last
