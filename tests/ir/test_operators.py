"""Schemas, attributes with their defaults, purity and the classes of operators."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.ir import operators

OPSETS = {"": 18, "com.microsoft": 1, "mine": 1}


def node(text: str, opsets: str = '"":18, "com.microsoft":1, "mine":1') -> ir.Node:
    """The last node of a one-line graph over float x and bool c."""
    model = ir.from_onnx_text(
        f"<ir_version: 8, opset_import: [{opsets}]> g (float[N] x, bool c) => (float[N] y) {{ {text} }}"
    )
    return model.graph[-1]


def test_opset_follows_the_imports_and_the_node() -> None:
    relu = node("y = Relu(x)")
    assert operators.opset(relu, OPSETS) == 18
    assert operators.opset(relu, {}) is None
    assert operators.opset(ir.Node("", "Relu", [], version=6), OPSETS) == 6


def test_schema_is_the_newest_not_newer_than_the_opset() -> None:
    softmax = node("y = Softmax(x)")
    found = [operators.schema(softmax, {"": version}) for version in (11, 13)]
    assert [None if one is None else one.since_version for one in found] == [11, 13]
    assert operators.schema(node("y = mine.Foo(x)"), OPSETS) is None


def test_attribute_reads_the_node_then_the_schema_then_the_default() -> None:
    softmax = node("y = Softmax(x)")
    assert operators.attribute(node("y = Softmax<axis = 3>(x)"), "axis", 7, OPSETS) == 3
    assert operators.attribute(softmax, "axis", 7, {"": 11}) == 1
    assert operators.attribute(softmax, "axis", 7, {"": 13}) == -1
    assert operators.attribute(softmax, "axis", 7) == 7
    assert operators.attribute(node("y = Elu<alpha = 2.0>(x)"), "alpha", 1.0) == 2.0


def test_attribute_of_another_type_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"'axis' of Softmax \(-> y\) is FLOAT, expected int"):
        operators.attribute(node("y = Softmax<axis = 3.0>(x)"), "axis", 7)


def test_attribute_of_a_function_parameter_has_no_value() -> None:
    relu = ir.Node("", "Elu", [], [ir.RefAttr("alpha", "a", ir.AttributeType.FLOAT)], name="e")
    assert operators.has_references(relu)
    with pytest.raises(ModelError, match="refers to parameter 'a'"):
        operators.attribute(relu, "alpha", 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "y = Relu(x)",
        "y = Dropout(x)",
        "y = DepthToSpace<blocksize = 2>(x)",
        "y = com.microsoft.Gelu(x)",
        "t = Constant<value = bool {0}>()  r = Constant<value = float {0.5}>() y = Dropout(x, r, t)",
        "y = If(c) <then_branch = a () => (o) { o = Relu(x) }, else_branch = b () => (p) { p = Abs(x) }>",
    ],
)
def test_pure(text: str) -> None:
    assert operators.is_pure(node(text), OPSETS)


def test_affine_grid_is_pure_although_its_schema_says_otherwise() -> None:
    assert operators.is_pure(node("y = AffineGrid(x, x)", '"":20'), {"": 20})


@pytest.mark.parametrize(
    "text",
    [
        "y = RandomNormalLike(x)",
        "y = Bernoulli(x)",
        "y = Multinomial(x)",
        "r = Constant<value = float {0.5}>() y = Dropout(x, r, c)",
        "y = mine.Foo(x)",
        "y = com.microsoft.YieldOp(x)",
        "y = NoSuchOperator(x)",
        "y = If(c) <then_branch = a () => (o) { o = RandomNormalLike(x) }, else_branch = b () => (p) { p = Abs(x) }>",
    ],
)
def test_not_pure(text: str) -> None:
    assert not operators.is_pure(node(text), OPSETS)


def test_dropout_before_opset_7_trains_unless_it_is_a_test() -> None:
    assert not operators.is_pure(node("y = Dropout(x)", '"":6'), {"": 6})
    assert operators.is_pure(node("y = Dropout<is_test = 1>(x)", '"":6'), {"": 6})


def test_a_function_is_not_pure_even_under_a_standard_name() -> None:
    relu = node("y = Relu(x)")
    assert not operators.is_pure(relu, OPSETS, [relu.op_identifier()])


def test_classes_of_operators() -> None:
    add, cast, where = (
        node("y = Add(x, x)"),
        node("y = Cast<to = 1>(x)"),
        node("y = Where(c, x, x)"),
    )
    assert operators.is_elementwise_binary(add)
    assert operators.is_commutative(add)
    assert operators.is_elementwise_unary(cast)
    assert operators.is_elementwise(where)
    assert not operators.is_elementwise_binary(where)
    assert not operators.is_commutative(node("y = Sub(x, x)"))
    assert operators.is_quantization(node("y = QuantizeLinear(x, x)"))
    assert not operators.is_elementwise(node("y = mine.Add(x, x)"))


def test_subgraphs_are_found() -> None:
    branch = node(
        "y = If(c) <then_branch = a () => (o) { o = Relu(x) }, else_branch = b () => (p) { p = Abs(x) }>"
    )
    assert [graph.name for graph in operators.subgraphs(branch)] == ["a", "b"]
    assert operators.has_subgraph(branch)
    assert not operators.has_subgraph(node("y = Relu(x)"))


def test_no_schema_is_of_a_version_beyond_what_onnx_can_hold() -> None:
    assert operators.find_schema("Relu", 99, "") is not None
    assert operators.find_schema("Relu", 2**40, "") is None
