"""ResNet-50 and MobileNetV2 as exporters write them, BatchNormalization and all, with random weights.

python -m benchmarks.vision resnet50 resnet50.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Net:
    """A graph that grows by one layer at a time; weights keep the power of what they multiply."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401
        """The output of one more node."""
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def held(self, array: np.ndarray) -> str:
        """The name of one more initializer."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(self, value: str, shape: tuple[int, int, int], stride: int = 1, group: int = 1) -> str:
        """Conv and BatchNormalization: filters, channels that each reads, size."""
        filters, channels, size = shape
        fan = channels * size**2
        weight = self._rng.normal(size=(filters, channels, size, size)) * np.sqrt(2 / fan)
        pad = size // 2
        made = self.op(
            "Conv",
            value,
            self.held(weight),
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[pad] * 4,
            group=group,
        )
        draw = self._rng.normal(size=(4, filters))
        parts = (1 + 0.2 * draw[0], 0.2 * draw[1], 0.2 * draw[2], np.exp(0.3 * draw[3]))
        return self.op("BatchNormalization", made, *(self.held(part) for part in parts))

    def proto(self, classes: int, value: str, channels: int) -> onnx.ModelProto:
        """The model with its head."""
        pooled = self.op("Flatten", self.op("GlobalAveragePool", value))
        weight = self._rng.normal(size=(classes, channels)) / np.sqrt(channels)
        held = self.held(weight), self.held(np.zeros(classes))
        self.nodes.append(helper.make_node("Gemm", [pooled, *held], ["logits"], transB=1))
        x = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])
        y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])
        graph = helper.make_graph(self.nodes, "net", [x], [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resnet50() -> onnx.ModelProto:
    """ResNet-50 v1.5 (He et al. 2015; strides in the middle convolution)."""
    net = Net()
    value = net.op("Relu", net.conv("image", (64, 3, 7), 2))
    value = net.op("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            inner = net.op("Relu", net.conv(value, (width, channels, 1)))
            inner = net.op("Relu", net.conv(inner, (width, width, 3), stride))
            inner = net.conv(inner, (4 * width, width, 1))
            if not index:
                value = net.conv(value, (4 * width, channels, 1), stride)
            value, channels = net.op("Relu", net.op("Add", inner, value)), 4 * width
    return net.proto(1000, value, channels)


BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
MORE_BLOCKS = ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, filters, count and stride of MobileNetV2's blocks (Sandler et al. 2018, table 2)."""


def mobilenetv2() -> onnx.ModelProto:
    """MobileNetV2, Clip to [0, 6] by initializers."""
    net = Net()
    bounds = net.held(np.zeros(())), net.held(np.full((), 6))

    def bounded(value: str) -> str:
        return net.op("Clip", value, *bounds)

    value, channels = bounded(net.conv("image", (32, 3, 3), 2)), 32
    for expansion, filters, count, first in (*BLOCKS, *MORE_BLOCKS):
        for index in range(count):
            stride, wide = (first if not index else 1), channels * expansion
            inner = bounded(net.conv(value, (wide, channels, 1))) if expansion > 1 else value
            inner = bounded(net.conv(inner, (wide, 1, 3), stride, group=wide))
            inner = net.conv(inner, (filters, wide, 1))
            value = net.op("Add", inner, value) if index else inner
            channels = filters
    value = bounded(net.conv(value, (1280, channels, 1)))
    return net.proto(1000, value, 1280)


MODELS = {"resnet50": resnet50, "mobilenetv2": mobilenetv2}


def images(count: int) -> np.ndarray:
    """Smooth pictures with some noise: float32 [count, 3, 224, 224]."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(count, 3, 14, 14)).repeat(16, axis=2).repeat(16, axis=3)
    return (coarse + 0.3 * rng.normal(size=coarse.shape)).astype(np.float32)


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(MODELS[sys.argv[1]]().SerializeToString())
