"""Sums of residual blocks in the layout of convolutions, where what is summed shall be seen.

ONNX Runtime adds a residual within the convolution before it, and applies the Relu behind it there.  Where the result
of that convolution is an output, it cannot: an Add and a Relu go through memory on their own, a tenth of a ResNet's
time.  A convolution of each channel by itself with a single weight of 1 does both at once: 1 * t + r is rounded once.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NCHWC = "com.microsoft.nchwc"


@dataclasses.dataclass(frozen=True)
class Blocked:
    """A value in blocks of channels: how many it has, padding left out, and its dimensions as ONNX has them."""

    channels: int
    dims: tuple[int | str, ...]


def fuse_sums(graph: onnx.GraphProto, known: Mapping[str, Blocked], block: int) -> None:
    """Makes one convolution of every Add of two known values of one shape whose result only a Relu reads.

    Before:  s = Add(t, r)   y = Relu(s)
    After:   y = Conv(t, ones, sum=r)   by channel, with the Relu within

    Args:
        graph: an optimised graph of ONNX Runtime, changed in place.
        known: values in blocks, by name.
        block: channels of one block.
    """
    readers: dict[str, list[onnx.NodeProto]] = {output.name: [] for output in graph.output}
    counts = dict.fromkeys(readers, 1)
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
            counts[name] = counts.get(name, 0) + 1
    fused: dict[str, onnx.NodeProto] = {}  # by what the Relu gives
    left: set[str] = set()
    for node in graph.node:
        given = [known.get(name) for name in node.input]
        if node.domain or node.op_type != "Add" or not _are_one_shape(given, block):
            continue
        behind = readers.get(node.output[0], [])
        if counts.get(node.output[0]) != 1 or [each.op_type for each in behind] != ["Relu"]:
            continue
        assert given[0] is not None
        fused[behind[0].output[0]] = _sum(node.input, behind[0].output[0], given[0].channels)
        left.add(node.output[0])
    _write(graph, fused, left)


def _are_one_shape(given: Sequence[Blocked | None], block: int) -> bool:
    first, second = given if len(given) == 2 else (None, None)
    return first is not None and first == second and first.channels % block == 0


def _sum(names: Sequence[str], result: str, channels: int) -> onnx.NodeProto:
    node = onnx.NodeProto(op_type="Conv", domain=NCHWC, output=[result])
    node.input.extend([names[0], _ones(channels), "", names[1]])
    node.attribute.add(name="group", type=onnx.AttributeProto.INT, i=channels)
    for name, text in (("activation", b"Relu"), ("auto_pad", b"NOTSET")):
        node.attribute.add(name=name, type=onnx.AttributeProto.STRING, s=text)
    for name, number in (("kernel_shape", 1), ("strides", 1), ("dilations", 1)):
        node.attribute.add(name=name, type=onnx.AttributeProto.INTS, ints=[number] * 2)
    node.attribute.add(name="pads", type=onnx.AttributeProto.INTS, ints=[0] * 4)
    return node


def _ones(channels: int) -> str:
    return f"graphopt/ones/{channels}"


def _write(graph: onnx.GraphProto, fused: Mapping[str, onnx.NodeProto], left: set[str]) -> None:
    """Replaces the nodes that gave the names of `fused`, and drops those that gave the names `left`."""
    nodes: Iterable[onnx.NodeProto] = [
        fused.get(node.output[0], node) for node in graph.node if node.output[0] not in left
    ]
    data = [node.SerializeToString() for node in nodes]
    del graph.node[:]
    for each in data:
        graph.node.add().ParseFromString(each)
    for channels in sorted({node.attribute[0].i for node in fused.values()}):
        weight = np.ones((channels, 1, 1, 1), np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, _ones(channels)))
