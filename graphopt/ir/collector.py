"""Python's cyclic garbage collector, and how often it walks over a model.

A model is a web of cycles that all stay alive: nodes know their values, values their nodes.  Collections that are timed
by the number of new objects walk over that web again and again and find next to nothing.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_SELDOM = (250_000, 50, 100)


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """Lets the collector run as seldom as a run over large graphs wants it; what was set comes back at the end."""
    before = gc.get_threshold()
    if before[0]:  # 0 is off
        gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Puts the collector off, for as long as nothing but nodes and values is made; it comes back if it was on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
