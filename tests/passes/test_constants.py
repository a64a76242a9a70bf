"""Shared reading and writing of constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import constants

from graphopt.rewrite import Skip
from tests.rewriting import parse


@pytest.mark.parametrize(
    ("shape", "rank", "axis", "fits"),
    [
        ((), 4, 1, True),
        ((3, 1, 1), 4, 1, True),
        ((1, 3, 1, 1), 4, 1, True),
        ((3,), 4, -1, True),
        ((3,), 4, 1, False),
        ((1, 1, 1, 3, 1), 4, 1, False),
        ((2, 1, 1), 4, 1, False),
    ],
)
def test_along(shape: tuple[int, ...], rank: int, axis: int, *, fits: bool) -> None:
    found = constants.along(np.ones(shape, np.float32), rank, axis, 3)
    assert (found is not None) == fits
    assert found is None or found.shape == (3,)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((), True), ((4,), True), ((1, 3, 1), True), ((2, 3, 4), False), ((5,), False)],
)
def test_trailing(shape: tuple[int, ...], *, fits: bool) -> None:
    found = constants.trailing(np.ones(shape), 3, (3, 4))
    assert (found is not None) == fits
    assert found is None or found.shape == (3, 4)
    assert constants.trailing(np.ones((1, 1, 1, 1)), 3, (3, 4)) is None


def test_on_axis() -> None:
    assert constants.on_axis(np.arange(3.0), 4, 1).shape == (1, 3, 1, 1)
    assert constants.on_axis(np.arange(3.0), 2, -1).shape == (1, 3)


def test_narrow_refuses_what_does_not_fit() -> None:
    assert constants.narrow(np.array([1.5]), ir.DataType.FLOAT16).dtype == np.float16
    for number in (1e6, np.nan, np.inf):
        with pytest.raises(Skip, match="not finite"):
            constants.narrow(np.array([number]), ir.DataType.FLOAT16)
    with pytest.raises(Skip, match="unknown element type"):
        constants.narrow(np.array([1.0]), None)


def test_small_constants_may_be_duplicated() -> None:
    text = (
        "g (float[64,64] x) => (float[64,64] y, float[64,64] z) <float[64,{n}] w>"
        "{{ y = {op}(x, w) z = {op}(w, x) }}"
    )
    for n, op, tied in ((64, "MatMul", True), (1, "Mul", False)):
        graph = ir.from_proto(parse(text.format(n=n, op=op))).graph
        weight = graph.initializers["w"]
        assert constants.is_tied(weight) == tied
        assert len(constants.live_uses(weight)) == 2
        assert not constants.feeds_products_only(weight)
