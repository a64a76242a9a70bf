"""Loading: everything else that a file may hold."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import ModelError
from graphopt.ir.model_file import (
    load_model,
    model_to_bytes,
    to_proto,
)
from graphopt.ir.type_proto import ForeignType
from tests.ir.edge_models import (
    TEXT,
    assert_kept,
    attribute,
    parse,
    round_trip,
)


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
