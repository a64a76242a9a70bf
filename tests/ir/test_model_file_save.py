"""Saving: whole files or none, the same bytes every time, weights where they were asked for."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from graphopt.errors import ModelError, OptionError
from graphopt.ir import atomic, model_file
from graphopt.ir.mapped import CHUNK_BYTES, MappedTensor
from graphopt.ir.model_file import ExternalData, load_model, model_to_bytes, save_model

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '


def make_model(size: int = 1000) -> ir.Model:
    """y = x + w + v + c: two large initializers, one small one and a constant in a subgraph."""
    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[{size}] x, bool b) => (float[{size}] y) <float s = {{2}}> {{ t = Add (x, w)  u = Mul (t, s)"
        "  y = If <then_branch = a () => (float[N] p) { c = Constant <value_int = 0> ()  p = Add (u, c) },"
        " else_branch = e () => (float[N] q) { q = Add (u, v) }> (b) }"
    )
    rng = np.random.default_rng(0)
    large = [numpy_helper.from_array(rng.standard_normal(size, np.float32), name) for name in "wvc"]
    proto.graph.initializer.append(large[0])
    then, other = (attribute.g for attribute in proto.graph.node[2].attribute)
    other.initializer.append(large[1])
    then.node[0].attribute[0].CopyFrom(
        onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=large[2])
    )
    return load_model(proto)


def outputs(path: Path, size: int = 1000) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.linspace(-1, 1, size, dtype=np.float32)
    return [session.run(None, {"x": x, "b": np.array(flag)})[0] for flag in (True, False)]


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("external", ExternalData)
def test_every_layout_holds_the_same_model(tmp_path: Path, external: ExternalData) -> None:
    model = make_model()
    save_model(model, tmp_path / "inline.onnx")
    (tmp_path / "out").mkdir()
    files = save_model(model, tmp_path / "out" / "m.onnx", external=external)
    assert sorted(path.name for path in files) == sorted(listing(tmp_path / "out"))
    assert files[0] == tmp_path / "out" / "m.onnx"
    assert model_to_bytes(load_model(files[0])) == (tmp_path / "inline.onnx").read_bytes()
    for expected, found in zip(outputs(tmp_path / "inline.onnx"), outputs(files[0]), strict=True):
        np.testing.assert_array_equal(expected, found)
    names = {
        ExternalData.SINGLE_FILE: ["m.onnx", "m.onnx.data"],
        ExternalData.FILE_PER_TENSOR: ["m.onnx", "m.onnx.data.00000", "m.onnx.data.00001"],
    }
    assert [path.name for path in files] == names.get(external, ["m.onnx"])


def test_external_data_say_where_they_are() -> None:
    model = make_model()
    message, files = model_file._laid_out(model, "m.onnx", ExternalData.SINGLE_FILE)
    proto = onnx.ModelProto.FromString(b"".join(message.chunks()))
    first = {entry.key: entry.value for entry in proto.graph.initializer[1].external_data}
    second = {
        entry.key: entry.value
        for entry in proto.graph.node[2].attribute[1].g.initializer[0].external_data
    }
    placed = [first, second]
    assert {entries["location"] for entries in placed} == {"m.onnx.data"} == set(files)
    assert {entries["length"] for entries in placed} == {"4000"}
    offsets = sorted(int(entries["offset"]) for entries in placed)
    assert offsets == [0, 4032]  # 64-byte steps below a page


def test_large_external_tensors_begin_on_a_page(tmp_path: Path) -> None:
    path, data = save_model(
        make_model(1500), tmp_path / "m.onnx", external=ExternalData.SINGLE_FILE
    )
    proto = onnx.load(path, load_external_data=False)
    inner = proto.graph.node[2].attribute[1].g.initializer[0]
    offsets = [
        e.value
        for t in (proto.graph.initializer[1], inner)
        for e in t.external_data
        if e.key == "offset"
    ]
    assert sorted(map(int, offsets)) == [0, 8192]
    assert data.stat().st_size == 8192 + 6000


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for external in (ExternalData.NEVER, ExternalData.SINGLE_FILE, ExternalData.FILE_PER_TENSOR):
        written = []
        for folder in (tmp_path / f"{external.value}-{i}" for i in (1, 2)):
            folder.mkdir()
            save_model(make_model(), folder / "m.onnx", external=external)
            written.append(listing(folder))
        assert written[0] == written[1]


def test_maps_are_written_in_one_order() -> None:
    first, second = make_model(), make_model()
    first.metadata_props.update({"b": "1", "a": "2"})
    second.metadata_props.update({"a": "2", "b": "1"})
    assert model_to_bytes(first) == model_to_bytes(second)


@pytest.mark.parametrize("external", [ExternalData.AUTO, ExternalData.SINGLE_FILE])
def test_a_model_may_be_written_over_itself(tmp_path: Path, external: ExternalData) -> None:
    path = save_model(make_model(400_000), tmp_path / "m.onnx", external=external)[0]
    before = listing(tmp_path)
    model = load_model(path)
    save_model(model, path, external=external)
    assert listing(tmp_path) == before
    np.testing.assert_array_equal(
        model.graph.initializers["w"].const_value.numpy(),  # type: ignore[union-attr]
        load_model(path).graph.initializers["w"].const_value.numpy(),  # type: ignore[union-attr]
    )


def test_large_mapped_tensors_are_copied_whole(tmp_path: Path) -> None:
    """Over several chunks, with and without the kernel's own copy."""
    path = save_model(make_model(CHUNK_BYTES // 2), tmp_path / "m.onnx")[0]
    model = load_model(path)
    assert save_model(model, tmp_path / "copy.onnx")[0].read_bytes() == path.read_bytes()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS])
