"""`graphopt optimize -o folder/`: what a bundle holds, and that it runs by itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from graphopt import optimize
from graphopt.driver.bundle import placeless
from graphopt.errors import OptionError, TargetError
from tests.cli.conftest import TIDY, Run, save

TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-10", "ort-tensorrt", "openvino", "portable")
SEQUENCES = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N] x) => (seq(float[N]) y, int64 n) { y = SequenceConstruct(x, x)  n = SequenceLength(y) }"""
SYMBOLIC = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }"""


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return body


def run_snippet(folder: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, folder / "run.py"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_runs_from_anywhere(run: Run, model: Path, tmp_path: Path, target: str) -> None:
    folder = tmp_path / "deploy"
    assert run("optimize", model, "-o", folder, "--target", target, "-q").status == 0
    done = run_snippet(folder, tmp_path / "elsewhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "y: max|d|/RMS" in done.stdout
    body = manifest(folder)
    listed = {**body["files"], "manifest.json": files(folder)["manifest.json"]}
    assert listed == files(folder)
    assert body["target"]["name"] == target
    assert body["verification"]["passed"] is True


def test_the_snippet_sees_a_wrong_model(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    run("optimize", model, "-o", folder, "-q")
    save(folder / "model.onnx", TIDY.replace("Relu", "Neg"))
    done = run_snippet(folder, tmp_path / "elsewhere")
    assert done.returncode == 1
    assert "WRONG" in done.stdout


def test_two_runs_give_the_same_bytes(run: Run, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        extras = ("--with", "triton", "--with", "ort")
        run("optimize", model, "-o", tmp_path / name / "deploy", *extras, "-q")
    first, second = files(tmp_path / "a" / "deploy"), files(tmp_path / "b" / "deploy")
    if manifest(tmp_path / "a" / "deploy")["files"]["model.ort"] is None:
        del first["model.ort"], second["model.ort"]  # the system grants no fixed addresses
    assert first == second
    text = (tmp_path / "a" / "deploy" / "manifest.json").read_text()
    report = (tmp_path / "a" / "deploy" / "report.md").read_text()
    assert report.startswith("# model.onnx → model.onnx")
    assert "**Verified**" in report
    assert str(tmp_path) not in text + report
    assert "seconds" not in text + report


def test_messages_name_no_temporary_folder() -> None:
    """ONNX Runtime names the file that it refuses, and the folder of a run is another each time."""
    said = "'/tmp/a/.graphopt-1e68rrjp/model.onnx' fails, as does /x/.graphopt-0/other.onnx"
    assert placeless(said) == "'model.onnx' fails, as does other.onnx"


def test_a_bundle_is_replaced_by_a_bundle(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    run("optimize", model, "-o", folder, "--target", "tensorrt", "-q")
    assert (folder / "build.sh").is_file()
    assert run("optimize", model, "-o", folder, "-q").status == 0
    assert not (folder / "build.sh").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deploy", "model.onnx"]


def test_nothing_else_is_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    ran = run("optimize", model, "-o", folder)
    assert ran.status == 2
    assert "no bundle of graphopt" in ran.message
    (folder / "manifest.json").write_text('{"schema": "another"}')
    assert run("optimize", model, "-o", folder).status == 2
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_file_is_no_folder(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    ran = run("optimize", model, "-o", tmp_path / "notes")
    assert ran.status == 2
    assert "it is a file" in ran.message


def test_an_empty_folder_is_filled(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert run("optimize", model, "-o", folder, "-q").status == 0
    assert (folder / "model.onnx").is_file()


def test_a_failed_run_keeps_the_bundle(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    run("optimize", model, "-o", folder, "-q")
    before = files(folder)
    bad = ("--profile", "depth=1,2,3")
    assert run("optimize", model, "-o", folder, *bad).status == 2
    assert files(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deploy", "model.onnx"]


def test_the_launch_line_has_the_profiles(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", SYMBOLIC)
    for target in ("tensorrt", "tensorrt-10"):
        folder = tmp_path / target
        ranges = ("--profile", "batch=1,8,32")
        run("optimize", path, "-o", folder, "--target", target, *ranges, "-q")
        script = (folder / "build.sh").read_text()
        assert "--minShapes=x:1x4" in script
        assert "--optShapes=x:8x4" in script
        assert "--maxShapes=x:32x4" in script
        assert ("--stronglyTyped" in script) == (target == "tensorrt-10")
        assert ("--loadRefOutputs=y:golden/raw/output_0.bin" in script) == (target == "tensorrt")
        assert subprocess.run(["sh", "-n", folder / "build.sh"], check=False).returncode == 0
        assert os.access(folder / "build.sh", os.X_OK)


def test_the_provider_of_onnx_runtime_has_the_profiles(run: Run, tmp_path: Path) -> None:
    path, folder = save(tmp_path / "m.onnx", SYMBOLIC), tmp_path / "deploy"
    run("optimize", path, "-o", folder, "-t", "ort-tensorrt", "--profile", "batch=1,8,32", "-q")
    chain = json.loads((folder / "provider_options.json").read_text())
    assert [name for name, _ in chain] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    assert chain[0][1]["trt_profile_opt_shapes"] == "x:8x4"
    compile((folder / "io_binding.py").read_text(), "io_binding.py", "exec")


def test_triton_and_ort_on_request(run: Run, tmp_path: Path) -> None:
    path, folder = save(tmp_path / "m.onnx", SYMBOLIC), tmp_path / "deploy"
    extras = ("--with", "triton", "--with", "ort", "--profile", "batch=1,2,4")
    assert run("optimize", path, "-o", folder, *extras, "-q").status == 0
    served = folder / "triton" / "model"
    assert "max_batch_size: 4" in (served / "config.pbtxt").read_text()
    assert (served / "1" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert (served / "warmup" / "x").stat().st_size % 16 == 0
    ort.InferenceSession(folder / "model.ort", providers=["CPUExecutionProvider"])
    assert (folder / "required_operators.config").read_text() == "ai.onnx;18;Relu\n"


def test_tensorrt_plans_are_left_to_the_machine_that_serves(run: Run, tmp_path: Path) -> None:
    path, folder = save(tmp_path / "m.onnx", SYMBOLIC), tmp_path / "deploy"
    run("optimize", path, "-o", folder, "-t", "tensorrt", "--with", "triton", "-q")
    assert "build.sh" in (folder / "triton" / "model" / "1" / "README").read_text()


def test_extras_need_a_folder_and_a_known_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give a folder"):
        optimize(model, output=tmp_path / "x.onnx", extras=["triton"])
    with pytest.raises(OptionError, match="no extra 'docker'"):
        optimize(model, output=tmp_path / "deploy", extras=["docker"])


def test_what_triton_cannot_serve_stops_the_run(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", SEQUENCES)
    with pytest.raises(TargetError, match="Triton has no type"):
        optimize(path, output=tmp_path / "deploy", extras=["triton"])
    assert not (tmp_path / "deploy").exists()


def test_sequences_are_golden_too(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    assert run("optimize", save(tmp_path / "m.onnx", SEQUENCES), "-o", folder, "-q").status == 0
    done = run_snippet(folder, tmp_path / "elsewhere")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_model_that_cannot_run_here_has_no_golden_set(run: Run, tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "my.ops" : 1]>
    g (float[N] x) => (float[N] y) { y = my.ops.F(x) }"""
    folder = tmp_path / "deploy"
    run("optimize", save(tmp_path / "m.onnx", text), "-o", folder, "-q")
    body = manifest(folder)
    assert body["golden"] is None
    assert body["legality"]["verdict"] == "refused"
    assert run_snippet(folder, tmp_path / "elsewhere").returncode == 0


