"""Layer, RMS and instance normalisations out of their parts."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import norm

from tests.rewriting import apply, check, parse, run

NUMBERS = "float e = {0.00001}, float two = {2.0}, float half = {0.5}, float mhalf = {-0.5}, float one = {1.0}"
AXES = "int64[1] a = {-1}"
SQUARES = ["q = Pow(d, two)", "q = Mul(d, d)"]
ROOTS = [
    "r = Sqrt(w) n = Div(d, r)",
    "r = Pow(w, half) n = Div(d, r)",
    "r = Sqrt(w) i = Reciprocal(r) n = Mul(d, i)",
    "r = Sqrt(w) i = Div(one, r) n = Mul(i, d)",
    "i = Pow(w, mhalf) n = Mul(d, i)",
]
MEAN = "m = ReduceMean(x, a) d = Sub(x, m)"


def _moment(root: str, square: str = SQUARES[0]) -> str:
    return f"{square} v = ReduceMean(q, a) w = Add(v, e) {root}"


def _graph(shape: str, consts: str = "", axes: str = AXES) -> str:
    return f"g (float[{shape}] x) => (float[{shape}] y) <{NUMBERS}, {axes}{consts}> "


def _check(
    before: str, after: str | None, *, missed: str = "", opset: int = 18, target: str = "cpu"
) -> None:
    check(
        norm.RULES,
        before,
        after,
        missed=missed,
        opset=opset,
        target=target,
        tolerance=1e-5,
        dims=(3, 5),
    )


@pytest.mark.parametrize(("square", "root"), list(itertools.product(SQUARES, ROOTS)))
def test_layer_norm_without_affine(square: str, root: str) -> None:
    _check(
        _graph("N,4,8") + f"{{ {MEAN} {_moment(root, square)} y = Identity(n) }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s>"
        "{ n = LayerNormalization<axis=-1, epsilon=0.00001>(x, s) y = Identity(n) }",
    )


@pytest.mark.parametrize("shape", ["8", "1,8", "1", ""])
def test_layer_norm_with_affine(shape: str) -> None:
    s, b = (f"float[{shape}] {v}" if shape else f"float {v}" for v in "sb")
    _check(
        _graph("N,4,8", f", {s}, {b}")
        + f"{{ {MEAN} {_moment(ROOTS[0])} t = Mul(s, n) y = Add(t, b) }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s, float[8] b>"
        "{ y = LayerNormalization<axis=-1, epsilon=0.00001>(x, s, b) }",
    )


def test_layer_norm_with_axes_as_attribute() -> None:
    text = _graph("N,4,8", ", float[8] s") + (
        "{ m = ReduceMean<axes=[2]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) w = Add(v, e)"
        " r = Sqrt(w) n = Div(d, r) y = Mul(s, n) }"
    )
    _check(
        text,
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s>"
        "{ y = LayerNormalization<axis=-1, epsilon=0.00001>(x, s) }",
        opset=17,
    )
    _check(text, None, opset=16, missed="LayerNormalization needs opset 17")


def test_layer_norm_over_two_trailing_axes() -> None:
    _check(
        _graph("N,2,3,4", ", float[3,4] s", "int64[2] a = {-2, 2}").replace("N,2,3,4", "N,3,4")
        + f"{{ {MEAN} {_moment(ROOTS[0])} y = Mul(s, n) }}",
        "g (float[N,3,4] x) => (float[N,3,4] y) <float[3,4] s>"
        "{ y = LayerNormalization<axis=-2, epsilon=0.00001>(x, s) }",
    )


def test_computed_scale_and_bias() -> None:
    _check(
        f"g (float[N,4,8] x, float[8] s, float[8] b) => (float[N,4,8] y) <{NUMBERS}, {AXES}>"
        f"{{ {MEAN} {_moment(ROOTS[0])} t = Mul(s, n) y = Add(t, b) }}",
        "g (float[N,4,8] x, float[8] s, float[8] b) => (float[N,4,8] y)"
        "{ y = LayerNormalization<axis=-1, epsilon=0.00001>(x, s, b) }",
    )


def test_second_scale_is_taken_in() -> None:
    _check(
        "g (float[N,8] x) => (float[N,8] y) <float[8] s, float[8] b, float[8] f, float[8] h>"
        "{ n = LayerNormalization(x, s, b) t = Mul(n, f) y = Add(t, h) }",
        "g (float[N,8] x) => (float[N,8] y) <float[8] s, float[8] b> { y = LayerNormalization(x, s, b) }",
    )


@pytest.mark.parametrize(
    ("tail", "more", "reason"),
    [
        ("y = Mul(n, f)", "float[4,1] f", "normalised axes alone"),
        ("y = Add(n, f)", "float[4,8] f", "normalised axes alone"),
        ("y = Mul(n, f)", "float[1,1,1,8] f", "normalised axes alone"),
    ],
)
def test_affine_along_other_axes_stays(tail: str, more: str, reason: str) -> None:
    out = "1,2,4,8" if "1,1,1" in more else "2,4,8"
    _check(
        f"g (float[2,4,8] x) => (float[{out}] y) <float[8] s, {more}>"
        f"{{ n = LayerNormalization(x, s) {tail} }}",
        None,
        missed=reason,
    )


@pytest.mark.parametrize(("f", "op"), [("float[N,8] f", "Mul"), ("float[N,8] f", "Add")])
def test_computed_affine_of_another_shape_stays(f: str, op: str) -> None:
    _check(
        f"g (float[N,8] x, {f}) => (float[N,8] y) <float[8] s> {{ n = LayerNormalization(x, s) y = {op}(n, f) }}",
        None,
        missed="computed" if op == "Mul" else "",
    )


def test_norm_whose_mean_is_used_keeps_its_outputs() -> None:
    _check(
        "g (float[N,8] x) => (float[N,8] y, float[N,1] m) <float[8] s, float[8] f>"
        "{ n, m = LayerNormalization(x, s) y = Mul(n, f) }",
        None,
        missed="statistics",
    )


def test_moments_of_the_batch_axis_stay() -> None:
    _check(
        _graph("3,8", "", "int64[1] a = {0}") + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}",
        None,
    )


def test_different_axes_stay() -> None:
    _check(
        _graph("4,3,8", ", int64[2] b = {1,2}")
        + "{ m = ReduceMean(x, a) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, b) w = Add(v, e)"
        " r = Sqrt(w) y = Div(d, r) }",
        None,
    )


def test_mean_of_squares_minus_square_of_mean_stays() -> None:
    _check(
        _graph("N,8")
        + "{ m = ReduceMean(x, a) d = Sub(x, m) q = Mul(x, x) p = ReduceMean(q, a) mm = Mul(m, m)"
        " v = Sub(p, mm) w = Add(v, e) r = Sqrt(w) y = Div(d, r) }",
        None,
    )


def test_standard_deviation_plus_epsilon_stays() -> None:
    _check(
        _graph("N,8")
        + f"{{ {MEAN} q = Mul(d, d) v = ReduceMean(q, a) r = Sqrt(v) w = Add(r, e) y = Div(d, w) }}",
        None,
    )


def test_computed_epsilon_stays() -> None:
    text = (_graph("N,8") + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}").replace(
        "float e = {0.00001}, ", ""
    )
    _check(text.replace("x)", "x, float e)", 1).replace("float e)", "float[1] e)"), None)


@pytest.mark.parametrize("e", ["float[8] e", "float[1,1,1] e", "float e = {-0.5}"])
def test_epsilon_that_differs_broadens_or_is_negative_stays(e: str) -> None:
    out = "1,N,8" if "1,1,1" in e else "N,8"
    text = (_graph("N,8") + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}").replace(
        "float e = {0.00001}", e
    )
    model = ir.from_proto(parse(text.replace("(float[N,8] y)", f"(float[{out}] y)")))
    ctx = apply(norm.RULES, model)
    assert not ctx.rewrites
    assert ctx.remarks


def test_unknown_size_stays() -> None:
    _check(
        _graph("N,D") + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}",
        None,
        missed="size of the normalised axes",
    )


def test_float64_stays() -> None:
    text = _graph("N,8") + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}"
    _check(text.replace("float", "double"), None, missed="no LayerNormalization for DOUBLE")


def test_deviation_with_another_use_stays() -> None:
    text = _graph("N,8") + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) z = Relu(d) }}"
    _check(
        text.replace("(float[N,8] y)", "(float[N,8] y, float[N,8] z)"), None, missed="other uses"
    )


@pytest.mark.parametrize(("square", "root"), list(itertools.product(SQUARES, ROOTS)))
def test_rms_norm(square: str, root: str) -> None:
    body = _moment(root, square).replace("d,", "x,").replace(" d)", " x)")
    _check(
        _graph("N,4,8", ", float[8] s") + f"{{ {body} y = Mul(n, s) }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s>"
        "{ y = RMSNormalization<axis=-1, epsilon=0.00001>(x, s) }",
        opset=23,
    )


def test_rms_norm_below_its_opset_stays() -> None:
    body = _moment(ROOTS[0]).replace("d,", "x,").replace(" d)", " x)")
    _check(
        _graph("N,8") + f"{{ {body} y = Identity(n) }}",
        None,
        missed="RMSNormalization needs opset 23, the model imports 18",
    )


def test_rms_norm_has_no_bias() -> None:
    _check(
        "g (float[N,8] x) => (float[N,8] y) <float[8] s, float[8] b>"
        "{ n = RMSNormalization(x, s) y = Add(n, b) }",
        None,
        opset=23,
        missed="no bias",
    )


def test_tail_of_a_layer_norm_is_no_rms_norm() -> None:
    body = f"{MEAN} {_moment(ROOTS[0])} y = Identity(n)"
    text = (
        _graph("N,8", ", int64[1] b = {0}")
        + f"{{ {body.replace('ReduceMean(x, a)', 'ReduceMean(x, b)')} }}"
    )
    _check(text, None, opset=23)


def test_rms_norm_in_float32_of_halves() -> None:
    """The casts around a float32 normalisation are what stash_type says."""
    text = (
        f"g (float16[N,8] x) => (float16[N,8] y) <{NUMBERS}, {AXES}, float16[8] s>"
        "{ c = Cast<to=1>(x) q = Mul(c, c) v = ReduceMean(q, a) w = Add(v, e) r = Sqrt(w) i = Reciprocal(r)"
        " n = Mul(c, i) h = Cast<to=10>(n) y = Mul(s, h) }"
    )
    proto = parse(text, opset=23)
    model = ir.from_proto(proto)
    apply(norm.RULES, model)
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
    feed = {"x": np.linspace(-4, 4, 16, dtype=np.float16).reshape(2, 8)}
    np.testing.assert_allclose(run(ir.to_proto(model), feed)[0], run(proto, feed)[0], rtol=2e-3)


def test_scale_before_the_cast_keeps_the_casts() -> None:
    _check(
        "g (float16[N,8] x) => (float16[N,8] y) <float[8] s>"
        "{ c = Cast<to=1>(x) n = LayerNormalization(c, s) y = Cast<to=10>(n) }",
        None,
        missed="before the cast",
    )


def test_casts_to_another_type_stay() -> None:
    _check(
        "g (float16[N,8] x) => (double[N,8] y) <float[1] e = {1.0}>"
        "{ c = Cast<to=1>(x) n = LayerNormalization(c, s) y = Cast<to=11>(n) }".replace(
            "float[1] e = {1.0}", "float[8] s = {1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0}"
        ),
        None,
    )


@pytest.mark.parametrize("shape", ["N,3,H,W", "2,3,4,5,6"])
def test_instance_norm(shape: str) -> None:
    axes = "int64[2] a = {2,3}" if shape.startswith("N") else "int64[3] a = {-1,2,-2}"
    ones = "1,1" if shape.startswith("N") else "1,1,1"
    _check(
        _graph(shape, f", float[3,{ones}] s, float[1,3,{ones}] b", axes)
        + f"{{ {MEAN} {_moment(ROOTS[0])} t = Mul(n, s) y = Add(t, b) }}",
        f"g (float[{shape}] x) => (float[{shape}] y) <float[3] s, float[3] b>"
        "{ y = InstanceNormalization<epsilon=0.00001>(x, s, b) }",
    )


def test_norm_of_no_rows() -> None:
    check(
        norm.RULES,
        _graph("N,8") + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}",
        "g (float[N,8] x) => (float[N,8] y) <float[8] s>"
        "{ n = LayerNormalization<axis=-1, epsilon=0.00001>(x, s) y = Identity(n) }",
        dims=(0,),
    )


CHANNELS = "int64[1] a = {1}"


def test_norm_over_channels() -> None:
    text = (
        _graph("N,3,H,W", ", float[3,1,1] s, float[1,3,1,1] b", CHANNELS)
        + f"{{ {MEAN} {_moment(ROOTS[0])} t = Mul(n, s) y = Add(t, b) }}"
    )
    _check(
        text,
        "g (float[N,3,H,W] x) => (float[N,3,H,W] y) <float[3] s, float[3] b>"
        "{ l = Transpose<perm=[0,2,3,1]>(x) n = LayerNormalization<axis=-1, epsilon=0.00001>(l, s, b)"
        " y = Transpose<perm=[0,3,1,2]>(n) }",
    )
    _check(text, None, target="tensorrt", missed="gains nothing")


def test_norm_over_channels_with_an_affine_along_other_axes() -> None:
    _check(
        _graph("N,3,H,W", ", float[1,1,1] s, float[5] b", CHANNELS).replace("N,3,H,W", "2,3,4,5")
        + f"{{ {MEAN} {_moment(ROOTS[0])} t = Mul(n, b) y = Add(t, s) }}",
        "g (float[2,3,4,5] x) => (float[2,3,4,5] y) <float[3] o, float[1,1,1] s, float[5] b>"
        "{ l = Transpose<perm=[0,2,3,1]>(x) m = LayerNormalization<axis=-1, epsilon=0.00001>(l, o)"
        " n = Transpose<perm=[0,3,1,2]>(m) t = Mul(n, b) y = Add(t, s) }",
    )


def test_computed_affine_after_transpose_stays() -> None:
    _check(
        "g (float[2,4,3] x, float[3,1] f) => (float[2,3,4] y) <float[3] s>"
        "{ n = LayerNormalization(x, s) t = Transpose<perm=[0,2,1]>(n) m = Mul(t, f) y = Add(m, f) }",
        None,
    )


def test_norm_over_a_plane_is_a_layer_norm_where_the_target_has_it() -> None:
    axes = "int64[2] a = {2,3}"
    text = (
        _graph("N,3,4,5", ", float[4,5] s", axes)
        + f"{{ {MEAN} {_moment(ROOTS[0])} y = Mul(n, s) }}"
    )
    _check(
        text,
        "g (float[N,3,4,5] x) => (float[N,3,4,5] y) <float[4,5] s>"
        "{ y = LayerNormalization<axis=-2, epsilon=0.00001>(x, s) }",
    )
    _check(
        text.replace("ReduceMean(x, a)", "ReduceMean<axes=[2,3]>(x)").replace(
            "ReduceMean(q, a)", "ReduceMean<axes=[2,3]>(q)"
        ),
        "g (float[N,3,4,5] x) => (float[N,3,4,5] y) <float[3] s, float[3] b, float[4,5] f>"
        "{ n = InstanceNormalization<epsilon=0.00001>(x, s, b) y = Mul(n, f) }",
        opset=13,
        missed="normalised axes alone",
    )


def test_instance_norm_of_unknown_channels_stays() -> None:
    _check(
        _graph("N,C,H,W", "", "int64[2] a = {2,3}")
        + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}",
        None,
        missed="size",
    )


def test_instance_norm_that_the_target_lacks_stays() -> None:
    text = (
        _graph("N,3,H,W", "", "int64[2] a = {2,3}")
        + f"{{ {MEAN} {_moment(ROOTS[0])} y = Identity(n) }}"
    )
    _check(text.replace("float", "double"), None, missed="no InstanceNormalization")


def test_layer_norm_whose_variance_has_a_mean_of_its_own() -> None:
    """torch.export writes a variance with a mean of its own, its axis counted from the front."""
    body = (
        "m = ReduceMean(x, a) d = Sub(x, m) k = ReduceMean(x, b) f = Sub(x, k) q = Mul(f, f)"
        " v = ReduceMean(q, b) w = Add(v, e) r = Sqrt(w) y = Div(d, r)"
    )
    _check(
        _graph("N,4,8", ", int64[1] b = {2}") + f"{{ {body} }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s>"
        "{ y = LayerNormalization<axis=-1, epsilon=0.00001>(x, s) }",
    )


def test_variance_about_another_mean_stays() -> None:
    body = (
        "m = ReduceMean(x, a) d = Sub(x, m) k = ReduceMean(x, b) f = Sub(x, k) q = Mul(f, f)"
        " v = ReduceMean(q, a) w = Add(v, e) r = Sqrt(w) y = Div(d, r)"
    )
    _check(_graph("N,4,8", ", int64[1] b = {1}") + f"{{ {body} }}", None)


def test_weight_before_the_root_of_an_rms_norm() -> None:
    body = (
        "h = Mul(g0, x) q = Mul(x, x) v = ReduceMean(q, a) w = Add(v, e) r = Sqrt(w) y = Div(h, r)"
    )
    _check(
        _graph("N,4,8", ", float[8] g0") + f"{{ {body} }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s>"
        "{ y = RMSNormalization<axis=-1, epsilon=0.00001>(x, s) }",
        opset=23,
    )
    _check(_graph("N,4,8", ", float[8] g0") + f"{{ {body} }}", None, opset=22, missed="opset 23")


def test_layer_norm_whose_tail_was_taken_for_an_rms_norm() -> None:
    g = _graph("N,4,8", ", float[8] s")
    _check(
        g + f"{{ {MEAN} y = RMSNormalization<axis=-1, epsilon=0.01>(d, s) }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s>"
        "{ y = LayerNormalization<axis=-1, epsilon=0.01>(x, s) }",
        opset=23,
    )
    other = _graph("N,4,8", ", float[4,8] s", axes="int64[1] a = {1}")
    for axes in (other, _graph("N,4,8", ", float[4,8] s")):
        _check(axes + f"{{ {MEAN} y = RMSNormalization<axis=1>(d, s) }}", None, opset=23)


LENGTHS = {
    "ReduceL2": ("r = ReduceL2(x, a)", "0.0"),
    "ReduceSumSquare": ("t = ReduceSumSquare(x, a) r = Sqrt(t)", "0.0"),
    "squares": ("q = Mul(x, x) t = ReduceSum(q, a) r = Sqrt(t)", "0.0"),
    "epsilon": ("q = Pow(x, two) t = ReduceSum(q, a) w = Add(t, e) r = Sqrt(w)", "0.00000125"),
}


@pytest.mark.parametrize(("length", "epsilon"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("tail", ["y = Div(x, r)", "i = Reciprocal(r) y = Mul(x, i)"])
def test_unit_length(length: str, epsilon: str, tail: str) -> None:
    """The mean of D squares is their sum over D."""
    proto = parse(_graph("N,4,8") + f"{{ {length} {tail} }}", opset=23)
    model = ir.from_proto(proto)
    apply(norm.RULES, model)
    (node,) = model.graph
    assert node.op_type == "RMSNormalization"
    assert node.attributes["epsilon"].as_float() == pytest.approx(float(epsilon))
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)}
    feeds["x"][0, 1] *= 1e-6
    feeds["x"][1, 2] = 0
    got, expected = run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "length"),
    [
        (AXES, "t = ReduceL2(x, a) r = Clip(t, e)"),  # clamped: another number where it is small
        ("int64[1] a = {1}", "r = ReduceL2(x, a)"),
        ("int64[2] a = {1, 2}", "r = ReduceL2(x, a)"),
        (AXES, "t = ReduceL2(x, a) r = Add(t, e)"),
        (AXES, "r = ReduceL1(x, a)"),
    ],
)
def test_other_lengths_stay(axes: str, length: str) -> None:
    _check(_graph("N,4,8", axes=axes) + f"{{ {length} y = Div(x, r) }}", None, opset=23)


def test_unit_length_where_it_gains_nothing_stays() -> None:
    text = _graph("N,4,8") + "{ r = ReduceL2(x, a) y = Div(x, r) }"
    _check(text, None, opset=22, missed="opset 23")
    _check(text, None, opset=23, target="tensorrt", missed="no RMSNormalization")


def test_norms_without_epsilon() -> None:
    """An epsilon of zero, which cleaning has taken away."""
    tail = "v = ReduceMean(q, a) r = Sqrt(v) y = Div({0}, r)"
    _check(
        _graph("N,4,8") + f"{{ {MEAN} q = Mul(d, d) {tail.format('d')} }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s> { y = LayerNormalization<axis=-1, epsilon=0.0>(x, s) }",
    )
    _check(
        _graph("N,4,8") + f"{{ q = Mul(x, x) {tail.format('x')} }}",
        "g (float[N,4,8] x) => (float[N,4,8] y) <float[8] s> { y = RMSNormalization<axis=-1, epsilon=0.0>(x, s) }",
        opset=23,
    )
