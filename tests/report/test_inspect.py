from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.report.cost import macs
from graphopt.report.inspect import Inspection, count_zeros, inspect_model, inspection_json
from graphopt.report.plain import plain
from graphopt.targets import Precision


def load(text: str, opset: int = 18) -> ir.Model:
    header = f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(header + text))


def inspect(text: str, opset: int = 18, **dims: int) -> Inspection:
    return inspect_model(load(text, opset), dims=dims)


def with_weights(model: ir.Model, **shapes: tuple[int, ...]) -> ir.Model:
    for name, shape in shapes.items():
        value = next(
            v for node in model.graph for v in node.inputs if v is not None and v.name == name
        )
        value.const_value = ir.tensor(np.ones(shape, np.float32), name=name)
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
        model.graph.register_initializer(value)
    return model


COSTS = [
    # 4x8x8 outputs of 3*3*3 products each
    ("(float[1,3,10,10] x, float[4,3,3,3] w) => (float[1,4,8,8] y) { y = Conv(x, w) }", 4 * 64 * 27),
    ("(float[1,4,8,8] x, float[8,2,3,3] w) => (float[1,8,6,6] y) { y = Conv<group = 2>(x, w) }", 8 * 36 * 18),
    ("(float[1,3,4,4] x, float[3,5,2,2] w) => (float[1,5,5,5] y) { y = ConvTranspose(x, w) }", 48 * 20),
    ("(float[2,3,4] a, float[4,5] b) => (float[2,3,5] y) { y = MatMul(a, b) }", 2 * 3 * 4 * 5),
    ("(float[4] a, float[4] b) => (float y) { y = MatMul(a, b) }", 4),
    ("(float[4,3] a, float[4,5] b) => (float[3,5] y) { y = Gemm<transA = 1>(a, b) }", 60),
    ("(float[2,3] a, float[3,4] b) => (float[2,4] y) { y = Einsum<equation = \"ij,jk->ik\">(a, b) }", 24),
    ("(float[7,2,3] x, float[1,16,3] w, float[1,16,4] r) => (float[7,1,2,4] y)"
     "{ y = LSTM<hidden_size = 4>(x, w, r) }", 14 * (48 + 64)),
    ("(float[4,3] a, float[4,5] b) => (float[3,5] y) { y = com.microsoft.FusedMatMul<transA = 1>(a, b) }", 60),
    ("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }", 0),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), COSTS)
def test_cost_of_one_node(body: str, expected: int) -> None:
    assert inspect("g " + body).arithmetic.macs == expected


def test_cost_of_attention_counts_both_products() -> None:
    body = (
        "g (float[2,4,8,16] q, float[2,4,10,16] k, float[2,4,10,32] v) => (float[2,4,8,32] y) "
        "{ y = Attention(q, k, v) }"
    )
    assert inspect(body, opset=23).arithmetic.macs == 2 * 4 * 8 * 10 * (16 + 32)


def test_cost_of_attention_with_heads_folded_into_the_last_axis() -> None:
    body = (
        "g (float[2,8,64] q, float[2,10,32] k, float[2,10,32] v) => (float[2,8,64] y) "
        "{ y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v) }"
    )
    assert inspect(body, opset=23).arithmetic.macs == 2 * 4 * 8 * 10 * (16 + 16)


def test_cost_is_unknown_without_dimensions() -> None:
    model = load("g (float a, float b) => (float y) { y = MatMul(a, b) }")
    assert macs(next(iter(model.graph)), lambda _value: None) is None


def test_cost_of_an_einsum_with_ellipsis_is_unknown() -> None:
    body = 'g (float[2,3] a, float[3,4] b) => (float[2,4] y) { y = Einsum<equation = "...j,jk->...k">(a, b) }'
    assert inspect(body).arithmetic.unknown == 1


SYMBOLIC = "g (float[batch, 3] a, float[3, 5] b) => (float[batch, 5] y) { y = MatMul(a, b) }"


def test_symbolic_dimensions_give_a_formula() -> None:
    cost = inspect(SYMBOLIC).arithmetic
    assert (cost.macs, cost.unknown, cost.formula, cost.free) == (0, 1, "15*batch", ("batch",))


def test_given_dimensions_give_a_number() -> None:
    cost = inspect(SYMBOLIC, batch=4).arithmetic
    assert (cost.macs, cost.flops, cost.unknown, cost.free) == (60, 120, 0, ())


