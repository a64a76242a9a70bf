"""Inputs within what a user knows of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from graphopt import DataError, optimize
from graphopt.cli import main
from graphopt.verify.constraints import constrained_feeds, read_constraints
from tests.cli.conftest import save

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (int64[b, s] ids, float[b, 3] image, float[b] gain) => (float[b, 4] y) <float[9, 4] table> {
  e = Gather(table, ids)  m = ReduceMean<keepdims = 0>(e)
  i = ReduceMean<keepdims = 0>(image)  j = Add(m, i)
  axes = Constant<value_ints = [1]>()  g = Unsqueeze(gain, axes)  y0 = Add(g, j)
  shape = Constant<value_ints = [1, 4]>()  y = Expand(y0, shape)
}"""

KNOWN = """
[dims]
b = [1, 5]
s = 7
[inputs.ids]
min = 2
max = 4
[inputs.image]
mean = 10
std = 0.5
max = 10.5
[inputs.gain]
values = [0.25, 8]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = save(tmp_path / "m.onnx", MODEL.replace(" <float[9, 4] table>", ""))
    proto = onnx.load(path)
    table = np.arange(36, dtype=np.float32).reshape(9, 4)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    onnx.save(proto, path)
    return path


def known(tmp_path: Path, text: str = KNOWN) -> Path:
    path = tmp_path / "inputs.toml"
    path.write_text(text)
    return path


def test_feeds_keep_to_what_is_known(model: Path, tmp_path: Path) -> None:
    feeds = constrained_feeds(model, read_constraints(known(tmp_path)))
    assert {feed.values["ids"].shape for feed in feeds} == {(1, 7), (5, 7)}
    for feed in feeds:
        ids, image, gain = (feed.values[name] for name in ("ids", "image", "gain"))
        assert (ids.dtype, image.dtype) == (np.int64, np.float32)
        assert ids.min() >= 2
        assert ids.max() <= 4
        assert 5 < image.min() <= image.max() <= 10.5
        assert set(gain.tolist()) <= {0.25, 8.0}
    assert any(np.unique(feed.values["ids"]).size == 3 for feed in feeds)


def test_feeds_are_the_same_every_time(model: Path, tmp_path: Path) -> None:
    given = read_constraints(known(tmp_path))
    one, other = constrained_feeds(model, given), constrained_feeds(model, given)
    assert all(
        np.array_equal(a.values["image"], b.values["image"])
        for a, b in zip(one, other, strict=True)
    )
    again = constrained_feeds(model, given, seed=1)
    assert not np.array_equal(one[0].values["image"], again[0].values["image"])


def test_a_range_of_floats_is_even(model: Path, tmp_path: Path) -> None:
    text = "[inputs.image]\nmin = -3\nmax = -1\n[dims]\nb = 64\n"
    (first, *_) = constrained_feeds(model, read_constraints(known(tmp_path, text)))
    image = first.values["image"]
    assert (image >= -3).all()
    assert (image <= -1).all()
    assert abs(image.mean() + 2) < 0.2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "cannot be read"),
        ("[inputs.ids]\nminimum = 3", "unknown field"),
        ("[inputs.ids]\nmin = 3\nmax = 2", "input 'ids': min 3 is above max 2"),
        ("[inputs.ids]\nmin = 3", "input 'ids': give min and max"),
        ("[inputs.ids]\nvalues = []", "input 'ids': values is empty"),
        ("[dims]\nb = []", "a dimension without sizes"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_constraints(known(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[inputs.idz]\nvalues = [3]", "has no input 'idz'; its inputs are ids, image, gain"),
        ("[dims]\nq = 3", "No input has a dimension called 'q'"),
        ("[inputs.ids]\nmin = 900\nmax = 901", "no inputs as constrained run"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    model: Path, tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        constrained_feeds(model, read_constraints(known(tmp_path, text)))


def test_the_command_line_takes_them(model: Path, tmp_path: Path) -> None:
    assert main(["verify", str(model), str(model), "--inputs", str(known(tmp_path)), "-q"]) == 0
    report = optimize(model, inputs=known(tmp_path)).report
    assert report.verification.passed
    assert report.verification.feeds >= 2
