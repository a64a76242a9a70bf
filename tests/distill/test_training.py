"""Distillation with torch: what training does to a student, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.distill import Distill

from graphopt.distill.recover import distill
from graphopt.distill.settings import parse_settings
from graphopt.driver.distill import distil_file
from graphopt.emit.sparse import sparse_form
from graphopt.errors import DataError, ModelError
from graphopt.ir.model_file import load_model, model_to_bytes, save_model
from graphopt.ir.sparse import CooTensor
from graphopt.rewrite import Calibration, Context, Options
from graphopt.runtime.session import Session
from graphopt.targets import SparseStyle, get_target
from tests.rewriting import parse

torch = pytest.importorskip("torch", reason="distillation is tested where PyTorch is installed")

from graphopt.distill import train  # noqa: E402
from graphopt.distill.interpret import Interpreter, unsupported  # noqa: E402
from graphopt.distill.operators import OPERATORS  # noqa: E402

TEACHER = """g (float[N,8] x) => (float[N,4] y) <float[8,32] w1, float[32] b1, float[32,4] w2, float[4] b2> {
    h = Gemm(x, w1, b1)  r = Relu(h)  y = Gemm(r, w2, b2) }"""
DEEP = """g (float[N,8] x) => (float[N,4] y) <float[8,8] w1, float[8,8] w2, float[8,4] w3> {
    a = MatMul(x, w1)  r = Relu(a)  s = Add(r, x)  b = MatMul(s, w2)  q = Relu(b)  t = Add(q, s)  y = MatMul(t, w3) }"""


def network(text: str = TEACHER, seed: int = 0, *, sparse: float = 0.0) -> ir.Model:
    model = load_model(parse(text))
    rng = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = rng.standard_normal(value.const_value.shape.numpy()).astype(np.float32) / 2
        if array.ndim > 1:
            array[np.abs(array) < np.quantile(np.abs(array), sparse)] = 0
        value.const_value = ir.Tensor(array, name=name)
    return model


def samples(count: int = 60) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.standard_normal((1, 8)).astype(np.float32)} for _ in range(count)]


def weights(model: ir.Model) -> dict[str, np.ndarray[Any, Any]]:
    held = model.graph.initializers.items()
    return {n: v.const_value.numpy() for n, v in held if v.const_value is not None}


def error(teacher: ir.Model, student: ir.Model) -> float:
    rng = np.random.default_rng(9)
    feed = {"x": rng.standard_normal((200, 8)).astype(np.float32)}
    want, got = (Session(model_to_bytes(m)).run(feed)["y"] for m in (teacher, student))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_brings_a_pruned_student_nearer_and_keeps_its_zeros() -> None:
    teacher, student = network(), network(sparse=0.7)
    zeros = {name: array == 0 for name, array in weights(student).items()}
    before = error(teacher, student)
    seen: list[tuple[str, float | None]] = []
    history = distill(
        teacher,
        student,
        samples(),
        parse_settings("steps=80,lr=0.01"),
        progress=lambda stage, part: seen.append((stage, part)),
    )
    assert history.kept > 0
    assert history.parity < 1e-4
    assert error(teacher, student) < 0.9 * before
    for name, array in weights(student).items():
        if array.ndim > 1:
            np.testing.assert_array_equal(array == 0, zeros[name])
    assert seen[-1] == ("distill", 1.0)


def test_same_seed_gives_the_same_bits() -> None:
    made = []
    for _ in range(2):
        student = network(sparse=0.7)
        distill(network(), student, samples(), parse_settings("steps=10"))
        made.append(model_to_bytes(student))
    assert made[0] == made[1]


def nearly(teacher: ir.Model) -> ir.Model:
    """A student that something has fitted already: a little beside its teacher."""
    student = load_model(teacher)
    rng = np.random.default_rng(5)
    for name, value in student.graph.initializers.items():
        array = weights(teacher)[name]
        noise = 0.02 * rng.standard_normal(array.shape).astype(np.float32)
        value.const_value = ir.Tensor(array + noise, name=name)
    return student


def test_a_rate_that_is_too_high_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for worse in (float("inf"), 1.5):
        monkeypatch.setattr(train, "WORSE", worse)
        monkeypatch.setattr(train, "TRIED", 3 if worse < 2 else 100)
        teacher = network()
        student = nearly(teacher)
        before = error(teacher, student)
        history = distill(teacher, student, samples(), parse_settings("steps=96,lr=0.3,noise=0"))
        found[worse] = history.kept, error(teacher, student) / before
    assert found[float("inf")] == (0, 1.0)
    assert found[1.5][0] > 0
    assert found[1.5][1] < 0.9


@pytest.mark.parametrize(
    ("judged", "since", "told"),
    [
        ([1.0, 1.6], 0, True),
        ([1.0, 0.5, 0.8], 0, True),
        ([1.0, 0.5, 0.7], 0, False),
        ([1.0, 1.1, 1.1], 0, False),
        ([1.0, 1.1, 1.1, 1.1], 0, True),
        ([1.0, 1.1, 1.1, 1.1, 1.2], 3, False),
    ],
)
def test_a_rate_is_too_high_where_the_loss_jumps_or_nothing_is_gained(
    judged: list[float], since: int, told: bool
) -> None:
    assert train._is_too_fast(list(enumerate(judged)), since) is told


def test_leaves_a_student_as_it_was_that_training_makes_no_better() -> None:
    student = network()
    before = model_to_bytes(student)
    history = distill(network(), student, samples(), parse_settings("steps=4,lr=1"))
    assert history.kept == 0
    assert "nothing was changed" in history.sentences()[0]
    assert model_to_bytes(student) == before


def test_block_by_block_and_with_features() -> None:
    for settings in ("steps=60,lr=0.01,mode=blocks", "steps=60,lr=0.01,features=0.5"):
        teacher, student = network(DEEP), network(DEEP, sparse=0.5)
        before = error(teacher, student)
        distill(teacher, student, samples(), parse_settings(settings))
        assert error(teacher, student) < before


def test_refuses_blocks_that_nobody_shares() -> None:
    with pytest.raises(DataError, match="share no residual sums"):
        distill(network(), network(), samples(), parse_settings("mode=blocks"))


def test_refuses_blocks_that_were_slimmed() -> None:
    """The first sum has two channels less than the teacher's."""
    narrow = """g (float[N,8] x) => (float[N,4] y) <float[8,6] w0, float[6,6] w1, float[6,4] w3> {
        z = MatMul(x, w0)  a = MatMul(z, w1)  r = Relu(a)  s = Add(r, z)  y = MatMul(s, w3) }"""
    settings = parse_settings("steps=2,mode=blocks")
    with pytest.raises(DataError, match="by name and shape"):
        distill(network(DEEP), network(narrow), samples(), settings)