def test_weights_beside_the_model_are_in_the_bundle(run: Run, tmp_path: Path) -> None:
    model = save(
        tmp_path / "m.onnx",
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w> { y = MatMul(x, w) }""",
    )
    proto, folder = onnx.load(model), tmp_path / "deploy"
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, model)
    assert run("optimize", model, "-o", folder, "--external", "single", "-q").status == 0
    assert (folder / "model.onnx.data").is_file()
    onnx.checker.check_model(str(folder / "model.onnx"))
    assert run_snippet(folder, tmp_path / "elsewhere").returncode == 0


def test_the_manifest_has_the_recipe(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    run("optimize", model, "-o", folder, "--disable", "tidy/drop-identity", "--seed", "7", "-q")
    recipe = manifest(folder)["recipe"]
    assert recipe["seed"] == 7
    assert recipe["disabled"] == ["tidy/drop-identity"]
    assert recipe["pipeline"]
    assert manifest(folder)["inputs"][0]["shape"] == ["N", 4]


@pytest.mark.parametrize("name", ["mnist_cntk", "face_yunet_s", "bytes_magika_v33"])
def test_bundles_of_trained_models_reproduce_their_golden_outputs(
    run: Run, zoo: Path, tmp_path: Path, name: str
) -> None:
    """The runtime's own rewrites, which the snippet lets happen, move scores of the detector by half a percent."""
    folder = tmp_path / "deploy"
    assert run("optimize", zoo / "models" / f"{name}.onnx", "-o", folder, "-q").status == 0
    done = run_snippet(folder, tmp_path / "elsewhere")
    assert done.returncode == 0, done.stdout
    assert "right" in done.stdout
