"""The driver as golden cases call it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

from graphopt.driver.api import optimize
from graphopt.driver.request import Progress
from graphopt.errors import OptionError
from graphopt.numerics import Numerics
from graphopt.pipeline.recipe import Recipe
from graphopt.verify.golden_case import TABLE, CaseOptions, case_options


def golden_optimizer(say: Progress | None = None) -> Callable[[Path, Path, str], Numerics]:
    """A function that optimises a source file into another by a recipe in TOML, and says what that may do to numbers.

    Args:
        say: called with the stage that begins.
    """

    def run(source: Path, output: Path, recipe: str) -> Numerics:
        chosen, options = read_recipe(recipe, "recipe of the golden case")
        calibration = options.calibration
        # Golden cases compare the result themselves, with the numbers that were recorded.
        result = optimize(
            source,
            output=output,
            recipe=chosen,
            verify="off",
            force=options.force,
            budget=options.budget,
            calibration=None if calibration is None else source.resolve().parent / calibration,
            progress=say,
        )
        return max((r.numerics for r in result.report.rewrites), default=Numerics.EXACT)

    return run


def read_recipe(text: str, where: str) -> tuple[Recipe, CaseOptions]:
    """What the recipe of a case says of the run, and what its table `[golden]` says besides.

    Raises:
        OptionError: it is no recipe.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{where} is no TOML: {error}") from error
    rest = {key: value for key, value in table.items() if key != TABLE}
    return Recipe.from_table(rest, where), case_options(text)
