"""Running the passes that a legality check offers, and checking again."""

from __future__ import annotations

from pathlib import Path

from graphopt.driver.api import optimize
from graphopt.emit.findings import Legality
from graphopt.emit.legality import check_legality
from graphopt.ir.model_file import load_model
from graphopt.pipeline.recipe import Recipe
from graphopt.pipeline.registry import all_passes, load_pass
from graphopt.targets import Target


def mend(
    source: Path, target: Target, found: Legality, output: Path | None
) -> tuple[Legality, tuple[str, ...]]:
    """The legality after the passes that `found` offers, and the names of those that changed something.

    The result is verified against the original as any other run is, and written where `output` says.

    Raises:
        GraphoptError: as for `optimize`.
    """
    names = tuple(name for name in found.fixes if name in all_passes())
    if not names and output is None:
        return found, ()
    recipe = Recipe(pipeline=tuple(load_pass(name) for name in names))
    result = optimize(source, output=output, target=target, recipe=recipe)
    changed = {run.name for run in result.report.passes if run.changed}
    return check_legality(load_model(result.model), target), tuple(
        name for name in names if name in changed
    )
