"""Second moments against NumPy and against a convolution."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from graphopt.calibrate.moments import POSITIONS, Wanted, Window, collect_moments, rows_of
from graphopt.verify.feed_files import Feed
from tests.rewriting import parse, run

RNG = np.random.default_rng(0)
PRODUCT = parse(
    "g (float[n,k] x) => (float[n,k] y) { r = Relu(x)  y = Neg(r) }"
).SerializeToString()


def collected(arrays: list[np.ndarray], name: str = "x") -> np.ndarray:
    """Moments of one value of the model, an array a sample."""
    feeds = [Feed(str(i), {"x": array.astype(np.float32)}) for i, array in enumerate(arrays)]
    return collect_moments(PRODUCT, [Wanted(name)], feeds)[Wanted(name)]


def test_moments_are_means_of_outer_products_less_what_is_chance() -> None:
    arrays = [RNG.normal(size=(n, 3)).astype(np.float32) for n in (5, 2, 7, 4)]
    found = collected(arrays, "r")
    parts = [np.maximum(array, 0).astype(np.float64) for array in arrays]
    rows = np.concatenate(parts)
    plain = rows.T @ rows / len(rows)
    np.testing.assert_allclose(np.diag(found), np.diag(plain), rtol=1e-9)
    shares = np.array([len(part) for part in parts]) / len(rows)
    aside = ~np.eye(3, dtype=bool)
    spread = sum(
        share * (((part.T @ part / len(part) - plain)[aside]) ** 2).sum()
        for share, part in zip(shares, parts, strict=True)
    )
    doubt = spread * (shares**2).sum() / (1 - (shares**2).sum()) / (plain[aside] ** 2).sum()
    assert 0.05 < doubt < 0.95
    np.testing.assert_allclose(found[aside], plain[aside] * (1 - doubt), rtol=1e-6)


@pytest.mark.parametrize(("rows", "looked_at"), [(1, 512), (8, 64), (16, 32), (100, 32)])
def test_samples_of_few_rows_are_looked_at_in_greater_numbers(rows: int, looked_at: int) -> None:
    drawn = []

    def feeds() -> Iterator[Feed]:
        for index in range(600):
            drawn.append(index)
            yield Feed(str(index), {"x": np.ones((rows, 3), np.float32)})

    collect_moments(PRODUCT, [Wanted("x")], feeds())
    assert len(drawn) == looked_at + 1


def test_samples_without_rows_say_nothing() -> None:
    array = RNG.normal(size=(40, 3)).astype(np.float32)
    empty = np.zeros((0, 3), np.float32)
    np.testing.assert_array_equal(collected([array, array, empty]), collected([array, array]))
    window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    assert rows_of(np.zeros((0, 2, 4, 4), np.float32), window).shape == (0, 18)
    assert rows_of(np.zeros((3, 0), np.float32), None).shape == (3, 0)


def test_samples_that_agree_leave_no_doubt() -> None:
    array = RNG.normal(size=(40, 3)).astype(np.float32)
    wide = array.astype(np.float64)
    np.testing.assert_allclose(collected([array] * 3), wide.T @ wide / 40, rtol=1e-6)


def test_one_row_says_nothing_of_how_inputs_go_together() -> None:
    np.testing.assert_allclose(collected([np.array([[1.0, 2.0, 3.0]])]), np.diag([1.0, 4.0, 9.0]))


def test_the_rows_of_a_single_sample_are_compared_with_each_other() -> None:
    row = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(collected([np.repeat(row, 50, 0)]), row.T @ row, rtol=1e-9)
    found = collected([RNG.normal(size=(50, 3))])
    np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=0.1)


@pytest.mark.parametrize("samples", [2, 4, 16])
def test_few_samples_come_nearer_to_many(samples: int) -> None:
    mixing = RNG.normal(size=(24, 24)) * np.linspace(0.1, 1, 24)
    truth = mixing.T @ mixing
    lost, plainly = 0.0, 0.0
    for _ in range(20):
        arrays = [(RNG.normal(size=(3, 24)) @ mixing).astype(np.float32) for _ in range(samples)]
        rows = np.concatenate(arrays).astype(np.float64)
        lost += float(((collected(arrays) - truth) ** 2).sum())
        plainly += float(((rows.T @ rows / len(rows) - truth) ** 2).sum())
    assert lost < 0.9 * plainly


def test_what_is_not_finite_has_none() -> None:
    feeds = [Feed("0", {"x": np.array([[np.inf, 1, 2]], np.float32)})]
    assert not collect_moments(PRODUCT, [Wanted("x")], feeds)


def test_rows_times_weights_are_a_convolution() -> None:
    text = (
        "g (float[2,3,9,8] x, float[4,3,3,2] w) => (float[2,4,a,b] y)"
        "{ y = Conv<pads=[1,0,2,1], strides=[2,1], dilations=[1,2]>(x, w) }"
    )
    x, w = RNG.normal(size=(2, 3, 9, 8)), RNG.normal(size=(4, 3, 3, 2))
    feed = {"x": x.astype(np.float32), "w": w.astype(np.float32)}
    expected = run(parse(text), feed)[0].transpose(0, 2, 3, 1).reshape(-1, 4)
    rows = rows_of(feed["x"], Window((3, 2), (2, 1), (1, 2), (1, 0, 2, 1)))
    every = -(-len(expected) // POSITIONS)
    np.testing.assert_allclose(rows @ w.reshape(4, -1).T, expected[::every], rtol=1e-4, atol=1e-4)


def test_large_images_are_looked_at_in_part() -> None:
    rows = rows_of(np.ones((1, 8, 300, 300), np.float32), Window((3, 3), (1, 1), (1, 1), (1,) * 4))
    assert rows.shape[1] == 72
    assert 30 < len(rows) <= 64
