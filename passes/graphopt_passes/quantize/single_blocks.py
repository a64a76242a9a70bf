"""What a recipe says of single weights in blocks: left in float, or with other bits or another block size.

"head*: exclude"            the nodes, or those that make these values, stay float
"fc*: bits=8 block=64"      8 bits for 4, a scale for each 64 elements
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from graphopt.errors import OptionError

BITS, SIZES = (4, 8), (16, 32, 64, 128, 256)
_TYPES = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}

Rule = tuple[str, dict[str, int]]
"""A pattern, and what holds for what it matches: bits, block; exclude is 1 where it stays float."""


def parse_rules(skipped: Sequence[str], texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules that a recipe states, later ones win.

    Raises:
        OptionError: one of them cannot be understood, or no kernel takes it.
    """
    excluded = [(pattern, {"exclude": 1}) for pattern in skipped]
    return (*map(_rule, texts), *excluded)


def settings_of(rules: Sequence[Rule], *names: str) -> dict[str, int]:
    """What the rules say of something of these names."""
    found: dict[str, int] = {}
    for pattern, given in rules:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            found |= given
    return found


def _rule(text: str) -> Rule:
    pattern, sign, settings = text.rpartition(": ")
    if not sign or not settings.split():
        raise _refusal(text, "it is not 'PATTERN: SETTING …'")
    found: dict[str, int] = {}
    for setting in settings.split():
        found |= _setting(text, setting)
    return pattern.strip(), found


def _setting(text: str, setting: str) -> dict[str, int]:
    key, _, value = setting.partition("=")
    if key == "exclude" and not value:
        return {"exclude": 1}
    if key == "bits" and value in map(str, BITS):
        return {"bits": int(value)}
    if key == "block" and value in map(str, SIZES):
        return {"block": int(value)}
    if (
        key == "dtype" and value in _TYPES
    ):  # the form says how codes are stored: signed in qdq, unsigned in contrib
        return {"bits": _TYPES[value]}
    raise _refusal(text, f"{setting!r} is no setting that a kernel takes")


def _refusal(text: str, why: str) -> OptionError:
    return OptionError(
        f'quantisation override {text!r}: {why}; write for example "head*: exclude", "fc*: bits=8 block=64"; bits '
        "are 4 or 8 (dtype=int4, int8 mean the same), block is 16, 32, 64, 128 or 256"
    )