def test_files_are_copied_without_help_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refusing(*_: object, **__: object) -> int:
        raise OSError(number, "no")

    path = save_model(make_model(1 << 20), tmp_path / "m.onnx")[0]
    monkeypatch.setattr(os, "copy_file_range", refusing)
    assert save_model(load_model(path), tmp_path / "copy.onnx")[0].read_bytes() == path.read_bytes()
    monkeypatch.delattr(os, "copy_file_range")
    assert (
        save_model(load_model(path), tmp_path / "again.onnx")[0].read_bytes() == path.read_bytes()
    )


def test_a_model_cut_short_while_loaded_is_noticed(tmp_path: Path) -> None:
    path = save_model(make_model(1 << 20), tmp_path / "m.onnx")[0]
    model = load_model(path)
    os.truncate(path, 1 << 20)
    with pytest.raises(ModelError, match=r"m.onnx: cut short while in use"):
        save_model(model, tmp_path / "copy.onnx")
    assert list(listing(tmp_path)) == ["m.onnx"]


def test_ranges_are_read_where_pread_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(make_model(), tmp_path / "m.onnx")[0]
    monkeypatch.delattr(os, "pread")
    assert save_model(load_model(path), tmp_path / "copy.onnx")[0].read_bytes() == path.read_bytes()


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        (path,) = save_model(make_model(), tmp_path / "m.onnx")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_at_the_path_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "m.onnx").symlink_to(tmp_path / "target")
    save_model(make_model(), tmp_path / "m.onnx")
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "m.onnx").is_symlink()


# --- failures leave everything as it was


@contextmanager
def refused(folder: Path, says: str) -> Iterator[None]:
    before = listing(folder)
    with pytest.raises(OptionError, match=says):
        yield
    assert listing(folder) == before


def test_a_full_or_limited_disk_leaves_the_old_files(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "m.onnx", external=ExternalData.SINGLE_FILE)
    big = make_model(200_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for external in ExternalData:
            with refused(
                tmp_path,
                r"cannot write .*m.onnx.*: File too large; raise the file size limit \(`ulimit -f`\)",
            ):
                save_model(big, tmp_path / "m.onnx", external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "No space left on device; free space there or write elsewhere"),
        (errno.EROFS, "Read-only file system; write to a file system that is not read-only"),
        (errno.EACCES, "Permission denied; write to a folder in which you may create files"),
        (errno.EIO, "Input/output error; check the folder and write again"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_what_the_system_refuses_is_said_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, says: str
) -> None:
    def refusing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    save_model(make_model(), tmp_path / "m.onnx")
    model = make_model(100)
    with refused(tmp_path, f"cannot write .*m.onnx: {says}"), monkeypatch.context() as patch:
        patch.setattr(os, call, refusing)
        save_model(model, tmp_path / "m.onnx")


def test_paths_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path / "absent" / "m.onnx", "No such file or directory; create the folder first"),
        (tmp_path / "file" / "m.onnx", "Not a directory; give a path whose parent is a folder"),
        (tmp_path, "it is a folder; give the name of a file"),
        (tmp_path / "pipe", "it is a device, pipe or socket; give the name of a file"),
        (tmp_path / ("n" * 300), "File name too long; give a shorter name"),
    ):
        with pytest.raises(OptionError, match=f"cannot write .*{says}"):
            save_model(make_model(), path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_rename_that_fails_puts_the_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, failing: int, existing: bool, links: bool
) -> None:
    if existing:
        save_model(make_model(), tmp_path / "m.onnx", external=ExternalData.FILE_PER_TENSOR)
    original, count = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += self.suffix == ".tmp"
        if self.suffix == ".tmp" and count == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    model = make_model(2000)
    monkeypatch.setattr(Path, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with refused(tmp_path, "cannot write"):
        save_model(model, tmp_path / "m.onnx", external=ExternalData.FILE_PER_TENSOR)


def test_an_interrupt_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupting)
    with pytest.raises(KeyboardInterrupt):
        save_model(make_model(), tmp_path / "m.onnx", external=ExternalData.SINGLE_FILE)
    assert listing(tmp_path) == {}