def test_another_student_learns_too() -> None:
    small = TEACHER.replace("32", "12")
    teacher, student = network(), network(small, seed=5)
    before = error(teacher, student)
    distill(teacher, student, samples(), parse_settings("steps=100,lr=0.02"))
    assert error(teacher, student) < 0.7 * before


def test_a_student_begins_with_the_teachers_weights_where_that_is_nearer() -> None:
    teacher, student = network(), network(seed=5)
    found = distill(teacher, student, samples(), parse_settings("steps=1,lr=1e-9,transfer=yes"))
    assert found.transferred == 4
    assert error(teacher, student) < 1e-6
    assert found.sentences()[0].startswith("4 constants taken from the original")


def test_a_student_that_fits_better_keeps_its_own_weights() -> None:
    teacher = network()
    student = network(sparse=0.5)
    distill(teacher, student, samples(), parse_settings("steps=100"))  # fitted to its zeros
    before = weights(student)
    found = distill(teacher, student, samples(), parse_settings("steps=1,lr=1e-9,transfer=yes"))
    assert found.transferred is None
    assert "nearer to it with its own" in found.sentences()[0]
    for name, numbers in weights(student).items():
        assert np.allclose(numbers, before[name], atol=1e-6)
        assert ((numbers == 0) == (before[name] == 0)).all()


