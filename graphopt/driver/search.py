"""`--sparsity max`: the highest sparsity with which the result stays within the budget."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from graphopt.calibrate.batches import batch_size
from graphopt.calibrate.samples import read_samples
from graphopt.calibrate.screening import Screening
from graphopt.driver.attempt import attempt, write
from graphopt.driver.judge import Judge
from graphopt.driver.request import Progress, Request, VerifyMode
from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.runtime.specs import TensorSpec, input_specs
from graphopt.verify.budget import parse_budget
from graphopt.verify.feed_files import Feed

MAX = "max"
HELD_OUT_OF = 5
FOLDS = HELD_OUT_OF
"""On so many parts of the samples, each held out by trials that learn from the others, an amount has to hold: of eleven
amounts, one too high holds on a single part by luck soon enough."""

MOST_HELD_OUT, LEAST_HELD_OUT = 128, 8
FEW = 100
"""Samples held out, in all parts, below which shares such as `top1-agreement` say little."""

_NORMAL = 1.96
"""Standard deviations to both sides between which 95 % of a normal distribution lie."""

Agreed: TypeAlias = dict[str, list[tuple[float, int]]]
"""By amount and part: the share of samples held out whose greatest output is the original's, and how many they are."""

_RATIOS = ("0.5", "0.6", "0.7", "0.75", "0.8", "0.85", "0.9", "0.93", "0.95", "0.97", "0.98")
_ERRORS = tuple(
    f"lowrank:{error}" for error in ("0.01", "0.02", "0.03", "0.05", "0.08", "0.12", "0.2")
)
_CHANNELS = tuple(f"channels:0.{digit}" for digit in range(1, 10))


def ladder(sparsity: str | None) -> tuple[str, ...]:
    """The amounts to choose from, least first; empty where an amount, or none, is given.

    `max`, `channels:max` and `lowrank:max` may be followed by options, as any amount.
    """
    word, comma, rest = (sparsity or "").partition(",")
    known = {MAX: _RATIOS, f"channels:{MAX}": _CHANNELS, f"lowrank:{MAX}": _ERRORS}
    rungs = known.get(word.strip(), ())
    return tuple(rung + comma + rest for rung in rungs)


def highest(rungs: tuple[str, ...], holds: Callable[[str], bool]) -> str | None:
    """The last rung that holds, by bisection; None where not even the first does.

    What holds is taken to hold on all rungs below.
    """
    low, high = 0, len(rungs)
    while low < high:
        middle = (low + high) // 2
        if holds(rungs[middle]):
            low = middle + 1
        else:
            high = middle
    return rungs[low - 1] if low else None


def consistent(rungs: tuple[str, ...], parts: Sequence[Callable[[str], bool]]) -> str | None:
    """The highest rung that holds on every part, and below which the next one holds, too; None where there is none.

    Bisected on the first part; what holds there by luck alone is then left downwards.
    """
    first, *others = parts
    found = highest(rungs, first)
    at = -1 if found is None else rungs.index(found)
    while at >= 0:
        around = rungs[max(at - 1, 0) : at + 1]
        if all(first(rung) for rung in around) and all(holds(rungs[at]) for holds in others):
            return rungs[at]
        at -= 1
    return None


def with_amount(request: Request, say: Progress) -> tuple[Request, tuple[str, ...]]:
    """The request with the amount of zeros or channels that `max` stands for, and what to tell about it.

    Each rung is a run of the pipeline, compared with the original on the user's inputs, or where there are none, on
    samples that the trials do not learn from.

    Raises:
        OptionError: `max` without a budget, or without verification, which is what the budget is held against.
    """
    rungs = ladder(request.options.sparsity)
    if not rungs:
        return request, ()
    if request.options.budget is None or request.verify is VerifyMode.OFF:
        raise OptionError(
            f"--sparsity {request.options.sparsity!r} looks for the most that stays within a budget: give --budget, as "
            "in --budget 'top1-agreement>=0.98', and do not turn verification off"
        )
    parts = _parts(request)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
        agreed: Agreed = {}
        found = consistent(rungs, [_trial(part, Path(scratch), say, agreed) for part in parts])
    # What was held out may be learnt from once the amount is known; the result is judged as the trials were.
    chosen = dataclasses.replace(_asking(request, found), inputs=parts[0].inputs)
    if found is None:
        told = f"not even --sparsity {rungs[0]} stays within {request.options.budget}: nothing was pruned"
        return chosen, (told,)
    return chosen, _doubts(request, parts) + _interval(request, found, agreed.get(found, []))


def _parts(request: Request) -> list[Request]:
    """The request once for each part of the samples that is held out; itself where none can be."""
    found = [_parted(request, index) for index in range(FOLDS)]
    return found[:1] if found[0] is request else [part for part in found if part is not request]


