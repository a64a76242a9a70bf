"""The programs in a bundle: what they ask of TensorRT and trtexec, and of ONNX Runtime's bindings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files as packaged
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, save

SYMBOLIC = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 4] x, int64[2] shape) => (float[A, B] y) { z = Relu(x)  y = Reshape(z, shape) }"""
PLAIN = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }"""
BYTES = """<ir_version: 9, opset_import: ["" : 18]>
g (uint8[1, 4] x) => (uint8[1, 4] y) <float s = {0.7}, uint8 z = {3}>
{ f = DequantizeLinear(x, s, z)  t = Tanh(f)  y = QuantizeLinear(t, s, z) }"""

# What the program asks of the package, written down: the package itself needs a GPU.
FAKE_TENSORRT = """
import json, pathlib
class Record(list):
    pass
CALLS = []
class Logger:
    WARNING = 2
    def __init__(self, level): CALLS.append(["Logger", level])
class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1
class MemoryPoolType:
    WORKSPACE = "workspace"
class BuilderFlag:
    SPARSE_WEIGHTS = "sparse"
class Profile:
    def set_shape(self, *held): CALLS.append(["set_shape", *held])
    def set_shape_input(self, *held): CALLS.append(["set_shape_input", *held])
class Config:
    def set_memory_pool_limit(self, *held): CALLS.append(["limit", *held])
    def set_flag(self, flag): CALLS.append(["flag", flag])
    def add_optimization_profile(self, profile): CALLS.append(["profile"])
class Builder:
    def __init__(self, logger): pass
    def create_network(self, flags): CALLS.append(["network", flags]); return "network"
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        pathlib.Path("calls.json").write_text(json.dumps(CALLS))
        return b"plan"
class OnnxParser:
    num_errors = 1
    def __init__(self, network, logger): pass
    def parse_from_file(self, path): return pathlib.Path(path).is_file()
    def get_error(self, index): return "no such file"
"""


def built(folder: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    elsewhere.mkdir()
    (elsewhere / "tensorrt.py").write_text(FAKE_TENSORRT)
    return subprocess.run(
        [sys.executable, folder / "build_engine.py"],
        cwd=elsewhere,
        env={"PYTHONPATH": str(elsewhere)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("target", "flags"), [("tensorrt", 0), ("tensorrt-10", 2)])
def test_the_engine_is_built_for_the_profiles(
    run: Run, tmp_path: Path, target: str, flags: int
) -> None:
    path, folder = save(tmp_path / "m.onnx", SYMBOLIC), tmp_path / "deploy"
    ranges = (
        "--profile",
        "batch=1,8,32",
        "--profile",
        "shape:0=2,4,8",
        "--profile",
        "shape:1=4,8,16",
    )
    assert run("optimize", path, "-o", folder, "-t", target, *ranges, "-q").status == 0
    done = built(folder, tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert (folder / "model.plan").read_bytes() == b"plan"
    calls = json.loads((tmp_path / "elsewhere" / "calls.json").read_text())
    assert ["network", flags] in calls
    assert ["set_shape", "x", [1, 4], [8, 4], [32, 4]] in calls
    assert ["set_shape_input", "shape", [2, 4], [4, 8], [8, 16]] in calls
    assert ["limit", "workspace", 4096 << 20] in calls
    assert ["profile"] in calls


def test_what_the_parser_says_ends_the_program(run: Run, tmp_path: Path) -> None:
    path, folder = save(tmp_path / "m.onnx", PLAIN), tmp_path / "deploy"
    run("optimize", path, "-o", folder, "-t", "tensorrt", "-q")
    (folder / "model.onnx").unlink()
    done = built(folder, tmp_path / "elsewhere")
    assert done.returncode == 1
    assert "no such file" in done.stderr


@pytest.mark.parametrize(("target", "version"), [("tensorrt", "11.1"), ("tensorrt-10", "10.0")])
def test_every_flag_of_trtexec_is_one_of_its_version(
    run: Run, tmp_path: Path, target: str, version: str
) -> None:
    path, folder = save(tmp_path / "m.onnx", PLAIN), tmp_path / "deploy"
    options = ("--profile", "batch=1,8,32", "--sparsity", "2:4", "--force")
    run("optimize", path, "-o", folder, "-t", target, *options, "-q")
    script = "\n".join(
        line for line in (folder / "build.sh").read_text().splitlines() if not line.startswith("#")
    )
    table: dict[str, Any] = json.loads(
        (packaged("graphopt.targets") / "tables" / "trtexec.json").read_bytes()
    )
    flags = set(re.findall(r"--([A-Za-z0-9]+)", script))
    assert {"onnx", "saveEngine", "minShapes"} <= flags
    assert all(version in table["flags"][flag] for flag in flags)


def test_the_golden_comparison_states_a_loss(run: Run, tmp_path: Path) -> None:
    """trtexec's loss is 1 - cosine: what exceeds the threshold fails."""
    path, folder = save(tmp_path / "m.onnx", PLAIN), tmp_path / "deploy"
    run("optimize", path, "-o", folder, "-t", "tensorrt", "-q")
    found = re.search(r"--accuracyThreshold=(\S+)", (folder / "build.sh").read_text())
    assert found is not None
    assert 0 < float(found.group(1)) <= 0.01


def test_the_binding_example_runs(run: Run, tmp_path: Path) -> None:
    """On the CPU's memory and provider, with the rest as it is."""
    path, folder = save(tmp_path / "m.onnx", PLAIN), tmp_path / "deploy"
    run("optimize", path, "-o", folder, "-t", "cuda", "-q")
    text = (folder / "io_binding.py").read_text()
    assert '"cuda"' in text
    (folder / "io_binding.py").write_text(text.replace('"cuda"', '"cpu"'))
    (folder / "provider_options.json").write_text('[["CPUExecutionProvider", {}]]')
    done = subprocess.run(
        [sys.executable, folder / "io_binding.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tensor(float)" in done.stdout


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_bytes_may_move_as_far_as_the_originals_do(run: Run, tmp_path: Path, target: str) -> None:
    path, folder = save(tmp_path / "m.onnx", BYTES), tmp_path / "deploy"
    assert run("optimize", path, "-o", folder, "-t", target, "-q").status == 0
    (golden,) = json.loads((folder / "manifest.json").read_text())["golden"]["outputs"]
    assert golden["max_over_rms"] is not None
    done = subprocess.run(
        [sys.executable, folder / "run.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
