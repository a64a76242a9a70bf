"""Every model of the zoo through the default pipeline of each target, verified: what is not right, and why.

    python benchmarks/sweep.py [--target cpu] [FOLDER …]

Without folders: the zoo beside the checkout.  Each model runs in a worker process, so that a crash of native code is a
row like any other.  Prints the rows that are not "equal", then the counts.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import graphopt
from graphopt.errors import GraphoptError

ROOT = Path(__file__).resolve().parents[1]


def zoo_folders() -> list[Path]:
    """Where the zoo is, beside the checkout or in it."""
    for folder in (ROOT.parent / "shared" / "zoo", ROOT / "shared" / "zoo"):
        if folder.is_dir():
            return [folder / part for part in ("models", "digits", "precision", "fusion_tests")]
    sys.exit(
        "no model zoo: put the folder shared/zoo beside the checkout, or name folders of models"
    )


def judge(path: Path, target: str) -> tuple[str, str, int, int]:
    """Verdict, reason, nodes before and after of one model."""
    try:
        report = graphopt.optimize(path, target=target).report
    except GraphoptError as fault:
        return type(fault).__name__, str(fault), 0, 0
    counts = (report.input.nodes, report.output.nodes)
    if report.rolled_back:
        left_out = report.rolled_back[0]
        return "rolled back", f"{left_out.pass_name}/{left_out.rule}: {left_out.reason}", *counts
    if report.verification.passed is None:
        return "unverified", report.verification.reason, *counts
    return (
        ("equal" if report.verification.passed else "different"),
        report.verification.reason,
        *counts,
    )


def sweep(
    paths: list[Path], target: str, workers: int
) -> Iterator[tuple[Path, tuple[str, str, int, int]]]:
    """The verdict of each model, in order; a model that kills its worker is judged "crash"."""
    waiting = list(paths)
    while waiting:
        with concurrent.futures.ProcessPoolExecutor(workers) as pool:
            futures = [(path, pool.submit(judge, path, target)) for path in waiting]
            for path, future in futures:
                waiting.remove(path)
                try:
                    yield path, future.result()
                except BrokenProcessPool:
                    # Whoever crashed is among the models under way; each of them gets a process of its own.
                    yield path, judge_alone(path, target)
                    break


def judge_alone(path: Path, target: str) -> tuple[str, str, int, int]:
    """The verdict of one model in a process that may die of it."""
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(judge, path, target).result()
        except BrokenProcessPool:
            return "crash", "the process died", 0, 0


def main() -> int:
    """Prints what is not equal; 1 if anything crashed, differed or had to be rolled back."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    paths = sorted(p for folder in args.folders or zoo_folders() for p in folder.rglob("*.onnx"))
    verdicts: collections.Counter[str] = collections.Counter()
    before = after = 0
    for path, (verdict, reason, old, new) in sweep(paths, args.target, args.workers):
        verdicts[verdict] += 1
        before, after = before + old, after + new
        if verdict != "equal":
            print(
                f"{verdict:12} {path.parent.name}/{path.name}: {' '.join(reason.split())[:260]}",
                flush=True,
            )
    print(f"{len(paths)} models, {before} -> {after} nodes: {dict(verdicts)}")
    return int(
        any(
            verdicts[bad]
            for bad in ("crash", "different", "rolled back", "PassError", "VerifyError")
        )
    )


if __name__ == "__main__":
    sys.exit(main())
