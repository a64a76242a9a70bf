"""What the runtime leaves of Q and DQ, which rule was broken, and that it is taken out."""

from __future__ import annotations

import numpy as np
import pytest
from graphopt_passes.quantize.fusion import read_fusion
from graphopt_passes.quantize.static import QuantizeStatic

from graphopt.ir.model_file import load_model
from graphopt.rewrite import Calibration, Context, Options
from graphopt.targets import get_target
from tests.passes.quantize.test_static import ops, varied
from tests.rewriting import parse

HEAD = (
    "g (float[1,4,6,6] x) => (float[1,4,6,6] y%s) <float s = {0.1}, uint8 z = {128}, "
    "int8[4,4,1,1] w, float t = {0.02}, int8 o = {0}> "
    "{ xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)  wd = DequantizeLinear(w, t, o)  "
)
TAIL = "  yq = QuantizeLinear(r, s, z)  y = DequantizeLinear(yq, s, z) }"


@pytest.mark.parametrize(("body", "more", "rule"), [
    ("r = Conv(xd, wd)", "", None),
    ("k = Conv(xd, wd)  r = Relu(k)", "", "the zero point 128 behind Relu is not the least code"),
    ("k = Conv(xd, wd)  r = Tanh(k)", "", "Tanh lies between it and QuantizeLinear"),
    ("r = Conv(xd, wd)  n = Neg(r)", ", float[1,4,6,6] n", "its result is read 2 times"),
    ("k = Conv(xd, wd)  r = Neg(k)", ", float[1,4,6,6] k", "its result is an output of the model"),
    ("k = Conv(x, wd)  r = Identity(k)", "", "operand 'x' is not decoded from integers"),
])  # fmt: skip
def test_a_leftover_names_the_rule_that_it_broke(body: str, more: str, rule: str | None) -> None:
    model = load_model(parse(HEAD % more + body + TAIL))
    name = "k" if "k =" in body else "r"
    found = read_fusion(model, [name, "r"]).leftovers
    if rule is None:
        assert not found
    else:
        assert rule in found[name]


def test_leftovers_are_repaired_and_told() -> None:
    """A product and a sum of two axes become a Gemm with an activation before anything looks at Q and DQ."""
    text = (
        "g (float[1,16] x) => (float[1,16] y) <float[16,16] w, float[16,16] v> "
        "{ a = MatMul(x, w)  f = Sin(a)  b = MatMul(x, v)  c = Add(f, b)  y = Tanh(c) }"
    )
    model = load_model(varied(text))
    feeds = [
        {"x": np.random.default_rng(i).normal(size=(1, 16)).astype(np.float32)} for i in range(4)
    ]
    given = Options(calibration=Calibration(feeds), force=True, budget="sqnr>=15")
    ctx = Context(model, get_target("cpu"), given, pass_name="quantize-static")
    assert QuantizeStatic(style="x86-vnni").run(model, ctx)
    assert ops(model).count("QuantizeLinear") == 1
    told = {remark.node: remark.reason for remark in ctx.remarks}
    assert told["b"].startswith("stays float: the runtime does not fuse it: it became FusedGemm")
