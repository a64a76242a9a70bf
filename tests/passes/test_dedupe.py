"""Equal constants and equal computations."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.cleanup import RemoveDeadCode
from graphopt_passes.control_flow import InlineControlFlow
from graphopt_passes.dedupe import MergeCommonSubexpressions, MergeDuplicateConstants, digest

from graphopt.ir.mapped import MappedFile, MappedTensor
from graphopt.ir.sparse import CooTensor
from graphopt.rewrite import Context, Gate
from graphopt.targets import get_target
from tests.rewriting import apply, check, parse

MERGE = [MergeDuplicateConstants()]
CSE = [MergeCommonSubexpressions()]


def test_equal_constants_become_one() -> None:
    model = ir.from_proto(
        parse("g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {2, 1}> "
              "{ t = Add(x, a)  u = Mul(t, b)  y = Add(u, c) }")
    )  # fmt: skip
    apply(MERGE, model)
    assert list(model.graph.initializers) == ["a", "c"]
    assert [v.name for n in model.graph for v in n.inputs if v is not None] == [
        "x",
        "a",
        "t",
        "a",
        "u",
        "c",
    ]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("float[2] a = {0.0, 1.0}", "float[2] b = {-0.0, 1.0}"),
        ("float[2] a = {1.0, 1.0}", "float[1,2] b = {1.0, 1.0}"),
        ("float[1] a = {1.0}", "float b = {1.0}"),
    ],
)
def test_constants_that_differ_in_bits_or_shape_stay(a: str, b: str) -> None:
    check(
        MERGE, f"g (float[1,2] x) => (float[1,2] y) <{a}, {b}> {{ t = Add(x, a)  y = Mul(t, b) }}"
    )


def test_overridable_constants_stay() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]> g (float[2] x, float[2] a) => (float[2] y)
        <float[2] a = {1, 2}, float[2] b = {1, 2}> { t = Add(x, a)  y = Mul(t, b) }"""
    model = ir.from_proto(parse(text))
    assert not apply(MERGE, model).rewrites


def test_output_constants_stay() -> None:
    proto = parse(
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> { t = Add(x, a)  y = Mul(t, b) }"
    )
    proto.graph.output.append(onnx.helper.make_tensor_value_info("b", 1, [2]))
    model = ir.from_proto(proto)
    assert not apply(MERGE, model).rewrites


IF = """g (bool c, float[2] x) => (float[2] y) {outer} {{
    u = {use}
    y = If(c) <then_branch = t () => (float[2] p) {then} {{ p = Add(u, k) }},
               else_branch = e () => (float[2] q) {other} {{ q = Mul(u, k) }}> }}"""


def test_constant_of_a_branch_gives_way_to_the_outer_one() -> None:
    inner = "<float[2] k = {1, 2}>"
    model = ir.from_proto(
        parse(IF.format(outer="<float[2] o = {1, 2}>", use="Add(x, o)", then=inner, other=inner))
    )
    apply(MERGE, model)
    assert list(model.graph.initializers) == ["o"]
    branches = [
        model.graph[1].attributes[name].as_graph() for name in ("then_branch", "else_branch")
    ]
    assert not any(branch.initializers for branch in branches)


def test_equal_constants_of_sibling_branches_move_out() -> None:
    inner = "<float[2] k = {1, 2}>"
    model = ir.from_proto(parse(IF.format(outer="", use="Neg(x)", then=inner, other=inner)))
    apply(MERGE, model)
    assert len(model.graph.initializers) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


DTYPES = [*ir.DataType]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.name not in ("UNDEFINED", "STRING")])
def test_digest_of_every_dtype(dtype: ir.DataType) -> None:
    zeros, ones = np.zeros(3, dtype.numpy()), np.ones(3).astype(dtype.numpy())
    assert digest(ir.tensor(zeros, dtype=dtype)) == digest(ir.tensor(zeros.copy(), dtype=dtype))
    assert digest(ir.tensor(zeros, dtype=dtype)) != digest(ir.tensor(ones, dtype=dtype))


