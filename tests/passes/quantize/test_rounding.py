"""Rounding by second moments: never worse than to nearest, much better on correlated inputs."""

from __future__ import annotations

import numpy as np
import pytest
from graphopt_passes.quantize import rounding

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(12, 40))
MIX = RNG.normal(size=(40, 6))
INPUTS = RNG.normal(size=(500, 6)) @ MIX.T + 0.1 * RNG.normal(size=(500, 40)) + 1.0
KNOWN = rounding.Moments.of(INPUTS.T @ INPUTS / len(INPUTS))
MOMENTS = KNOWN.damped
SCALES = np.abs(ROWS).max(axis=1, keepdims=True) / 7 * RNG.choice([-1, 1], (12, 1))
NEAREST = np.clip(np.rint(ROWS / SCALES), -8, 7)


def lost(codes: np.ndarray) -> float:
    return rounding.error(ROWS - codes * SCALES, MOMENTS)


def test_refinement_lowers_the_error_of_outputs() -> None:
    found = rounding.refine(ROWS, NEAREST, SCALES, MOMENTS, (-8, 7))
    assert lost(found) < lost(NEAREST) / 4
    outputs = INPUTS @ (ROWS - found * SCALES).T
    plain = INPUTS @ (ROWS - NEAREST * SCALES).T
    assert (outputs**2).sum() < (plain**2).sum() / 4
    assert found.min() >= -8
    assert found.max() <= 7


def test_compensation_lowers_it_too() -> None:
    assert lost(rounding.compensate(ROWS, SCALES, KNOWN, (-8, 7))) < lost(NEAREST) / 4


@pytest.mark.parametrize("rows", [ROWS, np.zeros_like(ROWS)])
def test_independent_inputs_leave_the_nearest(rows: np.ndarray) -> None:
    nearest = np.clip(np.rint(rows / SCALES), -8, 7)
    found = rounding.refine(rows, nearest, SCALES, np.eye(40), (-8, 7))
    np.testing.assert_array_equal(found, nearest)


def test_what_was_pruned_stays_zero() -> None:
    pruned = np.where(np.arange(ROWS.shape[1]) % 2 > 0, ROWS, 0.0)
    start = np.clip(np.rint(pruned / SCALES), -8, 7)
    for codes in (
        rounding.refine(pruned, start, SCALES, MOMENTS, (-8, 7)),
        rounding.compensate(pruned, SCALES, KNOWN, (-8, 7)),
    ):
        assert not codes[pruned == 0].any()
        assert (codes != start).any()
