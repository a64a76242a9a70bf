"""Large matrices as products of two narrow ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphopt_passes.prune import Prune, lowrank
from graphopt_passes.prune.lowrank import factors
from graphopt_passes.prune.request import parse_sparsity

from graphopt.errors import DataError, OptionError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.rewrite import Calibration, Context, Options, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse

PAIR = """g (float[N,4,160] x) => (float[N,4,144] y)
    <float[160,192] w1, float[192] b, float[192,144] w2> {
    h = MatMul(x, w1)
    s = Add(h, b)
    r = Relu(s)
    y = MatMul(r, w2)
}"""
GEMM = """g (float[N,160] x) => (float[N,144] y) <float[144,160] w1, float[144] b> {
    y = Gemm<transB=1>(x, w1, b)
}"""


def narrow(rows: int, columns: int, rank: int, noise: float) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(rows)
    plain = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns)) / np.sqrt(rank)
    made = plain + noise * rng.standard_normal((rows, columns))
    return np.asarray(made, np.float32)


def given(text: str, noise: float = 0.01, rank: int = 8) -> ir.Model:
    model = load_model(parse(text))
    for name in ("w1", "w2"):
        value = model.graph.initializers.get(name)
        if value is not None and value.shape is not None:
            rows, columns = value.shape.numpy()
            value.const_value = ir.Tensor(narrow(rows, columns, rank, noise), name=name)
    return model


def run(model: ir.Model, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = ort.InferenceSession(model_to_bytes(model), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products are always the faster ones."""
    monkeypatch.setattr(lowrank, "_speed", lambda *_: 2.0)


def context(model: ir.Model, sparsity: str, samples: Path | None = None) -> Context:
    calibration = None if samples is None else Calibration(samples)
    options = Options(sparsity=sparsity, calibration=calibration)
    return Context(model, get_target("cpu"), options=options)


@pytest.mark.parametrize("text", [PAIR, GEMM])
@pytest.mark.usefixtures("fast")
def test_outputs_stay_within_the_error(text: str) -> None:
    model = given(text)
    shape = (6, *(int(str(d)) for d in list(model.graph.inputs[0].shape or ())[1:]))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    want = run(model, x)
    count = len(model.graph)
    ctx = context(model, "lowrank:0.05")
    assert Prune().run(model, ctx)
    assert len(model.graph) > count
    error = float(np.sqrt(np.square(run(model, x) - want).mean() / np.square(want).mean()))
    assert 0 < error < 0.1
    assert any("no samples" in remark.reason for remark in ctx.remarks)


@pytest.mark.usefixtures("fast")
def test_directions_that_inputs_never_take_cost_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 8)) @ rng.standard_normal((8, 160))).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x)
    blind, seen = given(GEMM, noise=1.0), given(GEMM, noise=1.0)
    assert not Prune().run(blind, context(blind, "lowrank:0.05"))
    want = run(seen, x)
    assert Prune().run(seen, context(seen, "lowrank:0.05", tmp_path / "s.npz"))
    error = float(np.sqrt(np.square(run(seen, x) - want).mean() / np.square(want).mean()))
    assert error < 0.06


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("text", [GEMM, GEMM.replace(", b)", ")")])
def test_error_holds_for_inputs_that_were_not_fitted_to(tmp_path: Path, text: str) -> None:
    """Forty inputs span forty directions of 160: a product of rank 40 is right for them, and for no others."""
    x = np.random.default_rng(0).standard_normal((40, 160)).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x)
    model = given(text, noise=1.0)
    ctx = context(model, "lowrank:0.1", tmp_path / "s.npz")
    assert not Prune().run(model, ctx)
    assert any("10.0% on samples held out takes rank" in remark.reason for remark in ctx.remarks)


@pytest.mark.usefixtures("fast")
def test_says_when_samples_are_too_few_to_judge_by(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((9, 160)).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x)
    model = given(GEMM, noise=1.0)
    ctx = context(model, "lowrank:0.1", tmp_path / "s.npz")
    assert Prune().run(model, ctx)
    assert any("too few samples to hold some out" in remark.reason for remark in ctx.remarks)