def test_digest_of_strings_separates_elements() -> None:
    a = ir.StringTensor([b"ab", b"c"], shape=ir.Shape([2]))
    b = ir.StringTensor([b"a", b"bc"], shape=ir.Shape([2]))
    assert digest(a) != digest(b)


def test_digest_of_a_mapped_tensor_is_that_of_its_elements(tmp_path: Path) -> None:
    data = np.arange(1000, dtype=np.float32)
    path = tmp_path / "w.bin"
    path.write_bytes(data.tobytes())
    mapped = MappedTensor(MappedFile(path), ir.DataType.FLOAT, [1000])
    assert digest(mapped) == digest(ir.tensor(data))


def test_sparse_and_dense_constants_are_told_apart() -> None:
    values, indices = ir.tensor(np.array([1], np.float32)), ir.tensor(np.array([0]))
    sparse = CooTensor(values, indices, [2])
    assert digest(sparse) == digest(CooTensor(values, indices, [2]))
    assert digest(sparse) != digest(ir.tensor(np.array([1, 0], np.float32)))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.bfloat16])
def test_merging_narrow_dtypes(dtype: type) -> None:
    model = ir.from_proto(parse("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    graph = model.graph
    for name in ("a", "b"):
        tensor = ir.tensor(np.ones(4).astype(dtype))
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([4]), const_value=tensor
        )
        graph.register_initializer(value)
        node = ir.node("Cast", [value], attributes={"to": 1}, name=f"n{name}")
        node.outputs[0].name = f"c{name}"
        graph.append(node)
    apply(MERGE, model)
    assert list(graph.initializers) == ["a"]


def test_large_constants_that_differ_late_stay() -> None:
    proto = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    data = np.zeros(1000, np.float32)
    for i, name in enumerate("ab"):
        data[700] = i
        proto.graph.initializer.append(onnx.numpy_helper.from_array(data, name))
        proto.graph.node.append(onnx.helper.make_node("Neg", [name], [f"n{name}"]))
    model = ir.from_proto(proto)
    assert not apply(MERGE, model).rewrites


def test_equal_nodes_become_one() -> None:
    check(
        CSE,
        "g (float[N] x) => (float[N] y) { a = Exp(x)  b = Exp(x)  c = Neg(b)  d = Neg(a)  y = Add(c, d) }",
        "g (float[N] x) => (float[N] y) { a = Exp(x)  c = Neg(a)  y = Add(c, c) }",
    )


def test_operands_of_commutative_operators_are_normalised() -> None:
    check(
        CSE,
        "g (float[N] x, float[N] z) => (float[N] y) { a = Add(x, z)  b = Add(z, x)  y = Mul(a, b) }",
        "g (float[N] x, float[N] z) => (float[N] y) { a = Add(x, z)  y = Mul(a, a) }",
    )


@pytest.mark.parametrize("op", ["Sub", "Max", "Min"])
def test_order_of_operands_counts(op: str) -> None:
    check(
        CSE,
        f"g (float[N] x, float[N] z) => (float[N] y) {{ a = {op}(x, z)  b = {op}(z, x)  y = Mul(a, b) }}",
    )


def test_max_of_integers_commutes() -> None:
    check(
        CSE,
        "g (int64[N] x, int64[N] z) => (int64[N] y) { a = Max(x, z)  b = Max(z, x)  y = Mul(a, b) }",
        "g (int64[N] x, int64[N] z) => (int64[N] y) { a = Max(x, z)  y = Mul(a, a) }",
    )


def test_absent_attributes_equal_their_defaults() -> None:
    check(
        CSE,
        "g (float[2,3] x) => (float[2,3] y) { a = Softmax(x)  b = Softmax<axis = -1>(x)  y = Add(a, b) }",
        "g (float[2,3] x) => (float[2,3] y) { a = Softmax(x)  y = Add(a, a) }",
    )


def test_attributes_count() -> None:
    check(
        CSE,
        "g (float[2,2] x) => (float[2,2] y) { a = Softmax<axis = 0>(x)  b = Softmax(x)  y = Add(a, b) }",
    )


def test_tensor_attributes_are_compared_by_content() -> None:
    text = (
        "g (int64[1] s) => (float[N] y) {{ a = ConstantOfShape<value = float[1] {{2.0}}>(s)"
        "  b = ConstantOfShape<value = float[1] {{{second}}}>(s)  y = Add(a, b) }}"
    )
    model = ir.from_proto(parse(text.format(second="2.0")))
    apply(CSE, model)
    assert len(model.graph) == 2
    check(CSE, text.format(second="3.0"))


def test_random_nodes_are_not_merged() -> None:
    text = "g (float[2] x) => (float[2] y) {{ a = {op}(x)  b = {op}(x)  y = Add(a, b) }}"
    model = ir.from_proto(parse(text.format(op="RandomNormalLike")))
    assert not apply(CSE, model).rewrites


def test_training_dropout_is_not_merged() -> None:
    text = """g (float[2] x) => (float[2] y) <float r = {0.5}, bool t = {1}>
        { a = Dropout(x, r, t)  b = Dropout(x, r, t)  y = Add(a, b) }"""
    model = ir.from_proto(parse(text))
    assert not apply(CSE, model).rewrites


def test_custom_operators_and_calls_are_not_merged() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "l": 1, "c": 1]> g (float[2] x) => (float[2] y)
        { a = l.f(x)  b = l.f(x)  d = c.op(x)  e = c.op(x)  y = Sum(a, b, d, e) }
        <domain: "l", opset_import: ["": 18]> f (a) => (b) { b = Neg(a) }"""
    model = ir.from_proto(parse(text))
    assert not apply(CSE, model).rewrites


def test_one_of_the_pair_is_a_graph_output() -> None:
    check(
        CSE,
        "g (float[N] x) => (float[N] b, float[N] y) { a = Exp(x)  b = Exp(x)  y = Neg(a) }",
        "g (float[N] x) => (float[N] b, float[N] y) { b = Exp(x)  y = Neg(b) }",
    )


def test_two_graph_outputs_share_through_an_identity() -> None:
    check(
        CSE,
        "g (float[2,2] x) => (float[2,2] a, float[2,2] b) { a = MatMul(x, x)  b = MatMul(x, x) }",
        "g (float[2,2] x) => (float[2,2] a, float[2,2] b) { a = MatMul(x, x)  b = Identity(a) }",
    )


def test_two_cheap_graph_outputs_stay() -> None:
    check(
        CSE,
        "g (float[2,2] x) => (float[2,2] a, float[2,2] b) { a = Identity(x)  b = Identity(x) }",
        missed="both are graph outputs",
    )


def test_node_of_a_branch_gives_way_to_an_outer_one() -> None:
    check(
        CSE,
        """g (bool c, float[2] x) => (float[2] y, float[2] a) { a = Exp(x)
            y = If(c) <then_branch = t () => (float[2] p) { q = Exp(x)  p = Neg(q) },
                       else_branch = e () => (float[2] r) { r = Exp(x) }> }""",
        """g (bool c, float[2] x) => (float[2] y, float[2] a) { a = Exp(x)
            y = If(c) <then_branch = t () => (float[2] p) { p = Neg(a) },
                       else_branch = e () => (float[2] r) { r = Identity(a) }> }""",
    )


def test_nodes_of_sibling_branches_do_not_see_one_another() -> None:
    check(
        CSE,
        """g (bool c, float[2] x) => (float[2] y, float[2] z) {
            y = If(c) <then_branch = t () => (float[2] p) { q = Exp(x)  p = Neg(q) },
                       else_branch = e () => (float[2] r) { s = Exp(x)  r = Abs(s) }>
            z = Exp(x) }""",
    )


LOOPS = """g (int64 n, bool c, float[2] x) => (float[2] y, float[2] z) {{
    y = Loop(n, c, x) <body = b (int64 i, bool ci, float[2] v) => (bool co, float[2] w)
        {{ co = Identity(ci)  w = Add(v, {first}) }}>
    z = Loop(n, c, x) <body = b2 (int64 j, bool cj, float[2] v2) => (bool co2, float[2] w2)
        {{ co2 = Identity(cj)  w2 = Add(v2, {second}) }}>
    }}"""


def test_subgraphs_are_compared_by_structure() -> None:
    model = ir.from_proto(parse(LOOPS.format(first="x", second="x")))
    apply(CSE, model)
    assert [n.op_type for n in model.graph] == ["Loop", "Identity"]


def test_subgraphs_that_differ_stay() -> None:
    model = ir.from_proto(parse(LOOPS.format(first="x", second="v2")))
    assert not apply(CSE, model).rewrites


def test_functions_are_searched_on_their_own() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "l": 1]> g (float[2] x) => (float[2] y) { y = l.f(x) }
        <domain: "l", opset_import: ["": 18]> f (a) => (b) { c = Neg(a)  d = Neg(a)  b = Add(c, d) }"""
    model = ir.from_proto(parse(text))
    apply(CSE, model)
    assert len(model.functions["l", "f", ""].graph) == 2


