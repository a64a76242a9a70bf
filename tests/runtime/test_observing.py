"""Values in the middle against a session that hands them out as outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ModelError
from graphopt.ir.model_file import ExternalData, load_model, save_model
from graphopt.runtime.observing import Observed, Observer, block_size
from graphopt.runtime.session import Session, SessionOptions
from tests.rewriting import parse

CONVOLUTIONS = parse(
    """g (float[n,3,h,w] x) => (float[n,32,a,b] y)
       <float[20,3,3,3] v, float[32,20,1,1] u, float[32] c> {
         s = Conv<pads=[1,1,1,1]>(x, v)  r = Relu(s)
         t = Conv(r, u, c)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)
         o = Relu(m)  y = Mul(o, o) }""",
    opset=13,
)
RNG = np.random.default_rng(0)
NAMES = ("x", "s", "r", "t", "m", "o")


def image(height: int, count: int = 1) -> dict[str, Any]:
    return {"x": RNG.normal(size=(count, 3, height, 8)).astype(np.float32)}


def expected(model: bytes, feeds: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    inner = tuple(name for name in names if name not in feeds)
    return feeds | Session(model, options=SessionOptions(extra_outputs=inner)).run(feeds, inner)


@pytest.mark.parametrize("height", [8, 10])
def test_blocked_values_are_what_onnx_says(height: int) -> None:
    model = CONVOLUTIONS.SerializeToString()
    observer = Observer(model, NAMES)
    for _ in range(2):  # the second run fills the arrays of the first
        feeds = image(height, 2)
        found, wanted = observer.run(feeds), expected(model, feeds, NAMES)
        assert set(found) == set(wanted)
        for name, value in found.items():
            np.testing.assert_allclose(value.plain, wanted[name], rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(value.row(1).plain, value.plain[1:])


def test_blocks_hold_the_same_elements_and_pad_the_last_block() -> None:
    found = Observer(CONVOLUTIONS.SerializeToString(), NAMES).run(image(8))
    assert found["x"].blocks is None
    for name, channels in (("t", 32), ("s", 20)):
        blocks, size = found[name].blocks, block_size()
        assert (blocks is not None) == (found[name].channels == channels)
        if blocks is not None:
            assert blocks.shape == (1, -(-channels // size), 64, size)
            kept = blocks.transpose(0, 1, 3, 2).reshape(1, -1, 64)[:, :channels]
            np.testing.assert_array_equal(kept.ravel(), found[name].plain.ravel())


def test_what_a_rectifier_makes_has_a_floor() -> None:
    found = Observer(CONVOLUTIONS.SerializeToString(), NAMES).run(image(8))
    assert {name: value.floor for name, value in found.items() if value.floor is not None} == {
        "r": 0.0,
        "o": 0.0,
    }


CLIPPED = """
g (float[n,4] x, float b) => (float[n,4] y) <float l = {-1.5}, float[2] two = {1.0, 2.0}> {
  h = Constant<value = float {0.5}>()
  c = Clip(x, l)  d = Clip(c, h)  e = Clip(d, b)  y = Relu(e)
}"""


def test_what_is_clipped_by_a_constant_has_a_floor() -> None:
    feeds = {"x": RNG.normal(size=(2, 4)).astype(np.float32), "b": np.float32(0.75)}
    found = Observer(parse(CLIPPED, opset=13).SerializeToString(), ("c", "d", "e", "y")).run(feeds)
    assert {name: value.floor for name, value in found.items()} == {
        "c": -1.5,
        "d": 0.5,
        "e": None,
        "y": 0.0,
    }


def test_an_attribute_of_clip_is_a_floor_too() -> None:
    model = parse("g (float[2] x) => (float[2] y) { c = Clip<min=-0.5>(x)  y = Neg(c) }", opset=10)
    found = Observer(model.SerializeToString(), ("c",)).run({"x": np.zeros(2, np.float32)})
    assert found["c"].floor == -0.5


def test_shapes_may_vary_from_run_to_run() -> None:
    model = CONVOLUTIONS.SerializeToString()
    observer = Observer(model, ("t",))
    for height in (8, 10, 8, 8):
        feeds = image(height)
        wanted = expected(model, feeds, ("t",))["t"]
        np.testing.assert_allclose(observer.run(feeds)["t"].plain, wanted, rtol=1e-4, atol=1e-4)


def test_shapes_may_hang_on_what_is_fed() -> None:
    model = parse("g (float[n] x) => (int64[1,m] y) { z = NonZero(x)  y = Neg(z) }")
    observer = Observer(model.SerializeToString(), ("z",))
    for x in ([1.0, 0.0], [1.0, 2.0], [0.0, 0.0]):
        given = np.array(x, np.float32)
        np.testing.assert_array_equal(
            observer.run({"x": given})["z"].plain, np.array(np.nonzero(given))
        )


def test_nodes_that_nothing_observed_needs_do_not_run() -> None:
    model = parse(
        """g (float[2] x) => (float[3] y) <int64[1] s = {3}> { z = Relu(x)  y = Reshape(z, s) }"""
    )
    found = Observer(model.SerializeToString(), ("z",)).run({"x": np.ones(2, np.float32)})
    assert found["z"].plain.tolist() == [1, 1]


def test_what_bodies_read_is_kept() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) {
             d = Neg(x)
             z = If (c) <then_branch = a () => (float[2] e) { e = Relu(d) },
                         else_branch = b () => (float[2] f) { f = Identity(d) }>
             y = Neg(z) }"""
    )
    feeds = {"c": np.array(True), "x": np.array([-1, 2], np.float32)}
    assert Observer(model.SerializeToString(), ("z",)).run(feeds)["z"].plain.tolist() == [1, 0]


def test_weights_may_lie_beside_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_model(load_model(CONVOLUTIONS), path, external=ExternalData.SINGLE_FILE)
    feeds = image(8)
    wanted = expected(CONVOLUTIONS.SerializeToString(), feeds, ("t",))["t"]
    np.testing.assert_allclose(
        Observer(path, ("t",)).run(feeds)["t"].plain, wanted, rtol=1e-4, atol=1e-4
    )


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(ModelError, match="has no value 'q'"):
        Observer(CONVOLUTIONS.SerializeToString(), ("q",))


def test_an_input_alone_needs_no_session() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }").SerializeToString()
    found = Observer(model, ("x",)).run({"x": np.ones(2, np.float32)})
    assert isinstance(found["x"], Observed)
    assert found["x"].plain.tolist() == [1, 1]
