"""Latency in ONNX Runtime of what graphopt makes, against the export as it is and what the simplifiers make of it.

    python -m benchmarks.latency [--peer-python PYTHON] [--tools onnxsim,…] [--dims batch=1,sequence=128]
        [--threads 1,2] [--seconds 20] [--made FOLDER] [--json FILE] MODEL.onnx …

All models are loaded with all optimisations into one process and run in turn, on the same inputs; every other round
runs backwards, and half of the rounds after loading them all again in the other order: where a model's weights come to
lie decides some hundredths.  Idle threads sleep (`session.intra_op.allow_spinning=0`): they would take the processor
from the next model otherwise.  A ratio is taken within a round, and its median over rounds is printed: above 1,
graphopt's model is the faster one.  CPU time is that of the process, all threads.  A result that differs from the
export's, or no longer takes all inputs that ours takes, is named and does not compete.  `best` is the fastest of
export and simplifiers by CPU time.  With `--made`, what the tools made stays in that folder, and what is there already
is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import processes
from benchmarks.simplify import OURS, TOOLS, nodes_of
from graphopt.errors import GraphoptError
from graphopt.ir.model_file import load_model
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.verify.feeds import Feed, find_feeds

RAW = "export"
TOLERANCE = 1e-3
"""Of max|d| / RMS: what computes something else is told from what rounds otherwise."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """One model beside ours.

    Attributes:
        name: `export`, or the tool that made it.
        cpu: graphopt's gain over it in CPU time.
        wall: graphopt's gain over it in wall time.
        fault: why it does not compete, or "".
    """

    name: str
    cpu: float
    wall: float
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model at one number of threads.

    Attributes:
        model: its name.
        threads: inside an operator.
        nodes: of the export and of ours.
        export_ms: median CPU time of the export.
        ours_ms: median CPU time of ours.
        spread: from the first to the third quartile of ours, as a share of the median.
        rounds: how many were timed.
        worst: max|d| / RMS of our outputs against the export's.
        rivals: everything that ours is measured against.
    """

    model: str
    threads: int
    nodes: tuple[int, int]
    export_ms: float
    ours_ms: float
    spread: float
    rounds: int
    worst: float
    rivals: tuple[Rival, ...]

    @property
    def best(self) -> Rival:
        """The fastest that competes."""
        return min((each for each in self.rivals if not each.fault), key=lambda each: each.cpu)


def make(tool: str, python: str, model: Path, folder: Path, timeout: float) -> tuple[Path, str]:
    """Where a tool's result lies, and why there is none."""
    out = folder / f"{model.stem}.{tool}.onnx"
    if out.exists():
        return out, ""
    cost = processes.run(python, TOOLS[tool], [model, out], timeout=timeout)
    if cost.failure or not out.exists():
        return out, cost.failure[:80] or "wrote nothing"
    return out, ""


def feed_of(model: Path, dims: Mapping[str, int]) -> dict[str, Any]:
    """The first generated inputs that the export runs with, in the sizes asked for where it has such dims."""
    loaded = load_model(model)
    named = {
        str(dim) for value in loaded.graph.inputs if value.shape is not None for dim in value.shape
    }
    wanted = {name: size for name, size in dims.items() if name in named}
    session = Session(model)

    def refuses(feed: Feed) -> str | None:
        try:
            session.run(feed.values)
        except GraphoptError as fault:
            return str(fault)
        return None

    for dims_asked in (wanted, {}):  # some run in sizes of their own alone
        for feed in find_feeds(loaded, refuses, dims=dims_asked).feeds:
            return dict(feed.values)
    raise SystemExit(f"{model}: none of the generated inputs runs")


