"""Each fused pattern in the spellings of exporters, as ONNX Runtime runs it: raw, and optimised before.

    python -m benchmarks.micro [--seconds 1.0] [--only NAME] [--json FILE]

Both models are loaded with all optimisations, on one thread; what counts is CPU time, in interleaved runs: a gain is
over what the runtime finds by itself.  Patterns stand between graph input and output: each row is about one operator.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

import graphopt
from benchmarks.micro_patterns import Case, cases
from benchmarks.micro_vision import vision
from graphopt.ir.model_file import model_to_bytes
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case gained.

    Attributes:
        name: of the case.
        gain: CPU time of the raw model over that of the optimised one.
        before_us: CPU time of the raw model.
        after_us: CPU time of the optimised one.
        nodes: how many nodes there were and are.
        worst: largest difference of outputs.
    """

    name: str
    gain: float
    before_us: float
    after_us: float
    nodes: tuple[int, int]
    worst: float


def run(case: Case, seconds: float, target: str) -> Row:
    """Times one case."""
    raw = case.model()
    made = graphopt.optimize(raw, target=target, verify="off")
    sessions = [
        Session(data, level=OptimizationLevel.ALL)
        for data in (raw.SerializeToString(), model_to_bytes(made.model))
    ]
    rng = np.random.default_rng(1)
    feeds = {
        spec.name: _feed(rng, [_size(d, case) for d in spec.shape or ()], str(spec.dtype))
        for spec in sessions[0].inputs
    }
    outputs = [session.run(feeds)["y"] for session in sessions]
    before, after = measure(
        sessions, [feeds, feeds], seconds=seconds, min_rounds=30, max_rounds=5000
    )
    return Row(
        case.name,
        after.cpu_ratio,
        before.cpu_ms * 1e3,
        after.cpu_ms * 1e3,
        (len(raw.graph.node), sum(1 for _ in made.model.graph)),
        float(np.max(np.abs(outputs[0] - outputs[1]))),
    )


def _size(dim: object, case: Case) -> int:
    return case.dims[str(dim)] if str(dim) in case.dims else int(str(dim))


def _feed(rng: np.random.Generator, dims: list[int], dtype: str) -> np.ndarray:
    if "BOOL" in dtype.upper():
        return rng.random(dims) < 0.8
    return rng.standard_normal(dims).astype(np.float32)


def main() -> int:
    """Prints a table; exits with 1 where a row is clearly below 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    sys.stdout.write(
        "| pattern | nodes | before µs | after µs | gain | max |d| |\n|---|---|---|---|---|---|\n"
    )
    for case in (*cases(), *vision()):
        if options.only.lower() not in case.name.lower():
            continue
        row = run(case, options.seconds, options.target)
        rows.append(row)
        sys.stdout.write(
            f"| {row.name} | {row.nodes[0]} → {row.nodes[1]} | {row.before_us:.0f} | {row.after_us:.0f} |"
            f" {row.gain:.2f} | {row.worst:.1e} |\n"
        )
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 1 if any(row.gain < 0.95 for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
