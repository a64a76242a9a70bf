"""Stands for a real exporter: a classifier's head with weights that never change."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as h
import onnx.numpy_helper as nh


def export(path: Path) -> None:
    """Writes the model that is deployed."""
    rng = np.random.default_rng(0)
    weight = nh.from_array(rng.standard_normal((4, 3), dtype=np.float32), "w")
    bias = nh.from_array(rng.standard_normal(3, dtype=np.float32), "b")
    nodes = [
        h.make_node("Identity", ["x"], ["i"]),
        h.make_node("MatMul", ["i", "w"], ["m"]),
        h.make_node("Add", ["m", "b"], ["s"]),
        h.make_node("Softmax", ["s"], ["p"], axis=-1),
    ]
    x = h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])
    p = h.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ["batch", 3])
    graph = h.make_graph(nodes, "head", [x], [p], [weight, bias])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


if __name__ == "__main__":
    export(Path(sys.argv[1]))
