"""Attention with the sequence last, and within windows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import turned

import graphopt
from tests.rewriting import apply, check, make_feeds, parse, run

COLUMNS = "g (float[B,2,4,N] v, float[B,2,N,N] z) => (float[B,2,4,N] y)"


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
@pytest.mark.parametrize(
    ("soft", "last"),
    [
        ("p = Softmax(z)", "p"),
        ("p = Softmax(z) n = IsNaN(p) w = Where(n, zero, p)", "w"),
        ("d = Cast<to=11>(z) p = Softmax(d) w = Cast<to=1>(p)", "w"),
    ],
    ids=["plain", "guarded", "cast"],
)
def test_values_are_transposed_instead_of_weights(target: str, soft: str, last: str) -> None:
    held = " <float zero = {0.0}>" if "zero" in soft else ""
    check(
        turned.RULES,
        f"{COLUMNS}{held} {{ {soft} t = Transpose<perm=[0,1,3,2]>({last}) y = MatMul(v, t) }}",
        f"{COLUMNS}{held} {{ {soft} t = Transpose<perm=[0,1,3,2]>(v) r = MatMul({last}, t)"
        " y = Transpose<perm=[0,1,3,2]>(r) }",
        target=target,
    )


def test_values_without_heads() -> None:
    """As the attention of autoencoders for images is written, with bmm."""
    g = "g (float[B,4,N] v, float[B,N,N] z) => (float[B,4,N] y)"
    check(
        turned.RULES,
        f"{g} {{ p = Softmax<axis=2>(z) t = Transpose<perm=[0,2,1]>(p) y = MatMul(v, t) }}",
        f"{g} {{ p = Softmax<axis=2>(z) t = Transpose<perm=[0,2,1]>(v) r = MatMul(p, t)"
        " y = Transpose<perm=[0,2,1]>(r) }",
        target="cuda",
    )


@pytest.mark.parametrize(
    ("body", "target", "missed"),
    [
        ("p = Softmax(z) t = Transpose<perm=[0,1,3,2]>(p)", "cpu", "gains nothing"),
        ("p = Softmax(z) t = Transpose<perm=[0,1,3,2]>(p)", "portable", ""),
        ("p = Softmax<axis=2>(z) t = Transpose<perm=[0,1,3,2]>(p)", "cuda", ""),
        ("p = Relu(z) t = Transpose<perm=[0,1,3,2]>(p)", "cuda", ""),
        ("p = Softmax(z) t = Transpose<perm=[1,0,3,2]>(p)", "cuda", ""),
    ],
    ids=["cpu", "portable", "axis", "other", "heads"],
)
def test_columns_stay(body: str, target: str, missed: str) -> None:
    text = COLUMNS.replace("B,", "2,") + f" {{ {body} y = MatMul(v, t) }}"
    check(turned.RULES, text, target=target, missed=missed)


WINDOWS = (
    "g (float[{0},3,2,5,4] q, float[{0},3,2,6,4] k, float[{0},3,2,6,7] v) => (float[{0},3,2,5,7] y)"
)
VIEWS = "int64[4] a = {-1,2,5,4}, int64[4] b = {-1,2,6,4}, int64[4] c = {-1,2,6,7}"
KT = "t = Transpose<perm=[0,1,2,4,3]>(k)"


def _windows(batch: str, body: str, held: str = "") -> str:
    return f"{WINDOWS.format(batch)} <{held}> {{ {body} }}".replace(" <> ", " ")


@pytest.mark.parametrize(
    ("batch", "scores", "held", "made"),
    [
        ("B", f"{KT} z = MatMul(q, t)", "", "r = Reshape(q, a) j = Reshape(k, b) u = Transpose<perm=[0,1,3,2]>(j)"
         " z = MatMul(r, u)"),
        ("2", f"{KT} w = MatMul(q, t) z = Mul(w, s)", "float s = {0.5}", "r = Reshape(q, a) j = Reshape(k, b)"
         " u = Transpose<perm=[0,1,3,2]>(j) w = MatMul(r, u) z = Mul(w, s)"),
        ("B", f"{KT} o = Mul(q, s) i = Mul(t, s) z = MatMul(o, i)", "float s = {0.5}", "r = Reshape(q, a) o = Mul(r, s)"
         " j = Reshape(k, b) u = Transpose<perm=[0,1,3,2]>(j) i = Mul(u, s) z = MatMul(o, i)"),
    ],
    ids=["plain", "scores scaled", "both scaled"],
)  # fmt: skip
@pytest.mark.parametrize("guarded", [False, True])
def test_windows_go_into_the_batch(
    batch: str, scores: str, held: str, made: str, guarded: bool
) -> None:
    last = (
        "n = IsNaN(p) g1 = Where(n, zero, p) {0} = MatMul(g1, {1})"
        if guarded
        else "{0} = MatMul(p, {1})"
    )
    tail = f"p = Softmax(z) {last}"
    held = ", ".join(filter(None, (held, "float zero = {0.0}" if guarded else "")))
    first = "-1" if batch == "B" else batch
    after = f"{VIEWS}, int64[5] back = {{{first},3,2,5,7}}" + (f", {held}" if held else "")
    order = f"{made} p = Softmax<axis=-1>(z)" + (
        " n = IsNaN(p) g1 = Where(n, zero, p)" if guarded else ""
    )
    check(
        turned.RULES,
        _windows(batch, f"{scores} {tail.format('y', 'v')}", held),
        _windows(
            batch,
            f"{order} h = Reshape(v, c) m = MatMul({'g1' if guarded else 'p'}, h) y = Reshape(m, back)",
            after,
        ),
        target="cuda",
    )


def test_keys_turned_at_once() -> None:
    """Keys [B, W, L, H, D] go to [B, W, H, D, L] in one Transpose, which becomes the other."""
    proto = parse(
        "g (float[B,3,2,5,4] q, float[B,3,6,2,4] k, float[B,3,2,6,7] v) => (float[B,3,2,5,7] y)"
        " { t = Transpose<perm=[0,1,3,4,2]>(k) z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v) }"
    )
    model = ir.from_proto(proto)
    assert apply(turned.RULES, model, target="tensorrt").rewrites
    perms = [n.attributes["perm"].as_ints() for n in model.graph if n.op_type == "Transpose"]
    assert [list(perm) for perm in perms] == [[0, 1, 3, 2, 4], [0, 1, 3, 2]]
    feeds = make_feeds(proto, 0)
    np.testing.assert_allclose(
        run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("text", "target", "missed"),
    [
        (_windows("B", f"{KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v)").replace("5", "S"), "cuda", "unknown"),
        (_windows("B", f"{KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v)"), "portable", ""),
        (_windows("B", f"{KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v)"), "cpu", "gains nothing"),
        (_windows("B", f"{KT} z = MatMul(q, t) p = Softmax<axis=3>(z) y = MatMul(p, v)"), "cuda", ""),
        (_windows("B", f"{KT} w = MatMul(q, t) z = Mul(w, s) p = Softmax(z) y = MatMul(p, v)", "float[6] s"), "cuda",
         "one number"),
        (_windows("B", f"{KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v)")
         .replace("float[B,3,2,6,4] k", "float[1,1,2,6,4] k"), "cuda", ""),
    ],
    ids=["sizes", "portable", "cpu", "axis", "scale", "shared"],
)  # fmt: skip
def test_windows_stay(text: str, target: str, missed: str) -> None:
    check(turned.RULES, text, target=target, missed=missed)


def _kinds(proto: onnx.ModelProto, target: str) -> list[str]:
    result = graphopt.optimize(proto, target=target)
    assert result.report.verification is not None
    assert result.report.verification.passed
    return [node.op_type for node in result.model.graph]


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
def test_the_pipeline_makes_attention_of_both(target: str) -> None:
    windows = _windows("B", f"{KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v)")
    assert ("Attention" in _kinds(parse(windows, opset=17), target)) is (target != "cpu")
    columns = (
        "g (float[B,2,4,N] q, float[B,2,4,N] k, float[B,2,8,N] v) => (float[B,2,8,N] y) <float s = {0.5}>"
        " { u = Transpose<perm=[0,1,3,2]>(q) a = MatMul(u, k) z = Mul(a, s) p = Softmax(z)"
        " t = Transpose<perm=[0,1,3,2]>(p) y = MatMul(v, t) }"
    )
    assert ("Attention" in _kinds(parse(columns, opset=17), target)) is (target != "cpu")
