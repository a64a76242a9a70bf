"""What a recipe says of single weights in blocks: left in float, or with other bits, blocks or zero points.

"head*: exclude"            the nodes, or those that make these values, stay float
"fc*: bits=8 block=64"      8 bits for 4, a scale for each 64 elements
"fc*: scheme=asymmetric"    with zero points; symmetric: without; auto: what loses less
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

from graphopt.errors import OptionError

BITS, SIZES = (4, 8), (16, 32, 64, 128, 256)
SCHEMES = ("auto", "symmetric", "asymmetric")
_TYPES = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for what a pattern matches; None leaves it as it is.

    Attributes:
        exclude: whether it stays float.
        bits: of each weight.
        block: elements that share a scale.
        scheme: symmetric, asymmetric or auto.
    """

    exclude: bool | None = None
    bits: int | None = None
    block: int | None = None
    scheme: str | None = None

    def with_stated(self, other: Settings) -> Settings:
        """The same, but what the other says holds."""
        stated = {key: value for key, value in vars(other).items() if value is not None}
        return dataclasses.replace(self, **stated)


Rule = tuple[str, Settings]
"""A pattern, and what holds for what it matches."""


def parse_rules(skipped: Sequence[str], texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules that a recipe states, later ones win.

    Raises:
        OptionError: one of them cannot be understood, or no kernel takes it.
    """
    excluded = [(pattern, Settings(exclude=True)) for pattern in skipped]
    return (*map(_rule, texts), *excluded)


def settings_of(rules: Sequence[Rule], *names: str) -> Settings:
    """What the rules say of something of these names."""
    found = Settings()
    for pattern, given in rules:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            found = found.with_stated(given)
    return found


def _rule(text: str) -> Rule:
    pattern, sign, settings = text.rpartition(": ")
    if not sign or not settings.split():
        raise _refusal(text, "it is not 'PATTERN: SETTING …'")
    found = Settings()
    for setting in settings.split():
        found = dataclasses.replace(found, **_setting(text, setting))
    return pattern.strip(), found


def _setting(text: str, setting: str) -> dict[str, Any]:
    key, _, value = setting.partition("=")
    if key == "exclude" and not value:
        return {"exclude": True}
    if key == "bits" and value in map(str, BITS):
        return {"bits": int(value)}
    if key == "block" and value in map(str, SIZES):
        return {"block": int(value)}
    if key == "scheme" and value in SCHEMES:
        return {"scheme": value}
    if key == "dtype" and value in _TYPES:
        # How codes are stored follows from form and scheme.
        return {"bits": _TYPES[value]}
    raise _refusal(text, f"{setting!r} is no setting that a kernel takes")


def _refusal(text: str, why: str) -> OptionError:
    return OptionError(
        f'quantisation override {text!r}: {why}; write for example "head*: exclude", "fc*: bits=8 block=64 '
        'scheme=asymmetric"; bits are 4 or 8 (dtype=int4, int8 mean the same), block is 16, 32, 64, 128 or 256, '
        f"scheme is {', '.join(SCHEMES)}"
    )