def difference(expected: Mapping[str, Any], seen: Mapping[str, Any]) -> float:
    """max|d| / RMS over all outputs; infinite where they cannot be compared."""
    worst = 0.0
    for name, value in expected.items():
        other = seen.get(name)
        if not isinstance(value, np.ndarray) or not isinstance(other, np.ndarray):
            continue
        if value.shape != other.shape or value.dtype != other.dtype:
            return float("inf")
        if value.dtype.kind != "f" or not value.size:
            continue
        wide = value.astype(np.float64)
        finite = np.isfinite(wide)
        if not finite.any() or not np.array_equal(finite, np.isfinite(other)):
            return float("inf")  # also where there is nothing finite to compare
        gap = np.abs(wide - other.astype(np.float64))[finite]
        rms = float(np.sqrt(np.mean(wide[finite] ** 2))) or 1.0
        worst = max(worst, float(np.max(gap, initial=0.0)) / rms)
    return worst


def race(
    model: Path, made: Mapping[str, Path], feed: Mapping[str, Any], threads: int, seconds: float
) -> Row:
    """Times ours against everything else."""
    paths = {OURS: made[OURS], RAW: model, **made}
    faults: dict[str, str] = {}
    outputs: dict[str, Mapping[str, Any]] = {}
    halves: list[dict[str, list[tuple[float, float]]]] = []
    for order in (list(paths), list(paths)[::-1]):
        sessions = load(
            paths, [name for name in order if name not in faults], feed, threads, faults, outputs
        )
        if OURS in faults:
            raise SystemExit(f"{model.stem}: ours {faults[OURS]}")
        halves.append(rounds_of(sessions, feed, seconds / 2))
        del sessions  # before the others are loaded
    timed = {name: halves[0][name] + halves[1][name] for name in halves[1]}
    worst = {name: difference(outputs[RAW], seen) for name, seen in outputs.items()}
    rivals = [
        Rival(
            name,
            gain(timed, name, 0),
            gain(timed, name, 1),
            unlike(worst[name], inputs_of(paths[OURS]) - inputs_of(paths[name])),
        )
        for name in timed
        if name != OURS
    ]
    rivals += [Rival(name, 0.0, 0.0, why) for name, why in faults.items()]
    return _row(model, made[OURS], threads, timed, worst[OURS], rivals)


def unlike(worst: float, lost: set[str]) -> str:
    """Why a result does not compete, or ""."""
    if lost:
        return f"no longer takes {len(lost)} of the inputs"
    return "" if worst <= TOLERANCE else f"differs by {worst:.1e}"


def inputs_of(path: Path) -> set[str]:
    """Everything that a caller may feed, defaults too."""
    return {str(value.name) for value in load_model(path).graph.inputs}


def load(
    paths: Mapping[str, Path],
    order: Sequence[str],
    feed: Mapping[str, Any],
    threads: int,
    faults: dict[str, str],
    outputs: dict[str, Mapping[str, Any]],
) -> dict[str, Session]:
    """Sessions of all models, each run once; notes the outputs, and which does not run."""
    sessions: dict[str, Session] = {}
    options = SessionOptions(threads=threads, spinning=False)
    for name in order:
        try:
            session = Session(paths[name], level=OptimizationLevel.ALL, options=options)
            outputs[name] = session.run(feed)
            sessions[name] = session
        except GraphoptError as fault:
            faults[name] = f"does not run: {str(fault).splitlines()[0][:60]}"
    return sessions


