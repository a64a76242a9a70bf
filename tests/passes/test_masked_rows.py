"""Queries that see no key, zero by a guard: told apart where the target's Attention is not known to give zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import attention, batched_heads, heads

import graphopt
from tests.passes.test_attention_masks import GUARD, KT, QKV, ROWS
from tests.rewriting import apply, check, make_feeds, parse, run

UNTRUSTED = pytest.mark.parametrize("target", ["cuda", "tensorrt"])


def _fused(
    proto: onnx.ModelProto, target: str, rules: tuple[object, ...] = attention.RULES
) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    apply(rules, model, target=target)  # type: ignore[arg-type]
    kinds = {node.op_type for node in model.graph}
    assert "Attention" in kinds
    assert not kinds & {"Softmax", "IsNaN"}
    assert not apply(rules, model, target=target).rewrites  # type: ignore[arg-type]
    return ir.to_proto(model)


def _seen_by_attention(
    proto: onnx.ModelProto, feeds: dict[str, npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """The mask that the operator is given."""
    node = next(n for n in proto.graph.node if n.op_type == "Attention")
    return run(_with_output(proto, node.input[3]), feeds)[-1]


@UNTRUSTED
@pytest.mark.parametrize("shape", ["S,L", "B,1,S,L"])
@pytest.mark.parametrize(("dtype", "error"), [("float", 1e-5), ("float16", 1e-2)])
def test_mask_from_outside(target: str, shape: str, dtype: str, error: float) -> None:
    """Rows of anything are what they were of the parts, and the operator sees no row that is hidden throughout."""
    zero = "0.0" if dtype == "float" else "0"
    proto = parse(
        f"g ({QKV}, float[{shape}] m) => (float[B,2,S,4] y) <float zero = {{{zero}}}>"
        f"{{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) {GUARD} }}".replace("float", dtype),
        opset=23,
    )
    got = _fused(proto, target)
    rng, kind = np.random.default_rng(0), np.dtype("float16" if error > 1e-3 else "float32")
    feeds = {
        name: rng.standard_normal((2, 2, size, 4)).astype(kind)
        for name, size in (("q", len(ROWS)), ("k", 4), ("v", 4))
    }
    rows = np.asarray(ROWS, np.float32)
    rows = np.maximum(rows, np.finfo(kind).min, where=np.isfinite(rows), out=rows).astype(kind)
    feeds["m"] = rows if shape == "S,L" else np.stack([rows, rows[::-1]])[:, None]
    expected = run(proto, feeds)[0]
    assert not expected[0, :, [2, 7, 8]].any()
    np.testing.assert_allclose(run(got, feeds)[0], expected, rtol=10 * error, atol=error)
    assert np.isfinite(np.max(_seen_by_attention(got, feeds), axis=-1)).all()


CHOICES = [
    "m = Where(c, zero, inf) s = Add(a, m)",
    "s = Where(c, a, inf)",
    "h = Not(c) s = Where(h, inf, a)",
]


@UNTRUSTED
@pytest.mark.parametrize("choice", CHOICES, ids=["added", "kept", "dropped"])
@pytest.mark.parametrize("shape", ["B,1,S,L", "B,2,S,L", "B,1,1,L"])
def test_choice_of_minus_infinity(target: str, choice: str, shape: str) -> None:
    proto = parse(
        f"g ({QKV}, bool[{shape}] c) => (float[B,2,S,4] y) <float zero = {{0.0}}, float inf = {{0.0}}>"
        f"{{ {KT} a = MatMul(q, t) {choice} p = Softmax(s) {GUARD} }}",
        opset=23,
    )
    held = next(t for t in proto.graph.initializer if t.name == "inf")
    held.CopyFrom(onnx.numpy_helper.from_array(np.asarray(-np.inf, np.float32), "inf"))
    got = _fused(proto, target)
    feeds = make_feeds(proto, 0, dim=5)
    feeds["c"][0, :, 0] = False
    expected = run(proto, feeds)[0]
    assert not expected[0, 0, 0].any()
    np.testing.assert_allclose(run(got, feeds)[0], expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(np.max(_seen_by_attention(got, feeds), axis=-1)).all()


def test_rows_told_apart_in_onnx_text() -> None:
    """Each row holds -infinity alone, or a zero as well."""
    io = f"g ({QKV}, bool[B,1,S,L] c) => (float[B,2,S,4] y) <float zero = {{0.0}}"
    check(
        attention.RULES,
        f"{io}, float low = {{-inf}}> {{ m = Where(c, zero, low) {KT} a = MatMul(q, t) z = Add(a, m)"
        f" p = Softmax(z) {GUARD} }}",
        f"{io}, float low = {{-inf}}, int64[1] last = {{-1}}> {{ m = Where(c, zero, low) r = ReduceMax(m, last)"
        " s = Greater(r, low) n = Where(s, m, zero) a = Attention<scale=1.0>(q, k, v, n) y = Where(s, a, zero) }",
        opset=23,
        target="cuda",
    )


def test_trusted_operator_tells_nothing_apart() -> None:
    """ONNX Runtime's kernel on the CPU gives zeros."""
    io = f"g ({QKV}, bool[B,1,S,L] c) => (float[B,2,S,4] y) <float zero = {{0.0}}, float low = {{-inf}}"
    check(
        attention.RULES,
        f"{io}> {{ m = Where(c, zero, low) {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) {GUARD} }}",
        f"{io}> {{ m = Where(c, zero, low) y = Attention<scale=1.0>(q, k, v, m) }}",
        opset=23,
    )


