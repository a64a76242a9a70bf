"""Judges `Shapes` by running the model: every value that ONNX Runtime computes is compared with its dims and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from graphopt.ir.shapes import Dim, Ratio, Shapes

Sizes = dict[str, int]


def run_all(proto: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of the main graph, with optimisations off."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    known = {info.name for info in tapped.graph.output}
    for node in tapped.graph.node:
        for name in node.output:
            if name and name not in known:
                known.add(name)
                tapped.graph.output.add().name = name
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(tapped.SerializeToString(), options)
    names = [info.name for info in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def lies(model: ir.Model, shapes: Shapes, actual: Mapping[str, Any]) -> list[str]:
    """What is inferred of the main graph and is not so, in words; empty for the truth.

    A symbol gets its number where a value is first seen whose dim or element is that symbol alone.
    """
    sizes: Sizes = {}
    found: list[str] = []
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        array = actual.get(value.name or "")
        if isinstance(array, np.ndarray):
            found += [f"{value.name}: {lie}" for lie in _lies_of(shapes, value, array, sizes)]
    return found


def _lies_of(
    shapes: Shapes, value: ir.Value, array: np.ndarray[Any, Any], sizes: Sizes
) -> list[str]:
    dims, data = shapes.dims(value), shapes.data(value)
    if dims is None:
        return []
    if len(dims) != array.ndim:
        return [f"rank of {dims}, really {array.shape}"]
    found = [_disagreement(d, n, sizes) for d, n in zip(dims, array.shape, strict=True)]
    if data is not None and data.shape != array.shape:
        found.append(f"data of shape {data.shape}, really {array.shape}")
    elif data is not None:
        pairs = zip(data.elements, array.reshape(-1).tolist(), strict=True)
        found += [_disagreement(e, number, sizes) for e, number in pairs]
    return [lie for lie in found if lie]


def _disagreement(element: Dim | Ratio | float, actual: float, sizes: Sizes) -> str:
    if isinstance(element, float):
        same = element == actual or (np.isnan(element) and np.isnan(actual))
        return "" if same else f"{element}, really {actual}"
    if isinstance(element, Ratio):
        number = element.number.evaluate(sizes)
        close = number is None or np.isclose(number / element.by, actual)
        return "" if close else f"{element}, really {actual}"
    symbols = element.symbols()
    if len(symbols) == 1 and element == Dim.named(*next(iter(symbols))):
        sizes.setdefault(next(iter(symbols)).name, int(actual))
    expected = element.evaluate(sizes)
    return "" if expected in (None, actual) else f"{element} = {expected}, really {actual}"
