"""What quantising costs beside a plain run of the same samples: CPU seconds and peak memory, each in its own process.

    python -m benchmarks.calibration resnet50 mobilenetv2 BERT.onnx [--samples 64] [--tokens 128]

`plain`: the optimised model on the samples, one thread.  `statistics`: the same with all that any calibration method
asks for.  `fixed`: what statistics take for one sample, less one plain run.  `weights`: per-channel weights of all
products.  `dynamic`, `int4`: writing those models, load to save, without verification.  Imports are in every peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.placement import candidates
from graphopt_passes.quantize.styles import style_named
from graphopt_passes.quantize.trials import axes_of
from graphopt_passes.quantize.weight_only import products_of
from graphopt_passes.quantize.weights import pack
from graphopt_passes.quantize.writers import Blocks, write_blocks, write_dynamic

import graphopt
from benchmarks.vision import MODELS, images
from graphopt.calibrate.collect import collect
from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model, save_model
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.verify.feed_files import Feed

LEAST = 1 << 14


def feeds(model: Path, count: int, tokens: int) -> Iterator[Feed]:
    """Pictures, or sentences."""
    names = [spec.name for spec in Session(model).inputs]
    rng = np.random.default_rng(0)
    for index in range(count):
        if len(names) == 1:
            yield Feed(str(index), {names[0]: images(1)})
            continue
        ids = rng.integers(0, 30000, size=(1, tokens))
        yield Feed(str(index), {n: ids if "ids" in n else np.ones_like(ids) for n in names})


def plain(model: Path, samples: list[Feed]) -> float:
    """The optimised model alone."""
    started = time.process_time()
    session = Session(model, level=OptimizationLevel.ALL, options=SessionOptions(threads=1))
    for feed in samples:
        session.run(feed.values)
    return time.process_time() - started


def statistics(model: Path, samples: list[Feed]) -> float:
    """The same with all statistics."""
    started = time.process_time()
    graph = load_model(model).graph
    names = candidates(graph, style_named("x86-vnni"), lambda _node: True)
    with on_disk(load_model(model)) as path:
        collect(path, names, samples, axes=axes_of(graph))
    return time.process_time() - started


def weights(model: Path, _samples: list[Feed]) -> float:
    """Nanoseconds a parameter of per-channel int8."""
    loaded, spent, count = load_model(model), 0.0, 0
    for node in loaded.graph:
        array = values.array(node.inputs[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if array is None or array.ndim < 2:
            continue
        conv = node.op_type == "Conv" or (node.op_type == "Gemm" and "transB" in node.attributes)
        rows = array.reshape(len(array), -1) if conv else array.T
        rows = np.array(rows, order="K")  # read from the file before, not while it is timed
        started = time.process_time()
        pack(rows, top_code=None)
        spent += time.process_time() - started
        count += rows.size
    return spent / count * 1e9


def _written(model: Path, *, dynamic: bool) -> float:
    started = time.process_time()
    loaded = load_model(model)
    names, sites = Names.of(loaded), products_of(loaded.graph, LEAST)
    if dynamic:
        write_dynamic(loaded, sites, names)
    else:
        write_blocks(loaded, sites, names, Blocks(32))
    with tempfile.TemporaryDirectory() as folder:
        save_model(loaded, Path(folder) / "out.onnx")
    return time.process_time() - started


def dynamic(model: Path, _samples: list[Feed]) -> float:
    """Load, 8-bit products with activations as they come, save."""
    return _written(model, dynamic=True)


def int4(model: Path, _samples: list[Feed]) -> float:
    """Load, 4-bit blocks of 32, save."""
    return _written(model, dynamic=False)


KINDS: dict[str, Callable[[Path, list[Feed]], float]] = {
    each.__name__: each for each in (plain, statistics, weights, dynamic, int4)
}


def peak_mb() -> float:
    """Greatest resident memory of this process since it was started; getrusage would count its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return (
        float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        / 1e3
    )


def child(kind: str, model: Path, count: int, tokens: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.calibration", str(model)]
    command += ["--child", kind, "--samples", str(count), "--tokens", str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(name: str, model: Path, count: int, tokens: int) -> None:
    """One line a measurement."""
    base = child("plain", model, count, tokens)
    few = max(count // 4, 1)
    calm = child("statistics", model, few, tokens)
    full = child("statistics", model, count, tokens)
    one = child("statistics", model, 1, tokens)["cpu"] - child("plain", model, 1, tokens)["cpu"]
    size = model.stat().st_size / 1e6
    rows: list[tuple[str, str, str]] = [
        (f"plain, {count} samples", f"{base['cpu']:.2f}", f"{base['peak']:.0f}"),
        (
            f"statistics, {count}",
            f"{full['cpu']:.2f} ({full['cpu'] / base['cpu']:.2f}x)",
            f"{full['peak']:.0f} ({full['peak'] / base['peak']:.2f}x)",
        ),
        (f"statistics, {few}", f"{calm['cpu']:.2f}", f"{calm['peak']:.0f}"),
        ("fixed", f"{one:.2f}", ""),
        ("weights, ns a parameter", f"{child('weights', model, 1, tokens)['cpu']:.1f}", ""),
    ]
    for kind in ("dynamic", "int4"):
        found = child(kind, model, 1, tokens)
        rows.append(
            (
                kind,
                f"{found['cpu']:.2f}",
                f"{found['peak']:.0f} ({found['peak'] / size:.2f}x the file)",
            )
        )
    for what, cpu, peak in rows:
        print(f"| {name} | {what} | {cpu} | {peak} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--child", choices=KINDS)
    given: Any = parser.parse_intermixed_args()
    if given.child:
        model = Path(given.models[0])
        reads = given.child in ("plain", "statistics")
        samples = list(feeds(model, given.samples, given.tokens)) if reads else []
        cpu = KINDS[given.child](model, samples)
        peak = peak_mb()
        print(json.dumps({"cpu": cpu, "peak": peak}))
        return
    print("| model | what | CPU s | peak MB |\n|---|---|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            raw = Path(name)
            if name in MODELS:
                raw = Path(folder) / f"{name}.raw.onnx"
                raw.write_bytes(MODELS[name]().SerializeToString())
            model = Path(folder) / f"{raw.stem}.onnx"
            graphopt.optimize(raw, output=model, verify="off")
            report(raw.stem, model, given.samples, given.tokens)


if __name__ == "__main__":
    main()
