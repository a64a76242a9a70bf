"""Loading and bytes out: sources, order, scopes, what is made of oddities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from graphopt.errors import ModelError
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.model_file import (
    load_model,
    model_to_bytes,
    save_model,
    skeleton_bytes,
    to_proto,
)
from tests.ir.edge_models import (
    TEXT,
    assert_kept,
    parse,
    sparse,
    weight,
    with_weights,
)
from tests.ir.model_protos import normalized

# --- sources


def test_every_source_gives_the_same_model(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    for name in ("m.onnxtxt", "m.onnx.txt", "text.onnx"):
        (tmp_path / name).write_text(TEXT)
    files = [tmp_path / name for name in ("m.onnx", "m.onnxtxt", "m.onnx.txt", "text.onnx")]
    sources = [
        *files,
        str(files[0]),
        proto,
        proto.SerializeToString(),
        TEXT,
        TEXT.encode(),
        load_model(proto),
    ]
    expected = model_to_bytes(load_model(proto))
    assert [model_to_bytes(load_model(source)) for source in sources] == [expected] * len(sources)


def test_an_ir_model_is_cloned_with_what_was_kept_aside() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    proto.training_info.add().algorithm.name = "train"
    original = load_model(proto)
    clone = load_model(original)
    clone.graph[0].op_type = "Tanh"
    assert original.graph[0].op_type == "Relu"
    assert to_proto(clone).training_info[0].algorithm.name == "train"


def test_the_proto_of_the_caller_is_left_alone() -> None:
    proto = with_weights(numpy_helper.from_array(np.arange(3.0), "w"))
    before = proto.SerializeToString()
    model = load_model(proto)
    model.graph.initializers["w"].name = "renamed"
    model.graph[0].doc_string = "x"
    assert proto.SerializeToString() == before


def test_large_tensors_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    array = np.arange(1000, dtype=np.float32)
    path.write_bytes(with_weights(numpy_helper.from_array(array, "w")).SerializeToString())
    tensor = weight(path)
    assert isinstance(tensor, MappedTensor)
    assert tensor.mapping is not None
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert not tensor.numpy().flags.writeable
    assert not tensor.numpy().flags.owndata


def test_a_file_replaced_while_loaded_does_not_change_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(with_weights(numpy_helper.from_array(np.ones(1000), "w")).SerializeToString())
    tensor = weight(path)
    (tmp_path / "other").write_bytes(bytes(10))
    (tmp_path / "other").replace(path)
    assert tensor.numpy().sum() == 1000


# --- order and scopes


def test_nodes_are_sorted() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu (t)  t = Tanh (x) }")
    assert [node.op_type for node in load_model(proto).graph] == ["Tanh", "Relu"]
    assert_kept(proto)


def test_a_capture_before_its_producer_is_sorted() -> None:
    proto = parse(
        "g (float[N] x, bool c) => (float[N] y) { y = If <then_branch = a () => (float[N] p) { p = Neg (t) },"
        " else_branch = b () => (float[N] q) { q = Neg (x) }> (c)  t = Tanh (x) }"
    )
    assert [node.op_type for node in load_model(proto).graph] == ["Tanh", "If"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("y = Relu (t)  t = Tanh (y)", "Relu y <- Tanh t <- Relu y"),
        ("u = Relu (x)  y = Add (y, u)", "Add y <- Add y"),
    ],
)
def test_a_circle_is_refused_and_named(body: str, says: str) -> None:
    with pytest.raises(ModelError, match=f"main graph: nodes feed one another in a circle: {says}"):
        load_model(parse(f"g (float[N] x) => (float[N] y) {{ {body} }}"))


def test_a_circle_through_a_subgraph_is_refused() -> None:
    with pytest.raises(ModelError, match="circle: If y <- If y"):
        load_model(
            parse(
                "g (float[N] x, bool c) => (float[N] y) { y = If <then_branch = a () => (float[N] p) { p = Neg (y) },"
                " else_branch = b () => (float[N] q) { q = Neg (x) }> (c) }"
            )
        )


def test_a_branch_that_returns_an_outer_value_gets_an_identity() -> None:
    proto = parse(
        "g (float[N] x, bool c) => (float[N] y) { t = Relu (x)  y = If <then_branch = a () => (float[N] t) { },"
        " else_branch = b () => (float[N] q) { q = Neg (x) }> (c) }"
    )
    model = load_model(proto)
    branch = model.graph[1].attributes["then_branch"].as_graph()
    (identity,) = branch
    assert (identity.op_type, identity.inputs[0]) == ("Identity", model.graph[0].outputs[0])
    assert branch.outputs == [identity.outputs[0]]
    assert branch.outputs[0].dtype == ir.DataType.FLOAT
    assert identity.outputs[0].name == "t_returned"
    assert to_proto(load_model(to_proto(model))) == to_proto(model)


FUNCTION = ' <domain: "l", opset_import: ["" : 21]> '
RELU = "g (float x) => (float y) { y = Relu (x) }" + FUNCTION


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "g (float x, float x) => (float y) { y = Relu (x) }",
            "main graph: the value 'x' is defined twice.*an input",
        ),
        (
            "g (float x) => (float y) { y = Relu (x)  y = Tanh (x) }",
            "Tanh node with outputs \\['y'\\]: the value 'y' is defined twice, the first time by Relu node with outputs"
            ".*rename one",
        ),
        (
            "g (float x) => (float y) { x = Relu (x)  y = Tanh (x) }",
            "'x' is defined twice.*an output",
        ),
        (
            "g (float x) => (float y) <float y = {1}> { y = Relu (x) }",
            "'y' is defined twice.*an output",
        ),
        (
            "g (float x) => (float y) { y = Relu (z) }",
            "Relu node with outputs \\['y'\\]: the input 'z' is no graph input",
        ),
        ("g (float x) => (float y, float z) { y = Relu (x) }", "the output 'z' is made by no node"),
        (
            RELU + "F (a) => (b) { c = Relu (a) }",
            "function l:F: the output 'b' is made by no node",
        ),
        (
            RELU + "F (a) => (b) { b = Relu (x) }",
            "function l:F, Relu node with outputs \\['b'\\]: the input 'x'",
        ),
        (
            RELU + "F (a, a) => (b) { b = Relu (a) }",
            "function l:F: the value 'a' is defined twice",
        ),
        (
            RELU + "F (a) => (b) { b = Relu (a) }" + FUNCTION + "F (a) => (b) { b = Tanh (a) }",
            "functions \\['l:F:'\\] are defined twice",
        ),
    ],
)
def test_invalid_names_are_refused(text: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_model(parse(text))


def test_invalid_initializers_are_refused() -> None:
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "w")
    with pytest.raises(ModelError, match="'w' is defined twice, the second time as an initializer"):
        load_model(with_weights(tensor, tensor))
    both = with_weights(tensor)
    both.graph.sparse_initializer.append(sparse())
    with pytest.raises(ModelError, match="'w' is defined twice"):
        load_model(both)
    with pytest.raises(ModelError, match="the initializer '' of FLOAT \\[1\\] lacks a name"):
        load_model(with_weights(numpy_helper.from_array(np.zeros(1, np.float32))))
    with pytest.raises(ModelError, match="lacks a name or a data type"):
        load_model(with_weights(TensorProto(name="w")))


def test_a_repeated_attribute_is_refused() -> None:
    proto = parse("g (float x) => (float y) { y = l.F <k = 1> (x) }")
    proto.graph.node[0].attribute.append(proto.graph.node[0].attribute[0])
    with pytest.raises(ModelError, match=r"F node with outputs.*the attribute 'k' is given twice"):
        load_model(proto)


# --- bytes out


def test_to_proto_and_bytes_hold_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(
        with_weights(numpy_helper.from_array(np.arange(1000.0), "w")).SerializeToString()
    )
    model = load_model(path)
    assert to_proto(model) == onnx.load_from_string(model_to_bytes(model))
    assert normalized(to_proto(model)) == normalized(onnx.load(path))


def test_the_skeleton_has_small_constants_and_no_large_ones() -> None:
    proto = with_weights(
        numpy_helper.from_array(np.arange(1000.0), "large"),
        numpy_helper.from_array(np.arange(3), "small"),
    )
    skeleton = onnx.ModelProto.FromString(skeleton_bytes(load_model(proto)))
    large, small = skeleton.graph.initializer
    assert large.data_location == TensorProto.EXTERNAL
    assert list(large.dims) == [1000]
    np.testing.assert_array_equal(numpy_helper.to_array(small), np.arange(3))


def test_tensors_of_other_libraries_are_written() -> None:
    model = load_model(with_weights(numpy_helper.from_array(np.zeros(3, np.float32), "w")))
    value = model.graph.initializers["w"]
    value.const_value = ir.Tensor(np.arange(3, dtype=np.float32), name="another name")
    (tensor,) = to_proto(model).graph.initializer
    assert tensor.name == "w"
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), [0, 1, 2])


def test_a_tensor_that_lies_about_its_size_is_refused() -> None:
    model = load_model(with_weights(numpy_helper.from_array(np.zeros(3, np.float32), "w")))
    lying = ir.LazyTensor(
        lambda: ir.Tensor(np.zeros(5, np.float32)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape([3]),
        name="w",
    )
    model.graph.initializers["w"].const_value = lying
    with pytest.raises(ModelError, match="tensor 'w' of FLOAT \\[3\\] has 20 bytes, not 12"):
        model_to_bytes(model)


def test_missing_external_data_of_a_given_model_are_reported(tmp_path: Path) -> None:
    model = load_model(with_weights(numpy_helper.from_array(np.zeros(3, np.float32), "w")))
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "absent.bin",
        0,
        12,
        ir.DataType.FLOAT,
        shape=ir.Shape([3]),
        name="w",
        base_dir=str(tmp_path),
    )
    with pytest.raises(ModelError, match="tensor 'w': cannot read its data"):
        save_model(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_circle_through_parameters_and_lists_of_graphs_is_named() -> None:
    tail = ' <domain: "l", opset_import: ["" : 21]> F <k> (a) => (b) { c = l.G <k: int = @k> (b)  b = Add (a, c) }'
    with pytest.raises(
        ModelError, match="function l:F: nodes feed one another in a circle: G c <- Add b <- G c"
    ):
        load_model(parse("g (float x) => (float y) { y = Relu (x) }" + tail))
    proto = parse("g (float x) => (float y) { t = l.G (x)  y = Relu (t) }")
    inner = onnx.parser.parse_graph("i () => (float r) { r = Neg (y) }")
    proto.graph.node[0].attribute.add(name="gs", type=onnx.AttributeProto.GRAPHS).graphs.append(
        inner
    )
    with pytest.raises(ModelError, match="circle: G t <- Relu y <- G t"):
        load_model(proto)


def test_inputs_without_a_name_are_refused() -> None:
    for part in ("main graph", "function l:F"):
        proto = parse(RELU + "F (a) => (b) { b = Relu (a) }")
        if part == "main graph":
            proto.graph.input[0].name = proto.graph.node[0].input[0] = ""
        else:
            proto.functions[0].input[0] = proto.functions[0].node[0].input[0] = ""
        with pytest.raises(ModelError, match=f"{part}: an input has no name"):
            load_model(proto)
