"""Loading: sources, what is kept, what is made of oddities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import ModelError
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.model_file import (
    load_model,
    model_to_bytes,
    save_model,
    skeleton_bytes,
    to_proto,
)
from graphopt.ir.sparse import CooTensor
from graphopt.ir.type_proto import ForeignType
from tests.ir.model_protos import normalized

TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { y = Relu (x) }'


def parse(
    text: str, head: str = '<ir_version: 10, opset_import: ["" : 21, "l" : 1]>'
) -> onnx.ModelProto:
    return onnx.parser.parse_model(head + text)


def round_trip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Through bytes and through the proto, which must come to the same."""
    result = to_proto(load_model(proto.SerializeToString()))
    assert to_proto(load_model(proto)) == result
    return result


def assert_kept(proto: onnx.ModelProto) -> None:
    assert normalized(round_trip(proto)) == normalized(proto)


def attribute(**fields: Any) -> onnx.AttributeProto:
    return onnx.AttributeProto(**fields)


def with_weights(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    proto.graph.initializer.extend(tensors)
    return proto


def weight(source: Any, name: str = "w") -> ir.TensorProtocol:
    tensor = load_model(source).graph.initializers[name].const_value
    assert tensor is not None
    return tensor


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


# --- tensors

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "FLOAT": np.array([1.5, -0.0, np.inf], np.float32),
    "UINT8": np.array([0, 255, 7], np.uint8),
    "INT8": np.array([-128, 127, 0], np.int8),
    "UINT16": np.array([65535, 0, 1], np.uint16),
    "INT16": np.array([-32768, 1, 2], np.int16),
    "INT32": np.array([-(2**31), 1, 2], np.int32),
    "INT64": np.array([-(2**63), 1, 2], np.int64),
    "BOOL": np.array([True, False, True]),
    "FLOAT16": np.array([1.5, -0.0, np.inf], np.float16),
    "DOUBLE": np.array([1e300, -0.0, 2], np.float64),
    "UINT32": np.array([2**32 - 1, 0, 1], np.uint32),
    "UINT64": np.array([2**64 - 1, 0, 1], np.uint64),
    "COMPLEX64": np.array([1 + 2j, -1j, 0], np.complex64),
    "COMPLEX128": np.array([1 + 2j, -1j, 0], np.complex128),
    "BFLOAT16": np.array([1.5, -0.0, 3], ml_dtypes.bfloat16),
    "FLOAT8E4M3FN": np.array([1.5, -2, 3], ml_dtypes.float8_e4m3fn),
    "FLOAT8E4M3FNUZ": np.array([1.5, -2, 3], ml_dtypes.float8_e4m3fnuz),
    "FLOAT8E5M2": np.array([1.5, -2, 3], ml_dtypes.float8_e5m2),
    "FLOAT8E5M2FNUZ": np.array([1.5, -2, 3], ml_dtypes.float8_e5m2fnuz),
    "FLOAT8E8M0": np.array([1, 2, 4], ml_dtypes.float8_e8m0fnu),
    "UINT4": np.array([15, 0, 9], ml_dtypes.uint4),
    "INT4": np.array([-8, 7, -1], ml_dtypes.int4),
    "FLOAT4E2M1": np.array([1.5, -2, 6], ml_dtypes.float4_e2m1fn),
    "UINT2": np.array([3, 0, 2], ml_dtypes.uint2),
    "INT2": np.array([-2, 1, -1], ml_dtypes.int2),
    "FLOAT6E2M3": np.array([1.5, -2, 3], ml_dtypes.float6_e2m3fn),
    "FLOAT6E3M2": np.array([1.5, -2, 3], ml_dtypes.float6_e3m2fn),
}


@pytest.mark.parametrize("repeat", [1, 2000], ids=["small", "mapped"])
@pytest.mark.parametrize("name", ARRAYS)
def test_every_dtype_is_read_and_written(name: str, repeat: int) -> None:
    dtype, array = ir.DataType[name], np.tile(ARRAYS[name], repeat)
    raw = ir.Tensor(array, dtype).tobytes()
    proto = with_weights(TensorProto(name="w", data_type=dtype, dims=array.shape, raw_data=raw))
    tensor = weight(proto.SerializeToString())
    assert tensor.dtype == dtype
    assert tensor.numpy().dtype == array.dtype
    assert tensor.numpy().tobytes() == array.tobytes()
    assert tensor.tobytes() == raw
    assert round_trip(proto).graph.initializer[0] == proto.graph.initializer[0]


