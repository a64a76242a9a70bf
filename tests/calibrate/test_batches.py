"""Batches are the samples that they hold, wherever a model treats those one by one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from graphopt.calibrate.batches import batch_size
from graphopt.calibrate.collect import by_row
from graphopt.calibrate.samples import Samples
from graphopt.verify.feed_files import Feed
from tests.rewriting import parse

RNG = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def shapes(tmp_path: Path, text: str, *given: dict[str, np.ndarray]) -> list[list[tuple[int, ...]]]:
    path = tmp_path / "model.onnx"
    path.write_bytes(parse(text).SerializeToString())
    feeds = [Feed(str(index), values) for index, values in enumerate(given)]
    found = by_row(lambda: nullcontext(path), Samples(lambda: iter(feeds)))
    return [[np.shape(array) for array in feed.values.values()] for feed in found]


PLAIN = "g (float[n,3] x) => (float[n,3] y) { y = Relu(x) }"


def test_the_first_batch_may_come_late(tmp_path: Path) -> None:
    given = [{"x": numbers(size, 3)} for size in (1, 1, 1, 1, 1, 4, 2)]
    assert shapes(tmp_path, PLAIN, *given) == [[(1, 3)]] * 11


def test_a_large_batch_is_asked_of_its_first_rows(tmp_path: Path) -> None:
    assert shapes(tmp_path, PLAIN, {"x": numbers(100, 3)}) == [[(1, 3)]] * 100


@pytest.mark.parametrize("extra", [(), (1, 3), (3,), (7, 3)])
def test_what_has_no_rows_goes_with_each(tmp_path: Path, extra: tuple[int, ...]) -> None:
    dims = {(): "float", (3,): "float[3]"}.get(extra, "float[m,3]")
    text = f"g (float[n,3] x, {dims} s) => (float[n,3] y) {{ t = ReduceSum<keepdims=0>(s)  y = Mul(x, t) }}"
    given = {"x": numbers(4, 3), "s": numbers(*extra)}
    assert shapes(tmp_path, text, given) == [[(1, 3), extra]] * 4


def test_inputs_of_one_axis_have_rows(tmp_path: Path) -> None:
    text = """g (float[n,3] x, float[n] s) => (float[n,3] y) {
        axes = Constant<value_ints=[1]>()  t = Unsqueeze(s, axes)  y = Mul(x, t) }"""
    given = {"x": numbers(4, 3), "s": numbers(4)}
    assert shapes(tmp_path, text, given) == [[(1, 3), (1,)]] * 4


RUNNING = """g (float[t,n,3] x) => (float[t,n,3] y) { axis = Constant<value_int=0>()  y = CumSum(x, axis) }"""


def test_samples_along_the_second_axis(tmp_path: Path) -> None:
    given = {"x": numbers(5, 4, 3)}
    assert shapes(tmp_path, RUNNING, given) == [[(5, 1, 3)]] * 4


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n,3] x) => (float[n,3] y, float z) { y = Relu(x)  z = ReduceMean<keepdims=0>(x) }",
        "g (float[n,3] x) => (float[n,3] y) { axis = Constant<value_int=0>()  y = CumSum(x, axis) }",
        "g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }",
        """g (float[n,3] x) => (float[1,6] y) { s = Constant<value_ints=[1,6]>()  y = Reshape(x, s) }""",
        "g (float[n,3] x) => (int64[2] y) { y = Shape(x) }",
    ],
)
def test_batches_stay_whole_where_rows_depend_on_others(tmp_path: Path, text: str) -> None:
    assert shapes(tmp_path, text, {"x": numbers(2, 3)}) == [[(2, 3)]]


def test_how_many_samples_a_feed_holds() -> None:
    assert batch_size(Feed("", {"x": numbers(4, 3), "y": numbers(4, 1)})) == 4
    assert batch_size(Feed("", {"x": numbers(4, 3), "y": numbers(2, 1)})) == 1
    assert batch_size(Feed("", {"x": [numbers(4, 3), numbers(2, 3)]})) == 1


def test_the_limit_counts_samples() -> None:
    feeds = [Feed(str(index), {"x": numbers(3, 3)}) for index in range(2)]
    samples = Samples(lambda: iter(feeds), limit=4, apart=lambda feed: [feed] * 3)
    assert len(list(samples)) == 4
