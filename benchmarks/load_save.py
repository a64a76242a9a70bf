"""Loading and saving a model: CPU time, wall time and peak memory, beside onnx and onnx_ir.

    python -m benchmarks.load_save [--repeat N] MODEL.onnx …

Each way runs in a fresh process; the times are without imports, the last column is the memory of a process that only
imports.  `copy` is `cp`: what the storage costs alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import Cost, least

WAYS = {
    "graphopt": (
        "from graphopt import load_model, save_model",
        "save_model(load_model(sys.argv[1]), sys.argv[2])",
    ),
    "onnx": ("import onnx", "onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"),
    "onnx_ir": ("import onnx_ir", "onnx_ir.save(onnx_ir.load(sys.argv[1]), sys.argv[2])"),
    "copy": ("import shutil", "shutil.copyfile(sys.argv[1], sys.argv[2])"),
}
TIMED = "mark('imported'); start = time.perf_counter()\n{}\nmark('done'); marks['wall'] = time.perf_counter() - start"


def cost_of(way: str, model: Path, out: Path, repeat: int) -> tuple[Cost, Cost]:
    """What a way costs, and what its imports alone do."""
    imports, code = WAYS[way]
    floor = least(sys.executable, imports, [model, out], repeat=repeat)
    full = f"{imports}\n{TIMED.format(code)}"
    return least(sys.executable, full, [model, out], repeat=repeat), floor


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print("| model | way | CPU s | wall s | peak MB | of it imports |")
    print("|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            for way in WAYS:
                cost, floor = cost_of(way, model, Path(scratch) / "out.onnx", args.repeat)
                if cost.failure:
                    print(f"| {model.stem} | {way} | failed: {cost.failure[:90]} | | | |")
                    continue
                cpu = cost.marks["done"] - cost.marks["imported"]
                print(
                    f"| {model.stem} | {way} | {cpu:.2f} | {cost.marks['wall']:.2f} "
                    f"| {cost.peak_mb:.0f} | {floor.peak_mb:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