QUANTISED = """g (float[N,8] x) => (float[N,4] y)
    <int8[8,4] q, float[4] s = {0.02,0.02,0.02,0.02}, int8[4] z = {0,0,0,0}, float a = {0.05}, uint8 m = {128}> {
    xq = QuantizeLinear(x, a, m)  xd = DequantizeLinear(xq, a, m)
    w = DequantizeLinear<axis=1>(q, s, z)  y = MatMul(xd, w) }"""


def test_trains_through_rounding_and_keeps_zeros_on_the_grid() -> None:
    teacher = load_model(
        parse("g (float[N,8] x) => (float[N,4] y) <float[8,4] w> { y = MatMul(x, w) }")
    )
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((8, 4)).astype(np.float32)
    teacher.graph.initializers["w"].const_value = ir.Tensor(wide, name="w")
    student = load_model(parse(QUANTISED))
    rough = np.clip(np.rint(wide / 0.02 + 15 * rng.standard_normal((8, 4))), -127, 127).astype(
        np.int8
    )
    rough[0] = 0
    student.graph.initializers["q"].const_value = ir.Tensor(rough, name="q")
    before = error(teacher, student)
    history = distill(teacher, student, samples(), parse_settings("steps=150,lr=0.02"))
    assert history.kept > 0
    assert error(teacher, student) < before
    after = weights(student)["q"]
    assert after.dtype == np.int8
    assert not after[0].any()


def test_refuses_operators_that_it_does_not_know() -> None:
    text = "g (float[N,8] x) => (float[N,8] y) <float[8] w> { a = Mul(x, w)  b = Shrink(a) y = Shrink(b) }"
    model = load_model(parse(text))
    assert {name: len(nodes) for name, nodes in unsupported(model).items()} == {"Shrink": 2}
    with pytest.raises(ModelError, match=r"does not know 2 x Shrink \(-> b\)"):
        distill(model, load_model(parse(text)), samples(), parse_settings("steps=1"))


def test_refuses_forms_that_it_does_not_know() -> None:
    text = """g (float[N,1,4] x) => (float[N,1,4] y) <float[4] w> {
        a = Mul(x, w)  y = AveragePool<kernel_shape=[1], ceil_mode=1>(a) }"""
    feeds = [{"x": np.full((1, 1, 4), i, np.float32)} for i in range(8)]
    with pytest.raises(ModelError, match="does not know this form"):
        distill(load_model(parse(text)), load_model(parse(text)), feeds, parse_settings("steps=1"))


@pytest.mark.parametrize("sparse", [0.9, 0.1])
def test_a_student_that_came_sparse_is_written_sparse(tmp_path: Path, sparse: float) -> None:
    wide = TEACHER.replace("32", "256")
    teacher, student = network(wide), network(wide, seed=2, sparse=sparse)
    save_model(teacher, tmp_path / "teacher.onnx")
    save_model(sparse_form(student, SparseStyle.INITIALIZER)[0], tmp_path / "student.onnx")
    distil_file(
        tmp_path / "teacher.onnx",
        tmp_path / "student.onnx",
        tmp_path / "made.onnx",
        Calibration(samples()),
        "steps=30,lr=0.01",
    )
    held = load_model(tmp_path / "made.onnx").graph.initializers["w2"].const_value
    assert held is not None
    assert isinstance(held, CooTensor) == (sparse == 0.9)
    assert not np.array_equal(held.numpy(), weights(student)["w2"])


def test_refuses_a_student_without_weights() -> None:
    text = "g (float[N,8] x) => (float[N,8] y) { y = Relu(x) }"
    with pytest.raises(ModelError, match="no weights that can be trained"):
        distill(load_model(parse(text)), load_model(parse(text)), samples(), parse_settings("yes"))


def test_refuses_where_the_interpreter_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "Relu", lambda call: call.x)
    with pytest.raises(ModelError, match="computes output 'y' otherwise"):
        distill(network(), network(), samples(), parse_settings("steps=1"))


