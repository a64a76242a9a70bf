"""Models go to graphsurgeon and come back whole; what a script changes, changes; what it breaks, is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.backend.test
import onnx.parser
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, save_model, to_proto
from graphopt.ir.sparse import CooTensor
from graphopt.ir.surgeon import from_surgeon, to_surgeon
from tests.ir.model_protos import normalized
from tests.rewriting import run

HEADER = '<ir_version: 9, opset_import: ["" : 18]>\n'
NESTED = (
    HEADER
    + """
g (float[N,3] x, bool c) => (float[N,3] y) <float[3] w = {1, 2, 3}> {
  s = Mul(x, w)
  y = If(c) <then_branch = t () => (float[N,3] a) { a = Add(s, w) },
             else_branch = e () => (float[N,3] a) { a = Neg(s) }>
}"""
)
WITH_FUNCTION = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
g (float[2] x) => (float[2] y) { y = my.f <alpha: float = 0.5> (x) }
<domain: "my", opset_import: ["" : 18]>
f <alpha> (a) => (b) {
  two = Constant <value = float {2}> ()
  m = Mul(a, two)
  b = LeakyRelu <alpha: float = @alpha> (m)
}
"""


def load(text: str) -> ir.Model:
    full = text if text.lstrip().startswith("<") else HEADER + text
    return load_model(onnx.parser.parse_model(full))


def same(a: ir.Model, b: ir.Model) -> bool:
    one, two = (normalized(to_proto(m)).SerializeToString(deterministic=True) for m in (a, b))
    return bool(one == two)


def round_trip(model: ir.Model) -> ir.Model:
    made = from_surgeon(to_surgeon(model), like=model)
    assert not list(violations(made))
    return made


@pytest.mark.parametrize("text", [NESTED, WITH_FUNCTION], ids=["nested", "function"])
def test_round_trip_is_exact(text: str) -> None:
    model = load(text)
    assert same(round_trip(model), model)


def test_every_backend_model_comes_back_whole() -> None:
    root = Path(onnx.backend.test.__file__).parent / "data"
    seen = 0
    for path in sorted(root.rglob("model.onnx")):
        model = load_model(path)
        assert same(round_trip(model), model), path
        seen += 1
    assert seen > 50


def test_without_a_likeness_the_graph_alone_speaks() -> None:
    model = load(NESTED)
    made = from_surgeon(to_surgeon(model))
    feeds = {"x": np.ones((2, 3), np.float32), "c": np.asarray(True)}
    np.testing.assert_array_equal(run(to_proto(made), feeds)[0], run(to_proto(model), feeds)[0])


def test_an_untouched_weight_is_the_same_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    proto = onnx.parser.parse_model(HEADER + "g (float[512] x) => (float[512] y) { y = Mul(x, w) }")
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.arange(512, dtype=np.float32), "w")
    )
    onnx.save(proto, path)
    model = load_model(path)
    made = round_trip(model)
    assert made.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def test_a_weight_that_was_only_read_is_the_same_tensor() -> None:
    model = load(NESTED)
    graph = to_surgeon(model)
    assert graph.tensors()["w"].values.tolist() == [1, 2, 3]
    made = from_surgeon(graph, like=model)
    assert made.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def test_a_weight_written_in_place_is_new_and_the_original_stays() -> None:
    model = load(NESTED)
    graph = to_surgeon(model)
    graph.tensors()["w"].values[0] = 9.0
    made = from_surgeon(graph, like=model)
    tensors = [m.graph.initializers["w"].const_value for m in (made, model)]
    assert [t.numpy().tolist() for t in tensors if t is not None] == [[9, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(
    "dtype",
    [
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.int4,
        ml_dtypes.uint4,
        np.complex64,
        np.float16,
        np.bool_,
    ],
)
@pytest.mark.parametrize("read", [False, True], ids=["untouched", "read"])
def test_every_dtype_survives(dtype: type, read: bool) -> None:
    data: npt.NDArray[Any] = np.array([0, 1, 1], dtype)
    model = constant_model(ir.tensor(data))
    graph = to_surgeon(model)
    if read:
        assert graph.outputs[0].inputs[0].inputs[0].values.dtype == data.dtype
    made = from_surgeon(graph, like=model)
    assert made.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.int4, np.float16, np.int64])
def test_a_new_array_of_any_dtype_becomes_a_tensor(dtype: type) -> None:
    model = constant_model(ir.tensor(np.zeros(3, np.float32)))
    graph = to_surgeon(model)
    data: npt.NDArray[Any] = np.array([1, 2, 3], dtype)
    graph.tensors()["w"].values = data
    tensor = from_surgeon(graph, like=model).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().dtype == data.dtype
    np.testing.assert_array_equal(tensor.numpy(), data)


