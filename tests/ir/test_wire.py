"""The wire scan: what it leaves in the file, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from graphopt.errors import ModelError
from graphopt.ir import wire
from graphopt.ir.wire import LARGE_BYTES, blob, packed_field, packed_integers, scan, varint


def field(number: int, kind: int, body: bytes) -> bytes:
    return varint(number << 3 | kind) + body


def with_initializer(tensor: onnx.TensorProto) -> bytes:
    return bytes(onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString())


def parsed(data: bytes) -> tuple[onnx.ModelProto, str]:
    skeleton = scan(memoryview(data), "m")
    model = onnx.ModelProto()
    model.ParseFromString(skeleton.data)
    return model, skeleton.token


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_large_raw_data_stay_in_the_file() -> None:
    raw = bytes(range(256)) * 8
    data = with_initializer(onnx.TensorProto(name="w", data_type=1, dims=[512], raw_data=raw))
    model, token = parsed(data)
    (tensor,) = model.graph.initializer
    entries = external(tensor)
    assert entries["location"] == token
    offset, length = int(entries["offset"]), int(entries["length"])
    assert data[offset : offset + length] == raw
    assert not tensor.HasField("raw_data")
    assert tensor.name == "w"
    assert list(tensor.dims) == [512]


def test_small_models_come_back_byte_for_byte() -> None:
    data = with_initializer(onnx.TensorProto(name="w", data_type=1, dims=[1], raw_data=bytes(4)))
    assert scan(memoryview(data), "m").data == data


@pytest.mark.parametrize(("dtype", "name", "width"), [(1, "float_data", 4), (11, "double_data", 8)])
def test_packed_floats_stay_in_the_file(dtype: int, name: str, width: int) -> None:
    tensor = onnx.TensorProto(name="w", data_type=dtype, dims=[400])
    getattr(tensor, name).extend([0.5] * 400)
    model, _ = parsed(with_initializer(tensor))
    assert int(external(model.graph.initializer[0])["length"]) == 400 * width


def test_float_data_of_another_dtype_are_left_to_protobuf() -> None:
    tensor = onnx.TensorProto(name="w", data_type=6, dims=[400], float_data=[1.0] * 400)
    data = with_initializer(tensor)
    assert scan(memoryview(data), "m").data == data


def test_tensors_are_found_wherever_they_may_be() -> None:
    big = onnx.TensorProto(data_type=2, dims=[LARGE_BYTES], raw_data=bytes(LARGE_BYTES))
    sparse = onnx.SparseTensorProto(values=big, indices=big, dims=[9])
    branch = onnx.GraphProto(initializer=[big], sparse_initializer=[sparse])
    attributes = [
        onnx.AttributeProto(name="t", t=big),
        onnx.AttributeProto(name="ts", tensors=[big, big]),
        onnx.AttributeProto(name="g", g=branch),
        onnx.AttributeProto(name="gs", graphs=[branch]),
        onnx.AttributeProto(name="s", sparse_tensor=sparse),
        onnx.AttributeProto(name="ss", sparse_tensors=[sparse]),
    ]
    node = onnx.NodeProto(op_type="F", attribute=attributes)
    function = onnx.FunctionProto(node=[node], attribute_proto=[attributes[0]])
    data = onnx.ModelProto(
        graph=onnx.GraphProto(node=[node]), functions=[function]
    ).SerializeToString()
    model, token = parsed(data)
    # 1 + 2 + 3 + 3 + 2 + 2 in each node, one more in the function's default
    assert str(model).count(repr(token)[1:-1].replace("\\x00", "\\000")) == 2 * 13 + 1
    assert len(scan(memoryview(data), "m").data) < len(data) / 2


def test_tensors_with_external_data_are_left_alone() -> None:
    tensor = onnx.TensorProto(
        name="w", data_type=2, dims=[4096], data_location=TensorProto.EXTERNAL, raw_data=bytes(4096)
    )
    data = with_initializer(tensor)
    assert scan(memoryview(data), "m").data == data


def test_runs_of_numbers_are_passed_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    original = wire.Field

    def counted(*args: int) -> wire.Field:
        nonlocal steps
        steps += 1
        return original(*args)

    monkeypatch.setattr(wire, "Field", counted)
    attribute = onnx.AttributeProto(name="a", ints=range(5000), floats=[1.0] * 5000)
    data = onnx.ModelProto(
        graph=onnx.GraphProto(node=[onnx.NodeProto(attribute=[attribute])])
    ).SerializeToString()
    assert scan(memoryview(data), "m").data == data
    assert steps < 20


def test_mapped_pages_are_released_on_the_way() -> None:
    big = onnx.TensorProto(data_type=2, dims=[3 << 20], raw_data=bytes(3 << 20))
    data = onnx.ModelProto(graph=onnx.GraphProto(initializer=[big] * 7)).SerializeToString()
    calls: list[None] = []
    scan(memoryview(data), "m", lambda: calls.append(None))
    assert len(calls) == 2  # 21 MiB in steps of at least 8


def nested(depth: int) -> bytes:
    graph = b"\0" * 0
    for _ in range(depth):
        attribute = blob(6, graph + blob(10, bytes(LARGE_BYTES)))
        graph = blob(1, blob(5, attribute))
    return blob(7, graph)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff" * 11, "a varint does not end"),
        (b"\x80", "a varint does not end"),
        (blob(7, b"abc")[:-1], "field 7 ends at byte 5, its message at 4"),
        (field(7, 1, b"1234"), "field 7 ends"),
        (field(7, 5, b"12"), "field 7 ends"),
        (field(7, 3, b""), "wire type 3 of field 7"),
        (field(0, 0, b"\0"), "field number 0"),
        (nested(40), "nest more than 100 deep"),
    ],
)
def test_broken_wire_format_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        scan(memoryview(data), "m")


def test_deepest_allowed_nesting_is_scanned() -> None:
    data = nested(30)
    assert scan(memoryview(data), "m").data == data


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes_are_scanned_or_refused(data: bytes) -> None:
    try:
        skeleton = scan(memoryview(data), "m")
    except ModelError as error:
        assert "m: not a whole ONNX file" in str(error)  # noqa: PT017
    else:
        assert len(skeleton.data) <= len(data)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_packed_integers_are_read_as_protobuf_reads_them(numbers: list[int]) -> None:
    data = TensorProto(int64_data=numbers).SerializeToString()
    body = memoryview(data)[2 if len(data) < 130 else 3 :]
    found = packed_integers(body, np.dtype("<i8"))
    assert found.tolist() == numbers
    assert packed_integers(body, np.dtype("u1")).tolist() == [n % 256 for n in numbers]


def test_packed_integers_are_read_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [3**k for k in range(39)] * 3
    data = TensorProto(int64_data=numbers).SerializeToString()
    for size in (10, 11, 64):
        monkeypatch.setattr(wire, "_PIECE_BYTES", size)
        assert packed_integers(memoryview(data)[3:], np.dtype("<i8")).tolist() == numbers


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x80" * 3, "does not end"),
        (b"\x01" + b"\x80" * 3, "does not end"),
        (b"\x80" * 10 + b"\0", "longer than ten"),
    ],
)
def test_broken_packed_integers_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        packed_integers(memoryview(data), np.dtype("<i8"))


@given(st.integers(0, 2**63))
def test_varint_is_that_of_protobuf(value: int) -> None:
    encoded = onnx.OperatorSetIdProto(version=value if value < 2**63 else -(2**63))
    assert encoded.SerializeToString() == b"\x10" + varint(value)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1))
def test_packed_numbers_are_what_protobuf_writes(numbers: list[int]) -> None:
    tensor = onnx.TensorProto(int64_data=numbers)
    assert blob(7, packed_field(np.array(numbers, np.int64))) == tensor.SerializeToString()


def test_long_packed_fields_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_PIECE_BYTES", 16)
    assert packed_field(np.array([1, 300, 2, 3, 70000])) == b"\x01\xac\x02\x02\x03\xf0\xa2\x04"