@UNTRUSTED
def test_without_guard_rows_of_minus_infinity_are_nan_still(target: str) -> None:
    proto = parse(
        f"g ({QKV}, float[S,L] m) => (float[B,2,S,4] y) {{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z)"
        " y = MatMul(p, v) }",
        opset=23,
    )
    got = _fused(proto, target)
    feeds = make_feeds(proto, 0, dim=3)
    feeds["m"][0] = -np.inf
    expected = run(proto, feeds)[0]
    assert np.isnan(expected[:, :, 0]).all()
    np.testing.assert_allclose(run(got, feeds)[0], expected, rtol=1e-4, atol=1e-5)


@UNTRUSTED
@pytest.mark.parametrize("shape", ["S,L", "1,S,L"])
def test_one_head(target: str, shape: str) -> None:
    proto = parse(
        f"g (float[B,S,4] q, float[B,L,4] k, float[B,L,6] v, float[{shape}] m) => (float[B,S,6] y)"
        " <float zero = {0.0}> { t = Transpose<perm=[0,2,1]>(k) a = MatMul(q, t) z = Add(a, m) p = Softmax(z)"
        f" {GUARD} }}",
        opset=23,
    )
    got = _fused(proto, target)
    feeds = make_feeds(proto, 0, dim=3)
    feeds["m"][..., 1, :] = -np.inf
    expected = run(proto, feeds)[0]
    assert not expected[:, 1].any()
    np.testing.assert_allclose(run(got, feeds)[0], expected, rtol=1e-4, atol=1e-5)


def test_mask_for_every_head_from_outside_stays() -> None:
    check(
        attention.RULES,
        f"g ({QKV}, float[B,2,S,L] m) => (float[B,2,S,4] y) <float zero = {{0.0}}> {{ {KT} a = MatMul(q, t)"
        f" z = Add(a, m) p = Softmax(z) {GUARD} }}",
        opset=23,
        target="cuda",
        missed="for every head",
        tolerance=1e-5,
    )


IN = "float[B,S,2,4] q, float[B,L,2,4] k, float[B,L,2,4] v"
TURN = "a = Transpose<perm=[0,2,1,3]>(q) b = Transpose<perm=[0,2,1,3]>(k) c = Transpose<perm=[0,2,1,3]>(v)"
SHAPES = "int64[3] flat = {0,0,8}, int64[4] apart = {0,0,2,4}, float zero = {0.0}"