def constant_model(tensor: ir.TensorProtocol) -> ir.Model:
    w = ir.Value(
        name="w",
        const_value=tensor,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
    )
    node = ir.Node("", "Identity", [w], name="n")
    node.outputs[0].name = "y"
    graph = ir.Graph(
        [], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("read", [False, True], ids=["untouched", "read"])
def test_strings_survive(read: bool) -> None:
    model = constant_model(ir.StringTensor([b"one", "zwölf".encode()], shape=ir.Shape([2])))
    graph = to_surgeon(model)
    if read:
        assert graph.tensors()["w"].values.tolist() == ["one", "zwölf"]
    made = from_surgeon(graph, like=model)
    assert made.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def sparse_model() -> tuple[ir.Model, CooTensor]:
    values, indices = ir.tensor(np.array([5, 7], np.float32)), ir.tensor(np.array([1, 3], np.int64))
    tensor = CooTensor(values, indices, (2, 2), name="w")
    return constant_model(tensor), tensor


def test_a_sparse_weight_stays_sparse() -> None:
    model, tensor = sparse_model()
    graph = to_surgeon(model)
    assert from_surgeon(graph, like=model).graph.initializers["w"].const_value is tensor
    assert graph.tensors()["w"].values.tolist() == [[0, 5], [0, 7]]
    assert from_surgeon(graph, like=model).graph.initializers["w"].const_value is tensor


def test_graphsurgeon_can_export_what_it_was_given() -> None:
    model, _ = sparse_model()
    proto = gs.export_onnx(to_surgeon(model), do_type_check=False)
    held = proto.graph.sparse_initializer[0]
    assert (held.values.name, list(held.dims)) == ("w", [2, 2])
    dense = gs.export_onnx(to_surgeon(load(NESTED)))
    assert onnx.numpy_helper.to_array(dense.graph.initializer[0]).tolist() == [1, 2, 3]


def test_constants_from_another_model_are_taken_over() -> None:
    model, _ = sparse_model()
    sparse = gs.import_onnx(gs.export_onnx(to_surgeon(model), do_type_check=False))
    dense = gs.import_onnx(onnx.parser.parse_model(NESTED))
    found = from_surgeon(sparse).graph.initializers["w"].const_value
    assert isinstance(found, CooTensor)
    tensor = from_surgeon(dense).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [1, 2, 3]


def test_graphsurgeons_own_folding_works_on_shared_weights() -> None:
    model = load(
        "g (float[3] x) => (float[3] y) <float[3] a = {1, 2, 3}, float[3] b = {1, 1, 1}>"
        " { s = Add(a, b)  y = Mul(x, s) }"
    )
    graph = to_surgeon(model)
    graph.fold_constants().cleanup()
    made = from_surgeon(graph, like=model)
    assert [node.op_type for node in made.graph] == ["Mul"]
    feeds = {"x": np.ones(3, np.float32)}
    np.testing.assert_array_equal(run(to_proto(made), feeds)[0], np.array([2, 3, 4], np.float32))


def test_what_graphsurgeon_cannot_say_comes_from_the_model() -> None:
    model = load("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    model.metadata_props["who"] = "me"
    model.doc_string, model.domain, model.model_version = "text", "org.test", 7
    node, x = model.graph[0], model.graph.inputs[0]
    node.doc_string, node.metadata_props["a"] = "relu!", "b"
    x.doc_string, x.type = "in", ir.TensorType(ir.DataType.FLOAT, denotation="IMAGE")
    made = round_trip(model)
    assert same(made, model)
    assert made.graph[0].metadata_props == {"a": "b"}
    assert made.graph.inputs[0].type == x.type


def test_types_beyond_tensors_survive() -> None:
    model = load(
        "g (seq(float[2]) s, optional(float[N]) o) => (float[2] y, bool h)"
        " { i = Constant <value = int64 {0}> ()  y = SequenceAt(s, i)  h = OptionalHasElement(o) }"
    )
    assert same(round_trip(model), model)


def test_a_default_input_stays_a_default() -> None:
    model = load("g (float[1] x, float[1] w) => (float[1] y) <float[1] w = {4}> { y = Mul(x, w) }")
    graph = to_surgeon(model)
    assert isinstance(graph.tensors()["w"], gs.Variable)
    made = from_surgeon(graph, like=model)
    assert made.graph.inputs[1].is_initializer()
    assert same(made, model)


def test_a_constant_made_an_input_is_a_default() -> None:
    graph = to_surgeon(load("g (float[1] x) => (float[1] y) <float[1] w = {4}> { y = Mul(x, w) }"))
    graph.inputs.append(graph.tensors()["w"])
    made = from_surgeon(graph)
    assert [v.name for v in made.graph.inputs] == ["x", "w"]
    assert made.graph.initializers["w"].is_graph_input()


def test_an_outer_constant_used_in_a_branch_alone_stays_outside() -> None:
    model = load(
        "g (bool c) => (float[1] y) <float[1] w = {4}> { y = If(c) <"
        "then_branch = t () => (float[1] a) { a = Neg(w) }, else_branch = e () => (float[1] a) { a = Abs(w) }> }"
    )
    made = round_trip(model)
    assert list(made.graph.initializers) == ["w"]
    assert same(made, model)


def test_nodes_in_any_order_are_sorted() -> None:
    model = load("g (float[1] x) => (float[1] y) { a = Abs(x)  b = Neg(a)  y = Relu(b) }")
    graph = to_surgeon(model)
    graph.nodes.reverse()
    assert [node.op_type for node in from_surgeon(graph, like=model).graph] == [
        "Abs",
        "Neg",
        "Relu",
    ]


def test_a_new_domain_is_imported() -> None:
    graph = to_surgeon(load(NESTED))
    graph.nodes[0].domain = "com.acme"
    assert from_surgeon(graph).opset_imports == {"": 18, "com.acme": 1}


def test_the_opset_speaks_where_there_are_no_imports() -> None:
    x = gs.Variable("x", np.float32, [1])
    graph = gs.Graph([], [x], [x], opset=13)
    assert from_surgeon(graph).opset_imports == {"": 13}


def test_unknown_and_negative_dims_are_unknown() -> None:
    x = gs.Variable("x", np.float32, [-1, None, "n", 4])
    made = from_surgeon(gs.Graph([], [x], [x], opset=13)).graph.inputs[0]
    assert made.shape == ir.Shape([None, None, "n", 4])


def one_node(op: str = "LeakyRelu", **attrs: object) -> gs.Graph:
    x, y = (gs.Variable(name, np.float32, [1]) for name in "xy")
    return gs.Graph([gs.Node(op, "n", attrs, [x], [y])], [x], [y], opset=18)


@pytest.mark.parametrize(
    ("op", "given", "kind", "value"),
    [
        ("LeakyRelu", {"alpha": 1}, ir.AttributeType.FLOAT, 1.0),
        ("LeakyRelu", {"alpha": np.float32(0.5)}, ir.AttributeType.FLOAT, 0.5),
        ("Cast", {"to": np.float16}, ir.AttributeType.INT, 10),
        ("Cast", {"to": np.dtype("float64")}, ir.AttributeType.INT, 11),
        ("Transpose", {"perm": np.array([0])}, ir.AttributeType.INTS, (0,)),
        ("Transpose", {"perm": []}, ir.AttributeType.INTS, ()),
        ("Custom", {"text": b"hi"}, ir.AttributeType.STRING, "hi"),
        ("Custom", {"blob": b"\xff\x00"}, ir.AttributeType.STRING, b"\xff\x00"),
        ("Custom", {"texts": ["a", "b"]}, ir.AttributeType.STRINGS, ("a", "b")),
    ],
)
def test_attribute_values_of_scripts(
    op: str, given: dict[str, object], kind: ir.AttributeType, value: object
) -> None:
    (made,) = from_surgeon(one_node(op, **given)).graph[0].attributes.values()
    assert (made.type, made.value) == (kind, value)


def test_an_empty_list_keeps_its_type() -> None:
    model = load("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    model.graph[0].attributes.add(ir.AttrFloat32s("empty", []))
    made = round_trip(model).graph[0].attributes["empty"]
    assert (made.type, made.value) == (ir.AttributeType.FLOATS, ())


def test_a_type_attribute_is_carried() -> None:
    model = load("g () => (optional(float[2]) y) { y = Optional <type = float[2]> () }")
    assert same(round_trip(model), model)


def test_a_constant_attribute_may_change() -> None:
    model = load("g () => (float[1] y) { y = Constant <value = float[1] {4}> () }")
    graph = to_surgeon(model)
    graph.nodes[0].attrs["value"].values = np.array([5], np.float32)
    assert from_surgeon(graph, like=model).graph[0].attributes["value"].as_tensor().numpy() == 5


def test_a_constant_in_a_function_becomes_a_node() -> None:
    model = load(WITH_FUNCTION)
    graph = to_surgeon(model)
    graph.functions[0].nodes[1].inputs[1] = gs.Constant("three", np.array(3, np.float32))
    made = from_surgeon(graph, like=model)
    assert not list(violations(made))
    np.testing.assert_array_equal(run(to_proto(made), {"x": np.ones(2, np.float32)})[0], [3, 3])


def test_a_function_may_return_a_constant() -> None:
    c = gs.Constant("c", np.array([3], np.float32))
    function = gs.Function("f", "my", nodes=[], inputs=[], outputs=[c], opset=18)
    y = gs.Variable("y", np.float32, [1])
    graph = gs.Graph(
        [gs.Node("f", "n", {}, [], [y], "my")], [], [y], opset=18, functions=[function]
    )
    made = from_surgeon(graph)
    assert not list(violations(made))
    assert run(to_proto(made), {})[0] == [3]


def test_what_is_saved_after_the_way_is_what_was_meant(tmp_path: Path) -> None:
    model = load(NESTED)
    graph = to_surgeon(model)
    graph.nodes[0].op = "Div"
    save_model(from_surgeon(graph, like=model), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.node[0].op_type == "Div"


def test_refuses_a_read_of_what_nothing_produces() -> None:
    graph = one_node()
    graph.nodes[0].inputs[0] = gs.Variable("ghost", np.float32, [1])
    with pytest.raises(ModelError, match=r"LeakyRelu \(n\) reads 'ghost', which no node"):
        from_surgeon(graph)


def test_refuses_an_output_that_nothing_produces() -> None:
    graph = one_node()
    graph.outputs.append(gs.Variable("ghost", np.float32, [1]))
    with pytest.raises(ModelError, match="graph output reads 'ghost', which no node"):
        from_surgeon(graph)


def test_refuses_an_output_without_a_name() -> None:
    graph = one_node()
    graph.outputs.append(gs.Variable.empty())
    with pytest.raises(ModelError, match="a graph output has no name"):
        from_surgeon(graph)


def test_refuses_two_definitions() -> None:
    graph = one_node()
    other = gs.Variable("y", np.float32, [1])
    graph.nodes.append(gs.Node("Abs", "second", {}, [graph.inputs[0]], [other]))
    with pytest.raises(
        ModelError, match=r"'y' is defined twice, the second time by Abs \(second\)"
    ):
        from_surgeon(graph)


def test_refuses_two_constants_of_one_name() -> None:
    x, y = (gs.Variable(name, np.float32, [1]) for name in "xy")
    a, b = (gs.Constant("w", np.array([n], np.float32)) for n in (1, 2))
    graph = gs.Graph([gs.Node("Sum", "n", {}, [x, a, b], [y])], [x], [y], opset=18)
    with pytest.raises(ModelError, match="two different tensors are called 'w'"):
        from_surgeon(graph)


def test_refuses_a_constant_with_a_producer() -> None:
    graph = one_node()
    graph.outputs[0].to_constant(np.zeros(1, np.float32))
    with pytest.raises(
        ModelError, match=r"constant 'y' is also an output of LeakyRelu \(n\); clear"
    ):
        from_surgeon(graph)


def test_refuses_a_cycle() -> None:
    x, y = (gs.Variable(name, np.float32, [1]) for name in "xy")
    graph = gs.Graph(
        [gs.Node("Abs", "a", {}, [x], [y]), gs.Node("Neg", "b", {}, [y], [x])], [], [y], opset=18
    )
    with pytest.raises(ModelError, match="cycle"):
        from_surgeon(graph)


@pytest.mark.parametrize("value", [object(), [], {"a": 1}], ids=["object", "empty", "dict"])
def test_refuses_an_attribute_that_onnx_lacks(value: object) -> None:
    with pytest.raises(
        ModelError, match=r"main, Custom \(n\): attribute 'odd' is .* no attribute type"
    ):
        from_surgeon(one_node("Custom", odd=value))


def test_refuses_an_attribute_of_the_wrong_type() -> None:
    with pytest.raises(ModelError, match="FLOAT was expected"):
        from_surgeon(one_node(alpha="much"))


def test_refuses_a_dtype_that_onnx_lacks() -> None:
    graph = one_node()
    graph.inputs[0].dtype = np.dtype("datetime64[s]")
    with pytest.raises(ModelError, match=r"tensor 'x': dtype .* is none that ONNX has"):
        from_surgeon(graph)


def test_refuses_values_that_are_no_array() -> None:
    graph = to_surgeon(load(NESTED))
    graph.tensors()["w"].values = [1.0, 2.0, 3.0]
    with pytest.raises(ModelError, match="constant 'w' holds a list, not a NumPy array"):
        from_surgeon(graph)


def test_refuses_overloads() -> None:
    model = load(WITH_FUNCTION)
    model.graph[0].overload = "second"
    with pytest.raises(ModelError, match="calls the overload 'second'"):
        to_surgeon(model)
    model.graph[0].overload = ""
    (function,) = model.functions.values()
    function.overload = "second"
    with pytest.raises(ModelError, match="function my::f has the overload 'second'"):
        to_surgeon(model)


def test_refuses_lists_of_graphs() -> None:
    model = load("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    inner = ir.Graph([], [], nodes=[], name="inner")
    model.graph[0].attributes.add(ir.AttrGraphs("bodies", [inner]))
    with pytest.raises(ModelError, match=r"attribute 'bodies' of Relu .* is a list of graphs"):
        to_surgeon(model)
