"""Training of what stays: nearer to the original, zeros kept; and where it is not begun, why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.prune import Prune, tuning
from graphopt_passes.prune.reconstruct import outputs
from graphopt_passes.prune.request import Tune, parse_sparsity

from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.rewrite import Calibration, Context, Gate, Options, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse

HEAD = "g (float[N,16] x) => (float[N,8] y) <float[16,64] w, float[64] b, float[64,64] u, float[64,64] v>"
NETWORK = """{
    a = MatMul(x, w)
    c = Add(a, b)
    d = Tanh(c)
    e = MatMul(d, u)
    f = Tanh(e)
    h = MatMul(f, v)
    i = Relu(h)
    n = Shape(i)
    r = Reshape(i, n)
    %s
}"""


def network(tail: str = "y = MatMul(r, z)", head: str = HEAD) -> ir.Model:
    """Three layers of random weights, and a classifier."""
    proto = parse(head.replace("v>", "v, float[64,8] z>") + NETWORK % tail)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        size = len(tensor.raw_data) // 4
        spread = 0.2 if size > 64 else 0.5
        tensor.raw_data = rng.normal(0, spread, size).astype(np.float32).tobytes()
    return load_model(proto)


def samples(count: int, seed: int = 1, rows: int = 0) -> list[dict[str, Any]]:
    """Inputs of rank 6; of `rows` rows each, or of none."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(6, 16))
    shape = (1, rows, 6) if rows else (1, 6)
    return [{"x": (rng.normal(size=shape) @ mixing).astype(np.float32)} for _ in range(count)]


def pruned(
    model: ir.Model, text: str, *, count: int = 80, distill: str | None = None, rows: int = 0
) -> tuple[ir.Model, Context]:
    options = Options(calibration=Calibration(samples(count, rows=rows)), distill=distill)
    ctx = Context(model, get_target("cpu"), options, Gate())
    ctx.pass_name = "prune"
    Prune(text).run(model, ctx)
    return model, ctx


def told(ctx: Context) -> str:
    return " ".join(remark.reason for remark in ctx.remarks)


def error(model: ir.Model) -> float:
    """Divergence of the answers to samples that nothing was fitted to."""
    feeds = samples(200, seed=9)
    want, got = (
        np.concatenate([each["y"] for each in outputs(m, feeds)]) for m in (network(), model)
    )
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (want, got))
    return float((p * np.log(p / q)).sum(-1).mean())


def share_of_zeros(model: ir.Model) -> list[float]:
    held = [model.graph.initializers[name].const_value for name in "wuvz"]
    return [float(np.mean(tensor.numpy() == 0)) for tensor in held if tensor is not None]


def test_training_brings_the_answers_nearer_and_keeps_the_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "STEPS", 160)
    monkeypatch.setattr(tuning, "FAR_STEPS", 160)
    fitted, _ = pruned(network(), "0.9,tune=no", count=160)
    trained, ctx = pruned(network(), "0.9", count=160)
    assert error(trained) < 0.9 * error(fitted)
    assert share_of_zeros(trained) == pytest.approx(share_of_zeros(fitted), abs=0.002)
    assert "steps of training what stays" in told(ctx)


def test_what_is_kept_is_never_farther_from_the_samples_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "RATE", 30.0)
    monkeypatch.setattr(tuning, "STEPS", 32)
    monkeypatch.setattr(tuning, "FAR_STEPS", 32)
    wild, _ = pruned(network(), "0.9")
    fitted, _ = pruned(network(), "0.9,tune=no")
    for name in "wuvz":
        one, other = (m.graph.initializers[name].const_value for m in (wild, fitted))
        assert one is not None
        assert other is not None
        assert np.array_equal(one.numpy(), other.numpy())


def test_what_forgets_the_samples_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 160)
    monkeypatch.setattr(tuning, "FAR_STEPS", 160)
    trained, ctx = pruned(network(), "0.9", count=160)
    monkeypatch.setattr(tuning, "FORGOTTEN", 0.0)
    kept, _ = pruned(network(), "0.9", count=160)
    fitted, _ = pruned(network(), "0.9,tune=no", count=160)
    one, other, least = (m.graph.initializers["u"].const_value for m in (trained, kept, fitted))
    assert one is not None
    assert other is not None
    assert least is not None
    assert np.array_equal(other.numpy(), least.numpy())
    assert not np.array_equal(one.numpy(), least.numpy())
    assert "steps of training what stays" in told(ctx)


