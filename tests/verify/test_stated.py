"""Sizes that weights demand of inputs with free dimensions."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.runtime.specs import input_specs
from graphopt.verify.feeds import make_feeds
from graphopt.verify.stated import stated_sizes

HEAD = '<ir_version: 10, opset_import: ["" : 17]>'


def model(declared: str, nodes: str) -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(f"{HEAD} g ({declared}) => (float y) {{ {nodes} }}")
    )


@pytest.mark.parametrize(
    ("declared", "nodes", "expected"),
    [
        ("float[b,k] x, float[7,3] w", "y = MatMul(x, w)", {("x", 1): 7}),
        ("float[k,b] x, float[3,7] w", "y = MatMul(w, x)", {("x", 0): 7}),
        ("float[b,k] x, float[7] w", "y = MatMul(x, w)", {("x", 1): 7}),
        ("float[b,k] x, float[7,3] w", "y = Gemm(x, w)", {("x", 1): 7}),
        ("float[b,k] x, float[3,7] w", "y = Gemm<transB = 1>(x, w)", {("x", 1): 7}),
        ("float[k,b] x, float[3,7] w", "y = Gemm<transA = 1, transB = 1>(x, w)", {("x", 0): 7}),
        ("float[k,b] x, float[3,7] w", "y = Gemm(w, x)", {("x", 0): 7}),
        ("float[b,k] x, float[7,3] w", "y = Gemm<transA = 1, transB = 1>(w, x)", {("x", 1): 7}),
        (
            "float[b,c,h,w] x, float[8,2,3,3] k",
            "a = Relu(x) y = Conv<group = 4>(a, k)",
            {("x", 1): 8},
        ),
        ("float[b,c,h,w] x, float[8,2,3,3] k", "y = ConvTranspose(x, k)", {("x", 1): 8}),
        (
            "float[s,b,i] x, float[1,4,5] w, float[1,4,1] r",
            "y = LSTM<hidden_size = 1>(x, w, r)",
            {("x", 2): 5},
        ),
        ("float[b,c] x, float[6] s", "y = LayerNormalization(x, s)", {("x", 1): 6}),
        ("float[b,c,w] x, float[6] s", "y = BatchNormalization(x, s, s, s, s)", {("x", 1): 6}),
        ("float[b,c] x, float[d] s", "y = LayerNormalization(x, s)", {}),
        ("float[2,3] x, float[3] s", "y = LayerNormalization(x, s)", {}),
        ("float[b,c] x", "y = MatMul(x, unknown)", {}),
        ("float[b,c] x, float[6] s", "y = Add(s, x)", {}),
    ],
)
def test_what_a_weight_demands(
    declared: str, nodes: str, expected: dict[tuple[str, int], int]
) -> None:
    text = declared + (", float unknown" if "unknown" in nodes else "")
    assert stated_sizes(model(text, nodes)) == expected


def test_feeds_meet_the_demand_in_every_set() -> None:
    made = make_feeds(model("float[b,k] x, float[7,3] w", "y = MatMul(x, w)"))
    assert {feed.values["x"].shape for feed in made} == {(2, 7), (1, 7), (3, 7)}


def test_minus_one_is_a_free_dimension() -> None:
    free = model("float[b,4] x", "y = Relu(x)")
    free.graph.inputs[0].shape = ir.Shape([-1, 4])
    assert input_specs(free)[0].shape == (None, 4)
    assert {feed.values["x"].shape[1] for feed in make_feeds(free)} == {4}
