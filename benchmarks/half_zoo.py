"""Half precision on whole models: what is half, what is not and why, and how far the result is from the original.

    python -m benchmarks.half_zoo [--precision fp16|bf16|fp16-weights] [--target NAME] MODEL.onnx…

Each model runs through `graphopt.optimize` at default settings; the error is that of the emulation in true half
precision that the run itself makes.  The last columns are the reasons of nodes in float32, most frequent first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from graphopt.driver import optimize
from graphopt.driver.result import Result
from graphopt.errors import GraphoptError
from graphopt.ir.scopes import all_graphs

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
REASONS = 3


def main() -> int:
    """Prints a row a model; returns 1 where one is not within its budget."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--target", default="cuda")
    options = parser.parse_args()
    print("| model | verified | half | float32 | casts | max/RMS | SQNR dB | CPU s | why float32 |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: | --- |")
    failed = 0
    for path in options.models:
        started = time.process_time()
        try:
            made = optimize(path, target=options.target, precision=options.precision)
        except GraphoptError as error:
            print(f"| {path.stem} | {type(error).__name__}: {str(error)[:120]} |", flush=True)
            failed += 1
            continue
        failed += made.report.verification.passed is False
        print(_row(path, made, time.process_time() - started), flush=True)
    return 1 if failed else 0


def _row(path: Path, made: Result, seconds: float) -> str:
    counts: Counter[str] = Counter()
    for scope in all_graphs(made.model):
        for node in scope.graph:
            counts[_kind(node)] += 1
    outputs = made.report.verification.outputs
    worst = max((each.max_over_rms or 0.0 for each in outputs), default=0.0)
    noise = [each.sqnr_db for each in outputs if each.sqnr_db is not None]
    name = path.parent.name if path.stem == "model" else path.stem
    cells = [
        name,
        {True: "yes", False: "NO", None: "not run"}[made.report.verification.passed],
        str(counts["half"]),
        str(counts["float32"]),
        str(counts["cast"]),
        f"{worst:.2g}",
        f"{min(noise):.0f}" if noise else "equal",
        f"{seconds:.0f}",
        _reasons(made),
    ]
    return f"| {' | '.join(cells)} |"


def _kind(node: ir.Node) -> str:
    if node.op_type == "Cast":
        return "cast"
    if any(value.dtype in HALVES for value in node.outputs):
        return "half"
    return "float32" if any(v.dtype is ir.DataType.FLOAT for v in node.outputs) else "other"


def _reasons(made: Result) -> str:
    """The rules that kept nodes in float32, and how often."""
    rules = Counter(
        each.reason.split(": ")[1].split(":")[0]
        for each in made.report.remarks
        if each.rule == "float32" and ": " in each.reason
    )
    return ", ".join(f"{rule[:40]} {count}" for rule, count in rules.most_common(REASONS))


if __name__ == "__main__":
    sys.exit(main())
