"""The pass: zeros where asked for, the dense model matched, and what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphopt_passes.prune import Prune, weights
from graphopt_passes.prune.layers import find_layers
from graphopt_passes.prune.request import Method, parse_sparsity
from graphopt_passes.prune.samples import read_feeds

import graphopt
from graphopt.calibrate.screening import Screening
from graphopt.errors import OptionError
from graphopt.ir import sparse
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.sparse import MaskedTensor
from graphopt.rewrite import Calibration, Context, Gate, Options, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse

NETWORK = """g (float[N,8,6,6] x) => (float[N,4] y)
    <float[32,8,3,3] w1, float[32] b1, float[64,32,3,3] w2, float[64] b2,
     float[64,64] w3, float[64] b3, float[64,4] w4> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    c = Conv(r, w2, b2)
    s = Relu(c)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    h = MatMul(f, w3)
    i = Add(h, b3)
    t = Relu(i)
    y = MatMul(t, w4)
}"""


def network(text: str = NETWORK) -> ir.Model:
    """The network with weights around zero."""
    proto = parse(text)
    for tensor in proto.graph.initializer:
        array = np.frombuffer(tensor.raw_data, np.float32) - 1
        tensor.raw_data = array.astype(np.float32).tobytes()
    return load_model(proto)


def samples(count: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(count)]


def context(
    model: ir.Model, sparsity: str | None, *, blind: bool = False, gate: Gate | None = None
) -> Context:
    calibration = None if blind else Calibration(samples())
    options = Options(sparsity=sparsity, calibration=calibration)
    ctx = Context(model, get_target("cpu"), options, gate or Gate())
    ctx.pass_name = "prune"
    return ctx


def zeros(model: ir.Model) -> float:
    tensors = [layer.tensor.numpy() for layer in find_layers(model.graph)]
    return float(sum((t == 0).sum() for t in tensors) / sum(t.size for t in tensors))


def outputs(model: ir.Model) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(model_to_bytes(model), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in samples(60)[40:]])


def loss(text: str, *, blind: bool = False) -> float:
    """Error on samples that pruning has not seen."""
    model = network()
    want = outputs(model)
    assert Prune().run(model, context(model, text, blind=blind))
    return float(np.linalg.norm(outputs(model) - want) / np.linalg.norm(want))


def test_does_nothing_unasked() -> None:
    model = network()
    ctx = context(model, None)
    before = model_to_bytes(model)
    assert not Prune().run(model, ctx)
    assert model_to_bytes(model) == before
    assert not ctx.remarks


@pytest.mark.parametrize(
    "text", ["0.5", "0.8", "0.95", "0.8,method=wanda", "0.8,allocation=erk", "0.8,refit=no"]
)
def test_reaches_the_share_of_zeros(text: str) -> None:
    model = network()
    assert Prune().run(model, context(model, text))
    assert abs(zeros(model) - float(text.split(",", maxsplit=1)[0])) < 0.006
    assert not list(violations(model))


def test_samples_keep_what_magnitude_alone_loses() -> None:
    assert loss("0.7") < 0.6 * loss("0.7", blind=True)


def test_warns_without_samples() -> None:
    model = network()
    ctx = context(model, "0.5,method=sparsegpt", blind=True)
    assert Prune().run(model, ctx)
    said = [remark.reason for remark in ctx.remarks if remark.kind is RemarkKind.WARNING]
    assert any("no samples" in reason for reason in said)
    assert any("method=sparsegpt needs samples" in reason for reason in said)


def test_leaves_the_classifier_dense_and_says_so() -> None:
    model = network()
    ctx = context(model, "0.8")
    Prune().run(model, ctx)
    missed = {r.node: r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED}
    assert "it has only 256 weights" in missed["y"]
    assert (model.graph.initializers["w4"].const_value.numpy() != 0).all()  # type: ignore[union-attr]


BLOCKS = """g (float[N,16] x) => (float[N,16] y)
    <float[16,64] up1, float[64,16] down1, float[16,64] up2, float[64,16] down2> {
    a = MatMul(x, up1)  r = Relu(a)  b = MatMul(r, down1)  s = Add(b, x)
    c = MatMul(s, up2)  t = Relu(c)  d = MatMul(t, down2)  y = Add(d, s)
}"""


def test_blocks_that_end_in_residual_sums_are_no_classifiers() -> None:
    assert not any(layer.dense for layer in find_layers(network(BLOCKS).graph))


def test_a_classifier_behind_residual_sums_is_one() -> None:
    text = BLOCKS.replace("y = Add(d, s)", "u = Add(d, s)  y = MatMul(u, head)")
    text = text.replace("float[N,16] y)", "float[N,4] y)").replace(
        "<float", "<float[16,4] head, float", 1
    )
    found = {layer.name: layer.dense for layer in find_layers(network(text).graph)}
    assert [name for name, dense in found.items() if dense] == ["head"]


@pytest.mark.parametrize(("width", "count"), [(64, 2), (8192, 5)])
def test_samples_of_large_models_run_few_at_a_time(width: int, count: int) -> None:
    model = network(
        f"g (float[N,2048] x) => (float[N,{width}] y) <float[2048,{width}] w> {{ y = MatMul(x, w) }}"
    )
    given = [{"x": np.zeros((1, 2048), np.float32)} for _ in range(40)]
    assert len(read_feeds(model, Calibration(given), Screening())) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "g (float[N,64] x, float[64,64] w) => (float[N,64] y) <float[64,64] w> { y = MatMul(x, w) }",
            "--freeze-defaults",
        ),
        (
            "g (float[N,64] x) => (float[N,64] y) <float[64] w> { y = Mul(x, w) }",
            "prune the float model",
        ),
        (
            "g (float[N,8] x) => (float[N,8] y) <float[8,8] w> { y = MatMul(x, w) }",
            "all 1 layers stay dense",
        ),
    ],
)
def test_says_why_nothing_was_pruned(text: str, said: str) -> None:
    model = load_model(parse(text))
    ctx = context(model, "0.5", blind=True)
    assert not Prune().run(model, ctx)
    (reason,) = [remark.reason for remark in ctx.remarks if remark.kind is RemarkKind.WARNING]
    assert said in reason


def test_leaves_shared_and_named_weights_dense() -> None:
    text = NETWORK.replace("y = MatMul(t, w4)", "u = MatMul(t, w3)  y = MatMul(u, w4)")
    model = network(text)
    ctx = context(model, "0.4,dense=^w1$")
    Prune().run(model, ctx)
    reasons = {r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED}
    assert {"stays dense: its weight has other uses", "stays dense: asked for"} <= reasons
    for name in ("w1", "w3"):
        assert (model.graph.initializers[name].const_value.numpy() != 0).all()  # type: ignore[union-attr]


PATCHES = """g (float[N,1,32,32] x) => (float[N,4] y)
    <float[32,1,8,8] w1, float[512,32] w2, float[512,4] w3> {
    a = Conv<strides=[8,8]>(x, w1)
    p = GlobalAveragePool(a)
    f = Flatten(p)
    h = Gemm<transB=1>(f, w2)
    t = Relu(h)
    y = MatMul(t, w3)
}"""


@pytest.mark.parametrize(
    ("ratio", "dense"), [("0.1", {"w1", "w3"}), ("0.5", {"w1"}), ("0.9", set())]
)
def test_what_would_better_stay_dense_goes_too_where_it_is_much(
    ratio: str, dense: set[str]
) -> None:
    layers = find_layers(network(PATCHES).graph)
    assert {layer.name for layer in layers if layer.dense} == {"w1", "w3"}
    wanted = weights.goals(layers, parse_sparsity(ratio))
    assert {layer.name for layer in layers if layer not in wanted} == dense
    total = sum(layer.size for layer in layers)
    assert abs(sum(goal.zeros for goal in wanted.values()) - float(ratio) * total) <= 1


def test_says_of_what_went_after_all_that_it_is_zero() -> None:
    model = network(PATCHES)
    ctx = context(model, "0.9", blind=True)
    assert Prune().run(model, ctx)
    said = next(r.reason for r in ctx.remarks if r.kind is RemarkKind.NOTE)
    assert said.startswith("90.0% of the 20480 weights of 3 layers are zero, in 3 layers")


def test_what_the_user_names_stays_dense_however_much_it_is() -> None:
    layers = find_layers(network(PATCHES).graph, "^w1$")
    wanted = weights.goals(layers, parse_sparsity("0.9"))
    assert {layer.name for layer in wanted} == {"w2", "w3"}


def test_single_layers_have_the_share_that_they_are_given() -> None:
    layers = find_layers(network().graph)
    wanted = weights.goals(layers, parse_sparsity("0.8,layer=^w3$:0.25"))
    shares = {layer.name: goal.zeros / layer.size for layer, goal in wanted.items()}
    assert shares["w3"] == 0.25
    total = sum(layer.size for layer in layers)
    assert sum(goal.zeros for goal in wanted.values()) == pytest.approx(0.8 * total, abs=2)


def test_a_layer_that_is_named_is_pruned_even_if_it_would_stay_dense() -> None:
    layers = find_layers(network(PATCHES).graph)
    closing = next(layer for layer in layers if layer.dense)
    named = weights.goals(layers, parse_sparsity(f"0.5,layer=^{closing.name}$:0.25"))
    assert named[closing].zeros == closing.size // 4
    assert closing not in weights.goals(layers, parse_sparsity("0.5"))
    bound = find_layers(network(PATCHES).graph, ".")
    assert not weights.goals(bound, parse_sparsity("0.5,layer=.:0.25,dense=."))


@pytest.mark.parametrize("sparsity", ["0.8,layer=^w3$:2:4", "2:4,layer=^w2$:0.75"])
def test_patterns_and_shares_can_be_mixed(sparsity: str) -> None:
    model = network()
    layers = find_layers(model.graph)
    wanted = {
        layer.name: goal for layer, goal in weights.goals(layers, parse_sparsity(sparsity)).items()
    }
    sizes = {layer.name: layer.size for layer in layers}
    assert wanted["w3"].pattern == (2, 4)
    if sparsity.startswith("0.8"):
        zeros = sum(goal.of(sizes[name]) for name, goal in wanted.items())
        assert zeros == pytest.approx(0.8 * sum(sizes.values()), abs=2)
    else:
        assert wanted["w2"].zeros == 0.75 * sizes["w2"]
    assert Prune().run(model, context(model, sparsity, blind=True))
    (made,) = [layer for layer in find_layers(model.graph) if layer.name == "w3"]
    assert ((made.matrix().reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_a_pattern_that_a_layer_cannot_have_is_told() -> None:
    model = network()
    ctx = context(model, "0.8,layer=^w3$:2:5", blind=True)
    assert Prune().run(model, ctx)
    said = [r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED]
    assert any("layer=^w3$:2:5 does not fit: 64 inputs" in reason for reason in said), said
    fits = context(model, "0.8,layer=^w3$:2:4", blind=True)
    assert Prune().run(model, fits)
    assert not any("does not fit" in r.reason for r in fits.remarks)


@pytest.mark.parametrize(
    ("sparsity", "near"),
    [("0.8,dense=^v3$", "w3"), ("0.8,layer=b9:0.1", "b2"), ("channels:0.3,dense=q", "w1")],
)
def test_refuses_names_that_no_weight_has(sparsity: str, near: str) -> None:
    model = network()
    with pytest.raises(OptionError, match=f"matches the name of no weight.*{near}"):
        Prune().run(model, context(model, sparsity))


def test_says_what_share_of_all_constants_became_zero() -> None:
    model = network()
    ctx = context(model, "0.8")
    assert Prune().run(model, ctx)
    said = next(r.reason for r in ctx.remarks if "of all" in r.reason)
    total = sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value)
    assert f"of all {total} float constants (not pruned, by what reads them: Add 64)" in said


@pytest.mark.parametrize(("ratio", "method"), [("0.7", Method.SPARSEGPT), ("0.8", Method.ADMM)])
def test_the_method_follows_from_the_share(ratio: str, method: Method) -> None:
    assert weights.method_for(parse_sparsity(ratio), samples=True) is method


def test_warns_where_too_few_weights_may_go() -> None:
    model = network()
    ctx = context(model, "0.8,dense=w2")
    Prune().run(model, ctx)
    assert any("short of 80.0%" in r.reason for r in ctx.remarks if r.kind is RemarkKind.WARNING)


def test_two_in_four_along_the_input_channels() -> None:
    model = network()
    ctx = context(model, "2:4")
    assert Prune().run(model, ctx)
    for name, axis in (("w1", 1), ("w2", 1), ("w3", 0)):
        array = np.moveaxis(model.graph.initializers[name].const_value.numpy(), axis, -1)  # type: ignore[union-attr]
        assert ((array.reshape(-1, 4) != 0).sum(-1) <= 2).all(), name
    assert any("sparse tensor cores" in r.reason for r in ctx.remarks)


def test_threshold() -> None:
    model = network()
    weight = model.graph.initializers["w2"].const_value.numpy()  # type: ignore[union-attr]
    expected = int((np.abs(weight) <= 0.25).sum())
    Prune().run(model, context(model, "threshold:0.25", blind=True))
    assert (model.graph.initializers["w2"].const_value.numpy() == 0).sum() == expected  # type: ignore[union-attr]


def test_same_samples_give_the_same_bytes_and_replays_take_them_from_the_cache() -> None:
    first, second = network(), network()
    ctx, other = context(first, "0.8"), context(second, "0.8")
    Prune().run(first, ctx)
    Prune().run(second, other)
    assert model_to_bytes(first) == model_to_bytes(second)
    replay = network()
    again = context(replay, "0.8")
    again.cache.update(ctx.cache)
    Prune().run(replay, again)
    assert model_to_bytes(replay) == model_to_bytes(first)
    assert set(again.cache) == set(ctx.cache)


def test_leaves_the_model_alone_when_gated_off() -> None:
    for text in ("0.8", "channels:0.5"):
        model = network()
        before = model_to_bytes(model)
        assert not Prune().run(model, context(model, text, gate=Gate(limit=0)))
        assert model_to_bytes(model) == before


class TestChannels:
    def test_saves_the_arithmetic_asked_for(self) -> None:
        model = network()
        ctx = context(model, "channels:0.5")
        size = len(model_to_bytes(model))
        assert Prune().run(model, ctx)
        assert len(model_to_bytes(model)) < 0.6 * size
        assert not list(violations(model))
        assert any("of the multiply-adds" in remark.reason for remark in ctx.remarks)

    def test_samples_make_up_for_removed_channels(self) -> None:
        assert loss("channels:0.5") < 0.8 * loss("channels:0.5", blind=True)

    def test_keeps_the_channels_of_weights_that_shall_stay_dense(self) -> None:
        model = network()
        assert Prune().run(model, context(model, "channels:0.3,dense=w1", blind=True))
        shapes = [layer.tensor.shape.numpy() for layer in find_layers(model.graph)]
        assert tuple(shapes[0]) == (32, 8, 3, 3)
        assert shapes[1][0] < 64

    def test_says_when_nothing_can_go(self) -> None:
        text = "g (float[N,8] x) => (float[N,40] y) <float[8,40] w> { y = MatMul(x, w) }"
        model = network(text)
        ctx = context(model, "channels:0.5", blind=True)
        assert not Prune().run(model, ctx)
        assert any("no channels can be removed" in remark.reason for remark in ctx.remarks)


def test_whole_run_stores_zeros_sparse_and_reports_sizes() -> None:
    model = network()
    result = graphopt.optimize(model, sparsity="0.95", calibration=samples())
    assert result.report.verification.passed
    facts = result.report.sparse
    assert facts is not None
    assert facts.stored_bytes < 0.3 * result.report.input.parameter_bytes


def test_whole_run_leaves_pruning_out_that_breaks_the_budget() -> None:
    result = graphopt.optimize(
        network(), sparsity="0.95", calibration=samples(), budget="sqnr>=200"
    )
    assert [each.pass_name for each in result.report.rolled_back] == ["prune"]


def test_large_weights_are_held_as_masks_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, held = network(), network()
    assert Prune().run(plain, context(plain, "0.9"))
    monkeypatch.setattr(sparse, "MASKED_BYTES", 1)
    assert Prune().run(held, context(held, "0.9"))
    kinds = [type(value.const_value) for value in held.graph.initializers.values()]
    assert MaskedTensor in kinds
    assert model_to_bytes(held) == model_to_bytes(plain)


def test_few_samples_are_held_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MIN_HELD_BYTES", 1)
    model = network()
    assert Prune().run(model, context(model, "0.5"))
    assert abs(zeros(model) - 0.5) < 0.006


class TestEarly:
    def run(self, sparsity: str, *, distill: str | None, blind: bool = False) -> float:
        model = network()
        ctx = context(model, sparsity, blind=blind)
        ctx.options = dataclasses.replace(ctx.options, distill=distill)
        assert Prune(early=True).run(model, ctx) == bool(zeros(model))
        return zeros(model)

    def test_a_part_goes_first_where_training_follows(self) -> None:
        assert abs(self.run("0.95", distill="yes") - 0.88) < 0.006

    def test_nothing_goes_where_one_step_is_enough(self) -> None:
        assert self.run("0.95", distill=None) == 0
        assert self.run("0.8", distill="yes") == 0
        assert self.run("2:4", distill="yes") == 0
        assert self.run("0.95", distill="yes", blind=True) == 0


def test_sensitivity_spreads_otherwise_than_magnitude() -> None:
    by_cost, lamp = network(), network()
    assert Prune().run(by_cost, context(by_cost, "0.8,allocation=sensitivity"))
    assert Prune().run(lamp, context(lamp, "0.8"))
    assert abs(zeros(by_cost) - 0.8) < 0.006
    shares = [
        [float((layer.tensor.numpy() == 0).mean()) for layer in find_layers(model.graph)]
        for model in (by_cost, lamp)
    ]
    assert shares[0] != shares[1]


def spread(text: str, *, blind: bool = False) -> list[float]:
    """The share of zeros of each layer."""
    model = network()
    assert Prune().run(model, context(model, text, blind=blind))
    return [float((layer.tensor.numpy() == 0).mean()) for layer in find_layers(model.graph)]


def test_without_samples_zeros_are_spread_by_magnitude_alone() -> None:
    assert spread("0.8", blind=True) == spread("0.8,allocation=lamp", blind=True)
    assert spread("0.8") == spread("0.8,allocation=lamp")
    assert spread("0.92") == spread("0.92,allocation=mixed")
    assert spread("0.92") != spread("0.92,allocation=lamp")


@pytest.mark.parametrize("how", ["mixed", "erk"])
def test_large_models_are_spread_as_small_ones(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = spread(f"0.92,allocation={how}")
    monkeypatch.setattr(weights, "LARGE", 1)
    np.testing.assert_allclose(spread(f"0.92,allocation={how}"), small, atol=0.02)


def test_removal_costs_are_those_of_the_least_squares_left() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4)) + 0.3 * rng.standard_normal((200, 1))
    moment = np.zeros((1, 5, 5))
    moment[0, :4, :4] = x.T @ x
    matrix = rng.standard_normal((1, 1, 4))
    cost = weights.removal_costs(matrix, moment)[0, 0]
    for column in range(4):
        kept = [i for i in range(4) if i != column]
        target = x @ matrix[0, 0]
        left = np.linalg.lstsq(x[:, kept], target, rcond=None)[0]
        error = float(np.linalg.norm(x[:, kept] @ left - target))
        assert abs(cost[column] - error) < 0.3 * error


def test_large_models_are_spread_over_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE", 1)
    model = network()
    assert Prune().run(model, context(model, "0.8"))
    assert abs(zeros(model) - 0.8) < 0.006
