"""Slice with bounds of every kind: its length and its elements are those of ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest

from graphopt.ir.evaluate import evaluate
from graphopt.ir.kernels.movement import _slice_bounds
from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes

HEAD = '<ir_version: 9, opset_import: ["" : 18]> '
BOUNDS = (-(2**63), -9, -4, -3, -1, 0, 1, 2, 3, 9, 2**63 - 1)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_bounds_are_clamped_as_the_runtime_does(size: int) -> None:
    inputs = "int64[1] b, int64[1] e, int64[1] a, int64[1] p"
    text = f"{HEAD} g (float[{size}] x, {inputs}) => (float[N] y) {{ y = Slice(x, b, e, a, p) }}"
    session = ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    data = np.arange(size, dtype=np.float32)
    for start, end, step in itertools.product(BOUNDS, BOUNDS, (1, -1, 2, -2)):
        values = {"b": start, "e": end, "a": 0, "p": step}
        feed = {name: np.array([value]) for name, value in values.items()}
        (expected,) = session.run(None, {"x": data, **feed})
        held = ", ".join(f"int64[1] {name} = {{{value}}}" for name, value in values.items())
        model = load_model(
            f"{HEAD} g (float[{size}] x) => (float[N] y) <{held}> {{ y = Slice(x, b, e, a, p) }}"
        )
        dims = Shapes(model).dims(model.graph.outputs[0])
        assert dims is not None
        assert dims[0].value in (None, expected.size), (start, end, step)
        if step < 0 and end == 2**63 - 1:
            with pytest.raises(ValueError, match="not well-defined"):
                _slice_bounds(size, start, end, step)
            continue
        seen = data[slice(*_slice_bounds(size, start, end, step), step)]
        np.testing.assert_array_equal(seen, expected, err_msg=str((start, end, step)))


def test_a_backward_slice_to_the_end_is_left_to_the_runtime() -> None:
    model = load_model(
        f"{HEAD} g () => (float[N] y) <float[3] x = {{1, 2, 3}}, int64[1] b = {{9}}, int64[1] e = "
        "{9223372036854775807}, int64[1] a = {0}, int64[1] p = {-1}> { y = Slice(x, b, e, a, p) }"
    )
    (output,) = model.graph.outputs
    found = evaluate(list(model.graph), [output], model.opset_imports)
    assert found.tensors[output].numpy().tolist() == [3, 2, 1]
