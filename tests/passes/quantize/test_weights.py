"""Packed weights against their definition, whichever way they lie in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphopt_passes.quantize.blocks import encode, limits, packed
from graphopt_passes.quantize.weights import PAIR_LIMIT, bias_shift, pack

RNG = np.random.default_rng(0)
SHAPES = [(5, 1), (7, 2), (4, 3), (9, 27), (64, 576), (3, 70001)]


def laid(rows: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return [rows, np.ascontiguousarray(rows.T).T]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0, 3, -3])
def test_the_largest_pair_of_one_sign_does_not_saturate(shape: tuple[int, int], mean: int) -> None:
    rows = (RNG.normal(size=shape) + mean).astype(np.float32)
    for given in laid(rows):
        found = pack(given, top_code=255)
        codes = np.sort(found.codes.astype(np.int64), axis=1)
        pairs = np.maximum(np.abs(codes[:, :2].sum(axis=1)), codes[:, -2:].sum(axis=1))
        one = np.abs(codes).max(axis=1)
        assert (pairs if shape[1] > 1 else one).max() * 255 <= PAIR_LIMIT
        assert pack(given, top_code=None).codes.max(initial=0) <= 127


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest_and_their_noise_is_told(shape: tuple[int, int]) -> None:
    rows = RNG.normal(size=shape).astype(np.float32)
    for given in laid(rows):
        found = pack(given, top_code=None)
        assert (found.codes == np.rint(rows / found.scales[:, None])).all()
        np.testing.assert_allclose(found.scales, np.abs(rows).max(axis=1) / 127, rtol=1e-6)
        lost = ((found.codes * found.scales[:, None] - rows) ** 2).sum() / (rows**2).sum()
        np.testing.assert_allclose(found.noise, lost, rtol=1e-3, atol=1e-12)


def test_the_noise_of_large_weights_is_that_of_some_parts() -> None:
    rows = (RNG.normal(size=(1500, 700)) * np.geomspace(0.1, 10, 1500)[:, None]).astype(np.float32)
    for given in laid(rows):
        found = pack(given, top_code=None)
        assert (found.codes == np.rint(rows / found.scales[:, None])).all()
        lost = ((found.codes * found.scales[:, None] - rows) ** 2).sum() / (rows**2).sum()
        np.testing.assert_allclose(found.noise, lost, rtol=0.1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "block"), [((9, 50), 16), ((300, 64), 32), ((5, 700), 256)])
def test_blocks_hold_the_nearest_codes_of_the_best_of_some_scales(
    bits: int, shape: tuple[int, int], block: int
) -> None:
    rows = RNG.normal(size=shape).astype(np.float32)
    rows[0] = 0
    wide = np.zeros((shape[0], -(-shape[1] // block) * block), np.float32)
    wide[:, : shape[1]] = rows
    low, high = limits(bits)
    for given in laid(rows):
        made = encode(given, block, bits)
        codes, scales = made.codes, made.scales
        steps = np.repeat(scales, block, axis=1)
        assert (codes == np.clip(np.rint(wide / steps), low, high)).all()
        lost = ((codes * steps - wide) ** 2).reshape(shape[0], -1, block).sum(axis=2)
        peak = wide.reshape(shape[0], -1, block)
        ends = np.where(-peak.min(axis=2) > peak.max(axis=2), peak.min(axis=2), peak.max(axis=2))
        full = np.repeat(np.where(ends == 0, 1, ends / low), block, axis=1)
        plain = ((np.clip(np.rint(wide / full), low, high) * full - wide) ** 2).reshape(peak.shape)
        assert (lost <= plain.sum(axis=2) * (1 + 1e-4)).all()


def test_halves_of_bytes_hold_codes_from_the_least_on() -> None:
    codes = np.array([[-8, 7, 0, -1]], np.int8)
    assert packed(codes, 4).tolist() == [[0xF0, 0x78]]
    assert packed(np.array([[-128, 127]], np.int8), 8).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("rows", "channels", "taps", "group"),
    [(9, 700, 1, 1), (300, 600, 1, 1), (6, 5, 9, 1), (12, 3, 9, 4), (8, 1, 25, 8)],
)
def test_the_shift_is_what_rounding_takes_on_average(
    rows: int, channels: int, taps: int, group: int
) -> None:
    weight = RNG.normal(size=(rows, channels * taps)).astype(np.float32)
    means = RNG.normal(size=group * channels)
    for given in laid(weight):
        found = pack(given, top_code=None)
        shift = bias_shift(given, found, means, taps, group)
        assert shift is not None
        assert bias_shift(given, found, means[1:], taps, group) is None
        assert bias_shift(given, found, None, taps, group) is None
        lost = weight.astype(np.float64) - found.codes * found.scales[:, None].astype(np.float64)
        each = np.repeat(means.reshape(group, channels), taps, axis=1)
        wanted = np.einsum("grk,gk->gr", lost.reshape(group, -1, channels * taps), each)
        np.testing.assert_allclose(shift, wanted.reshape(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_blocks_are_the_same_however_many_are_worked_on_at_once(
    monkeypatch: pytest.MonkeyPatch, bits: int, zero_points: bool
) -> None:
    rows = RNG.normal(size=(50, 320)).astype(np.float32) ** 3
    found = []
    for chunk in (64, 700, 1 << 16):
        monkeypatch.setattr("graphopt_passes.quantize.blocks.CHUNK", chunk)
        found += [encode(given, 32, bits, zero_points=zero_points) for given in laid(rows)]
    for made in found[1:]:
        np.testing.assert_array_equal(made.codes, found[0].codes)
        np.testing.assert_array_equal(made.scales, found[0].scales)
        if zero_points:
            np.testing.assert_array_equal(made.zeros, found[0].zeros)
