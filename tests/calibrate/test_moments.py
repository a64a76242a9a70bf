"""Second moments against NumPy and against a convolution."""

from __future__ import annotations

import numpy as np

from graphopt.calibrate.moments import POSITIONS, Wanted, Window, collect_moments, rows_of
from graphopt.verify.feed_files import Feed
from tests.rewriting import parse, run

RNG = np.random.default_rng(0)
PRODUCT = parse(
    "g (float[n,3] x) => (float[n,3] y) { r = Relu(x)  y = Neg(r) }"
).SerializeToString()


def test_moments_are_means_of_outer_products() -> None:
    arrays = [RNG.normal(size=(5, 3)).astype(np.float32) for _ in range(4)]
    feeds = [Feed(str(i), {"x": array}) for i, array in enumerate(arrays)]
    found = collect_moments(PRODUCT, [Wanted("r"), Wanted("x")], feeds)
    rows = np.maximum(np.concatenate(arrays), 0).astype(np.float64)
    np.testing.assert_allclose(found[Wanted("r")], rows.T @ rows / len(rows), rtol=1e-9)


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
