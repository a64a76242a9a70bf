"""A closed gate: where nothing is permitted, no pass changes anything."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes import PIPELINES

from graphopt.ir.model_file import load_model
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Context, Gate, Options
from graphopt.targets import get_target
from tests.rewriting import apply, parse, structure

# Each gives several passes something to do.
MODELS = {
    "an old one": """<ir_version: 3, opset_import: ["" : 17]>
    g (float[N,4] x, float[4] w, float[4] v) => (float[N,4] y)
    <float[4] w = {1, 2, 3, 4}, float[4] v = {1, 2, 3, 4}, float[4] spare = {1, 2, 3, 4}> {
      a = Identity(x)  b = Add(a, w)  c = Add(a, v)  d = Mul(b, c)  e = Mul(c, b)  f = Sub(d, e)
      k = Constant<value = float[1] {2.0}>()  h = Sqrt(k)  i = Mul(f, h)  y, m = Dropout(i)
    }""",
    "control flow": """<ir_version: 9, opset_import: ["" : 18]>
    g (float[2] x) => (float[2] y, float[2] z, float[2] v, float[M,2] s)
    <bool yes = {1}, int64 none = {0}, int64 one = {1}, int64 two = {2}> {
      y = If(yes) <then_branch = t () => (float[2] p) { p = Neg(x) }, else_branch = e () => (float[2] q) { q = Abs(x) }>
      z, s = Loop(none, , x) <body = b (int64 i, bool c, float[2] u) => (bool d, float[2] w, float[2] o)
        { d = Identity(c)  w = Neg(u)  o = Abs(u) }>
      r = Loop(one, , x) <body = b1 (int64 i1, bool c1, float[2] u1) => (bool d1, float[2] w1)
        { d1 = Identity(c1)  w1 = Exp(u1) }>
      v = Loop(two, , r) <body = b2 (int64 i2, bool c2, float[2] u2) => (bool d2, float[2] w2)
        { d2 = Identity(c2)  w2 = Tanh(u2) }>
    }""",
    "shapes and layout": """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N,3,4,5] x) => (float[N,3,20] y, int64[2] q) <int64[1] f = {0}, int64[1] t = {2}, int64[1] m = {-1}> {
      s = Shape(x)  n = Slice(s, f, t)  k = Concat<axis = 0>(n, m)
      a = Transpose<perm = [0,2,3,1]>(x)  b = Relu(a)  c = Transpose<perm = [0,3,1,2]>(b)
      d = Cast<to = 1>(c)  y = Reshape(d, k)  q = Identity(n)
    }""",
    "functions": """<ir_version: 10, opset_import: ["" : 18, "l" : 1]>
    g (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = l.F(x)  y = Identity(a)  z = l.F(x) }
    <domain: "l", opset_import: ["" : 18]> F (a) => (b) { c = Identity(a)  b = Exp(c) }""",
}


def facts(model: ir.Model) -> tuple[object, ...]:
    """All but the types and shapes of inner values, which are inferred whether or not anything changes."""
    constants = {name: value.const_value for name, value in model.graph.initializers.items()}
    held = (model.ir_version, dict(model.opset_imports), constants, tuple(model.functions))
    return (*held, structure(model), [value.name for value in model.graph.outputs])


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_without_permission(name: str, target: str) -> None:
    model = load_model(parse(MODELS[name]))
    before = facts(model)
    context = Context(model, get_target(target), Options(), gate=Gate(limit=0))
    run_pipeline(model, PIPELINES[target, "fp32"], context)
    assert not context.rewrites
    assert facts(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_with_permission_something_does(name: str) -> None:
    assert apply(PIPELINES["cpu", "fp32"], ir.from_proto(parse(MODELS[name]))).rewrites
