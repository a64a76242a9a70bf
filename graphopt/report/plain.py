"""Facts as JSON has them."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def graphopt_version() -> str:
    """The version of the installed package."""
    return version("graphopt")


def plain(fact: Any) -> Any:  # noqa: ANN401
    """A fact as JSON has it: dataclasses and mappings as objects, enums by value, NaN and infinities as null."""
    if dataclasses.is_dataclass(fact) and not isinstance(fact, type):
        held = {field.name: getattr(fact, field.name) for field in dataclasses.fields(fact)}
        return {_KEYS.get(name, name): plain(value) for name, value in held.items()}
    if isinstance(fact, Mapping):
        return {str(key): plain(value) for key, value in fact.items()}
    if isinstance(fact, tuple | list):
        return [plain(item) for item in fact]
    if isinstance(fact, frozenset | set):
        return sorted(plain(item) for item in fact)
    if isinstance(fact, enum.Enum):
        return fact.name.lower() if isinstance(fact, enum.IntEnum) else fact.value
    if isinstance(fact, float):
        return fact if math.isfinite(fact) else None
    return str(fact) if isinstance(fact, Path) else fact


_KEYS = {"pass_name": "pass"}
"""Field names that are no good as keys: `pass` is a keyword of Python."""