def rounds_of(
    sessions: Mapping[str, Session], feed: Mapping[str, Any], seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall time in ms of each model in every round; every other round runs backwards."""
    names, found = list(sessions), {name: list[tuple[float, float]]() for name in sessions}
    started, rounds = time.perf_counter(), 0
    while rounds < 6 or time.perf_counter() - started < seconds:
        for name in names if rounds % 2 == 0 else reversed(names):
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            sessions[name].run(feed)
            spent = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
            found[name].append((spent[0] / 1e6, spent[1] / 1e6))
        rounds += 1
    return found


def gain(timed: Mapping[str, Sequence[tuple[float, float]]], name: str, clock: int) -> float:
    """The median over rounds of a model's time over ours; clock 0 is CPU time, 1 wall time."""
    pairs = zip(timed[name], timed[OURS], strict=True)
    return statistics.median(theirs[clock] / own[clock] for theirs, own in pairs)


def _row(
    model: Path,
    ours: Path,
    threads: int,
    timed: Mapping[str, Sequence[tuple[float, float]]],
    worst: float,
    rivals: Sequence[Rival],
) -> Row:
    cpu = {name: [each[0] for each in timed[name]] for name in (OURS, RAW)}
    own = statistics.median(cpu[OURS])
    first, _, third = statistics.quantiles(cpu[OURS], n=4, method="inclusive")
    return Row(
        model.stem,
        threads,
        (nodes_of(model), nodes_of(ours)),
        statistics.median(cpu[RAW]),
        own,
        (third - first) / own,
        len(cpu[OURS]),
        worst,
        tuple(rivals),
    )


def table(rows: Sequence[Row], tools: Sequence[str]) -> Iterator[str]:
    """Markdown: a row for each model and number of threads; gains in CPU time, wall time in brackets."""
    names = [RAW, *tools]
    yield (
        f"| model | threads | nodes | CPU ms | ± | {' | '.join(f'over {n}' for n in names)} | over the best "
        "| max\\|d\\|/RMS |"
    )
    yield "|---|--:|--:|--:|--:|" + "--:|" * len(names) + "--:|--:|"
    for row in rows:
        by_name = {each.name: each for each in row.rivals}
        cells = " | ".join(_cell(by_name.get(name)) for name in names)
        best = row.best
        yield (
            f"| {row.model} | {row.threads} | {row.nodes[0]} → {row.nodes[1]} | {row.export_ms:.2f} → "
            f"{row.ours_ms:.2f} | {100 * row.spread:.0f} % | {cells} | **{best.cpu:.2f}** ({best.wall:.2f}) "
            f"{best.name} | {row.worst:.0e} |"
        )


def _cell(rival: Rival | None) -> str:
    if rival is None:
        return "-"
    return rival.fault or f"{rival.cpu:.2f} ({rival.wall:.2f})"


def _dims(text: str) -> dict[str, int]:
    pairs = (part.split("=", 1) for part in text.split(",") if part)
    return {name: int(size) for name, size in pairs}


def main() -> int:
    """Prints the table; exits with 1 where ours is below 0.98 of the best."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tools", default=",".join(name for name in TOOLS if name != OURS))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--dims", default="batch=1,batch_size=1,sequence=128,seq=128")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=20.0, help="a model and thread number")
    parser.add_argument("--timeout", type=float, default=900.0, help="of a tool, in seconds")
    parser.add_argument("--made", type=Path, help="folder that keeps what the tools made")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tools = [name for name in args.tools.split(",") if name]
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder = args.made or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for model in args.models:
            rows += _rows(model, tools, folder, args)
            for line in table(rows[-1:], tools):
                print(line, file=sys.stderr, flush=True)
    print("\n".join(table(rows, tools)))
    if args.json is not None:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 1 if any(row.best.cpu < 0.98 for row in rows) else 0


def _rows(model: Path, tools: Sequence[str], folder: Path, args: argparse.Namespace) -> list[Row]:
    made: dict[str, Path] = {}
    for tool in (OURS, *tools):
        python = sys.executable if tool == OURS else args.peer_python
        path, fault = make(tool, python, model, folder, args.timeout)
        if fault:
            print(f"{model.stem}: {tool}: {fault}", file=sys.stderr)
        else:
            made[tool] = path
    if OURS not in made:
        raise SystemExit(f"{model}: graphopt made nothing")
    feed = feed_of(model, _dims(args.dims))
    counts = [int(n) for n in args.threads.split(",")]
    return [race(model, made, feed, threads, args.seconds) for threads in counts]


if __name__ == "__main__":
    raise SystemExit(main())