@pytest.mark.usefixtures("fast")
def test_what_a_bias_makes_up_for_hides_no_error(tmp_path: Path) -> None:
    """Inputs far from zero: the outputs stay within the error about their means, and so do the means."""
    x = (np.random.default_rng(0).standard_normal((400, 160)) + 50).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x)
    model = given(GEMM, noise=0.1)
    want = run(model, x)
    assert Prune().run(model, context(model, "lowrank:0.1", tmp_path / "s.npz"))
    got = run(model, x)
    spread = want - want.mean(0)
    assert np.abs(got.mean(0) - want.mean(0)).max() < 0.02 * np.sqrt(np.square(spread).mean())
    assert np.sqrt(np.square(got - want).mean() / np.square(spread).mean()) < 0.12


def test_declines_what_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_speed", lambda *_: 1.0)
    model = given(PAIR)
    ctx = context(model, "lowrank:0.05")
    assert not Prune().run(model, ctx)
    assert any(
        remark.kind is RemarkKind.MISSED and "as fast here" in remark.reason
        for remark in ctx.remarks
    )


def test_speed_is_measured() -> None:
    matrix = narrow(1024, 1024, 4, 0.0)
    made = factors(matrix.astype(np.float64), None, 0.01)
    assert made.rank == 4
    assert lowrank._speed(matrix, made, 64) > 1


@pytest.mark.usefixtures("fast")
def test_declines_what_takes_a_high_rank() -> None:
    model = given(PAIR, noise=1.0)
    ctx = context(model, "lowrank:0.05")
    assert not Prune().run(model, ctx)
    assert any("takes rank" in remark.reason for remark in ctx.remarks)


@pytest.mark.usefixtures("fast")
def test_leaves_small_and_named_matrices() -> None:
    small = given(PAIR.replace("160", "16").replace("192", "24").replace("144", "12"))
    ctx = context(small, "lowrank:0.05")
    assert not Prune().run(small, ctx)
    assert any("no matrix of" in remark.reason for remark in ctx.remarks)
    named = given(PAIR)
    assert Prune().run(named, context(named, "lowrank:0.05,dense=^w1$"))
    assert [node.op_type for node in named.graph] == ["MatMul", "Add", "Relu", "MatMul", "MatMul"]


def test_rank_is_the_least_that_holds() -> None:
    values = np.diag([4.0, 2.0, 1.0, 0.5])
    total = np.sqrt(np.square([4.0, 2.0, 1.0, 0.5]).sum())
    for error, rank in ((1.2 / total, 2), (1.0 / total, 3), (0.9, 1)):
        made = factors(values, None, error)
        assert (made.rank, made.error <= error) == (rank, True)
        assert np.linalg.norm(values - made.first @ made.second) / total <= error + 1e-9


@pytest.mark.parametrize("text", ["lowrank:0", "lowrank:1.5", "lowrank:x"])
def test_refuses_what_is_no_error(text: str) -> None:
    with pytest.raises(OptionError, match="lowrank"):
        parse_sparsity(text)


def learnt(feeds: list[dict[str, npt.NDArray[np.float32]]]) -> tuple[ir.Model, list[str]]:
    """A matrix split after such samples, and the warnings."""
    model = given(GEMM, noise=1.0)
    options = Options(sparsity="lowrank:0.05", calibration=Calibration(feeds))
    ctx = Context(model, get_target("cpu"), options=options)
    assert Prune().run(model, ctx)
    return model, [each.reason for each in ctx.remarks if each.kind is RemarkKind.WARNING]


@pytest.mark.usefixtures("fast")
def test_samples_without_numbers_are_left_out() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 8)) @ rng.standard_normal((8, 160))).astype(np.float32)
    feeds = [{"x": row[None]} for row in x]
    hole = {"x": np.full((1, 160), np.inf, np.float32)}
    plain, said = learnt(feeds)
    found, told = learnt([*feeds[:7], hole, *feeds[7:]])
    assert not any("infinite" in each for each in said)
    assert any("of 'sample 7'; the sample is left out" in each for each in told)
    for name, value in plain.graph.initializers.items():
        other = found.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())
    with pytest.raises(DataError, match="every calibration sample holds NaN or infinities"):
        learnt([hole, hole])
