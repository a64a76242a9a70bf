"""Shape arithmetic rebuilt from where the dims are."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.shape_sources import RebuildShapes

from graphopt.rewrite import Context, Gate
from graphopt.targets import get_target
from tests.rewriting import apply, check, parse, structure

PASS = (RebuildShapes(),)
INTS = """<int64 i0 = {0}, int64 i1 = {1}, int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] two = {2},
    int64[1] c8 = {8}, int64[1] lead = {-1}>"""


def test_shape_put_together_from_its_dims_is_the_shape() -> None:
    head = "g (float[A,B] x, float k) => (float[A,B] y)"
    check(
        PASS,
        before=f"""{head} {INTS} {{ s = Shape(x)  a = Gather(s, i0)  b = Gather(s, i1)  p = Unsqueeze(a, v0)
            q = Unsqueeze(b, v0)  t = Concat<axis = 0>(p, q)  y = Expand(k, t) }}""",
        after=f"{head} {{ s = Shape(x)  y = Expand(k, s) }}",
    )


def operators_after(text: str) -> dict[str, int]:
    """The operators that the pass leaves, counted."""
    model = ir.from_proto(parse(text))
    apply(PASS, model)
    return dict(collections.Counter(node.op_type for node in model.graph))


def test_dims_come_from_the_first_tensor_that_has_them() -> None:
    """Dims of a Transpose of a Relu of a Cast are dims of the graph input."""
    head = "g (int32[A,4,B] x, float[1,1] k) => (float[B,A] y)"
    check(
        PASS,
        before=f"""{head} {INTS} {{ h = Cast<to = 1>(x)  r = Relu(h)  w = Transpose<perm = [2, 1, 0]>(r)
            s = Shape(w)  b = Gather(s, v0)  e = Shape<start = 2>(w)  d = Identity(e)
            t = Concat<axis = 0>(b, d)  y = Expand(k, t) }}""",
        after=f"""{head} {{ a = Shape<end = 1>(x)  b = Shape<start = 2>(x)  t = Concat<axis = 0>(b, a)
            y = Expand(k, t) }}""",
    )


@pytest.mark.parametrize("opset", [13, 18])
def test_before_opset_15_a_dim_is_gathered(opset: int) -> None:
    head = "g (float[A,B] x, float[1,1,1] k) => (float[B,8,A] y)"
    dims = {
        13: "s = Shape(x)  q = Gather(s, v0)  p = Gather(s, v1)",
        18: "q = Shape<end = 1>(x)  p = Shape<start = 1>(x)",
    }
    before = f"""{head} {INTS} {{ s = Shape(x)  a = Gather(s, i0)  b = Gather(s, i1)  p = Unsqueeze(b, v0)
        q = Unsqueeze(a, v0)  t = Concat<axis = 0>(p, c8, q)  y = Expand(k, t) }}"""
    after = f"{head} {INTS} {{ {dims[opset]}  t = Concat<axis = 0>(p, c8, q)  y = Expand(k, t) }}"
    check(PASS, before=before, after=after, opset=opset)


def test_reshape_copies_and_infers_what_it_can() -> None:
    """Two dims are out of place: one is inferred, the other taken from x."""
    head = "g (float[A,B,8] x) => (float[B,8,A] y)"
    check(
        PASS,
        before=f"""{head} {INTS} {{ s = Shape(x)  a = Gather(s, i0)  b = Gather(s, i1)  p = Unsqueeze(b, v0)
            q = Unsqueeze(a, v0)  t = Concat<axis = 0>(p, c8, q)  y = Reshape(x, t) }}""",
        after=f"""{head} {INTS} {{ p = Shape<start = 1, end = 2>(x)  t = Concat<axis = 0>(p, tail)
            y = Reshape(x, t) }}""".replace("int64[1] lead = {-1}", "int64[2] tail = {8, -1}"),
    )


def test_what_no_tensor_has_stays_computed() -> None:
    head = "g (float[A,B] x, float k) => (float[P,Q] y)"
    check(
        PASS,
        before=f"""{head} {INTS} {{ h = Neg(x)  g = Abs(h)  s = Shape(g)  a = Gather(s, i0)  n = Unsqueeze(a, v0)
            m = Mul(n, two)  t = Concat<axis = 0>(m, n)  y = Expand(k, t) }}""",
        after=f"""{head} {INTS} {{ n = Shape<end = 1>(x)  m = Mul(n, two)  t = Concat<axis = 0>(m, n)
            y = Expand(k, t) }}""",
    )


def test_scalar_demand_is_squeezed() -> None:
    head = "g (float[A,B] x) => (int64[N] y)"
    before = f"""{head} {INTS} {{ s = Shape(x)  a = Gather(s, i1)  n = Unsqueeze(a, v0)  r = Squeeze(n, v0)
        y = Range(i0, r, i1) }}"""
    check(
        PASS,
        before=before,
        after=f"{head} {INTS} {{ n = Shape<start = 1>(x)  r = Squeeze(n, v0)  y = Range(i0, r, i1) }}",
    )


def test_shape_that_is_a_graph_output_is_fed_anew() -> None:
    left = operators_after(
        f"""g (float[A,B] x) => (int64[2] t) {INTS} {{ s = Shape(x)  a = Gather(s, i0)  b = Gather(s, i1)
            p = Unsqueeze(a, v0)  q = Unsqueeze(b, v0)  t = Concat<axis = 0>(p, q) }}"""
    )
    assert left == {"Shape": 2, "Concat": 1}


def test_arithmetic_as_small_as_can_be_stays() -> None:
    check(
        PASS,
        before="g (float[A,B] x, float k) => (float[A,B] y) { s = Shape(x)  y = Expand(k, s) }",
    )


def test_contents_of_an_input_stay() -> None:
    check(
        PASS,
        before=f"""g (int64[2] n, float k) => (float[P,Q] y) {INTS} {{ m = Mul(n, two)  t = Add(m, c8)
            y = Expand(k, t) }}""",
        feeds=[{"n": np.array([1, 2]), "k": np.asarray(1.5, np.float32)}],
    )


def test_works_in_a_subgraph_on_its_own_tensors() -> None:
    head = "g (bool c, float[A,B] x, float k) => (float[P,Q] y)"
    inner = """t = Neg(x)  s = Shape(t)  a = Gather(s, i0)  b = Gather(s, i1)  p = Unsqueeze(a, v0)
        q = Unsqueeze(b, v0)  u = Concat<axis = 0>(p, q)  w = Expand(k, u)  z = Add(w, t)"""
    before = f"""{head} {INTS} {{ y = If (c) <then_branch = f () => (float[P,Q] z) {{ {inner} }},
        else_branch = h () => (float[A,B] r) {{ r = Abs(x) }}> }}"""
    after = f"""{head} {INTS} {{ y = If (c) <then_branch = f () => (float[P,Q] z) {{
        t = Neg(x)  s = Shape(t)  w = Expand(k, s)  z = Add(w, t) }},
        else_branch = h () => (float[A,B] r) {{ r = Abs(x) }}> }}"""
    feeds = [
        {"c": np.asarray(b), "x": np.ones((2, 3), np.float32), "k": np.asarray(1.5, np.float32)}
        for b in (True, False)
    ]
    check(PASS, before=before, after=after, feeds=feeds)


def test_works_in_a_function_body_without_initializers() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
    g (float[A,B] x, float[1,1,1] k) => (float[P,Q,R] y) { y = my.f(x, k) }
    <domain: "my", opset_import: ["" : 18]>
    f (x, k) => (y) {
        i0 = Constant<value = int64 {0}>()  i1 = Constant<value = int64 {1}>()  v0 = Constant<value = int64[1] {0}>()
        c8 = Constant<value = int64[1] {8}>()
        s = Shape(x)  a = Gather(s, i0)  b = Gather(s, i1)  p = Unsqueeze(b, v0)  q = Unsqueeze(a, v0)
        t = Concat<axis = 0>(p, c8, q)  y = Expand(k, t) }"""
    model = ir.from_proto(parse(text))
    apply(PASS, model)
    body = next(iter(model.functions.values())).graph
    kinds = [node.op_type for node in body if node.op_type != "Constant"]
    assert kinds == ["Shape", "Shape", "Concat", "Expand"]
    assert not body.initializers


def test_a_closed_gate_keeps_the_arithmetic() -> None:
    text = f"""g (float[A,B] x, float k) => (float[A,B] y) {INTS} {{
        s = Shape(x)  a = Gather(s, i0)  b = Gather(s, i1)  p = Unsqueeze(a, v0)  q = Unsqueeze(b, v0)
        t = Concat<axis = 0>(p, q)
        y = Expand(k, t) }}"""
    model = ir.from_proto(parse(text))
    before = structure(model)
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=0))
    assert not RebuildShapes().run(model, ctx)
    assert structure(model) == before
