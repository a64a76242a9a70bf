"""What is added to scores before a Softmax: joined, and taken out of the view of windows."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes import biases

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run

QKV = "float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
KT = "t = Transpose<perm=[0,1,3,2]>(k)"
TWICE = f"{KT} a = MatMul(q, t) z = Add(a, m) x = Add(z, n) p = Softmax(x) y = MatMul(p, v)"
ONCE = f"{KT} a = MatMul(q, t) w = Add(m, n) z = Add(a, w) p = Softmax(z) y = MatMul(p, v)"


@pytest.mark.parametrize("opset", [14, 23])
def test_two_masks_become_one(opset: int) -> None:
    """Also below the opset of Attention, so that lift-opset sees it."""
    io = f"g ({QKV}, float[1,2,S,L] m, float[B,1,S,L] n) => (float[B,2,S,4] y)"
    check(biases.RULES, f"{io} {{ {TWICE} }}", f"{io} {{ {ONCE} }}", opset=opset, tolerance=1e-5)


@pytest.mark.parametrize(
    ("inputs", "body", "target"),
    [
        # scores of relative positions, which are computed of the queries
        (", float[B,2,4,L] r, float[S,L] n", f"m = MatMul(q, r) {TWICE}", "cpu"),
        (", float[S,L] m, float[S,L] n", TWICE.replace("Softmax", "LogSoftmax"), "cpu"),
        (", float[S,L] m, float[S,L] n", TWICE, "portable"),
    ],
)
def test_two_masks_stay(inputs: str, body: str, target: str) -> None:
    check(
        biases.RULES,
        f"g ({QKV}{inputs}) => (float[B,2,S,4] y) {{ {body} }}",
        opset=23,
        target=target,
    )


def _windows(batch: str, mask: str, opset: int = 17) -> ir.Model:
    return ir.from_proto(parse(_text(batch, mask), opset=opset))


def _text(batch: str, mask: str) -> str:
    scores = f"float[{batch},2,5,4] q, float[{batch},2,4,5] k, {mask} m"
    return (
        f"g ({scores}) => (float[{batch},2,5,5] y)"
        " <int64[5] five = {-1,3,2,5,5}, int64[4] four = {-1,2,5,5}> { a = MatMul(q, k)"
        " r = Reshape(a, five) z = Add(r, m) s = Reshape(z, four) y = Softmax(s) }"
    )


@pytest.mark.parametrize(
    ("batch", "mask", "kinds"),
    [
        ("3", "float[1,3,1,5,5]", ["MatMul", "Squeeze", "Add", "Softmax"]),
        ("6", "float[3,1,5,5]", ["MatMul", "Tile", "Add", "Softmax"]),
        ("6", "float[1,3,2,5,5]", ["MatMul", "Squeeze", "Tile", "Add", "Softmax"]),
        ("N", "float[3,1,5,5]", ["MatMul", "Shape", "Slice", "Div", "Concat", "Tile", "Add", "Softmax"]),
    ],
)  # fmt: skip
def test_mask_of_windows(batch: str, mask: str, kinds: list[str]) -> None:
    model = _windows(batch, mask)
    apply(biases.RULES, model)
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == kinds
    proto = parse(_text(batch, mask), opset=17)
    feeds = make_feeds(proto, 0, dim=6)
    compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.REORDERED, 1e-6)


@pytest.mark.parametrize(
    ("batch", "mask", "change"),
    [
        ("6", "float[2,3,1,5,5]", ("", "")),  # another mask for each image
        ("6", "float[1,3,1,1,5]", ("", "")),
        ("6", "float[5,5]", ("", "")),
        ("6", "float[1,3,1,5,5]", ("Softmax", "Relu")),
        ("6", "float[1,3,1,5,5]", ("four = {-1,2,5,5}", "four = {2,-1,5,5}")),
    ],
)
def test_other_masks_of_views_stay(batch: str, mask: str, change: tuple[str, str]) -> None:
    text = _text(batch, mask).replace(*change) if change[0] else _text(batch, mask)
    text = (
        text.replace("=> (float[6,2,5,5] y)", "=> (float[2,6,5,5] y)") if "{2,-1" in text else text
    )
    check(biases.RULES, text, opset=17)


def test_portable_models_of_unknown_batch_stay() -> None:
    check(biases.RULES, _text("N", "float[3,1,5,5]"), opset=17, target="portable", dims=(6, 3))
