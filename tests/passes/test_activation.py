"""Activations: every spelling becomes the operator."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import activation

from tests.rewriting import apply, check, parse

MS = '<ir_version: 9, opset_import: ["" : {}, "com.microsoft" : 1]>\n'
NUMBERS = (
    "float half = {0.5}, float two = {2.0}, float one = {1.0}, float three = {3.0}, float six = {6.0},"
    "float zero = {0.0}, float r = {1.4142135}, float ri = {0.70710677}, float k = {0.7978846},"
    "float kc = {0.035677407},"
    "float c = {0.044715}, float tk = {1.5957691}, float sixth = {0.16666667}, float q = {1.702}"
)
G = f"g (float[N,5] x) => (float[N,5] y) <{NUMBERS}> "
AFTER = "g (float[N,5] x) => (float[N,5] y) "

ERF = ["u = Div(x, r)", "u = Mul(ri, x)"]
CUBES = ["q3 = Pow(x, three)", "q2 = Mul(x, x) q3 = Mul(q2, x)", "q2 = Pow(x, two) q3 = Mul(x, q2)"]
TANH = [
    *(f"{cube} s = Mul(q3, c) t = Add(x, s) u = Mul(k, t)" for cube in CUBES),
    "q2 = Mul(x, x) s = Mul(c, q2) t = Mul(s, x) p = Add(t, x) u = Mul(p, k)",
    "q2 = Mul(x, x) s = Mul(c, q2) t = Add(one, s) p = Mul(x, k) u = Mul(p, t)",
    "s = Mul(x, c) t = Mul(s, x) p = Add(t, one) v = Mul(x, k) u = Mul(v, p)",
    "q2 = Mul(x, x) q3 = Mul(q2, x) s = Mul(q3, kc) t = Mul(x, k) u = Add(s, t)",
]
TAILS = [
    "g = Add(f, one) h = Mul(x, half) y = Mul(h, g)",
    "g = Add(one, f) h = Div(x, two) y = Mul(g, h)",
    "g = Add(f, one) h = Mul(x, g) y = Mul(h, half)",
    "g = Add(f, one) h = Mul(g, x) y = Div(h, two)",
    "g = Add(f, one) h = Mul(half, g) y = Mul(x, h)",
    "g = Add(f, one) h = Div(g, two) y = Mul(h, x)",
    "g = Mul(f, half) h = Add(g, half) y = Mul(x, h)",
]


@pytest.mark.parametrize(("head", "tail"), list(itertools.product(ERF, TAILS)))
def test_erf_gelu(head: str, tail: str) -> None:
    check(
        activation.RULES,
        before=f"{G} {{ {head} f = Erf(u) {tail} }}",
        after=f"{AFTER} {{ y = Gelu(x) }}",
        opset=20,
    )


@pytest.mark.parametrize(
    ("head", "tail"), [*((h, TAILS[0]) for h in TANH), *((TANH[0], t) for t in TAILS)]
)
def test_tanh_gelu(head: str, tail: str) -> None:
    check(
        activation.RULES,
        before=f"{G} {{ {head} f = Tanh(u) {tail} }}",
        after=f'{AFTER} {{ y = Gelu<approximate="tanh">(x) }}',
        opset=20,
    )


def test_gelu_below_its_opset_imports_the_contrib_domain() -> None:
    for f, op in (("Erf", "Gelu"), ("Tanh", "FastGelu")):
        head = ERF[0] if f == "Erf" else TANH[0]
        check(
            activation.RULES,
            before=f"{G} {{ {head} f = {f}(u) {TAILS[0]} }}",
            after=MS.format(17) + AFTER + f"{{ y = com.microsoft.{op}(x) }}",
            opset=17,
        )


@pytest.mark.parametrize(
    ("f", "head", "reason"),
    [("Erf", ERF[0], "Gelu needs opset 20"), ("Tanh", TANH[0], "Gelu needs opset 20")],
)
def test_gelu_that_the_target_lacks_stays(f: str, head: str, reason: str) -> None:
    check(
        activation.RULES,
        before=f"{G} {{ {head} f = {f}(u) {TAILS[0]} }}",
        opset=17,
        target="portable",
        missed=reason,
    )


def test_gelu_in_a_function_imports_the_contrib_domain_there_too() -> None:
    text = (
        '<ir_version: 9, opset_import: ["" : 17, "my" : 1]>\n'
        "g (float[N,5] x) => (float[N,5] y) { y = my.act(x) }\n"
        '<opset_import: ["" : 17], domain: "my">\n'
        "act (x) => (y) { h = Constant<value = float {0.5}>() r = Constant<value = float {1.4142135}>()"
        " o = Constant<value = float {1.0}>()"
        " u = Div(x, r) f = Erf(u) g = Add(f, o) q = Mul(x, h) y = Mul(q, g) }"
    )
    model = ir.from_proto(parse(text))
    assert apply(activation.RULES, model).rewrites
    function = next(iter(model.functions.values()))
    assert function.opset_imports["com.microsoft"] == model.opset_imports["com.microsoft"] == 1


def test_gelu_of_nothing() -> None:
    check(
        activation.RULES,
        before=f"{G} {{ {ERF[0]} f = Erf(u) {TAILS[0]} }}",
        after=f"{AFTER} {{ y = Gelu(x) }}",
        opset=20,
        dims=(0,),
    )


def test_gelu_of_float64_stays() -> None:
    check(
        activation.RULES,
        before="g (double[N,5] x) => (double[N,5] y)"
        "<double half = {0.5}, double one = {1.0}, double r = {1.4142135623730951}>"
        "{ u = Div(x, r) f = Erf(u) g = Add(f, one) h = Mul(x, half) y = Mul(h, g) }",
        opset=20,
        missed="no Gelu for DOUBLE",
        feeds=[],
    )


@pytest.mark.parametrize(
    "body",
    [
        f"u = Mul(x, half) f = Erf(u) {TAILS[0]}",
        f"u = Mul(x, k) f = Tanh(u) {TAILS[0]}",
        f"u = Div(x, r) f = Erf(u) {TAILS[0].replace('half', 'two')}",
        "u = Div(x, r) f = Erf(u) g = Add(f, one) h = Mul(x, g) y = Div(h, half)",
        "z = Relu(x) u = Div(z, r) f = Erf(u) g = Add(f, one) h = Mul(x, half) y = Mul(h, g)",
    ],
)
def test_what_is_no_gelu_stays(body: str) -> None:
    check(activation.RULES, before=f"{G} {{ {body} }}", opset=20)


def test_gelu_whose_input_is_used_elsewhere() -> None:
    check(
        activation.RULES,
        before=G.replace("y)", "y, float[N,5] z)", 1)
        + f"{{ {ERF[0]} f = Erf(u) {TAILS[0]} z = Add(x, u) }}",
        after="g (float[N,5] x) => (float[N,5] y, float[N,5] z) <float r>"
        "{ u = Div(x, r) y = Gelu(x) z = Add(x, u) }",
        opset=20,
    )


def test_gelu_whose_gate_is_an_output_stays() -> None:
    check(
        activation.RULES,
        before=G.replace("y)", "y, float[N,5] g)", 1) + f"{{ {ERF[0]} f = Erf(u) {TAILS[0]} }}",
        opset=20,
        missed="graph output",
    )


@pytest.mark.parametrize(
    "half", ["float[1,1,1] half = {0.5}", "float[5] half = {0.5,0.5,0.5,0.5,0.5}"]
)
def test_constant_that_broadens_stays(half: str) -> None:
    out = "1,N,1" if half.startswith("float[1,") else "N,5"
    check(
        activation.RULES,
        before=f"g (float[N,1] x) => (float[{out}] y) <{half}, float one = {{1.0}}, float r = {{1.4142135}}>"
        f"{{ {ERF[0]} f = Erf(u) {TAILS[0]} }}",
        opset=20,
        missed="broaden",
    )


@pytest.mark.parametrize(("number", "alpha"), [("", "1.0"), ("q", "1.702")])
def test_quick_gelu(number: str, alpha: str) -> None:
    body = f"u = Mul(x, {number}) s = Sigmoid(u)" if number else "s = Sigmoid(x)"
    check(
        activation.RULES,
        before=f"{G} {{ {body} y = Mul(s, x) }}",
        after=MS.format(18) + AFTER + f"{{ y = com.microsoft.QuickGelu<alpha={alpha}>(x) }}",
    )


def test_quick_gelu_stays_where_the_target_has_none() -> None:
    check(activation.RULES, before=f"{G} {{ s = Sigmoid(x) y = Mul(s, x) }}", target="tensorrt")


def test_tanh_gelu_spelled_with_sigmoid() -> None:
    check(
        activation.RULES,
        before=f"{G} {{ q2 = Mul(x, x) q3 = Mul(q2, x) s = Mul(q3, c) t = Add(x, s) u = Mul(tk, t)"
        " f = Sigmoid(u) y = Mul(x, f) }",
        after=f'{AFTER} {{ y = Gelu<approximate="tanh">(x) }}',
        opset=20,
    )


def test_sigmoid_gate_of_something_else_stays() -> None:
    check(
        activation.RULES,
        before=f"{G} {{ z = Relu(x) s = Sigmoid(z) y = Mul(s, x) }}",
    )


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) b = Clip(a, zero, six) y = Div(b, six)",
        "a = Add(three, x) b = Clip(a, zero, six) y = Mul(sixth, b)",
        "a = Div(x, six) b = Add(a, half) y = Clip(b, zero, one)",
        "a = Mul(x, sixth) b = Add(half, a) y = Clip(b, zero, one)",
    ],
)
def test_hard_sigmoid(body: str) -> None:
    check(
        activation.RULES,
        before=f"{G} {{ {body} }}",
        after=f"{AFTER} {{ y = HardSigmoid<alpha=0.16666667, beta=0.5>(x) }}",
    )


def test_hard_sigmoid_with_bounds_as_attributes() -> None:
    check(
        activation.RULES,
        before=f"{G} {{ a = Add(x, three) b = Clip<min=0.0, max=6.0>(a) y = Div(b, six) }}",
        after=f"{AFTER} {{ y = HardSigmoid<alpha=0.16666667, beta=0.5>(x) }}",
        opset=9,
    )


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) b = Clip(a, zero, six) y = Div(b, three)",
        "a = Add(x, three) b = Clip(a, one, six) y = Div(b, six)",
        "a = Add(x, three) b = Clip(a, zero) y = Div(b, six)",
        "y = Clip(x, zero, one)",
        "a = Sub(x, x) b = Clip(a, zero, six) y = Div(six, b)",
    ],
)
def test_what_is_no_hard_sigmoid_stays(body: str) -> None:
    check(activation.RULES, before=f"{G} {{ {body} }}")


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) b = Clip(a, zero, six) h = Mul(x, b) y = Div(h, six)",
        "a = Add(x, three) b = Clip(a, zero, six) h = Mul(x, b) y = Mul(h, sixth)",
        "a = Add(x, three) b = Clip(a, zero, six) h = Div(b, six) y = Mul(h, x)",
    ],
)
def test_hard_swish(body: str) -> None:
    check(
        activation.RULES,
        before=f"{G} {{ {body} }}",
        after=f"{AFTER} {{ h = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, h) }}"
        if "h = Mul" in body
        else f"{AFTER} {{ h = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(h, x) }}",
    )
    check(
        activation.RULES,
        before=f"{G} {{ {body} }}",
        after=f"{AFTER} {{ y = HardSwish(x) }}",
        target="tensorrt",
    )


def test_hard_swish_with_another_divisor_stays() -> None:
    check(
        activation.RULES,
        before=f"{G} {{ a = Add(x, three) b = Clip(a, zero, six) h = Mul(x, b) y = Mul(h, six) }}",
    )
    check(
        activation.RULES,
        before=f"{G} {{ a = Add(x, three) b = Clip(a, zero, three) h = Mul(x, b) y = Div(h, six) }}",
    )
    check(
        activation.RULES,
        before=f"{G} {{ h = HardSigmoid(x) y = Mul(h, x) }}",
        target="tensorrt",
    )


def test_mish() -> None:
    body = "a = Exp(x) b = Add(a, one) s = Log(b) t = Tanh(s) y = Mul(x, t)"
    check(
        activation.RULES,
        before=f"{G} {{ {body} }}",
        after=f"{AFTER} {{ y = Mish(x) }}",
        target="tensorrt",
    )
    check(activation.RULES, before=f"{G} {{ {body} }}", missed="no Softplus")


@pytest.mark.parametrize("arguments", ["x, a", "a, x"])
def test_leaky_relu(arguments: str) -> None:
    check(
        activation.RULES,
        before=f"{G} {{ a = Mul(c, x) y = Max({arguments}) }}",
        after=f"{AFTER} {{ y = LeakyRelu<alpha=0.044715>(x) }}",
    )


@pytest.mark.parametrize("slope", ["two", "zero", "one"])
def test_max_with_another_slope_stays(slope: str) -> None:
    check(activation.RULES, before=f"{G} {{ a = Mul({slope}, x) y = Max(x, a) }}")


def test_leaky_relu_of_float64_stays() -> None:
    check(
        activation.RULES,
        before="g (double[N,5] x) => (double[N,5] y) <double c = {0.1}> { a = Mul(c, x) y = Max(x, a) }",
    )


@pytest.mark.parametrize(
    "slope", ["float[5,1] s = {0.25,0.25,0.25,0.25,0.25}", "float[1] s = {0.25}"]
)
def test_uniform_prelu(slope: str) -> None:
    check(
        activation.RULES,
        before=f"g (float[N,5,6] x) => (float[N,5,6] y) <{slope}> {{ y = PRelu(x, s) }}",
        after="g (float[N,5,6] x) => (float[N,5,6] y) { y = LeakyRelu<alpha=0.25>(x) }",
    )


def test_prelu_of_several_slopes_stays() -> None:
    check(
        activation.RULES,
        before="g (float[N,2] x) => (float[N,2] y) <float[2] s = {0.25, 0.5}> { y = PRelu(x, s) }",
        missed="differ",
    )


PAIRS = {
    "difference": "p = Relu(x) n = Neg(x) r = Relu(n) t = Mul(r, a) y = Sub(p, t)",
    "sum": "p = Relu(x) n = Neg(x) r = Relu(n) t = Mul(na, r) y = Add(p, t)",
    "negated": "p = Relu(x) n = Neg(x) r = Relu(n) t = Mul(r, a) s = Neg(t) y = Add(s, p)",
    "minimum": "p = Relu(x) n = Min(x, zero) t = Mul(a, n) y = Add(p, t)",
    "remainder": "p = Relu(x) n = Sub(x, p) t = Mul(a, n) y = Add(p, t)",
    "magnitude": "p = Relu(x) m = Abs(x) n = Sub(x, m) t = Mul(a, n) h = Mul(t, half) y = Add(p, h)",
    "half magnitude": "p = Relu(x) m = Abs(x) n = Sub(x, m) h = Mul(n, half) t = Mul(a, h) y = Add(p, t)",
    "divided magnitude": "p = Relu(x) m = Abs(x) n = Sub(x, m) t = Mul(a, n) h = Div(t, two) y = Add(p, h)",
}
SLOPES = "float[3,1] a = {0.1, 0.2, -0.3}, float[3,1] na = {-0.1, -0.2, 0.3}"


@pytest.mark.parametrize("body", PAIRS.values(), ids=PAIRS)
def test_prelu_of_parts(body: str) -> None:
    held = f"<{SLOPES}, float zero = {{0.0}}, float half = {{0.5}}, float two = {{2.0}}>"
    check(
        activation.RULES,
        f"g (float[N,3,4] x) => (float[N,3,4] y) {held} {{ {body} }}",
        f"g (float[N,3,4] x) => (float[N,3,4] y) <{SLOPES}> {{ y = PRelu(x, a) }}",
        target="cuda",
    )
    check(
        activation.RULES,
        f"g (float[N,3,4] x) => (float[N,3,4] y) {held} {{ {body} }}",
        missed="slower than its parts",
    )
    check(
        activation.RULES,
        f"g (float[N,3,4] x) => (float[N,3,4] y) {held} {{ {body} }}".replace(
            SLOPES, "float a = {0.5}, float na = {-0.5}"
        ),
        "g (float[N,3,4] x) => (float[N,3,4] y) { y = LeakyRelu<alpha=0.5>(x) }",
    )


@pytest.mark.parametrize(
    "body",
    [
        "p = Relu(x) n = Neg(x) r = Relu(n) t = Mul(r, z) y = Sub(p, t)",  # a slope that is computed
        "p = Relu(x) n = Neg(z) r = Relu(n) t = Mul(r, a) y = Sub(p, t)",  # another value
        "p = Relu(x) r = Relu(x) t = Mul(r, a) y = Sub(p, t)",
    ],
)
def test_other_pairs_of_relu_stay(body: str) -> None:
    check(
        activation.RULES,
        f"g (float[N,3,4] x, float[N,3,4] z) => (float[N,3,4] y) <{SLOPES}> {{ {body} }}",
    )


def test_prelu_that_broadens_stays() -> None:
    body = PAIRS["difference"]
    check(
        activation.RULES,
        f"g (float[1,4] x) => (float[3,4] y) <{SLOPES}> {{ {body} }}",
        missed="broaden",
    )


@pytest.mark.parametrize(
    ("tail", "after"),
    [
        ("y = Div(one, d)", "y = Sigmoid(x)"),
        ("y = Reciprocal(d)", "y = Sigmoid(x)"),
        ("y = Div(z, d)", "s = Sigmoid(x) y = Mul(z, s)"),
        ("y = Div(x, d)", "y = com.microsoft.QuickGelu<alpha=1.0>(x)"),
    ],
)
def test_sigmoid_of_parts(tail: str, after: str) -> None:
    g = '<ir_version: 9, opset_import: ["" : 18{ms}]> g (float[N,4] x, float[N,4] z) => (float[N,4] y)'
    check(
        activation.RULES,
        f"{g.format(ms='')} <float one = {{1.0}}> {{ n = Neg(x) e = Exp(n) d = Add(one, e) {tail} }}",
        g.format(ms=', "com.microsoft" : 1' if "microsoft" in after else "") + f" {{ {after} }}",
    )


@pytest.mark.parametrize(
    "body",
    [
        "n = Neg(x) e = Exp(n) d = Add(two, e) y = Reciprocal(d)",
        "e = Exp(x) d = Add(one, e) y = Reciprocal(d)",
        "n = Neg(x) e = Exp(n) d = Add(row, e) y = Reciprocal(d)",
    ],
)
def test_other_quotients_of_exponentials_stay(body: str) -> None:
    check(
        activation.RULES,
        "g (float[N,1] x) => (float[N,M] y) <float one = {1.0}, float two = {2.0}, float[2] row = {1.0, 1.0}>"
        f" {{ {body} }}",
    )


def test_gelu_of_a_root_written_with_six_digits() -> None:
    g = '<ir_version: 9, opset_import: ["" : 20]> g (float[N,4] x) => (float[N,4] y)'
    body = "u = Div(x, r) e = Erf(u) p = Add(e, one) h = Mul(x, half) y = Mul(h, p)"
    numbers = "float r = {{{0}}}, float one = {{1.0}}, float half = {{0.5}}"
    check(
        activation.RULES,
        f"{g} <{numbers.format(1.41421)}> {{ {body} }}",
        f"{g} {{ y = Gelu(x) }}",
        tolerance=1e-5,
    )
    check(activation.RULES, f"{g} <{numbers.format(1.414)}> {{ {body} }}")


@pytest.mark.parametrize("alpha", ["", "<alpha=1.702>"])
def test_swish_where_it_has_no_kernel(alpha: str) -> None:
    text = '<ir_version: 11, opset_import: ["" : 24{0}]> g (float[N,4] x) => (float[N,4] y) {{ y = {1}(x) }}'
    after = f"com.microsoft.QuickGelu{alpha or '<alpha=1.0>'}"
    check(
        activation.RULES,
        text.format("", f"Swish{alpha}"),
        text.format(', "com.microsoft" : 1', after),
        tolerance=1e-5,
    )
    check(activation.RULES, text.format("", f"Swish{alpha}"), target="portable")


HELD = "g (float[4,8] x) => (float[4,8] y) <float t = {20.0}> { s = Softplus(x) c = Greater(x, t)"


def test_a_limit_of_softplus_goes() -> None:
    wide = np.linspace(-40, 40, 32, dtype=np.float32).reshape(4, 8)
    check(
        activation.RULES,
        f"{HELD} y = Where(c, x, s) }}",
        "g (float[4,8] x) => (float[4,8] y) { y = Softplus(x) }",
        feeds=[{"x": wide}],
    )


@pytest.mark.parametrize(
    "text",
    [
        f"{HELD} y = Where(c, x, s) }}".replace("20.0", "10.0"),
        f"{HELD} y = Where(c, s, x) }}",
        f"{HELD} y = Where(c, x, s) }}".replace("float[4,8]", "double[4,8]").replace(
            "float t", "double t"
        ),
        f"{HELD} y = Where(c, x, s) }}".replace("=> (float[4,8] y)", "=> (float[1,4,8] y)").replace(
            "float t = {20.0}", "float[1,1,1] t = {20.0}"
        ),
    ],
)
def test_other_limits_of_softplus_stay(text: str) -> None:
    check(activation.RULES, text)