@pytest.mark.parametrize(
    ("shape", "squeeze"),
    [("B,1,S,1", "e = Squeeze(s, one)"), ("S,1", ""), ("1,S,1", "")],
)
def test_heads_stay_in_place(shape: str, squeeze: str) -> None:
    io = f"g ({IN}, bool[{shape}] s) => (float[B,S,2,4] y) <{SHAPES}"
    check(
        heads.RULES,
        f"{io}> {{ {TURN} o = Attention(a, b, c) z = Where(s, o, zero) y = Transpose<perm=[0,2,1,3]>(z) }}",
        f"{io}, int64[1] one = {{1}}> {{ {squeeze} a = Reshape(q, flat) b = Reshape(k, flat) c = Reshape(v, flat)"
        f" o = Attention<q_num_heads=2, kv_num_heads=2>(a, b, c) z = Where({'e' if squeeze else 's'}, o, zero)"
        " y = Reshape(z, apart) }",
        opset=23,
        target="cuda",
        tolerance=1e-5,
    )


@pytest.mark.parametrize("shape", ["B,2,S,1", "2,S,1", "B,1,S,4"])
def test_heads_that_are_made_zero_apart_stay(shape: str) -> None:
    check(
        heads.RULES,
        f"g ({IN}, bool[{shape}] s) => (float[B,S,2,4] y) <{SHAPES}> {{ {TURN} o = Attention(a, b, c)"
        " z = Where(s, o, zero) y = Transpose<perm=[0,2,1,3]>(z) }",
        opset=23,
        target="cuda",
        missed="for some heads alone",
        tolerance=1e-5,
    )


BATCHED = (
    "g (float[S,B,8] q, float[L,B,8] k, float[L,B,8] v, float[S,L] m) => (float[S,B,8] y) <float zero = {0.0},"
    " int64[3] fold = {0,-1,4}, int64[3] back = {0,-1,8}> { a = Reshape(q, fold) b = Reshape(k, fold)"
    " c = Reshape(v, fold) d = Transpose<perm=[1,0,2]>(a) j = Transpose<perm=[1,0,2]>(b)"
    " e = Transpose<perm=[0,2,1]>(j) f = Transpose<perm=[1,0,2]>(c) z = MatMul(d, e) g = Add(z, m)"
    " p = Softmax(g) n = IsNaN(p) w = Where(n, zero, p) h = MatMul(w, f)"
    " i = Transpose<perm=[1,0,2]>(h) y = Reshape(i, back) }"
)


def test_rotation_stays_in_place() -> None:
    """What is between the operator and the Transpose of its heads does not keep them in front."""
    proto = parse(
        f"g ({IN}, float[B,S,2] x, float[B,S,2] z, bool[B,1,S,1] s) => (float[B,S,2,4] y) <{SHAPES}> {{ {TURN}"
        " r = RotaryEmbedding(a, x, z) o = Attention(r, b, c) e = Where(s, o, zero) y = Transpose<perm=[0,2,1,3]>(e) }",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(heads.RULES, model, target="cuda")
    assert "Transpose" not in {node.op_type for node in model.graph}
    feeds = make_feeds(proto, 0)
    np.testing.assert_allclose(
        run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0], rtol=1e-4, atol=1e-5
    )


def test_heads_in_the_batch() -> None:
    """As nn.MultiheadAttention writes them: the rows that are told apart are those of all heads."""
    proto = parse(BATCHED, opset=23)
    got = _fused(proto, "cuda", (*attention.RULES, *batched_heads.RULES, *heads.RULES))
    node = next(n for n in got.graph.node if n.op_type == "Attention")
    assert {a.name: a.i for a in node.attribute}["q_num_heads"] == 2
    feeds = make_feeds(proto, 0, dim=3)
    feeds["m"][1] = -np.inf
    expected = run(proto, feeds)[0]
    assert not expected[1].any()
    np.testing.assert_allclose(run(got, feeds)[0], expected, rtol=1e-4, atol=1e-5)


