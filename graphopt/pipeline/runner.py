"""Runs a pipeline: a tuple of passes, each between two checks of the invariants."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeAlias

import onnx_ir as ir

from graphopt.errors import GraphoptError, PassError
from graphopt.ir.check import violations
from graphopt.ir.scopes import Census
from graphopt.pipeline.passes import Pass, PassRun, Repeat
from graphopt.rewrite import Context, RemarkKind

Step: TypeAlias = Pass | Repeat
Observer: TypeAlias = Callable[[PassRun, ir.Model], None]


def run_pipeline(
    model: ir.Model,
    steps: Sequence[Step],
    ctx: Context,
    *,
    observer: Observer | None = None,
) -> tuple[PassRun, ...]:
    """Runs `steps` over `model` in place; returns what each execution did, in order.

    Args:
        model: the model to rewrite.
        steps: passes, and groups of passes to repeat until nothing changes.
        ctx: the run's context, made for `model`.
        observer: called after each execution, with the model as it is then.

    Raises:
        PassError: a pass raised, or left the model in a state that breaks the invariants.
    """
    runs: list[PassRun] = []

    def record(run: PassRun) -> None:
        runs.append(run)
        if observer is not None:
            observer(run, model)

    census = Census(model)
    for step in steps:
        if isinstance(step, Repeat):
            census = _repeat(step, model, ctx, census, record)
        else:
            run, census = _run(step, model, ctx, census)
            record(run)
    ctx.settle_remarks()
    return tuple(runs)


def flatten(steps: Iterable[Step]) -> tuple[Pass, ...]:
    """The passes of a pipeline in order, groups opened."""
    flat: list[Pass] = []
    for step in steps:
        flat.extend(step.passes if isinstance(step, Repeat) else (step,))
    return tuple(flat)


def _repeat(
    group: Repeat, model: ir.Model, ctx: Context, census: Census, record: Callable[[PassRun], None]
) -> Census:
    """Runs the passes of a group in turn; a pass is left out while nothing changed since its last run.

    Returns the graphs and nodes that there are then; `census` are those before.
    """
    quiet = 0
    for turn in range(group.limit):
        for each in group.passes:
            run, census = _run(each, model, ctx, census)
            record(run)
            quiet = 0 if run.changed else quiet + 1
            if quiet >= len(group.passes):
                return census
        if turn == group.limit - 1:
            ctx.pass_name = group.name
            ctx.remark(
                RemarkKind.NOTE,
                "limit",
                "",
                f"still changing after {group.limit} turns of {', '.join(p.name for p in group.passes)}; "
                "a second optimisation of the result may find more",
            )
    return census


def _run(step: Pass, model: ir.Model, ctx: Context, census: Census) -> tuple[PassRun, Census]:
    """One execution of a pass over a model whose nodes are `census`; they are counted again only if it changed any."""
    if step.name in ctx.gate.passes:
        quiet = PassRun(step.name, changed=False, rewrites=0, seconds=0.0, nodes_after=census.size)
        return quiet, census
    ctx.pass_name = step.name
    ctx.census = census
    before = len(ctx.rewrites)
    started = time.process_time()
    try:
        changed = step.run(model, ctx) or census.is_stale  # whatever a pass from elsewhere says
    except GraphoptError:
        raise
    except Exception as fault:  # the pipeline boundary: a pass may come from anyone
        raise PassError(
            f"pass {step.name} raised {type(fault).__name__}: {fault}. This is a bug in the pass; the run can go on "
            f"without it: --disable {step.name}",
            pass_name=step.name,
        ) from fault
    finally:
        ctx.census = None
    seconds = time.process_time() - started
    if changed:
        census, ctx.looks = Census(model), None
        _check(step, model, census)
    return PassRun(step.name, changed, len(ctx.rewrites) - before, seconds, census.size), census


def _check(step: Pass, model: ir.Model, census: Census) -> None:
    found = list(islice(violations(model, census), 3))
    if found:
        raise PassError(
            f"pass {step.name} left an invalid model: {'; '.join(found)}. This is a bug in the pass; the run can go on "
            f"without it: --disable {step.name}",
            pass_name=step.name,
        )
