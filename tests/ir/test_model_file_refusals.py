"""Files that are broken or hostile: each refusal names the file, the tensor, the numbers and the remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from graphopt.errors import ModelError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.wire import blob

HEAD = '<ir_version: 10, opset_import: ["" : 21, "l" : 1]> '


def model_with(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{HEAD} g (float[N] x) => (float[N] y) {{ y = Add (x, w) }}")
    proto.graph.initializer.append(tensor)
    return proto


def external(**entries: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def saved(folder: Path, tensor: onnx.TensorProto, data: bytes | None = bytes(32)) -> Path:
    folder.mkdir(exist_ok=True)
    if data is not None:
        (folder / "w.bin").write_bytes(data)
    path = folder / "m.onnx"
    path.write_bytes(model_with(tensor).SerializeToString())
    return path


# --- files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\x08\x0a", "holds no ONNX graph"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer; run `git lfs pull`",
        ),
        (b"PK\x03\x04....", "a zip archive"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"\x1f\x8b\x08", "gzip-compressed"),
        (b"garbage, not a model", "not a whole ONNX file"),
        (b"\x3a\x05\x0a\x03\x0a\x7f\x00", "not a whole ONNX file"),
        (b"<ir_version: 10> nonsense", "not valid ONNX text"),
        (b"<ir_version: \xff>", "not valid ONNX text"),
        (
            b'<ir_version: 10, opset_import: ["" : 21]> g (float x) => (float y) <float w = {1e}> {}',
            "not valid ONNX text",
        ),
        (
            b"<ir_version: 10> g (",
            r"ONNX text: \[ParseError at position \(line: 1 column: 21\)\]\n",
        ),
        (b"<" * 1000, "brackets nest more than 256 deep"),
    ],
)
def test_files_that_are_no_model_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ModelError, match="not a regular file"):
            load_model(path)
    with pytest.raises(ModelError, match=r"absent.onnx.: No such file or directory; give the path"):
        load_model(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="null byte"):
        load_model("a\0b")


def test_every_truncation_is_refused_or_leaves_a_valid_model() -> None:
    text = 'g (float[N] x) => (float[N] y) <float[2] w = {1, 2}> { t = Add (x, w)  y = l.F <k = 1, s = "a"> (t) }'
    data = onnx.parser.parse_model(HEAD + text).SerializeToString()
    outcomes = [loads(data[:size]) for size in range(len(data))]
    assert not any(outcomes[: data.index(b"Add")])


def loads(data: bytes) -> bool:
    try:
        model = load_model(data)
    except ModelError:
        return False
    return bool(model_to_bytes(model))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_models_are_refused_or_loaded(data: st.DataObject) -> None:
    body = (
        "g (float[N] x, bool c) => (float[N] y) <float[2] w = {1, 2}> { t = If <then_branch = a () => (float[N] p)"
        " { p = Neg (x) }, else_branch = b () => (float[N] q) { q = Add (x, w) }> (c)  y = l.F <k = [1, 2]> (t) }"
    )
    content = bytearray(onnx.parser.parse_model(HEAD + body).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if loads(bytes(content)):
        again = model_to_bytes(load_model(bytes(content)))
        assert model_to_bytes(load_model(again)) == again


def test_deep_nesting_is_refused() -> None:
    graph = onnx.GraphProto(name="g")
    for _ in range(33):
        outer = onnx.GraphProto(name="g")
        outer.node.add(op_type="F").attribute.add(name="g", type=5).g.CopyFrom(graph)
        graph = outer
    with pytest.raises(ModelError, match="graphs nest more than 32 deep"):
        load_model(onnx.ModelProto(graph=graph))


def test_types_too_deep_for_a_message_are_refused() -> None:
    type_proto = onnx.TypeProto()
    inner = type_proto
    for _ in range(3000):
        inner = inner.sequence_type.elem_type
    inner.tensor_type.elem_type = 1
    proto = onnx.parser.parse_model(f"{HEAD} g (float[N] x) => (float[N] y) {{ y = Relu (x) }}")
    proto.graph.value_info.add(name="x2").type.MergeFrom(onnx.TypeProto())
    proto.graph.input[0].type.Clear()
    proto.graph.input[0].type.sequence_type.elem_type.CopyFrom(type_proto)
    with pytest.raises(ModelError, match="nest too deeply"):
        load_model(proto)


# --- tensors


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (
            TensorProto(name="w", data_type=1, dims=[3], raw_data=bytes(8)),
            r"dims \[3\] of FLOAT are 12 bytes, its data are 8",
        ),
        (
            TensorProto(name="w", data_type=1, dims=[512], raw_data=bytes(2047)),
            "2048 bytes, its data are 2047",
        ),
        (
            TensorProto(name="w", data_type=1, dims=[2**40], raw_data=bytes(4)),
            "are 4398046511104 bytes",
        ),
        (
            TensorProto(name="w", data_type=1, dims=[2**40, 2**40], raw_data=bytes(4)),
            "over 64 bits",
        ),
        (TensorProto(name="w", data_type=1, dims=[0, 2**40, 2**40]), "over 64 bits"),
        (TensorProto(name="w", data_type=1, dims=[-1], raw_data=bytes(4)), "negative"),
        (
            TensorProto(name="w", data_type=1, dims=[1] * 33, raw_data=bytes(4)),
            "33 dims .* more than 32",
        ),
        (TensorProto(name="w", data_type=1, dims=[2]), "the weights have been stripped"),
        (
            TensorProto(name="w", data_type=1, dims=[2], int64_data=[1, 2]),
            "the weights have been stripped",
        ),
        (
            TensorProto(name="w", data_type=7, dims=[3000], int64_data=range(2999)),
            "are 24000 bytes, its data are 23992",
        ),
        (
            TensorProto(name="w", data_type=1, dims=[2], float_data=[1]),
            "are 8 bytes, its data are 4",
        ),
        (TensorProto(name="w", data_type=77, dims=[1]), "data type 77 is not known to onnx-ir"),
        (
            TensorProto(name="w", data_type=8, dims=[2], string_data=[b"a"]),
            "promise 2 strings in string_data, there are 1",
        ),
        (TensorProto(name="w", data_type=27, dims=[1], int32_data=[64]), "data outside 0..63"),
        (TensorProto(name="w", dims=[1], raw_data=b"a"), "has data but no data type"),
        (
            TensorProto(name="w", data_type=1, dims=[1], segment=TensorProto.Segment(begin=0)),
            "is one segment",
        ),
    ],
)
def test_lying_tensors_are_refused(tensor: onnx.TensorProto, says: str) -> None:
    with pytest.raises(ModelError, match=f"bytes, main graph, tensor 'w': .*{says}"):
        load_model(model_with(tensor).SerializeToString())


def test_data_given_twice_are_refused() -> None:
    tensor = TensorProto(name="w", data_type=1, dims=[500], raw_data=bytes(2000))
    attribute = onnx.AttributeProto(
        name="t", type=onnx.AttributeProto.TENSOR, t=tensor
    ).SerializeToString()
    node = onnx.NodeProto(op_type="F", output=["y"]).SerializeToString()
    # A message field given twice is merged: the second tensor would add small data to the large ones.
    again = onnx.AttributeProto(t=TensorProto(raw_data=bytes(4))).SerializeToString()
    data = blob(7, blob(1, node + blob(5, attribute + again)))
    with pytest.raises(ModelError, match="its data are given more than once"):
        load_model(data)


def test_broken_packed_integers_are_refused() -> None:
    data = model_with(
        TensorProto(name="w", data_type=7, dims=[2000], int64_data=range(2000))
    ).SerializeToString()
    last = data.index(b"\xcf\x0f")  # 1999
    with pytest.raises(ModelError, match="tensor 'w': a varint does not end"):
        load_model(data[: last + 1] + b"\xff" + data[last + 2 :])


def test_lying_sparse_tensors_are_refused() -> None:
    proto = model_with(TensorProto(name="v", data_type=1, dims=[1], raw_data=bytes(4)))
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 9]))
    proto.graph.sparse_initializer.add(values=values, indices=indices, dims=[4])
    with pytest.raises(
        ModelError, match=r"main graph: sparse tensor 'w' of dims.*an index lies outside"
    ):
        load_model(proto)
    proto.graph.sparse_initializer[0].dims[:] = [-4]
    with pytest.raises(ModelError, match="sparse tensor 'w': 1 dims"):
        load_model(proto)


# --- external data


def test_external_data_are_mapped_from_the_folder(tmp_path: Path) -> None:
    data = np.arange(8, dtype=np.float32).tobytes()
    for entries in (
        {"offset": "16", "length": "16"},
        {"offset": "16"},
        {"offset": "16", "checksum": "0"},
    ):
        path = saved(tmp_path, external(location="w.bin", **entries), data)
        tensor = load_model(path).graph.initializers["w"].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), [4, 5, 6, 7])


def test_external_data_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    path = saved(tmp_path, external(location="sub/w.bin"), None)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(bytes(16))
    assert "w" in load_model(path).graph.initializers


def test_large_external_files_are_mapped_once(tmp_path: Path) -> None:
    path = saved(tmp_path, external(location="w.bin", offset=str(1 << 20)), bytes((1 << 20) + 16))
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer.append(external(location="w.bin"))
    proto.graph.initializer[1].name = "v"
    path.write_bytes(proto.SerializeToString())
    first, second = (v.const_value for v in load_model(path).graph.initializers.values())
    assert first.mapping[0] is second.mapping[0]  # type: ignore[union-attr]


def test_a_store_of_links_is_one_folder(tmp_path: Path) -> None:
    """As model caches keep them: names in one folder, blobs in another."""
    real = saved(tmp_path / "blobs", external(location="w.bin"))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "m.onnx").symlink_to(real)
    (snapshot / "w.bin").symlink_to(tmp_path / "blobs" / "w.bin")
    assert "w" in load_model(snapshot / "m.onnx").graph.initializers


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "/etc/passwd"}, "'/etc/passwd' is not a path relative to the model"),
        ({"location": "C:\\w.bin"}, "is not a path relative"),
        ({"location": "\\\\host\\w.bin"}, "is not a path relative"),
        ({"location": "file\0.bin"}, "is not a path relative"),
        ({}, "'' is not a path relative"),
        ({"location": "../w.bin"}, "leads out of the model's folder"),
        ({"location": "sub/../../w.bin"}, "leads out of the model's folder"),
        ({"location": "sub\\..\\..\\w.bin"}, "leads out of the model's folder"),
        ({"location": "absent.bin"}, "'absent.bin' is missing"),
        ({"location": "."}, "not a regular file"),
        (
            {"location": "w.bin", "offset": "17"},
            "bytes 17 to 33 of 'w.bin' are outside the file, which has 32",
        ),
        ({"location": "w.bin", "offset": "-1"}, "offset '-1' is not a byte count"),
        ({"location": "w.bin", "offset": "1_0"}, "offset '1_0' is not a byte count"),
        ({"location": "w.bin", "offset": "9" * 30}, "is not a byte count"),
        ({"location": "w.bin", "length": "15"}, "are 16 bytes, its data are 15"),
        ({"location": "w.bin", "length": "0x10"}, "length '0x10' is not a byte count"),
    ],
)
def test_bad_external_data_are_refused(tmp_path: Path, entries: dict[str, str], says: str) -> None:
    path = saved(tmp_path, external(**entries))
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert says in str(caught.value)
    assert f"{path}, main graph, tensor 'w'" in str(caught.value) or "not a regular file" in says


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(32))
    path = saved(tmp_path / "model", external(location="w.bin"), None)
    (tmp_path / "model" / "w.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(
        ModelError, match=r"leads out of the model's folder, to .*secret, and is not followed"
    ):
        load_model(path)
    (tmp_path / "model" / "w.bin").unlink()
    (tmp_path / "model" / "sub").symlink_to(tmp_path)
    path = saved(tmp_path / "model", external(location="sub/secret"), None)
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        load_model(path)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (
            errno.EACCES,
            "cannot read external data file .*w.bin: Permission denied; make it readable",
        ),
        (errno.EMFILE, "Too many open files; raise `ulimit -n` or keep the data in fewer files"),
    ],
)
def test_external_data_that_cannot_be_opened_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    path = saved(tmp_path, external(location="w.bin"))
    original = os.open

    def refusing(name: str | Path, *args: int) -> int:
        if Path(name).name == "w.bin":
            raise OSError(number, os.strerror(number))
        return original(name, *args)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(ModelError, match=says):
        load_model(path)


def test_external_data_need_a_path() -> None:
    for source in (
        model_with(external(location="w.bin")),
        model_with(external(location="w.bin")).SerializeToString(),
    ):
        with pytest.raises(
            ModelError, match="the model came without a folder; load it from its path"
        ):
            load_model(source)


def test_external_strings_are_refused(tmp_path: Path) -> None:
    tensor = external(location="w.bin")
    tensor.data_type = TensorProto.STRING
    with pytest.raises(ModelError, match="STRING cannot be kept as external data"):
        load_model(saved(tmp_path, tensor))


@pytest.mark.zoo
def test_hostile_models_of_the_zoo_are_refused(zoo: Path) -> None:
    folder = zoo / "fusion_tests" / "ort_testdata"
    with pytest.raises(ModelError, match="leads out of the model's folder, and is not followed"):
        load_model(folder / "test_arbitrary_external_file.onnx")
    with pytest.raises(ModelError, match=r"icm-31000000518082.onnx"):
        load_model(folder / "icm-31000000518082.onnx")
