"""Channels that change nothing go; what comes out stays the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from graphopt_passes.prune import SweepChannels
from graphopt_passes.prune.labels import propagate

from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.shapes import Shapes
from graphopt.rewrite import Context, Options
from graphopt.runtime.session import Session
from graphopt.targets import get_target
from tests.rewriting import parse

Array = npt.NDArray[Any]

PLAIN = """g (float[N,6] x) => (float[N,3] y) <float[6,10] w, float[10] b, float[10,3] v, float[3] c> {
    h = Gemm(x, w, b)  r = Relu(h)  y = Gemm(r, v, c) }"""
CONVS = """g (float[N,3,8,8] x) => (float[N,4,8,8] y)
    <float[16,3,3,3] w, float[16] b, float[4,16,3,3] v, float[4] c> {
    h = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(h)  y = Conv<pads=[1,1,1,1]>(r, v, c) }"""


def network(text: str, **arrays: Array) -> ir.Model:
    model = load_model(parse(text))
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        if value.const_value.dtype != ir.DataType.FLOAT:
            continue
        array = rng.standard_normal(value.const_value.shape.numpy()).astype(np.float32)
        value.const_value = ir.Tensor(array, name=name)
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.Tensor(array.astype(np.float32), name=name)
    return model


def held(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def run(model: ir.Model) -> Array:
    shape = [3, *(int(str(d)) for d in list(model.graph.inputs[0].shape or ())[1:])]
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    return np.asarray(Session(model_to_bytes(model)).run({"x": x})["y"])


def sweep(model: ir.Model) -> tuple[bool, Context]:
    """Runs the pass and checks that the model computes what it did."""
    want = run(model)
    ctx = Context(model, get_target("cpu"), Options())
    changed = SweepChannels(always=True).run(model, ctx)
    assert not list(violations(model))
    np.testing.assert_allclose(run(model), want, rtol=1e-5, atol=1e-5)
    return changed, ctx


def test_does_nothing_unasked() -> None:
    model = network(PLAIN, v=np.zeros((10, 3)))
    assert not SweepChannels().run(model, Context(model, get_target("cpu"), Options()))


def test_drops_what_nobody_reads() -> None:
    model = network(PLAIN)
    v = held(model, "v")
    v[[2, 5]] = 0
    model = network(PLAIN, v=v)
    changed, ctx = sweep(model)
    assert changed
    assert held(model, "w").shape == (6, 8)
    assert held(model, "v").shape == (8, 3)
    assert any("2 channels removed" in remark.reason for remark in ctx.remarks)


def test_folds_what_never_changes_into_the_bias() -> None:
    w = held(network(PLAIN), "w")
    w[:, [1, 4]] = 0
    b = held(network(PLAIN), "b")
    b[[1, 4]] = (0.7, -0.3)
    model = network(PLAIN, w=w, b=b)
    sweep(model)
    assert held(model, "w").shape == (6, 8)


def test_keeps_a_constant_that_no_bias_can_take() -> None:
    text = PLAIN.replace("Gemm(r, v, c)", "MatMul(r, v)").replace(", float[3] c", "")
    w = held(network(text), "w")
    w[:, 1] = 0
    model = network(text, w=w, b=np.ones(10))
    assert not sweep(model)[0]


def test_merges_repeated_and_collinear_filters() -> None:
    w, b = (held(network(PLAIN), name) for name in ("w", "b"))
    w[:, 3], b[3] = w[:, 7], b[7]
    w[:, 5], b[5] = 2.5 * w[:, 0], 2.5 * b[0]
    model = network(PLAIN, w=w, b=b)
    sweep(model)
    assert held(model, "w").shape == (6, 8)


@pytest.mark.parametrize("factor", [-1.0, 2.0])
def test_keeps_what_only_looks_collinear(factor: float) -> None:
    """A negative factor does not pass a Relu, and no factor but 1 passes a Gelu."""
    text = (
        PLAIN if factor < 0 else PLAIN.replace("Relu", "Gelu").replace("r = Gelu(h)", "r = Gelu(h)")
    )
    w, b = (held(network(text), name) for name in ("w", "b"))
    w[:, 5], b[5] = factor * w[:, 0], factor * b[0]
    model = load_model(parse(text, opset=20))
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = {"w": w, "b": b}.get(name)
        fresh = rng.standard_normal(value.const_value.shape.numpy()).astype(np.float32)
        value.const_value = ir.Tensor(fresh if array is None else array, name=name)
    assert not sweep(model)[0]


def test_leaves_convolutions_a_multiple_of_eight_and_silences_the_rest() -> None:
    v = held(network(CONVS), "v")
    v[:, [0, 3, 9]] = 0
    model = network(CONVS, v=v)
    assert sweep(model)[0]
    w = held(model, "w")
    assert w.shape[0] == 16
    assert not w[[0, 3, 9]].any()
    v[:, 8:] = 0
    model = network(CONVS, v=v)
    sweep(model)
    assert held(model, "w").shape[0] == 8


def test_keeps_a_level_that_padding_would_cut_off() -> None:
    w = held(network(CONVS), "w")
    w[:1] = 0
    model = network(CONVS, w=w, b=np.ones(16))
    assert not sweep(model)[0]
    w[:8] = 0
    model = network(CONVS, w=w, b=-np.ones(16))
    assert sweep(model)[0]
    assert held(model, "w").shape[0] == 8


def test_keeps_channels_that_an_output_or_an_unknown_constant_reads() -> None:
    shown = PLAIN.replace("=> (float[N,3] y)", "=> (float[N,3] y, float[N,10] r)")
    model = network(shown, v=np.zeros((10, 3)))
    assert not sweep(model)[0]
    transposed = """g (float[N,3,4,4] x) => (float[N,2,4,4] y, float[N,2,4,4] z)
        <float[8,3,1,1] w, float[8,2,1,1] t, float[2,8,1,1] v> {
        h = Conv(x, w)  z = ConvTranspose(h, t)  y = Conv(h, v) }"""
    model = network(transposed, v=np.zeros((2, 8, 1, 1)))
    assert not sweep(model)[0]


def test_keeps_what_two_activations_are_multiplied_over() -> None:
    text = """g (float[N,4,6] x) => (float[N,4,4] y, float[N,4,3] z) <float[6,10] w, float[10,3] v> {
        h = MatMul(x, w)  t = Transpose<perm=[0,2,1]>(h)  y = MatMul(h, t)  z = MatMul(h, v) }"""
    model = network(text, v=np.zeros((10, 3)))
    assert not sweep(model)[0]


def test_goes_on_until_nothing_is_dead() -> None:
    text = """g (float[N,6] x) => (float[N,3] y) <float[6,10] w, float[10,12] u, float[12,3] v> {
        h = MatMul(x, w)  r = Relu(h)  i = MatMul(r, u)  s = Relu(i)  y = MatMul(s, v) }"""
    u, v = (held(network(text), name) for name in ("u", "v"))
    v[6:] = 0
    u[:5, :6] = 0
    model = network(text, u=u, v=v)
    sweep(model)
    assert held(model, "u").shape == (5, 6)


@pytest.mark.parametrize(
    ("of", "user"),
    [
        ("x", "y = Concat<axis=1>(u, r)"),
        ("x", "y = Concat<axis=1>(r, u)"),
        ("r", "y = Gather<axis=1>(u, i)"),
        ("r", "y = ReduceSum<keepdims=1>(u, i)"),
        ("x", "a = Add(r, u)  y = Exp(a)"),
        ("x", "a = Add(u, r)  y = Exp(a)"),
    ],
)
def test_nothing_is_said_of_what_has_an_unknown_number_of_axes(of: str, user: str) -> None:
    """The shape of u is an input, of which not even the length is known: nor is, which channels meet."""
    text = f"""g (float[N,8] x, int64[k] s) => (float[M] y) <float[8,16] w, int64[1] i = {{1}}> {{
        h = MatMul(x, w)  r = Relu(h)  u = Reshape({of}, s)  {user} }}"""
    model = load_model(parse(text))
    labels = propagate(model, Shapes(model))
    (h,) = (node.outputs[0] for node in model.graph if node.op_type == "MatMul")
    classes = labels.classes(h, 1)
    assert classes is not None
    assert set(classes.tolist()) <= labels.frozen
