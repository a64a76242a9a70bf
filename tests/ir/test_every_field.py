"""One model that sets every field that ONNX has: none of them is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped, unused-ignore]
from onnx import TensorProto, helper, numpy_helper

from graphopt.ir.model_file import ExternalData, load_model, save_model, to_proto
from tests.ir.model_protos import normalized

# What only says where or how data are kept is decided anew on saving.
NOT_KEPT = {
    "TensorProto.data_location",
    "TensorProto.external_data",
    "TensorProto.double_data",
    "TensorProto.float_data",
    "TensorProto.int32_data",
    "TensorProto.int64_data",
    "TensorProto.uint64_data",
    "TensorProto.segment",  # refused: no exporter ever cut a tensor into pieces
    "Segment.begin",
    "Segment.end",
}

BODY = """<ir_version: 12, opset_import: ["" : 23, "l" : 1]>
main (float[N, 4] x, bool c) => (float[N, 4] y) <float[N, 4] t> {
  t = Add (x, w)
  u = l.Many <i = 1, f = 0.5, s = "s", ints = [1, 2], floats = [0.5, 1.5], strings = ["a", "b"]> (t)
  v = l.F <k = 3> (u)
  y = If (c) <then_branch = yes () => (float[N, 4] p) { p = Neg (v) },
              else_branch = no () => (float[N, 4] q) { q = Add (v, w) }>
}
<domain: "l", opset_import: ["" : 23, "l" : 1], overload: "wide"> F <k, d: int = 3> (a) => (b) {
  e = Relu (a)  b = l.G <k: int = @k> (e)
}"""


def full() -> onnx.ModelProto:
    """Every field of every message, in a model that is sound but for the operators of domain l."""
    model = onnx.parser.parse_model(BODY)
    graph, function = model.graph, model.functions[0]
    _tensors(graph)
    _types(graph)
    _devices(model)
    many = graph.node[1].attribute
    small = helper.make_tensor("inner", 1, [1], [1.0])
    inner = onnx.parser.parse_graph(
        "inner () => (float[1] r) { r = Constant<value_float = 1.0>() }"
    )
    many.append(helper.make_attribute("t", small))
    many.append(helper.make_attribute("tensors", [small, small]))
    many.append(helper.make_attribute("graphs", [inner, inner]))
    many.append(helper.make_attribute("sp", sparse("")))
    many.append(helper.make_attribute("sps", [sparse(""), sparse("")]))
    many.append(helper.make_attribute("tp", helper.make_tensor_type_proto(1, ["N", 2])))
    many.append(helper.make_attribute("tps", [helper.make_optional_type_proto(tensor_type())]))
    graph.node[2].overload = "wide"
    annotation = graph.quantization_annotation.add(tensor_name="t")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    function.value_info.append(helper.make_tensor_value_info("e", 1, ["N", 4]))
    training = model.training_info.add()
    training.initialization.CopyFrom(inner)
    training.algorithm.CopyFrom(inner)
    training.initialization_binding.add(key="a", value="r")
    training.update_binding.add(key="b", value="r")
    model.producer_name, model.producer_version, model.domain, model.model_version = (
        "p",
        "v",
        "d",
        7,
    )
    for message in messages(model):
        _document(message)
    return model


def sparse(name: str) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.ones(2, np.float32), name)
    return onnx.SparseTensorProto(
        values=values, indices=numpy_helper.from_array(np.array([1, 3])), dims=[4]
    )


def tensor_type() -> onnx.TypeProto:
    return helper.make_tensor_type_proto(1, ["N", 2])


def _tensors(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.arange(4, dtype=np.float32), "w"))
    graph.initializer.append(
        TensorProto(name="text", data_type=8, dims=[2], string_data=[b"a", b"\xff"])
    )
    graph.sparse_initializer.append(sparse("sw"))


def _types(graph: onnx.GraphProto) -> None:
    kinds = [
        helper.make_sequence_type_proto(tensor_type()),
        helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor_type())),
        helper.make_map_type_proto(7, tensor_type()),
        helper.make_sparse_tensor_type_proto(1, [None, 4]),
        onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(domain="d", name="n")),
    ]
    for index, kind in enumerate(kinds):
        graph.input.append(onnx.ValueInfoProto(name=f"extra{index}", type=kind))
    graph.input[0].type.denotation = "IMAGE"
    for dim in graph.input[0].type.tensor_type.shape.dim:
        dim.denotation = "DATA_BATCH"


def _devices(model: onnx.ModelProto) -> None:
    model.configuration.add(name="two", num_devices=2, device=["0", "1"])
    held = model.graph.node[0].device_configurations.add(configuration_id="two", pipeline_stage=1)
    spec = held.sharding_spec.add(tensor_name="x", device=[0, 1])
    spec.index_to_device_group_map.add(key=-1, value=[0, 1])
    spec.sharded_dim.add(axis=0).simple_sharding.add(dim_param="N", num_shards=2)
    spec.sharded_dim.add(axis=1).simple_sharding.add(dim_value=4, num_shards=2)


def _document(message: Any) -> None:
    """Words and metadata, wherever there is a place for them."""
    fields = message.DESCRIPTOR.fields_by_name
    if "doc_string" in fields:
        message.doc_string = f"of a {message.DESCRIPTOR.name}"
    if "metadata_props" in fields:
        message.metadata_props.add(key="b", value="2")
        message.metadata_props.add(key="a", value="1")
    if "name" in fields and not message.name and message.DESCRIPTOR.name == "NodeProto":
        message.name = f"node of {message.output[0]}"


def messages(message: Any) -> Iterator[Any]:
    """A message and all within."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in value if field.is_repeated else [value]:
                yield from messages(child)


def known_fields() -> set[str]:
    """Every field that this version of onnx has, of every message that a model may hold."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting: list[Descriptor] = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.full_name not in seen:
            seen.add(message.full_name)
            found.update(f"{message.name}.{field.name}" for field in message.fields)
            waiting += [field.message_type for field in message.fields if field.message_type]
    return found


def set_fields(model: onnx.ModelProto) -> set[str]:
    return {
        f"{message.DESCRIPTOR.name}.{field.name}"
        for message in messages(model)
        for field, _ in message.ListFields()
    }


def test_the_model_sets_every_field() -> None:
    assert known_fields() - set_fields(full()) - NOT_KEPT == set()


def test_every_field_is_kept(tmp_path: Path) -> None:
    model = full()
    assert normalized(to_proto(load_model(model))) == normalized(model)
    assert normalized(to_proto(load_model(model.SerializeToString()))) == normalized(model)
    for layout in (ExternalData.NEVER, ExternalData.SINGLE_FILE, ExternalData.FILE_PER_TENSOR):
        (path, *_) = save_model(load_model(model), tmp_path / "m.onnx", external=layout)
        assert normalized(onnx.load(path)) == normalized(model)


def test_loading_what_was_saved_gives_the_same_bytes(tmp_path: Path) -> None:
    (first,) = save_model(load_model(full()), tmp_path / "first.onnx")
    (second,) = save_model(load_model(first), tmp_path / "second.onnx")
    assert first.read_bytes() == second.read_bytes()