def _parted(request: Request, index: int) -> Request:
    """The request with every fifth calibration sample as input to compare on, and not to learn from.

    Itself where the user gave inputs, or too few samples.

    Args:
        request: as the user made it.
        index: which fifth, from the last on.
    """
    calibration = request.options.calibration
    if request.inputs is not None or calibration is None:
        return request
    specs = input_specs(load_model(request.source))
    rest, apart = read_samples(calibration, specs).parted(HELD_OUT_OF, index)
    held = [dict(feed.values) for feed in Screening().of(apart).first(MOST_HELD_OUT)]
    if len(held) < LEAST_HELD_OUT:
        return request
    source = [dict(feed.values) for feed in rest]
    kept = dataclasses.replace(calibration, source=source, preprocess=None, limit=None)
    options = dataclasses.replace(request.options, calibration=kept)
    # What passes keep for replays is of the samples that they saw.
    inputs = _joined(held, specs)
    # What passes keep for replays is of the samples that they saw.
    return dataclasses.replace(request, options=options, inputs=inputs, cache={})


def _doubts(request: Request, parts: Sequence[Request]) -> tuple[str, ...]:
    """What a user should know of the samples that an amount was chosen on."""
    remedy = "give --inputs with a few hundred samples of their own, or more --calibration"
    if request.inputs is not None:
        return ()
    if parts[0] is request:
        least = HELD_OUT_OF * LEAST_HELD_OUT
        told = f"too few samples to hold some out (fewer than {least}): what is within the budget on them may not be so"
        return (f"--sparsity {request.options.sparsity}: {told} on others; {remedy}",)
    count = sum(batch_size(Feed("", feed)) for part in parts for feed in _given(part))
    if count >= FEW:
        return ()
    told = f"the amount was chosen on {count} samples held out, on which shares are uncertain by several percent"
    return (f"--sparsity {request.options.sparsity}: {told}; {remedy}",)


def _interval(request: Request, rung: str, agreed: Sequence[tuple[float, int]]) -> tuple[str, ...]:
    """What an agreement on the samples held out says of others, where less than was asked for is possible."""
    asked = parse_budget(request.options.budget or "").argmax_agreement
    if asked is None or not agreed:
        return ()
    count = sum(size for _, size in agreed)
    same = round(sum(share * size for share, size in agreed))
    low, high = likely(same, count)
    if low >= asked:
        return ()
    return (
        f"--sparsity {request.options.sparsity}: {rung} agrees with the original on {same} of {count} samples held "
        f"out, so that on others (95 % confidence) {low:.1%} to {min(high, 1):.1%} agree, and less than {asked:.1%} is "
        "possible; give --inputs with more samples of their own, or ask for more than is needed",
    )


def likely(same: int, count: int) -> tuple[float, float]:
    """Between which shares of all the truth lies, with 95 % confidence, where `same` of `count` drawn agree.

    Source: Wilson 1927, which also holds near 0 and 1.
    """
    share, square = same / count, _NORMAL**2 / count
    middle = share + square / 2
    spread = math.sqrt(share * (1 - share) * square + square * square / 4)
    return (middle - spread) / (1 + square), (middle + spread) / (1 + square)


def _given(part: Request) -> Sequence[dict[str, Any]]:
    assert isinstance(part.inputs, list)
    return part.inputs


def _joined(feeds: list[dict[str, Any]], specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Samples as one batch, where every input of the model takes any number: agreement is a share of many."""
    shapes = {spec.name: spec.shape for spec in specs}
    for name, array in feeds[0].items():
        shape = shapes[name]
        is_open = shape and not isinstance(shape[0], int)
        if not is_open or any(np.shape(feed[name]) != np.shape(array) for feed in feeds):
            return feeds
    return [{name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}]


def _asking(request: Request, sparsity: str | None) -> Request:
    return dataclasses.replace(
        request, options=dataclasses.replace(request.options, sparsity=sparsity)
    )


def _trial(request: Request, scratch: Path, say: Progress, agreed: Agreed) -> Callable[[str], bool]:
    """Whether the result of an amount stays within the budget, on the inputs of a request; each is tried once.

    Args:
        request: one part.
        scratch: for files.
        say: what is tried.
        agreed: is told the share of rows with the same greatest element, and of how many, by amount.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    judge = Judge(request, folder, say)

    @functools.cache
    def holds(rung: str) -> bool:
        say(f"try {rung}", None)
        asked = _asking(request, rung)
        made = attempt(asked, asked.gate)
        written = write(made, folder, "tried.onnx", asked.external, asked.sparse_style)
        said = judge.verdict(written)
        shares = [o.argmax_agreement for o in said.outputs if o.argmax_agreement is not None]
        feeds = judge.reference.feeds
        if shares and len(feeds) == 1:
            agreed.setdefault(rung, []).append((min(shares), batch_size(feeds[0])))
        return said.passed is True

    return holds