@pytest.mark.parametrize("repeat", [1, 5000], ids=["small", "large"])
@pytest.mark.parametrize("name", ARRAYS)
def test_every_typed_field_is_read(name: str, repeat: int) -> None:
    dtype, array = ir.DataType[name], np.tile(ARRAYS[name], repeat)
    tensor = TensorProto(name="w", data_type=dtype, dims=array.shape)
    if name in ("FLOAT", "COMPLEX64"):
        tensor.float_data.extend(array.view(np.float32).tolist())
    elif name in ("DOUBLE", "COMPLEX128"):
        tensor.double_data.extend(array.view(np.float64).tolist())
    elif name == "INT64":
        tensor.int64_data.extend(array.tolist())
    elif name in ("UINT32", "UINT64"):
        tensor.uint64_data.extend(array.tolist())
    elif dtype.bitwidth in (2, 4):
        tensor.int32_data.extend(ir.Tensor(array, dtype).tobytes())
    elif dtype.bitwidth == 6:
        tensor.int32_data.extend(array.view(np.uint8).tolist())
    elif name in ("INT8", "INT16", "INT32"):
        tensor.int32_data.extend(array.tolist())
    else:
        tensor.int32_data.extend(array.view(f"u{array.itemsize}").tolist())
    proto = with_weights(tensor)
    for source in (proto, proto.SerializeToString()):
        assert weight(source).numpy().tobytes() == array.tobytes()


def test_strings_are_kept() -> None:
    strings = TensorProto(name="w", data_type=8, dims=[3], string_data=[b"a", b"\xff", b""])
    assert_kept(with_weights(strings))


def test_large_packed_float_data_stay_in_the_file(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=1, dims=[50, 20], float_data=np.arange(1000).tolist())
    path = tmp_path / "m.onnx"
    path.write_bytes(with_weights(tensor).SerializeToString())
    loaded = weight(path)
    assert isinstance(loaded, MappedTensor)
    assert loaded.mapping is not None
    np.testing.assert_array_equal(loaded.numpy(), np.arange(1000, dtype=np.float32).reshape(50, 20))


@pytest.mark.parametrize("dims", [[], [0], [2, 0, 3]])
def test_scalars_and_empty_tensors_are_kept(dims: list[int]) -> None:
    proto = with_weights(numpy_helper.from_array(np.zeros(dims, np.float32), "w"))
    assert weight(proto).numpy().shape == tuple(dims)
    assert_kept(proto)


def test_notes_of_a_tensor_are_kept_once() -> None:
    tensor = numpy_helper.from_array(np.zeros(3), "w")
    tensor.doc_string = "text"
    tensor.metadata_props.add(key="k", value="v")
    assert_kept(with_weights(tensor))


def test_mapped_tensors_follow_the_array_protocols(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.int16)
    tensor = weight(with_weights(numpy_helper.from_array(array, "w")).SerializeToString())
    np.testing.assert_array_equal(np.from_dlpack(tensor), array)
    np.testing.assert_array_equal(np.array(tensor, np.float32), array.astype(np.float32))
    with (tmp_path / "raw").open("wb") as file:
        tensor.tofile(file)  # type: ignore[attr-defined]
    assert (tmp_path / "raw").read_bytes() == array.tobytes()
    assert repr(tensor) == "MappedTensor<INT16,[1000]>(name='w')"


# --- sparse


def sparse(indices: np.ndarray[Any, Any] | None = None, name: str = "w") -> onnx.SparseTensorProto:
    indices = np.array([1, 2]) if indices is None else indices
    values = numpy_helper.from_array(np.arange(1, len(indices) + 1, dtype=np.float32), name)
    return onnx.SparseTensorProto(
        values=values, indices=numpy_helper.from_array(indices, f"{name}_idx"), dims=[2, 2]
    )


@pytest.mark.parametrize(
    ("indices", "dense"),
    [
        (np.array([1, 2]), [[0, 1], [2, 0]]),
        (np.array([[0, 1], [1, 1]]), [[0, 1], [0, 2]]),
        (np.zeros(0, np.int64), [[0, 0], [0, 0]]),
        (np.array([0, 3], np.int16), [[1, 0], [0, 2]]),
    ],
    ids=["linear", "by-axis", "empty", "narrow"],
)
def test_sparse_initializers_are_constants_and_return_as_they_came(
    indices: np.ndarray[Any, Any], dense: list[list[int]]
) -> None:
    proto = parse("g (float[2,2] x) => (float[2,2] y) { y = Add (x, w) }")
    proto.graph.sparse_initializer.append(sparse(indices))
    tensor = weight(proto)
    assert isinstance(tensor, CooTensor)
    np.testing.assert_array_equal(tensor.numpy(), np.array(dense, np.float32))
    assert round_trip(proto).graph.sparse_initializer[0] == proto.graph.sparse_initializer[0]


