"""The parts of distillation that need no torch: settings, losses, batches, what is trained, what is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.distill import recover
from graphopt.distill.batches import can_join, divide, grouped, mixed, noisy, spreads, unseen
from graphopt.distill.history import History
from graphopt.distill.losses import distance, divergence, logit_outputs, normalized_error, rate_at
from graphopt.distill.settings import Mode, Schedule, Settings, parse_settings
from graphopt.distill.teacher import check_same_interface, shared_sums
from graphopt.distill.transfer import transfer
from graphopt.distill.weights import find_weights
from graphopt.errors import DataError, OptionError
from graphopt.ir.model_file import load_model
from graphopt.report.curves import loss_plot
from tests.rewriting import parse

HISTORY = History(
    steps=20,
    samples=80,
    held_out=20,
    parameters=100,
    parity=1e-7,
    losses=((1, 0.5), (20, 0.25)),
    judged=((0, 0.5), (10, 0.2), (20, 0.3)),
    kept=10,
    measure="divergence of the outputs",
)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def samples(count: int, shape: tuple[int, ...] = (1, 4)) -> list[dict[str, Any]]:
    return [{"x": rng().standard_normal(shape).astype(np.float32) + i} for i in range(count)]


class TestSettings:
    def test_reads_what_is_written(self) -> None:
        text = "steps=40,lr=3e-4,schedule=linear,mode=blocks,transfer=yes,held-out=0.3"
        found = parse_settings(text)
        assert found == Settings(
            steps=40,
            rate=3e-4,
            schedule=Schedule.LINEAR,
            mode=Mode.BLOCKS,
            transfer=True,
            held_out=0.3,
        )
        assert parse_settings("yes") == Settings()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("steps=many", "is not a number"),
            ("steps=0", "must lie in"),
            ("schedule=wavy", "is no setting with value 'wavy'"),
            ("speed=3", "'speed' is no setting"),
            ("transfer=maybe", "is no setting"),
        ],
    )
    def test_refuses_others_with_a_remedy(self, text: str, said: str) -> None:
        with pytest.raises(OptionError, match=said):
            parse_settings(text)


class TestLosses:
    def test_divergence_is_zero_for_shifted_logits_and_grows(self) -> None:
        logits = rng().standard_normal((5, 7))
        assert divergence(logits, logits + 3, 2.0) < 1e-12
        assert divergence(logits, logits * 2, 2.0) < divergence(logits, logits * 4, 2.0)

    def test_error_is_relative_to_the_spread(self) -> None:
        want = rng().standard_normal(100)
        assert normalized_error(want, want) == 0
        assert normalized_error(100 * want, 100 * want + 1) < normalized_error(want, want + 1)
        assert abs(normalized_error(want, np.full(100, want.mean())) - 1) < 1e-9

    def test_classes_are_told_from_embeddings_by_what_makes_them(self) -> None:
        outputs = {name: np.zeros((8, 10), np.float32) for name in ("a", "b", "c")}
        tails = {"a": "Gemm", "b": "Tanh", "c": "Softmax"}
        assert logit_outputs(outputs, tails) == {"a", "c"}
        assert logit_outputs({"a": np.zeros((8, 3, 10), np.float32)}, tails) == frozenset()

    def test_distance_sums_outputs_and_skips_integers(self) -> None:
        one = {"y": np.array([[1.0, 2.0, 4.0]]), "k": np.array([3])}
        other = {"y": np.array([[1.0, 2.0, 5.0]]), "k": np.array([9])}
        assert distance([one], [one], {}, 2.0) == 0
        assert distance([one], [other], {"y": "Gemm"}, 2.0) == divergence(one["y"], other["y"], 2.0)

    @pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
    def test_rates_start_at_one_and_do_not_rise(self, schedule: str) -> None:
        rates = [rate_at(step, 100, schedule) for step in range(100)]
        assert rates[0] == 1
        assert all(a >= b for a, b in pairwise(rates))
        assert (rates[-1] < 0.2) == (schedule != "constant")


class TestBatches:
    def test_divides_by_lot_without_overlap(self) -> None:
        found = divide(samples(20), 0.2, rng())
        assert (len(found.train), len(found.held_out)) == (16, 4)
        assert not {id(s) for s in found.train} & {id(s) for s in found.held_out}

    def test_refuses_too_few(self) -> None:
        with pytest.raises(DataError, match="4 samples are too few"):
            divide(samples(4), 0.2, rng())

    def test_joins_only_equal_shapes(self) -> None:
        assert can_join(samples(3))
        assert not can_join([*samples(1), *samples(1, (1, 5))])
        assert [len(feed["x"]) for feed in grouped(samples(5), 2, joined=True)] == [2, 2, 1]
        assert len(grouped(samples(5), 2, joined=False)) == 5

    def test_noise_and_mixing_change_floats_and_leave_words(self) -> None:
        words = {"ids": np.arange(4).reshape(4, 1)}
        assert mixed(words, 1.0, rng()) is words
        assert noisy(words, {}, rng())["ids"] is words["ids"]
        floats = grouped(samples(8), 8, joined=True)[0]
        made = mixed(floats, 1.0, rng())["x"]
        assert made.dtype == np.float32
        assert made.min() >= floats["x"].min()
        assert not np.array_equal(made, floats["x"])
        assert spreads(samples(3), 0.1)["x"] > 0

    def test_judges_by_more_than_what_was_held_out(self) -> None:
        held = samples(6)
        assert len(unseen(held, spreads(held, 0.1), rng())) == 30
        words = [{"ids": np.array([[i]])} for i in range(6)]
        assert len(unseen(words, {}, rng())) == 6


class TestWeights:
    TEXT = """g (float[N,4] x) => (float[N,3] y)
        <float[4,8] w, float[8] b, float[8,3] v, float low, float high, float[1,8] mask> {
        h = Gemm(x, w, b)
        c = Clip(h, low, high)
        m = Add(c, mask)
        y = MatMul(m, v)
    }"""

    def model(self) -> ir.Model:
        made = load_model(parse(self.TEXT))
        self.put(made, "v", np.where(np.arange(24).reshape(8, 3) % 2, 0.0, 0.5))
        self.put(made, "mask", np.full((1, 8), -1e9))
        return made

    def put(self, model: ir.Model, name: str, array: np.ndarray[Any, Any]) -> None:
        model.graph.initializers[name].const_value = ir.Tensor(array.astype(np.float32), name=name)

    def test_trains_what_multiplies_and_shifts_and_nothing_else(self) -> None:
        assert [each.name for each in find_weights(self.model().graph)] == ["w", "b", "v"]

    def test_keeps_zeros_of_matrices_when_storing(self) -> None:
        model = self.model()
        weight = find_weights(model.graph)[2]
        assert weight.mask is not None
        weight.store(np.full((8, 3), -1.0))
        tensor = model.graph.initializers["v"].const_value
        assert tensor is not None
        stored = tensor.numpy()
        assert (stored == 0).sum() == 12
        assert not np.signbit(stored[stored == 0]).any()

    def test_integers_stay_on_their_grid(self) -> None:
        text = """g (float[N,4] x) => (float[N,3] y) <int8[4,3] q, float[3] s, int8[3] z> {
            w = DequantizeLinear<axis=1>(q, s, z)  y = MatMul(x, w) }"""
        model = load_model(parse(text))
        weight = find_weights(model.graph)[0]
        before = weight.value.const_value
        assert before is not None
        weight.store(weight.start)
        after = weight.value.const_value
        assert after is not None
        np.testing.assert_array_equal(after.numpy(), before.numpy())
        weight.store(weight.start + 1e6)
        after = weight.value.const_value
        assert after is not None
        assert after.numpy().max() == 127


class TestTeacher:
    def test_refuses_a_student_with_other_outputs(self) -> None:
        one = load_model(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }"))
        other = load_model(parse("g (float[N] x) => (float[N] z) { z = Relu(x) }"))
        with pytest.raises(DataError, match="different outputs"):
            check_same_interface(one, other)

    def test_finds_the_residual_sums_of_both(self) -> None:
        text = """g (float[N,4] x) => (float[N,4] y) <float[4] b> {
            a = Relu(x)  s = Add(a, x)  t = Add(s, b)  u = Add(t, s)  y = Relu(u) }"""
        one, other = load_model(parse(text)), load_model(parse(text.replace("u", "v")))
        assert shared_sums(one, one) == ("s", "u")
        assert shared_sums(one, other) == ("s",)


class TestHistory:
    def test_says_what_it_brought(self) -> None:
        assert (HISTORY.before, HISTORY.after) == (0.5, 0.2)
        assert "went from 0.5 to 0.2 (best at step 10)" in HISTORY.sentences()[0]

    def test_draws_every_judgement(self) -> None:
        drawn = loss_plot(HISTORY)
        assert drawn.count("<circle") == 3
        assert drawn.count('class="ok"') == 1


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(OptionError, match=r"pip install 'graphopt\[distill\]'"):
        recover.require_torch()


def test_core_does_not_import_torch() -> None:
    code = (
        "import sys, graphopt, graphopt.driver, graphopt_passes; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def network(arrays: dict[str, Any]) -> ir.Model:
    text = "g (float[N,2] x) => (float[N,2] y) <float[2,2] a, float[2,2] b, float[2] c> {\n"
    text += "p = MatMul(x, a) q = MatMul(p, b) y = Add(q, c) }"
    model = load_model(parse(text))
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.Tensor(np.float32(array), name=name)
    return model


def test_transfer_keeps_zeros_of_matrices_but_not_of_what_is_all_zero() -> None:
    full = {"a": [[1, 2], [3, 4]], "b": [[5, 6], [7, 8]], "c": [9, 10]}
    student = network({"a": [[1, 0], [0, 1]], "b": [[0, 0], [0, 0]], "c": [0, 1]})
    assert transfer(network(full), student) == 3
    held = {n: v.const_value for n, v in student.graph.initializers.items()}
    made = {n: tensor.numpy().tolist() for n, tensor in held.items() if tensor is not None}
    assert made == {"a": [[1, 0], [0, 4]], "b": full["b"], "c": full["c"]}


@pytest.mark.parametrize(
    ("transferred", "kept", "said"),
    [
        (0, 0, ["so nothing was changed"]),
        (3, 0, ["3 constants taken", "so nothing else was changed"]),
        (None, 10, ["were not taken", "best at step 10"]),
    ],
)
def test_tells_what_came_from_the_teacher(
    transferred: int | None, kept: int, said: list[str]
) -> None:
    told = dataclasses.replace(HISTORY, transferred=transferred, kept=kept).sentences()
    assert len(told) == len(said)
    assert all(part in sentence for part, sentence in zip(said, told, strict=True))