def test_attributes_that_are_parameters_are_compared_by_name() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "l": 1]>
        g (float[2] x) => (float[2] y) {{ y = l.f<p = 0.1, q = 0.2>(x) }}
        <domain: "l", opset_import: ["": 18]> f <p, q> (a) => (b)
        {{ c = LeakyRelu<alpha: float = @p>(a)  d = LeakyRelu<alpha: float = @{other}>(a)  b = Add(c, d) }}"""
    model = ir.from_proto(parse(text.format(other="q")))
    assert not apply(CSE, model).rewrites
    model = ir.from_proto(parse(text.format(other="p")))
    apply(CSE, model)
    assert len(model.functions["l", "f", ""].graph) == 2


def choice(then: str, other: str) -> str:
    return (
        f"g (float[2] x, bool c) => (float[2] y) {{ y = If(c)"
        f" <then_branch = t () => (float[2] a) {then}, else_branch = e () => (float[2] b) {other}> }}"
    )


def test_if_with_equal_branches_is_decided() -> None:
    check(
        (MergeCommonSubexpressions(), InlineControlFlow(), RemoveDeadCode()),
        choice(
            "<float[2] w = {1, 2}> { s = Exp(x)  a = Add(s, w) }",
            "<float[2] v = {1, 2}> { t = Exp(x)  b = Add(v, t) }",
        ),
        "g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> { s = Exp(x)  y = Add(s, w) }",
    )


@pytest.mark.parametrize(
    "other",
    [
        "<float[2] v = {1, 3}> { t = Exp(x)  b = Add(t, v) }",
        "<float[2] v = {1, 2}> { t = Exp(x)  b = Sub(t, v) }",
        "<float[2] v = {1, 2}> { t = Exp(x)  u = Add(t, v)  b = Neg(u) }",
    ],
    ids=["constant", "operator", "length"],
)
def test_if_with_other_branches_stays(other: str) -> None:
    check(
        (MergeCommonSubexpressions(),),
        choice("<float[2] w = {1, 2}> { s = Exp(x)  a = Add(s, w) }", other),
    )


def test_gate_leaves_equal_branches() -> None:
    model = ir.from_proto(parse(choice("{ a = Exp(x) }", "{ b = Exp(x) }")))
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=0))
    assert not MergeCommonSubexpressions().run(model, ctx)


def test_inputs_left_out_at_the_end_count_for_nothing() -> None:
    model = ir.from_proto(
        parse('g (float[2] x) => (float[2] y) { a = Clip(x)  b = Clip(x, "", "")  y = Add(a, b) }')
    )
    apply((MergeCommonSubexpressions(),), model)
    assert [node.op_type for node in model.graph] == ["Clip", "Add"]
