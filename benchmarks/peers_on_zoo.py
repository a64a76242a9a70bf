"""What the simplifiers do to every model of the zoo: which results are valid and equal, and how the others go wrong.

    python -m benchmarks.peers_on_zoo --peer-python PYTHON --made FOLDER [--tools onnxsim,…] [--workers 2] [FOLDER …]

Each tool goes through all models in one process that forks for each, with a minute each; what it made stays in the
folder and is not made again.  A result is judged by `onnx.checker`, then compared as graphopt compares its own (ONNX
Runtime, optimisations off, generated inputs, the gate for reordered sums).  Models that the checker or ONNX Runtime
refuses as they are, or without inputs that run, are left out.  Prints a row for each result that is not right, then
the counts.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import onnx
import onnx.checker

from benchmarks.simplify import OURS, TOOLS
from benchmarks.sweep import zoo_folders
from graphopt.errors import GraphoptError
from graphopt.numerics import Numerics
from graphopt.verify.verifier import ReferenceRun, VerifyOptions

PEERS = tuple(tool for tool in TOOLS if tool != OURS)
_MAKER = """
import os, signal, sys
folder, paths = sys.argv[1], open(sys.argv[2]).read().splitlines()
mark = lambda name: None
code = compile(sys.argv[3], "tool", "exec")
for index, path in enumerate(paths):
    out = f"{folder}/{index}.onnx"
    if os.path.exists(out) or os.path.exists(out + ".failed"):
        continue
    child = os.fork()
    if not child:
        signal.alarm(60)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.argv[1:] = [path, out]
        try:
            exec(code)
        except BaseException as fault:
            open(out + ".failed", "w").write(f"{type(fault).__name__}: {fault}"[:300])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        open(out + ".failed", "w").write(f"died of signal {status & 127}")
"""


def make(tool: str, python: str, listed: Path, folder: Path) -> Path:
    """The folder of what a tool makes of the listed models: N.onnx, or N.onnx.failed with the reason."""
    made = folder / tool
    made.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-c", _MAKER, made, listed, TOOLS[tool]], check=True)
    return made


def judge(model: Path, candidates: Sequence[Path]) -> list[tuple[str, str]] | None:
    """Verdict and reason of each candidate; None where the model itself cannot be judged by."""
    if fault_of(model):
        return None
    try:
        reference = ReferenceRun(model, thorough=True)
    except GraphoptError:
        return None
    return None if reference.unverifiable else [judged(reference, each) for each in candidates]


def judged(reference: ReferenceRun, candidate: Path) -> tuple[str, str]:
    """Verdict and reason of one candidate."""
    if not candidate.exists():
        told = candidate.with_suffix(".onnx.failed")
        return "failed", told.read_text() if told.exists() else "wrote nothing"
    fault = fault_of(candidate)
    if fault:
        return "invalid", fault
    try:
        found = reference.verify(candidate, VerifyOptions(Numerics.REORDERED))
    except GraphoptError as error:
        return "different", str(error)
    if found.passed is None:
        return "unjudged", found.reason
    return ("equal", "") if found.passed else ("different", found.reason)


def fault_of(path: Path) -> str:
    """What `onnx.checker` has against a file, or ""."""
    try:
        onnx.checker.check_model(str(path))
    except Exception as fault:  # noqa: BLE001  the checker raises what it likes
        return f"{type(fault).__name__}: {fault}"
    return ""


def judge_all(
    models: Sequence[Path], made: Sequence[Path], workers: int
) -> Iterator[tuple[int, list[tuple[str, str]] | None]]:
    """The verdicts of each model, by its index; a model that kills its worker counts as not judged."""
    waiting = list(range(len(models)))
    while waiting:
        with concurrent.futures.ProcessPoolExecutor(workers) as pool:
            futures = [
                (i, pool.submit(judge, models[i], [m / f"{i}.onnx" for m in made])) for i in waiting
            ]
            for index, future in futures:
                waiting.remove(index)
                try:
                    yield index, future.result()
                except BrokenProcessPool:
                    yield index, None
                    break


def main() -> None:
    """Prints what is not right, then a table of counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--tools", default=",".join(PEERS))
    parser.add_argument("--made", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    models = sorted(p for f in args.folders or zoo_folders() for p in f.rglob("*.onnx"))
    args.made.mkdir(parents=True, exist_ok=True)
    listed = args.made / "models.txt"
    listed.write_text("\n".join(map(str, models)))
    tools = args.tools.split(",")
    made = [make(tool, args.peer_python, listed, args.made) for tool in tools]
    counts = {tool: collections.Counter[str]() for tool in tools}
    for index, verdicts in judge_all(models, made, args.workers):
        for tool, (verdict, reason) in zip(tools, verdicts or [], strict=False):
            counts[tool][verdict] += 1
            if verdict != "equal":
                where = f"{models[index].parent.name}/{models[index].name}"
                print(
                    f"{tool:13} {verdict:9} {where}: {' '.join(reason.split())[:160]}", flush=True
                )
    kinds = ("equal", "different", "invalid", "failed", "unjudged")
    print(f"\n| tool | models | {' | '.join(kinds)} |\n|---|{'--:|' * (len(kinds) + 1)}")
    for tool, found in counts.items():
        cells = " | ".join(str(found[kind]) for kind in kinds)
        print(f"| {tool} | {found.total()} | {cells} |")


if __name__ == "__main__":
    main()
