"""Budgets as users write them: `sqnr>=40`, `max<=0.02,cosine>=0.999`."""

from __future__ import annotations

import dataclasses
import re

from graphopt.errors import OptionError
from graphopt.targets import Precision
from graphopt.verify.compare import BF16, FP16, INT8, Budget

_FIELDS = {
    "max": ("max_over_rms", "<="),
    "sqnr": ("sqnr_db", ">="),
    "cosine": ("cosine", ">="),
    "argmax": ("argmax_agreement", ">="),
    "top1-agreement": ("argmax_agreement", ">="),
    "agreement": ("agreement", ">="),
}
_CONDITION = re.compile(r"\s*([a-z1-]+)\s*(>=|<=|>|<|=)\s*([-+.\deE]+)\s*(?:db|dB)?\s*")

# One sample has one greatest element: a flip between two near ties would fail a whole run.  Who wants the rank of classes
# gated says so: top1-agreement>=0.99.
_QUANTISED = dataclasses.replace(INT8, argmax_agreement=None)
_DEFAULTS = {
    Precision.FP16: FP16,
    Precision.BF16: BF16,
    Precision.INT8: _QUANTISED,
    Precision.INT8_DYNAMIC: _QUANTISED,
    Precision.INT4_WEIGHTS: dataclasses.replace(_QUANTISED, sqnr_db=12, cosine=0.96),
}


def budget_for(precision: Precision, text: str | None) -> Budget | None:
    """How much a result of `precision` may differ: as the user wrote it, else what the precision promises.

    Raises:
        OptionError: the text is no budget.
    """
    return _DEFAULTS.get(precision) if text is None else parse_budget(text)


def parse_budget(text: str) -> Budget:
    """The budget that `text` states; what it does not name is not gated.

    Args:
        text: conditions, with commas between them: `max<=X` (greatest difference over the RMS of the reference),
            `sqnr>=DB`, `cosine>=X`, `argmax>=X` (rows with the same greatest element), `agreement>=X` (equal integers).

    Raises:
        OptionError: the text is none.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = _CONDITION.fullmatch(part)
        if match is None or match[1] not in _FIELDS:
            raise OptionError(f"--budget {text!r}: {part.strip()!r} is not a condition; {_REMEDY}")
        field, direction = _FIELDS[match[1]]
        if match[2] != direction:
            raise OptionError(
                f"--budget {text!r}: {match[1]} is bounded with {direction}, not with {match[2]}; {_REMEDY}"
            )
        found[field] = _number(match[3], text)
    return dataclasses.replace(Budget(), **found)


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise OptionError(f"--budget {text!r}: {word!r} is not a number; {_REMEDY}") from error


_REMEDY = (
    "write for example sqnr>=40 or max<=0.01,cosine>=0.999 (known: " + ", ".join(_FIELDS) + ")"
)
