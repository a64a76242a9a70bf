"""Statistics against NumPy, and the same bits in any order."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.calibrate.collect import by_row, collect
from graphopt.calibrate.samples import Samples
from graphopt.calibrate.statistics import (
    Channels,
    Collected,
    Statistics,
    empty,
)
from graphopt.calibrate.tally import Tally
from graphopt.errors import DataError, OptionError
from graphopt.runtime.observing import Observed
from graphopt.verify.feed_files import Feed
from tests.rewriting import parse

RNG = np.random.default_rng(0)
SAMPLES = [RNG.normal(size=(2, 3, 5, 7)).astype(np.float32) for _ in range(6)]
MODEL = parse("g (float[n,3] x) => (float[n,3] y) { r = Relu(x)  y = Neg(r) }").SerializeToString()


def same(a: object, b: object) -> bool:
    if isinstance(a, Statistics | Channels):
        return all(same(value, vars(b)[name]) for name, value in vars(a).items())
    return bool(np.array_equal(a, b))  # type: ignore[arg-type]


def observe(array: np.ndarray, axes: tuple[int, ...] = (1, -1)) -> Statistics:
    tally = Tally()
    tally.add(Observed(array), axes)
    return tally.total()


def merged(order: list[int]) -> Statistics:
    found = empty()
    for index in order:
        found = found.merged(observe(SAMPLES[index]))
    return found


def test_extremes_counts_and_means() -> None:
    found, x = merged([0, 1, 2, 3, 4, 5]), np.stack(SAMPLES)
    assert (found.minimum, found.maximum) == (x.min(), x.max())
    assert found.histogram.sum() == found.elements == x.size
    means = found.channel_means(1)
    assert means is not None
    np.testing.assert_allclose(means, x.mean(axis=(0, 1, 3, 4), dtype=np.float64), atol=1e-6)
    powers, ranges = found.channel_powers(1), found.channel_ranges(1)
    assert powers is not None
    assert ranges is not None
    np.testing.assert_allclose(powers, (x**2).mean(axis=(0, 1, 3, 4), dtype=np.float64), rtol=1e-5)
    np.testing.assert_array_equal(ranges[0], x.min(axis=(0, 1, 3, 4)))
    np.testing.assert_array_equal(ranges[1], x.max(axis=(0, 1, 3, 4)))
    assert found.channel_means(-1) is None
    rows = x.reshape(-1, 7)
    last = observe(rows).channel_means(-1)
    assert last is not None
    np.testing.assert_allclose(last, rows.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_any_order_and_grouping_gives_the_same_bits() -> None:
    left = merged([0, 1, 2]).merged(merged([3, 4, 5]))
    assert same(left, merged([5, 3, 1, 0, 2, 4]))


def test_what_is_not_a_signal_is_counted_apart() -> None:
    x = np.array([[1, np.nan, -np.inf, -3.4e38, 1e9, -2]], np.float32)
    found = observe(x)
    assert (found.minimum, found.maximum, found.excluded) == (-2, 1, 4)
    assert found.channel_means(1) is None
    nothing = observe(np.array([np.nan], np.float32))
    assert nothing.is_empty
    assert nothing.excluded == 1


def test_an_empty_tensor_says_nothing() -> None:
    assert same(observe(np.zeros((0, 3), np.float32)), empty())


def test_channels_of_varying_number_have_no_means() -> None:
    found = observe(np.ones((2, 3), np.float32)).merged(observe(np.ones((2, 4), np.float32)))
    assert found.channel_means(1) is None


def test_large_tensors_are_counted_in_part() -> None:
    x = RNG.normal(size=1 << 18).astype(np.float32)
    found = observe(x)
    assert found.histogram.sum() < x.size
    assert found.maximum == x.max()


def feeds() -> list[Feed]:
    return [
        Feed(str(i), {"x": RNG.normal(size=(i % 3 + 1, 3)).astype(np.float32)}) for i in range(7)
    ]


def test_workers_give_the_same_bits_and_files_the_same_bytes(tmp_path: Path) -> None:
    given = feeds()
    alone = collect(MODEL, ["r", "x"], given)
    with ThreadPoolExecutor(2) as pool:
        shared = collect(MODEL, ["r", "x"], given, executor=pool, chunk=2)
    alone.save(tmp_path / "a.npz")
    shared.save(tmp_path / "b.npz")
    assert alone.samples == sum(len(feed.values["x"]) for feed in given)
    assert alone.values["r"].minimum == 0.0 > alone.values["x"].minimum
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = Collected.load(tmp_path / "a.npz")
    assert again.samples == alone.samples
    assert all(same(again.values[name], found) for name, found in alone.values.items())


def test_few_large_samples_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for workers is bounded by its size, so that memory does not grow with the samples."""
    monkeypatch.setattr("graphopt.calibrate.collect._BYTES", 3 * 4 * 10)
    drawn: list[int] = []
    most = 0

    def feeds() -> Iterator[Feed]:
        for index in range(40):
            drawn.append(index)
            yield Feed(str(index), {"x": np.ones((1, 3), np.float32)})

    class Counting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal most
            most = max(most, len(drawn))
            drawn.clear()
            return super().submit(*args, **kwargs)

    with Counting(1) as pool:
        found = collect(MODEL, ["r"], feeds(), executor=pool, chunk=20)
    assert found.samples == 40
    assert most == 10


