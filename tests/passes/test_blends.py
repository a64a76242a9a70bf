"""Scores blended with a number by zeros and ones, as GPT hides what comes after a token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import attention, blends

from tests.rewriting import apply, make_feeds, parse, run

QKV = "float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v"
KT = "t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, t)"
TABLE = "float[1,1,4,4] table = {1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}"
HELD = (
    f"{TABLE}, float one = {{1.0}}, float none = {{0.0}}, float low = {{-1e4}}, float high = {{1e4}},"
    " float huge = {-3.4028234663852886e38},"
    " int64[1] zero = {0}, int64[2] zeros = {0, 0}, int64[2] last = {2, 3}"
)
CUT = "n = Shape<start=2, end=3>(q) nn = Concat<axis=0>(n, n) b = Slice(table, zeros, nn, last) o = Sub(one, b)"
PADDING = "f = Cast<to=1>(c) g = Sub(one, f) z = Mul(g, huge)"
END = "p = Softmax(x) y = MatMul(p, v)"
BLENDS = {
    "gpt2 of 2019": "w = Mul(s, b) h = Mul(o, high) x = Sub(w, h)",
    "plain": "w = Mul(s, b) h = Mul(low, o) x = Add(h, w)",
    "padding": f"{PADDING} w = Mul(b, s) h = Mul(o, low) e = Add(h, z) x = Add(w, e)",
    "padding first": f"{PADDING} w = Mul(b, s) h = Mul(o, low) e = Add(z, h) x = Add(e, w)",
    "chosen padding": "kb = Cast<to=9>(c) z = Where(kb, none, huge) w = Mul(s, b) h = Mul(o, low) e = Add(h, z)"
    " x = Add(w, e)",
}


def _text(blend: str, *, cut: str = CUT, more: str = "") -> str:
    return f"g ({QKV}, int64[B,1,1,S] c{more}) => (float[B,2,S,4] y) <{HELD}> {{ {KT} {cut} {blend} {END} }}"


@pytest.mark.parametrize("blend", BLENDS.values(), ids=BLENDS)
def test_blend_is_a_mask(blend: str) -> None:
    """Also where padding hides all that a query may see: what comes after it is seen then, evenly."""
    proto = parse(_text(blend), opset=23)
    model = ir.from_proto(proto)
    ctx = apply((*blends.RULES, *attention.RULES), model)
    assert "Attention" in [node.op_type for node in model.graph], ctx.remarks
    for size, padding in (
        (4, [1, 1, 1, 1]),
        (4, [0, 0, 1, 1]),
        (4, [0, 0, 0, 0]),
        (3, [1, 1, 0]),
        (1, [1]),
    ):
        feed = make_feeds(proto, size, dim=size)
        feed["c"][:] = padding
        np.testing.assert_allclose(
            run(ir.to_proto(model), feed)[0], run(proto, feed)[0], rtol=1e-4, atol=1e-5
        )


def test_blend_by_constants_that_were_folded() -> None:
    held = HELD.replace(
        "int64[1] zero",
        "float[1,1,4,4] folded = {0,-1e4,-1e4,-1e4, 0,0,-1e4,-1e4, 0,0,0,-1e4, 0,0,0,0}, int64[1] zero",
    )
    text = _text("w = Mul(s, table) x = Add(w, folded)", cut="").replace(HELD, held)
    text = text.replace("B,2,S", "B,2,4").replace("B,1,1,S", "B,1,1,4")
    proto = parse(text)
    model = ir.from_proto(proto)
    apply(blends.RULES, model)
    assert [n.op_type for n in model.graph].count("Where") == 1
    feed = make_feeds(proto, 0)
    np.testing.assert_allclose(run(ir.to_proto(model), feed)[0], run(proto, feed)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("blend", "missed"),
    [
        # padding of -1e4: a row that both hide mixes scores with the number
        (BLENDS["padding"].replace("Mul(g, huge)", "Mul(g, low)"), "would mix"),
        (
            BLENDS["padding"]
            .replace("Cast<to=1>(c)", "Cast<to=1>(c) ff = Mul(f0, one)")
            .replace("Sub(one, f)", "Sub(one, f0)"),
            "would mix",
        ),
        (BLENDS["plain"].replace("Mul(low, o)", "Mul(high, o)"), ""),
        (BLENDS["plain"].replace("Mul(low, o)", "Mul(low, b)"), ""),
        (BLENDS["plain"].replace("x = Add(h, w)", "x0 = Add(h, w) x = Relu(x0)"), ""),
        (
            BLENDS["plain"]
            .replace("Mul(s, b)", "Mul(s, f0)")
            .replace("Mul(low, o)", "Mul(low, o1)"),
            "",
        ),
    ],
)
def test_other_blends_stay(blend: str, missed: str) -> None:
    """Numbers from outside are no flags; nor may padding have a fraction."""
    text = _text(blend, cut=f"{CUT} o1 = Sub(one, f0)", more=", float[B,1,1,S] f0")
    ctx = apply(blends.RULES, ir.from_proto(parse(text)))
    assert not ctx.rewrites
    assert not missed or any(missed in remark.reason for remark in ctx.remarks)


def test_blends_of_half_precision_and_elsewhere_stay() -> None:
    """Scores count beside any number of half precision; a portable model has no attention."""
    half = _text(BLENDS["plain"]).replace("float", "float16").replace("<to=1>", "<to=10>")
    for number, bits in (("{1.0}", "{15360}"), ("{-1e4}", "{61666}"), ("{1e4}", "{28898}")):
        half = half.replace(number, bits)
    half = half.replace("{-3.4028234663852886e38}", "{64511}").replace("none = {0.0}", "none = {0}")
    half = half.replace("{1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}", "{" + "15360," * 15 + "15360}")
    assert not apply(blends.RULES, ir.from_proto(parse(half))).rewrites
    plain = ir.from_proto(parse(_text(BLENDS["plain"])))
    assert not apply(blends.RULES, plain, target="portable").rewrites