def test_patterns_stay_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 32)
    monkeypatch.setattr(tuning, "FAR_STEPS", 32)
    model, ctx = pruned(network(), "2:4")
    tensor = model.graph.initializers["u"].const_value
    assert tensor is not None
    groups = tensor.numpy().T.reshape(64, -1, 4)
    assert int((groups != 0).sum(-1).max()) == 2
    assert "steps of training what stays" in told(ctx)


@pytest.mark.parametrize(
    ("text", "distill"),
    [("0.5", None), ("0.9,tune=no", None), ("0.9,refit=no", None), ("0.9", "yes")],
)
def test_is_not_begun_unasked(text: str, distill: str | None) -> None:
    _, ctx = pruned(network(), text, distill=distill)
    assert "train" not in told(ctx)


def test_is_begun_at_low_ratios_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 32)
    monkeypatch.setattr(tuning, "FAR_STEPS", 32)
    _, ctx = pruned(network(), "0.5,tune=yes")
    assert "steps of training what stays" in told(ctx)


@pytest.mark.parametrize(
    ("model", "count", "said"),
    [
        (network(), 39, "39 samples are too few: 40 are needed"),
        (
            network("m = Mod<fmod=1>(r, r) k = Add(m, r) y = MatMul(k, z)"),
            60,
            "no gradient is known of Mod",
        ),
        (
            network("q = Softmax(r) y = MatMul(q, z)", HEAD.replace("float[N", "float[1", 1)),
            60,
            "the model takes a fixed number of them",
        ),
    ],
)
def test_says_why_it_is_not_begun(model: ir.Model, count: int, said: str) -> None:
    _, ctx = pruned(model, "0.9,tune=yes", count=count)
    warnings = [r.reason for r in ctx.remarks if r.kind is RemarkKind.WARNING]
    assert any(said in reason for reason in warnings), told(ctx)
    _, ctx = pruned(network(), "0.9", count=39)
    assert all(r.kind is not RemarkKind.WARNING for r in ctx.remarks if "too few" in r.reason)


def test_large_models_are_not_trained_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "WORK", 1e3)
    _, ctx = pruned(network(), "0.9")
    assert "tune=yes does it all the same" in told(ctx)


def test_work_counts_the_positions_that_share_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "WORK", 2 * 3 * tuning.BATCH * tuning.LEAST_STEPS * 9728)
    _, ctx = pruned(network(), "0.9")
    assert "steps of training what stays" in told(ctx)
    rows = HEAD.replace("N,16", "N,5,16").replace("N,8", "N,5,8")
    _, ctx = pruned(network(head=rows), "0.9", rows=5)
    assert "tune=yes does it all the same" in told(ctx)


def test_runs_are_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 32)
    monkeypatch.setattr(tuning, "FAR_STEPS", 32)
    one, other = (pruned(network(), "0.9")[0] for _ in range(2))
    for name in "wuvz":
        a, b = (m.graph.initializers[name].const_value for m in (one, other))
        assert a is not None
        assert b is not None
        assert np.array_equal(a.numpy(), b.numpy())


def test_the_option_is_read() -> None:
    assert parse_sparsity("0.9,tune=no").tune is Tune.NO
    with pytest.raises(OptionError, match="unknown tune 'maybe'; choose one of auto, yes, no"):
        parse_sparsity("0.9,tune=maybe")


@pytest.mark.parametrize(("text", "steps"), [("0.95", 32), ("0.5,tune=yes", 16)])
def test_outputs_that_are_far_off_are_trained_for_longer(
    text: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "STEPS", 16)
    monkeypatch.setattr(tuning, "FAR_STEPS", 32)
    _, ctx = pruned(network(), text)
    assert f"{steps} steps of training what stays" in told(ctx)
