"""Fresh names are unique over the whole model; the tape builds nodes that belong to no graph yet."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.ir.build import Builder, Names

TEXT = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
g (float[1] x, bool c) => (float[1] y) <float[1] w = {1}> {
  [first] a = Add(x, w)
  [second] b = my.f(a)
  y = If(c) <then_branch = t () => (float[1] p) { p = Neg(b) }, else_branch = e () => (float[1] q) { q = Relu(b) }>
}
<domain: "my", opset_import: ["" : 18]>
f (inner) => (out) { out = Neg(inner) }
"""


def names() -> Names:
    return Names.of(ir.from_proto(onnx.parser.parse_model(TEXT)))


@pytest.mark.parametrize("taken", ["x", "w", "a", "y", "p", "q", "first", "inner", "out"])
def test_a_name_of_any_graph_is_taken(taken: str) -> None:
    assert names().fresh(taken) == f"{taken}_1"


def test_a_free_name_is_given_once() -> None:
    held = names()
    assert [held.fresh("new") for _ in range(3)] == ["new", "new_1", "new_2"]


def test_a_counted_name_that_is_taken_is_left_out() -> None:
    held = Names(["a", "a_1"])
    assert held.fresh("a") == "a_2"


def test_an_empty_base_gets_a_number() -> None:
    assert Names().fresh("") == "_1"


def test_a_reserved_graph_is_taken() -> None:
    held = Names()
    held.reserve(ir.from_proto(onnx.parser.parse_model(TEXT)).graph)
    assert held.fresh("a") == "a_1"
    assert held.fresh("p") == "p"


def test_nodes_belong_to_no_graph() -> None:
    tape, x = Builder(), ir.Value(name="x")
    y = tape.op("Relu", x)
    assert [node.op_type for node in tape.nodes] == ["Relu"]
    assert tape.nodes[0].graph is None
    assert y.producer() is tape.nodes[0]


def test_omitted_inputs_at_the_end_are_dropped() -> None:
    tape, x = Builder(), ir.Value(name="x")
    tape.op("Clip", x, None, None)
    tape.op("Clip", x, None, x)
    assert [len(node.inputs) for node in tape.nodes] == [1, 3]


def test_several_outputs() -> None:
    tape, x = Builder(), ir.Value(name="x")
    outputs = tape.ops("Split", x, outputs=3, num_outputs=3, domain="")
    assert len(outputs) == 3
    assert tape.nodes[0].attributes["num_outputs"].as_int() == 3


def test_attributes_of_another_node_are_copied_changed_and_left_out() -> None:
    tape, x = Builder(), ir.Value(name="x")
    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 18]> g (float[1,1,4,4] x, float[1,1,1,1] w) => (y)'
            ' { y = Conv <group = 1, auto_pad = "VALID", strides = [2, 2]> (x, w) }'
        )
    )
    tape.op("Conv", x, x, like=model.graph[0], auto_pad=None, strides=[1, 1], dilations=[1, 1])
    held = {a.name: a.value for a in tape.nodes[0].attributes.values()}
    assert held == {"group": 1, "strides": (1, 1), "dilations": (1, 1)}


def test_an_attribute_may_be_given_ready_made() -> None:
    tape = Builder()
    tape.op("Constant", value_floats=ir.AttrFloat32s("value_floats", []))
    assert tape.nodes[0].attributes["value_floats"].type == ir.AttributeType.FLOATS


def test_constants_know_type_shape_and_data() -> None:
    tape = Builder()
    value = tape.const(np.zeros((2, 3), np.float16), name="w")
    assert (value.name, value.dtype, value.shape) == ("w", ir.DataType.FLOAT16, ir.Shape([2, 3]))
    assert tape.const(np.float32(1)).shape == ir.Shape([])
    assert tape.constants[0] is value


def test_a_tensor_becomes_a_constant_as_it_is() -> None:
    tape, tensor = Builder(), ir.tensor(np.zeros(2, np.float32))
    assert tape.const(tensor).const_value is tensor


def test_integers_are_one_dimensional_int64() -> None:
    value = Builder().ints([3, -1])
    assert value.const_value is not None
    assert value.const_value.numpy().dtype == np.int64
    assert value.const_value.numpy().tolist() == [3, -1]