def test_batches_count_as_their_samples_do(tmp_path: Path) -> None:
    rows = RNG.normal(size=(6, 3)).astype(np.float32)
    for size in (1, 2, 6):
        parts = [Feed(str(i), {"x": rows[i : i + size]}) for i in range(0, 6, size)]
        collect(MODEL, ["r", "x"], parts).save(tmp_path / f"{size}.npz")
    assert len({(tmp_path / f"{size}.npz").read_bytes() for size in (1, 2, 6)}) == 1


MIXED = parse(
    """g (float[n,3] x) => (float[n,3] y) { m = ReduceMean<axes=[0]>(x)  y = Sub(x, m) }""",
    opset=13,
).SerializeToString()
FIXED = parse("""g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }""").SerializeToString()


@pytest.mark.parametrize(("model", "count"), [(MODEL, 4), (MIXED, 2), (FIXED, 2)])
def test_batches_are_rows_where_the_model_keeps_them_apart(
    tmp_path: Path, model: bytes, count: int
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    feeds = [Feed(str(i), {"x": RNG.normal(size=(2, 3)).astype(np.float32)}) for i in range(2)]
    found = list(by_row(lambda: nullcontext(path), Samples(lambda: iter(feeds))))
    assert len(found) == count
    rows = np.concatenate([feed.values["x"] for feed in found])
    assert (rows == np.concatenate([feed.values["x"] for feed in feeds])).all()


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.ones(3))
    with pytest.raises(DataError, match="cannot be read as calibration statistics"):
        Collected.load(path)


def kept(path: Path, **changes: np.ndarray) -> None:
    """Statistics of one value, and what somebody made of the file."""
    Collected({"v": observe(np.ones((1, 3), np.float32))}, 1, "m").save(path)
    with np.load(path) as archive:
        arrays = {**archive}
    np.savez(path, **{**arrays, **{key.replace("_", "."): a for key, a in changes.items()}})


