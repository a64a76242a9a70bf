"""Arrays in a file without a name."""

from __future__ import annotations

import tempfile

import ml_dtypes
import numpy as np
import pytest

from graphopt.ir.spill import Array, Spill


def several() -> list[Array]:
    return [
        np.arange(7, dtype=np.uint8),
        np.array([1.5, -0.0, np.nan], np.float32),
        np.zeros(0, np.float64),
        np.array([2, -3], ml_dtypes.bfloat16),
    ]


def check(spill: Spill) -> None:
    for found, want in zip(spill.arrays(), several(), strict=True):
        assert (found.dtype, found.tobytes()) == (want.dtype, want.tobytes())
        assert not found.size or not found.flags.writeable


def test_arrays_come_back_bit_for_bit_whenever_they_rested() -> None:
    spill = Spill(several())
    check(spill)
    spill.rest()
    check(spill)


def test_nothing_at_all_takes_no_file() -> None:
    assert [a.size for a in Spill([np.zeros(0, np.float32)]).arrays()] == [0]
    assert Spill([]).arrays() == []


def test_stays_in_memory_where_no_file_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    spill = Spill(several())
    spill.rest()
    check(spill)
