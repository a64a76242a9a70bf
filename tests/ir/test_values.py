"""What counts as constant, and what it is asked without reading it."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir import values

MODEL = """<ir_version: 8, opset_import: ["":18]>
g (float[N] x, float[1] default) => (float[N] y)
<float one = {1.0}, float[2] two = {2.0, 2.0}, float[1] default = {1.0}>
{ a = Constant<value_float = -0.0>()  b = Constant<value_ints = [3, 4]>()
  c = Constant<value = float[2] {1.0, 2.0}>()  d = Constant<value_strings = ["p", "q"]>()
  s = Add(x, one)  t = Add(s, default)  u = Add(t, a)  v = Add(u, c)  y = Add(v, two) }"""


def value_of(name: str) -> ir.Value:
    graph = ir.from_onnx_text(MODEL).graph
    made = {out.name: out for node in graph for out in node.outputs}
    return made.get(name) or graph.initializers[name]


def constant(array: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.Tensor(array, name="w")
    value = ir.Value(name="w", const_value=tensor)
    ir.Graph([], [], nodes=[], initializers=[value], name="g")
    return value


@pytest.mark.parametrize("name", ["one", "two", "a", "b", "c", "d"])
def test_initializers_and_constant_nodes_are_constant(name: str) -> None:
    assert values.is_constant(value_of(name))


@pytest.mark.parametrize("name", ["default", "y"])
def test_what_a_feed_can_change_is_not_constant(name: str) -> None:
    assert not values.is_constant(value_of(name))
    assert values.array(value_of(name)) is None


def test_an_absent_input_is_not_constant() -> None:
    assert values.constant(None) is None
    assert values.scalar(None) is None


def test_every_spelling_of_constant_node_is_read() -> None:
    found = [values.array(value_of(name)) for name in ("a", "b", "c", "d")]
    assert [None if one is None else one.tolist() for one in found] == [
        -0.0,
        [3, 4],
        [1.0, 2.0],
        [b"p", b"q"],
    ]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[2.5]], np.float32), 2.5),
        (np.array(True), True),
        (np.array([7], np.uint64), 7),
        (np.array([1.5], ml_dtypes.bfloat16), 1.5),
        (np.array([-3], ml_dtypes.int4), -3),
        (np.array([1.0, 2.0]), None),
        (np.array([1j]), None),
    ],
)
def test_scalar_has_exactly_one_real_element(array: np.ndarray[Any, Any], expected: object) -> None:
    found = values.scalar(constant(array))
    assert found == expected
    assert type(found) is type(expected)


def test_scalar_does_not_read_a_large_tensor() -> None:
    class Unreadable(ir.Tensor[Any]):
        def numpy(self) -> np.ndarray[Any, Any]:
            raise AssertionError("the elements were read")

    value = ir.Value(name="w", const_value=Unreadable(np.zeros(4)))
    ir.Graph([], [], nodes=[], initializers=[value], name="g")
    assert values.scalar(value) is None


@pytest.mark.parametrize(
    ("array", "number", "expected"),
    [
        (np.full(70000, 2.0, np.float32), 2, True),
        (np.append(np.full(70000, 2.0, np.float32), 3.0), 2, False),
        (np.array([0.0, -0.0]), 0, True),
        (np.array([np.nan, np.nan]), math.nan, True),
        (np.array([2**53 + 1]), float(2**53), False),
        (np.array([1, 1], np.uint8), 1.5, False),
        (np.array([1, 1], np.uint8), math.inf, False),
        (np.array([], np.float32), 1, False),
    ],
)
def test_filled_with(array: np.ndarray[Any, Any], number: float, expected: bool) -> None:
    assert values.is_filled_with(constant(array), number) is expected


def test_signed_zeros_differ_on_request() -> None:
    value = constant(np.array([-0.0, -0.0], np.float32))
    assert values.is_filled_with(value, -0.0, signed_zero=True)
    assert not values.is_filled_with(value, 0.0, signed_zero=True)


def test_fill_is_the_number_of_a_uniform_tensor() -> None:
    assert values.fill(constant(np.array([3.0, 3.0]))) == 3.0
    assert values.fill(constant(np.array([0.0, -0.0]))) is None
    assert values.fill(constant(np.array([np.nan]))) is None


def test_size_counts_packed_elements_and_string_lengths() -> None:
    assert values.size_bytes(ir.Tensor(np.zeros((3, 3), ml_dtypes.int4))) == 5
    assert values.size_bytes(ir.StringTensor([b"ab", b"c"], shape=ir.Shape([2]))) == 3


def test_a_constant_of_nothing_known_is_none() -> None:
    for attributes in ([], [ir.AttrInt64("value_of_the_future", 3)]):
        node = ir.Node("", "Constant", [], attributes)
        assert values.constant(node.outputs[0]) is None
