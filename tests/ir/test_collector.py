"""The collector is as it was afterwards, whatever happens in between."""

from __future__ import annotations

import gc

import pytest

from graphopt.ir import collector


def test_thresholds_come_back() -> None:
    before = gc.get_threshold()
    with collector.seldom():
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before
    with pytest.raises(KeyError), collector.seldom():
        raise KeyError
    assert gc.get_threshold() == before


def test_a_collector_that_is_off_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with collector.seldom():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
    gc.disable()
    try:
        with collector.off():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_off_ends() -> None:
    with collector.off():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), collector.off():
        raise KeyError
    assert gc.isenabled()