def test_a_sparse_initializer_without_indices_gets_empty_ones() -> None:
    proto = parse("g (float[2,2] x) => (float[2,2] y) { y = Add (x, w) }")
    proto.graph.sparse_initializer.append(sparse(np.zeros(0, np.int64)))
    proto.graph.sparse_initializer[0].ClearField("indices")
    assert_kept(proto)


def test_a_sparse_initializer_that_a_feed_may_replace_stays_an_input() -> None:
    proto = parse("g (float[2,2] x, float[2,2] w) => (float[2,2] y) { y = Add (x, w) }")
    proto.graph.sparse_initializer.append(sparse())
    assert load_model(proto).graph.initializers["w"].is_graph_input()
    assert_kept(proto)


def test_a_sparse_constant_reads_as_a_constant_and_returns_as_it_came() -> None:
    proto = parse(
        "g (float[2,2] x) => (float[2,2] y) { w = Constant <value_int = 1> ()  y = Add (x, w) }"
    )
    carrier = attribute(name="sparse_value", type=11, sparse_tensor=sparse(name=""))
    proto.graph.node[0].attribute[0].CopyFrom(carrier)
    (constant, _) = load_model(proto).graph
    np.testing.assert_array_equal(
        constant.attributes["value"].as_tensor().numpy(), [[0, 1], [2, 0]]
    )
    assert_kept(proto)


def test_sparse_tensors_in_subgraphs_and_other_operators_are_kept() -> None:
    proto = parse(
        "g (bool c) => (float[2,2] y) { y = If <then_branch = t () => (float[2,2] p) { p = Neg (w) },"
        " else_branch = e () => (float[2,2] q) { q = l.F () }> (c) }"
    )
    then, other = (attribute.g for attribute in proto.graph.node[0].attribute)
    then.sparse_initializer.append(sparse())
    other.node[0].attribute.add(name="s", type=11).sparse_tensor.CopyFrom(sparse())
    other.node[0].attribute.add(name="ss", type=12).sparse_tensors.append(sparse())
    assert_kept(proto)


