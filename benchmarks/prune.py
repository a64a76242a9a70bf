"""Accuracy, size and latency of a classifier against `--sparsity`.

    python -m benchmarks.prune MODEL.onnx --samples SAMPLES.npz --test TEST.npz [--labels y] [AMOUNT …]

SAMPLES.npz holds unlabelled inputs by name, their leading axis the samples; TEST.npz inputs that are not among them and
the labels.  One row an amount: accuracy of the written file in ONNX Runtime, zeros among the weights, bytes of the file
and of the file deflated, CPU seconds of the run (verification off), latency of one sample (least CPU time of 50 runs,
one thread).  `blind:AMOUNT` prunes without samples.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("amounts", nargs="*", default=AMOUNTS)
    given = parser.parse_args(argv)
    inputs = dict(np.load(given.test))
    labels = inputs.pop(given.labels)
    header = ("sparsity", "accuracy", "zeros", "bytes", "deflated", "CPU s", "ms")
    sys.stdout.write("{:20}{:>10}{:>8}{:>10}{:>10}{:>8}{:>8}\n".format(*header))
    with tempfile.TemporaryDirectory() as folder:
        for amount in ("", *given.amounts):
            row = measure(
                given.model, given.samples, inputs, labels, amount, Path(folder) / "m.onnx"
            )
            sys.stdout.write(
                "{:20}{:10.2%}{:8.1%}{:10}{:10}{:8.1f}{:8.3f}\n".format(amount or "(none)", *row)
            )
            sys.stdout.flush()
    return 0


def measure(
    model: Path,
    samples: Path,
    inputs: Mapping[str, Any],
    labels: Labels,
    amount: str,
    out: Path,
) -> tuple[float, float, int, int, float, float]:
    """One row of the table."""
    started = time.process_time()
    graphopt.optimize(
        model,
        output=out,
        sparsity=amount.removeprefix("blind:") or None,
        calibration=None if amount.startswith("blind:") else samples,
        verify="off",
    )
    spent = time.process_time() - started
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
