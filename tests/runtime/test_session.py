"""Sessions: every dtype and kind goes in and comes out; what is refused is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.errors import DataError, ModelError
from graphopt.runtime import marshal
from graphopt.runtime.session import (
    OptimizationLevel,
    Session,
    SessionOptions,
    first_line,
)
from graphopt.runtime.specs import Kind, TensorSpec, parse_runtime_type
from tests.rewriting import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21, "ai.onnx.ml" : 3]>'


def model(text: str) -> bytes:
    return bytes(onnx.parser.parse_model(HEAD + text).SerializeToString())


@pytest.mark.parametrize(
    ("onnx_name", "dtype"),
    [
        ("float", np.float32),
        ("double", np.float64),
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
        ("float8e5m2", ml_dtypes.float8_e5m2),
        ("int8", np.int8),
        ("uint16", np.uint16),
        ("int64", np.int64),
        ("bool", np.bool_),
    ],
)
def test_a_tensor_of_each_dtype_comes_back_as_it_was(onnx_name: str, dtype: Any) -> None:
    session = Session(model(f"g ({onnx_name}[n] x) => ({onnx_name}[n] y) {{ y = Identity(x) }}"))
    array = np.array([0, 1, 1, 0, 1]).astype(dtype)
    result = session.run({"x": array})["y"]
    assert result.dtype == array.dtype
    assert result.tobytes() == array.tobytes()


@pytest.mark.parametrize("count", [0, 3, 4])
def test_int4_is_packed_on_the_way_in_and_unpacked_on_the_way_out(count: int) -> None:
    text = "g (int4[n] x) => (float[n] y, int4[n] z) { y = Cast<to=1>(x) z = Cast<to=22>(y) }"
    array = np.array([-8, 7, -1, 3][:count], ml_dtypes.int4)
    result = Session(model(text)).run({"x": array})
    np.testing.assert_array_equal(result["y"], array.astype(np.float32))
    np.testing.assert_array_equal(result["z"].astype(np.int8), array.astype(np.int8))
    assert list(result) == ["y", "z"]


@pytest.mark.parametrize(
    "dtype",
    [
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT2,
        ir.DataType.UINT2,
        ir.DataType.FLOAT4E2M1,
    ],
)
def test_packing_is_the_inverse_of_unpacking(dtype: ir.DataType) -> None:
    codes = np.array([0, 1, 1, 0, 1], np.int8).astype(dtype.numpy())
    payload = marshal._packed(codes, dtype)
    np.testing.assert_array_equal(marshal._unpacked(payload, dtype, 5), codes)


def test_strings_sequences_maps_and_optionals_are_python_objects() -> None:
    strings = Session(model("g (string[n] x) => (string[n] y) { y = Identity(x) }"))
    assert strings.run({"x": np.array(["a", "bé"])})["y"].tolist() == ["a", "bé"]

    sequence = Session(model("g (seq(float[n]) x) => (seq(float[n]) y) { y = Identity(x) }"))
    assert sequence.inputs[0].kind is Kind.SEQUENCE
    assert sequence.run({"x": []})["y"] == []
    assert [a.tolist() for a in sequence.run({"x": [np.ones(2, np.float32)]})["y"]] == [[1, 1]]

    text = "g (float[2,2] x) => (seq(map(int64,float)) y) { y = ai.onnx.ml.ZipMap<classlabels_int64s=[4,7]>(x) }"
    zipped = Session(model(text))
    assert zipped.outputs[0].kind is Kind.SEQUENCE_OF_MAPS
    assert zipped.run({"x": np.ones((2, 2), np.float32)})["y"] == [{4: 1, 7: 1}, {4: 1, 7: 1}]

    optional = Session(model("g (optional(float[n]) x) => (bool h) { h = OptionalHasElement(x) }"))
    assert not optional.run({"x": None})["h"]
    assert optional.run({"x": np.ones(2, np.float32)})["h"]


def test_a_map_is_fed_as_a_dict() -> None:
    text = "g (map(int64,float) x) => (float[1,3] y) { y = ai.onnx.ml.DictVectorizer<int64_vocabulary=[0,1,2]>(x) }"
    assert Session(model(text)).run({"x": {0: 1.0, 2: 3.0}})["y"].tolist() == [[1, 0, 3]]


def test_a_sequence_and_bfloat16_travel_together() -> None:
    text = """g (bfloat16[n] q, seq(float[n]) x) => (bfloat16[n] r, int64 l)
              { r = Identity(q) l = SequenceLength(x) }"""
    session = Session(model(text))
    feeds = {"q": np.ones(2, ml_dtypes.bfloat16), "x": [np.ones(2, np.float32)]}
    assert session.run(feeds, ["l"])["l"] == 1
    with pytest.raises(ModelError, match="fails in ONNX Runtime"):
        session.run(feeds)


def test_a_numpy_scalar_is_taken_for_a_scalar_input() -> None:
    session = Session(model("g (float[n] x, float y) => (float[n] z) { z = Add(x, y) }"))
    assert session.run({"x": np.ones(1, np.float32), "y": np.float32(2)})["z"].tolist() == [3]


def test_an_overridable_initializer_may_be_fed_or_left_out() -> None:
    text = "g (float[n] x, float[1] w = {2}) => (float[n] y) { y = Mul(x, w) }"
    session = Session(model(text))
    assert [spec.overridable for spec in session.inputs] == [False, True]
    ones = np.ones(1, np.float32)
    assert session.run({"x": ones})["y"].tolist() == [2]
    assert session.run({"x": ones, "w": 5 * ones})["y"].tolist() == [5]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "No value was given for the input 'x'"),
        ({"x": np.ones(2, np.float32), "q": 1}, "has no input 'q'; it takes 'x'"),
        ({"x": np.ones(2)}, "an array of float64 was given. Convert it to float"),
        ({"x": None}, "not optional"),
        ({"x": np.ones((2, 2), np.float32)}, "A feed does not fit"),
        ({"x": np.ones(3, np.float32)}, r"axis 0: got 3, expected 2"),
    ],
)
def test_a_feed_that_does_not_fit_is_named(feeds: dict[str, Any], message: str) -> None:
    session = Session(model("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    with pytest.raises(DataError, match=message):
        session.run(feeds)


def test_an_unknown_output_is_named() -> None:
    session = Session(model("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    with pytest.raises(DataError, match="has no output 'z'; its outputs are 'y'"):
        session.run({"x": np.ones(2, np.float32)}, ["z"])


def test_a_failing_run_names_the_node() -> None:
    session = Session(model("g (float[n] x, int64[k] s) => (float[a,b] y) { y = Reshape(x, s) }"))
    with pytest.raises(ModelError, match="the run stopped at Reshape node") as caught:
        session.run({"x": np.ones(3, np.float32), "s": np.array([2, 2])})
    assert "/onnxruntime" not in str(caught.value)


def test_refusals_say_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Nonsense"):
        Session(model("g (float[2] x) => (float[2] y) { y = Nonsense(x) }"))
    with pytest.raises(ModelError, match=r"none\.onnx"):
        Session(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="refuses the model in memory"):
        Session(b"not a model")


def test_taps_return_inner_values_and_leave_outputs_first() -> None:
    data = model("g (float[n] x) => (float[n] y) { a = Neg(x) y = Relu(a) }")
    session = Session(data, options=SessionOptions(extra_outputs=("a", "y", "x")))
    assert [spec.name for spec in session.outputs] == ["y", "a", "x"]
    assert session.run({"x": np.ones(1, np.float32)})["a"].tolist() == [-1]


def test_a_tap_on_no_value_is_refused(tmp_path: Path) -> None:
    data = model("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="has no value 'q' in its main graph 'g'"):
        Session(data, options=SessionOptions(extra_outputs=("q",)))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\xff\xff\xff")
    with pytest.raises(ModelError, match=r"broken.onnx' cannot be read as ONNX"):
        Session(broken, options=SessionOptions(extra_outputs=("q",)))


def test_a_tapped_file_still_finds_its_external_data(tmp_path: Path) -> None:
    text = "g (float[n,2] x) => (float[n,2] y) <float[2,2] w> { a = MatMul(x, w) y = Neg(a) }"
    proto = onnx.parser.parse_model(HEAD + text)
    weight = np.array([[1, 2], [3, 4]], np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "model.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").exists()
    session = Session(path, options=SessionOptions(extra_outputs=("a",)))
    assert session.run({"x": np.eye(2, dtype=np.float32)})["a"].tolist() == [[1, 2], [3, 4]]


def test_without_prepacking_a_constant_weight_gives_the_bits_of_a_computed_one() -> None:
    """Folding makes weights constant; with prepacking they would meet another GEMM kernel (ORT 1.31)."""
    weight = np.random.default_rng(0).standard_normal((64, 17)).astype(np.float32)
    text = "g (float[1,64] x) => (float[1,17] y) <float[64,17] w> {{ {} }}"
    results = []
    for nodes in ("y = MatMul(x, w)", "v = Identity(w) y = MatMul(x, v)"):
        proto = onnx.parser.parse_model(HEAD + text.format(nodes))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        session = Session(proto.SerializeToString(), options=SessionOptions(prepack=False))
        results.append(session.run({"x": np.full((1, 64), 1 / 3, np.float32)})["y"])
    assert results[0].tobytes() == results[1].tobytes()


def test_every_level_loads() -> None:
    data = model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    for level in OptimizationLevel:
        assert Session(data, level=level).run({"x": np.ones(2, np.float32)})["y"].tolist() == [1, 1]


def test_runtime_types_are_read() -> None:
    assert parse_runtime_type("optional(seq(tensor(float)))")[0] is Kind.OPTIONAL_SEQUENCE
    assert parse_runtime_type("optional(tensor(int8))")[:2] == (
        Kind.OPTIONAL_TENSOR,
        ir.DataType.INT8,
    )
    assert parse_runtime_type("map(string,tensor(double))") == (
        Kind.MAP,
        ir.DataType.DOUBLE,
        ir.DataType.STRING,
    )
    assert parse_runtime_type("sparse_tensor(float)")[0] is Kind.OPAQUE
    assert parse_runtime_type("tensor(novel)")[1] is ir.DataType.UNDEFINED


def test_a_spec_reads_well() -> None:
    assert str(TensorSpec("x", ir.DataType.FLOAT, (2, "n", None))) == "float[2,n,?]"
    assert str(TensorSpec("x", ir.DataType.INT8, None, Kind.SEQUENCE)) == "sequence of int8[?]"


def test_messages_of_the_runtime_are_cut_to_what_matters() -> None:
    text = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned "
    text += "while running Add node. Name:'a' Status Message: /a/b.h:9 void F(const T&, T*) bad shapes\nmore"
    assert (
        first_line(RuntimeError(text))
        == "the run stopped at Add node. Name:'a' Status Message: bad shapes"
    )
    assert first_line(RuntimeError("")) == "RuntimeError('')"
    assert len(first_line(RuntimeError("x" * 9999))) == 400


def test_what_decodes_weights_runs_when_they_are_needed(tmp_path: Path) -> None:
    proto = parse(
        """g (float[2,4] x) => (float[2,4] y) <int8[4,4] v, int8[4,4] w, float s, int8 z> {
             a = DequantizeLinear(v, s, z)  m = MatMul(x, a)
             b = DequantizeLinear(w, s, z)  y = MatMul(m, b) }""",
        opset=13,
    )
    for name, node in zip("amby", proto.graph.node, strict=True):
        node.name = name
    options = SessionOptions(in_order=True, profile=tmp_path / "p")
    session = Session(proto.SerializeToString(), options=options)
    session.run({"x": np.ones((2, 4), np.float32)})
    events = json.loads(session.end_profiling().read_text(encoding="utf-8"))
    ran = [e["name"] for e in events if e.get("name", "").endswith("_kernel_time")]
    order = [name.removesuffix("_kernel_time") for name in ran]
    assert order == ["a", "m", "b", "y"]