def test_a_sparse_initializer_hides_the_outer_value_of_its_name() -> None:
    proto = parse(
        "g (bool c, float[2,2] w) => (float[2,2] y) { y = If <then_branch = t () => (float[2,2] p) { p = Neg (w) },"
        " else_branch = e () => (float[2,2] q) { q = Neg (w) }> (c) }"
    )
    proto.graph.node[0].attribute[0].g.sparse_initializer.append(sparse())
    node = load_model(proto).graph[0]
    then, other = (node.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    assert then[0].inputs[0] is then.initializers["w"]
    assert other[0].inputs[0] is load_model(proto).graph.inputs[1] or other[0].inputs[0] is not None
    assert other[0].inputs[0].is_graph_input()
    assert_kept(proto)


# --- everything else a file may hold


def documented() -> onnx.ModelProto:
    proto = parse(
        "g (float[N] x) => (float[N] y) <float[N] t> { t = Relu (x)  y = l.F <k = 2> (t) }"
        '<domain: "l", opset_import: ["" : 21], overload: "o"> F <k, d: int = 3> (p) => (r)'
        " { q = Relu (p)  r = l.G <k: int = @k> (q) }"
    )
    proto.producer_name, proto.producer_version, proto.domain = "p", "v", "d"
    proto.model_version, proto.doc_string = 7, "model"
    graph, function = proto.graph, proto.functions[0]
    graph.node[1].overload = "o"
    for part in (
        proto,
        graph,
        graph.node[0],
        graph.value_info[0],
        graph.input[0],
        graph.output[0],
        function,
    ):
        part.metadata_props.add(key="k", value="v")
        part.doc_string = "text"
    function.node[0].metadata_props.add(key="a", value="b")
    function.node[0].attribute.add(name="a", type=2, i=1, doc_string="attribute")
    function.value_info.append(helper.make_tensor_value_info("q", 1, ["N"]))
    return proto


def test_documentation_metadata_and_functions_are_kept() -> None:
    assert_kept(documented())


def test_value_info_of_functions_older_than_its_field_is_kept() -> None:
    proto = documented()
    proto.ir_version = 9
    proto.functions[0].ClearField("overload")
    assert_kept(proto)  # where the function itself held it
    proto.functions[0].ClearField("value_info")
    proto.graph.value_info.append(helper.make_tensor_value_info("l::F/q", 1, ["N"]))
    proto.graph.value_info.append(helper.make_tensor_value_info("l::Absent/q", 1, ["N"]))
    model = load_model(proto)
    assert next(iter(model.functions.values()))[0].outputs[0].dtype == ir.DataType.FLOAT
    assert_kept(proto)


def test_quantization_annotations_are_kept() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { t = Relu (x)  y = Relu (t) }")
    for name in ("x", "t", "y", "absent"):
        annotation = proto.graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    proto.graph.quantization_annotation.add(tensor_name="also absent")
    assert_kept(proto)


def test_value_info_of_unknown_names_is_kept_until_the_name_is_taken() -> None:
    proto = parse(
        "g (float[N] x) => (float[N] y) <float[N] elsewhere> { t = Relu (x)  y = Relu (t) }"
    )
    assert_kept(proto)
    model = load_model(proto)
    model.graph[0].outputs[0].name = "elsewhere"
    assert not to_proto(model).graph.value_info


def test_value_info_of_an_initializer_is_kept_but_not_invented() -> None:
    proto = parse(
        "g (float[N] x) => (float[N] y) <float[1] a = {1}, float[1] b = {1}> { y = Add (a, b) }"
    )
    infos = [info for info in proto.graph.value_info if info.name == "a"]
    del proto.graph.value_info[:]
    assert not round_trip(proto).graph.value_info
    proto.graph.value_info.extend(infos or [helper.make_tensor_value_info("a", 1, [1])])
    proto.graph.value_info[0].doc_string = "text"
    assert_kept(proto)


def test_training_info_is_kept() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    info = proto.training_info.add()
    info.algorithm.initializer.append(numpy_helper.from_array(np.zeros(2000), "w"))
    info.update_binding.add(key="w", value="v")
    assert_kept(proto)


def test_external_data_in_training_info_are_refused() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    node = proto.training_info.add().algorithm.node.add(op_type="Constant")
    node.attribute.add(name="value", t=TensorProto(data_location=TensorProto.EXTERNAL))
    with pytest.raises(ModelError, match="training info: refers to external data"):
        load_model(proto)


TYPES = [
    helper.make_map_type_proto(7, helper.make_tensor_type_proto(1, ["N"])),
    helper.make_sequence_type_proto(
        helper.make_map_type_proto(8, helper.make_tensor_type_proto(1, []))
    ),
    helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [2, "N"])),
    helper.make_optional_type_proto(
        helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None))
    ),
    helper.make_sparse_tensor_type_proto(1, [2, 3]),
    onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(domain="d", name="n")),
    onnx.TypeProto(denotation="IMAGE"),
    helper.make_tensor_type_proto(99, [1]),
    helper.make_tensor_type_proto(
        1, ["N", None, -1, 0, 5], shape_denotation=["A", "B", "", "", "C"]
    ),
]


@pytest.mark.parametrize("type_proto", TYPES, ids=lambda t: " ".join(str(t).split())[:40])
def test_every_type_is_kept(type_proto: onnx.TypeProto) -> None:
    proto = parse("g (float[N] x) => (float[N] y) { t = l.F (x)  y = l.F (t) }")
    proto.graph.input[0].type.CopyFrom(type_proto)
    proto.graph.output[0].type.CopyFrom(type_proto)
    proto.graph.value_info.add(name="t").type.CopyFrom(type_proto)
    proto.graph.node[0].attribute.add(name="tp", type=13).tp.CopyFrom(type_proto)
    proto.graph.node[0].attribute.add(name="tps", type=14).type_protos.append(type_proto)
    assert_kept(proto)


def test_a_foreign_type_says_that_it_is_unknown() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = l.F (x) }")
    proto.graph.input[0].type.CopyFrom(TYPES[0])
    (value,) = load_model(proto).graph.inputs
    assert isinstance(value.type, ForeignType)
    assert (value.dtype, value.type.elem_type) == (ir.DataType.UNDEFINED, ir.DataType.UNDEFINED)


