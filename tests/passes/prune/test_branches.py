"""Branches of residual sums that go, what then stands for the sums, and that layers make up for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.prune import Prune
from graphopt_passes.prune.branches import Branch, drop_branches, find_branches
from graphopt_passes.prune.layers import find_layers
from graphopt_passes.prune.reconstruct import divergence, outputs, reconstruct
from graphopt_passes.prune.samples import Feeds

from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Calibration, Context, Gate, Options
from graphopt.targets import get_target
from tests.rewriting import parse

BLOCKS = """g (float[N,3,6,6] x) => (float[N,5,6,6] y)
    <float[16,3,1,1] w0, float[16] b0, float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2,
     float[16,16,3,3] w3, float[16] b3, float[16,16,3,3] w4, float[16] b4, float[5,16,1,1] w5> {
    a = Conv(x, w0, b0)
    r = Relu(a)
    c = Conv<pads = [1,1,1,1]>(r, w1, b1)
    d = Relu(c)
    e = Conv<pads = [1,1,1,1]>(d, w2, b2)
    s = Add(e, r)
    t = Relu(s)
    f = Conv<pads = [1,1,1,1]>(t, w3, b3)
    g = Relu(f)
    h = Conv<pads = [1,1,1,1]>(g, w4, b4)
    u = Add(t, h)
    v = Relu(u)
    y = Conv(v, w5)
}"""


def weak(model: ir.Model, names: tuple[str, ...] = ("w3", "w4"), factor: float = 0.3) -> ir.Model:
    """The model with some weights smaller, and all of them such that values keep their size."""
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.ndim == 4:
            array = array / np.sqrt(array[0].size)
        array = array * (factor if name in names else 1.0)
        value.const_value = ir.Tensor(array.astype(np.float32), name=name)
    return model


def found_in(text: str) -> list[Branch]:
    model = load_model(parse(text))
    return find_branches(model.graph, find_layers(model.graph), Shapes(model))


def feeds(count: int = 8) -> Feeds:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((16, 3, 6, 6)).astype(np.float32)} for _ in range(count)]


def test_are_the_summands_that_nothing_else_reads() -> None:
    assert found_in(BLOCKS) == [
        Branch("s", 0, frozenset({"w1", "w2"})),
        Branch("u", 1, frozenset({"w3", "w4"})),
    ]


@pytest.mark.parametrize(
    "change",
    [
        ("s = Add(e, r)", "s = Mul(e, r)"),  # a factor is no summand
        ("=> (float[N,5,6,6] y)", "=> (float[N,5,6,6] y, float[N,16,6,6] e)"),
        (
            "t = Relu(s)",
            "m = Relu(s) t = Mul(m, d)",
        ),  # read elsewhere: only what ends the branch is its own
    ],
)
def test_what_is_read_elsewhere_stays(change: tuple[str, str]) -> None:
    kept = {name for branch in found_in(BLOCKS.replace(*change)) for name in branch.layers}
    assert "w1" not in kept


def test_what_broadens_the_sum_stays() -> None:
    text = BLOCKS.replace("s = Add(e, r)", "q = ReduceMean<axes = [2,3]>(r)  s = Add(e, q)")
    assert "s" not in {branch.total for branch in found_in(text)}


def test_the_rest_is_what_the_model_computes_without_the_summand() -> None:
    model = load_model(parse(BLOCKS))
    aims = drop_branches(model, [found_in(BLOCKS)[1]])
    assert not list(violations(model))
    assert aims == {"s": "u"}
    assert [node.op_type for node in model.graph].count(
        "Relu"
    ) == 3  # the second of two in a row went
    assert not {"w3", "b3", "w4", "b4"} & set(model.graph.initializers)
    plain = BLOCKS.replace("u = Add(t, h)", "u = Identity(t)")
    gone = ("    f =", "    g =", "    h =")
    plain = "\n".join(line for line in plain.splitlines() if not line.startswith(gone))
    want = outputs(load_model(parse(plain)), feeds(1))
    assert divergence(want, model, feeds(1)) == 0.0


def test_all_branches_of_a_stream_leave_its_first_value() -> None:
    model = load_model(parse(BLOCKS))
    aims = drop_branches(model, found_in(BLOCKS))
    assert not list(violations(model))
    assert aims["a"] == "u"
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "Conv"]


def test_the_layer_before_takes_over() -> None:
    dense = weak(load_model(parse(BLOCKS)))
    model = load_model(dense)
    aims = drop_branches(model, [found_in(BLOCKS)[1]])
    want = outputs(dense, feeds())
    before = divergence(want, model, feeds())
    blind = load_model(model)
    assert reconstruct(dense, model, {}, feeds(), 0, aims) > 0
    reconstruct(dense, blind, {}, feeds(), 0)
    aimed, unaimed = divergence(want, model, feeds()), divergence(want, blind, feeds())
    assert aimed < 0.8 * before
    assert aimed < unaimed


@pytest.mark.parametrize(("option", "goes"), [("", True), (",blocks=no", False)])
def test_the_pass_takes_a_branch_where_that_is_nearest(
    option: str, goes: bool, tmp_path: Path
) -> None:
    x = np.concatenate([feed["x"] for feed in feeds()])
    np.savez(tmp_path / "s.npz", x=x)
    model = weak(load_model(parse(BLOCKS)), factor=0.05)
    options = Options(
        sparsity="channels:0.5,importance=l2,multiple=16" + option,
        calibration=Calibration(tmp_path / "s.npz"),
    )
    ctx = Context(model, get_target("cpu-avx2"), options, Gate())
    ctx.pass_name = "prune"
    assert Prune().run(model, ctx) is goes  # no channels can go
    assert not list(violations(model))
    assert ("w4" not in model.graph.initializers) is goes
    said = [remark.reason for remark in ctx.remarks]
    assert any("1 branch of residual sums" in text for text in said) is goes


def test_dense_weights_keep_their_branch(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.concatenate([feed["x"] for feed in feeds()]))
    model = weak(load_model(parse(BLOCKS)))
    options = Options(
        sparsity="channels:0.3,importance=l2,dense=w4", calibration=Calibration(tmp_path / "s.npz")
    )
    ctx = Context(model, get_target("cpu-avx2"), options, Gate())
    ctx.pass_name = "prune"
    Prune().run(model, ctx)
    assert {"w3", "w4"} <= set(model.graph.initializers)
