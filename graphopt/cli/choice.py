"""Refuses a word that is not one of those known, and says which was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from graphopt.errors import OptionError


def one_of(what: str, word: str, known: Iterable[str]) -> str:
    """The word itself, if it is known.

    Raises:
        OptionError: it is not; the message lists what is.
    """
    names = list(known)
    if word in names:
        return word
    near = difflib.get_close_matches(word, names, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"unknown {what} {word!r}.{hint} Known: {', '.join(names)}.")
