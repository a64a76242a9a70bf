"""Every model of the zoo on every target: whether it is taken after the target's pipeline, and what is in the way.

    python benchmarks/legality.py [--target NAME …] [--precision fp32] [FOLDER …]

Without folders: models, digits and precision of the zoo beside the checkout.  Prints a table of verdicts after the
pipeline, then each obstacle that is left, and at the end whatever a pipeline made that the check of its target refuses.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
from pathlib import Path

import graphopt
from graphopt.emit.findings import Finding, Verdict
from graphopt.emit.legality import check_legality
from graphopt.errors import GraphoptError
from graphopt.ir.model_file import load_model
from graphopt.targets import Target, all_targets, get_target

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one target: obstacles before and after; the error where there is no result."""

    model: str
    target: str
    verdict: str
    before: tuple[Finding, ...]
    after: tuple[Finding, ...]
    error: str = ""

    @property
    def made(self) -> tuple[Finding, ...]:
        """What the pipeline made that its target refuses: operators, or reasons, that the original had not."""
        had = {(each.op, each.source) for each in self.before}
        return tuple(each for each in self.after if (each.op, each.source) not in had)


def judge(path: Path, target: Target, precision: str) -> Row:
    """Before and after the pipeline of the target."""
    before = check_legality(load_model(path), target)
    try:
        result = graphopt.optimize(path, target=target, precision=precision, verify="off")
    except GraphoptError as fault:
        return Row(path.stem, target.name, "error", before.refused, (), str(fault))
    after = check_legality(load_model(result.model), target)
    return Row(path.stem, target.name, after.verdict.value, before.refused, after.refused)


def zoo_models() -> list[Path]:
    """The models beside the checkout, or in it."""
    for folder in (ROOT.parent / "shared" / "zoo", ROOT / "shared" / "zoo"):
        if folder.is_dir():
            parts = [folder / part for part in ("models", "digits", "precision")]
            return sorted(path for part in parts for path in part.rglob("*.onnx"))
    sys.exit(
        "no model zoo: put the folder shared/zoo beside the checkout, or name folders of models"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(all_targets()))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args()
    paths = [
        p for folder in options.folders for p in sorted(folder.rglob("*.onnx"))
    ] or zoo_models()
    targets = [get_target(name) for name in options.target or all_targets()]
    rows: list[Row] = []
    print(f"{'model':34}" + "".join(f"{target.name:>14}" for target in targets))
    for path in paths:
        new = [judge(path, target, options.precision) for target in targets]
        rows += new
        print(f"{path.stem[:33]:34}" + "".join(f"{row.verdict:>14}" for row in new), flush=True)
    tell(rows)


def tell(rows: list[Row]) -> None:
    """The obstacles, the faults of pipelines, and the counts."""
    for row in rows:
        if row.error:
            print(f"\n{row.model} on {row.target}: {row.error}")
        alike: dict[str, list[Finding]] = collections.defaultdict(list)
        for each in row.after:
            alike[re.sub(r"'[^']*'|\d+(\.\d+)?", "", each.reason)].append(each)
        for same in alike.values():
            print(f"\n{row.model} on {row.target}: {same[0].reason} ({len(same)} nodes)")
            print(f"  remedy: {same[0].remedy}")
    made = [(row, each) for row in rows for each in row.made]
    print(f"\nmade by a pipeline and refused by its target: {len(made)}")
    for row, each in made:
        print(f"  {row.model} on {row.target}: {each.op} {each.node}: {each.reason}")
    verdicts = collections.Counter(row.verdict for row in rows)
    order = [*(verdict.value for verdict in Verdict), "error"]
    print(", ".join(f"{name}: {verdicts[name]}" for name in order if verdicts[name]))


if __name__ == "__main__":
    main()
