"""Dimensions of single operators and of the shape arithmetic that exporters write, with symbols."""

from __future__ import annotations

import re

import onnx_ir as ir
import pytest

from graphopt.ir.shapes import Shapes


def inferred(
    body: str, inputs: str = "float[N, 3, H, W] x", opset: int = 18
) -> tuple[ir.Model, Shapes]:
    """A graph of one result `y` of unknown shape, and what is inferred of it."""
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["":{opset}, "com.microsoft":1, "mine":1]>'
        f" g ({inputs}) => (y) {{ {body} }}"
    )
    return model, Shapes(model)


def dims_of(body: str, inputs: str = "float[N, 3, H, W] x", opset: int = 18) -> str:
    model, shapes = inferred(body, inputs, opset)
    dims = shapes.dims(model.graph.outputs[0])
    return "unknown" if dims is None else ", ".join(map(str, dims))


def ints(name: str, *elements: int) -> str:
    return f"{name} = Constant<value_ints = [{', '.join(map(str, elements))}]>() "


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Relu(x)", "N, 3, H, W"),
        ("y = Transpose<perm = [0, 2, 3, 1]>(x)", "N, H, W, 3"),
        ("y = Flatten(x)", "N, 3*H*W"),
        ("y = GlobalAveragePool(x)", "N, 3, 1, 1"),
        ("y = Shape<start = 1, end = -1>(x)", "2"),
        ("y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)", "N, 3, (H // 2), (W // 2)"),
        ("y = DepthToSpace<blocksize = 1>(x)", "N, 3, H, W"),
        (ints("a", 2) + "y = ReduceMean<keepdims = 0>(x, a)", "N, 3, W"),
        (ints("a", 0) + "y = Unsqueeze(x, a)", "1, N, 3, H, W"),
        (ints("a", 1, 1, 2, 2) + "y = Tile(x, a)", "N, 3, 2*H, 2*W"),
        (ints("s", 0, -1) + "y = Reshape(x, s)", "N, 3*H*W"),
        (ints("s", 0, 3, -1) + "y = Reshape(x, s)", "N, 3, H*W"),
        (ints("p", 0, 0, 1, 0, 0, 0, 1, 2) + "y = Pad(x, p)", "N, 3, H + 2, W + 2"),
        (
            ints("s", 1) + ints("e", 9223372036854775807) + ints("a", 2) + "y = Slice(x, s, e, a)",
            "N, 3, max(0, H - 1), W",
        ),
        (
            ints("s", -2) + ints("e", 2147483647) + ints("a", 2) + "y = Slice(x, s, e, a)",
            "N, 3, min(2, H), W",
        ),
        ("y = ArgMax<axis = 1, keepdims = 0>(x)", "N, H, W"),
        ("z, y = Split<axis = 2, num_outputs = 2>(x)", "N, 3, -((H + 1) // 2) + H, W"),
    ],
)
def test_dims_of_one_operator(body: str, expected: str) -> None:
    assert (
        dims_of(body).replace("((H) // (2))", "(H) // (2)").replace("((W) // (2))", "(W) // (2)")
        == expected
    )


