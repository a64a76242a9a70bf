"""Memory of a process."""

from __future__ import annotations

import ctypes
import sys
import types

import pytest

from graphopt.runtime.footprint import trim


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_freed_memory_is_given_back_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    library = types.SimpleNamespace(malloc_trim=asked.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    trim()
    del library.malloc_trim
    trim()
    assert asked == [0]
