"""Plants wrong rewrites in real models and counts which of them verification catches.

    python -m benchmarks.faults [--mode final|each] [--only NAME] [--clean] [MODEL.onnx …]

Each kind of fault is a user pass that claims to reorder arithmetic and changes one node for the worse. A fault counts
as caught when the run leaves it out, names its pass and rule, and ends verified. `--clean` plants nothing: whatever is
left out then is a false alarm. Without MODEL the golden cases and the zoo (where there is one) are used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fault_kinds import KINDS as COMMON
from benchmarks.fault_kinds import Kind, Plant
from benchmarks.rare_faults import RARE
from graphopt import GraphoptError, VerifyError, optimize

KINDS = (*COMMON, *RARE)
ROOT = Path(__file__).resolve().parents[1]


def models() -> list[Path]:
    zoo = ROOT.parent / "shared" / "zoo" / "models"
    small = [p for p in sorted(zoo.glob("*.onnx")) if p.stat().st_size < 8 << 20]
    golden = sorted((ROOT / "golden").glob("*/model.onnx"))
    return [*golden, *small]


def plant(kind: Kind, path: Path, mode: str) -> tuple[str, str]:
    """What became of a fault in one model: caught, missed, absent or misnamed, and details."""
    try:
        report = optimize(path, passes=[Plant(kind)], verify=mode).report
    except VerifyError as error:
        return "caught", f"refused: {error}"
    except GraphoptError as error:
        return "absent", str(error)
    blamed = [(each.pass_name, each.rule) for each in report.rolled_back]
    if ("planted", kind.name) in blamed or ("planted", "") in blamed:
        others = [each for each in blamed if each[0] != "planted"]
        verdict = "caught" if report.verification.passed is not False and not others else "misnamed"
        return verdict, report.rolled_back[0].reason
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
    counts = {"caught": 0, "missed": 0, "misnamed": 0}
    planted_kinds = set()
    wanted_kinds = [kind for kind in KINDS if any(o in kind.name for o in only.split(","))]
    for index, kind in enumerate(wanted_kinds):
        # Kinds start with different models, so that each model gets its share.
        turn = index % len(paths)
        left = wanted
        for path in (*paths[turn:], *paths[:turn]):
            if left == 0:
                break
            started = time.process_time()
            verdict, detail = plant(kind, path, mode)
            if verdict == "absent":
                continue
            left -= 1
            counts[verdict] += 1
            planted_kinds.add(kind.name)
            name = path.stem if path.stem != "model" else path.parent.name
            seconds = time.process_time() - started
            print(f"{verdict:9}{kind.name:28}{name:36}{seconds:5.1f} s  {detail[:150]}", flush=True)
        if left == wanted:
            print(f"absent   {kind.name}", flush=True)
    total = sum(counts.values())
    print(json.dumps({"mode": mode, "kinds": len(planted_kinds), "planted": total, **counts}))
    return 0 if total and counts["caught"] >= 0.95 * total else 1


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
