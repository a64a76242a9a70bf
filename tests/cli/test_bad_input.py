"""Whatever is wrong with what the user gives: one paragraph, the right exit status, existing outputs untouched."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.cli.conftest import Ran, Run, save

OLD = b"the output of another day"

WEIGHTS = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N, 16384] x) => (float[N, 16384] y) { a = Identity(x) y = Add(a, w) }"""


@pytest.fixture
def kept(out: Path) -> Path:
    """An output that exists already."""
    out.write_bytes(OLD)
    return out


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of 64 kB."""
    proto = onnx.parser.parse_model(WEIGHTS)
    data = np.arange(16384, dtype=np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(data, "w"))
    onnx.save(proto, tmp_path / "large.onnx")
    return tmp_path / "large.onnx"


def assert_refused(ran: Ran, kept: Path, *expected: str, status: int = 2) -> None:
    """One paragraph that says what is expected, nothing on stdout, the old output as it was, no litter beside it."""
    assert ran.status == status, ran.err
    assert ran.out == ""
    assert ran.message.startswith("graphopt: error: ")
    assert all(part in ran.message for part in expected), ran.message
    assert "\n\n" not in ran.err.strip()
    assert "Traceback" not in ran.err
    assert kept.read_bytes() == OLD
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def truncated(folder: Path) -> Path:
    source = save(folder / "whole.onnx", WEIGHTS.replace("Add(a, w)", "Relu(a)"))
    path = folder / "bad.onnx"
    path.write_bytes(source.read_bytes()[:-9])
    return path


def garbage(folder: Path) -> Path:
    path = folder / "bad.onnx"
    path.write_bytes(bytes(range(256)) * 8)
    return path


def empty(folder: Path) -> Path:
    path = folder / "bad.onnx"
    path.touch()
    return path


def directory(folder: Path) -> Path:
    path = folder / "bad.onnx"
    path.mkdir()
    return path


def absent(folder: Path) -> Path:
    return folder / "bad.onnx"


def without_data(folder: Path) -> Path:
    proto = onnx.parser.parse_model(WEIGHTS)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(16384, np.float32), "w"))
    path = folder / "bad.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (folder / "weights.bin").unlink()
    return path


def with_data_outside(folder: Path) -> Path:
    path = without_data(folder)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../../etc/passwd"
    path.write_bytes(proto.SerializeToString())
    return path


def with_lying_weights(folder: Path) -> Path:
    proto = onnx.parser.parse_model(WEIGHTS)
    proto.graph.initializer.add(name="w", data_type=1, dims=[16384], raw_data=bytes(12))
    path = folder / "bad.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def with_data_cut_off(folder: Path) -> Path:
    path = without_data(folder)
    (folder / "weights.bin").write_bytes(bytes(100))
    return path


def circle(folder: Path) -> Path:
    return save(
        folder / "bad.onnx", WEIGHTS.replace("Identity(x)", "Add(x, y)").replace(", w)", ", x)")
    )


def endless(folder: Path) -> Path:
    functions = '<domain: "l", opset_import: ["" : 18, "l" : 1]> F (a) => (b) { b = l.F(a) }'
    text = WEIGHTS.replace('"" : 18', '"" : 18, "l" : 1').replace("Add(a, w)", "l.F(a)")
    return save(folder / "bad.onnx", text + functions)


def bad_text(folder: Path) -> Path:
    path = folder / "bad.onnxtxt"
    path.write_text("<ir_version: 9> g (float[1] x => y) {")
    return path


BAD_MODELS = [
    (truncated, "bad.onnx"),
    (garbage, "bad.onnx"),
    (empty, "the file is empty"),
    (directory, "bad.onnx"),
    (absent, "No such file or directory"),
    (without_data, "weights.bin"),
    (with_data_outside, "leads out of the model's folder"),
    (with_lying_weights, "are 65536 bytes, its data are 12"),
    (with_data_cut_off, "are outside the file, which has 100"),
    (circle, "feed one another in a circle"),
    (endless, "functions call one another in a circle: l:F <- l:F"),
    (bad_text, "not valid ONNX text"),
]


@pytest.mark.parametrize(("make", "expected"), BAD_MODELS)
def test_a_bad_model_is_refused_by_optimize(
    run: Run, tmp_path: Path, kept: Path, make: Callable[[Path], Path], expected: str
) -> None:
    assert_refused(run("optimize", make(tmp_path), "-o", kept), kept, expected)


@pytest.mark.parametrize(("make", "expected"), BAD_MODELS)
@pytest.mark.parametrize(
    "command",
    [
        "inspect BAD",
        "diff GOOD BAD",
        "verify GOOD BAD",
        "verify BAD GOOD",
        "bench GOOD BAD",
        "check BAD",
        "check BAD --target tensorrt --fix -o OUT",
        "densify BAD -o OUT",
        "bisect BAD -o FOLDER",
        "golden record BAD FOLDER",
        "optimize BAD -o FOLDER",
    ],
)
def test_a_bad_model_is_refused_by_every_command(
    run: Run, tmp_path: Path, kept: Path, make: Callable[[Path], Path], expected: str, command: str
) -> None:
    bad = make(tmp_path)
    good = save(tmp_path / "good.onnx", WEIGHTS.replace("Add(a, w)", "Relu(a)"))
    paths = {"BAD": bad, "GOOD": good, "OUT": kept, "FOLDER": kept.parent / "folder"}
    ran = run(*(paths.get(word, word) for word in command.split()))
    assert_refused(ran, kept, expected)


def test_a_bad_model_is_told_in_json_too(run: Run, tmp_path: Path, out: Path) -> None:
    ran = run("optimize", garbage(tmp_path), "-o", out, "--json")
    assert ran.json["error"]["kind"] == "model"
    assert ran.json["error"]["exit_status"] == ran.status == 2


def test_an_output_below_a_file_is_refused(run: Run, model: Path, kept: Path) -> None:
    ran = run("optimize", model, "-o", kept / "x.onnx")
    assert_refused(ran, kept, "cannot write", "is not a folder")


def test_an_output_in_a_missing_folder_is_refused(run: Run, model: Path, kept: Path) -> None:
    ran = run("optimize", model, "-o", kept.parent / "none" / "x.onnx")
    assert_refused(ran, kept, "cannot write", "mkdir")


def test_the_kernel_refusing_a_name_is_told(run: Run, model: Path, kept: Path) -> None:
    ran = run("optimize", model, "-o", kept.with_name("x" * 300 + ".onnx"))
    assert_refused(ran, kept, "File name too long")


def limited(model: Path, out: Path, size: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs in a process that may write files of at most `size` bytes: what a full disk looks like."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        [sys.executable, "-m", "graphopt", "optimize", str(model), "-o", str(out), *options],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


@pytest.mark.parametrize("verify", ["final", "off"])
def test_a_full_disk_leaves_the_output_as_it_was(large: Path, kept: Path, verify: str) -> None:
    done = limited(large, kept, 20_000, "--verify", verify)
    ran = Ran(done.returncode, done.stdout, done.stderr)
    assert_refused(ran, kept, "File too large")
    told = "".join(done.stderr.split())
    assert f"cannotwrite{kept}:" in told
    assert ".graphopt-" not in told


def test_an_interrupted_write_leaves_the_output_as_it_was(
    run: Run, large: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    sync = os.fsync

    def interrupted(descriptor: int) -> None:
        sync(descriptor)
        written.append(os.fstat(descriptor).st_size)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    ran = run("optimize", large, "-o", kept)
    assert written
    assert_refused(ran, kept, "interrupted", status=130)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pass", "fold-konstants"], ["fold-konstants", "fold-constants"]),
        (["--pass", "fold-constants{limit=3}"], ["fold-constants", "limit"]),
        (["--pass", "fold-constants{"], ["--pass"]),
        (["--pass", "no.such.module:thing"], ["no.such.module"]),
        (["--disable", "tidi"], ["tidi", "tidy"]),
        (["--disable", "tidy/drop-identiti"], ["drop-identiti", "drop-identity"]),
        (["--target", "tensort"], ["tensort", "tensorrt"]),
        (["--precision", "fp23"], ["fp23", "fp32"]),
        (["--precision", "int8"], ["int8", "--calibration", "int8-dynamic"]),
        (["--verify", "finally"], ["finally", "final"]),
        (["--external", "neber"], ["neber", "never"]),
        (["--fold-limit", "lots"], ["--fold-limit", "lots"]),
        (["--recipe", "nowhere.toml"], ["nowhere.toml"]),
        (["--inputs", "nowhere.npz"], ["nowhere.npz"]),
        (["--seed", "x"], ["--seed"]),
        (["--samples", "3"], ["--samples", "--calibration"]),
        (["--pass", "tidy, fold-constants"], ["2 passes", "one at a time"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_a_bad_option_is_refused(
    run: Run, model: Path, kept: Path, options: list[str], expected: list[str]
) -> None:
    assert_refused(run("optimize", model, "-o", kept, *options), kept, *expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("target = ", ["recipe.toml", "TOML"]),
        ('taget = "cpu"', ["taget", "target"]),
        ('target = "gpu"', ["gpu", "cpu"]),
        ('pipeline = ["tidi"]', ["tidi", "tidy"]),
        ("[options.fold-constants]\nno_such = 3", ["fold-constants", "no_such"]),
    ],
)
def test_a_bad_recipe_is_refused(
    run: Run, model: Path, kept: Path, tmp_path: Path, text: str, expected: list[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    assert_refused(run("optimize", model, "-o", kept, "--recipe", recipe), kept, *expected)


FEEDS = [
    ({"x": np.ones((2, 4), np.float64)}, ["'x'", "float64", "float[N,4]"]),
    ({"x": np.ones((2, 5), np.float32)}, ["'x'", "5", "4"]),
    ({"x": np.ones(4, np.float32)}, ["'x'"]),
    ({"z": np.ones((2, 4), np.float32)}, ["'z'", "'x'"]),
    ({}, ["'x'"]),
]


@pytest.mark.parametrize(("feed", "expected"), FEEDS)
@pytest.mark.parametrize("command", ["optimize", "verify"])
def test_inputs_that_do_not_fit_are_refused(
    run: Run,
    model: Path,
    kept: Path,
    tmp_path: Path,
    feed: dict[str, np.ndarray],
    expected: list[str],
    command: str,
) -> None:
    inputs = tmp_path / "in.npz"
    np.savez(inputs, **feed)  # type: ignore[arg-type]  # an option of savez has another type
    others = ["-o", kept] if command == "optimize" else [model]
    assert_refused(run(command, model, *others, "--inputs", inputs), kept, *expected)


def test_inputs_that_are_no_inputs_are_refused(run: Run, model: Path, kept: Path) -> None:
    assert_refused(run("optimize", model, "-o", kept, "--inputs", model), kept, "model.onnx")


def test_a_target_that_cannot_express_the_model_is_status_3(
    run: Run, tmp_path: Path, kept: Path
) -> None:
    text = """<ir_version: 13, opset_import: ["" : 26]>
    g (float[4] x) => (float[4] y) { y = CumProd(x, a) }""".replace("(x, a)", "(x, axis)")
    text = text.replace("=> (float[4] y) {", "=> (float[4] y) <int64 axis = {0}> {")
    source = save(tmp_path / "new.onnx", text)
    ran = run("optimize", source, "-o", kept, "--target", "tensorrt", "--disable", "fold-constants")
    assert_refused(ran, kept, "tensorrt", "CumProd", status=3)