@UNTRUSTED
def test_layers_share_what_is_told_apart(target: str) -> None:
    """As TorchScript writes an encoder with a mask of -infinity: one ReduceMax for all layers."""
    layer = (
        "a{0} = MatMul(q, t) z{0} = Add(a{0}, m) p{0} = Softmax(z{0}) n{0} = IsNaN(p{0})"
        " w{0} = Where(n{0}, zero, p{0}) y{0} = MatMul(w{0}, v)"
    )
    text = (
        f"g ({QKV}, bool[B,1,1,L] c) => (float[B,2,S,4] y) <float zero = {{0.0}}, float inf = {{-inf}}> {{ {KT}"
        f" m = Where(c, zero, inf) {layer.format(0)} {layer.format(1).replace('(q, t)', '(y0, t)')} y = Add(y0, y1) }}"
    )
    result = graphopt.optimize(parse(text, opset=17), target=target)
    kinds = [node.op_type for node in result.model.graph]
    assert (kinds.count("Attention"), kinds.count("ReduceMax")) == (2, 1)
    assert result.report.verification is not None
    assert result.report.verification.passed


ZEROED = {
    "dropped": "z = Where(c, low, a) p = Softmax(z) w = Where(c, zero, p)",
    "kept": "z = Where(c, a, low) p = Softmax(z) w = Where(c, p, zero)",
    "biased": "b = Where(c, low, m) z = Add(a, b) p = Softmax(z) w = Where(c, zero, p)",
    "kept and biased": "b = Where(c, m, low) z = Add(a, b) p = Softmax(z) w = Where(c, p, zero)",
}


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
@pytest.mark.parametrize("kind", ZEROED)
@pytest.mark.parametrize("low", ["-inf", "-1e9"])
def test_weights_that_are_masked_again(target: str, kind: str, low: str) -> None:
    """As Conformers mask scores, and the weights where they did: a guard of another spelling."""
    text = (
        f"g ({QKV.replace('L', 'S')}, bool[B,1,1,S] c, float[1,2,S,S] n) => (float[B,2,S,4] y)"
        f" <float zero = {{0.0}}, float low = {{{low}}}>"
        f" {{ m = MatMul(n, n) {KT} a = MatMul(q, t) {ZEROED[kind]} y = MatMul(w, v) }}"
    )
    proto = parse(text, opset=23)
    if "biased" in kind and low == "-1e9":
        ctx = apply(attention.RULES, ir.from_proto(proto), target=target)
        assert any("not masked" in remark.reason for remark in ctx.remarks)
        return
    got = _fused(proto, target)
    feeds = make_feeds(proto, 0, dim=3)
    feeds["c"][0] = "dropped" in kind or kind == "biased"
    feeds["c"][1] = [True, False, True]
    expected = run(proto, feeds)[0]
    assert not expected[0].any()
    np.testing.assert_allclose(run(got, feeds)[0], expected, rtol=1e-4, atol=1e-5)
    if target == "cpu":
        return
    sizes = ir.from_proto(got)
    reduced = next(node for node in sizes.graph if node.op_type == "ReduceMax").inputs[0]
    assert reduced is not None
    assert run(_with_output(got, reduced.name or ""), feeds)[-1].shape == (3, 1, 1, 3)


def _with_output(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    tapped.graph.output.append(onnx.ValueInfoProto(name=name))
    return tapped


def test_weights_that_are_masked_elsewhere_stay() -> None:
    check(
        attention.RULES,
        f"g ({QKV}, bool[B,1,S,L] c, bool[B,1,S,L] d) => (float[B,2,S,4] y) <float zero = {{0.0}}> {{ {KT}"
        " a = MatMul(q, t) p = Softmax(a) w = Where(d, zero, p) y = MatMul(w, v) }",
        opset=23,
        missed="not masked",
    )
