"""Inputs from files: every form is read, and what does not fit is named with file, input, expected and seen."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper as helper
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.runtime.specs import Kind, TensorSpec
from graphopt.verify.feeds import read_feeds

X = TensorSpec("x", ir.DataType.FLOAT, ("n", 2))
M = TensorSpec("m", ir.DataType.INT64, ("n",))
W = TensorSpec("w", ir.DataType.FLOAT, (1,), overridable=True)
SPECS = (X, M, W)
GOOD: dict[str, Any] = {"x": np.ones((3, 2), np.float32), "m": np.arange(3)}


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def save_pb(path: Path, proto: Any) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(proto.SerializeToString())


def test_one_npz_is_one_feed(tmp_path: Path) -> None:
    (feed,) = read_feeds(save(tmp_path / "a.npz", **GOOD), SPECS)
    assert feed.name.endswith("a.npz")
    np.testing.assert_array_equal(feed.values["x"], GOOD["x"])
    (with_default,) = read_feeds(save(tmp_path / "b.npz", **GOOD, w=np.ones(1, np.float32)), SPECS)
    assert set(with_default.values) == {"x", "m", "w"}


def test_a_folder_of_npz_is_read_in_natural_order(tmp_path: Path) -> None:
    for index in (10, 2):
        save(tmp_path / f"s{index}.npz", **GOOD)
    (tmp_path / "notes.txt").write_text("not a feed")
    assert [Path(feed.name).name for feed in read_feeds(tmp_path, SPECS)] == ["s2.npz", "s10.npz"]


def test_test_data_sets_go_by_name_or_by_order(tmp_path: Path) -> None:
    for index, names in enumerate((("m", "x"), ("", ""))):
        arrays = (GOOD["m"], GOOD["x"]) if names[0] else (GOOD["x"], GOOD["m"])
        for position, (name, array) in enumerate(zip(names, arrays, strict=True)):
            save_pb(
                tmp_path / f"test_data_set_{index}" / f"input_{position}.pb",
                helper.from_array(array, name),
            )
    by_name, by_order = read_feeds(tmp_path, SPECS)
    for feed in (by_name, by_order, *read_feeds(tmp_path / "test_data_set_0", SPECS)):
        np.testing.assert_array_equal(feed.values["x"], GOOD["x"])
        np.testing.assert_array_equal(feed.values["m"], GOOD["m"])


def test_sequences_maps_and_optionals_come_from_protobufs(tmp_path: Path) -> None:
    array = np.ones(2, np.float32)
    specs = (
        TensorSpec("s", ir.DataType.FLOAT, None, Kind.SEQUENCE),
        TensorSpec("o", ir.DataType.FLOAT, None, Kind.OPTIONAL_TENSOR),
        TensorSpec("k", ir.DataType.FLOAT, None, Kind.MAP, ir.DataType.INT64),
    )
    save_pb(tmp_path / "input_0.pb", helper.from_list([array, array], "s"))
    save_pb(tmp_path / "input_1.pb", helper.from_optional(None, "o"))
    save_pb(tmp_path / "input_2.pb", helper.from_dict({1: np.float32(2)}, "k"))
    (feed,) = read_feeds(tmp_path, specs)
    assert len(feed.values["s"]) == 2
    assert feed.values["o"] is None
    assert feed.values["k"] == {1: 2}


def test_json_holds_lists_by_name(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"x": [[1, 2]], "m": [4]}, {"x": [[3, 4]], "m": [5]}]))
    first, second = read_feeds(path, SPECS)
    assert first.values["x"].dtype == np.float32
    assert second.values["m"].tolist() == [5]
    path.write_text(json.dumps({"x": [[1, 2]], "m": [4], "s": "kept"}))
    spec = TensorSpec("s", ir.DataType.STRING, None, Kind.OPAQUE)
    assert read_feeds(path, (*SPECS, spec))[0].values["s"] == "kept"


def test_bfloat16_survives_npz_as_bits_and_strings_become_objects(tmp_path: Path) -> None:
    specs = (TensorSpec("b", ir.DataType.BFLOAT16, (2,)), TensorSpec("t", ir.DataType.STRING, None))
    path = save(tmp_path / "a.npz", b=np.ones(2, ml_dtypes.bfloat16), t=np.array(["a", "b"]))
    (feed,) = read_feeds(path, specs)
    assert feed.values["b"].dtype == ml_dtypes.bfloat16
    assert feed.values["t"].dtype == object
    unknown = TensorSpec("b", ir.DataType.UNDEFINED, None)
    save(tmp_path / "c.npz", b=np.ones(1))
    assert read_feeds(tmp_path / "c.npz", (unknown,))[0].values["b"].dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": None}, r"lacks the input 'm' \(int64\[n\]\); it has 'x'"),
        ({"q": np.ones(1)}, "has the input 'q', which the model lacks; it takes 'x', 'm', 'w'"),
        (
            {"x": np.ones((3, 2))},
            r"'x' must be float\[n,2\]; its dtype is float64. Convert it to float",
        ),
        ({"x": np.ones(3, np.float32)}, r"'x' must be float\[n,2\]; its shape is \[3\]"),
        ({"x": np.ones((3, 4), np.float32)}, r"its shape is \[3, 4\]. Reshape it"),
        ({"m": np.arange(4)}, "the dimension 'n' is 3 in the input 'x' and 4 in 'm'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    path = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        read_feeds(path, SPECS)
    assert "bad.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"junk", "cannot be read as npz: it is no archive of arrays. Write it"),
        ("a.npz", b"PK\x03\x04junk", "cannot be read as npz"),
        ("a.npz", b"", "cannot be read as npz"),
        ("a.json", b"{", "cannot be read as JSON"),
        ("a.json", b"\xff\xfe\x00", "cannot be read as JSON"),
        ("a.json", b"[3]", r"a.json\[0\]' is int; expected an object"),
        ("a.json", b'{"x": [[1, "a"]], "m": [1]}', "the input 'x' is not an array of float"),
        ("a.json", b'{"x": [[1, 2], [3]], "m": [1]}', "the input 'x' is not an array of float"),
        ("a.csv", b"", "is not a form of inputs"),
        ("input_0.pb", b"\xff\xff", "cannot be read as TensorProto for 'x'"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_feeds(tmp_path if name.endswith(".pb") else path, SPECS)


def test_an_archive_that_promises_more_than_memory_holds_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    facts = {"descr": "<f4", "fortran_order": False, "shape": (2**46,)}
    np.lib.format.write_array_header_1_0(header, facts)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(DataError, match="promises arrays that do not fit into memory"):
        read_feeds(tmp_path / "a.npz", SPECS)


def test_a_single_array_has_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, GOOD["x"])
    with pytest.raises(DataError, match="is a single array without a name"):
        read_feeds(path, SPECS)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file or folder"):
        read_feeds(tmp_path / "none", SPECS)
    with pytest.raises(DataError, match="There is no file or folder"):
        read_feeds(tmp_path / "none.npz", SPECS)
    with pytest.raises(DataError, match=r"holds no inputs; give an \.npz file"):
        read_feeds(tmp_path, SPECS)
    (tmp_path / "l.json").write_text("[]")
    with pytest.raises(DataError, match="holds no inputs"):
        read_feeds(tmp_path / "l.json", SPECS)


def test_pickles_and_references_to_other_files_are_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "p.npz", x=np.array([object()]), m=GOOD["m"])
    with pytest.raises(DataError, match="cannot be read as npz"):
        read_feeds(tmp_path / "p.npz", SPECS)
    proto = onnx.TensorProto(
        name="x", data_type=1, dims=[1, 2], data_location=onnx.TensorProto.EXTERNAL
    )
    save_pb(tmp_path / "set" / "input_0.pb", proto)
    with pytest.raises(DataError, match="points to another file, which is not followed"):
        read_feeds(tmp_path / "set", SPECS)


def test_too_many_inputs_and_wrong_kinds_are_named(tmp_path: Path) -> None:
    for index in range(4):
        save_pb(tmp_path / f"input_{index}.pb", helper.from_array(GOOD["x"], ""))
    with pytest.raises(DataError, match="has 4 inputs; the model takes 3: 'x', 'm', 'w'"):
        read_feeds(tmp_path, SPECS)
    path = tmp_path / "l.json"
    path.write_text('{"x": [[1, 2]]}')
    with pytest.raises(DataError, match=r"'x' must be an array \(\?\[\?\]|must be an array"):
        read_feeds(path, (TensorSpec("x", ir.DataType.UNDEFINED, None),))
