"""Ranges of single values by what they do to the outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.quantize.facts import Facts
from graphopt_passes.quantize.probing import Probe, Ranging, search
from graphopt_passes.quantize.styles import style_named
from graphopt_passes.quantize.suffixes import Suffixes

from graphopt.calibrate.formats import Format, Parameters
from graphopt.calibrate.ranges import Method, choose
from graphopt.calibrate.statistics import Statistics
from graphopt.ir.model_file import load_model
from graphopt.verify.feed_files import Feed
from tests.calibrate.test_statistics import observe
from tests.rewriting import parse

RNG = np.random.default_rng(3)
TEXT = """g (float[1,8] x) => (float[1,3] y) <float[8,3] w> { r = Relu(x)  y = MatMul(r, w) }"""


def feeds() -> list[Feed]:
    """Samples whose first channel is a hundred times louder than the others."""
    loud = np.array([100.0] + [1.0] * 7, np.float32)
    rows = np.abs(RNG.normal(size=(16, 1, 8)).astype(np.float32)) * loud
    return [Feed(str(i), {"x": row}) for i, row in enumerate(rows)]


def model_with(first: float) -> onnx.ModelProto:
    """The model whose first channel counts `first` times as much as the others."""
    proto = parse(TEXT)
    weights = RNG.normal(size=(8, 3)).astype(np.float32)
    weights[0] *= first
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    return proto


@pytest.mark.parametrize(("first", "narrowed"), [(1e-4, True), (1.0, False)])
def test_an_outlier_is_worth_what_the_outputs_make_of_it(first: float, *, narrowed: bool) -> None:
    model, samples = load_model(model_with(first)), feeds()
    seen = observe(np.concatenate([np.maximum(f.values["x"], 0) for f in samples]))
    facts = Facts(style_named("x86-vnni"), {"r": seen})

    def resolve(name: str, each: Ranging) -> Parameters:
        return Facts(facts.style, facts.statistics, ranged={name: each}).choice(name).parameters

    found = search(Probe(model, ["r"], samples, classes=False), ["r"], resolve)
    best = resolve("r", Ranging(Method.BEST)).range[1]
    assert (resolve("r", found.get("r", Ranging(Method.BEST))).range[1] < best / 3) == narrowed


def test_a_probe_leaves_the_model_as_it_is() -> None:
    model, samples = load_model(model_with(1.0)), feeds()
    probe = Probe(model, ["x", "r", "y"], samples, classes=False)
    assert [node.op_type for node in model.graph] == ["Relu", "MatMul"]
    form = Facts(style_named("x86-vnni"), {}).choice("r").parameters
    coarse, fine = Parameters(50.0, 0, form.format), Parameters(0.02, 0, Format(ir.DataType.INT16))
    for name in ("x", "r", "y"):
        assert probe.at(name)(coarse).sum() > 10 * probe.at(name)(fine).sum()


def test_a_factor_moves_the_ends_within_what_was_seen() -> None:
    seen = observe(np.linspace(-1, 3, 1000, dtype=np.float32))
    form = Facts(style_named("x86-vnni"), {}).choice("r").parameters.format
    narrow = choose(seen, form, Method.MIN_MAX, 0.5)
    assert narrow.parameters.range == pytest.approx((-0.5, 1.5), abs=0.02)
    assert narrow.method == "min-max times 0.5"
    assert narrow.clipped > 0.4
    wide = choose(seen, form, Method.MIN_MAX, 2.0)
    assert wide.parameters.range == pytest.approx((-1, 3), abs=0.02)


def test_signed_activations_are_probed_in_their_own_codes() -> None:
    model, samples = load_model(model_with(1.0)), feeds()
    seen: Statistics = observe(np.concatenate([f.values["x"] for f in samples]))
    signed, plain = (
        Facts(style_named(name), {"x": seen}).choice("x").parameters for name in ("arm", "x86-vnni")
    )
    assert signed.format.dtype is ir.DataType.INT8
    probe = Probe(model, ["x"], samples, classes=False)
    assert probe.at("x")(signed).sum() == pytest.approx(probe.at("x")(plain).sum(), rel=0.1)


BRANCHES = """g (float[1,4] x, bool c) => (float[1,4] y, float[1,4] z, float[1,4] s) <float[4,4] w> {
 s = Sigmoid(x)  m = MatMul(s, w)  z = Relu(x)
 t = If(c) <then_branch = a () => (float[1,4] p) { p = Add(m, s) },
           else_branch = b () => (float[1,4] q) { q = Mul(m, x) }>
 y = Add(t, z) }"""


@pytest.mark.parametrize("name", ["x", "s", "m", "t", "z", "y"])
def test_the_part_behind_a_value_computes_what_the_whole_does(name: str) -> None:
    proto = parse(BRANCHES)
    draws = np.random.default_rng(1).normal(size=(2, 1, 4)).astype(np.float32)
    samples = [{"x": draw, "c": np.array(bool(i))} for i, draw in enumerate(draws)]
    suffixes = Suffixes(load_model(proto), [name], samples)
    behind = suffixes.behind(name)
    for index, plain in enumerate(suffixes.outputs):
        found = behind.run(index, behind.values[index])
        assert found
        for output, value in found.items():
            np.testing.assert_allclose(value, plain[output], rtol=1e-5)
    changed = behind.run(0, behind.values[0] + 1)
    assert all((value != suffixes.outputs[0][output]).any() for output, value in changed.items())
    expected = {"x": {"y", "z", "s"}, "s": {"y", "s"}, "z": {"y", "z"}}.get(name, {"y"})
    assert set(changed) == expected