def test_a_model_that_amplifies_rounding_is_allowed_what_it_moves_by_itself() -> None:
    """A unit in the last place of x is a radian's thousandth of ten thousand times x."""
    text = """g (float[N,8] x) => (float[N,4] y) <float[8] huge, float[8,4] w> {
        a = Mul(x, huge)  b = Sin(a)  y = MatMul(b, w) }"""
    model = load_model(parse(text))
    model.graph.initializers["huge"].const_value = ir.Tensor(
        np.full(8, 1e4, np.float32), name="huge"
    )
    session, feeds = Session(model_to_bytes(model)), samples(4)

    class Off(Interpreter):
        by = 1.0

        def run(self, *given: Any) -> dict[str, Any]:
            return {name: value * self.by for name, value in super().run(*given).items()}

    interpreter = Off(model)
    interpreter.by = 1.001
    assert train.parity(model, interpreter, feeds, session.run) > 1e-4
    interpreter.by = 1.1
    with pytest.raises(ModelError, match="otherwise than ONNX Runtime"):
        train.parity(model, interpreter, feeds, session.run)
    steady = network()
    interpreter = Off(steady)
    interpreter.by = 1.001
    with pytest.raises(ModelError, match="otherwise than ONNX Runtime"):
        train.parity(steady, interpreter, feeds, Session(model_to_bytes(steady)).run)


def test_refuses_a_teacher_without_float_outputs() -> None:
    text = "g (float[N,8] x) => (int64[N] y) { y = ArgMax<axis=1, keepdims=0>(x) }"
    with pytest.raises(DataError, match="no output of the teacher is a float"):
        distill(load_model(parse(text)), load_model(parse(text)), samples(), parse_settings("yes"))


def holed(feeds: list[dict[str, Any]], at: int) -> list[dict[str, Any]]:
    """Samples, one more among them that holds a NaN."""
    hole = {"x": np.where(np.arange(8) == 3, np.nan, feeds[0]["x"]).astype(np.float32)}
    return [*feeds[:at], hole, *feeds[at:]]


def test_a_file_is_not_trained_on_samples_without_numbers(tmp_path: Path) -> None:
    save_model(network(), tmp_path / "teacher.onnx")
    save_model(network(sparse=0.5), tmp_path / "student.onnx")
    made = []
    for name, feeds in (("plain", samples()), ("holed", holed(samples(), 4))):
        done = distil_file(
            tmp_path / "teacher.onnx",
            tmp_path / "student.onnx",
            tmp_path / f"{name}.onnx",
            Calibration(feeds),
            "steps=32",
        )
        made.append((done, load_model(tmp_path / f"{name}.onnx")))
    (plain, one), (found, other) = made
    assert plain.left_out == ()
    assert "of 'sample 4'; the sample is left out" in found.left_out[0]
    for name, array in weights(one).items():
        np.testing.assert_array_equal(array, weights(other)[name])


def test_the_pass_is_not_trained_on_samples_without_numbers() -> None:
    made, told = [], []
    for feeds in (samples(), holed(samples(), 9)):
        options = Options(distill="steps=32", calibration=Calibration(feeds))
        student = network(sparse=0.5)
        ctx = Context(student, get_target("cpu"), options, original=network)
        ctx.pass_name = "distill"
        assert Distill().run(student, ctx)
        made.append(weights(student))
        told.append([each.reason for each in ctx.remarks if "NaN" in each.reason])
    assert told[0] == []
    assert "of 'sample 9'; the sample is left out" in told[1][0]
    for name, array in made[0].items():
        np.testing.assert_array_equal(array, made[1][name])
    holes = Options(distill="steps=32", calibration=Calibration(holed(samples(1), 0)[:1]))
    ctx = Context(network(sparse=0.5), get_target("cpu"), holes, original=network)
    with pytest.raises(DataError, match="every calibration sample holds NaN or infinities"):
        Distill().run(ctx.model, ctx)