def test_an_unnamed_dimension_is_given_by_input_and_axis() -> None:
    model = load("g (float[?, 3] a, float[3, 5] b) => (float[?, 5] y) { y = MatMul(a, b) }")
    assert inspect_model(model, dims={"a:0": 4}).arithmetic.macs == 60


def test_an_unknown_dimension_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"no symbolic dimension 'bach'\. Did you mean 'batch'\?"):
        inspect(SYMBOLIC, bach=4)


def test_inspection_lists_ports_dtypes_and_tensors() -> None:
    model = load("""g (float[N] x, int64[2] s) => (float[N] y) <float[4] w = {0, 0, -0.0, 1}, int64[1] i = {3}>
    { c = Constant<value = float[1] {2}>() a = Mul(w, c) y = Identity(x) }""")
    found = inspect_model(model)
    assert [(p.name, p.dtype, p.shape) for p in found.inputs] == [
        ("x", "float", ("N",)),
        ("s", "int64", (2,)),
    ]
    assert [(t.name, t.bytes, t.zeros) for t in found.tensors] == [
        ("w", 16, 3),
        ("i", 8, 0),
        ("c", 4, 0),
    ]
    assert [(d.dtype, d.tensors, d.elements) for d in found.dtypes] == [
        ("float", 2, 5),
        ("int64", 1, 1),
    ]
    assert found.sparsity == pytest.approx(3 / 6)
    assert inspection_json(found)["model"]["nodes"] == 3


def test_inspection_counts_subgraphs_functions_and_foreign_domains() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18, "mine" : 1, "theirs" : 1]>
        g (bool c, float[1] x) => (float[1] y) {
          z = If(c) <then_branch = t () => (float[1] a) { a = mine.f(x) }, else_branch = e () => (float[1] b)
            { b = theirs.Odd(x) }>
          y = Identity(z)
        }
        <domain: "mine", opset_import: ["" : 18]> f (u) => (v) { w = Neg(u) v = Neg(w) }""")
    )
    found = inspect_model(model)
    assert found.subgraphs == 2
    assert dict(found.functions) == {"mine::f": 2}
    assert dict(found.custom_domains) == {"theirs": 1}


def test_a_declared_output_that_the_operators_contradict_is_told() -> None:
    (found,) = inspect("g (float[N, 4] x) => (float[N, 5] y) { y = Relu(x) }").contradictions
    assert (found.output, found.declared, found.inferred) == ("y", "FLOAT [N, 5]", "FLOAT [N, 4]")
    assert inspect("g (float[N, 4] x) => (float[M, 4] y) { y = Relu(x) }").contradictions == ()


def test_external_data_are_listed_by_file(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[32768] x) => (float[32768] y) { y = Add(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(32768, np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    found = inspect_model(load_model(path), path)
    assert dict(found.external) == {"m.bin": 131072}
    assert found.tensors[0].storage == "external"
    assert found.model.size_bytes == path.stat().st_size + 131072


@pytest.mark.parametrize(
    ("array", "zeros"),
    [
        (np.array([0.0, -0.0, 1.0], np.float32), 2),
        (np.array([0, 1], np.int8), 1),
        (np.zeros((0,), np.float32), 0),
        (np.array([True, False]), 1),
    ],
)
def test_zeros_of_either_sign_count(array: np.ndarray, zeros: int) -> None:
    assert count_zeros(ir.tensor(array)) == zeros


def test_strings_have_no_zeros() -> None:
    assert count_zeros(ir.StringTensor([b"a"], shape=ir.Shape([1]))) is None


def test_plain_makes_json_of_enums_paths_and_sets() -> None:
    given = {
        "a": Numerics.EXACT,
        "b": Precision.FP32,
        "c": Path("x"),
        "d": {2, 1},
        "e": float("inf"),
    }
    assert plain(given) == {"a": "exact", "b": "fp32", "c": "x", "d": [1, 2], "e": None}


def test_weights_of_a_model_reached_by_a_link_are_its_own(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.zeros((256, 256), np.float32), "w")
    graph = onnx.parser.parse_graph("g (float[1,256] x) => (float[1,256] y) { y = MatMul(x, w) }")
    graph.initializer.append(weight)
    proto = onnx.helper.make_model(
        graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    (tmp_path / "real").mkdir()
    onnx.save(proto, tmp_path / "real" / "m.onnx")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = tmp_path / "link" / "m.onnx"
    found = inspect_model(load_model(path), path)
    assert not found.external
    assert found.tensors[0].storage == "inline"
    assert found.model.size_bytes == path.stat().st_size
