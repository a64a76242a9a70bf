"""Stages and layers of a run: bytes and arithmetic after each pass, and in which numbers products are computed."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest

from graphopt import optimize
from graphopt.report.layers import Layer, layers
from graphopt.report.markdown import run_markdown
from graphopt.report.stages import Stage, stage

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEAD + text))


def test_a_stage_counts_constants_and_products() -> None:
    text = "g (float[n,4] x) => (float[n,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> { m = MatMul(x, w) y = Relu(m) }"
    held = model(text)
    assert stage("a", held) == Stage("a", 2, 32, 2 * 4 * 2)
    assert stage("a", held) == stage("a", held)


def test_a_product_of_unknown_size_is_said_to_be_uncounted() -> None:
    text = "g (float[2,4] x) => (float y) { t = NonZero(x) f = Cast<to = 1>(t) y = MatMul(f, f) }"
    assert stage("", model(text)).flops >= 0


def test_a_run_counts_after_each_pass_where_asked() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { a = Identity(x) b = Identity(a) y = Relu(b) }"
    data = onnx.parser.parse_model(HEAD + text).SerializeToString()
    report = optimize(data, stages=True).report
    assert report.stages[0].name == ""
    assert report.stages[0].nodes == 3
    assert report.stages[-1].nodes == report.output.nodes == 1
    assert len(report.stages) == 1 + sum(run.changed for run in report.passes)
    assert "## Pass by pass" in run_markdown(report)
    assert report.to_json()["stages"][0]["nodes"] == 3
    assert optimize(data).report.stages == ()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "g (float[n,4] x) => (float[n,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> { y = MatMul(x, w) }",
            Layer("y", "MatMul", "float", "float[4,2]", "", 32),
        ),
        (
            """g (float[n,2] x) => (float[n,2] y)
            <int8[2,2] w = {1,2,3,4}, float[2] s = {0.5, 0.25}, float k = {0.1}, uint8 z = {3}> {
              q = QuantizeLinear(x, k, z) d = DequantizeLinear(q, k, z)
              e = DequantizeLinear<axis = 1>(w, s) y = MatMul(d, e) }""",
            Layer("y", "MatMul", "uint8 x int8", "int8[2,2]", "2, one a channel", 4),
        ),
        (
            "g (float[n,2] x) => (float[n,n] y) { t = Transpose(x) y = MatMul(x, t) }",
            Layer("y", "MatMul", "float", "", "", 0),
        ),
    ],
)
def test_a_layer_says_its_numbers(text: str, wanted: Layer) -> None:
    held = model(text)
    for node in held.graph:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType.UINT8
    assert layers(held) == (wanted,)


def test_a_weight_kept_whole_has_no_scales() -> None:
    held = model("g (float16[n,2] x) => (float16[n,2] y) { y = MatMul(x, x) }")
    assert layers(held)[0].arithmetic == "float16"
