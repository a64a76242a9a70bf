"""Budgets as users write them: `sqnr>=40`, `max<=0.02,cosine>=0.999`."""

from __future__ import annotations

import dataclasses
import re

from graphopt.errors import OptionError
from graphopt.verify.compare import Budget

_FIELDS = {
    "max": ("max_over_rms", "<="),
    "sqnr": ("sqnr_db", ">="),
    "cosine": ("cosine", ">="),
    "argmax": ("argmax_agreement", ">="),
    "agreement": ("agreement", ">="),
}
_CONDITION = re.compile(r"\s*([a-z]+)\s*(>=|<=|>|<|=)\s*([-+.\deE]+)\s*(?:db|dB)?\s*")


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
