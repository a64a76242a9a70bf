"""Side by side with the simplifiers people use: nodes, CPU time, peak memory, validity, equality.

    python benchmarks/simplify.py [--tools graphopt,onnxsim,…] [--repeat N] MODEL.onnx [MODEL.onnx …]

Each tool runs in a fresh process and does what its users do: read the file, simplify, write the file (no comparison of
outputs: `graphopt` runs with verification off here; its cost is a column of its own).  Peers live in their own
environment (`--peer-python`); CPU time is user + system of the whole process, imports included, the least of N runs.
Equality is judged here, by ONNX Runtime with optimisations off on generated inputs, original against result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import all_graphs

RUNNERS = {
    "graphopt": "import sys, graphopt; graphopt.optimize(sys.argv[1], output=sys.argv[2], verify='off')",
    "graphopt+verify": "import sys, graphopt; graphopt.optimize(sys.argv[1], output=sys.argv[2])",
    "onnxsim": "import sys, onnx, onnxsim; m, ok = onnxsim.simplify(onnx.load(sys.argv[1])); onnx.save(m, sys.argv[2])",
    "onnxslim": "import sys, onnx, onnxslim; onnx.save(onnxslim.slim(onnx.load(sys.argv[1])), sys.argv[2])",
    "onnxoptimizer": "import sys, onnx, onnxoptimizer; "
    "onnx.save(onnxoptimizer.optimize(onnx.load(sys.argv[1])), sys.argv[2])",
    "onnxscript": "import sys, onnx_ir as ir, onnxscript.optimizer; m = ir.load(sys.argv[1]); "
    "onnxscript.optimizer.optimize(m); ir.save(m, sys.argv[2])",
}
OURS = ("graphopt", "graphopt+verify")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one tool did to one model."""

    model: str
    tool: str
    nodes: int | None
    cpu_seconds: float
    peak_mb: float
    megabytes: float
    verdict: str


def nodes_of(path: Path) -> int:
    """Nodes of a model, subgraphs and functions included; the weights are not read.

    A process inherits the peak of the one that starts it, so this one must stay small.
    """
    return sum(len(scope.graph) for scope in all_graphs(load_model(path)))


def run_once(python: str, code: str, model: Path, out: Path) -> tuple[float, float, str]:
    """CPU seconds, peak resident megabytes and the error's last line ("" if none) of one process."""
    process = subprocess.Popen(
        [python, "-c", code, str(model), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    errors = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    failure = (lines[-1] if lines else f"exit {process.returncode}") if process.returncode else ""
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, failure


def measure(python: str, tool: str, model: Path, repeat: int, folder: Path) -> Row:
    """The least CPU time and peak memory of `repeat` runs, and what became of the model."""
    out = folder / f"{model.stem}.{tool}.onnx"
    runs = []
    for _ in range(repeat):
        runs.append(run_once(python, RUNNERS[tool], model, out))
        if runs[-1][2]:
            break
    cpu, peak, failure = min(r[0] for r in runs), min(r[1] for r in runs), runs[-1][2]
    if failure:
        return Row(model.stem, tool, None, cpu, peak, 0.0, f"failed: {failure[:80]}")
    size = sum(p.stat().st_size for p in folder.glob(f"{out.name}*")) / 1e6
    nodes = nodes_of(out)
    row = Row(model.stem, tool, nodes, cpu, peak, size, judge(model, out))
    for file in folder.glob(f"{out.name}*"):
        file.unlink()
    return row


CHECK = "import sys, onnx.checker; onnx.checker.check_model(sys.argv[1])"


def judge(model: Path, out: Path) -> str:
    """`equal`, or what is wrong with the result."""
    checked = subprocess.run(
        [sys.executable, "-c", CHECK, str(out)], capture_output=True, text=True, check=False
    )
    if checked.returncode:
        return f"invalid: {(checked.stderr.strip().splitlines() or ['?'])[-1][:80]}"
    compared = subprocess.run(
        [sys.executable, "-m", "graphopt", "verify", str(model), str(out), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if compared.returncode == 0:
        return "equal"
    try:
        found = json.loads(compared.stdout)
    except json.JSONDecodeError:
        return f"unjudged: exit {compared.returncode}"
    return f"different: {str(found.get('reason') or found.get('error'))[:90]}"


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tools", default=",".join(RUNNERS))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    print("| model | tool | nodes | CPU s | peak MB | size MB | result |")
    print("|---|---|--:|--:|--:|--:|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            original = nodes_of(model)
            megabytes = model.stat().st_size / 1e6
            print(f"| {model.stem} | original | {original} | | | {megabytes:.1f} | |", flush=True)
            for tool in args.tools.split(","):
                python = sys.executable if tool in OURS else args.peer_python
                row = measure(python, tool, model, args.repeat, Path(scratch))
                nodes = "" if row.nodes is None else row.nodes
                print(
                    f"| {row.model} | {row.tool} | {nodes} | {row.cpu_seconds:.2f} | {row.peak_mb:.0f} "
                    f"| {row.megabytes:.1f} | {row.verdict} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
