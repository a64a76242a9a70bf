"""Accuracy, size and latency of a classifier against `--sparsity`.

    python -m benchmarks.prune MODEL.onnx --samples SAMPLES.npz --test TEST.npz [--labels y] [AMOUNT …]

SAMPLES.npz holds unlabelled inputs by name, their leading axis the samples; TEST.npz inputs that are not among them and
the labels.  One row an amount: accuracy of the written file in ONNX Runtime, zeros among the weights, bytes of the file
and of the file deflated, CPU seconds of the run (verification off), latency of one sample (least CPU time of 50 runs,
one thread).  `blind:AMOUNT` prunes without samples.  With `--peer PYTHON`, which has onnxsim, a second row
shows what onnxsim makes of the same amount (see `benchmarks/prune_peer.py`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

import graphopt
from graphopt.ir.model_file import load_model
from graphopt.report.facts import stored_tensors

Labels: TypeAlias = "npt.NDArray[np.integer[Any]]"

AMOUNTS = (
    "0.5",
    "0.8",
    "0.9",
    "0.95",
    "blind:0.8",
    "2:4",
    "channels:0.3",
    "channels:0.5",
    "channels:0.7",
)
BATCH = 256
RUNS = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--labels", default="y")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("amounts", nargs="*", default=AMOUNTS)
    given = parser.parse_args(argv)
    inputs = dict(np.load(given.test))
    labels = inputs.pop(given.labels)
    header = ("sparsity", "accuracy", "zeros", "bytes", "deflated", "CPU s", "ms")
    sys.stdout.write("{:20}{:>10}{:>8}{:>10}{:>10}{:>8}{:>8}\n".format(*header))
    with tempfile.TemporaryDirectory() as folder:
        for amount in ("", *given.amounts):
            out = Path(folder) / "m.onnx"
            spent = ours(given.model, given.samples, out, amount)
            show(amount or "(none)", facts(out, inputs, labels, spent))
            if given.peer and amount and not amount.startswith("blind:"):
                theirs(given.peer, given.model, given.samples, out, amount)
            if given.peer and amount and out.exists() and not amount.startswith("blind:"):
                show("  onnxsim", facts(out, inputs, labels, 0.0))
    return 0


def show(name: str, row: tuple[float, float, int, int, float, float]) -> None:
    """Prints one row."""
    sys.stdout.write("{:20}{:10.2%}{:8.1%}{:10}{:10}{:8.1f}{:8.3f}\n".format(name, *row))
    sys.stdout.flush()


def ours(model: Path, samples: Path, out: Path, amount: str) -> float:
    """Prunes; returns the CPU seconds."""
    started = time.process_time()
    graphopt.optimize(
        model,
        output=out,
        sparsity=amount.removeprefix("blind:") or None,
        calibration=None if amount.startswith("blind:") else samples,
        verify="off",
    )
    return time.process_time() - started


def theirs(python: Path, model: Path, samples: Path, out: Path, amount: str) -> None:
    """Prunes with onnxsim; there is no file afterwards where it fails."""
    out.unlink()
    script = Path(__file__).with_name("prune_peer.py")
    done = subprocess.run(
        [python, script, model, samples, out, amount], check=False, capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        sys.stdout.write(f"  onnxsim           failed: {last[0][:100]}\n")


def facts(
    out: Path, inputs: Mapping[str, Any], labels: Labels, spent: float
) -> tuple[float, float, int, int, float, float]:
    """Accuracy, share of zeros, bytes, bytes deflated, seconds and latency of a file."""
    data = out.read_bytes()
    weights = [t.numpy() for _, t in stored_tensors(load_model(out)) if t.dtype.is_floating_point()]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)
    session = _session(data)
    accuracy = _accuracy(session, inputs, labels)
    return accuracy, zeros, len(data), len(zlib.compress(data, 6)), spent, _latency(session, inputs)


def _session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _accuracy(session: ort.InferenceSession, inputs: Mapping[str, Any], labels: Labels) -> float:
    """Share of rows whose greatest element is the label."""
    right = 0
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        scores = session.run(None, {name: array[part] for name, array in inputs.items()})[0]
        right += int((scores.argmax(-1) == labels[part]).sum())
    return right / len(labels)


def _latency(session: ort.InferenceSession, inputs: Mapping[str, Any]) -> float:
    """Milliseconds of CPU for one sample."""
    feed = {name: array[:1] for name, array in inputs.items()}
    times = []
    for _ in range(RUNS):
        started = time.process_time()
        session.run(None, feed)
        times.append(time.process_time() - started)
    return 1e3 * min(times)


if __name__ == "__main__":
    sys.exit(main())
