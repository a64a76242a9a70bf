"""The driver as golden cases call it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

from graphopt.driver.api import optimize
from graphopt.driver.request import Progress
from graphopt.numerics import Numerics
from graphopt.pipeline.recipe import Recipe


def golden_optimizer(say: Progress | None = None) -> Callable[[Path, Path, str], Numerics]:
    """A function that optimises a source file into another by a recipe in TOML, and says what that may do to numbers.

    Args:
        say: called with the stage that begins.
    """

    def run(source: Path, output: Path, recipe: str) -> Numerics:
        chosen = Recipe.from_table(tomllib.loads(recipe), "recipe of the golden case")
        # Golden cases compare the result themselves, with the numbers that were recorded.
        result = optimize(source, output=output, recipe=chosen, verify="off", progress=say)
        return max((r.numerics for r in result.report.rewrites), default=Numerics.EXACT)

    return run
