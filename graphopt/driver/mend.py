"""Running the passes that a legality check offers, and checking again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from graphopt.driver.api import optimize
from graphopt.driver.result import Result, check_output, is_bundle
from graphopt.emit.findings import Legality
from graphopt.emit.legality import check_legality
from graphopt.ir.model_file import load_model
from graphopt.pipeline.recipe import Recipe
from graphopt.pipeline.registry import all_passes, load_pass
from graphopt.targets import Target

_NEXT = {"symmetrize-quantization": "write-out-integers", "expand-contrib": "decompose"}
"""What to try where a pass left an obstacle."""

_CLEANING = ("fold-constants", "remove-dead-code")
_TIDY = {"rename-branch-outputs", "write-quantization-axes", "convert-opset"}
"""Passes that leave nothing to clean."""

REQUANTIZED = "sqnr>=10,cosine>=0.95"
"""What rounding to integers anew may cost, as `--precision int8`."""


def mend(
    source: Path,
    target: Target,
    found: Legality,
    output: Path | None,
    *,
    inputs: Path | None = None,
    budget: str | None = None,
) -> tuple[Legality, tuple[str, ...]]:
    """The legality after the passes that `found` offers, and the names of those that changed something.

    The result is verified against the original as any other run is, and written where `output` says if the target
    then takes it: what is there stays otherwise.

    Args:
        source: the model.
        target: the runtime.
        found: what it has to say.
        output: file to write; None for none.
        inputs: inputs to compare on; generated where None.
        budget: the error that lossy passes may make; that of int8 where None and bytes are rounded anew.

    Raises:
        GraphoptError: as for `optimize`.
    """
    if output is not None:
        check_output(output)
    names = _offered(found, ())
    if not names and output is None:
        return found, ()
    run, result, after = _attempt(source, target, names, inputs, budget)
    while after.refused and (more := _offered(after, names)):
        names = (*names, *more)  # what was behind the first obstacle
        run, result, after = _attempt(source, target, names, inputs, budget)
    if output is not None and not after.refused:
        # A bundle with all that belongs to it: a run is the same every time.
        run(output=output) if is_bundle(output) else result.save(output)
    changed = {each.name for each in result.report.passes if each.changed}
    return after, tuple(name for name in names if name in changed)


def _offered(found: Legality, tried: Sequence[str]) -> tuple[str, ...]:
    """The passes that `found` names and that were not tried; the next best for those that were."""
    named = (_NEXT.get(name, name) if name in tried else name for name in found.fixes)
    return tuple(n for n in dict.fromkeys(named) if n in all_passes() and n not in tried)


def _attempt(
    source: Path,
    target: Target,
    names: Sequence[str],
    inputs: Path | None,
    budget: str | None,
) -> tuple[partial[Result], Result, Legality]:
    """A run of the passes, what it gave, and what the target says of it."""
    cleaning = () if set(names) <= _TIDY else _CLEANING
    recipe = Recipe(pipeline=tuple(load_pass(name) for name in (*names, *cleaning)))
    if budget is None and "symmetrize-quantization" in names:
        budget = REQUANTIZED
    run = partial(optimize, source, target=target, recipe=recipe, inputs=inputs, budget=budget)
    result = run()
    return run, result, check_legality(load_model(result.model), target)