def head(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"head": head("[1]")}, "Expected `object`"),
        ({"head": head('{"version": 3, "samples": 1, "model": "", "names": null}')}, "`array`"),
        ({"head": head('{"version": 3, "samples": 1, "model": "", "names": ["a", "b"]}')}, "1.key"),
        ({"0_keys": np.array([70000])}, "no patterns of 16 bits"),
        ({"0_keys": np.array([1.5])}, "'0.keys' is float64"),
        ({"0_counts": np.array([-1])}, "'0.counts'"),
        ({"0_range": np.array([np.nan, 1])}, "'0.range'"),
        ({"0_range": np.array([1.0])}, "'0.range'"),
        ({"0_numbers": np.array([1, 2, -3])}, "'0.numbers'"),
        ({"0_channels": np.zeros((2, 3, 5), np.int64)}, "'0.channels.ends'"),
    ],
)
def test_what_is_no_statistics_is_refused(
    tmp_path: Path, changes: dict[str, np.ndarray], error: str
) -> None:
    path = tmp_path / "x.npz"
    kept(path)
    assert Collected.load(path).values["v"].elements == 3
    kept(path, **changes)
    with pytest.raises(DataError, match=f"as calibration statistics: .*{error}.*remove this one"):
        Collected.load(path)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    kept(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    for data in (b"", b"garbage", whole[:-30], whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read as calibration statistics"):
            Collected.load(path)


def test_statistics_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="create the folder first"):
        Collected({}, 1).save(tmp_path / "none" / "x.npz")


def test_statistics_of_an_earlier_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    head = b'{"version": 2, "samples": 1, "model": "", "names": []}'
    np.savez(path, head=np.frombuffer(head, np.uint8))
    with pytest.raises(DataError, match="it has format 2"):
        Collected.load(path)


def test_sums_of_large_squares_are_exact_in_any_order() -> None:
    parts = [RNG.normal(scale=scale, size=(1, 3, 50)).astype(np.float32) for scale in (1e8, 1, 1e5)]
    found = [empty(), empty()]
    for index, order in enumerate(([0, 1, 2], [2, 0, 1])):
        for each in order:
            found[index] = found[index].merged(observe(parts[each]))
    assert same(*found)
    powers, means = found[0].channel_powers(1), found[0].channel_means(1)
    assert powers is not None
    assert means is not None
    x = np.stack(parts).astype(np.float64)
    np.testing.assert_allclose(powers, (x**2).mean(axis=(0, 1, 3)), rtol=1e-5)
    np.testing.assert_allclose(means, x.mean(axis=(0, 1, 3)), rtol=1e-5)


def test_values_in_blocks_count_as_those_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.runtime.observing.block_size", lambda: 8)
    plain = np.maximum(RNG.normal(size=(2, 16, 40, 41)), 0).astype(np.float32)
    turned = plain.reshape(2, 2, 8, 40, 41).transpose(0, 1, 3, 4, 2)
    blocked = Observed(np.ascontiguousarray(turned).reshape(plain.shape), 16, 0.0)
    tallies = Tally(), Tally()
    tallies[0].add(Observed(plain), (1,))
    tallies[1].add(blocked, (1,))
    found = [tally.total() for tally in tallies]
    assert (found[0].histogram == found[1].histogram).all()
    assert (found[0].minimum, found[0].maximum) == (found[1].minimum, found[1].maximum)
    assert (found[0].channels.ends == found[1].channels.ends).all()
    for name in ("channel_means", "channel_powers"):
        one, other = (getattr(each, name)(1) for each in found)
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("floor", [None, 0.0])
def test_what_pads_a_block_does_not_count(
    monkeypatch: pytest.MonkeyPatch, floor: float | None
) -> None:
    monkeypatch.setattr("graphopt.runtime.observing.block_size", lambda: 8)
    plain = RNG.uniform(1, 2, size=(2, 12, 20, 21)).astype(np.float32)
    padded = np.concatenate([plain, np.full((2, 4, 20, 21), 7, np.float32)], axis=1)
    turned = padded.reshape(2, 2, 8, 20, 21).transpose(0, 1, 3, 4, 2)
    tally, wanted = Tally(), Tally()
    tally.add(Observed(np.ascontiguousarray(turned).reshape(padded.shape), 12, floor), (1,))
    wanted.add(Observed(plain), (1,))
    found, other = tally.total(), wanted.total()
    assert (found.minimum, found.maximum) == (plain.min(), plain.max())
    assert found.elements == plain.size
    assert found.channels.ends.shape == (2, 12)
    assert (found.histogram == other.histogram).all()


def test_extremes_and_nan_of_large_tensors_are_found_in_any_part() -> None:
    x = RNG.normal(size=(1, 2, 400, 401)).astype(np.float32)
    x[0, 1, 399, 400], x[0, 0, 7, 7] = 9, -8
    found = observe(x)
    assert (found.minimum, found.maximum) == (-8, 9)
    x[0, 1, 200, 3] = np.nan
    assert observe(x).excluded == 1


def test_layouts_that_vary_still_count() -> None:
    shapes = [(1, 3, 50, 60), (4, 3), (1, 3, 50, 60), (7,), (1, 40, 3), (2, 5)]
    samples = [RNG.normal(size=shape).astype(np.float32) for shape in shapes]
    tallies = [Tally(room) for room in (0, 1 << 20)]
    for tally in tallies:
        for sample in samples:
            tally.add(Observed(sample))
    found = tallies[0].total()
    assert same(found, tallies[1].total())
    assert found.histogram.sum() == found.elements == sum(sample.size for sample in samples)
    apart = empty()
    for sample in samples:
        apart = apart.merged(observe(sample))
    assert (apart.histogram == found.histogram).all()
    assert found.mean_range == apart.mean_range


def test_what_is_no_signal_is_found_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.runtime.observing.block_size", lambda: 8)
    array = np.ones((1, 8, 2, 2), np.float32)
    array[0, 3, 1, 1] = np.nan
    tally = Tally()
    tally.add(Observed(array, 8, 0.0), (1,))
    found = tally.total()
    assert (found.excluded, found.elements, found.minimum, found.maximum) == (1, 32, 1, 1)
    assert found.channel_means(1) is None


def test_when_elements_are_counted_does_not_show() -> None:
    tallies = [Tally(room) for room in (0, 300, 1 << 20)]
    for tally in tallies:
        for sample in SAMPLES:
            tally.add(Observed(sample))
    assert same(tallies[0].total(), tallies[1].total())
    assert same(tallies[0].total(), tallies[2].total())


@pytest.mark.parametrize("shape", [(1, 900, 7, 3), (1, 3, 300, 80), (1, 2000, 1), (1, 77, 130)])
def test_however_many_samples_wait_the_sums_have_the_same_bits(shape: tuple[int, ...]) -> None:
    samples = [RNG.normal(size=shape).astype(np.float32) for _ in range(11)]
    tallies = [Tally(room) for room in (0, 1 << 16, 1 << 22)]
    for tally in tallies:
        for sample in samples:
            tally.add(Observed(sample))
    first, *others = [tally.total() for tally in tallies]
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_the_model_fails_on_is_named(workers: int) -> None:
    proto = parse(
        """g (float[n] x) => (float[m] y) <int64[2] p = {2, 0}> { y = Pad<mode="reflect">(x, p) }"""
    )
    feeds = [
        Feed("sample 0", {"x": np.ones(5, np.float32)}),
        Feed("sample 1", {"x": np.ones(1, np.float32)}),
    ]
    pool = ThreadPoolExecutor(workers) if workers else nullcontext()
    with pool as executor, pytest.raises(DataError, match=r"^'sample 1': .*Pad"):
        collect(proto.SerializeToString(), ["y"], feeds, executor=executor)
