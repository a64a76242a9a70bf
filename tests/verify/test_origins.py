"""How outputs are made: randomness taints, ranks and roundings are seen through reshapes, depth is counted."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.verify import origins
from graphopt.verify.compare import Origin
from graphopt.verify.origins import OutputOrigin

HEAD = '<ir_version: 10, opset_import: ["" : 17, "my" : 1, "com.microsoft" : 1]>'


def model(text: str, head: str = HEAD) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(head + text))


@pytest.mark.parametrize(
    ("nodes", "tainted"),
    [
        ("y = RandomNormal<shape = [2]>()  z = Neg(x)", {"y"}),
        ("a = RandomNormalLike<seed = 1.0>(x)  y = Add(a, x)  z = Neg(y)", {"y", "z"}),
        ("a = Bernoulli(x)  y = Shape(a)  z = Neg(x)", set()),
        ("a = RandomUniformLike(x)  b = Shape(a)  y = ConstantOfShape(b)  z = Multinomial(x)", {"z"}),
        ("y = Dropout(x, r, t)  z = Dropout(x, r, f)", {"y"}),
        ("y = Dropout(x, r, c)  z = Dropout(x)", {"y"}),
        ("y = com.microsoft.BiasDropout(x, x, , r, t) z = com.microsoft.BitmaskDropout(x, r, f)", {"y"}),
        ("y = my.noisy(x)  z = my.calm(x)", {"y"}),
        ("""y = If (c) <then_branch = t () => (float[2] p) { p = RandomUniformLike(x) },
                        else_branch = e () => (float[2] q) { q = Neg(x) }>  z = Neg(x)""", {"y"}),
        ("""a = RandomUniformLike(x)
            y = If (c) <then_branch = t () => (float[2] p) { p = Neg(a) },
                        else_branch = e () => (float[2] q) { q = Neg(x) }>  z = Neg(x)""", {"y"}),
    ],
)  # fmt: skip
def test_what_random_operators_reach_is_tainted(nodes: str, tainted: set[str]) -> None:
    text = f"""g (float[2] x, bool c) => (float[2] y, float[2] z) <float r = {{0.5}}, bool t = {{1}}, bool f = {{0}}>
               {{ {nodes} }}
               <domain: "my", opset_import: ["" : 17, "my" : 1]> noisy (v) => (w) {{ w = my.inner(v) }}
               <domain: "my", opset_import: ["" : 17]> inner (v) => (w) {{ w = RandomNormalLike(v) }}
               <domain: "my", opset_import: ["" : 17]> calm (v) => (w) {{ w = Neg(v) }}"""
    found = origins.random_outputs(model(text))
    assert set(found) == tainted
    assert all(found.values())


def test_dropout_before_opset_seven_trains_unless_told() -> None:
    text = (
        "g (float[2] x) => (float[2] y, float[2] z) { y = Dropout(x) z = Dropout<is_test = 1>(x) }"
    )
    assert set(origins.random_outputs(model(text, '<ir_version: 3, opset_import: ["" : 6]>'))) == {
        "y"
    }


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = ArgMax<axis = 1>(x)", OutputOrigin(Origin.RANK, "x", 1)),
        ("a = Neg(x) b = ArgMin(a) d = Squeeze(b) y = Cast<to = 6>(d)", OutputOrigin(Origin.RANK, "a", 0)),
        ("v, y = TopK(x, k)", OutputOrigin(Origin.RANK, "x", -1)),
        ("y, i = TopK(x, k)", OutputOrigin()),
        ("a = ArgMax(x) y = Transpose(a)", OutputOrigin()),
        ("y = QuantizeLinear(x, s, z)", OutputOrigin(Origin.ROUNDED)),
        ("y = Cast<to = 7>(x)", OutputOrigin(Origin.ROUNDED)),
        ("y = Cast<to = 1>(k)", OutputOrigin()),
        ("y = NonMaxSuppression(x, x)", OutputOrigin(Origin.BOXES)),
        ("a = Sigmoid(x) y = Transpose(a)", OutputOrigin(absolute=2.0**-22)),
        ("y = Neg(x)", OutputOrigin()),
        ("""y = If (c) <then_branch = t () => (int64 p) { p = ArgMax(x) },
                        else_branch = e () => (int64 q) { q = ArgMin(x) }>""", OutputOrigin()),
    ],
)  # fmt: skip
def test_origins_are_seen_through_reshapes(nodes: str, expected: OutputOrigin) -> None:
    text = f"g (float[2,3] x, bool c) => (int64 y) <int64[1] k = {{1}}, float s = {{1}}, uint8 z = {{0}}> {{ {nodes} }}"
    assert origins.output_origins(model(text)) == {"y": expected}


def test_depth_counts_rounding_operators_on_the_longest_path() -> None:
    text = """g (float[2] x, bool c) => (float[2] y)
              { a = Exp(x) b = Reshape(a, s) d = Add(b, x) e = my.f(d)
                y = If (c) <then_branch = t () => (float[2] p) { h = Neg(e) p = Exp(h) },
                            else_branch = u () => (float[2] q) { q = Identity(e) }> }
              <domain: "my", opset_import: ["" : 17]> f (v) => (w) { i = Exp(v) w = Log(i) }"""
    # Exp, Add, the function's two, the branch's two and the If itself.
    assert (
        origins.arithmetic_depth(model(text.replace("float[2] x,", "float[2] x, int64[1] s,"))) == 7
    )
    assert origins.arithmetic_depth(model("g (float x) => (float x) { }")) == 0


@pytest.mark.parametrize(
    ("declared", "nodes", "dtype"),
    [
        ("float x", "y = Neg(x)", ir.DataType.FLOAT),
        ("float16 x", "y = Neg(x)", ir.DataType.FLOAT16),
        ("float x", "a = Cast<to = 10>(x) b = Neg(a) y = Cast<to = 1>(b)", ir.DataType.FLOAT16),
        ("float16 x", "y = Cast<to = 16>(x)", ir.DataType.BFLOAT16),
    ],
)
def test_the_narrowest_float_is_found(declared: str, nodes: str, dtype: ir.DataType) -> None:
    text = f"g ({declared}) => ({declared.replace('x', 'y')}) {{ {nodes} }}"
    assert origins.narrowest_float(model(text)) is dtype