def test_every_attribute_type_is_kept() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = l.F (x) }")
    tensor = numpy_helper.from_array(np.arange(500), "")
    graph = onnx.GraphProto(name="sub")
    strings = TensorProto(data_type=8, dims=[1], string_data=[b"s"])
    proto.graph.node[0].attribute.extend(
        [
            attribute(name="f", type=1, f=0.1),
            attribute(name="i", type=2, i=-1),
            attribute(name="s", type=3, s=b"text"),
            attribute(name="bytes", type=3, s=b"\xff\x00"),
            attribute(name="t", type=4, t=tensor),
            attribute(name="g", type=5, g=graph),
            attribute(name="fs", type=6, floats=[0.1, float("inf")]),
            attribute(name="is", type=7, ints=[1, -(2**63)]),
            attribute(name="ss", type=8, strings=[b"a", b"\xff"]),
            attribute(name="ts", type=9, tensors=[tensor, strings]),
            attribute(name="gs", type=10, graphs=[graph]),
            attribute(name="none", type=7),
            attribute(name="untyped tensor", type=4, t=TensorProto(name="e")),
        ]
    )
    assert_kept(proto)


def test_attributes_of_ir_version_1_get_the_type_of_their_field() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = l.F <k = 3> (x) }")
    proto.graph.node[0].attribute[0].ClearField("type")
    assert load_model(proto).graph[0].attributes["k"].as_int() == 3
    proto.graph.node[0].attribute[0].ClearField("i")
    assert load_model(proto).graph[0].attributes["k"].type == ir.AttributeType.UNDEFINED


def test_device_configurations_are_kept() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    proto.ir_version = 11
    proto.configuration.add(name="two", num_devices=2, device=["a", "b"])
    for name in ("two", "dangling"):
        device = proto.graph.node[0].device_configurations.add(
            configuration_id=name, pipeline_stage=1
        )
        device.sharding_spec.add(tensor_name="x", device=[0, 1])
    assert_kept(proto)


def test_fields_of_a_newer_onnx_do_no_harm() -> None:
    data = onnx.parser.parse_model(TEXT).SerializeToString()
    unknown = bytes([0xF2, 0x3F, 3]) + b"new"  # field 1022
    assert model_to_bytes(load_model(data + unknown)) == model_to_bytes(load_model(data))


def test_ir_3_initializers_stay_inputs_and_their_order_is_kept() -> None:
    proto = parse("g (float[1] b, float[1] x, float[1] a) => (float[1] y) { y = Add (a, b) }")
    proto.ir_version = 3
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.zeros(1, np.float32), n) for n in "ab"
    )
    result = round_trip(proto)
    assert [value.name for value in result.graph.input] == ["b", "x", "a"]
    assert_kept(proto)


def test_a_value_may_be_input_and_output_or_output_twice() -> None:
    assert_kept(parse("g (float[N] x) => (float[N] x, float[N] x) { y = Relu (x) }"))


def test_unnamed_outputs_and_inputs_keep_their_places() -> None:
    assert_kept(
        parse('g (float[N] x) => (float[N] y) { "", y = l.F (x, "", x) }'.replace('"", y', "_e, y"))
    )
    proto = parse("g (float[N] x) => (float[N] y) { a, y, b = l.F (x, , x) }")
    proto.graph.node[0].output[:] = ["", "y", ""]
    assert_kept(proto)


def test_ai_onnx_is_the_empty_domain() -> None:
    proto = parse(
        "g (float[N] x) => (float[N] y) { y = Relu (x) }",
        '<ir_version: 10, opset_import: ["ai.onnx" : 21]>',
    )
    proto.graph.node[0].domain = "ai.onnx"
    model = load_model(proto)
    assert (model.graph.opset_imports, model.graph[0].domain) == ({"": 21}, "")
    assert_kept(proto)


def test_text_that_is_not_utf8_is_marked_in_notes_and_refused_in_names() -> None:
    data = onnx.parser.parse_model(TEXT).SerializeToString()
    note = data + bytes([0x32, 2]) + b"\xff!"  # doc_string
    assert load_model(note).doc_string == "\ufffd!"
    with pytest.raises(ModelError, match="a name is not UTF-8"):
        load_model(data.replace(b"Relu", b"Re\xffu"))
    with pytest.raises(ModelError, match="a name is not UTF-8"):
        load_model(data.replace(b"\x0a\x01x", b"\x0a\x01\xff"))


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
            "Tanh node with outputs \\['y'\\]: the value 'y'",
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
