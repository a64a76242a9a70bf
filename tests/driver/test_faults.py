"""Some of the benchmark's planted faults, in the smallest real model: caught and rightly named."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fault_kinds import KINDS
from benchmarks.faults import plant
from benchmarks.planting import Kind
from tests.cli.conftest import save

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
WANTED = (
    "conv-kernel-flipped",
    "conv-bias-dropped",
    "gemm-alpha",
    "relu-to-leaky",
    "max-to-average-pool",
    "nan-at-large",
    "clipped-at-large",
    "off-by-0.1-percent",
)


@pytest.mark.parametrize("mode", ["final", "each"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in WANTED], ids=lambda k: k.name)
def test_a_planted_fault_is_caught(kind: Kind, mode: str) -> None:
    # Where has been there since opset 9 only.
    name = "detector" if "-at-large" in kind.name else "mnist_cntk"
    verdict, detail = plant(kind, GOLDEN / name / "model.onnx", mode)
    assert verdict == "caught", detail


BRANCHES = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N, 4] x, bool c) => (float[N, 4] y) {
  a = Relu(x)
  b = If (c) <
    then_branch = t () => (float[N, 4] p) { p0 = Sin(a) p1 = Exp(p0) p = Sin(p1) },
    else_branch = e () => (float[N, 4] q) { q0 = Cos(a) q1 = Exp(q0) q = Cos(q1) }>
  y = Sigmoid(b)
}"""


@pytest.mark.parametrize("name", ["only-in-then", "only-in-else"])
@pytest.mark.parametrize("mode", ["final", "each"])
def test_a_fault_in_one_branch_is_caught(tmp_path: Path, name: str, mode: str) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == name)
    verdict, detail = plant(kind, save(tmp_path / "m.onnx", BRANCHES), mode)
    assert verdict == "caught", detail


def test_a_fault_that_no_model_survives_says_nothing(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 7]> g (float[2, 4] x) => (float[2, 4] y) { a = Relu(x) y = Sin(a) }"""
    (kind,) = (kind for kind in KINDS if kind.name == "nan-at-large")
    assert plant(kind, save(tmp_path / "m.onnx", text), "final")[0] == "refused"
