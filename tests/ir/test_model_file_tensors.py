"""Loading: tensors of every dtype and form, sparse ones included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from graphopt.ir.mapped import MappedTensor
from graphopt.ir.model_file import (
    load_model,
)
from graphopt.ir.sparse import CooTensor
from tests.ir.edge_models import (
    assert_kept,
    attribute,
    parse,
    round_trip,
    sparse,
    weight,
    with_weights,
)

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
