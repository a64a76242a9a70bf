"""Which nodes inference need not look at twice, and which it must."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from graphopt.ir.shapes import Shapes
from graphopt.ir.shapes.facts import Facts, SymbolicData, of_data, tensor
from graphopt.ir.shapes.likeness import Inputs, likeness_of

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
PLAIN = tensor(FLOAT, (2, 3))
COUNTED = of_data(SymbolicData.of((2, 3), INT64))
MEASURED = of_data(SymbolicData.of((0.5, 2.0), FLOAT))


def node(op_type: str = "Flatten", outputs: int = 1, **attributes: Any) -> ir.Node:
    held = ir.convenience.convert_attributes(attributes)
    return ir.Node("", op_type, [], held, num_outputs=outputs)


def likeness(
    made: ir.Node, *inputs: Facts | None, blind: bool = False, version: int = 18
) -> object:
    return likeness_of(made, version, inputs, reads_dims=blind)


def test_equal_in_everything_that_a_rule_sees() -> None:
    again = tensor(FLOAT, (2, 3))
    assert likeness(node(axis=1), PLAIN, None) == likeness(node(axis=1), again, None) is not None
    count = of_data(SymbolicData.of((2, 3), INT64))
    assert likeness(node("Reshape"), PLAIN, COUNTED) == likeness(node("Reshape"), again, count)


@pytest.mark.parametrize(
    ("other", "inputs", "version"),
    [
        (node(axis=2), (PLAIN,), 18),
        (node(), (PLAIN,), 18),
        (node("Softmax", axis=1), (PLAIN,), 18),
        (node(axis=1, outputs=2), (PLAIN,), 18),
        (node(axis=1), (tensor(FLOAT, (2, 4)),), 18),
        (node(axis=1), (tensor(FLOAT, None),), 18),
        (node(axis=1), (tensor(INT64, (2, 3)),), 18),
        (node(axis=1), (tensor(None, (2, 3)),), 18),
        (node(axis=1), (None,), 18),
        (node(axis=1), (PLAIN, PLAIN), 18),
        (node(axis=1), (PLAIN,), 13),
    ],
)
def test_a_difference_in_any_of_it(other: ir.Node, inputs: Inputs, version: int) -> None:
    assert likeness(other, *inputs, version=version) != likeness(node(axis=1), PLAIN)


def test_elements_count_where_they_are_known() -> None:
    three = of_data(SymbolicData.of((3, 2), INT64))
    assert likeness(node("Reshape"), PLAIN, COUNTED) != likeness(node("Reshape"), PLAIN, three)
    # Adding what is known to what is not: no element of the sum will be known.
    assert likeness(node("Add"), tensor(INT64, (2,)), COUNTED, blind=True) == likeness(
        node("Add"), tensor(INT64, (2,)), three, blind=True
    )
    assert likeness(node("Add"), COUNTED, COUNTED, blind=True) != likeness(
        node("Add"), COUNTED, three, blind=True
    )


@pytest.mark.parametrize(
    ("made", "inputs"),
    [
        (node("LeakyRelu", alpha=0.0), (PLAIN,)),  # equals -0.0
        (node("OneHot", value=ir.tensor([1])), (PLAIN,)),
        (ir.Node("", "Flatten", [], [ir.RefAttr("axis", "a", ir.AttributeType.INT)]), (PLAIN,)),
        (node("Resize"), (PLAIN, MEASURED)),
        (node("SequenceAt"), (PLAIN._replace(type=ir.SequenceType(ir.TensorType(FLOAT))),)),
        (node("Abs"), (PLAIN._replace(type=ir.TensorType(FLOAT, denotation="IMAGE")),)),
    ],
)
def test_what_cannot_be_compared_is_never_alike(made: ir.Node, inputs: Inputs) -> None:
    assert likeness(made, *inputs) is None


def test_symbols_belong_to_one_value_each() -> None:
    """Two equal nodes of unknown result: their sizes are not the same."""
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[N] x) => (int64[1, A] a, int64[1, B] b)'
        "{ a = NonZero(x)  b = NonZero(x) }"
    )
    shapes = Shapes(model)
    one, two = (shapes.dims(value) for value in model.graph.outputs)
    assert one is not None
    assert two is not None
    assert one[0] == two[0]
    assert one[1] != two[1]
