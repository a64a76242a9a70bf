"""Some of the benchmark's planted faults, in the smallest real model: caught and rightly named."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import KINDS, plant

MODEL = Path(__file__).resolve().parents[2] / "golden" / "mnist_cntk" / "model.onnx"
WANTED = (
    "conv-kernel-flipped",
    "conv-bias-dropped",
    "gemm-alpha",
    "relu-to-leaky",
    "max-to-average-pool",
    "nan-at-large",
    "clipped-at-large",
    "flushed-when-tiny",
    "off-by-0.1-percent",
)


@pytest.mark.parametrize("mode", ["final", "each"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in WANTED], ids=lambda k: k.name)
def test_a_planted_fault_is_caught(kind: object, mode: str) -> None:
    assert kind in KINDS
    verdict, detail = plant(KINDS[KINDS.index(kind)], MODEL, mode)
    assert verdict == "caught", detail
