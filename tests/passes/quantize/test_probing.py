"""Ranges of single values by what they do to the outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.quantize.facts import Facts
from graphopt_passes.quantize.probing import Probe, Ranging, search
from graphopt_passes.quantize.styles import style_named

from graphopt.calibrate.formats import Parameters
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
    assert not probe.noise({}).any()
    form = Facts(style_named("x86-vnni"), {}).choice("r").parameters
    coarse = Parameters(50.0, 0, form.format)
    for name in ("x", "r", "y"):
        assert probe.noise({name: coarse}).any()


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
    assert probe.noise({"x": signed}).sum() == pytest.approx(
        probe.noise({"x": plain}).sum(), rel=0.1
    )
