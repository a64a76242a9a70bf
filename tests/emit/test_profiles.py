"""Ranges of dynamic dimensions."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.emit.profiles import (
    InputProfile,
    Range,
    input_profiles,
    parse_profile,
    shapes_text,
)
from graphopt.emit.shape_tensors import shape_tensors
from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.runtime.specs import TensorSpec

X = TensorSpec("x", ir.DataType.FLOAT, ("batch", 3, None))
FIXED = TensorSpec("f", ir.DataType.FLOAT, (1, 2))


def test_a_range_in_words() -> None:
    assert parse_profile("batch=1,8,32") == ("batch", Range(1, 8, 32))
    assert parse_profile("x:0=2,2,2") == ("x:0", Range(2, 2, 2))


@pytest.mark.parametrize("text", ["batch", "batch=1,2", "batch=a,b,c", "=1,2,3", "batch=1;2;3"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(OptionError, match="three sizes"):
        parse_profile(text)


@pytest.mark.parametrize("text", ["batch=3,2,4", "batch=0,1,2", "batch=1,4,2"])
def test_sizes_must_rise(text: str) -> None:
    with pytest.raises(OptionError, match="must rise"):
        parse_profile(text)


def test_named_ranges_and_what_was_fed() -> None:
    feed = {"x": np.zeros((2, 3, 5))}
    found = input_profiles((X, FIXED), {"batch": Range(1, 4, 8)}, feed)
    assert found == (InputProfile("x", (1, 3, 1), (4, 3, 5), (8, 3, 5)),)
    assert shapes_text(found, "most") == "x:8x3x5"


def test_an_unnamed_dimension_by_its_place() -> None:
    found = input_profiles((X,), {"x:2": Range(4, 5, 6)}, {})
    assert found[0].usual == (1, 3, 5)


def test_a_range_for_no_dimension() -> None:
    with pytest.raises(OptionError, match="there are: batch"):
        input_profiles((X,), {"seq": Range(1, 2, 3)}, {})


def test_inputs_that_decide_shapes_have_ranges_of_values() -> None:
    shape = TensorSpec("shape", ir.DataType.INT64, (2,))
    feed = {"x": np.zeros((2, 3, 4)), "shape": np.array([6, 4])}
    fixed = input_profiles((X, shape), {}, feed, {"shape"})
    assert fixed[1] == InputProfile("shape", (6, 4), (6, 4), (6, 4))
    ranges = {"shape:0": Range(3, 6, 12)}
    (_, ranged) = input_profiles((X, shape), ranges, feed, {"shape"})
    assert ranged == InputProfile("shape", (3, 4), (6, 4), (12, 4))
    assert shapes_text((ranged,), "most") == "shape:12x4"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Reshape(x, s)", {"s"}),
        ("t = Cast<to = 7>(k) l = Concat<axis = 0>(t, t) y = Reshape(x, l)", {"k"}),
        ("y = Add(x, x)", set()),
        ("t = Cast<to = 1>(s) y = Mul(x, t)", set()),
    ],
)
def test_inputs_that_decide_shapes_are_found(body: str, found: set[str]) -> None:
    text = (
        '<ir_version: 9, opset_import: ["" : 18]> '
        "g (float[2,2] x, int64[2] s, int32[1] k) => (float[a,b] y) { " + body + " }"
    )
    assert shape_tensors(load_model(onnx.parser.parse_model(text))) == found