def test_a_killed_run_leaves_the_old_file(tmp_path: Path) -> None:
    (path,) = save_model(make_model(), tmp_path / "m.onnx")
    before = path.read_bytes()
    script = (
        "import os, signal, sys; from graphopt.ir import atomic, model_file;"
        "atomic.os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL);"
        "model_file.save_model(model_file.load_model(sys.argv[1]), sys.argv[1])"
    )
    status = subprocess.run([sys.executable, "-c", script, path], check=False).returncode
    assert status == -signal.SIGKILL
    assert path.read_bytes() == before


# --- protobuf's limit


def huge_model(folder: Path, bytes_each: int, count: int) -> ir.Model:
    """Initializers in a file that takes no space on disk."""
    proto = onnx.parser.parse_model(f"{HEAD} g (uint8[1] x) => (uint8[1] y) {{ y = Identity (x) }}")
    with (folder / "in.bin").open("wb") as file:
        os.truncate(file.fileno(), bytes_each * count)
    for index in range(count):
        tensor = proto.graph.initializer.add(name=f"w{index}", data_type=2, dims=[bytes_each])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="in.bin")
        tensor.external_data.add(key="offset", value=str(index * bytes_each))
    (folder / "in.onnx").write_bytes(proto.SerializeToString())
    return load_model(folder / "in.onnx")


def test_models_over_two_gib_go_to_external_data_or_are_refused(tmp_path: Path) -> None:
    model = huge_model(tmp_path, 3 << 29, 2)
    message, files = model_file._laid_out(model, "m.onnx", ExternalData.AUTO)
    assert list(files) == ["m.onnx.data"]
    assert message.size < 1000
    with pytest.raises(
        OptionError, match=r"takes 3.0 GiB in one file.*external data are switched off; allow them"
    ):
        save_model(model, tmp_path / "m.onnx", external=ExternalData.NEVER)
    with pytest.raises(OptionError, match=r"takes 3.0 GiB .*save it to a path instead"):
        model_to_bytes(model)


def test_attributes_and_sparse_parts_follow_only_where_they_must(tmp_path: Path) -> None:
    model = huge_model(tmp_path, 3 << 29, 2)
    first, second = (value.const_value for value in model.graph.initializers.values())
    model.graph.initializers.clear()
    for tensor in (first, second):
        assert isinstance(tensor, MappedTensor)
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
        model.graph.insert_before(model.graph[0], node)
    message, files = model_file._laid_out(model, "m.onnx", ExternalData.SINGLE_FILE)
    assert message.size < 1000
    moved = {id(piece) for piece in files["m.onnx.data"] if not isinstance(piece, bytes)}
    assert moved == {id(first), id(second)}


def test_a_model_too_large_without_its_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "MAX_PROTOBUF_BYTES", 100)
    with pytest.raises(OptionError, match="even without its weights; no ONNX runtime can read it"):
        model_file._laid_out(make_model(), "m.onnx", ExternalData.AUTO)


@pytest.mark.slow
def test_more_than_two_gib_are_read_and_written(tmp_path: Path) -> None:
    model = huge_model(tmp_path, 1 << 30, 3)
    path, data = save_model(model, tmp_path / "out.onnx")
    assert data.stat().st_size == 3 << 30
    last = load_model(path).graph.initializers["w2"].const_value
    assert isinstance(last, MappedTensor)
    assert last.numpy()[-1] == 0
    assert load_model(path).graph.initializers.keys() == {"w0", "w1", "w2"}


def test_nothing_is_left_open(tmp_path: Path) -> None:
    path = save_model(make_model(100_000), tmp_path / "m.onnx")[0]
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        save_model(load_model(path), tmp_path / "copy.onnx")
    gc.collect()  # a graph and its values refer to one another
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_file_set_that_is_discarded_leaves_no_trace(tmp_path: Path) -> None:
    files = atomic.FileSet()
    files.write(tmp_path / "a", [b"text"])
    files.discard()
    files.discard()
    assert listing(tmp_path) == {}


def test_a_file_system_that_copies_nothing_is_helped_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(make_model(1 << 20), tmp_path / "m.onnx")[0]
    monkeypatch.setattr(os, "copy_file_range", lambda *_, **__: 0)
    assert save_model(load_model(path), tmp_path / "copy.onnx")[0].read_bytes() == path.read_bytes()