@pytest.mark.parametrize(
    ("body", "inputs", "expected"),
    [
        ("y = MatMul(x, w)", "float[B, S, 8] x, float[8, 4] w", "B, S, 4"),
        ("y = Gemm<transB = 1>(x, w)", "float[B, 8] x, float[4, 8] w", "B, 4"),
        ("y = Add(x, w)", "float[B, S, 8] x, float[S, 1] w", "B, S, 8"),
        ("y = Add(x, w)", "float[B] x, float[C] w", "broadcast(B, C)"),
        ("y = Concat<axis = 1>(x, w)", "float[B, P] x, float[B, S] w", "B, P + S"),
        (
            'y = Einsum<equation = "bij,bjk->bik">(x, w)',
            "float[B, I, J] x, float[B, J, K] w",
            "B, I, K",
        ),
        ("y = Gather<axis = 1>(x, w)", "float[V, D] x, int64[B, S] w", "V, B, S"),
        ("y = Where(c, x, w)", "bool[B, 1] c, float[1, S] x, float[1] w", "B, S"),
        ("y, s = TopK(x, k)", "float[B, S] x, int64[1] k", "B, ?0"),
        (
            "y = com.microsoft.FusedMatMul<transB = 1>(x, w)",
            "float[B, S, 8] x, float[B, T, 8] w",
            "B, S, T",
        ),
        (
            "y = com.microsoft.MatMulNBits<K = 8, N = 5>(x, w, w)",
            "float[B, S, 8] x, uint8[5, 1, 4] w",
            "B, S, 5",
        ),
        (
            "y, h, c = LSTM<hidden_size = 6>(x, w, w)",
            "float[S, B, 8] x, float[1, 24, 8] w",
            "S, 1, B, 6",
        ),
        (
            "y = ConvTranspose<strides = [2]>(x, w)",
            "float[B, 4, L] x, float[4, 5, 3] w",
            "B, 5, 2*L + 1",
        ),
        ("y = QuantizeLinear(x, w)", "float[B, 4] x, float w", "B, 4"),
        ("y = mine.Foo(x)", "float[B] x", "unknown"),
        ("y = Reshape(x, s)", "float[B] x, int64[3] s", "?0, ?1, ?2"),
    ],
)
def test_dims_of_several_inputs(body: str, inputs: str, expected: str) -> None:
    model, shapes = inferred(body, inputs)
    text = dims_of(body, inputs)
    if "?" in expected:
        dims = shapes.dims(model.graph.outputs[0])
        assert dims is not None
        assert [dim.is_named() for dim in dims] == ["?" not in e for e in expected.split(", ")]
    else:
        assert text == expected


SPLIT_HEADS = """s = Shape(x)  i = Constant<value_int = 2>()  d = Gather(s, i)
    four = Constant<value_int = 4>()  q = Div(d, four)
    b = Shape<start = 0, end = 1>(x)  t = Shape<start = 1, end = 2>(x)
    zero = Constant<value_ints = [0]>()  h = Unsqueeze(q, zero)  f = Unsqueeze(four, zero)
    k = Concat<axis = 0>(b, t, f, h)  y = Reshape(x, k)"""

WINDOWS = """s = Shape(x)  one = Constant<value_int = 1>()  h = Gather(s, one)
    seven = Constant<value_int = 7>()  r = Mod(h, seven)  d = Sub(seven, r)  p = Mod(d, seven)
    z = Constant<value_ints = [0]>()  u = Unsqueeze(p, z)
    zero = Constant<value_ints = [0, 0, 0]>()  w = Concat<axis = 0>(zero, u)  y = Pad(x, w)"""

HALF = """s = Shape(x)  f = Cast<to = 1>(s)  two = Constant<value = float {2.0}>()  g = Div(f, two)
    n = Floor(g)  i = Cast<to = 7>(n)  y = ConstantOfShape(i)"""

EXPAND = """s = Shape(x)  m = Constant<value_ints = [-1, -1]>()  e = Equal(s, m)
    o = Constant<value_ints = [1, 1]>()  w = Where(e, o, s)  y = Expand(x, w)"""

RANGE = """s = Shape(x)  i = Constant<value_int = 1>()  n = Gather(s, i)
    zero = Constant<value_int = 0>()  y = Range(zero, n, i)"""

FLATTEN = """s = Shape(x)  r = ReduceProd<keepdims = 1>(s)  y = Reshape(x, r)"""


@pytest.mark.parametrize(
    ("body", "inputs", "expected"),
    [
        (SPLIT_HEADS, "float[B, T, 64] x", "B, T, 4, 16"),
        (WINDOWS, "float[B, H] x", "B, 7*((H + 6) // 7)"),
        (HALF, "float[B, T] x", "(B // 2), (T // 2)"),
        (EXPAND, "float[B, T] x", "B, T"),
        (RANGE, "float[B, T] x", "T"),
        (FLATTEN, "float[B, T] x", "B*T"),
    ],
)
def test_shape_arithmetic_of_exporters(body: str, inputs: str, expected: str) -> None:
    assert dims_of(body, inputs) == expected


def test_resize_rounds_as_float32_does() -> None:
    body = """s = Constant<value_floats = [1.0, 0.7]>()  y = Resize(x, , s)"""
    assert dims_of(body, "float[N, 10] x") == "N, 7"
    half = body.replace("0.7", "1.5")
    assert dims_of(half, "float[N, H] x") == "N, (H // 2) + H"


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", "N, (L // 4) - 1, 5, 2"), ("<onesided = 0>", "N, (L // 4) - 1, 8, 2")],
)
def test_one_side_of_a_spectrum_is_the_default(given: str, expected: str) -> None:
    body = (
        "s = Constant<value_int = 4>() n = Constant<value_int = 8>() w = Constant<value_floats = "
        f"[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]>() y = STFT{given}(x, s, w, n)"
    )
    assert dims_of(body, "float[N, L, 1] x") == expected


