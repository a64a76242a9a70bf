"""Plants wrong rewrites in real models and counts which of them verification catches.

    python -m benchmarks.faults [--mode final|each] [--only NAME] [--clean] [MODEL.onnx …]

Each kind of fault is a user pass that claims to reorder arithmetic and changes one node for the worse. A fault counts
as caught when the run leaves it out, names its pass and rule, and ends verified. One that onnx.checker or the runtime
refuse before they see any input says nothing about inputs and comparison: another model is struck instead, and a kind
that strikes nothing else counts as refused. `--clean` plants nothing: whatever is left out then is a false
alarm. Without MODEL the golden cases and the zoo (where there is one) are used.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fault_kinds import KINDS as COMMON
from benchmarks.planting import Kind, Plant
from benchmarks.rare_faults import RARE
from graphopt import GraphoptError, VerifyError, optimize
from graphopt.ir import scopes
from graphopt.ir.model_file import load_model

KINDS = (*COMMON, *RARE)
ROOT = Path(__file__).resolve().parents[1]
REFUSALS = 6
"""Models that a kind may make unusable before it counts as refused."""


def models() -> list[Path]:
    zoo = ROOT.parent / "shared" / "zoo" / "models"
    small = [p for p in sorted(zoo.glob("*.onnx")) if p.stat().st_size < 8 << 20]
    golden = sorted((ROOT / "golden").glob("*/model.onnx"))
    return [*golden, *small]


@functools.cache
def operators_left(path: Path) -> frozenset[str]:
    """The operators of a model after the pipeline: a fault that strikes none of them need not be tried."""
    model = optimize(path, verify="off").model
    return frozenset(n.op_type for scope in scopes.all_graphs(model) for n in scope.graph)


def may_strike(kind: Kind, path: Path) -> bool:
    if kind.within and not any(
        kind.within in node.attributes
        for scope in scopes.all_graphs(load_model(path))
        for node in scope.graph
    ):
        return False
    return "*" in kind.strikes or bool(operators_left(path) & set(kind.strikes))


def plant(kind: Kind, path: Path, mode: str) -> tuple[str, str]:
    """What became of a fault in one model: caught, missed, refused, absent or misnamed, and details."""
    try:
        report = optimize(path, passes=[Plant(kind)], verify=mode).report
    except VerifyError as error:
        return "misnamed", f"refused as a whole: {error}"
    except GraphoptError as error:
        return "absent", str(error)
    blamed = [(each.pass_name, each.rule) for each in report.rolled_back]
    if ("planted", kind.name) in blamed or ("planted", "") in blamed:
        others = [each for each in blamed if each[0] != "planted"]
        reason = report.rolled_back[0].reason
        if others or report.verification.passed is False:
            return "misnamed", f"{blamed}: {reason}"
        never_runs = "the candidate cannot be run" in reason and "on feed" not in reason
        return "refused" if never_runs or "onnx.checker refuses" in reason else "caught", reason
    if any(each.pass_name == "planted" for each in report.rewrites):
        return "missed", f"{report.verification.feeds} feeds, {report.verification.reason}"
    return ("misnamed", str(blamed)) if blamed else ("absent", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mode", default="final", choices=["final", "each"])
    parser.add_argument(
        "--only", help="kinds whose name contains this, or one of several with commas"
    )
    parser.add_argument(
        "--models", type=int, default=1, help="models in which each kind is planted"
    )
    parser.add_argument("--clean", action="store_true", help="plant nothing: count false alarms")
    parser.add_argument("model", nargs="*", type=Path)
    asked = parser.parse_args()
    paths = asked.model or models()
    return (
        clean(paths) if asked.clean else plants(paths, asked.mode, asked.only or "", asked.models)
    )


def plants(paths: Sequence[Path], mode: str, only: str, wanted: int) -> int:
    counts: Counter[str] = Counter(caught=0, missed=0, misnamed=0)
    kinds = [kind for kind in KINDS if any(part in kind.name for part in only.split(","))]
    judged: set[str] = set()
    refused: list[str] = []
    absent: list[str] = []
    for index, kind in enumerate(kinds):
        # Kinds start with different models, so that each model gets its share.
        turn = index % len(paths)
        found = strike(kind, (*paths[turn:], *paths[:turn]), mode, wanted)
        counts.update(verdict for verdict in found if verdict in counts)
        if set(found) & set(counts):
            judged.add(kind.name)
        else:
            (refused if found else absent).append(kind.name)
    total = sum(counts.values())
    rest = {"refused": refused, "absent": absent}
    print(json.dumps({"mode": mode, "kinds": len(judged), "planted": total, **counts, **rest}))
    return 0 if total and counts["caught"] >= 0.95 * total and not counts["misnamed"] else 1


def strike(kind: Kind, paths: Sequence[Path], mode: str, wanted: int) -> list[str]:
    """The verdicts on a kind, planted in the first models that it can strike and that it leaves usable."""
    verdicts: list[str] = []
    for path in paths:
        if sum(v != "refused" for v in verdicts) >= wanted or verdicts.count("refused") >= REFUSALS:
            break
        if not may_strike(kind, path):
            continue
        started = time.process_time()
        verdict, detail = plant(kind, path, mode)
        if verdict == "absent":
            continue
        verdicts.append(verdict)
        name = path.stem if path.stem != "model" else path.parent.name
        seconds = time.process_time() - started
        print(f"{verdict:9}{kind.name:28}{name:36}{seconds:5.1f} s  {detail[:150]}", flush=True)
    return verdicts


def clean(paths: Sequence[Path]) -> int:
    alarms = 0
    for path in paths:
        report = optimize(path, verify="final").report
        blamed = [f"{each.pass_name}/{each.rule} at {each.site}" for each in report.rolled_back]
        alarms += len(blamed)
        print(f"{report.verification.passed!s:6}{path}  {'; '.join(blamed)}", flush=True)
    print(json.dumps({"models": len(paths), "false_alarms": alarms}))
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
