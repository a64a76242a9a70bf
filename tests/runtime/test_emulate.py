"""Emulated halves against NumPy and ml_dtypes, which round after every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.ir.model_file import model_to_bytes
from graphopt.runtime.emulate import emulate, has_halves
from graphopt.runtime.session import OptimizationLevel, Session

Array = np.ndarray[Any, Any]
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SPECIALS = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, -65520.0, 3.3e38, 6e-8, 2.9e-8, 1e-40]


def model(text: str, dtype: str = "float16", *, opset: int = 22, **constants: Any) -> ir.Model:
    """Parses a graph in which HALF stands for the dtype; constants become initializers."""
    code = {"float16": "10", "bfloat16": "16"}[dtype]
    text = text.replace("HALF", dtype).replace("CODE", code)
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "my" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    for name, value in constants.items():
        array = np.asarray(value, HALVES[dtype] if not isinstance(value, np.ndarray) else None)
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def run(
    source: ir.Model, feeds: dict[str, Array], level: OptimizationLevel = OptimizationLevel.DISABLED
) -> list[Any]:
    made = emulate(source)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    return list(Session(model_to_bytes(made), level=level).run(feeds).values())


def numbers(dtype: str, count: int = 4000) -> Array:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(count) * np.exp(rng.standard_normal(count) * 3)
    with np.errstate(over="ignore"):
        return np.concatenate([wide, SPECIALS]).astype(HALVES[dtype])


def rounded(function: Callable[..., Array], *halves: Array) -> Array:
    """The function in float32, rounded to the half of its first argument."""
    with np.errstate(all="ignore"):
        wide = function(*[half.astype(np.float32) for half in halves])
        return np.asarray(wide).astype(halves[0].dtype)


def same(got: Array, expected: Array) -> None:
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
    finite = ~np.isnan(expected.astype(np.float32))
    assert np.array_equal(
        np.signbit(got.astype(np.float32))[finite], np.signbit(expected.astype(np.float32))[finite]
    )


UNARY: dict[str, Callable[[Array], Array]] = {
    "Neg": np.negative,
    "Abs": np.abs,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Identity": np.asarray,
}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}


@pytest.mark.parametrize("level", OptimizationLevel)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", UNARY)
def test_rounds_after_unary_operators(op: str, dtype: str, level: OptimizationLevel) -> None:
    source = model(f"g (HALF[N] x) => (HALF[N] y) {{ y = {op}(x) }}", dtype)
    x = numbers(dtype)
    same(run(source, {"x": x}, level)[0], rounded(UNARY[op], x))


@pytest.mark.parametrize("level", OptimizationLevel)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", BINARY)
def test_rounds_after_binary_operators(op: str, dtype: str, level: OptimizationLevel) -> None:
    source = model(f"g (HALF[N] x, HALF[N] z) => (HALF[N] y) {{ y = {op}(x, z) }}", dtype)
    x = numbers(dtype)
    z = np.random.default_rng(1).permutation(x)
    same(run(source, {"x": x, "z": z}, level)[0], rounded(BINARY[op], x, z))


@pytest.mark.parametrize("level", OptimizationLevel)
def test_overflow_between_nodes_shows_where_the_cpu_hides_it(level: OptimizationLevel) -> None:
    source = model(
        "g (HALF[N] x) => (HALF[N] y) { a = Mul(x, k) b = Mul(a, k) y = Div(b, t) }",
        k=300.0,
        t=1000.0,
    )
    x = np.array([1.0, 0.1], np.float16)
    plain = Session(model_to_bytes(source)).run({"x": x})["y"]
    assert np.isfinite(plain).all()
    got = run(source, {"x": x}, level)[0]
    assert np.isinf(got[0])
    assert np.isfinite(got[1])


def test_matmul_accumulates_in_float32_and_rounds_weights_never_again() -> None:
    w = np.random.default_rng(2).standard_normal((64, 8)).astype(np.float16)
    source = model("g (HALF[N,64] x) => (HALF[N,8] y) { y = MatMul(x, w) }", w=w)
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float16)
    expected = (x.astype(np.float64) @ w.astype(np.float64)).astype(np.float16)
    got = run(source, {"x": x})[0]
    assert got.dtype == np.float16
    np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=1e-3, atol=1e-3)


def test_casts_keep_their_meaning() -> None:
    source = model(
        "g (float[N] x, int32[N] i) => (float[N] y, HALF[N] h, float[N] z)"
        "{ h = Cast<to=CODE>(x) y = Cast<to=1>(h) j = CastLike(i, h) z = Cast<to=1>(j) }"
    )
    x = numbers("float16").astype(np.float32) * np.float32(1.0009)
    i = np.arange(x.size, dtype=np.int32)
    y, h, z = run(source, {"x": x, "i": i})
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float16)
    same(h, narrow)
    same(y, narrow.astype(np.float32))
    same(z, i.astype(np.float16).astype(np.float32))


def test_control_flow_sequences_and_captures() -> None:
    source = model(
        "g (HALF[4] x, bool c, int64 n, bool go) => (HALF[4] y, HALF[4] s, HALF[?] q) {"
        " h = Mul(x, k)"
        " y = If(c) <then_branch = t () => (HALF[4] a) { a = Mul(h, k) },"
        "           else_branch = e () => (HALF[4] b) { b = Identity(h) }>"
        " s = Loop(n, go, h) <body = l (int64 i, bool p, HALF[4] u) => (bool o, HALF[4] v)"
        "           { o = Identity(p) v = Mul(u, k) }>"
        " l = SequenceConstruct(x, h)  one = Constant<value_int=1>()  q = SequenceAt(l, one) }",
        k=16.0,
    )
    x = np.array([1.0, 300.0, -5000.0, 1e-7], np.float16)
    feeds = {"x": x, "n": np.array(2), "go": np.array(True)}
    sixteen = np.full(4, 16, np.float16)
    h = rounded(np.multiply, x, sixteen)
    twice = rounded(np.multiply, h, sixteen)
    y, s, q = run(source, feeds | {"c": np.array(True)})
    same(y, twice)
    same(s, rounded(np.multiply, twice, sixteen))
    same(q, h)
    same(run(source, feeds | {"c": np.array(False)})[0], h)


def test_functions_are_inlined() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 22, "my" : 1]>\n'
        "g (float16[N] x) => (float16[N] y) { y = my.Cube(x) }\n"
        '<domain: "my", opset_import: ["" : 22]> Cube (a) => (c) { b = Mul(a, a) c = Mul(a, b) }'
    )
    x = np.array([30.0, 300.0, 0.3], np.float16)
    made = run(ir.from_proto(onnx.parser.parse_model(text)), {"x": x})[0]
    same(made, rounded(np.multiply, x, rounded(np.multiply, x, x)))


def test_attributes_that_name_or_hold_halves() -> None:
    source = model(
        "g (int64[1] n) => (HALF[?] y, HALF[3,3] e, float[?] r) {"
        " c = Constant<value_float=0.1>() h = Cast<to=CODE>(c) z = ConstantOfShape(n) zh = Cast<to=CODE>(z)"
        " y = Add(zh, h) m = Constant<value = float[3,3] {1,2,3,4,5,6,7,8,9}>()"
        " e = EyeLike<dtype=CODE>(m) q = RandomNormal<dtype=CODE, shape=[4]>() r = Cast<to=1>(q) }",
        opset=17,
    )
    y, e, r = run(source, {"n": np.array([2])})
    tenth = np.full(2, 0.1, np.float16)
    same(y, tenth)
    same(e, np.eye(3).astype(np.float16))
    same(r, r.astype(np.float16).astype(np.float32))


def test_quantisation_with_half_scales() -> None:
    source = model(
        "g (HALF[N] x) => (uint8[N] q, HALF[N] y) { q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }",
        s=0.05,
    )
    x = np.array([0.0, 1.0, 2.02, 100.0], np.float16)
    q, y = run(source, {"x": x})
    scale = np.float32(np.float16(0.05))
    assert np.array_equal(
        q, np.clip(np.round(x.astype(np.float32) / scale), 0, 255).astype(np.uint8)
    )
    same(y, (q.astype(np.float32) * scale).astype(np.float16))


def test_outputs_that_are_inputs_constants_or_repeated() -> None:
    source = model(
        "g (HALF[3] x) => (HALF[3] x, HALF[3] k, HALF[3] y) { y = Add(x, k) }", k=[1, 2, 3]
    )
    x = np.array([0.1, 0.2, 0.3], np.float16)
    k = np.array([1, 2, 3], np.float16)
    got = run(source, {"x": x})
    same(got[0], x)
    same(got[1], k)
    same(got[2], rounded(np.add, x, k))


def test_overridable_initializers_stay_inputs() -> None:
    source = model("g (HALF[2] x, HALF[2] k) => (HALF[2] y) { y = Mul(x, k) }", k=[2.0, 3.0])
    x = np.array([1.0, 1.0], np.float16)
    assert run(source, {"x": x})[0].tolist() == [2, 3]
    assert run(source, {"x": x, "k": np.array([5.0, 6.0], np.float16)})[0].tolist() == [5, 6]


def test_float32_graphs_stay_as_they_are() -> None:
    source = model("g (float[N] x) => (float[N] y) { a = Exp(x) y = Log(a) }")
    assert not has_halves(source)
    assert ir.to_proto(emulate(source)).graph.node == ir.to_proto(source).graph.node
    assert has_halves(model("g (float[N] x) => (HALF[N] y) { y = Cast<to=CODE>(x) }"))


def test_the_source_is_left_alone() -> None:
    source = model("g (HALF[N] x) => (HALF[N] y) { y = Mul(x, k) }", k=3.0)
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    emulate(source)
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before
