"""Budgets as users write them: `sqnr>=40`, `max<=0.02,cosine>=0.999`; and what each precision promises."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from graphopt.errors import OptionError
from graphopt.pipeline.loading import load_object
from graphopt.targets import Precision
from graphopt.verify.compare import BF16, FP16, INT8, Budget, Metric

_FIELDS = {
    "max": ("max_over_rms", "<="),
    "sqnr": ("sqnr_db", ">="),
    "cosine": ("cosine", ">="),
    "argmax": ("argmax_agreement", ">="),
    "top1-agreement": ("argmax_agreement", ">="),
    "agreement": ("agreement", ">="),
}
_SHARES = frozenset({"cosine", "argmax_agreement", "agreement"})
_CONDITION = re.compile(r"\s*([a-z1-]+)\s*(>=|<=|>|<|=)\s*([-+.\deE]+)\s*(?:db|dB)?\s*")
_QUANTIZED = dataclasses.replace(INT8, sqnr_db=10, cosine=0.95, argmax_agreement=None)
"""For the worst sample, probabilities included, where a near tie may move much of the weight.  The static pass itself
holds the noise over all samples, of scores, to `INT8`."""

_DEFAULTS = {
    Precision.FP16: FP16,
    Precision.BF16: BF16,
    Precision.FP16_WEIGHTS: FP16,
    Precision.FP8: _QUANTIZED,
    Precision.INT8: _QUANTIZED,
    Precision.INT8_DYNAMIC: _QUANTIZED,
    Precision.INT4_WEIGHTS: _QUANTIZED,
}


def budget_for(precision: Precision, text: str | None) -> Budget | None:
    """The budget that the user wrote, else what the precision promises; None where nothing is lost.

    Raises:
        OptionError: the text is none.
    """
    return _DEFAULTS.get(precision) if text is None else parse_budget(text)


ASKED, SHARED = 200, 2.0
"""Samples at most that decide on a share of rows or on a function of the user's, and how many of them may differ at a
share, where there are as many: fewer could not tell it from the next one."""


def samples_for(budget: Budget | None, least: int) -> int:
    """How many samples a budget is asked of, at least `least`: the more, the finer it asks."""
    if budget is None:
        return least
    if budget.metric is not None:
        return max(ASKED, least)
    share = budget.argmax_agreement
    if share is None:
        return least
    wanted = SHARED / (1 - share) if share < 1 else ASKED
    return max(least, min(round(wanted), ASKED))


def parse_budget(text: str) -> Budget:
    """The budget that `text` states; what it does not name is not gated.

    Args:
        text: conditions, with commas or `and` between them: `max<=X` (greatest difference over the RMS of the
            reference), `sqnr>=DB`, `cosine>=X`, `top1-agreement>=X` (rows of all feeds with the same greatest one),
            `agreement>=X` (equal elements of integer outputs), `module:function>=X` (a function of outputs and feeds,
            both lists of mappings by name, one a sample, to a number: asked while layers are chosen).

    Raises:
        OptionError: the text is none.
    """
    found: dict[str, Any] = {"agreement": None}
    for part in re.split(r",|\band\b", text):
        if ":" in part:
            found["metric"] = _metric(part, text)
            continue
        match = _CONDITION.fullmatch(part)
        if match is None or match[1] not in _FIELDS:
            raise _refusal(text, f"{part.strip()!r} is not a condition")
        field, direction = _FIELDS[match[1]]
        if match[2] != direction:
            raise _refusal(text, f"{match[1]} is bounded with {direction}, not with {match[2]}")
        try:
            found[field] = float(match[3])
        except ValueError as error:
            raise _refusal(text, f"{match[3]!r} is not a number") from error
        if field in _SHARES and found[field] > 1:
            raise _refusal(text, f"{match[1]} is at most 1, and {match[3]} can never be met")
    return dataclasses.replace(Budget(), **found)


def _metric(part: str, text: str) -> Metric:
    """A function of the user's: `module:function>=X`, `path/to/file.py:function>=X`."""
    name, sign, bound = part.partition(">=")
    try:
        least = float(bound)
    except ValueError as error:
        raise _refusal(text, f"{part.strip()!r} is no module:function>=NUMBER") from error
    if not sign:
        raise _refusal(text, f"{part.strip()!r} is no module:function>=NUMBER")
    function = load_object(name.strip(), "--budget")
    if not callable(function):
        raise _refusal(text, f"{name.strip()!r} is no function")
    return Metric(name.strip(), function, least)


def _refusal(text: str, why: str) -> OptionError:
    return OptionError(
        f"--budget {text!r}: {why}; write sqnr>=DB, max<=X, cosine>=X, top1-agreement>=X, agreement>=X or "
        "module:function>=X, with commas between several"
    )
