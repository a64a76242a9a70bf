"""Half precision on a GPU: latency against float32, and real outputs against what the emulation predicted.

    python -m benchmarks.half_gpu [--provider cuda|tensorrt] [--precision fp16|bf16] [--runs N] MODEL.onnx…

Needs onnxruntime-gpu (for tensorrt, TensorRT's libraries too) and a device.  For each model three things run on
generated inputs: the original on the CPU with optimisations off (the truth), the emulation of the cast model on the CPU
(the prediction), and the cast model on the GPU with all optimisations.  Printed are both distances from the truth over
its RMS, the distance between them, and the median latency of original and cast model on the GPU, with versions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from graphopt.driver import optimize
from graphopt.ir.model_file import load_model, save_model
from graphopt.runtime.emulate import emulate
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.verify.feeds import make_feeds

CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")
PROVIDERS = {"cuda": CUDA, "tensorrt": ("TensorrtExecutionProvider", *CUDA)}
WARM = 10


def main() -> int:
    """Prints a row a model; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    needed, there = PROVIDERS[options.provider][0], ort.get_available_providers()
    if needed not in there:
        told = (
            f"onnxruntime {ort.__version__} has no {needed} here, only {', '.join(there)}: install"
        )
        print(
            f"{told} onnxruntime-gpu on a machine with an NVIDIA GPU and run this there",
            file=sys.stderr,
        )
        return 2
    print(f"onnxruntime {ort.__version__}, {options.provider}, {options.precision}")
    print(
        "| model | predicted max/RMS | on the GPU | between them | float32 ms | half ms | faster |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for path in options.models:
        print(_row(path, options), flush=True)
    return 0


def _row(path: Path, options: argparse.Namespace) -> str:
    providers = PROVIDERS[options.provider]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "half.onnx"
        optimize(path, output=file, target=options.provider, precision=options.precision)
        emulated = save_model(emulate(load_model(file)), Path(scratch) / "emulated.onnx")[0]
        feed = make_feeds(load_model(path))[0].values
        truth = Session(path).run(feed)
        predicted = Session(emulated).run(feed)
        plain, half = _on_gpu(path, providers), _on_gpu(file, providers)
        real = half.run(feed)
        slow, fast = (_latency(each, feed, options.runs) for each in (plain, half))
    cells = [
        path.stem,
        f"{_distance(truth, predicted):.2g}",
        f"{_distance(truth, real):.2g}",
        f"{_distance(predicted, real):.2g}",
        f"{slow:.2f}",
        f"{fast:.2f}",
        f"{slow / fast:.2f}x",
    ]
    return f"| {' | '.join(cells)} |"


def _on_gpu(path: Path, providers: tuple[str, ...]) -> Session:
    return Session(path, level=OptimizationLevel.ALL, options=SessionOptions(providers=providers))


def _latency(session: Session, feed: Mapping[str, Any], runs: int) -> float:
    """Milliseconds of the median run, copies to and from the device included."""
    for _ in range(WARM):
        session.run(feed)
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        session.run(feed)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _distance(reference: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Greatest difference over the RMS of any float output."""
    worst = 0.0
    for name, expected in reference.items():
        if not isinstance(expected, np.ndarray) or expected.dtype.kind != "f":
            continue
        wide, got = expected.astype(np.float64), np.asarray(found[name], np.float64)
        scale = float(np.sqrt(np.mean(wide**2))) or 1.0
        worst = max(worst, float(np.abs(wide - got).max(initial=0.0)) / scale)
    return worst


if __name__ == "__main__":
    sys.exit(main())
