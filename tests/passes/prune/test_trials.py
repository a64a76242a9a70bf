"""Rounds, latency and Fisher information as ways to choose channels."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.prune import Prune, trials
from graphopt_passes.prune.labels import propagate
from graphopt_passes.prune.request import Importance, parse_sparsity
from graphopt_passes.prune.trials import best_slimming, composed
from graphopt_passes.prune.ways import Slimming

from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Calibration, Context, Gate, Options
from graphopt.targets import get_target
from tests.passes.prune.test_parts import GROUPED, SPLIT
from tests.rewriting import parse

WIDE = """g (float[N,12] x) => (float[N,5] y)
    <float[12,48] w1, float[48] b1, float[48,64] w2, float[64] b2, float[64,5] w3, float[5] b3> {
    a = Gemm(x, w1, b1)
    r = Relu(a)
    c = Gemm(r, w2, b2)
    s = Relu(c)
    y = Gemm(s, w3, b3)
}"""


@pytest.fixture
def samples(tmp_path: Path) -> Calibration:
    x = np.random.default_rng(0).standard_normal((60, 12)).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x)
    return Calibration(tmp_path / "s.npz")


def best(text: str, sparsity: str, calibration: Calibration | None) -> Slimming | None:
    model = load_model(parse(text))
    return best_slimming(model, Shapes(model), parse_sparsity(sparsity), calibration, 0)


def test_two_cuts_are_one() -> None:
    before = {"w": {0: np.array([1, 3, 5, 7])}}
    cut = {"w": {0: np.array([0, 2]), 1: np.array([1])}, "v": {0: np.array([4])}}
    made = composed(before, cut)
    assert {
        (name, axis): stay.tolist() for name, axes in made.items() for axis, stay in axes.items()
    } == {
        ("w", 0): [1, 5],
        ("w", 1): [1],
        ("v", 0): [4],
    }
    assert before["w"][0].tolist() == [1, 3, 5, 7]


def test_rounds_reach_the_share_and_fit_the_original(samples: Calibration) -> None:
    found = best(WIDE, "channels:0.6,rounds=4,importance=l2", samples)
    assert found is not None
    assert found.left <= 0.4
    weights = found.model.graph.initializers
    for name, axes in found.keep.items():
        if name in weights:
            shape = weights[name].const_value.shape  # type: ignore[union-attr]
            assert all(shape[axis] == len(stay) for axis, stay in axes.items())


def test_rounds_are_among_what_is_tried_from_a_share_on(
    samples: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def rounded(*args: object) -> None:
        asked.append(int(str(args[-1])))

    monkeypatch.setattr(trials, "_rounded", rounded)
    best(WIDE, "channels:0.5,importance=l2", samples)
    assert asked == []
    best(WIDE, "channels:0.6,importance=l2", samples)
    assert set(asked) == {trials.ROUNDS}
    best(WIDE, "channels:0.3,importance=l2,rounds=2", samples)
    assert asked[-1] == 2


CONVS = """g (float[N,4,6,6] x) => (float[N,5,6,6] y)
    <float[64,4,3,3] w1, float[64] b1, float[64,64,3,3] w2, float[64] b2, float[5,64,1,1] w3> {
    a = Conv<pads = [1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    c = Conv<pads = [1,1,1,1]>(r, w2, b2)
    s = Relu(c)
    y = Conv(s, w3)
}"""


@pytest.mark.parametrize("multiple", [1, 8, 16, 32])
def test_channels_stay_a_multiple_of_what_is_asked_for(multiple: int) -> None:
    wish = "" if multiple == 8 else f",multiple={multiple}"
    found = best(CONVS, f"channels:0.3,importance=l2{wish}", None)
    assert found is not None
    weights = found.model.graph.initializers
    left = [weights[name].const_value.numpy().shape[0] for name in ("w1", "w2")]  # type: ignore[union-attr]
    assert left != [64, 64]
    assert all(count % multiple == 0 for count in left)
    assert multiple != 1 or any(count % 8 for count in left)


@pytest.mark.parametrize(("target", "multiple"), [("cpu-amx", 16), ("cpu-avx2", 8), ("cuda", 8)])
def test_channels_stay_in_the_blocks_of_the_target(target: str, multiple: int) -> None:
    model = load_model(parse(CONVS))
    ctx = Context(model, get_target(target), Options(sparsity="channels:0.1"), Gate())
    ctx.pass_name = "prune"
    assert Prune().run(model, ctx)
    weights = model.graph.initializers
    left = [weights[name].const_value.numpy().shape[0] for name in ("w1", "w2")]  # type: ignore[union-attr]
    assert sum(left) == 128 - multiple


def test_where_blocks_are_too_large_channels_stay_in_eights() -> None:
    text = CONVS.replace("64,", "16,").replace("[64]", "[16]").replace(",64", ",16")
    request = dataclasses.replace(parse_sparsity("channels:0.3,importance=l2"), block=16)
    model = load_model(parse(text))
    found = best_slimming(model, Shapes(model), request, None, 0)
    assert found is not None
    assert found.left <= 0.7
    stated = dataclasses.replace(request, multiple=16)
    short = best_slimming(model, Shapes(model), stated, None, 0)
    assert short is not None
    assert short.classes == 0


def test_latency_is_measured(samples: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.1, 0.5, 0.2, 0.3, 0.29, 0.33])
    monkeypatch.setattr(trials, "_saved_time", lambda *_: next(times))
    found = best(WIDE, "channels:0.3,by=latency,importance=l2", samples)
    assert found is not None
    assert found.saved_time == 0.33
    assert 0.5 < 1 - found.left < 0.75


def test_latency_of_a_model_is_no_more_than_all_of_it(samples: Calibration) -> None:
    found = best(WIDE, "channels:0.1,by=latency,importance=l2", samples)
    assert found is not None
    assert found.saved_time < 1


def test_latency_needs_a_sample() -> None:
    with pytest.raises(OptionError, match="needs a sample to run"):
        best(WIDE, "channels:0.3,by=latency", None)


class TestFisher:
    def test_counts_what_the_answers_depend_on(self) -> None:
        pytest.importorskip("torch")
        fisher = pytest.importorskip("graphopt.distill.fisher")
        model = load_model(parse(WIDE))
        w3 = model.graph.initializers["w3"]
        array = np.array(w3.const_value.numpy())  # type: ignore[union-attr]
        array[7] = 0
        w3.const_value = ir.Tensor(array, name="w3")
        rng = np.random.default_rng(0)
        feeds = [{"x": rng.standard_normal((1, 12)).astype(np.float32)} for _ in range(8)]
        made = fisher.contributions(model, feeds, {"w1": 1, "w2": 1}, 0)
        assert {name: each.shape for name, each in made.items()} == {"w1": (8, 48), "w2": (8, 64)}
        assert not made["w2"][:, 7].any()
        assert made["w2"].any()

    def test_is_one_of_the_ways(self, samples: Calibration) -> None:
        pytest.importorskip("torch")
        found = best(WIDE, "channels:0.4,importance=fisher", samples)
        assert found is not None
        assert found.way.importance is Importance.FISHER

    def test_needs_samples(self) -> None:
        with pytest.raises(OptionError, match="needs samples"):
            best(WIDE, "channels:0.4,importance=fisher", None)

    def test_needs_torch(self, samples: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(OptionError, match="pip install"):
            best(WIDE, "channels:0.4,importance=fisher", samples)
        found = best(WIDE, "channels:0.4", samples)
        assert found is not None
        assert found.way.importance is not Importance.FISHER


@pytest.mark.parametrize("text", [GROUPED, SPLIT])
def test_a_cut_model_has_consistent_labels_again(text: str) -> None:
    found = best(text, "channels:0.6", None)
    assert found is not None
    made = load_model(found.model)
    labels = propagate(made, Shapes(made))
    assert all(axes is not None for axes in labels.axes.values())
