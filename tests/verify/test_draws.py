"""Random numbers that stay what they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.verify.draws import Draws, cast, integer_range


def test_the_streams_are_pinned() -> None:
    """Stored golden cases regenerate inputs from these streams: change GENERATOR with them."""
    assert Draws(0, "x").integers((8,), 0, 1000).tolist() == [999, 0, 111, 504, 290, 172, 584, 580]
    assert Draws(0, "x").uniform((2,)).tolist() == [0.6970971428173617, 0.8380114786744257]
    assert Draws(0, "x").normal((2,)).tolist() == [1.2076276344699828, 0.1773693973657977]


def test_names_and_seeds_give_other_numbers() -> None:
    base = Draws(0, "x").uniform((4,))
    assert not np.array_equal(base, Draws(0, "y").uniform((4,)))
    assert not np.array_equal(base, Draws(1, "x").uniform((4,)))


def test_normals_are_normal() -> None:
    numbers = Draws(3, "n").normal((400, 1000))
    assert numbers.shape == (400, 1000)
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert abs((np.abs(numbers) < 1).mean() - 0.6827) < 0.01
    assert Draws(3, "n").normal((0, 2)).shape == (0, 2)


def test_integers_reach_both_ends() -> None:
    assert set(Draws(0, "i").integers((2,), -3, 7).tolist()) == {-3, 6}
    assert Draws(0, "i").integers((), 4, 5).item() == 4
    assert Draws(0, "i").integers((0,), 4, 5).size == 0


@pytest.mark.parametrize("dtype", [d for d in ir.DataType if d.is_integer()])
def test_integer_dtypes_saturate(dtype: ir.DataType) -> None:
    low, high = integer_range(dtype)
    assert cast(np.array([1e30, -1e30]), dtype).astype(object).tolist()[1] == low
    assert int(cast(np.array([1e30, -1e30]), dtype)[0]) > high // 2
    assert cast(np.array([1, 0]), dtype).dtype == dtype.numpy()


def test_floats_and_bools_are_converted() -> None:
    assert cast(np.array([0.5]), ir.DataType.BFLOAT16).dtype == ml_dtypes.bfloat16
    assert cast(np.array([1, 0]), ir.DataType.BOOL).tolist() == [True, False]