def test_a_spectrum_of_a_window_alone() -> None:
    body = "y = STFT(x, s, w)"
    assert dims_of(body, "float[N, L, 1] x, int64 s, float[6] w").endswith(", 4, 2")
    assert dims_of("y = STFT(x, s)", "float[N, L, 1] x, int64 s") == "unknown"


def test_ranges_of_floats_are_counted_as_runtimes_count() -> None:
    body = """a = Constant<value_float = 0.0>()  b = Constant<value_float = 0.7>()
        d = Constant<value_float = 0.1>()  y = Range(a, b, d)"""
    assert dims_of(body) == "7"


def test_integer_division_truncates_toward_zero() -> None:
    body = """s = Shape(x)  z = Constant<value_int = 0>()  n = Gather(s, z)  m = Neg(n)
        two = Constant<value_int = 2>()  y = Div(m, two)"""
    model, shapes = inferred(body, "float[N] x")
    data = shapes.data(model.graph.outputs[0])
    assert data is not None
    assert str(data.item()) == "-(N // 2)"


def test_contents_of_small_tensors() -> None:
    model, shapes = inferred("y = Shape(x)")
    data = shapes.data(model.graph.outputs[0])
    assert data is not None
    assert [str(dim) for dim in data.dims or ()] == ["N", "3", "H", "W"]
    assert data.shape == (4,)
    assert not data.is_static
    assert data.static() is None


def test_unknown_elements_are_symbols_of_their_own() -> None:
    model, shapes = inferred("y = ConstantOfShape(n)", "int64[2] n")
    dims = shapes.dims(model.graph.outputs[0])
    elements = shapes.data(model.graph.inputs[0])
    assert dims is not None
    assert elements is not None
    assert dims == elements.dims
    assert dims[0] != dims[1]


def test_every_dtype_of_cast_is_known_without_a_rule_for_it() -> None:
    model, shapes = inferred("y = Cast<to = 17>(x)")
    assert shapes.dtype(model.graph.outputs[0]) == ir.DataType.FLOAT8E4M3FN


def test_malformed_nodes_give_unknown_and_no_exception() -> None:
    assert dims_of("y = Concat<axis = 9>(x, x)") == "unknown"
    assert dims_of("y = MatMul(x)") == "unknown"
    assert dims_of("y = Transpose<perm = [0, 9]>(x)") == "unknown"
    assert dims_of("y = If(x) <then_branch = a () => (o) { o = Relu(x) }>") == "unknown"


@pytest.mark.parametrize(("opset", "expected"), [(6, "N, 3, H, W"), (7, "N, 3, H, W")])
def test_old_opsets_broadcast_to_the_first_operand(opset: int, expected: str) -> None:
    assert dims_of("y = Add(x, w)", "float[N, 3, H, W] x, float[W] w", opset) == expected


UNKNOWN = "u = mine.Op(x) "


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (UNKNOWN + "y = Conv(u, w)", "?, 5, ?"),
        (UNKNOWN + "y = Conv(r, u)", "N, ?, ?"),
        (UNKNOWN + "y = ConvTranspose<group = 2>(u, w)", "?, 8, ?"),
        (UNKNOWN + "y = ConvTranspose(r, u)", "N, ?, ?"),
        (UNKNOWN + "y = Conv(u, u)", "unknown"),
        (UNKNOWN + "y, h, c = LSTM<hidden_size = 6>(u, r, r)", "?, 1, ?, 6"),
        (UNKNOWN + "h, y, c = LSTM<hidden_size = 6>(u, r, r)", "1, ?, 6"),
        (
            UNKNOWN + 'h, y = GRU<hidden_size = 6, direction = "bidirectional">(u, r, r)',
            "2, ?, 6",
        ),
    ],
)
def test_weights_tell_what_an_unknown_input_does_not(body: str, expected: str) -> None:
    found = dims_of(body, "float[N, 3, H] x, float[5, 4, 2] w, float[N, 4, H] r")
    assert re.sub(r"\?\d+", "?", found) == expected
